#!/usr/bin/env bash
# Dr. GRPO with k2 in the reward.
python3 -m openrlhf.cli.train_ppo_ray \
   --algo.advantage.estimator dr_grpo \
   --algo.kl.init_coef 0.01 --algo.kl.estimator k2 \
   --rollout.n_samples_per_prompt 4 --rollout.batch_size 64 --train.batch_size 256
