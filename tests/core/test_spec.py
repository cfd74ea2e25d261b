"""kl_type, the string: what parses, what it means, and what each mistake is told."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klplug import KLSpec, check_kl_coef, parse
from klplug.refusals import Refused
from klplug.spec import CHOICES, ESTIMATORS, OPTIONS, PLACEMENTS, TermSpec, sum_of
from tests import one_meaning


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("k2_as_loss", "k2_as_loss"),
        ("k2_as_loss,ratio=old,cap=10", "k2_as_loss"),
        (" k2_as_loss , cap = 5.0 , ratio=rollout ", "k2_as_loss,ratio=rollout,cap=5"),
        ("low_var_kl_as_loss", "k3_as_loss"),
        ("kl_in_reward", "k1_in_reward"),
        ("mse_as_loss,ratio=none", "k2_as_loss,ratio=none"),
        ("k3_in_reward + k3_as_loss", "k3_in_reward+k3_as_loss"),
        ("k2_as_loss,cap=1e+3+k1_in_reward", "k1_in_reward+k2_as_loss,cap=1000"),
        # A + ends a name, whatever it ends in, and no number.
        ("k2_as_loss,weight=mask:v1e+k3_as_loss", "k2_as_loss,weight=mask:v1e+k3_as_loss"),
        ("1.e+1*k2_as_loss+k2_as_loss,weight=mask:_1E", "10*k2_as_loss+k2_as_loss,weight=mask:_1E"),
        ("k2_as_loss,cap=none", "k2_as_loss,cap=none"),
        ("k2_as_loss,horizon=sequence,level=prefix", "k2_as_loss,horizon=sequence"),
        ("k2_as_loss,bound=3,horizon=token", "k2_as_loss,bound=3"),
        ("k1_in_reward,horizon=sequence,ratio=none", "k1_in_reward"),
        ("none", "none"),
        ("alpha_as_loss,alpha=0.5", "alpha_as_loss"),
        ("alpha_as_loss,alpha=2.0", "alpha_as_loss,alpha=2"),
        ("k1_in_reward,head=combined", "k2_as_loss,head=combined,horizon=sequence"),
        ("k1_in_reward,head=clipped,bound=3", "k2_as_loss,head=clipped,horizon=sequence,bound=3"),
        ("k2_as_loss,reference=rollout,ratio=rollout", "k2_as_loss,reference=rollout"),
        ("k2_as_loss,reference=rollout,ratio=none", "k2_as_loss,ratio=none,reference=rollout"),
        ("k3_as_loss+k3_in_reward", "k3_in_reward+k3_as_loss"),
        ("k3_as_loss+k2_as_loss,cap=5+k1_in_reward", "k1_in_reward+k2_as_loss,cap=5+k3_as_loss"),
        (
            "k2_as_loss,baseline=group,horizon=sequence,cap=none",
            "k2_as_loss,horizon=sequence,baseline=group",
        ),
        ("k1_in_reward,head=separate,baseline=batch", "k1_in_reward,baseline=batch"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


def test_defaults_are_written_out() -> None:
    spec = parse("k2_as_loss")
    assert (spec.ratio, spec.level, spec.cap, spec.mode) == ("old", "token", 10.0, "truncate")
    assert (spec.horizon, spec.bound) == ("token", math.inf)
    reward = parse("k1_in_reward")
    assert (reward.ratio, reward.level, reward.cap, reward.horizon) == (
        "none",
        None,
        None,
        "sequence",
    )
    assert parse("k2_as_loss,horizon=sequence").level == "prefix"
    assert parse("chi2_as_loss,horizon=answer").level == "sequence"
    assert parse("chi2_as_loss,horizon=answer,ratio=none").level is None
    assert parse("k2_as_loss,reference=posterior").horizon == "answer"
    written = "js_as_loss,horizon=answer,reference=posterior"
    assert str(parse(written)) == "js_as_loss,reference=posterior"
    assert parse("k2_as_loss,horizon=sequence,baseline=group").cap == math.inf
    head = parse("k2_as_loss,head=combined")
    assert (head.ratio, head.level, head.cap, head.mode) == (None, None, None, None)


def test_terms_requires_and_placed() -> None:
    both = parse("k3_in_reward+k3_as_loss,ratio=rollout")
    assert [str(t) for t in both.terms] == ["k3_in_reward", "k3_as_loss,ratio=rollout"]
    assert both.requires == ("ref_log_probs", "rollout_log_probs")
    assert str(both.placed("as_loss")) == "k3_as_loss,ratio=rollout"
    single = parse("k2_as_loss")
    assert single.terms == (single,) and single.terms[0] is single
    assert single.placed("in_reward") == parse("none")
    assert single.placed("as_loss") is single
    assert parse("none").requires == ()
    assert parse("k2_as_loss,reference=rollout").requires == ("rollout_log_probs",)
    assert "advantages" in parse("k2_as_loss,head=combined").requires
    assert "group_ids" in parse("k1_in_reward,baseline=group").requires


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (
            "0.30*k2_as_loss,reference=old + .7 * mse_as_loss",
            "0.7*k2_as_loss+0.3*k2_as_loss,reference=old",
        ),
        ("1*k2_as_loss", "k2_as_loss"),
        ("1e+20*k2_as_loss+-0.5*k3_as_loss", "1e+20*k2_as_loss+-0.5*k3_as_loss"),
        ("2*exact_as_loss", "2*k2_as_loss,vocab=exact"),
        (
            "-0.25*k2_as_loss+1.25*k2_as_loss,reference=teacher",
            "1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss",
        ),
        ("-2*k1_in_reward+k3_as_loss", "k3_as_loss+-2*k1_in_reward"),
        ("0.5*k1_in_reward,head=combined", "0.5*k2_as_loss,head=combined,horizon=sequence"),
        ("9*k2_as_loss+0.1*k3_in_reward", "0.1*k3_in_reward+9*k2_as_loss"),
    ],
)
def test_coefficients_have_one_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


def test_what_a_sum_with_coefficients_is_made_of() -> None:
    spec = parse("1.5*k2_as_loss+-0.5*k2_as_loss,reference=old+3*k1_in_reward")
    assert [term.factor for term in spec.terms] == [3.0, 1.5, -0.5]
    assert spec.requires == ("ref_log_probs", "old_log_probs")
    assert str(spec.placed("in_reward")) == "3*k1_in_reward"
    assert spec.terms[0].alone == parse("k1_in_reward") != spec.terms[0]


def test_monitor_has_no_terms_and_a_reference() -> None:
    monitor = parse(" monitor ")
    assert str(monitor) == "monitor" and parse(str(monitor)) == monitor != parse("none")
    assert monitor.terms == () and monitor.requires == ("ref_log_probs",)
    assert monitor.measures and parse("k2_as_loss,reference=rollout").measures
    assert not parse("none").measures
    assert monitor.placed("as_loss") == monitor
    assert monitor.placed("in_reward") == parse("none")
    assert check_kl_coef(monitor, None) == 0
    with pytest.raises(ValueError, match=r"kl_type 'monitor' takes no kl_coef, got 0.1"):
        check_kl_coef(monitor, 0.1)


def test_none_is_the_empty_sum() -> None:
    none = parse("none")
    assert none.terms == () and str(none) == "none" and hash(none) == hash(sum_of(()))
    assert none == sum_of(()) != parse("k2_as_loss")
    both = parse("k3_in_reward+k3_as_loss")
    assert sum_of(both.terms) == both
    assert sum_of(both.terms[:1]) is both.terms[0]
    with pytest.raises(ValueError, match="same term twice"):
        sum_of(both.terms * 2)


@pytest.mark.parametrize("text", ["none", "k2_as_loss,cap=5", "k3_in_reward+k3_as_loss,ratio=none"])
def test_a_spec_goes_to_other_processes(text: str) -> None:
    spec = parse(text)
    for sent in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert sent == spec and str(sent) == str(spec) and sent.requires == spec.requires


def test_a_refusal_goes_to_other_processes() -> None:
    with pytest.raises(Refused) as error:
        parse("k1_in_reward,ratio=old")
    sent = pickle.loads(pickle.dumps(error.value))
    assert (str(sent), sent.refusal) == (str(error.value), "ratio-in-reward")


def test_what_a_sum_has_for_an_axis_of_its_own_is_on_its_way_out() -> None:
    for text, name, value in (
        ("none", "estimator", "none"),
        ("none", "baseline", None),
        ("k3_in_reward+k3_as_loss", "placement", None),
    ):
        with pytest.warns(DeprecationWarning, match=f"no {name} of its own: ask its terms"):
            assert getattr(parse(text), name) is value
    with pytest.raises(AttributeError, match="estimators"):
        getattr(parse("none"), "estimators")  # noqa: B009


def test_a_spec_is_frozen_and_parses_to_itself() -> None:
    spec = parse("k2_as_loss")
    assert parse(spec) is spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.cap = 3.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="string"):
        parse(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("k2_as_los", ["k2_as_los", "k3_in_reward", "Did you mean 'k2_as_loss'"]),
        ("low_var_kl", ["'k3_as_loss'", "'k3_in_reward'"]),
        ("k2", ["'k2_as_loss'", "'k2_in_reward'"]),
        ("k9_as_loss", ["k9_as_loss", "Known"]),
        ("k4_as_loss", ["Did you mean 'k2_as_loss'? Known: k1_in_reward"]),
        ("reverse_kl_as_loss", ["Did you mean 'mse_as_loss'"]),
        ("k1_as_los", ["Did you mean 'k1_as_loss'"]),
        ("kl_as_los", ["Did you mean 'kl_as_loss'"]),
        ("", ["unknown", "none"]),
        ("k2_as_loss,ratoi=old", ["ratoi", "Did you mean 'ratio'"]),
        ("k2_as_loss,ratio=oldd", ["ratio", "oldd", "Allowed: old, none, rollout"]),
        ("k2_as_loss,level=tokens", ["level", "Allowed: token, prefix, sequence"]),
        ("k2_as_loss,mode=clip", ["mode", "Allowed: truncate, mask"]),
        ("k2_as_loss,horizon=all", ["horizon", "Allowed: token, sequence, answer"]),
        ("k2_as_loss,cap", ["cap", "needs a value"]),
        ("k2_as_loss,cap=", ["cap", "needs a value"]),
        ("k2_as_loss,cap=ten", ["cap", "ten", "no number"]),
        ("k2_as_loss,cap=-1", ["cap", "-1", "positive"]),
        ("k2_as_loss,cap=nan", ["cap", "positive"]),
        ("k2_as_loss,cap=0.5,mode=mask", ["cap", "0.5", "at least 1"]),
        ("k2_as_loss,bound=0", ["bound", "positive"]),
        ("k2_as_loss,cap=3,cap=4", ["cap", "twice"]),
        ("k2_as_loss,ratio=none,cap=3", ["cap=3", "no weight", "Leave one of them out"]),
        ("k2_as_loss,ratio=none,level=prefix", ["level=prefix", "no weight"]),
        ("k1_in_reward,ratio=old", ["ratio=old", "k2_as_loss,horizon=sequence"]),
        ("js_in_reward,ratio=old", ["ratio=old", "js_as_loss,horizon=sequence"]),
        ("k1_in_reward,cap=3", ["cap=3", "no ratio of its own", "'k2_as_loss,horizon=sequence'"]),
        ("k1_in_reward,horizon=token", ["horizon=token", "'k2_as_loss'"]),
        ("k1_as_loss,horizon=sequence", ["horizon=sequence", "noise"]),
        ("k3_as_loss,horizon=sequence", ["horizon=sequence", "noise"]),
        ("abs_as_loss,horizon=sequence", ["horizon=sequence", "noise"]),
        ("k2_as_loss,horizon=sequence,level=token", ["level=token", "level=prefix"]),
        ("k2_as_loss,horizon=answer", ["'k2_as_loss,horizon=sequence'", "js, jeffreys"]),
        ("forward_as_loss,horizon=answer", ["'forward_as_loss,horizon=sequence'"]),
        ("abs_in_reward,horizon=answer", ["horizon=answer is refused", "tv"]),
        ("js_in_reward,horizon=answer", ["'js_as_loss,horizon=answer'"]),
        ("js_as_loss,vocab=exact,horizon=answer", ["horizon=answer with vocab=exact"]),
        ("js_as_loss,horizon=answer,head=clipped", ["head=clipped with horizon=answer"]),
        ("js_as_loss,horizon=answer,level=prefix", ["level=prefix", "level=sequence"]),
        ("js_as_loss,horizon=answer,weight=mask:tool", ["weight=mask:tool with horizon=answer"]),
        ("js_as_loss,horizon=answer,weight=root", ["'chi2_as_loss,horizon=answer,weight=root'"]),
        ("chi2_as_loss,weight=root", ["'chi2_as_loss,horizon=answer,weight=root'"]),
        ("chi2_as_loss,horizon=answer,reference=old,weight=root", ["to the reference model"]),
        ("chi2_as_loss,horizon=answer,weight=root,bound=9", ["bound=9 with weight=root"]),
        ("k1_in_reward,reference=posterior", ["'k2_as_loss,reference=posterior'"]),
        ("k2_as_loss,reference=posterior,horizon=sequence", ["horizon=sequence", "whole answers"]),
        ("k3_as_loss,reference=posterior", ["refused for k3", "forward KL(p||pi)"]),
        ("js_as_loss,reference=posterior,baseline=group", ["baseline=group", "in the Z of the"]),
        ("js_as_loss,reference=posterior+k2_as_loss", ["stands alone", "other terms out"]),
        ("js_as_loss,reference=posterior,head=combined", ["head=combined with horizon=answer"]),
        ("js_as_loss,reference=posterior,vocab=exact", ["horizon=answer with vocab=exact"]),
        ("k2_as_loss,reward_norm=group", ["reward_norm=group", "'k2_in_reward'"]),
        ("k1_in_reward,reward_norm=std", ["reward_norm", "none, group"]),
        ("k1_in_reward,head=combined,horizon=all", ["horizon", "Allowed: token, sequence, answer"]),
        ("k1_in_reward,head=combined,reference=rollout", ["kl_type k1_in_reward: reference"]),
        ("k1_in_reward,mode=clip", ["mode", "Allowed: truncate, mask"]),
        ("k3_in_reward,head=combined", ["head=combined", "'k3_as_loss,head=combined'"]),
        ("k1_in_reward,head=clipped,horizon=token", ["horizon=token", "'k2_as_loss,head=clipped'"]),
        ("k1_in_reward,head=combined,reward_norm=group", ["reward_norm=group", "after group"]),
        ("k2_as_loss,head=both", ["head", "Allowed: separate, combined, clipped"]),
        ("k1_as_loss,head=combined", ["head=combined", "'k2_as_loss,head=combined'"]),
        ("k2_as_loss,head=combined,ratio=old", ["ratio=old", "the policy loss"]),
        ("k2_as_loss,head=combined,ratio=none", ["ratio=none", "the policy loss"]),
        ("k2_as_loss,head=clipped,cap=3", ["cap=3", "the policy loss"]),
        ("k2_as_loss,head=clipped,mode=mask", ["mode=mask", "the policy loss"]),
        ("k2_as_loss,head=clipped,level=prefix", ["level=prefix", "the policy loss"]),
        (
            "k2_as_loss,head=clipped,baseline=group",
            ["baseline=group", "'k2_as_loss,horizon=sequence,baseline=group'"],
        ),
        (
            "k2_as_loss,head=combined,reference=rollout",
            ["reference=rollout", "'k2_as_loss,reference=rollout'"],
        ),
        ("k2_as_loss,reference=rollout,ratio=old", ["ratio=old", "Leave ratio out"]),
        ("k2_as_loss,reference=older", ["reference", "Allowed: ref, rollout"]),
        ("k1_in_reward,reference=rollout", ["reference=rollout", "'k2_as_loss,reference=rollout'"]),
        ("k2_as_loss,baseline=group", ["baseline=group", "horizon=sequence,baseline=group"]),
        (
            "alpha_as_loss,alpha=2,baseline=batch",
            ["'alpha_as_loss,alpha=2,horizon=sequence,baseline=batch'"],
        ),
        ("k2_as_loss,horizon=sequence,baseline=mean", ["baseline", "none, batch, group"]),
        ("k2_as_loss,horizon=sequence,baseline=group,cap=10", ["cap=10", "cap=none"]),
        ("k1_in_reward,baseline=group,reward_norm=group", ["baseline=group", "taken off already"]),
        (
            "js_as_loss,horizon=sequence,bound=2",
            ["bound=2", "'k2_as_loss,horizon=sequence,bound=2'"],
        ),
        ("forward_as_loss,horizon=sequence,bound=2", ["bound=2", "horizon=token"]),
        ("k2_as_loss,alpha=2", ["alpha=2", "'alpha_as_loss'"]),
        ("alpha_as_loss,alpha=0", ["alpha=0", "'forward_as_loss'"]),
        ("alpha_as_loss,alpha=1", ["alpha=1", "'k2_as_loss'"]),
        ("alpha_as_loss,alpha=inf", ["alpha=inf", "finite"]),
        ("alpha_in_reward,alpha=1e25", ["alpha=1e+25", "between 1e-15 and 1e15"]),
        ("alpha_as_loss,alpha=-1e-300", ["alpha=-1e-300", "between 1e-15 and 1e15"]),
        ("alpha_as_loss,alpha=none", ["alpha", "no number"]),
        ("k3_as_loss,horizon=sequence", ["'forward_as_loss,horizon=sequence'"]),
        ("none,cap=3", ["none", "cap"]),
        ("none+k2_as_loss", ["none", "sum", "Leave it out"]),
        ("k2_as_loss+monitor", ["'monitor'", "sum", "Leave it out"]),
        ("monitor,reference=rollout", ["'monitor' takes no options, got reference"]),
        ("k2_as_loss+k2_as_loss", ["twice", "sum of the coefficients"]),
        ("0.5*k2_as_loss+-2*mse_as_loss", ["twice", "sum of the coefficients"]),
        ("0*k2_as_loss", ["coefficient 0", "Leave the term out"]),
        ("nan*k2_as_loss+k3_as_loss", ["coefficient nan", "finite and not 0 in float32"]),
        # In float32 these are inf, and 0 or a number of fewer digits: no KL, in silence.
        ("1e39*k2_as_loss+k3_as_loss", ["coefficient 1e+39", "finite and not 0 in float32"]),
        ("-1e-40*k2_as_loss+k3_as_loss", ["coefficient -1e-40", "finite and not 0 in float32"]),
        ("k2_as_loss,bound=1e-50", ["bound=1e-50", "positive number of float32"]),
        ("k2_as_loss,cap=1e-50", ["cap=1e-50", "positive number of float32"]),
        # These are inf: a host that clamps at them would stop within its first step.
        ("k2_as_loss,bound=1e39", ["bound=1e+39", "positive number of float32"]),
        ("k2_as_loss,cap=1e39", ["cap=1e+39", "positive number of float32"]),
        ("1e999*k2_as_loss", ["coefficient inf", "finite"]),
        ("half*k2_as_loss", ["'half' before '*' is no number", "0.5*k2_as_loss"]),
        ("*k2_as_loss", ["'' before '*' is no number"]),
        ("2*", ["'2*': no name stands behind '*'"]),
        # Nobody is led to a term of the other sign, or without its coefficient.
        ("-k2_as_loss", ["'-k2_as_loss' is unknown. A coefficient is a number", "-1*k2_as_loss"]),
        ("0.5k2_as_loss", ["'0.5k2_as_loss' is unknown. A coefficient is a number before '*'"]),
        (
            "1.5*k2_as_loss-0.5*k2_as_loss,reference=old",
            ["'1.5*k2_as_loss-0.5' before '*' is no number", "a negative coefficient too: +-0.5*"],
        ),
        ("0.5*none", ["'none' takes no options, got a coefficient"]),
        ("2*monitor", ["'monitor' takes no options, got a coefficient"]),
        ("k1_in_reward,reference=old", ["holds nothing back", "'k2_as_loss,reference=old'"]),
        ("exact_as_loss,reference=old", ["reference=old with vocab=exact", "sampled tokens alone"]),
        ("k2_as_loss,vocab=topk:8,reference=teacher", ["reference=teacher with vocab=topk:8"]),
        ("k2_as_loss+", ["empty term"]),
    ],
)
def test_a_mistake_is_told_with_what_is_allowed(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    for word in words:
        assert word in str(error.value)


OPTION_VALUES = {
    "alpha": st.floats(-3, 3).map(repr),
    "vocab": st.sampled_from(["sample", "exact", "topk:3"]),
    "head": st.sampled_from(["separate", "combined", "clipped"]),
    "baseline": st.sampled_from(["none", "batch", "group"]),
    "reference": st.sampled_from(["ref", "rollout", "old", "posterior"]),
    "ratio": st.sampled_from(["old", "none", "rollout"]),
    "level": st.sampled_from(["token", "prefix", "sequence"]),
    "cap": st.floats(0.1, 1e12).map(repr) | st.just("none"),
    "mode": st.sampled_from(["truncate", "mask"]),
    "horizon": st.sampled_from(["token", "sequence", "answer"]),
    "bound": st.floats(0.1, 1e12).map(repr) | st.just("none"),
    "weight": st.sampled_from(["none", "positive", "difficulty", "entropy:0.3", "mask:tool"]),
    "reward_norm": st.sampled_from(["none", "group"]),
}


@st.composite
def kl_types(draw: st.DrawFn) -> str:
    def term() -> str:
        name = f"{draw(st.sampled_from(sorted(ESTIMATORS)))}_{draw(st.sampled_from(PLACEMENTS))}"
        options = draw(st.lists(st.sampled_from(OPTIONS), unique=True))
        factor = draw(st.just("") | st.floats(-1e20, 1e20).map("{!r}*".format))
        return ",".join([factor + name, *(f"{o}={draw(OPTION_VALUES[o])}" for o in options)])

    return "+".join(term() for _ in range(draw(st.integers(1, 2))))


@settings(deadline=None)
@given(kl_types())
def test_every_valid_string_survives_the_round_trip(text: str) -> None:
    try:
        spec = parse(text)
    except ValueError:
        return
    assert parse(str(spec)) == spec
    assert str(parse(str(spec))) == str(spec)
    assert hash(parse(str(spec))) == hash(spec)


@settings(max_examples=300, deadline=None)
@given(kl_types())
def test_what_a_refusal_offers_instead_is_no_mistake_itself(text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        for offered in re.findall(r"'([a-z0-9]+_(?:as_loss|in_reward)[^'+]*)'", str(error)):
            parse(offered)


@pytest.mark.parametrize("name", ["STEPS", "KL_TYPES"])
def test_what_the_hosts_are_tested_with_has_every_value_of_every_option(name: str) -> None:
    terms = [
        term
        for kl_type in getattr(one_meaning, name)
        for term in parse(kl_type).placed("as_loss").terms
    ]
    assert {term.estimator for term in terms} >= set(ESTIMATORS)
    # Of a KL in the reward; and what no host hands over yet.
    others = {"reward_norm", "vocab"}
    words = [o for o in OPTIONS if o in CHOICES and o not in others]
    for option in words:
        assert {getattr(term, option) for term in terms} >= set(CHOICES[option]), option
    for option in ("cap", "bound"):
        given = {getattr(term, option) for term in terms} - {None}
        assert math.inf in given and any(x < 3 for x in given), option
    assert set(OPTIONS) == {*words, *others, "alpha", "cap", "bound", "weight"}


def test_coefficients() -> None:
    spec = parse("k2_as_loss")
    assert check_kl_coef(spec, 1e-3) == 1e-3
    assert check_kl_coef(parse("none"), None) == 0
    for coef, word in (
        (0, "nothing"),
        (-1.0, "positive"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        (4e38, "finite and positive in float32"),
        (1e-46, "finite and positive in float32"),
        (10**400, "finite and positive in float32, got inf"),
        (None, "needs a kl_coef"),
        ("a", "number"),
        (True, "must be a number, got True"),
    ):
        with pytest.raises(ValueError, match=word):
            check_kl_coef(spec, coef)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no kl_coef"):
        check_kl_coef(parse("none"), 0.1)


def test_a_spec_built_by_hand_is_checked_as_well() -> None:
    assert KLSpec("k2", "as_loss", cap=10.0) == parse("k2_as_loss")
    assert isinstance(KLSpec("k2", "as_loss"), TermSpec)
    assert dataclasses.replace(parse("k2_as_loss,cap=5"), cap=10) == parse("k2_as_loss")
    with pytest.raises(ValueError, match="k7"):
        KLSpec("k7", "as_loss")
    with pytest.raises(ValueError, match="placement"):
        KLSpec("k2", "in_loss")
    with pytest.raises(ValueError, match="cap='ten' is no number"):
        KLSpec("k2", "as_loss", cap="ten")


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, Fraction])
def test_a_number_may_be_of_any_library(kind: type) -> None:
    spec = TermSpec("k2", "as_loss", factor=kind(2), cap=kind(5), bound=kind(3))
    assert str(spec) == "2*k2_as_loss,cap=5,bound=3" and spec == parse(str(spec))
    assert check_kl_coef(spec, kind(2)) == 2 and type(check_kl_coef(spec, kind(2))) is float


@pytest.mark.parametrize(("factor", "words"), [(10**400, "coefficient inf"), (True, "no number")])
def test_a_factor_that_is_no_number_of_float32_is_named(factor: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TermSpec("k2", "as_loss", factor=factor)
