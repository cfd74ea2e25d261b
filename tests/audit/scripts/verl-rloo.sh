#!/usr/bin/env bash
# RLOO: a leave-one-out baseline, the KL in the reward.
set -euo pipefail
export VLLM_ATTENTION_BACKEND=XFORMERS
n_resp=$((2 * 4))
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=rloo \
    algorithm.use_kl_in_reward=True \
    algorithm.kl_penalty=kl \
    algorithm.kl_ctrl.kl_coef=0.001 \
    data.train_batch_size=1024 \
    actor_rollout_ref.actor.ppo_mini_batch_size=1024 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.rollout.n=$n_resp
