#!/usr/bin/env bash
# GSPO: the policy loss per answer, the KL loss per token.
python3 -m openrlhf.cli.train_ppo_ray \
   --algo.advantage.estimator group_norm --actor.policy_loss_type gspo \
   --algo.kl.use_loss --algo.kl.estimator k3 --algo.kl.init_coef 0.001 \
   --rollout.n_samples_per_prompt 8 --rollout.batch_size 64 --train.batch_size 128
