"""The sentences of docs/evidence.md; `page.py` has its numbers."""

from dataclasses import dataclass

LEAST_SEEDS = 3  # of a verdict

INTRODUCTION = """\
Does the formulation of the KL matter in training? Each run on this page is a run of a real host on
a CPU. It is OpenRLHF with DeepSpeed, Ray and vLLM, unless a section names verl. The policy has
0.75 M parameters and learns arithmetic word problems, but for the language model at the end. The
hypotheses, their outcomes and the rule of the verdicts were committed before the runs:
`recipes/reproduce/HYPOTHESES.md`. Some single runs had been seen before, which that file names. One
small policy and one task show large effects only.
"""
FORMULATIONS = """\
| `kl_type` | what it is |
| --- | --- |
| `none` | no KL |
| `k1_as_loss,ratio=none` | the log-ratio, log π/ref of each sampled token, as a loss |
| `stock:k3` | OpenRLHF's own k3 as a loss, without klplug: the usual GRPO setting |
| `k3_in_reward` | k3 taken off the reward |
| `k1_in_reward` | the log-ratio taken off the reward: the KL of whole answers |
| `k2_as_loss` | half of the squared log-ratio as a loss: the KL of each token |
| `k2_as_loss,horizon=sequence` | a loss with the gradient of whole answers' KL |
"""
READ = """\
π is the policy that is trained, ref the policy that it started from. KL(π‖ref) says how far π has
moved, on answers of π. KL(ref‖π) says it on answers of ref. Accuracy is the share of right answers
when π samples, greedy when it takes the likeliest token. pass@16 is the chance that 16 samples
hold a right answer. Entropy says how varied the answers are.
"""
RULE = f"""\
A difference is paired by seed. Its interval is the 95 % percentile bootstrap over seeds. With so
few seeds it covers its mean less often than 95 %. So a verdict also asks that every seed lies on
the same side. Fewer than {LEAST_SEEDS} seeds decide nothing. *Not reproduced* means that the
opposite of the prediction holds, *not decided* that neither does. If there were no effect, five
seeds would lie on the predicted side of zero in one case of 32. Three would in one of eight.
"""
ENUMERATED = """\
The other task has policies that are tables, 100 seeds and exact distances. [The closed
form](closed-form.md) has each comparison, with its interval and how it was decided. A comparison
*fails* where the opposite of what was predicted holds. How many sampled answers each estimator's
gradient needs stands in [gradients on a real model](gradient-study.md).
"""
COLUMNS = """\
Mean over seeds, with the lowest and the highest seed. 30 rollouts of 32 problems, 8 answers each.
Accuracy is pass@1 at temperature 1, on 500 held-out problems with 16 answers each. KL and entropy
are in nats per answer, summed over the vocabulary. A rollout is lost if its mean reward is below
half of the first one's. The gradient norm is the median over the rollouts. `stock:k3` is OpenRLHF's
own, without klplug.
"""
ON_UPDATES = """\
64 updates per rollout, each with a 64th of its answers. `k2_as_loss` weighs each token by how far
the policy has left its sampler. `k2_as_loss,ratio=none` does not. `k1_in_reward` keeps the KL that
the rollout had. The swing is explained below, and `k2_as_loss` has the runs of that section.
"""
ON_SPIKE = """\
The learning rate rises to 20 times its value within the first rollout. From then on it falls with
the root of the number of updates, and is still 3.7 times as high at the end. It throws the policy
far from the reference. OpenRLHF's own k2 and k3 have no gradient at the tokens
that lie beyond their clamp. `bound=2` limits the coefficient there, and does not end it.
"""
ON_STRENGTH = """\
verl with FSDP2, kl_coef 0.5. `k1_in_reward` is added after the advantages were divided by the
group's standard deviation of the reward. With `reward_norm=group` it is divided with them, as in
stock verl.
"""
ON_EXACT = """\
`k2_as_loss` estimates each token's KL from the token that was sampled. `k2_as_loss,vocab=exact`
([the exact KL](exact.md)) sums it over the vocabulary: the same target, without that token's
noise. These runs are of the same policy and task, with kl_coef 0.5, on OpenRLHF and on verl
with FSDP2. On OpenRLHF `k2_as_loss` with 4 updates has tier 1's runs. The swing is the
standard deviation of `klplug/k1`, the mean log-ratio in nats per token, over the last ten rollouts.
CPU-seconds are those of the whole run, its evaluations included. In these
rows the first run of a call has the evaluation before training too. Some of a host's processes are
not counted: on verl like runs have 300 to 650 seconds.
"""
ON_LANGUAGE = """\
SmolLM2-135M-Instruct learns sums of two numbers, on OpenRLHF. There are 30 rollouts of 2 problems
with 8 answers each, kl_coef 0.5, and 4 updates per rollout. One seed decides nothing, so there is
no verdict. A difference of two KLs is compared with the noise of measuring them, on 64 problems
with one answer each. What another seed would give is not known. Accuracy has 4 answers to each
problem.
"""


HOW = """\
## How it is made

```bash
make reproduce FAST=1                         # the main contrast, two runs
make reproduce                                # tier 1; the same command goes on
make reproduce GRID=updates                   # another grid: also spike, exact, smollm2
make reproduce GRID=verl-exact HOST=verl      # one on verl: also strength
python -m recipes.reproduce tier1 --dry-run   # what there is to make, and what it costs
python -m recipes.reproduce.enumerable        # the enumerable task
python -m recipes.reproduce.study_pages       # docs/closed-form.md, docs/gradient-study.md
python -m recipes.reproduce.page              # this page, from recipes/reproduce/results
```

A run's row is a line of `runs/reproduce/GRID/results.jsonl`. Rows come into this page by being
copied to `recipes/reproduce/results/GRID.jsonl`.
"""


@dataclass(frozen=True)
class Told:
    """A hypothesis in words."""

    title: str
    asked: str
    parts: dict[str, tuple[str, str, str]]
    """Of its parts on the host: reproduced, not reproduced, not decided; `{}` is the mean."""
    enumerable: str
    """What came out on the enumerable task, whose runs are complete."""
    anchor: str
    """Its section in docs/closed-form.md."""


TOLD = {
    "a": Told(
        "k1 as a loss",
        "A loss that averages the log-ratio looks like a KL. Its gradient is noise around zero. So "
        "it should hold nothing, and do harm with several updates per rollout.",
        {
            "a1": (
                "With one update it trained like no KL, as predicted.",
                "With one update it did not train like no KL, against the prediction.",
                "With one update it is not decided whether it trains like no KL.",
            ),
            "a2": (
                "With four updates it lost the ten points that were predicted, or more ({}).",
                "With four updates it did not lose the ten points that were predicted ({}).",
                "With four updates a loss of ten points was predicted. The seeds do not decide "
                "({}).",
            ),
        },
        "With one update it is like no KL. With 16 it drives the policy further out. With 4 it "
        "does not, against the prediction.",
        "a-k1-as-loss",
    ),
    "b": Told(
        "k2 and k3 in the reward",
        "Some scripts take k3 off the reward. Near the reference that is no KL's gradient. So it "
        "should not hold the policy, and may harm it. The host's runs are of k3 alone.",
        {
            "b1": (
                "It did not halve the drift that there is without a KL, as predicted ({}).",
                "It halved the drift that there is without a KL, against the prediction ({}).",
                "Whether it halves the drift that there is without a KL is not decided ({}).",
            ),
            "b2": (
                "It cost the five points that were predicted, or more ({}).",
                "It did not cost the five points that were predicted ({}).",
                "Whether it costs the five points that were predicted is not decided ({}).",
            ),
        },
        "Both drive the policy away from the reference's answers, k3 much further. In the other "
        "direction k2 holds a little.",
        "b-k2-and-k3-in-the-reward",
    ),
    "c": Told(
        "k2 against k3 as a loss, good answers rare or common",
        "k3 as a loss is GRPO's default. By theory it holds a policy less than k2 where good "
        "answers are rare, and more where they are common. The host's runs have one start, so they "
        "decide nothing here.",
        {},
        "Which of the two moves further was computed before the runs, for each setting, and came "
        "out. Where good answers are rare k3 holds less at the larger betas only.",
        "c-k2-against-k3-as-loss-good-answers-rare-and-common",
    ),
    "d": Told(
        "own token against whole answer",
        "`k2_as_loss` weighs each token's own KL. `k2_as_loss,horizon=sequence` also weighs what a "
        "token does to the KL of later ones. A paper (FRPO) reports more diverse answers, more "
        "entropy and less drift for that.",
        {
            "d1": (
                "pass@16 was higher, as predicted ({}).",
                "pass@16 was lower, against the prediction ({}).",
                "Whether pass@16 is higher is not decided ({}).",
            ),
            "d2": (
                "Entropy was higher, as predicted ({}).",
                "Entropy was lower, against the prediction ({}).",
                "Whether entropy is higher is not decided ({}).",
            ),
            "d3": (
                "The drift was smaller, as predicted ({}).",
                "The drift was larger, against the prediction ({}).",
                "Whether the drift is smaller is not decided ({}).",
            ),
        },
        "The whole answer drifts less, the more so the longer the answers are. Of entropy and of "
        "the distance to the best policy some predictions fail.",
        "d-own-token-against-whole-answer",
    ),
    "e": Told(
        "many updates per rollout",
        "Each update moves the policy away from the samples that it learns from. `k2_as_loss` has "
        "a weight that corrects for that.",
        {
            "e1": (
                "With 64 updates `k1_in_reward` lost the five points that were predicted, or more "
                "({}).",
                "With 64 updates `k1_in_reward` did not lose the five points that were predicted "
                "({}).",
                "With 64 updates a loss of five points was predicted for `k1_in_reward`. The seeds "
                "do not decide ({}).",
            ),
            "e2": (
                "Its KL swung more, as predicted ({}).",
                "Its KL swung less, against the prediction ({}).",
                "Whether its KL swings more is not decided ({}).",
            ),
            "e3": (
                "Without its weight the KL of `k2_as_loss` swung more, as predicted ({}).",
                "Without its weight the KL of `k2_as_loss` swung less, against the prediction "
                "({}).",
                "Whether the KL of `k2_as_loss` swings more without its weight is not decided "
                "({}).",
            ),
        },
        "With 64 updates `k1_in_reward` breaks first, as predicted. The weight is worth 1.5 per "
        "cent there. With 4 and 16 updates it costs up to half of one. PPO's clip holds the policy "
        "with it and without it.",
        "e-many-updates-per-rollout",
    ),
    "f": Told(
        "a bounded coefficient where a clamp lets go",
        "The hosts clamp their KL. Beyond the clamp its gradient is zero, so a policy that is far "
        "away might never come back.",
        {
            "f1": (
                "After a spike of the learning rate `k2_as_loss,bound=2` ended nearer to the "
                "reference than OpenRLHF's own k2, as predicted ({}).",
                "After a spike of the learning rate `k2_as_loss,bound=2` ended further from the "
                "reference than OpenRLHF's own k2, against the prediction ({}).",
                "Whether `k2_as_loss,bound=2` ends nearer to the reference than OpenRLHF's own k2 "
                "after a spike of the learning rate is not decided ({}).",
            ),
            "f2": (
                "It ended nearer than OpenRLHF's own k3, as predicted ({}).",
                "It ended further than OpenRLHF's own k3, against the prediction ({}).",
                "Whether it ends nearer than OpenRLHF's own k3 is not decided ({}).",
            ),
        },
        "It does come back, only more slowly: the prediction fails. After a spike of the step size "
        "`bound=2` ends better than the clamps, as predicted. `k2_as_loss` without a bound ends "
        "better still.",
        "f-a-clamps-dead-zone-and-a-bound",
    ),
    "g": Told(
        "accuracy at equal KL",
        "A formulation can look better only because it moves further. So accuracies are compared "
        "at one KL. Each is read off a straight line through the points of three coefficients. The "
        "line can miss them, so the table also has what lies between neighbouring points.",
        {
            "g": (
                "`k2_as_loss` and `stock:k3` are then alike within two points, as predicted ({}).",
                "`k2_as_loss` and `stock:k3` then differ by more than the two points that were "
                "predicted ({}).",
                "Whether `k2_as_loss` and `stock:k3` are then alike is not decided ({}).",
            ),
        },
        "Each reward is compared with the best one that can be had at its KL. verl's k3 lacks 3 "
        "to 5 points more than forms of whole answers, as predicted. For k3 in the reward the "
        "prediction fails, and for `k2_as_loss` at the smallest beta.",
        "g-the-frontier",
    ),
    "h": Told(
        "divided by the group's standard deviation",
        "verl takes the KL off the reward first, and divides both by the spread in the group. So "
        "the same coefficient should be a stronger one there.",
        {
            "h1": (
                "At kl_coef 0.5 the divided one ended nearer to the reference, as predicted ({}).",
                "At kl_coef 0.5 the divided one ended further from the reference, against the "
                "prediction ({}).",
                "Whether the divided one ends nearer to the reference at kl_coef 0.5 is not "
                "decided ({}).",
            ),
        },
        "At beta 0.3 it is stronger, as predicted: 4.7 times where good answers are rare, and 1.5 "
        "times where half of them are good. At 0.1 nothing is decided.",
        "h-divided-by-the-groups-spread",
    ),
}
NOT_TRIED = "Not tried there."
