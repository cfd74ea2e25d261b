"""The reward, worked by hand; called as OpenRLHF calls it: by path, one sample, from a thread."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import pytest
import torch

pytest.importorskip("math_verify", reason="the recipes extra is not installed")

from recipes.shared.reward import final_answer, is_correct, response_of, reward_func

SHARED = Path(__file__).parents[3] / "shared" / "data"

RIGHT = [
    ("23+14=37. 37-5=32.\n#### 32", "23+14=37. 37-5=32.\n#### 32"),
    ("23+14=37. 37-5=32.\n#### 32<|im_end|>", "32"),
    ("#### 1,234", "1234"),
    ("#### 1234", "long reasoning\n#### 1,234"),
    ("#### 1,234,567.50", "1234567.5"),
    ("#### $1,234.00", "1234"),
    ("#### -5", "-5"),
    ("#### $-5", "-5"),
    ("#### -$5", "-5"),
    ("#### \N{MINUS SIGN}7", "-7"),
    ("#### 12.0", "12"),
    ("#### 12", "12.0"),
    ("#### $12.50.", "12.5"),
    ("#### 12 apples.", "12"),
    ("#### 20%", "20"),
    ("#### **20**", "20"),
    ("####20", "20"),
    ("#### 3/4", "0.75"),
    (r"#### \boxed{7}", "7"),
    ("#### 7\n#### 8", "8"),
    ("#### 8\nThat is 3 more.", "8"),
    (r"The answer is \boxed{1,234}.", "1234"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{42}, not 7", "42"),
    (r"\boxed{1+x^2}", "x^2+1"),
    (r"\sum is too wild, but the answer is \boxed{5}", "5"),
    (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(-\infty,2)\cup(3,\infty)"),
    (r"\boxed{x^5 - x^4 + x^3 - x^2 + x - 1}", r"x^5 - x^4 + x^3 - x^2 + x - 1"),
    (r"\boxed{\frac{(x-1)^2}{4}+(y+2)^2}", r"\frac{(1-x)^2}{4}+(y+2)^2"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{10080}", r"10,\!080"),
    (r"\boxed{90}", r"90^\circ"),
    # A heading is no answer beside a box.
    ("#### Step 2: Final\n\nThe answer is \\boxed{18}.", "18"),
    (r"\boxed{7}" + "\n\n#### 18 apples per day", "7"),
    (r"\boxed{3}, no, \boxed{4}", "4"),
    # Numbers in a box, with what may stand beside them.
    *((rf"\boxed{{{written}}}", "50") for written in (r"50\%", "50 percent", "€50", r"\$50.00")),
    (r"\boxed{50}", r"50\%"),
    (r"\boxed{18 dollars}", "18"),
    (r"\boxed{18~\text{cm}}", "18"),
    (r"\boxed{18\,cm}", "18"),
    (r"\boxed{18\textrm{ cm}^2}", "18"),
    (r"\boxed{18}", r"18\text{ cm}"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{70\,000}", "70000"),
    (r"\boxed{70{,}000}", "70000"),
    (r"\boxed{3.50}", "3.5"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{18 dollars}", r"\frac{36}{2}"),
    (r"\boxed{\begin{pmatrix} 1 \\ 200 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 200 \end{pmatrix}"),
]

WRONG = [
    ("", "7"),
    ("no number", "7"),
    ("####", "12"),
    ("12\n####", "12"),
    ("#### 5", "-5"),
    ("#### -5", "5"),
    ("#### 12 13", "12"),
    ("#### 12,5", "125"),
    ("#### 12.5", "125"),
    ("#### 123", "12"),
    ("#### 7\n#### 8", "7"),
    ("The answer is 32.\n#### 31", "32"),
    ("#### 31<|im_end|>\n<|im_start|>assistant\n#### 32", "32"),
    (r"\boxed{42}, not 7", "7"),
    (r"\boxed{", "7"),
    ("#### 18 apples per day\nSo the total is \\boxed{7}", "18"),
    (r"\boxed{3}, no, \boxed{4}", "3"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{0.5}", r"50\%"),
    (r"\boxed{50\%}", "5"),
    (r"\boxed{1,000}", "1"),
    (r"\boxed{70\,000}", "70"),
    (r"\boxed{3.50}", "350"),
    (r"\boxed{x=5}", "4"),
    (r"\boxed{50\%}", r"\frac{1}{2}"),
    (r"\boxed{\frac{1}{2}}", r"50\%"),
    # A factor is no unit, and two numbers are not one.
    *((rf"\boxed{{{written}}}", "3") for written in ("3x", "3i", "3 xy", r"3 \pi", "3 and 4")),
    (r"\boxed{3}", "3x"),
    (r"\boxed{\text{minus }3}", "3"),
    # Neither a box nor a number after `####`: no answer, as when it was cut off.
    ("It is 12!", "12"),
    ("so we have 12 and then 7", "7"),
    (r"It is $\frac{1}{2}$", r"\frac{1}{2}"),
    ("#### 2. First, there are 2 of them", "2"),
    ("#### Step 2\nThere are 2", "2"),
]

# What GSM8K's own form, the quickstart's, takes beside `####`: the last number.
LAST_NUMBER = [
    ("So 7 are left.<|im_end|>", "7"),
    ("It is 12!", "12"),
    ("It costs $12.50 in all", "12.5"),
    ("2^10 is much, and 2^3, and 4^5. So 12", "12"),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right(response: str, answer: str) -> None:
    assert is_correct(response, answer) is True


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong(response: str, answer: str) -> None:
    assert is_correct(response, answer) is False


@pytest.mark.parametrize(("response", "number"), LAST_NUMBER)
def test_the_last_number_counts_in_gsm8ks_own_form_alone(response: str, number: str) -> None:
    assert is_correct(response, f"12+1=13\n#### {number}") is True
    assert is_correct(response, number) is False
    assert is_correct(response, f"{number}+1\n#### {number}1") is False


@pytest.mark.parametrize("response", ["12\n####", "#### 12 13", "#### 13", r"12 or \boxed{13}"])
def test_what_is_given_decides_in_gsm8ks_own_form(response: str) -> None:
    assert is_correct(response, "5+7=12\n#### 12") is False


def test_final_answers() -> None:
    assert final_answer(r"\boxed{\frac{1}{2}}, surely<|im_end|> \boxed{7}") == r"\frac{1}{2}"
    assert final_answer("2+2=4\n#### 4\nmore") == "4"
    assert final_answer("#### 3/4") == "3/4"
    assert final_answer("#### so") == final_answer("it costs 12.50.") == final_answer("no") == ""


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{9^{9^{9}}}",  # math-verify's own `verify` never comes back from this one
        r"\boxed{2^{100000000}}",
        r"\boxed{100000!}",
        r"\boxed{\sum_{i=1}^{1000000} i!}",
        "#### 9**9**9**9",
        r"\boxed{(a+b+c+d)^{99}}",
        r"\boxed{(a+b+c+d+e+f+g+h)^9}",
        r"\boxed{(a^9+b^9+c^9+d^9+e+f)^4(a+b+c+d+e+f+g+h)^5}",
        "#### 1e999999999",
        "$" + "(" * 800 + "9" + ")" * 800 + "$",
        "#### 12 " + "a" * 60 + "!",
        "1" * 5000,
        r"\boxed{-" + " " * 20000 + "x}",
        r"\boxed{=" + " " * 900 + "x}",
        r"\boxed{12" + "*" * 20000 + "x}",
    ],
)
def test_a_policy_gone_astray_does_not_hold_up_the_run(response: str) -> None:
    is_correct("1/2", "0.5")  # math-verify's first call loads its grammar
    started = perf_counter()
    assert not is_correct(response, "32")
    assert perf_counter() - started < 5


def test_the_host_can_load_it_by_path_and_call_it_from_a_thread() -> None:
    path = Path(__file__).parents[2] / "recipes" / "shared" / "reward.py"
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompt = "<|im_start|>user\nHow many #### 9?<|im_end|>\n<|im_start|>assistant\n"
    cases = [("3+4=7.\n#### 7<|im_end|>", 1.0), ("3+4=8.\n#### 8<|im_end|>", 0.0), ("So 7.", 1.0)]
    with ThreadPoolExecutor(1) as thread:
        for response, expected in cases:
            call = thread.submit(module.reward_func, [prompt + response], [prompt], ["x\n#### 7"])
            result = call.result(timeout=60)
            assert set(result) == {"rewards", "scores", "extra_logs"}
            # What the host's sample generator makes of the three.
            assert torch.tensor([result["rewards"]]).tolist() == [expected]
            assert torch.tensor([result["scores"]]).tolist() == [expected]
            assert result["extra_logs"]["accuracy"].flatten()[0].item() == expected


def test_the_prompt_is_not_part_of_the_response() -> None:
    prompt = "Say #### 7, please.\n"
    assert reward_func([prompt + "No."], [prompt], ["7"])["rewards"].tolist() == [0.0]
    assert response_of(prompt + "No.", prompt) == "No."
    assert response_of("please.\nNo.", prompt) == "No."  # cut off on the left by the host
    with pytest.raises(ValueError, match="does not begin with prompt"):
        response_of("No.", prompt)


def test_a_label_may_be_a_number() -> None:
    assert reward_func(["How many?\n#### 7"], ["How many?\n"], [7])["rewards"].tolist() == [1.0]


def test_every_answer_of_gsm8k_is_right_by_itself_and_its_neighbour_is_not() -> None:
    path = SHARED / "gsm8k_test.jsonl"
    if not path.exists():
        pytest.skip("no local copy of GSM8K beside the repository")
    answers = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    for answer in answers:
        final = answer.rpartition("####")[2].strip()
        assert is_correct(answer, answer), final
        assert is_correct(answer, final), final
        assert not is_correct(f"#### {final}1", answer), final


def test_every_answer_of_math_500_is_right_by_itself_and_by_its_solution() -> None:
    path = SHARED / "math500.json"
    if not path.exists():
        pytest.skip("no local copy of MATH-500 beside the repository")
    rows = json.loads(path.read_text("utf-8"))
    for row in rows:
        assert is_correct(rf"So \boxed{{{row['answer']}}}.", row["answer"]), row["answer"]
    for row in rows[::10]:
        assert is_correct(row["solution"], row["answer"]), row["answer"]
