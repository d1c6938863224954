"""What tells whether an exercise is solved: one function for each. They hold parts of the answers, so look
into your own file first.

A check gets what your file defines. It raises NotYet with a sentence on what is not right, and returns
nothing if all is well. Its values come from hand-worked numbers, brute force, or the project's own function.
"""

import contextlib
import functools
import io
import math
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from slm import attention, checkpoint, lora, losses, workflows
from slm.episode import Episode, Job, Reply, Request, Sampling, Turn, run_episodes, user
from slm.model import Config, Qwen2
from slm.problems import Problem
from slm.rewards import Rules, reward_of
from slm.runs import files
from slm.sampling import Sampler
from slm.sandbox import Sandbox

FOLDER = Path(__file__).parent


class NotYet(Exception):
    """What is not right yet, in one sentence."""


@dataclass(frozen=True)
class Exercise:
    file: str
    names: tuple[str, ...]  # what the file must define
    check: Callable


def judge(exercise: Exercise, folder: Path = FOLDER) -> tuple[str, str]:
    """("solved" or "open" or "not yet", what is missing or wrong in one line)."""
    file, defined = str(folder / exercise.file), None
    try:
        defined = files.load(file)
        for name in exercise.names:
            expect(name in defined, f"{name} is not there any more")
        exercise.check(SimpleNamespace(**defined))
    except NotYet as e:
        return "not yet", str(e)
    except (Exception, SystemExit) as e:
        own = [frame for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        if isinstance(e, NotImplementedError):
            return "open", f"{own[-1].name if own else ' and '.join(exercise.names)}: nothing is written yet"
        line = own[-1].lineno if own else getattr(e, "lineno", None)
        unread = "the file can't be read" if defined is None else "what it returns does not fit"
        place = f"line {line}" if line else unread
        return "not yet", f"{place}: {type(e).__name__}: {e}".splitlines()[0]
    return "solved", ""


def expect(holds, words: str) -> None:
    if not holds:
        raise NotYet(words)


def near(a, b, tolerance: float = 1e-5) -> bool:
    """Whether two tensors, or lists of numbers, have one shape and differ by the tolerance at most."""
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


def shown(numbers) -> str:
    return ", ".join(f"{x:.4g}" for x in torch.as_tensor(numbers).detach().double().flatten().tolist())


# ---- 1: a reward ------------------------------------------------------------------------------------------

def check_reward(mine) -> None:
    problem = Problem("p", "What is 2 + 2?", "4", source="")

    def earned(text: str, tokens: int) -> float:
        turn = Turn("solver", [user(problem.question)], Reply(text, ids=[0] * tokens))
        episode = Episode("p", turns=[turn], response=text)
        reward_of(episode, problem, Rules({"correct": 1.0}))  # fills in what the trainer fills in
        value = mine.reward(episode, problem)
        expect(isinstance(value, int | float) and math.isfinite(value), f"it returned {value!r}, no number")
        return float(value)

    right, wrong = "2 + 2 = \\boxed{4}", "2 + 2 = \\boxed{5}"
    bad = {"a wrong answer": wrong, "a right answer without a box": "The answer is 4.", "silence": ""}
    short, long, longest = (earned(right, tokens) for tokens in (20, 150, 5000))
    expect(short > long, f"a right answer of 20 tokens earns {short:g}, one of 150 tokens {long:g}")
    for name, text in bad.items():
        few, many = earned(text, 3), earned(text, 900)
        expect(few < longest, f"{name} of 3 tokens earns {few:g}, a right answer of 5,000 tokens {longest:g}")
        expect(few == many, f"{name} earns {few:g} with 3 tokens and {many:g} with 900: the policy would "
                            "learn the length alone")


# ---- 2: a workflow ----------------------------------------------------------------------------------------

class Scripted:
    """A backend that answers with these texts, one after the other."""

    def __init__(self, texts: list[str]):
        self.texts, self.asked, self.tickets = texts, [], []

    def submit(self, request: Request) -> int:
        expect(len(self.asked) < len(self.texts), f"it asks more than {len(self.texts)} times")
        self.asked.append(request)
        self.tickets.append(len(self.asked) - 1)
        return self.tickets[-1]

    def step(self) -> list[tuple[int, int, Reply]]:
        now, self.tickets = self.tickets, []
        return [(ticket, 0, Reply(self.texts[ticket])) for ticket in now]


def check_workflow(mine) -> None:
    cases = [(["4", "4"], "4", 2), (["1/2", "0.5"], "1/2", 2), (["4", "5", "5"], "5", 3),
             (["4", "5", "4"], "4", 3), (["4", "5", "6"], "4", 3), (["", "5", "5"], "5", 3),
             (["", "", "5"], "5", 3), (["", "", ""], None, 3)]
    for answers, expected, asks in cases:
        texts = [f"I think \\boxed{{{answer}}}." if answer else "Let me think again." for answer in answers]
        backend = Scripted([*texts, *["\\boxed{7}"] * (3 - len(texts))])
        [episode] = run_episodes([Job("p", "Which one?", mine.third_if_needed)], backend)
        said = f"replies with the answers {', '.join(answer or 'none' for answer in answers)}"
        expect(all(turn.role == "solver" for turn in episode.turns), "the solver alone is asked")
        expect(not backend.asked[0].sampling.temperature, "the first Ask is not greedy")
        expect(all("Which one?" in request.messages[-1]["content"] for request in backend.asked),
               "a prompt lacks the question")
        expect(len(episode.turns) == len(backend.asked), "two greedy Asks are one: the later ones need a "
                                                         "temperature, or they can't differ")
        expect(len(episode.turns) == asks, f"{said}: {len(episode.turns)} Asks, expected {asks}")
        expect(workflows.same(episode.answer, expected) or episode.answer == expected,
               f"{said}: it stands by {episode.answer}, expected {expected}")


# ---- 3: the loss of a sequence ----------------------------------------------------------------------------

def check_loss(mine) -> None:
    model, tokenizer = checkpoint.load("tiny")
    ids = tokenizer.encode("Tom has 3 apples. He buys 4 more. Now he has 3 + 4 = 7 apples.")
    attend = attention.Packed([len(ids)])
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(ids), attend.positions, attend))
        for first in (1, 6, len(ids) - 1):
            mask = [0] * first + [1] * (len(ids) - first)
            expected = -losses.score(model, [ids], [mask])[0].mean()
            found = mine.mean_loss(logits, torch.tensor(ids), torch.tensor(mask))
            expect(near(found, expected, 1e-4),
                   f"with the last {len(ids) - first} of {len(ids)} tokens trained it is {shown(found)}, "
                   f"losses.score says {shown(expected)}")


# ---- 4: the mask of a conversation ------------------------------------------------------------------------

def check_mask(mine) -> None:
    _, tokenizer = checkpoint.load("tiny")
    talks = [["What is 3 + 4?", "3 + 4 = 7.\nThe answer is \\boxed{7}."],
             ["Say yes.", "yes", "Say yes. Again: yes", "Say yes."]]  # the same words in prompts and replies
    for texts in talks:
        talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        ids, mask = mine.encode(tokenizer, talk)
        expect(len(ids) == len(mask), f"{len(ids)} ids, but a mask of {len(mask)}")
        expect(set(mask) <= {0, 1}, "the mask holds something that is neither 0 nor 1")
        whole = tokenizer.render(talk, generation=False)
        end = tokenizer.decode([tokenizer.end_of_turn], skip_special=False)
        whole = whole[:whole.rindex(end) + len(end)]
        said = tokenizer.decode(ids, skip_special=False)
        expect(said == whole, f"the ids say {said!r}, the conversation is {whole!r}")
        pieces, start = [], 0
        for place in range(1, len(ids) + 1):
            if place == len(ids) or mask[place] != mask[start]:
                pieces += [tokenizer.decode(ids[start:place], skip_special=False)] * mask[start]
                start = place
        expected = [text + end for text in texts[1::2]]
        expect(pieces == expected, f"trained are {pieces}, expected {expected}")
        for turn in range(1, len(talk), 2):
            prompt = tokenizer.chat(talk[:turn])
            expect(ids[:len(prompt)] == prompt, "the ids of a prompt are not those that the sampler gets")


# ---- 5: records -------------------------------------------------------------------------------------------

def check_records(mine) -> None:
    def reply(text: str, tokens: int, finish: str = "stop") -> Reply:
        return Reply(text, ids=[0] * tokens, finish=finish)

    good = [reply("12 / 4 = 3.\nThe answer is \\boxed{3}.", 30), reply("It is \\boxed{3.0}.", 12),
            reply("3 + 3 + 3 + 3 = 12, so \\boxed{3}.", 20)]
    again = reply("It is\n  \\boxed{3.0}. ", 13)
    bad = {"a wrong answer": reply("\\boxed{4}", 5), "a right answer without a box": reply("It is 3.", 6),
           "a reply that was cut at its limit": reply("\\boxed{3}, but let me", 7, "length"),
           "a reply that failed": Reply("", finish="error", error="the server is gone")}
    for name, one in bad.items():
        expect(not mine.kept("3", [one], 5), f"{name} was kept")
    found = mine.kept("3", [good[0], *bad.values(), again, good[1], good[2]], 5)
    texts = [" ".join(one.text.split()) for one in found]
    expect(len(set(texts)) == len(texts), "two kept replies have the same words")
    expect(len(found) == 3, f"{len(found)} of 3 good replies were kept")
    lengths = [one.tokens_out for one in found]
    expect(lengths == sorted(lengths), f"the lengths come as {lengths}, expected the shortest first")
    expect(lengths[0] == 12, "of two replies with the same words the longer one was kept")
    few = mine.kept("3", good, 2)
    expect([one.tokens_out for one in few] == [12, 20], "with at_most=2 it does not keep the two shortest")


# ---- 6: merging -------------------------------------------------------------------------------------------

def check_merge(mine) -> None:
    torch.manual_seed(0)
    model = Qwen2(Config(vocab=40, hidden=16, intermediate=24, layers=1, heads=2, kv_heads=1, head_size=8))
    lora.add(model, r=4, alpha=12)
    layer = next(iter(lora.layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"])
    A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    before = layer.weight.detach().clone()
    merged = mine.merge(before, A, B, 12)
    expect(merged is not before and torch.equal(before, layer.weight), "the old weight has changed")
    expect(merged.shape == before.shape, f"its shape is {[*merged.shape]}, expected {[*before.shape]}")
    x = torch.randn(5, 16)
    with torch.no_grad():
        apart, together = layer(x), F.linear(x, merged, layer.bias)
    expect(near(together, apart), f"outputs differ from those of the layer with its adapter by "
                                  f"{(together - apart).abs().max():.3g}")
    weight, A, B = torch.randn(64, 64).bfloat16(), torch.randn(8, 64), torch.randn(64, 8) / 16
    merged, exact = mine.merge(weight, A, B, 8), weight.double() + B.double() @ A.double()
    expect(merged.dtype == weight.dtype, f"a bfloat16 weight became {merged.dtype}")
    off = (merged != exact.bfloat16()).double().mean()
    expect(off < 0.01, f"in bfloat16 {off:.0%} of the numbers are not the sum rounded once")


# ---- 7: an interval ---------------------------------------------------------------------------------------

def check_interval(mine) -> None:
    toss = random.Random(0)
    a = [round(toss.random() * 8) / 8 for _ in range(300)]
    b = [min(1.0, x + 0.25) if toss.random() < 0.2 else x - x * (toss.random() < 0.05) for x in a]
    same = mine.interval(a, a, 200, 0)
    expect(near(same, (0, 0)), f"a model compared with itself gives [{shown(same)}], expected 0, 0")
    once, again, other = (mine.interval(a, b, 200, seed) for seed in (1, 1, 2))
    expect(near(once, again), "the same seed gives other numbers")
    expect(not near(once, other, 0), "another seed gives the same numbers")
    found = mine.interval(a, b, 4000, 0)
    gains = torch.tensor(b).double() - torch.tensor(a).double()
    half = 1.96 * gains.std() / math.sqrt(len(a))  # of a normal distribution: near enough with 300 problems
    expected = gains.mean() - half, gains.mean() + half
    expect(near(found, expected, 0.1 * half), f"it is [{shown(found)}], expected about [{shown(expected)}]")


# ---- 8: Dr. GRPO ------------------------------------------------------------------------------------------

def check_dr_grpo(mine) -> None:
    for rewards, lengths in (([1., -1., -1., 1.], [20, 50, 200, 100]), ([1., -1.], [7, 7]),
                             ([0.5, -1., -0.5, 1., 0.], [3, 9, 1, 30, 8]), ([-1., -1., -1.], [4, 5, 6])):
        r, n = torch.tensor(rewards), torch.tensor(lengths)
        for name, found, advantage, how in (
                ("grpo", mine.grpo(r, n), losses.over_std(r), "sequence"),
                ("dr_grpo", mine.dr_grpo(r, n, 256), losses.minus_mean(r), "constant")):
            weights, divisor = losses.token_weights(n, how, 256)
            expected = advantage * weights / divisor
            expect(near(found, expected), f"{name} of the rewards {shown(r)} and lengths {shown(n)} is "
                                                f"{shown(found)}; losses.py gives {shown(expected)}")


# ---- 9: estimators of the KL ------------------------------------------------------------------------------

def check_kl(mine) -> None:
    torch.manual_seed(0)
    k1, k2 = (lambda logp, ref: logp - ref), (lambda logp, ref: (logp - ref) ** 2 / 2)
    for size in (2, 7, 40):
        logits = (2 * torch.randn(size)).double().requires_grad_()
        ref, policy = (2 * torch.randn(size)).double().log_softmax(-1), logits.log_softmax(-1)
        p, q = policy.exp(), ref.exp()
        forward, backward = (p * (policy - ref)).sum(), (q * (ref - policy)).sum()
        expect(bool((mine.k3(policy, ref) >= -1e-12).all()), "k3 is negative for some token")
        expect(near(mine.k3(ref, ref), torch.zeros(size)), "k3 is not 0 where policy and reference agree")
        for name, estimator in (("k1", k1), ("k3", mine.k3)):
            found = mine.expected(estimator, policy, ref)
            expect(near(found, forward), f"the mean of {name} is {shown(found)}, KL(policy || reference) is "
                                         f"{shown(forward)}")
        of_forward, = torch.autograd.grad(forward, logits, retain_graph=True)
        of_backward, = torch.autograd.grad(backward, logits, retain_graph=True)
        for name, estimator, expected, words in (
                ("k1", k1, torch.zeros(size), "expected zeros: k1 as a loss pulls nowhere"),
                ("k2", k2, of_forward, "expected the gradient of KL(policy || reference)"),
                ("k3", mine.k3, of_backward, "expected the gradient of KL(reference || policy)")):
            found = mine.pull(estimator, logits.detach().clone().requires_grad_(), ref)
            expect(near(found, expected), f"the pull of {name} is {shown(found[:3])}, ...; {words}, "
                                          f"{shown(expected[:3])}, ...")


# ---- 10: a broken mask ------------------------------------------------------------------------------------

def sees_all(q, k, v):
    """causal of attention.py with is_causal=False."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])[0].transpose(0, 1)


def sees_neighbours(self, layer, q, k, v):
    """Packed.__call__ that takes the whole pack for one sequence."""
    return attention.causal(q, k, v)


def check_break(mine) -> None:
    tests = {"ONLY_THE_FIRST": mine.ONLY_THE_FIRST, "ONLY_THE_SECOND": mine.ONLY_THE_SECOND}
    tests = {name: test.partition("[")[0] for name, test in tests.items()}
    if not any(tests.values()):
        raise NotImplementedError
    for name, test in tests.items():
        expect(re.fullmatch(r"tests/\w+\.py::test_\w+", test) is not None,
               f'{name} is "{test}", expected something like "tests/test_model.py::test_config_round_trip"')
    failed = failures(tests.values(), contextlib.nullcontext())
    expect(not failed, f"without a break this fails: {', '.join(failed)}; is slm/attention.py as it was?")
    for words, function, break_, own in (
            ("first", "causal", sees_all, "ONLY_THE_FIRST"),
            ("second", "Packed.__call__", sees_neighbours, "ONLY_THE_SECOND")):
        failed = failures(tests.values(), mock.patch(f"slm.attention.{function}", break_))
        for name, test in tests.items():
            expect((test in failed) == (name == own), f"{name}: with the {words} break this test "
                                                      f"{'fails' if test in failed else 'passes'}")


class Failures(set):
    """The names of tests that failed, without their parameters: a plugin of pytest."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.add(report.nodeid.partition("[")[0])


def failures(tests, broken) -> Failures:
    """Which of these tests fail while something is broken in this process."""
    try:
        import pytest  # the only exercise that needs it
    except ImportError:
        raise NotYet("this one needs pytest: pip install -r requirements-dev.txt") from None
    words = [*(str(FOLDER.parent / test) for test in dict.fromkeys(tests)), "--capture=no",
             "-p", "no:cacheprovider", "-p", "no:unraisableexception"]  # the last one collects garbage
    failed, said = Failures(), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), broken:
        code = pytest.main(words, [failed])
    missing = re.findall(r"not found: \S*?(tests/\S+)", said.getvalue())
    expect(code < 2, f"there is no test {' and no test '.join(missing)}")
    return failed


# ---- 11: programs -----------------------------------------------------------------------------------------

class Spied(Sandbox):
    """A sandbox that keeps what it was given to run."""
    codes = ""

    def submit(self, code, timeout: float = 5.0) -> int:
        self.codes += "\n".join([code] if isinstance(code, str) else code)
        return super().submit(code, min(timeout, 2.0))


RIGHT = "def f(n):\n    return n * n + 918000\n"
PROGRAMS = [  # what it is, the program, the share of f(1), f(2), f(3), f(4) that is right
    ("a right program", RIGHT, 1),
    ("a program that is right for even numbers", RIGHT.replace("return", "return n % 2 or"), 0.5),
    ("a program that fails for 3", RIGHT.replace("return", "assert n != 3\n    return"), 0.75),
    ("a right program that prints, too", RIGHT.replace("return", "print('now', 17)\n    return"), 1),
    ("a program that prints that all is right, and leaves", "print('all right')\nraise SystemExit(0)\n", 0),
    ("a program whose answer says that it equals everything",
     "class All:\n    __eq__ = lambda self, other: True\ndef f(n):\n    return All()\n", 0),
    ("no Python at all", "def f(n) return", 0),
    ("a program that never ends for 2", RIGHT.replace("return", "while n == 2: pass\n    return"), 0.75)]


@functools.cache
def spied() -> Spied:
    return Spied()


def check_programs(mine) -> None:
    calls = [(f"f({n})", n * n + 918000) for n in (1, 2, 3, 4)]
    sandbox = spied()
    for name, code, expected in PROGRAMS:
        sandbox.codes = ""
        found = mine.share_right(code, calls, sandbox)
        expect(found == expected, f"{name}: the share is {found}, expected {expected}")
        leaked = [value for _, value in calls if str(value) in sandbox.codes]
        expect(not leaked, "the right values were in the sandbox, so a program can find and print them")


# ---- 12: a cache ------------------------------------------------------------------------------------------

@contextlib.contextmanager
def watched(model):
    """How many tokens the model gets at each call in the block, as a list that grows."""
    seen = []


    def note(_, given, by_name):
        seen.append(len(given[0] if given else by_name["ids"]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def check_cache(mine) -> None:
    model, tokenizer = checkpoint.load("tiny")
    texts = "Tom has 3 apples. He buys 4 more. How many?", "Hello"
    prompts = [tokenizer.chat([user(text)]) for text in texts]
    sampler = Sampler(model, tokenizer)
    for ids, most in ((prompts[0], 60), (prompts[1], 1), (prompts[1], 40)):
        [[reply]] = sampler.generate([Request(ids=ids, sampling=Sampling(most))], progress=False)
        with torch.no_grad(), watched(model) as seen:
            found = [int(x) for x in mine.greedy(model, list(ids), tokenizer.stop_ids, most)]
        same = [x == y for x, y in zip(found, reply.ids)]
        agree = [*same, False].index(False)
        expect(found == reply.ids, f"the sampler writes {len(reply.ids)} tokens, you {len(found)}; the first "
                                   f"{agree} agree")
        expect(seen[0] == len(ids), f"the model first saw {seen[0]} tokens, the prompt has {len(ids)}")
        expect(set(seen[1:]) <= {1}, f"after the prompt the model saw {max(seen[1:] or [0])} tokens at once")


EXERCISES = (
    Exercise("e01_reward.py", ("reward",), check_reward),
    Exercise("e02_workflow.py", ("third_if_needed",), check_workflow),
    Exercise("e03_loss.py", ("mean_loss",), check_loss),
    Exercise("e04_mask.py", ("encode",), check_mask),
    Exercise("e05_records.py", ("kept",), check_records),
    Exercise("e06_merge.py", ("merge",), check_merge),
    Exercise("e07_interval.py", ("interval",), check_interval),
    Exercise("e08_dr_grpo.py", ("grpo", "dr_grpo"), check_dr_grpo),
    Exercise("e09_kl.py", ("k3", "expected", "pull"), check_kl),
    Exercise("e10_break.py", ("ONLY_THE_FIRST", "ONLY_THE_SECOND"), check_break),
    Exercise("e11_programs.py", ("share_right",), check_programs),
    Exercise("e12_cache.py", ("greedy",), check_cache),
)
