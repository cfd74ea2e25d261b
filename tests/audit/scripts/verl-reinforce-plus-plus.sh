#!/usr/bin/env bash
# REINFORCE++: returns to go, whitened over the batch; the KL in the reward, discounted.
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=reinforce_plus_plus \
    algorithm.gamma=0.99 \
    algorithm.use_kl_in_reward=True \
    algorithm.kl_ctrl.kl_coef=0.01 \
    data.train_batch_size=1024 \
    actor_rollout_ref.actor.ppo_mini_batch_size=1024 \
    actor_rollout_ref.rollout.n=1
