#!/usr/bin/env bash
# k3 in both places at one coefficient: two wrongs that make a right, where nothing divides by a
# standard deviation.
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=rloo \
    algorithm.use_kl_in_reward=True \
    algorithm.kl_penalty=k3 \
    algorithm.kl_ctrl.kl_coef=0.01 \
    data.train_batch_size=256 \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.01 \
    actor_rollout_ref.actor.kl_loss_type=k3 \
    actor_rollout_ref.rollout.n=8
