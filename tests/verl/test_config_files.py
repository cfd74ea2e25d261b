"""Config files as the audit composes them, beside Hydra."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from klplug_verl import configs
from omegaconf import OmegaConf

from klplug.audit.settings import scalar
from klplug.audit.tables import flattened

_GROUPS = {
    "actor/base.yaml": "lr: 1\nclip: 0.2\n",
    "actor/dp.yaml": "defaults: [base, _self_]\nlr: 2\n",
    "actor/deep.yaml": "defaults: [{inner@loss: vanilla}, dp, _self_]\nclip: 0.4\n",
    "actor/inner/vanilla.yaml": "mode: vanilla\n",
    "engine/d.yaml": "threads: 4\n",
}
_FILES = {
    "own content goes last": "defaults: [first, second]\na: 3\n",
    "own content goes where it says": "defaults: [first, _self_, second]\na: 3\n",
    "own content goes first": "defaults: [_self_, first]\na: {x: 3, y: 4}\nb: 5\n",
    "a group under another name": "defaults: [{actor@policy.actor: base}, _self_]\n"
    "policy: {actor: {lr: 7}}\n",
    "a group under its own": "defaults: [{actor: base}, _self_]\nb: 1\n",
    "a default with defaults": "defaults: [{actor: dp}, _self_]\nb: 1\n",
    "three deep": "defaults: [{actor@policy.actor: deep}, _self_]\nb: 1\n",
    "a group here": "defaults: [{actor@_here_: base}, _self_]\nb: 1\n",
    "a file of a group by its path": "defaults: [actor/base, _self_]\nactor: {clip: 0.3}\n",
    "an optional one that lacks": "defaults: [{optional actor: none_such}, first, _self_]\nb: 1\n",
    "none of a group": "defaults: [{actor: null}, first, _self_]\nb: 1\n",
    "a name made of another's": "defaults: [{engine: d}, {actor@x: '${engine}p'}, _self_]\nb: 1\n",
    "no defaults": "a: {b: {c: null}}\nd: []\n",
}


@pytest.mark.parametrize("name", _FILES)
def test_a_config_file_is_composed_as_hydra_does(tmp_path: Path, name: str) -> None:
    files = {"mine.yaml": _FILES[name], "first.yaml": "a: {x: 1}\nb: 2\n", "second.yaml": "a: 9\n"}
    if "last" in name or "where" in name:
        files["first.yaml"] = "a: 1\nb: 2\n"
    for path, text in {**files, **_GROUPS}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    with initialize_config_dir(str(tmp_path), version_base=None):
        right = OmegaConf.to_container(compose("mine"))
    read = configs.read(tmp_path / "mine.yaml", tmp_path)
    assert read.settings == flattened(right) and not read.missing


_CHOICES = {
    "actor/base.yaml": "lr: 1\n",
    "actor/fast.yaml": "lr: 2\n",
    "algo/grpo.yaml": "n: 5\nkl: false\n",
    "algo/kl.yaml": "# @package _global_\nkl: {type: k1}\nactor: {lr: 3}\n",
    "experiment/kl.yaml": "# @package _global_\ndefaults: [override /algo: kl]\nactor: {lr: 4}\n",
    "experiment/inside.yaml": "# @package algo.inner\na: 1\n",
}


@pytest.mark.parametrize(
    "words",
    [
        ["algo=kl"],
        ["actor@policy.actor=fast"],
        ["+experiment=inside"],
        ["+actor@policy.critic=fast", "algo=kl"],
        ["+actor@other=fast", "algo=grpo"],
        ["+experiment=[inside,kl]"],
        ["+experiment=kl"],
        ["+experiment@algo.deep=inside"],
    ],
)
def test_a_file_that_the_command_chooses_is_composed_as_hydra_does(
    tmp_path: Path, words: list[str]
) -> None:
    mine = "defaults: [{actor@policy.actor: base}, {algo: grpo}, _self_]\npolicy: {b: 1}\n"
    for path, text in {"mine.yaml": mine, **_CHOICES}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    with initialize_config_dir(str(tmp_path), version_base=None):
        right = OmegaConf.to_container(compose("mine", words))
    pairs = [word.partition("=") for word in words]
    choices = {key.lstrip("+"): (scalar(name), key.startswith("+")) for key, _, name in pairs}
    read = configs.read(tmp_path / "mine.yaml", tmp_path, choices)
    assert read.settings == flattened(right) and not read.missing
    assert read.chosen == choices.keys()
