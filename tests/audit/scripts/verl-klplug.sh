#!/usr/bin/env bash
# GRPO with klplug's own KL: nothing left to say but what it is.
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_batch_size=1024 \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.rollout.n=8 \
    "+klplug.kl_type='k2_as_loss,horizon=sequence'" \
    +klplug.kl_coef=1e-3
