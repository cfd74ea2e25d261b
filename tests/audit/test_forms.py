"""Forms that public training scripts have: the words that bash passes, and the verdict on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from klplug.audit import audit
from klplug.audit.shell import Command, Script
from tests.audit.box import Ran, bash, namespaces

_RUN = "python3 -m verl.trainer.main_ppo"
_GRPO = "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8 data.train_batch_size=512"
_LOSS = "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01"

FORMS = {
    "two expansions in quotes": f'A="{_GRPO}"\nB="{_LOSS}"\nALL="$A $B"\n{_RUN} $ALL\n',
    "three expansions in a word": (
        f"A=x B=y C=z\n{_RUN} {_GRPO} trainer.default_local_dir=$A/$B/$C {_LOSS}\n"
    ),
    "expansions against each other": (
        f'A=x B=y\n{_RUN} {_GRPO} trainer.project_name=$A$B"$A"_${{B}} {_LOSS}\n'
    ),
    "a redirection in the middle": f"{_RUN} {_GRPO} > log \\\n  {_LOSS} 2>&1 | tee -a other\n",
    "a redirection at first": f"> log {_RUN} {_GRPO} {_LOSS} &\nwait\n",
    "a default with brackets": (
        f'V=${{V:-["/a/b.parquet"]}}\n{_RUN} {_GRPO} {_LOSS} data.val_files="$V"\n'
    ),
    "a default with brackets in quotes": (
        f"S=\"${{S:-['</done>', '<|end|>']}}\"\n{_RUN} {_GRPO} {_LOSS} +data.stop=\"$S\"\n"
    ),
    "brackets in brackets of arithmetic": (
        f"p=2048; r=8192; m=${{m:-$(((p + r) * 2))}}\n"
        f"{_RUN} {_GRPO} {_LOSS} actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$m\n"
    ),
    "a condition that is known": (
        f"E=vllm\nif [ \"$E\" = vllm ]; then N=8; else N=1; fi\n"
        f"{_RUN} {_GRPO} actor_rollout_ref.rollout.n=$N {_LOSS}\n"
    ),
    "a condition on a default": (
        f'A=(trainer.logger=console)\nif [ "${{UV:-1}}" != 0 ]; then A=(trainer.logger=wandb); fi\n'
        f'{_RUN} {_GRPO} {_LOSS} "${{A[@]}}"\n'
    ),
    "arguments that nobody passes": (
        'B=512\nwhile [[ $# -gt 0 ]]; do\n  case "$1" in --b) B="$2"; shift 2 ;; *) shift ;; esac\n'
        f'done\n{_RUN} {_GRPO} data.train_batch_size=$B {_LOSS} "$@" $EXTRA\n'
    ),
    "another command first": (
        f"{_RUN}x a=1 2>/dev/null; cat <<'E' > notes\nit's {_RUN}\nE\n"
        f"{_RUN} {_GRPO} {_LOSS}\n"
    ),
    "an array with a comment": (
        f"A=(\n  {_GRPO} # these\n  # not.this=1\n  {_LOSS}\n)\n"
        f'{_RUN} "${{A[@]}}"\n'
    ),
    "a function with its own arguments": (
        f'go() {{ local n=$1; shift; {_RUN} {_GRPO} actor_rollout_ref.rollout.n=$n "$@"; }}\n'
        f"go 8 {_LOSS}\n"
    ),
    "a command in a string": f"C=\"{_RUN} \\\n  {_GRPO} \\\n  {_LOSS}\"\necho $C\neval $C\n",
    "a command for another shell": f'export K="{_LOSS}"\nbash -c "{_RUN} {_GRPO} \\$K"\n',
    "a table of settings": (
        "declare -A K=([coef]=0.01 [use]=True)\n"
        f"{_RUN} {_GRPO} actor_rollout_ref.actor.use_kl_loss=${{K[use]}} "
        "actor_rollout_ref.actor.kl_loss_coef=${K[coef]}\n"
    ),
    "a name made of a path": (
        f"M=org/Model-7B\n{_RUN} {_GRPO} {_LOSS} "
        "trainer.experiment_name=${M##*/}_$(basename $M)_${M,,}\n"
    ),
    "a loop over one seed": f"for s in 1; do {_RUN} {_GRPO} {_LOSS} data.seed=$s; done\n",
    "a document read": f"read -r -d '' A <<EOF || true\n{_GRPO} \\\n{_LOSS}\nEOF\n{_RUN} $A\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def ran() -> dict[str, Ran]:
    if not namespaces():
        pytest.skip("NO NAMESPACES HERE: these scripts write files, and are not run")
    return dict(zip(FORMS, bash(list(FORMS.values())), strict=True))


def _training(script: str) -> Command:
    (command,) = [
        c for c in Script(script).commands if "verl.trainer.main_ppo" in [w.text for w in c.words]
    ]
    return command


@pytest.mark.parametrize("form", FORMS)
def test_the_words_are_those_of_bash(form: str, ran: dict[str, Ran]) -> None:
    (real,) = [c for c in ran[form].commands if "verl.trainer.main_ppo" in c]
    command = _training(FORMS[form])
    assert command.reached and not any(word.unknown for word in command.words)
    assert tuple(word.text for word in command.words) == real


@pytest.mark.parametrize("form", FORMS)
def test_the_verdict_is_the_same_for_all(form: str, tmp_path: Path) -> None:
    path = tmp_path / "train.sh"
    path.write_text(FORMS[form])
    report = audit(path)
    assert not report.unknown
    assert (report.gradient, report.beta, report.updates_per_rollout) == ("forward", 0.01, 2)
