"""Credit for roles, turns and steps: by hand, by brute force, and through a run with an adapter a role."""

import contextlib
import itertools
import json
import random
import statistics
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scripted import Backend

import train_grpo
from slm import BadInput, checkpoint, credit, lora, losses, workflows
from slm.backends import open_backend
from slm.episode import (
    Ask,
    CodeRun,
    Episode,
    Reply,
    Request,
    Run,
    Sampling,
    TokenRecord,
    Turn,
    jobs_for,
    run_episodes,
    user,
)
from slm.problems import Problem
from slm.prompts import CHECKER, CRITIC, RETRY, SOLVER, SUMMARY, VERIFIER
from slm.rewards import Rules, reward_of
from slm.runs import rundir, steps
from slm.sandbox import Outcome
from slm.search import cut, token_counts
from train_grpo import ALGORITHMS

TWELVE = Problem("p", "7 + 5?", "12", "test")


@pytest.fixture(autouse=True)
def no_pictures_and_no_programs(monkeypatch):
    """They take seconds each."""
    monkeypatch.setattr(train_grpo, "write_report", lambda out: out / "report.html")
    monkeypatch.setattr(train_grpo, "Sandbox", lambda: contextlib.nullcontext(Prints("12")))


def turn(role, rewards, prompt, tokens, counts=()):
    return Turn(role, [], Reply("", [3] * tokens, [-1.0] * tokens, prompt_ids=list(prompt)),
                rewards=list(map(float, rewards)), steps=list(counts))


def credited(episodes, how, algorithm="dr_grpo", roles=None, max_tokens=10):
    """({(group, sample, place of a turn): (advantage, weight) of its tokens}, divisor)."""
    args = SimpleNamespace(roles=roles, credit=how, max_tokens=max_tokens)
    records, divisor = credit.give_credit(episodes, ALGORITHMS[algorithm], {"sum": 0.0, "steps": 0.0}, args)
    found = {}
    for episode, own in zip(episodes, records):
        for record in own:
            assert len(record.advantage) == len(record.weight) == sum(record.mask)
            at = 0
            for place in record.turns:
                n = len(episode.turns[place].reply.ids)
                found[episode.group, episode.sample, place] = (record.advantage[at:at + n],
                                                               record.weight[at:at + n])
                at += n
    return found, divisor


# ---- by hand ---------------------------------------------------------------------------------------------

def team_of_two():
    """Solver and verifier twice on one problem; in the second episode the solver tries again."""
    return [Episode("p", sample=0, reward=1.0, turns=[
                turn("solver", [1], [1], 2), turn("verifier", [1], [5], 3)]),
            Episode("p", sample=1, reward=-1.0, turns=[
                turn("solver", [-1], [1], 4), turn("verifier", [-1], [5], 1), turn("solver", [0], [7], 2)])]


def test_an_episode_gives_all_its_turns_one_advantage():
    found, divisor = credited(team_of_two(), "episode", "grpo")
    assert divisor == 2
    for (_, sample, _), (advantage, weight) in found.items():
        assert advantage == pytest.approx([(1 - 2 * sample) / 2 ** 0.5] * len(advantage))
        assert weight == pytest.approx([1 / (5 if sample == 0 else 7)] * len(weight))


def test_a_turn_is_compared_with_those_of_its_role():
    """Dr. MAS: the solver's three turns earned 1, -1, 0 (mean 0), the verifier's two 1 and -1 (mean 0)."""
    found, divisor = credited(team_of_two(), "role")
    means = {key: advantage[0] for key, (advantage, _) in found.items()}
    assert means == {(0, 0, 0): 1, (0, 1, 0): -1, (0, 1, 2): 0, (0, 0, 1): 1, (0, 1, 1): -1} and divisor == 5
    other = team_of_two()
    other[0].turns[1].rewards = [4.0]  # of the verifier: this moves no solver
    moved, _ = credited(other, "role")
    assert all(moved[key] == found[key] for key in ((0, 0, 0), (0, 1, 0), (0, 1, 2)))
    assert moved[0, 0, 1][0] == [2.5] * 3 and moved[0, 1, 1][0] == [-2.5]
    weights, _ = credited(team_of_two(), "role", "grpo")  # a turn is the sequence of equation 3
    assert weights[0, 1, 0][1] == [1 / 4] * 4 and weights[0, 1, 2][1] == [1 / 2] * 2


def test_a_turn_is_compared_with_those_that_start_from_the_same_prompt():
    """AT-GRPO: the solver's second try stands alone. The verifiers were asked the same."""
    found, _ = credited(team_of_two(), "turn", "grpo")
    half = 1 / 2 ** 0.5
    assert {key: advantage[0] for key, (advantage, _) in found.items()} == pytest.approx(
        {(0, 0, 0): half, (0, 1, 0): -half, (0, 1, 2): 0, (0, 0, 1): half, (0, 1, 1): -half})
    other = team_of_two()
    other[1].turns[1].reply.prompt_ids = [6]
    alone, _ = credited(other, "turn", "grpo")
    assert alone[0, 0, 1][0] == [0] * 3 and alone[0, 1, 1][0] == [0] and alone[0, 0, 0] == found[0, 0, 0]


def test_a_tokens_advantage_is_the_sum_over_its_step_and_the_later_ones():
    """DeepSeekMath 4.1.3. The rewards 1, 0 and 1, 1, 1 have mean 0.8 and standard deviation 0.4472."""
    episodes = [Episode("p", sample=0, reward=0.5, turns=[turn("solver", [1, 0], [1], 5, [2, 3])]),
                Episode("p", sample=1, reward=1.0, turns=[turn("solver", [1, 1, 1], [1], 4, [1, 2, 1])])]
    found, divisor = credited(episodes, "step", "grpo")
    up, down = 0.2 / 0.2 ** 0.5, -0.8 / 0.2 ** 0.5
    assert found[0, 0, 0][0] == pytest.approx([up + down] * 2 + [down] * 3)
    assert found[0, 1, 0][0] == pytest.approx([3 * up, 2 * up, 2 * up, up])
    assert divisor == 2 and found[0, 1, 0][1] == [1 / 4] * 4


def test_one_step_a_turn_is_outcome_supervision():
    """With one answer an episode all kinds of credit agree."""
    def episodes():
        return [Episode("p", sample=i, reward=r, turns=[turn("solver", [r], [1], i + 1)])
                for i, r in enumerate((1.0, -1.0, -0.5))]
    assert credited(episodes(), "episode", "grpo") == credited(episodes(), "role", "grpo") == credited(
        episodes(), "turn", "grpo") == credited(episodes(), "step", "grpo")


def test_only_trained_roles_are_compared_and_weighed():
    found, divisor = credited(team_of_two(), "role", roles=["verifier"])
    assert {place for *_, place in found} == {1} and divisor == 2


# ---- by brute force --------------------------------------------------------------------------------------

BASELINES = {"dr_grpo": lambda x, own: x - statistics.fmean(own),
             "grpo": lambda x, own: (x - statistics.fmean(own)) / (statistics.stdev(own) if own[1:] else 1),
             "rloo": lambda x, own: (x - statistics.fmean(own)) * len(own) / max(1, len(own) - 1)}


@pytest.mark.parametrize("how, algorithm", list(itertools.product(("role", "turn", "step"), BASELINES)))
def test_credit_is_what_a_plain_loop_finds(how, algorithm):
    draw = random.Random(f"{how}{algorithm}")
    episodes = []
    for group, sample in itertools.product(range(3), range(4)):
        turns = []
        for _ in range(draw.randint(1, 4)):
            counts = [draw.randint(0, 3) for _ in range(draw.randint(1, 3) if how == "step" else 1)]
            counts[-1] += 1
            turns.append(turn(draw.choice(["solver", "checker"]), [draw.uniform(-1, 1) for _ in counts],
                              [100 + draw.randint(0, 1), 7], sum(counts), counts if how == "step" else ()))
        episodes.append(Episode(str(group), group=group, sample=sample, turns=turns,
                                reward=None if draw.random() < 0.1 else 0.0))
    found, _ = credited(episodes, how, algorithm)
    compared = defaultdict(list)
    for e in episodes:
        for t in e.turns if e.reward is not None else ():
            compared[e.group, t.role, t.reply.prompt_ids[0] if how == "turn" else 0] += t.rewards
    expected = {}
    for e in episodes:
        for place, t in enumerate(e.turns if e.reward is not None else ()):
            group = compared[e.group, t.role, t.reply.prompt_ids[0] if how == "turn" else 0]
            values = [BASELINES[algorithm](x, group) for x in t.rewards]
            per_token = []
            for n, tokens in enumerate(t.steps or [len(t.reply.ids)]):
                per_token += [sum(values[n:])] * tokens
            expected[e.group, e.sample, place] = per_token
    assert found.keys() == expected.keys()
    assert all(found[key][0] == pytest.approx(expected[key], abs=1e-5) for key in found)


def test_the_gradient_is_each_tokens_own_advantage_times_its_log_prob(random_model):
    model = random_model()
    lora.add(model, 4, 8, ["q_proj", "v_proj"])
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.normal_(std=0.2)
    ids, mask, advantages = [5, 6, 7, 8, 9], [0, 0, 1, 1, 1], [2.0, -1.0, 0.5]
    logp, _ = losses.score(model, [ids], [mask], 0.8)
    expected = torch.autograd.grad(-(torch.tensor(advantages) * logp).sum() * 0.25, lora.parameters(model))
    args = SimpleNamespace(temperature=0.8, kl=0.0, kl_kind="k3", importance_cap=0.0, dppo_mask=0.0)
    for name in ("grpo", "report", "cispo"):
        record = TokenRecord(ids, mask, [0.0, 0.0, *logp.tolist()], advantages, [0.25] * 3, role="solver")
        total, *_ = train_grpo.micro_batch_loss(model, [record], ALGORITHMS[name], args)
        found = torch.autograd.grad(total, lora.parameters(model))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected)), name


# ---- what a turn is worth --------------------------------------------------------------------------------

def said(role, prompt, text, outcome=None, number=0):
    return Turn(role, [user(prompt)], Reply(text, [3]), number), outcome


def paid(part, *told, response="\\boxed{12}"):
    turns = [t for t, _ in told]
    runs = [CodeRun(i, "", outcome) for i, (_, outcome) in enumerate(told) if outcome]
    e = Episode("p", turns=turns, runs=runs, response=response)
    reward_of(e, TWELVE, Rules({part: 1.0}, no_box=-0.5))
    assert e.parts[part] == pytest.approx(statistics.fmean(r for t in turns for r in t.rewards))
    return [r for t in turns for r in t.rewards]


ASKED = {"question": TWELVE.question}


@pytest.mark.parametrize("told, worth", [
    (said("solver", SOLVER(**ASKED), "\\boxed{12}"), 1), (said("solver", SOLVER(**ASKED), "\\boxed{13}"), -1),
    (said("solver", RETRY(**ASKED, feedback="No."), "It is 12."), -0.5),
    (said("solver", SOLVER(**ASKED), "\\boxed{13}", Outcome("12")), 1),  # the output of its code counts first
    (said("solver", SOLVER(**ASKED), "\\boxed{12}", Outcome(error="NameError: x")), 1),
    (said("checker", SOLVER(**ASKED), "\\boxed{12}"), 1),  # it was asked to solve
    (said("checker", CHECKER(**ASKED, solution="So \\boxed{12}"), "CORRECT"), 1),
    (said("checker", CHECKER(**ASKED, solution="So \\boxed{12}"), "INCORRECT"), -1),
    (said("checker", CHECKER(**ASKED, solution="So \\boxed{13}"), "INCORRECT"), 1),
    (said("checker", CHECKER(**ASKED, solution="So \\boxed{13}"), "CORRECT"), -1),
    (said("checker", CHECKER(**ASKED, solution="So \\boxed{13}"), "Hm."), -1),  # silence is no verdict
    (said("anyone", CRITIC(**ASKED, solution="1\nFinal answer: 12"), "Fine. VERDICT: CORRECT"), 1),
    (said("verifier", VERIFIER(**ASKED, answer="24/2"), "code", Outcome("VERIFIED")), 1),
    (said("verifier", VERIFIER(**ASKED, answer="12"), "code", Outcome("FAILED")), -1),
    (said("verifier", VERIFIER(**ASKED, answer="13"), "code", Outcome("12\nFAILED")), 1),
    (said("verifier", VERIFIER(**ASKED, answer="13"), "code", Outcome("12")), 1),
    (said("verifier", VERIFIER(**ASKED, answer="13"), "no code"), -1),
    (said("verifier", VERIFIER(**ASKED, answer="13"), "code", Outcome(error="NameError: x")), -1)])
def test_a_turn_is_worth_what_it_says(told, worth):
    assert paid("own", told) == [worth]


@pytest.mark.parametrize("response, worth", [("\\boxed{12}", 1), ("\\boxed{1}", -1)])
def test_a_summary_is_worth_what_its_episode_is(response, worth):
    told = said("summarizer", SUMMARY(**ASKED, solution="..."), "In short: 13.")
    assert paid("own", told, response=response) == [worth]


def test_a_prompt_reads_its_own_fields_back():
    for fields in ({"question": "a\nb?", "solution": "x $y$ \\frac{1}{2}\nIs this solution right? $z"},
                   {"question": "", "solution": ""}):
        assert CHECKER.fields(CHECKER(**fields)) == fields
        assert CRITIC.fields(CHECKER(**fields)) == VERIFIER.fields(CHECKER(**fields)) == {}


def test_a_verdict_is_read_alike_by_workflow_and_reward():
    """The answer 12 that the verifier rejects, and the 13 that it confirms, are both held against it."""
    for answer, printed, worth, stands in (("12", "FAILED", -1, False), ("13", "VERIFIED", -1, True),
                                           ("12", "VERIFIED", 1, True), ("13", "FAILED", 1, False)):
        e, = run_episodes(jobs_for([TWELVE], workflows.solver_verifier), Backend(partial(verifies, answer)),
                          Prints(printed))
        reward_of(e, TWELVE, Rules({"own": 1.0}))
        assert e.turns[1].role == "verifier" and e.turns[1].rewards == [worth] and e.answer == answer
        assert (len(e.turns) == 2) == stands


def verifies(answer, text, *_):
    return "```python\nprint(1)\n```" if "Proposed answer" in text else f"\\boxed{{{answer}}}"


class Prints:
    """A sandbox in which every program prints the same."""

    def __init__(self, text):
        self.text, self.waiting = text, []

    def submit(self, code, timeout):
        self.waiting.append((len(self.waiting) + 1, Outcome(self.text)))
        return len(self.waiting)

    def poll(self, wait):
        done, self.waiting = self.waiting, []
        return done


def test_the_default_reward_pays_every_turn_what_the_episode_earned():
    right, wrong = said("solver", SOLVER(**ASKED), "\\boxed{12}"), said("solver", SOLVER(**ASKED), "no")
    assert paid("correct", wrong, right, wrong) == [1, 1, 1]
    assert paid("correct", wrong, right, response="") == [-0.5, -0.5]


# ---- MAPoRL ----------------------------------------------------------------------------------------------

def judged_turns(*told):
    """(role, round, right) -> turns of solvers that say 12 or 13."""
    return [said(role, SOLVER(**ASKED), "\\boxed{12}" if right else "\\boxed{13}", number=number)
            for role, number, right in told]


def test_a_team_is_paid_for_what_follows():
    """Rounds 0, 1 and 3 (round 2 ran code), two agents in round 1: s = 1 | -1, 1 | -1."""
    told = judged_turns(("a", 0, True), ("a", 1, False), ("b", 1, True), ("a", 3, False))
    whole = 1 + 0.3 + 0.09
    assert paid("team", *told) == pytest.approx(
        [(1 + 0.3 * 0 - 0.09) / whole, (-1 - 0.3) / 1.3, (1 - 0.3) / 1.3, -1])


@pytest.mark.parametrize("told, bonus", [
    ([("a", 0, False), ("b", 1, True), ("a", 2, True)], [0, 1, 1]),  # a corrects itself: b has persuaded it
    ([("a", 0, True), ("b", 1, False), ("a", 2, False)], [0, -1, -1]),  # b has misled it
    ([("a", 0, True), ("b", 1, False), ("a", 2, True)], [0, 0, 0]),
    ([("a", 0, False), ("b", 0, True), ("c", 0, True), ("a", 1, True), ("b", 1, True), ("c", 1, False)],
     [0, 0, 0, 1, 0, -1]),
    ([("a", 0, False), ("b", 0, False), ("c", 1, True), ("a", 2, True), ("b", 2, True)], [0, 0, 1, 1, 1]),
    ([("a", 0, False), ("b", 0, False), ("c", 1, True), ("a", 2, True), ("b", 2, False)], [0, 0, 0, 1, 0]),
    ([("a", 0, True)], [0])])
def test_corrections_and_good_influence_are_paid_and_the_opposite_is_fined(told, bonus):
    """The third row: of the others, one of two is no majority, so nobody changed it."""
    assert paid("bonus", *judged_turns(*told)) == bonus


# ---- steps -----------------------------------------------------------------------------------------------

def test_steps_are_counted_in_the_tokens_that_wrote_them(tiny):
    _, tokenizer = tiny
    text = "First, 7 + 5 = 12.\nThen 12 - 2 = 11.\n```python\nprint(1)\n```\n\u00e9\u4e2d\nSo \\boxed{12}."
    ids = tokenizer.encode(text)
    stop = sorted(tokenizer.stop_ids)[0]
    for rule in ("line", "paragraph", "sentence"):
        counts = token_counts(Reply(text, [*ids, stop]), rule, tokenizer)
        assert sum(counts) == len(ids) + 1 and len(counts) == len(cut(text, rule))
        at = 0
        for step, count in list(zip(cut(text, rule), counts))[:-1]:
            at += count
            head = text[:text.index(step) + len(step)]
            assert tokenizer.decode(ids[:at]).startswith(head)                 # the step is written ...
            assert len(tokenizer.decode(ids[:at - 1])) < len(head) or count == 0  # ... with its last token
    assert token_counts(Reply("", [stop]), "line", tokenizer) == [1]


def marked(tiny, text, part, verifier=None, more=None):
    _, tokenizer = tiny
    e = Episode("p", sample=3, response=text, turns=[
        Turn("solver", [user(SOLVER(**ASKED))], Reply(text, tokenizer.encode(text)))])
    credit.mark_steps([e], [TWELVE], tokenizer, verifier, SimpleNamespace(step_rule="line", roles=None))
    reward, _ = reward_of(e, TWELVE, Rules({part: 2.0} | (more or {}), seed=1, step=7))
    return e.turns[0], reward


STEPS = "7 + 5 = 12.\nSo it is that.\n12 - 2 = 11 and 1 + 1 = 2.\n\\boxed{12}"


def test_each_step_is_paid_for_its_own_equations(tiny):
    t, reward = marked(tiny, STEPS, "steps", more={"correct": 1.0})
    assert t.rewards == [2, 2, 0, 2 + 1]  # the answer pays the last one
    assert reward == pytest.approx(2 * 2 / 3 + 1) and len(t.steps) == 4


def test_a_verifier_pays_each_step_what_it_thinks_of_the_solution_so_far(tiny):
    backend = Backend(None)
    t, reward = marked(tiny, STEPS, "judge", backend)
    asked = [request.messages[-1]["content"] for request in backend.requests]
    assert ["Solution so far: 7 + 5 = 12.\nIs the last" in asked[0], STEPS in asked[3]] == [True, True]
    scores = [backend.answer(request, 0).scores for request in backend.requests]
    expected = [1 / (1 + torch.tensor(s["INCORRECT"] - s["CORRECT"]).exp().item()) for s in scores]
    assert t.rewards == pytest.approx([2 * p for p in expected]) and len(set(expected)) == 4
    assert reward == pytest.approx(2 * statistics.fmean(expected))


def test_the_control_of_a_verifier_tosses_a_coin_for_each_step(tiny):
    t, _ = marked(tiny, "a b c\n" * 40, "random")
    again, _ = marked(tiny, "d e f\n" * 40, "random")  # whatever was written
    assert t.rewards == again.rewards and 10 < sum(t.rewards) / 2 < 30


# ---- one adapter a role ----------------------------------------------------------------------------------

def test_each_record_trains_its_roles_adapter_only(random_model):
    """Both roles in one micro-batch against each alone; the one that did not speak has the gradient 0."""
    model = random_model()
    for name in ("solver", "verifier"):
        lora.add(model, 4, 8, ["q_proj", "v_proj"], name=name)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ("solver", "verifier"):
            for p in lora.parameters(model, name):
                p.normal_(std=0.2)
    args = SimpleNamespace(temperature=0.8, kl=0.1, kl_kind="k3", importance_cap=0.0, dppo_mask=0.0)

    def record(role):
        ids = [5, 6, 7, 8] if role == "solver" else [9, 4, 3]
        n = len(ids) - 1
        return TokenRecord(ids, [0] + [1] * n, [0.0] + [-3.0] * n, [1.0] * n, [0.5] * n, role=role)

    def gradients(*roles):
        with lora.off(model):
            total, *_ = train_grpo.micro_batch_loss(model, list(map(record, roles)), ALGORITHMS["grpo"], args)
        total.backward()
        found = {name: torch.cat([p.grad.flatten() for p in lora.parameters(model, name)])
                 for name in ("solver", "verifier")}
        model.zero_grad()
        return found

    both, solver, verifier = gradients("solver", "verifier"), gradients("solver"), gradients("verifier")
    assert not solver["verifier"].any() and not verifier["solver"].any()
    for name, alone in (("solver", solver), ("verifier", verifier)):
        assert torch.allclose(both[name], alone[name], atol=1e-5) and alone[name].abs().max() > 1e-3
    with lora.use(model, "solver"):
        expected, _ = losses.score(model, [[5, 6, 7, 8]], [[0, 1, 1, 1]], 0.8)
    with lora.off(model):
        assert torch.allclose(train_grpo.score(model, [record("solver")], args)[0], expected, atol=1e-6)


def pair(question):
    """Both roles speak, whatever the model can do."""
    reply = yield Ask("solver", [user(SOLVER(question=question))])
    yield Ask("verifier", [user(VERIFIER(question=question, answer="1"))])
    yield Ask("checker", [user(CHECKER(question=question, solution=reply.text))])
    yield Run("print(1)")
    return reply


def run(model, out, *options):
    words = ["--model", model, "--data", "tiny", "--limit", "40", "--out", str(out), "--batch", "2",
             "--samples", "4", "--steps", "2", "--max-tokens", "9", "--lr", "0.02", "--device", "cpu",
             "--evaluate", "0", *options]
    file = out.parent / "odd.py"  # so that samples differ in reward, and there is a gradient
    file.write_text("def odd(episode, problem):\n    ids = [i for t in episode.turns for i in t.reply.ids]\n"
                    "    return sum(i % 2 for i in ids) / len(ids)\n")
    words[words.index("--reward") + 1] += f",{file}:odd"
    train_grpo.main(train_grpo.options().parse_args(words))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


TEAM = ("--workflow", "solver_verifier", "--roles", "solver,verifier", "--adapters", "role", "--credit",
        "role", "--reward", "own")


def test_a_team_learns_an_adapter_a_role_and_the_scripts_load_them(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(workflows.WORKFLOWS, "solver_verifier", pair)
    rows = run(small, tmp_path / "run", *TEAM)
    assert all(row["grad_norm"] > 0 and row["dlogp_max"] < 1e-4 for row in rows)  # sampled as it is trained
    for name in ("reward/solver", "reward/verifier", "solved/solver", "solved/verifier", "solved/checker"):
        assert name in rows[0]
    told = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    first = [t for e in told for t in e["turns"] if e["step"] == 1 and t["role"] == "verifier"]
    assert rows[0]["reward/verifier"] == pytest.approx(statistics.fmean(t["rewards"][0] for t in first))
    assert rows[0]["solved/verifier"] == statistics.fmean(t["worth"] > 0 for t in first)
    files = [tmp_path / "run" / "adapter" / role for role in ("solver", "verifier")]
    weights = [load_file(file / "adapter_model.safetensors") for file in files]
    assert all(any(x.any() for k, x in w.items() if "lora_B" in k) for w in weights)  # both have learned
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    said = capsys.readouterr().out
    command = f"--adapter solver={files[0]} --adapter verifier={files[1]}"
    assert f"eval.py --model {small} --workflow solver_verifier {command}" in said and "each of" in said
    options = SimpleNamespace(model=small, device="cpu", dtype="float32", endpoint=None, workflow="",
                              adapter=[f"solver={files[0]}", f"verifier={files[1]}"])
    sampler, names = open_backend(options)
    assert names == {"solver": "solver", "verifier": "verifier"}
    for (reply,), w in zip(sampler.generate([Request([user("7 + 5?")], Sampling(4), role) for role in names]),
                           weights):
        model, _ = checkpoint.load(small)
        lora.add(model, 16, 32, ["q_proj", "k_proj", "v_proj", "o_proj"])
        with torch.no_grad():
            for path, layer in lora.layers(model).items():
                layer.lora_A["default"].copy_(w[f"base_model.model.{path}.lora_A.weight"])
                layer.lora_B["default"].copy_(w[f"base_model.model.{path}.lora_B.weight"])
            logp, _ = losses.score(model, [reply.prompt_ids + reply.ids],
                                   [[0] * len(reply.prompt_ids) + [1] * len(reply.ids)])
        assert reply.logprobs == pytest.approx(logp.tolist(), abs=1e-3)


STEP = ("--credit", "step", "--reward")


@pytest.mark.parametrize("how", [TEAM, (*STEP, "correct,steps"), (*STEP, "judge", "--judge", "tiny")],
                         ids=["team", "steps", "judge"])
def test_two_steps_on_the_built_in_model_resume_to_the_same_bits(tmp_path, monkeypatch, how):
    options = (*how, "--max-tokens", "24", "--batch", "1", "--samples", "2")
    run("tiny", tmp_path / "whole", *options)
    log = rundir.RunDir.log

    def dies(self, name, *rows):
        if rows[0]["step"] == 2:
            raise KeyboardInterrupt
        log(self, name, *rows)

    monkeypatch.setattr(rundir.RunDir, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        run("tiny", tmp_path / "cut", "--save-every", "1", *options)
    monkeypatch.setattr(rundir.RunDir, "log", log)
    run("tiny", tmp_path / "cut", "--save-every", "1", "--resume", *options)
    a, b = (torch.load(tmp_path / n / "checkpoints" / "step-000002" / "rank0.pt") for n in ("whole", "cut"))
    assert all(torch.equal(a["parameters"][k], b["parameters"][k]) for k in a["parameters"])
    assert any(x.any() for k, x in a["parameters"].items() if "lora_B" in k)
    assert {k.rpartition(".")[2] for k in a["parameters"]} == (
        {"solver", "verifier"} if how == TEAM else {"default"})
    episodes = [(tmp_path / n / "episodes.jsonl").read_text() for n in ("whole", "cut")]
    assert episodes[0] == episodes[1]


def test_what_a_verifier_scores_is_no_turn_of_the_tables():
    """A search asks it for log-probs only. Nothing was sampled, and there is one role that says something."""
    scored = Turn("verifier", [user("Is it?")], Reply("", finish="score", prompt_ids=[1]))
    t, _ = said("solver", SOLVER(**ASKED), "\\boxed{12}")
    e = Episode("p", turns=[t, scored], response="\\boxed{12}")
    e.reward, e.reason = reward_of(e, TWELVE, Rules({"own": 1.0}))
    row, = steps.lines(1, [e], [[]], {"p": TWELVE}, None)
    assert not [name for name in steps.summary([row]) if "solver" in name or "verifier" in name]
    assert e.parts["own"] == 1
    row["turns"].append(row["turns"][0] | {"role": "checker", "worth": -1.0, "rewards": [-1.0, 0.0]})
    found = steps.summary([row])
    assert (found["reward/solver"], found["solved/solver"]) == (1, 1)
    assert (found["reward/checker"], found["solved/checker"]) == (-0.5, 0) and "reward/verifier" not in found


def test_a_role_without_an_adapter_speaks_as_the_reference(small, tmp_path, monkeypatch):
    """With --adapters role the checker has none: also after the others have learned."""
    monkeypatch.setitem(workflows.WORKFLOWS, "solver_verifier", pair)
    seen = []
    give = train_grpo.give_credit
    monkeypatch.setattr(train_grpo, "give_credit", lambda episodes, *more: seen.extend(episodes) or give(
        episodes, *more))
    run(small, tmp_path / "run", *TEAM)
    base, _ = checkpoint.load(small)
    gaps = {"verifier": 0.0, "checker": 0.0}
    for t in (t for e in seen[8:] for t in e.turns if t.role in gaps):
        ids, mask = t.reply.prompt_ids + t.reply.ids, [0] * len(t.reply.prompt_ids) + [1] * len(t.reply.ids)
        with torch.no_grad():
            logp, _ = losses.score(base, [ids], [mask])
        gap = (logp - torch.tensor(t.reply.logprobs)).abs().max().item()
        gaps[t.role] = max(gaps[t.role], gap)
    assert gaps["checker"] < 1e-3 < 0.02 < gaps["verifier"]


@pytest.mark.parametrize("words, said", [
    ("--adapters role", "no --roles"), ("--judge tiny", "--judge tiny.*needs"),
    ("--reward judge --credit step", "--judge None.*needs"),
    ("--reward judge --judge tiny", "credit episode"),
    ("--algorithm distill --adapters role --roles solver", "shared adapter only")])
def test_what_cannot_be_credited_is_refused(words, said):
    args = train_grpo.options().parse_args(words.split())
    train_grpo.cli.resolve(args, train_grpo.PAPER, train_grpo.TINY)
    with pytest.raises(BadInput, match=said):
        train_grpo.checked(args)
