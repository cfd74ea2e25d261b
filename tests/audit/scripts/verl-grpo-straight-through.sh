#!/usr/bin/env bash
# GRPO with verl's straight-through estimator: k3's value, k2's gradient, one update per rollout.
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_batch_size=256 \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.actor.use_kl_loss=true \
    actor_rollout_ref.actor.kl_loss_coef=1e-2 \
    actor_rollout_ref.actor.kl_loss_type=k3+ \
    actor_rollout_ref.rollout.n=8
