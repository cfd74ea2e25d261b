"""Papers that say something about the gradient of a KL term, and the ``kl_type`` of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One paper's KL term.

    Attributes:
        key: a short name, for ``klplug explain --paper``.
        name: what the paper or its method is called.
        arxiv: its number.
        kl_type: the same gradient here; empty where klplug has none.
        about: what the paper has, and where klplug differs.
        reports: figures that the paper itself gives, and where; empty where we could read none.
    """

    key: str
    name: str
    arxiv: str
    kl_type: str
    about: str
    reports: str = ""


PAPERS = {
    paper.key: paper
    for paper in (
        Paper(
            "rethinking", "Rethinking KL Regularization in RLHF (Liu et al.)", "2510.01555",
            "k2_as_loss,horizon=sequence",
            "k1 in the reward and k2 as a loss have one gradient, with the answer as one action. "
            "Its heads are head=combined and head=clipped. docs/paper.md has every statement.",
        ),
        Paper(
            "ziegler", "Fine-Tuning Language Models from Human Preferences (Ziegler et al.)",
            "1909.08593", "k1_in_reward",
            "The KL penalty of RLHF: the log-ratio of each token in the reward. Its controller of "
            "the coefficient is kl_ctrl=adaptive.",
        ),
        Paper(
            "bayesian", "RL with KL penalties is better viewed as Bayesian inference",
            "2205.11275", "k1_in_reward",
            "The optimum is a posterior, ref exp(r/beta)/Z: ref is the prior, and exp(r/beta) the "
            "evidence. k1_in_reward and k2_as_loss,horizon=sequence lead there, and "
            "reference=posterior takes any divergence to it.",
        ),
        Paper(
            "asymptotics", "Asymptotics of language model alignment (Yang et al.)", "2404.01730",
            "k1_in_reward",
            "No policy has more reward at its KL than ref exp(r/beta)/Z. Best of N comes near it "
            "where answers are long, if their tokens are independent and their rewards add up. "
            "klplug report --samples draws both beside the runs.",
        ),
        Paper(
            "grpo", "GRPO (DeepSeekMath)", "2402.03300", "k3_as_loss,ratio=none",
            "k3 as a loss: the gradient of the forward KL, without a weight for reused samples.",
        ),
        Paper(
            "deepseek-v3.2", "DeepSeek-V3.2", "2512.02556", "k2_as_loss,cap=none",
            "k3 times a differentiated pi/old. Its expected gradient is that of k2 with a detached "
            "pi/old: the reverse KL of each token.",
        ),
        Paper(
            "tang-munos", "On a few pitfalls in KL divergence gradient estimation (Tang, Munos)",
            "2506.09477", "k2_as_loss,horizon=sequence",
            "A loss per token has a part of the gradient only. The whole of it needs the later "
            "tokens: horizon=sequence, or k1_in_reward.",
        ),
        Paper(
            "comedy", "A Comedy of Estimators", "2512.21852", "k1_in_reward",
            "Compares estimators by the gradient that they give; the right one is that of k1 in "
            "the reward.",
        ),
        Paper(
            "frpo", "FRPO (its first version: PRL)", "2601.10201", "k1_in_reward",
            "The sum of later log-ratios, added after group-normalised advantages: the KL of whole "
            "answers. k2_as_loss,horizon=sequence has the same gradient, at the current policy.",
        ),
        Paper(
            "ctpo", "CTPO", "2605.07331", "k2_as_loss,level=prefix",
            "Cumulative ratios of the prefix, in its policy loss. klplug has them for the KL "
            "alone, as level=prefix and as the default of horizon=sequence.",
        ),
        Paper(
            "kimi-k2.5", "Kimi K2.5", "2602.02276", "k2_as_loss,ratio=none,reference=rollout",
            "k2 to the sampler, without a weight; without the factor 1/2, so kl_coef is twice its "
            "tau. With the weight, klplug's default, it is the gradient of KL(pi||rollout). "
            "prime-rl has the same term: its kl_tau of 0.001 is a kl_coef of 0.002.",
        ),
        Paper(
            "dar", "DAR", "2602.11523", "0.7*k2_as_loss+0.3*k2_as_loss,reference=old",
            "The reference is a mixture, proportional to ref^a old^(1-a). klplug has it as a sum "
            "of two KLs with any coefficients; this one has a = 0.7.",
        ),
        Paper(
            "kdrl", "KDRL: knowledge distillation and reinforcement learning", "2506.02208",
            "0.5*k2_as_loss+0.5*k2_as_loss,reference=teacher",
            "The rewards' policy loss with k2 to a teacher. That alone is k2_as_loss, the teacher "
            "as ref_model. This one holds the policy to the base too, at any coefficients. The "
            "teacher is a second frozen model, named by the key teacher.",
        ),
        Paper(
            "g-opd", "G-OPD: generalized on-policy distillation", "2602.12125",
            "1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss",
            "The reward lambda log(teacher/ref) of each token, and KL(pi||ref): lambda "
            "KL(pi||teacher) + (1 - lambda) KL(pi||ref). This one has lambda = 1.25, which goes "
            "beyond the teacher. The key teacher names it. Its public code takes the log-ratios at "
            "the start of the step, and gives them PPO's ratio and clip. At a step's first update "
            "that is the same gradient.",
        ),
        Paper(
            "salsa", "SALSA", "2411.01798", "k1_in_reward",
            "The reference is the mean of two fine-tuned models. klplug soup makes it, and the key "
            "ref_model names it, beside any kl_type.",
        ),
        Paper(
            "prorl", "ProRL: prolonged reinforcement learning", "2505.24864", "k2_as_loss",
            "KL(pi||ref) to a reference that becomes the policy from time to time: the key "
            "klplug.ref_update=reset:N beside the kl_type. ProRL makes the optimizer's state anew "
            "with it, which klplug leaves as it is.",
            "14.7 % more on math, 13.9 % on code and 54.8 % on logic puzzles than strong "
            "baselines. That is its authors' report with the same resets (arXiv 2507.12507, "
            "abstract).",
        ),
        Paper(
            "rao-blackwell", "Better estimation of the KL divergence between language models",
            "2504.10637", "k2_as_loss,vocab=exact,horizon=sequence",
            "The expectation over the whole vocabulary at each prefix. Its gradient is that of the "
            "KL of whole answers: its public code has the sum in the reward, and differentiates it "
            "there too. Without horizon=sequence it is LOC.",
        ),
        Paper(
            "rpg", "RPG: design of KL-regularised policy gradient algorithms", "2505.17508", "",
            "KL to the policy of the rollout, normalised or not. The nearest here is "
            "k2_as_loss,reference=rollout, which has the reverse one.",
        ),
        Paper(
            "apo", "APO with difficulty-aware shaping (DADS)", "2506.21655",
            "k2_as_loss,weight=difficulty",
            "A KL that counts less on a good answer, the fewer of its group are right. The weight "
            "is that of the code of View-R1, and stands before any estimator.",
            "With its penalty on long wrong answers: 7 % more than Qwen2.5-VL-3B on average "
            "(abstract). MathVista has 66.2 after 57.8, MathVerse 41.6 after 34.7, MMStar 61.3 "
            "after 54.1 (the table in View-R1's README).",
        ),
        Paper(
            "dph-rl", "DPH-RL: the choice of divergence", "2509.07430",
            "js_as_loss",
            "JS, a forward KL or alpha on answers that the reference gave once, their log-probs "
            "stored. The key is klplug.source=FILE beside the kl_type, and no reference model is "
            "loaded. Its public code keeps only answers that are right (docs/options.md).",
            "Llama-3.1-8B on Bird, greedy and Pass@16: 62.8 and 72.4 with JS, 60.0 and 71.8 with a "
            "reverse KL. GRPO has 58.5 and 67.7, and before it was 42.4 and 75.0 (the table in its "
            "public code, figures/image-1.png).",
        ),
        Paper(
            "rapo", "RAPO: rewards-aware policy optimization", "2510.03865", "",
            "The forward KL to ref^phi(r)/Z, phi rising from 0 to 1 with the reward: the reference "
            "itself bends. No public text that we could read gives phi. To ref as it is: "
            "forward_as_loss,horizon=sequence.",
        ),
        Paper(
            "f-dpg", "f-DPG: preferences through f-divergence minimization", "2302.08215",
            "js_as_loss,reference=posterior",
            "Any divergence to the posterior ref exp(r/beta)/Z. k2 is RL with a KL, and forward is "
            "GDC. js is often the better, says the paper. Its public code has a running Z. "
            "klplug's is from the other answers to the prompt, and beta stands before the loss.",
        ),
        Paper(
            "chi2", "Correlated Proxies (chi-square regularisation)", "2403.03185",
            "chi2_as_loss,horizon=answer,weight=root",
            "The square root of chi-square between whole answers; without weight=root chi-square "
            "itself. Its public code for language models differentiates the mean of u + 1/u - 2 "
            "and not its expectation. That has half of chi-square's gradient, and the forward "
            "KL's.",
        ),
        Paper(
            "safe", "SAFE: entropy-aware predictive control", "2602.04651",
            "k2_as_loss,weight=entropy_floor",
            "A penalty that grows where the policy's entropy is low, above a threshold that a PID "
            "moves. In its public code the KL is a Python float, without a gradient. Here it has "
            "one: the weight is its entropy gate, and kl_ctrl=pid moves the coefficient.",
            "A model of 3 billion parameters: a mean reward over the training of 0.725, and 0.689 "
            "with PPO (abstract).",
        ),
        Paper(
            "sparsepo", "SparsePO: sparse token masks", "2410.05102",
            "k2_as_loss,weight=mask:sparse",
            "DPO whose KL has a weight for each token, which is learned, or derived from the "
            "reference model. klplug learns none: weight=mask:NAME takes the numbers that a batch "
            "carries under a name, here sparse.",
            "10 points of win rate more in summarisation, 3 in dialogue (abstract).",
        ),
        Paper(
            "tdpo", "TDPO: token-level direct preference optimization", "2404.11999", "",
            "DPO with a KL(ref||pi) of each token, over pairs of answers that are given. The "
            "nearest here is forward_as_loss,vocab=exact, on the policy's own answers.",
        ),
    )
}  # fmt: skip
