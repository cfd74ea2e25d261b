"""Is the answer right? The reward on both hosts, and the evaluation's.

OpenRLHF calls `reward_func` (`--reward.remote_url reward.py`), verl `compute_score`
(`reward.custom_reward_function.path`), and both judge by `is_correct`.

The last box decides; without one the number after the last `####`; without both the response is
wrong. Where the answer itself is in GSM8K's form, with its `####` (the quickstart's), math-verify
then reads the response, down to its last number. 1.0 for right, 0.0 for wrong. The hosts load this
file by its path into a Ray worker, so it imports nothing of this repository.
"""

import logging
import re
import unicodedata
from decimal import Decimal
from typing import Any

import torch
from math_verify import parse, verify

# It warns that its timeouts are off. They are: they need signals, and OpenRLHF calls the reward
# from a thread, where there are none. `_is_tame` keeps out what would need one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

END_TOKENS = re.compile(r"<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|</s>|<eos>|<end_of_turn>")
OTHER_TOKENS = re.compile(r"<\|[^<>|]*\|>|<pad>|<s>|<bos>")
NUMBER = re.compile(
    r"""[\s*=:]*
        (?:(?P<sign>-)\s*)?(?:\\?[$€£]\s*)?(?P<minus>-?)
        (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
        \**(?:\s*\\?%)?
        (?:\s*\\(?:text|textrm|mathrm|mbox)\s*\{[^{}\d]*\}(?:\^\{?\d\}?)?)*  # a unit,
        (?:\s+[^\W\d_]{3,})*  # or words: of fewer letters they may be factors
        [\s.*]*""",
    re.VERBOSE,
)
NO_SPACE = re.compile(r"\\!\s*|(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))")
SPACE = re.compile(r"(?<!\\)\\[,;: ]|~")
FRACTION = re.compile(r"-?\d[\d,.]*(?:/\d+)?")

# What math-verify is shown without a time limit: some LaTeX, no factorial, small powers.
# `\boxed{9^{9^{9}}}`, six tokens of a policy gone astray, holds up its `verify` for ever.
TAME_LENGTH = 1000
TAME_BRACKETS = 40  # its LaTeX parser takes a minute over 800 of them
# fmt: off
TAME_COMMANDS = frozenset((
    "alpha", "approx", "arccos", "arcsin", "arctan", "begin", "beta", "bf", "boxed", "cap", "cdot",
    "circ", "cos", "cot", "csc", "cup", "delta", "dfrac", "displaystyle", "div", "dollar",
    "emptyset", "end", "epsilon", "fbox", "frac", "gamma", "ge", "geq", "gt", "in", "infty",
    "lambda", "le", "left", "leq", "ln", "log", "lt", "mathbb", "mathbf", "mathrm", "mbox", "mid",
    "mu", "ne", "neq", "notin", "omega", "overline", "phi", "pi", "pm", "quad", "qquad", "right",
    "sec", "setminus", "sigma", "sin", "sqrt", "tan", "text", "textbf", "tfrac", "theta", "times",
    "varnothing", "varphi",
))
# fmt: on
TAME_POWERS = 4
POWER = re.compile(r"\^|\*\*(?=\s*[\d({-])")
TAME_POWER = re.compile(r"(?:\^|\*\*)\s*(?:[\da-z]{1,2}|\{-?[\da-z]{1,2}\})(?!\s*(?:[\d^!.]|\*\*))")
# Sums to a power are multiplied out: nobody waits for `(a+b+c+d)^{99}`.
BRACKET_POWER = re.compile(r"[)\]}]\s*(?:\^|\*\*)\s*\{?(\d+)")
TAME_EXPANSION = 40  # exponents times signs
# Of these there may be any number: a letter's power, as in a polynomial, and degrees.
HARMLESS_POWER = re.compile(
    r"\\?[a-zA-Z]\s*\^\s*(?:\d|\{\d{1,2}\})(?!\s*(?:[\d^!.]|\*\*))"
    r"|\^\s*(?:\\circ|\{\s*\\circ\s*\})"
)


def _number(text: str) -> Decimal | None:
    """The number a text consists of, but for currency, unit and punctuation; else None."""
    match = NUMBER.fullmatch(text) if len(text) <= TAME_LENGTH else None
    if match is None or (match["sign"] and match["minus"]):
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] or match["minus"] else value


def _is_tame(text: str) -> bool:
    """Whether math-verify surely reads the text in no time."""
    powers = HARMLESS_POWER.sub("", text)
    expansion = sum(map(int, BRACKET_POWER.findall(text))) * len(re.findall(r"[+-]", text))
    return (
        len(text) <= TAME_LENGTH
        and len(re.findall(r"[(\[{]", text)) <= TAME_BRACKETS
        and TAME_COMMANDS.issuperset(re.findall(r"\\([a-zA-Z]+)", text))
        and len(POWER.findall(powers)) <= TAME_POWERS
        and len(POWER.findall(powers)) == len(TAME_POWER.findall(powers))
        and expansion <= TAME_EXPANSION
    )


def last_boxed(text: str) -> str:
    r"""The last `\boxed{...}` with its braces balanced, or the empty string."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for end in range(max(start, 0), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            return text[start : end + 1]
    return ""


def _is_equal(text: str, answer: str) -> bool:
    """Whether math-verify finds the answer in the text."""
    text = text.replace("!", ".")  # "It is 12!" is no factorial
    end = last_boxed(text) or (FRACTION.findall(text) or [""])[-1]
    shown = next((part for part in (text, end) if _is_tame(part)), None)
    if shown is None or not _is_tame(answer):
        return False
    # Bare LaTeX is LaTeX to math-verify only within $.
    gold = parse(f"${answer}$", parsing_timeout=None)
    return verify(gold, parse(shown, parsing_timeout=None), timeout_seconds=None)


def _plain(text: str) -> str:
    r"""The text with a plain minus and plain spaces, and `10,\!000` and `10\,000` as numbers."""
    text = SPACE.sub(" ", NO_SPACE.sub("", text).replace("{,}", ","))
    return text.replace("\N{MINUS SIGN}", "-")


def _ended(response: str) -> str:
    """The response up to the token that ends it, without other special tokens."""
    return _plain(OTHER_TOKENS.sub(" ", END_TOKENS.split(response, maxsplit=1)[0]))


def _hashed(text: str) -> str:
    """The rest of the line that the last `####` begins; empty: there is none."""
    return (text.rpartition("####")[2].strip().splitlines() or [""])[0] if "####" in text else ""


def final_answer(response: str) -> str:
    """The content of the last box; without one the number after the last `####`; else nothing."""
    return _final(_ended(response))


def _final(text: str) -> str:
    if boxed := last_boxed(text):
        return boxed.removeprefix(r"\boxed{").removesuffix("}").strip()
    given = _hashed(text)
    return given if _number(given) is not None or FRACTION.fullmatch(given) else ""


def is_correct(response: str, answer: str) -> bool:
    """Whether a response reaches the answer: GSM8K's whole answer text, or the answer alone."""
    _, own_form, answer = answer.rpartition("####")
    answer = _plain(answer.strip())
    text = _ended(response)
    if final := _final(text):
        given, expected = _number(final), _number(answer)
        if given is not None and expected is not None:
            return given == expected
        # How math-verify takes a percent sign depends on the version of its grammar.
        final, answer = (
            written if number is None else f"{number:f}"
            for written, number in ((final, given), (answer, expected))
        )
        return _is_equal(rf"\boxed{{{final}}}", answer)
    if not own_form:
        return False
    if "####" not in text:
        return _is_equal(text, answer)
    final = _hashed(text)
    return bool(final) and _is_equal(f"${final}$" if "$" not in final else final, answer)


def is_gradable(answer: str) -> bool:
    """Whether an answer is judged equal to itself: if not, no response can earn a reward."""
    return _number(answer) is not None or is_correct(rf"\boxed{{{answer}}}", answer)


def response_of(query: str, prompt: str) -> str:
    """The response in a query, which OpenRLHF makes of prompt and response, then decodes.

    A prompt that is too long loses its beginning there, so the query may begin within it, even
    within a character. Qwen's tokenizers compose characters (NFC).
    """
    query, prompt = (unicodedata.normalize("NFC", text) for text in (query, prompt))
    query = query.lstrip("\N{REPLACEMENT CHARACTER}")
    for start in range(len(prompt)):
        if query.startswith(prompt[start:]):
            return query[len(prompt) - start :]
    raise ValueError(f"query {query[:80]!r} does not begin with prompt {prompt[:80]!r}")


def reward_func(
    queries: list[str], prompts: list[str], labels: list[str]
) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    """OpenRLHF's signature: one reward to each query, and the accuracy for the log."""
    rows = zip(queries, prompts, labels, strict=True)
    right = [is_correct(response_of(query, prompt), str(label)) for query, prompt, label in rows]
    rewards = torch.tensor(right, dtype=torch.float32)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"accuracy": rewards}}


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """verl's signature: one response at a time."""
    return float(is_correct(solution_str, ground_truth))
