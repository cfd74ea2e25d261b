#!/usr/bin/env bash
# RLOO, the KL in the reward after the baseline.
python3 -m openrlhf.cli.train_ppo_ray \
   --algo.advantage.estimator rloo \
   --algo.kl.init_coef 1e-4 \
   --algo.kl.estimator=k1 \
   --rollout.n_samples_per_prompt 4 \
   --rollout.batch_size 256 \
   --train.batch_size 1024
