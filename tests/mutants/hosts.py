"""The adapters': where a host's tensors go in, and where the KL goes out again."""

from __future__ import annotations

from tests.mutants import Mutant


def of(host: str, file: str, tests: str, *rows: tuple[str, str]) -> list[Mutant]:
    return [
        Mutant(f"adapters/klplug_{host}/{file}.py", old, new, (f"tests/{host}/{tests}",), host)
        for old, new in rows
    ]


OPENRLHF = (
    *of(
        "openrlhf",
        "stored",
        "test_stored.py",
        ("mask = mask * beside", "mask = mask"),
        ("self.mean_length if by_token else", "lengths if by_token else"),
        ("return sequences, attention, mask[:, 1:]", "return sequences, attention, mask[:, :-1]"),
    ),
    *of(
        "openrlhf",
        "samples",
        "test_experience.py",
        # Answers of another width than the widest: the serious one.
        ("(0, width - tensor.shape[1])", "(width - tensor.shape[1], 0)"),
        ("x[:, : e.action_mask.shape[1]]", "x[:, -e.action_mask.shape[1] :]"),
    ),
    *of(
        "openrlhf",
        "trainer",
        "test_experience.py",
        ('experience.info["return"] - beta * kl', 'experience.info["return"] + beta * kl'),
        ("(kl - others_mean(kl, _groups(experiences, group), present))", "kl"),
        (
            "others_mean(kl, _groups(experiences, group), present)",
            "others_mean(kl, _groups(experiences, group))",
        ),
        ("[i // size for e in experiences", "[i % size for e in experiences"),
        ('.metrics()["klplug/kl"])', '.metrics()["klplug/k2"])'),
        ("experience.advantages = experience.advantages - penalty", "pass"),
        ("            experience.kl = baseline\n", "            experience.kl = -baseline\n"),
        ("Tally.merged(tallies)", "Tally.merged(tallies[:1])"),
    ),
    *of(
        "openrlhf",
        "trainer",
        "test_trainer.py",
        ("trainer.klplug_watch.tell(status)", "pass"),
        ('"klplug": trainer.kl_ctl.saved(', '"other": trainer.kl_ctl.saved('),
    ),
    *of(
        "openrlhf",
        "actor",
        "test_training_step.py",
        (
            'torch.stack(list(tally.maxima.values())), op="max"',
            'torch.stack(list(tally.maxima.values())), op="sum"',
        ),
        (
            'torch.stack(list(tally.sums.values())), op="sum"',
            'torch.stack(list(tally.sums.values())), op="max"',
        ),
        ('given["token_level_loss"] = step.loss_fn.token_level_loss', "pass"),
        ("if step.plan.in_policy_loss.terms and not step.joined:", "if False:"),
        ("rollout_log_probs=given.rollout_log_probs", "rollout_log_probs=given.action_log_probs"),
        ("return_baseline=given.kl,", "return_baseline=None,"),
        ("if plan.acts_on_experience and ACTIVE not in", "if False and ACTIVE not in"),
        ("Tally.merged(trainer.klplug_tallies)", "trainer.klplug_tallies[-1]"),
        ("    if step.kl is None:\n        raise", "    if False:\n        raise"),
        ("kl.reported, kl.tally", "kl.loss, kl.tally"),
    ),
    *of(
        "openrlhf",
        "actor",
        "test_one_meaning.py",  # whose clip range is not even
        (
            "(self.loss_fn.clip_eps_low, self.loss_fn.clip_eps_high)",
            "(self.loss_fn.clip_eps_high, self.loss_fn.clip_eps_low)",
        ),
    ),
    *of(
        "openrlhf",
        "actor",
        "test_any_release.py",
        ("    if not step.aggregated:", "    if False:"),
    ),
)

VERL = (
    *of(
        "verl",
        "stored",
        "test_stored.py",
        ("values[end - n - 1 : end - 1]", "values[end - n : end]"),
        ("answers * stored.mean_length", "answers"),
        ("(loss if scaler is None else scaler.scale(loss)).backward()", "pass"),
    ),
    *of(
        "verl",
        "trainer",
        "test_trainer.py",
        ("to_go[earlier] += to_go[later, 0]", "to_go[earlier] += to_go[later, -1]"),
        ("kl[answer] - kl[others].mean()", "kl[answer] - kl.mean()"),
        ("rewards = rewards - beta * _term", "rewards = rewards + beta * _term"),
        ("itertools.filterfalse(run.plan.before_advantages, in_reward.terms)", "in_reward.terms"),
        ('measured = run.metrics["klplug/kl"]', 'measured = run.metrics["klplug/k2"]'),
        ("sum(bool(sampled[rows].any()) for rows in answers)", "len(keys)"),
        ("if run.is_as_loss and not workers_report:", "if False:"),
        ("if whole and n_answers < n_rows:", "if False:"),
        ('tensors["returns"] = tensors["returns"] - penalty', "pass"),
        ("session, _, index = key.rpartition", "session, _, index = key.partition"),
    ),
    *of(
        "verl",
        "actor",
        "test_training_worker.py",
        ("step.loss if torch.is_grad_enabled() else step.value", "step.value"),
        ("policy_loss + coef * _aggregated(kl", "policy_loss + _aggregated(kl"),
        ("else AggregationType.MAX", "else AggregationType.SUM"),
        ("coef = config.kl_loss_coef if coef is None else coef", "coef = config.kl_loss_coef"),
        ("    if step.changes_advantages:", "    if False:"),
        ("return_baseline=tensors.get(BASELINE)", "return_baseline=None"),
        ("**config.global_batch_info,", ""),
    ),
    *of(
        "verl",
        "actor",
        "test_one_meaning.py",  # whose clip range is not even
        (
            "config.clip_ratio if low is None else low",
            "config.clip_ratio if high is None else high",
        ),
    ),
    *of(
        "verl",
        "actor",
        "test_releases.py::test_the_same_tests_hold[0.7.1]",  # test_legacy_worker.py, there
        ("numbers(Tally.merged(update.tallies))", "numbers(update.tallies[-1])"),
        ('object.__setattr__(actor.config, "kl_loss_coef", coef)', "pass"),
        ("if update is None or spec is None:", "if spec is None:"),
    ),
)

HOSTS = (*OPENRLHF, *VERL)
