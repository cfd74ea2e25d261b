#!/usr/bin/env bash
# GRPO on OpenRLHF 0.9, by the usual here-document.
set -x

read -r -d '' training_commands <<EOT
openrlhf.cli.train_ppo_ray \
   --pretrain meta-llama/Meta-Llama-3-8B \
   --remote_rm_url http://localhost:5000/get_reward \
   --advantage_estimator group_norm \
   --use_kl_loss \
   --kl_estimator k3 \
   --init_kl_coef 1e-3 \
   --n_samples_per_prompt 8 \
   --rollout_batch_size 128 \
   --train_batch_size 128 \
   --gamma 1.0
EOT

if [[ ${1} != "slurm" ]]; then
    deepspeed --module $training_commands
fi
