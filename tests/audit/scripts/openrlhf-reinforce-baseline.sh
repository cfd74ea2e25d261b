#!/usr/bin/env bash
# REINFORCE++ with a group baseline, k2 as a loss, on OpenRLHF 0.10.1 and before.
python3 -m openrlhf.cli.train_ppo_ray \
   --advantage_estimator reinforce_baseline \
   --init_kl_coef 1e-5 --use_kl_loss --kl_estimator k2 \
   --n_samples_per_prompt 8 --rollout_batch_size 128 --train_batch_size 1024
