#!/usr/bin/env bash
# PPO with a critic, the KL in the reward, all by default.
python3 -m openrlhf.cli.train_ppo_ray \
   --actor.model_name_or_path OpenRLHF/Llama-3-8b-sft-mixture \
   --critic.model_name_or_path OpenRLHF/Llama-3-8b-rm-700k \
   --rollout.batch_size 1024 \
   --train.batch_size 128 \
   --algo.kl.init_coef 0.01
