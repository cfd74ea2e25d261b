"""Papers and their kl_types, on the command line."""

from __future__ import annotations

import json

import pytest

import klplug
from klplug.papers import PAPERS
from tests.cli.conftest import Klplug


@pytest.mark.parametrize("name", ["frpo", "2601.10201", "arXiv:2601.10201v2"])
def test_a_paper_by_name_or_number(klplug_command: Klplug, name: str) -> None:
    done = klplug_command("explain", "--paper", name)
    assert done.status == 0
    assert "FRPO" in done.out and "k1_in_reward" in done.out and "FULL" in done.out


@pytest.mark.parametrize("key", PAPERS)
def test_every_paper_is_explained_by_its_name_and_its_number(
    klplug_command: Klplug, key: str
) -> None:
    paper = PAPERS[key]
    done = klplug_command("explain", "--paper", key)
    assert done.status == 0 and f"arXiv {paper.arxiv}" in done.out
    for option in paper.kl_type.split(","):  # a heading breaks after each
        assert option in done.out
    assert klplug_command("explain", "--paper", paper.arxiv).out == done.out


def test_a_paper_beside_a_kl_type(klplug_command: Klplug) -> None:
    done = klplug_command("explain", "k2_as_loss", "--paper", "grpo", "--json")
    names = [one["kl_type"] for one in json.loads(done.out)]
    assert names == ["k2_as_loss", "k3_as_loss,ratio=none"]


def test_a_paper_s_name_alone_is_understood(klplug_command: Klplug) -> None:
    alone, named = klplug_command("explain", "frpo"), klplug_command("explain", "--paper", "frpo")
    assert alone.status == 0 and alone.out == named.out
    near = klplug_command("explain", "frpoo")
    assert near.status == 2 and "error: did you mean frpo?" in near.err
    # A kl_type that is misspelt is answered with a kl_type alone.
    assert "did you mean k1-as-loss?" not in klplug_command("explain", "k1_as_los").err


def test_a_paper_without_a_kl_type(klplug_command: Klplug) -> None:
    done = klplug_command("explain", "--paper", "rpg")
    assert done.status == 0 and "no kl_type" in done.out


def test_an_unknown_paper_and_no_word_at_all(klplug_command: Klplug) -> None:
    done = klplug_command("explain", "--paper", "frpoo")
    assert done.status == 2 and "did you mean frpo?" in done.err
    assert klplug_command("explain").status == 2


def test_every_paper_s_kl_type_is_one() -> None:
    for key, paper in PAPERS.items():
        assert key == key.lower() and paper.arxiv[4] == "."
        if paper.kl_type:
            assert str(klplug.parse(paper.kl_type)) == paper.kl_type
