"""A command that hangs on a condition which only a run decides: a verdict for each way."""

from __future__ import annotations

from pathlib import Path

import pytest

from klplug.audit import AuditError, Report, audit

_RUN = "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8"
_LOSS = "actor_rollout_ref.actor.use_kl_loss=True"
_TYPE = "actor_rollout_ref.actor.kl_loss_type"


def _audit(tmp_path: Path, script: str, **options: int) -> Report:
    path = tmp_path / "train.sh"
    path.write_text(script)
    return audit(path, **options)  # type: ignore[arg-type]


def test_a_key_that_does_not_bear_on_the_kl_leaves_one_verdict(tmp_path: Path) -> None:
    report = _audit(
        tmp_path,
        "A=(trainer.logger=console)\nif [ -f uv.lock ]; then A=(trainer.logger=wandb); fi\n"
        f'{_RUN} {_LOSS} "${{A[@]}}"\n',
    )
    assert report.gradient == "forward" and not report.unknown


def test_ways_that_agree_have_one_verdict(tmp_path: Path) -> None:
    report = _audit(tmp_path, f"K=k3; if ask; then K=low_var_kl; fi\n{_RUN} {_LOSS} {_TYPE}=$K\n")
    assert report.gradient == "forward" and "gradient" not in report.unknown


def test_ways_that_differ_are_both_named(tmp_path: Path) -> None:
    script = f"K=k3\nif ask; then\n  K=k2; C=0.5\nfi\n{_RUN} {_LOSS} {_TYPE}=$K\n"
    report = _audit(tmp_path, script)
    assert report.gradient is None
    assert report.unknown["gradient"] == ("forward or reverse, by the condition on line 2",)
    # What does not hang on it is known.
    assert (report.scope, report.updates_per_rollout) == ("token", 4)
    assert report.beta == 0.001


def test_what_is_found_in_any_way_is_said(tmp_path: Path) -> None:
    script = f"L=; if [ -d x ]; then L={_LOSS}; fi\n{_RUN} $L\n"
    report = _audit(tmp_path, script)
    assert report.unknown["gradient"][0].startswith("none or forward")
    assert "forward-kl" in [finding.id for finding in report.findings]


@pytest.mark.parametrize(
    "line",
    [
        "python3 -m verl.trainer.main_generation data.path=x",
        "python3 -m recipe.r1.main_eval data.path=x",
        "python3 -m verl.model_merger merge --local_dir x",
        "python -m openrlhf.cli.serve_rm --port 5000 &",
        "vllm serve x",
    ],
)
def test_a_line_that_trains_nothing_is_passed_over(line: str, tmp_path: Path) -> None:
    report = _audit(tmp_path, f"{line}\n{_RUN} {_LOSS}\n{line}\n")
    assert (report.gradient, report.line, report.commands) == ("forward", 2, 1)
    with pytest.raises(AuditError, match=r"no training command|is not audited"):
        _audit(tmp_path, f"{line}\n")


def test_every_training_command_is_judged(tmp_path: Path) -> None:
    script = (
        f"for k in k2 k3; do {_RUN} {_LOSS} {_TYPE}=$k; done\n"
        f'if [ "${{MODE:-a}}" = b ]; then {_RUN}; fi\n'
    )
    reports = [_audit(tmp_path, script, command=n) for n in (1, 2, 3)]
    assert [r.gradient for r in reports] == ["reverse", "forward", "none"]
    assert {r.commands for r in reports} == {3}


def test_a_file_broken_at_its_end_has_its_verdict(tmp_path: Path) -> None:
    assert _audit(tmp_path, f"{_RUN} {_LOSS}\necho 'never closed\n").gradient == "forward"
    with pytest.raises(AuditError, match="line 2"):
        _audit(tmp_path, f"echo\n{_RUN} 'never closed\n")
