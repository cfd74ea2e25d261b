#!/usr/bin/env bash
# REINFORCE++ whose KL flags contradict each other: the correction is for losses only.
python3 -m openrlhf.cli.train_ppo_ray \
   --algo.advantage.estimator reinforce \
   --algo.kl.init_coef 0.001 --algo.kl.unbiased_gradient \
   --rollout.batch_size 1024 --train.batch_size 512
