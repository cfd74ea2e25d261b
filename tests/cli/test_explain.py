"""explain reads everything from the registry, and c from kl_term itself."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

import klplug
from klplug.audit import RULES
from klplug.axes import AXES, OPTIONS
from klplug.cli.catalogue import stock
from klplug.cli.explain import OVER, explain, registered
from klplug.estimators import ESTIMATORS
from klplug.hosting.host import hosts
from klplug.spec import PLACEMENTS
from tests.cli.conftest import Klplug

COEFFICIENTS: dict[str, Callable[[float], float]] = {
    "k1_as_loss": lambda lr: 1.0,
    "k1_in_reward": lambda lr: lr,
    "k2_as_loss": lambda lr: lr,
    "k2_as_loss,cap=5,mode=mask": lambda lr: lr,
    "k2_as_loss,horizon=sequence,cap=2,mode=mask": lambda lr: lr,
    "k2_as_loss,bound=1.5": lambda lr: max(-1.5, min(1.5, lr)),
    "k2_as_loss,ratio=rollout": lambda lr: lr,
    "low_var_kl_as_loss": lambda lr: 1 - math.exp(-lr),
    "k3_in_reward": lambda lr: math.exp(-lr) - 1 + lr,
    "k3_in_reward+k3_as_loss": lambda lr: lr,
    "k2_as_loss+abs_in_reward": lambda lr: lr + abs(lr),
    "1.5*k2_as_loss+-0.5*k2_as_loss,reference=old": lambda lr: lr,
    "-0.5*k3_as_loss": lambda lr: -0.5 * (1 - math.exp(-lr)),
    "monitor": lambda lr: 0.0,
    "none": lambda lr: 0.0,
}


@pytest.mark.parametrize("kl_type", COEFFICIENTS)
def test_c_over_the_log_ratio(kl_type: str) -> None:
    explained = explain(kl_type)
    expected = [COEFFICIENTS[kl_type](lr) for lr in explained.log_ratio]
    assert explained.coefficient == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert (min(explained.log_ratio), max(explained.log_ratio)) == (-4.0, 4.0)


def test_findings_are_explained_by_their_pages(klplug_command: Klplug) -> None:
    pages = Path(__file__).parents[2] / "docs" / "findings"
    out = klplug_command("explain", "dead-zone", "forward-kl").out
    assert (pages / "dead-zone.md").read_text() in out
    assert (pages / "forward-kl.md").read_text() in out
    assert "/docs/findings/dead-zone.md\n" in out
    (document,) = json.loads(klplug_command("explain", "dead-zone", "--json").out)
    assert document["severity"] == "warning" and document["docs"].startswith("https://")
    mixed = klplug_command("explain", "dead-zone", "k2_as_loss")
    assert mixed.status == 2 and "k2_as_loss: no finding" in mixed.err
    misspelt = klplug_command("explain", "dead-zones")
    assert misspelt.status == 2 and "error: did you mean dead-zone?" in misspelt.err


@pytest.mark.parametrize("id", RULES)
def test_every_finding_is_explained(klplug_command: Klplug, id: str) -> None:
    out = klplug_command("explain", id).out
    assert out.startswith(f"# {id}\n\n*{RULES[id].title}.*")
    assert "## Why\n" in out and "## What to write instead\n" in out


@pytest.mark.parametrize(
    "kl_types",
    [
        ["k3_as_loss"],
        ["low_var_kl", "k2_as_loss,horizon=sequence"],
        ["k2_as_loss,horizon=sequence,baseline=group", "k1_in_reward", "k3_in_reward"],
    ],
)
@pytest.mark.parametrize("width", [100, 120])
def test_explain_breaks_no_word(
    klplug_command: Klplug, monkeypatch: pytest.MonkeyPatch, kl_types: list[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = klplug_command("explain", *kl_types).out
    words = set(out.replace("│", " ").replace("┃", " ").split())
    for document in json.loads(klplug_command("explain", *kl_types, "--json").out):
        for row in document["rows"]:
            for field in ("formula", "target", "gradient_bias", "source", "test"):
                assert set(row[field].split()) <= words, row[field]
        for option in document["kl_type"].split(","):
            assert {option, f"{option},"} & words, option


@pytest.mark.parametrize("name", klplug.kl_types())
def test_every_registered_kl_type_is_explained_by_its_own_row(name: str) -> None:
    explained = explain(name)
    assert explained.rows == (klplug.kl_types()[name],)
    assert explained.requires == klplug.parse(name).requires
    assert all(math.isfinite(c) for c in explained.coefficient)


@pytest.mark.parametrize(
    ("kl_type", "rows"),
    [
        ("k2_as_loss,cap=5", ["k2_as_loss"]),
        ("k2_as_loss,cap=5,horizon=sequence", ["k2_as_loss,horizon=sequence"]),
        ("k3_as_loss+k3_in_reward", ["k3_in_reward+k3_as_loss"]),
        ("k3_as_loss,cap=5+k3_in_reward", ["k3_in_reward", "k3_as_loss"]),
        ("k2_as_loss,vocab=topk:8", ["k2_as_loss,vocab=topk:64"]),
        ("k2_as_loss,horizon=sequence,ratio=none,reference=old", ["k2_as_loss,horizon=sequence"]),
    ],
)
def test_the_row_that_answers_for_a_kl_type(kl_type: str, rows: list[str]) -> None:
    assert [row.name for row in registered(klplug.parse(kl_type))] == rows


@pytest.mark.parametrize(
    ("kl_type", "field", "words"),
    [
        # Without a ratio the mean is over old's samples; with that of prefixes it is LOC again.
        ("k3_as_loss,ratio=none", "off_policy", "no weight: the mean over samples of old"),
        ("k2_as_loss,ratio=none,horizon=sequence", "off_policy", "no weight"),
        ("k2_as_loss,level=prefix", "off_policy", "the same (weights of prefixes)"),
        ("k2_as_loss,level=sequence,horizon=sequence", "off_policy", "weight of the whole answer"),
        ("js_as_loss,head=combined", "off_policy", "without the tokens that PPO's clip drops"),
        ("k2_as_loss,bound=0.5", "coefficient", "x, held between -0.5 and 0.5"),
        ("js_as_loss,reference=old", "target", "2 JS(pi, old)"),
        ("k3_as_loss,reference=rollout", "target", "KL(rollout||pi)"),
        ("k2_as_loss,reference=old", "value_bias", "KL(pi||old)"),
        ("js_as_loss,vocab=exact", "value_bias", "exact, never negative"),
        ("js_as_loss,vocab=exact", "off_policy", "without a ratio"),
        ("k2_as_loss,vocab=topk:8,horizon=sequence", "target", "a lower bound"),
        ("k2_as_loss,vocab=topk:8,horizon=sequence", "gradient_bias", "of a lower bound"),
        ("k1_in_reward,reward_norm=group", "gradient_bias", "over its rewards' deviation"),
        ("k1_as_loss,reference=rollout", "target", "zero"),
        ("k2_as_loss,ratio=rollout", "off_policy", "the same at the prefixes of the sampler"),
        ("exact_as_loss,horizon=sequence,ratio=none", "off_policy", "no weight"),
    ],
)
def test_the_words_are_of_the_options_too(kl_type: str, field: str, words: str) -> None:
    (row,) = registered(klplug.parse(kl_type))
    assert words in getattr(row, field)
    if "reference" in kl_type:
        assert "ref)" not in row.target and "(ref" not in row.target


@pytest.mark.parametrize(
    ("kl_type", "openrlhf", "verl"),
    [  # each host's refusals
        ("k1_in_reward,reward_norm=group", "no: reward_norm=group is verl's own order", "yes"),
        ("k3_as_loss,head=combined", "with policy_loss_type=ppo", "with loss_mode=vanilla"),
        ("js_as_loss,vocab=exact", "yes", "with strategy=fsdp or fsdp2"),
    ],
)
def test_a_host_serves_the_options_too(kl_type: str, openrlhf: str, verl: str) -> None:
    (row,) = registered(klplug.parse(kl_type))
    assert row.served == {"openrlhf": openrlhf, "verl": verl}


WITH = (
    *("ratio=none", "ratio=rollout", "level=prefix", "level=sequence", "cap=none", "bound=2"),
    *("head=combined", "head=clipped", "reference=old", "reference=rollout", "reference=teacher"),
    *("vocab=exact", "vocab=topk:8", "horizon=sequence", "baseline=group", "reward_norm=group"),
)


def in_two_options() -> Iterator[str]:
    for name in (f"{estimator}_{place}" for estimator in ESTIMATORS for place in PLACEMENTS):
        for options in (*combinations(WITH, 1), *combinations(WITH, 2)):
            with contextlib.suppress(ValueError):
                yield str(klplug.parse(",".join([name, *options])))


def test_a_cap_is_in_the_words_where_a_weight_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = klplug.kl_types()
    monkeypatch.setattr(klplug, "kl_types", lambda: table)
    for kl_type in dict.fromkeys(in_two_options()):
        spec = klplug.parse(kl_type)
        (row,), (term,) = registered(spec), spec.terms
        weighed = term.ratio not in (None, "none") and not term.needs_no_weight
        if term.estimator != "k1":  # whose row says what is without one too
            assert ("below the cap" in row.off_policy) == (weighed and term.cap != math.inf), (
                kl_type
            )
        assert row.requires == spec.requires
        assert row.served == {host.name: host.served(spec) for host in hosts().values()}


def test_over_the_vocabulary_c_is_of_every_token(klplug_command: Klplug) -> None:
    assert OVER in " ".join(klplug_command("explain", "exact_as_loss").out.split())
    assert OVER not in " ".join(klplug_command("explain", "k2_as_loss").out.split())


def test_a_coefficient_is_in_the_row_of_its_term() -> None:
    first, second = registered(klplug.parse("1.5*k2_as_loss+-0.5*k3_as_loss,reference=old"))
    assert (first.coefficient, second.formula) == ("1.5 (x)", "-0.5 (exp(-x) - 1 + x, x to old)")
    assert first.target.startswith("1.5 times LOC") and "drives away" not in first.target
    assert second.target.endswith("below 0 it drives away from that reference")


def test_a_weight_is_in_the_words_and_not_in_c() -> None:
    """It is of the batch; an answer's c is as without."""
    weighed, plain = explain("k2_as_loss,weight=positive"), explain("k2_as_loss")
    assert weighed.coefficient == plain.coefficient
    part = "each token's part of it times weight=positive"
    assert weighed.rows[0].target == f"{plain.rows[0].target}; {part}"
    assert "advantage is above 0" in weighed.options[0]["weight"].meaning
    assert explain("k1_as_loss,weight=positive").rows[0].target == "zero"


def test_every_option_has_a_meaning() -> None:
    assert set(OPTIONS) == set(AXES)
    for option in OPTIONS:
        assert len(AXES[option].meaning) > 30, option
    shown = explain("k2_as_loss,cap=5").options[0]["cap"].meaning
    assert shown == AXES["cap"].meaning and shown.startswith("upper bound of the ratio")


def test_options_say_what_is_default() -> None:
    (options,) = explain("k2_as_loss,cap=5").options
    assert (options["cap"].value, options["cap"].default) == ("5", False)
    assert (options["level"].value, options["level"].default) == ("token", True)
    assert options["bound"].value == "none"


def test_side_by_side_text(klplug_command: Klplug) -> None:
    done = klplug_command("explain", "k2_as_loss", "low_var_kl_as_loss")
    assert done.status == 0
    (heading,) = (
        line
        for line in done.out.splitlines()
        if "k2_as_loss" in line and "┃" in line and "k3" in line
    )
    assert heading.index("k2_as_loss") < heading.index("k3_as_loss")
    assert "LOC of the forward KL" in done.out and "low_var_kl_as_loss" in done.out
    values = next(line for line in done.out.splitlines() if line.startswith("│ k3_as_loss"))
    assert "-53.6" in values  # 1 - exp(4)
    plot = done.out[done.out.index("c against") :]
    # k2 is the diagonal: its letter is in the first and the last row; k3 leaves at the bottom.
    rows = plot.splitlines()[1:18]
    assert "a" in rows[0] and "b" not in rows[0]
    assert rows[-1].index("a") < rows[-1].index("b")


def test_json_has_the_curve_and_the_registrys_words(klplug_command: Klplug) -> None:
    (document,) = json.loads(klplug_command("explain", "k3_as_loss,cap=none", "--json").out)
    assert document["kl_type"] == "k3_as_loss,cap=none"
    assert document["rows"][0]["target"] == klplug.kl_types()["k3_as_loss"].target
    assert document["options"][0]["cap"]["value"] == "none"
    assert len(document["log_ratio"]) == len(document["coefficient"])


def test_png(klplug_command: Klplug, tmp_path: Path) -> None:
    png = tmp_path / "c.png"
    assert klplug_command("explain", "k2_as_loss", "k3_as_loss", "--png", png).status == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n") and png.stat().st_size > 10_000


def test_svg(klplug_command: Klplug, tmp_path: Path) -> None:
    svg = tmp_path / "c.SVG"
    assert klplug_command("explain", "k2_as_loss", "--png", svg).status == 0
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


# Each host's own code: verl's kl_penalty and its '+', OpenRLHF's compute_approx_kl.
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "low_var_kl",
            [
                "verl in the reward: k3_in_reward,reward_norm=group",
                "verl as a loss: k3_as_loss,ratio=none",
            ],
        ),
        ("k3+", ["verl as a loss: k2_as_loss,ratio=none"]),
        (
            "stock:k3",
            [
                "OpenRLHF in the reward: k3_in_reward",
                "OpenRLHF as a loss, verl as a loss: k3_as_loss,ratio=none",
                "verl in the reward: k3_in_reward,reward_norm=group",
            ],
        ),
    ],
)
def test_a_hosts_own_name(klplug_command: Klplug, name: str, lines: list[str]) -> None:
    done = klplug_command("explain", name)
    assert done.status == 0
    said = done.out.splitlines()
    assert said[0].startswith(f"{name} is a name of the hosts")
    assert sorted(line.strip() for line in said[1 : 1 + len(lines)]) == sorted(lines)
    explained = json.loads(klplug_command("explain", name, "--json").out)
    assert [e["kl_type"] for e in explained] == list(stock(name))


def test_bad_input(klplug_command: Klplug, tmp_path: Path) -> None:
    for arguments, named in (
        (["js"], "'js_as_loss' or 'js_in_reward'"),
        (["k3++"], "empty term"),
        (["stock:js"], "stock:js: no host has that name; there are k1, k2, k3, kl"),
        (["k2_as_loss", "--png", tmp_path / "c.jpeg"], "must end in .png, .svg, .pdf"),
        (["k4_as_loss"], "Known: k1_in_reward"),
        (["k1_in_reward,ratio=old"], "refused"),
        (["k2_as_loss", "--png", tmp_path / "nowhere" / "c.png"], "No such file"),
        (["dead-zone", "--png", tmp_path / "c.png"], "dead-zone is a finding, and has no curve"),
        (["--paper", "rpg", "--png", tmp_path / "c.png"], "rpg has no kl_type, and so no curve"),
        (["dead-zone", "--paper", "grpo"], "grpo: no finding, so it is explained without"),
        (["k2_as_loss"] * 9, None),
        ([f"k2_as_loss,cap={n}" for n in range(1, 10)], "8 at most"),
    ):
        done = klplug_command("explain", *arguments)
        if named is None:
            assert done.status == 0
            continue
        assert done.status == 2
        assert named in done.err and "Traceback" not in done.err
