"""A recipe of several nodes: what the Ray cluster must have, said before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from recipes import cluster
from recipes.recipe import load
from recipes.shared.settings import SettingsError

RECIPE = load("qwen2.5-math-7b-openr1-math-2-nodes")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray, connected to whatever `nodes` says."""
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return ray


def node(address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": resources}


def test_two_nodes_are_the_one_recipe_twice() -> None:
    one = load("qwen2.5-math-7b-openr1-math")
    assert replace(RECIPE, name=one.name, nodes=1) == one
    assert RECIPE.gpus == 16 and RECIPE.hosts == ("openrlhf", "verl")


@pytest.mark.parametrize(
    ("nodes", "there"),
    [
        ([node("10.0.0.1", GPU=8.0)], "10.0.0.1 has 8"),
        ([node("10.0.0.1"), node("10.0.0.2", GPU=8.0)], "10.0.0.1 has 0, 10.0.0.2 has 8"),
        ([node("10.0.0.1", GPU=4.0), node("10.0.0.2", GPU=12.0)], "has 4, 10.0.0.2 has 12"),
        ([node("10.0.0.1", GPU=8.0), node("10.0.0.2", alive=False, GPU=8.0)], "10.0.0.1 has 8:"),
    ],
)
def test_too_few_gpus_are_counted_by_node(
    ray: Any, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], there: str
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(SettingsError, match="needs 2 nodes with 8 GPUs each") as error:
        cluster.check(RECIPE)
    assert there in str(error.value) and "ray start --address" in str(error.value)


def test_enough_is_enough(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("10.0.0.0"), node("10.0.0.1", GPU=8.0), node("10.0.0.2", GPU=8.0)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    cluster.check(RECIPE)


def test_no_cluster_is_an_error_not_a_cluster_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(SettingsError, match=r"no Ray cluster here: `ray start --head`"):
        cluster.check(RECIPE)


def refused(**_: object) -> None:
    raise ConnectionError("Could not find any running Ray instance")
