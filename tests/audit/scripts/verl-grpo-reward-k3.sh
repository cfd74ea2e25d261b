#!/usr/bin/env bash
# The estimator of the loss, put in the reward.
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=True \
    algorithm.kl_penalty=low_var_kl \
    algorithm.kl_ctrl.kl_coef=0.001 \
    data.train_batch_size=512 \
    actor_rollout_ref.actor.ppo_mini_batch_size=512 \
    actor_rollout_ref.rollout.n=8
