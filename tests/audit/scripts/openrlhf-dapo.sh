#!/usr/bin/env bash
# DAPO: dynamic filtering, no KL.
python3 -m openrlhf.cli.train_ppo_ray \
   --algo.advantage.estimator group_norm \
   --algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0.0 1.0 \
   --actor.eps_clip_low_high 0.22 0.28 \
   --algo.kl.init_coef 0 \
   --rollout.n_samples_per_prompt 8 --rollout.batch_size 128 --train.batch_size 1024
