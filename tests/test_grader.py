"""The grader: a table of cases with a reason each, the data sets against themselves, hostile input, fuzz."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath.libmp import libelefun

from slm import grading
from slm.grading import answered, boxes, equal, extract, grade

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("SLM_DATA", ROOT.parent / "shared" / "data"))
CASES = [json.loads(line) for name in ("grader_cases", "grader_wild")  # wild: what others met
         for line in (ROOT / "tests" / f"{name}.jsonl").read_text().splitlines()]
M = 1_000_000
needs_data = pytest.mark.skipif(not (DATA / "math500").is_dir(), reason="no data folder (SLM_DATA)")


def response(case: dict) -> str:
    return case["response"] if "response" in case else rf"\boxed{{{case['answer']}}}"


def golds(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def seconds(call) -> float:
    """CPU time of the quickest of three: another process's turn is not ours."""
    best = 9.0
    for _ in range(3):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
        if best < 0.01:
            break
    return best


# ---- the table ---------------------------------------------------------------------------------------------

def test_table_is_as_large_as_promised_and_every_row_has_a_reason():
    assert len(CASES) >= 600
    assert sum(not c["right"] for c in CASES) >= 200
    assert all(c["why"] for c in CASES)


def test_every_case_of_the_table():
    wrong = [(c, g) for c in CASES if (g := grade(response(c), c["gold"])).correct is not c["right"]]
    assert not wrong


def test_equality_of_the_table_is_symmetric_and_reflexive():
    for c in CASES:
        if "answer" in c:
            assert equal(c["answer"], c["gold"]) is equal(c["gold"], c["answer"]) is c["right"], c
            assert equal(c["answer"], c["answer"]), c


def test_no_verdict_without_an_answer_and_a_reason():
    for c in CASES:
        g = grade(response(c), c["gold"])
        assert g.reason and len(g.reason) < 60 and "\n" not in g.reason
        assert not g.correct or g.answer


@pytest.mark.parametrize("text, value", [("0x12", "18"), ("0x1F", "31"), ("0XfF", "255"), ("0xab", "171"),
                                         ("0b101", "5"), ("0o17", "15"), ("-0x10", "-16"), ("2x3", "6x")])
def test_a_numeral_with_a_prefix_is_no_product_with_0(text, value):
    """As in C and Python: the value is int(text, 0), as 12_{16} is 18. After another digit, x is a letter."""
    assert equal(text, value) and not equal(text, "0") and not equal(rf"\text{{{text}}}", "0")
    assert equal("0x", "0") and equal("0x + 1", "1") and equal("0 x 12", "0")


# ---- which text is the answer ------------------------------------------------------------------------------

def test_strict_mode_takes_a_box_only():
    for text in ("The answer is 5", "#### 5", "5", "$5$", "x = 5"):
        assert grade(text, "5").correct and not grade(text, "5", strict=True).correct
    assert grade(r"\boxed{5}", "5", strict=True).correct
    assert grade("The answer is 5", "5", strict=True).answer is None


def test_the_last_complete_box_counts_and_nothing_else():
    assert extract(r"\boxed{1} then \boxed{2}. The answer is 3") == "2"
    assert extract(r"\boxed{1} then \boxed{2") == "1"
    assert extract(r"put it in \boxed{}: \boxed{\frac{1}{2}} as in \boxed{}") == r"\frac{1}{2}"
    assert not grade(r"The gold is 7, 7, 7. \boxed{8}", "7").correct


def test_boxes_side_by_side_are_a_list_and_apart_are_not():
    assert grade(r"$x=\boxed{2}$ or $x=\boxed{3}$", "2, 3").correct
    assert not grade(r"\boxed{2} and \boxed{3}", "3").correct
    assert grade(r"\boxed{2}. Now for the whole question, add one and get \boxed{3}", "3").correct


def test_words_between_boxes_make_a_list_only_if_they_join():
    assert extract(r"\boxed{4} girls and \boxed{7} boys") == "4, 7"
    assert extract(r"$$\boxed{2} \quad \text{and} \quad \boxed{6}$$") == "2, 6"
    assert extract(r"\boxed{3} \text{ for part (a) and } \boxed{1}") == "3, 1"
    assert extract(r"$y_1=\boxed{a}$ and $y_2=\boxed{b}$") == "a, b"
    for between in ("but really", "which we double to", "hence,", ". We add one and then get", "and " * 30):
        assert extract(rf"\boxed{{4}} {between} \boxed{{7}}") == "7", between


def test_what_follows_the_end_of_the_turn_is_not_the_response():
    for mark in ("<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>"):
        assert extract(rf"\boxed{{5}}{mark}\n\boxed{{6}}", strict=True) == "5"
        assert extract(rf"{mark}\boxed{{5}}", strict=True) == "5"


def test_a_sentence_gives_its_number_only_without_a_doubt():
    assert grade("The answer is that Jane started 3 hours ago.", "3").correct
    for said in ("Jane has at least 3 hours", "it is not 3 hours", "Jane has 3 of 5 hours", "3 or so hours",
                 "it took less than 3", "Jane rode for 3 " + "hours and more " * 3):
        assert not grade(f"The answer is that {said}.", "3").correct, said


def test_a_number_before_a_megabyte_of_letters_is_no_answer():
    for letters in ("a" * M, "word " * (M // 5), " " + "a" * M):
        for start in ("5", r"\boxed{5", "The answer is 5"):
            assert not grade(start + letters, "5").correct


# ---- choices that could be made otherwise ------------------------------------------------------------------

def test_a_false_chain_counts_by_its_last_member_only_after_a_label():
    assert equal("x = 5+5+1 = 7 = 11", "11") and not equal("x = 5+5+1 = 7 = 11", "7")
    assert equal(r"x = 5+5+1 = \frac13 \approx 11", "1/3")
    assert not equal("5+5+1 = 7", "7") and not equal("5+5+1 = 7", "11")
    assert not equal("x = y = 3", "y = 3, x = 3") and equal("x = y = 3", "x = y = 3")


def test_an_identity_or_an_equation_is_no_number():
    for said in ("1=1", "3==3", "3 = 3", "5=6", "x + 5y = 5", "2x = 5", "x=x"):
        assert not any(equal(said, number) for number in "1356"), said


def test_a_decimal_comma_is_read_for_a_gold_without_comma():
    for answer, gold in (("3,75", "3.75"), ("0,5", "1/2"), (r"3,75\text{ cm}", "3.75"), ("x=1,5", "1.5")):
        assert grade(rf"\boxed{{{answer}}}", gold).correct
        assert not grade(rf"\boxed{{{gold}}}", answer).correct  # the gold may be a list
    for answer, gold in (("1,234", "1.234"), ("(3,5)", "3.5"), (r"\{3,5\}", "3.5"), ("3,5,7", "3.57")):
        assert not grade(rf"\boxed{{{answer}}}", gold).correct
    assert equal("12.345,60", "12345.6") and equal("0,125", "1/8")


def test_fifteen_digits_stand_for_a_fraction_but_not_for_a_root():
    assert equal("0.0833333333333333", r"\frac{1}{12}") and equal("-0.666666666666667", "-2/3")
    assert not equal("0.08333333333333", r"\frac{1}{12}")  # 13 digits
    assert not equal("0.0833333333333343", r"\frac{1}{12}")
    assert not equal("1.41421356237310", r"\sqrt{2}") and not equal("0.999999999999999999", "1")


def test_integers_of_thousands_of_digits_are_compared_as_written():
    number = "7" * 5000
    grouped = f"{int('7' * 4000):,}"
    assert grade(rf"\boxed{{{number}}}", number).correct
    assert not grade(rf"\boxed{{{number}}}", number[:-1] + "8").correct
    assert equal(grouped, "7" * 4000) and not equal(grouped, "7" * 4001)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(-3, 3))
def test_finite_sums_are_equal_to_what_they_add_up_to(low, more, c):
    terms = range(low, low + more + 1)
    assert equal(rf"\sum_{{k={low}}}^{{{low + more}}} (k^2+{c})", str(sum(k * k + c for k in terms)))
    assert not equal(rf"\sum_{{k={low}}}^{{{low + more}}} (k^2+{c})", str(sum(k * k + c for k in terms) + 1))


ENTRIES = st.lists(st.fractions(-9, 9, max_denominator=9), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(ENTRIES, ENTRIES)
def test_matrices_are_added_and_multiplied_entry_by_entry(p, q):
    def written(m):
        a, b, c, d = m
        return rf"\begin{{pmatrix}}{a}&{b}\\{c}&{d}\end{{pmatrix}}"
    (a, b, c, d), (e, f, g, h) = p, q
    times = (a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h)
    assert equal(written(p) + written(q), written(times))
    assert equal(written(p) + "+" + written(q), written(map(sum, zip(p, q))))
    assert not equal(written(p) + written(q), written((times[0] + 1, *times[1:])))


# ---- boxes: one reader for grader, sampler and endpoint ----------------------------------------------------

BOX_CASES = [  # text, contents of its boxes, where a reply ends
    ("so \\boxed{\\frac{1}{2}}$. More\nAnd", [r"\frac{1}{2}"], r"so \boxed{\frac{1}{2}}$. More"),
    ("put it in \\boxed{}.\nIt is \\boxed{7}, so\n", ["7"], "put it in \\boxed{}.\nIt is \\boxed{7}, so"),
    ("in \\boxed{ \n}: none\n", [], None),
    ("\\boxed{7} and no line break", ["7"], None),
    ("\\boxed{a\\}b} c}\n", [r"a\}b"], r"\boxed{a\}b} c}"),
    ("\\boxed{\\left\\{ x \\right.} c\n", [r"\left\{ x \right."], r"\boxed{\left\{ x \right.} c"),
    ("\\boxed {x}\n", ["x"], r"\boxed {x}"),
    ("\\fbox{x}\n", ["x"], r"\fbox{x}"),
    ("\\\\boxed{x}\n", ["x"], r"\\boxed{x}"),
    ("{ \\boxed{1 \\boxed{2} c\nd", ["2"], r"{ \boxed{1 \boxed{2} c"),
    ("} \\boxed{1} or \\boxed{2} c\nd", ["1", "2"], r"} \boxed{1} or \boxed{2} c"),
    ("<think>\\boxed{1}\n</think> \\boxed{2}\nc", ["1", "2"], "<think>\\boxed{1}\n</think> \\boxed{2}"),
    ("<think> is it \\boxed{1}?\n", ["1"], None),
    ("\\boxed 5, \\boxed x\n", ["5,"], None),
    ("\\boxed{a\\\\} b\n", [r"a\\"], r"\boxed{a\\} b"),
    (r"\boxed{" + 7998 * "x" + "}\n", [7998 * "x"], r"\boxed{" + 7998 * "x" + "}"),
    (r"\boxed{" + 7999 * "x" + "}\n", [], None)]


@pytest.mark.parametrize("text, contents, reply", BOX_CASES)
def test_boxes_and_where_a_reply_ends(text, contents, reply):
    assert [box.content for box in boxes(text)] == contents
    assert all(text[box.start] == "\\" and box.content in text[box.start : box.stop] for box in boxes(text))
    end = answered(text)
    assert (None if end is None else text[:end]) == reply


def test_a_prompt_may_have_opened_the_thinking():
    text = "is it \\boxed{1}?\n</think>\nIt is \\boxed{2}.\nBye"
    assert text[:answered(text)] == "is it \\boxed{1}?"
    assert text[:answered(text, thinking=True)] == "is it \\boxed{1}?\n</think>\nIt is \\boxed{2}."


BOX_PIECES = st.lists(st.sampled_from([
    r"\boxed{", r"\boxed {", r"\fbox{", "{", "}", r"\{", r"\}", "\\", "7", " ", "\n", "<think>", "</think>"]),
    max_size=24)


@settings(max_examples=300, deadline=None)
@given(BOX_PIECES.map("".join))
def test_a_reply_ends_at_the_same_place_read_whole_or_as_it_grows(text):
    ends = (answered(text[:i]) for i in range(len(text) + 1))
    assert answered(text) == next(filter(None, ends), None)


@settings(max_examples=300, deadline=None)
@given(BOX_PIECES.map(lambda pieces: "".join(p for p in pieces if "think" not in p)))
def test_a_reply_ends_where_the_grader_finds_an_answer(text):
    end = answered(text + "\n")
    found = [box for box in boxes(text[:end]) if text[box.stop - 1] == "}"]
    assert bool(end) is bool(found)


def test_the_end_of_a_reply_is_found_in_linear_time():
    for text in (r"\boxed{" * 140_000, r"\boxed{}" * 120_000, "{" * M, "\\" * M, r"\boxed" + " " * M,
                 "<think>" * 140_000):
        assert seconds(lambda text=text: answered(text)) < 1.0


# ---- why ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, gold, reason", [
    ("5", "5", "same value"), ("6", "5", "different value"), ("0.33", r"\frac13", "rounded"),
    ("50", "0.5", "off by a factor of 100"), ("(2,1)", "(1,2)", "same members in another order"),
    ("[1,2)", "(1,2)", "an end open or closed"), ("7, 8", "7", "more than the answer"),
    ("7", "7, 8", "part of the answer"), (r"5 \text{ cm}", r"5 \text{ m}", "another unit"),
    ("-5", "5", "opposite sign"), ("9^{9^{9^9}}", "5", "too large or not understood")])
def test_reasons_name_what_is_wrong(answer, gold, reason):
    assert grade(rf"\boxed{{{answer}}}", gold).reason == reason


def test_missing_answers_say_so():
    assert grade("no idea", r"\frac12").reason == "no answer found"
    assert grade("5", "5", strict=True).reason == "no boxed answer"


# ---- the data sets -----------------------------------------------------------------------------------------

@needs_data
@pytest.mark.parametrize("name", ["gsm8k/test", pytest.param("gsm8k/train", marks=pytest.mark.slow)])
def test_gsm8k_solutions_as_responses_are_all_right(name):
    rows = golds(name)
    own = [r["answer"].rsplit("####", 1)[1].strip() for r in rows]
    assert all(grade(r["answer"], g).correct for r, g in zip(rows, own))
    other = random.Random(0).sample(own, len(own))
    hits = sum(grade(r["answer"], g).correct for r, g in zip(rows, other))
    assert hits == sum(a.replace(",", "") == b.replace(",", "") for a, b in zip(own, other))


# These solutions box each of several answers; the data set keeps the last box as its gold: half an answer.
SEVERAL_BOXES = """train/intermediate_algebra/1113 train/algebra/152 train/algebra/1771
train/intermediate_algebra/396 train/intermediate_algebra/1486 train/intermediate_algebra/1964
train/number_theory/796 train/precalculus/860 train/precalculus/1040 train/precalculus/1089
train/precalculus/1149 test/algebra/1878 test/intermediate_algebra/25
test/intermediate_algebra/225 test/intermediate_algebra/702 test/intermediate_algebra/1855
test/precalculus/679 test/precalculus/1227""".split()


@needs_data
def test_math_solutions_as_responses_are_all_right_but_those_with_several_answers():
    rows = golds("math/train") + golds("math500/test")
    wrong = [r["unique_id"].removesuffix(".json") for r in rows
             if r["answer"] and not grade(r["solution"], r["answer"]).correct]
    assert sorted(wrong) == sorted(SEVERAL_BOXES)


@needs_data
def test_every_gold_equals_itself_and_hardly_another():
    texts = sorted({r["answer"] for r in golds("math/train") + golds("math500/test") if r["answer"]})
    for text in texts[::3]:
        assert equal(f"${text}$", text) and equal(text, f"{text}."), text
    rng = random.Random(0)
    pairs = [(a, b) for a in texts[::3] for b in rng.sample(texts, 1) if a != b]
    met = [(a, b) for a, b in pairs if equal(a, b)]
    assert len(met) <= 3, met
    assert all(equal(b, a) for a, b in met)


def test_the_bench_reads_public_tests_without_running_them(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("""
import math, pytest
open("mark", "w")
@pytest.mark.parametrize("gold,pred,expected",
                         [("$5$", "it is 5", 1), (f"{math.sqrt(2)}", "1", 0), ("6", "5", 0)])
def test_some(gold, pred, expected): assert open("mark", "w")
@pytest.mark.parametrize("gold, pred, strict, expected",
                         [("f(x)", "f(y)", False, 1), ("f(x)", "f(y)", True, 0)])
def test_options(gold, pred, strict, expected): pass
@pytest.mark.parametrize("pred,config", [("A", None)])
def test_other(pred, config): pass
""")
    code = "import sys; sys.path.insert(0, 'bench'); import grader; from pathlib import Path; " \
           "print(grader.public_tests(Path(sys.argv[1])))"
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, text=True,
                         capture_output=True).stdout.splitlines()
    assert out[-1] == "[('it is 5', '$5$', True), ('5', '6', False), ('f(y)', 'f(x)', False)]"
    assert len(out) == 3 and not (ROOT / "mark").exists()  # two rows left out, each by name


# ---- safe and bounded --------------------------------------------------------------------------------------

HOSTILE = {
    "open braces": r"\boxed{" + "{" * M, "boxes": r"\boxed{" * (M // 7), "braces": "{" * M,
    "digits": "9" * M, "boxed digits": r"\boxed{" + "9" * M + "}", "tower": r"\boxed{9^{9^{9^9}}}",
    "carets": r"\boxed{" + "9^" * 300 + "9}", "factorial": r"\boxed{99999999!}",
    "factorials": r"\boxed{" + "+".join(["2999!"] * 200) + "}",
    "powers": r"\boxed{" + "*".join(["99999^{1700}"] * 100) + "}",
    "signs": r"\boxed{" + "-" * 1900 + "5}", "bars": r"\boxed{" + "|" * 1500 + "5}",
    "fractions": r"\boxed{" + r"\frac{" * 300 + "1" + "}{2}" * 300 + "}",
    "parentheses": r"\boxed{" + "(" * 1900 + "}",
    "plus-minus": r"\boxed{" + "+".join([r"\pm 1"] * 200) + "}",
    "roots": r"\boxed{" + ",".join(rf"\sqrt{{{i}}}" for i in range(50)) + "}",
    "sines": r"\boxed{" + r"+\sin 1" * 150 + "}",
    "exponentials": r"\boxed{" + "exp(" * 20 + "1" + ")" * 20 + "}", "markers": "answer is " * (M // 10),
    "hashes": "#" * M, "commas": "1," * (M // 2), "text": r"\text{" * 200_000, "dollars": "$" * M,
    "backslashes": "\\" * M, "spaces": " " * M, "binomial": r"\boxed{\binom{10^9}{5*10^8}}",
    "small": r"\boxed{10^{-10^{10}}}", "near one": r"\boxed{1.0000001^{10^{10}}}",
    "unicode": r"\boxed{" + "\ufdfa" * 1900 + "}", "accents": r"\boxed{" + "\u0301" * 1900 + "}",
    "lone": "\\boxed{\ud800}", "variables": r"\boxed{(x+y+z+w)^{5000}}",
    "x tower": r"\boxed{x^{x^{x^x}}}", "columns": r"\boxed{\begin{pmatrix}" + "1&" * 600 + "}",
    "thousands": r"\boxed{1" + r",\!000" * 300 + "}", "nested boxes": r"\boxed{" * 300 + "7" + "}" * 300,
    "boxed list": r"\boxed{1} and " * 80_000, "zero": r"\boxed{\frac10}", "0^0": r"\boxed{0^0}",
    "nan": r"\boxed{NaN}", "e": r"\boxed{1e999999999}", "nul": "\\boxed{\0}",
    "repeating": r"\boxed{0.\overline{" + "7" * 1400 + "}}", "base": r"\boxed{" + "9" * 1400 + "_{36}}",
    "floor": r"\boxed{\lfloor e^{10^8} \rfloor}", "e tower": r"\boxed{e^{e^{e^{20}}}}",
    "log": r"\boxed{\ln 0}",
    "long sum": r"\boxed{\sum_{k=1}^{9000} \sum_{j=1}^{9000} kj}",
    "long product": r"\boxed{\prod_{k=1}^{5000} k^{99}}", "turns": "<|im_end|>" * 100_000,
    "deep sum": r"\boxed{" + r"\sum_{k=1}^{n}" * 20 + "k}", "dots": r"\boxed{1" + ".234" * 499 + ",5}",
    "matrices": r"\boxed{" + r"\begin{pmatrix}1&2\\3&4\end{pmatrix}" * 25 + "}",
    "named": r"\boxed{" + "a=1,b=2;" * 240 + "}", "is": "is " * 300_000 + "$x$", "colons": ":" * M + "$x$.",
    "angle": r"\boxed{\sin(10^{5000}\sqrt2)}", "complex power": r"\boxed{(1+i\sqrt2)^{399^{2}}}",
    "tan": r"\boxed{\tan 90^\circ}", "of nothing": r"\boxed{\max\{\}+\gcd()}", "f of nothing": r"\boxed{f()}",
}
GOLDS = [
    "5", r"\frac{\pi}{2}", "x^2+1", "(1,2)", r"\sqrt{2}+\sqrt{3}", r"(-\infty,3)", r"\text{east}", r"50\%",
    r"10^{1000}\sqrt{2}", "(x+y+z+w)^{4999}", ",".join(rf"\sqrt{{{i}}}*1" for i in range(50))]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_refused_within_50_ms(name):
    for gold in GOLDS:
        took = seconds(lambda gold=gold: grade(HOSTILE[name], gold))
        assert not grade(HOSTILE[name], gold).correct, gold
        assert took < 0.05, (gold, took)


def test_hostile_golds_are_bounded_too():
    for text in HOSTILE.values():
        assert seconds(lambda text=text: grade(r"\boxed{5}", text[:5000])) < 0.05
        assert seconds(lambda text=text: equal(text[:5000], text[:5000] + "1")) < 0.05


def test_comparisons_that_need_many_digits_are_bounded():
    for a, b in needing_many_digits():
        assert seconds(lambda a=a, b=b: equal(a, b)) < 0.05, a


def test_no_comparison_makes_mpmath_compute_a_constant_anew():
    """Its cache of constants is not safe in threads while it grows."""
    kept = [c.__closure__[0].cell_contents for c in (libelefun.pi_fixed, libelefun.e_fixed,
                                                     libelefun.ln2_fixed, libelefun.ln10_fixed)]
    before = [c.memo_prec for c in kept]
    assert all(10_240 < digits < 20_000 for digits in before)
    more = [(r"\pi+10^{1400}", r"\pi+e+10^{1400}"), (r"\sin(10^{19}\pi+10^{-300})", "0"),
            (r"\log_{10} (10^{1400}+\pi)", r"\log_{10}(10^{1400})"), (r"e^{2000}", "e^{2000}+e^{-100}")]
    for a, b in needing_many_digits() + more:
        equal(a, b)
    assert [c.memo_prec for c in kept] == before


def needing_many_digits() -> list[tuple[str, str]]:
    huge = [rf"e^{{300}}+\sqrt{{{i}}}" for i in range(100, 112)]
    open_ended, half_open = (r"\cup".join(f"{end}{i},{i + 1})" for i in range(60)) for end in "([")
    return [(r"\ln 2+10^{1400}", r"\ln 3+10^{1400}"), (r"e^{3000}+\sqrt2", r"\sqrt3+e^{3000}"),
            (r"e^{e^{e^x}}", r"0+e^{e^{e^x}}"), ("(n!)!", "0+(n!)!"), (open_ended, half_open),
            (r"\sqrt{2}^{4000}+\sqrt3^{x}", r"1+\sqrt{2}^{4000}+\sqrt3^{x}"),
            (r"\{" + ",".join(huge) + r"\}", r"\{" + "+0,".join(huge) + r"+0\}")]


def test_model_text_is_not_executed(tmp_path):
    mark = tmp_path / "mark"
    codes = (f'__import__("os").system("touch {mark}")', f'open("{mark}", "w")', f"exec('open({mark!r}, 1)')")
    for code in codes:
        for form in (r"\boxed{%s}", r"\boxed{\text{%s}}", "The answer is %s", r"\boxed{\sqrt{%s}}"):
            assert not grade(form % code, "0").correct
    assert not mark.exists()
    source = "".join(path.read_text() for path in (ROOT / "slm" / "grading").glob("*.py"))
    assert not re.search(r"^\s*(import|from)\s+(sympy|signal|threading|subprocess|math_verify)", source, re.M)
    assert not re.search(r"\b(eval|exec|sympify|parse_expr|parse_latex|compile)\((?<!re\.compile\()", source)


def test_import_is_quick_and_needs_neither_sympy_nor_torch():
    code = "import slm.grading, sys; assert slm.grading.grade('x', r'\\frac{\\pi}{2}').correct is False; " \
           "assert not {'sympy', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_version_names_the_source(monkeypatch, tmp_path):
    assert re.fullmatch("[0-9a-f]{12}", grading.version()) and grading.version() == grading.version()
    for path in (ROOT / "slm" / "grading").glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(grading, "__file__", str(tmp_path / "__init__.py"))
    same = grading.version()
    monkeypatch.undo()
    assert same == grading.version()
    (tmp_path / "values.py").write_text("MAX_BITS = 1\n")
    monkeypatch.setattr(grading, "__file__", str(tmp_path / "__init__.py"))
    assert grading.version() != same


def test_threads_and_nearly_full_stacks_get_the_same_verdicts():
    wanted = [grade(response(c), c["gold"]).correct for c in CASES]
    found: dict[int, list] = {}
    def run(i: int) -> None:
        found[i] = [grade(response(c), c["gold"]).correct for c in CASES[::4]]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(found[i] == wanted[::4] for i in range(3))

    def deep(n: int):
        return grade(r"\boxed{\frac{1}{1+\frac{1}{1+\frac12}}}", "3/5") if n == 0 else deep(n - 1)
    for n in range(700, sys.getrecursionlimit() - 60, 20):
        assert deep(n).correct in (True, False)


# ---- fuzz --------------------------------------------------------------------------------------------------

PIECES = [
    r"\frac", r"\sqrt", r"\boxed", r"\text", r"\pi", r"\infty", r"\cup", r"\begin{pmatrix}",
    r"\end{pmatrix}", r"\pm", r"\le", r"\left(", r"\right]", r"\{", r"\}", "{", "}", "(", ")", "[", "]",
    "^", "_", "&", r"\\", ",", "=", "<", "|", "!", "%", "$", r"\$", "°", "½", "√", "1", "23", "4.5", "x",
    "ab", "cm", "or", " ", "e", "i", "-", "+", "*", "/", ":", ".", "sin", "log", r"\circ", "answer is",
    "####", "not", "half", "T", "'", "9^9^9", "77!", r"\cap", r"\gcd", r"\max", r"\pmod", r"\binom", "e^{e^",
]
LATEX = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(max_examples=120, deadline=None)
@given(st.text(max_size=300) | LATEX, st.text(max_size=40) | LATEX)
def test_any_text_gets_a_verdict_in_time(text, gold):
    assert seconds(lambda: grade(text, gold)) < 0.05
    assert seconds(lambda: grade(rf"\boxed{{{text}}}", gold)) < 0.05


@settings(max_examples=120, deadline=None)
@given(LATEX, LATEX)
def test_equality_of_random_latex_is_symmetric_and_reflexive(a, b):
    assert equal(a, b) is equal(b, a)
    assert equal(a, a)


COEFFICIENTS = st.lists(st.integers(-20, 20), min_size=1, max_size=5)
ANSWERS = sorted({c["gold"] for c in CASES} | {c["answer"] for c in CASES if "answer" in c})


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS), st.integers(0, 60), st.sampled_from(PIECES),
       st.integers(0, 3))
def test_mutated_answers_get_a_verdict_in_time(a, b, at, piece, drop):
    mutant = a[:at] + piece + a[at + drop :]
    assert seconds(lambda: equal(mutant, b)) < 0.05
    assert equal(mutant, b) is equal(b, mutant)


@settings(max_examples=80, deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_rationals_are_compared_exactly_in_any_form(x, y):
    forms = [f"{x.numerator}/{x.denominator}", rf"\frac{{{x.numerator}}}{{{x.denominator}}}",
             rf"\dfrac{{{2 * x.numerator}}}{{{2 * x.denominator}}}"]
    if x >= 1 and x.denominator > 1:
        whole, rest = divmod(x.numerator, x.denominator)
        forms.append(rf"{whole}\frac{{{rest}}}{{{x.denominator}}}")
    for form in forms:
        assert equal(form, str(x))
        assert equal(form, str(y)) is (x == y)


@settings(max_examples=40, deadline=None)
@given(COEFFICIENTS, COEFFICIENTS)
def test_polynomials_are_equal_when_their_coefficients_are(p, q):
    def written(c):
        return "+".join(f"({a})x^{{{k}}}" for k, a in enumerate(c))

    def factored(c):  # Horner's scheme: another form of the same polynomial
        text = f"({c[-1]})"
        for a in reversed(c[:-1]):
            text = rf"\left({text} x + ({a})\right)"
        return text
    same = [*p, *[0] * (5 - len(p))] == [*q, *[0] * (5 - len(q))]
    assert equal(written(p), factored(p))
    assert equal(written(p), factored(q)) is same
