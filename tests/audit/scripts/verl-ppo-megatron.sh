#!/usr/bin/env bash
# PPO on Megatron, by verl's other config; k2 as a loss.
HYDRA_FULL_ERROR=1 python3 -m verl.trainer.main_ppo --config-path=config \
    --config-name='ppo_megatron_trainer.yaml' \
    algorithm.adv_estimator=gae \
    data.train_batch_size=512 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_type=k2 \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    critic.megatron.tensor_model_parallel_size=2
