#!/usr/bin/env bash
# REINFORCE++ with klplug's own KL in the reward.
python -m klplug_openrlhf --klplug.kl_type k1_in_reward --klplug.kl_coef 1e-3 \
   --algo.advantage.estimator reinforce \
   --rollout.batch_size 1024 --train.batch_size 1024
