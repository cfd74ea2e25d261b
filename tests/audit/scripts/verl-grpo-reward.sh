#!/usr/bin/env bash
# GRPO with the KL in the reward instead.
algorithm=(
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=True
    algorithm.kl_penalty=kl            # k1
    algorithm.kl_ctrl.kl_coef=0.005
)
actor=(
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.rollout.n=16
)
python3 -m verl.trainer.main_ppo "${algorithm[@]}" "${actor[@]}" \
    data.train_batch_size=128 \
    trainer.total_epochs=15
