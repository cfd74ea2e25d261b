#!/usr/bin/env bash
# GRPO with OpenRLHF's own correction, on a Ray cluster.
ray job submit --address="http://127.0.0.1:8265" \
   --runtime-env-json='{"working_dir": "/openrlhf"}' \
   -- python3 -m openrlhf.cli.train_ppo_ray \
   --actor.model_name_or_path Qwen/Qwen2.5-7B-Instruct \
   --algo.advantage.estimator group_norm \
   --algo.kl.use_loss \
   --algo.kl.estimator k3 \
   --algo.kl.unbiased_gradient \
   --algo.kl.init_coef 1e-3 \
   --rollout.n_samples_per_prompt 8 \
   --rollout.batch_size 128 \
   --train.batch_size 256
