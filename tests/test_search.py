"""Scores of given continuations, the step generator, and every search against trees worked by hand."""

import doctest
import inspect
import math
import random
from collections import Counter

import pytest
import torch
from faulty_server import refuses, serve
from scripted import Backend, Sandbox, problem
from small import write_small

from slm import BadInput, checkpoint, lora, losses, prompts, workflows
from slm.episode import STEPS, Reply, Request, Sampling, jobs_for, run_episodes, seed_of, user
from slm.sampling import Sampler
from slm.search import searches, steps
from slm.search.searches import SEARCHES, allot, halving
from slm.teachers import Endpoint
from slm.teachers.endpoint import first_tokens

QUESTION = [user("What is 2 + 3?\n" + prompts.BOX)]
WORDS = ("Yes", "No", "INCORRECT", " Then 2 + 3 = 5 nuts are left.")


# ---- the log-prob of given continuations -----------------------------------------------------------------

def plain(model, ids, words):
    """The sum of the log-probs of `words` after `ids`, by one plain forward pass."""
    with torch.no_grad():
        logp, _ = losses.score(model, [ids + words], [[0] * len(ids) + [1] * len(words)])
    return float(logp.double().sum())


def scores(sampler, *requests):
    return [reply.scores for reply, in sampler.generate(list(requests), progress=False)]


@pytest.mark.parametrize("prefill_tokens", [512, 7], ids=["one pass", "many passes"])
def test_scores_are_those_of_the_plain_forward_pass(tiny, prefill_tokens):
    model, tokenizer = tiny
    sampler = Sampler(model, tokenizer)
    sampler.prefill_tokens = prefill_tokens
    found, = scores(sampler, Request(QUESTION, continuations=WORDS))
    ids = tokenizer.chat(QUESTION)
    assert list(found) == list(WORDS)
    for words in WORDS:
        given = tokenizer.encode(words)
        assert found[words] == pytest.approx(plain(model, ids, given), abs=1e-5 * len(given))


def test_replies_and_scores_share_a_batch_and_do_not_change_each_other(tiny):
    model, tokenizer = tiny
    asks = [Request(QUESTION, Sampling(12, 1.0, seed=k)) for k in range(3)]
    score = Request(QUESTION, continuations=WORDS)
    alone = [reply.ids for reply, in Sampler(model, tokenizer).generate(asks, progress=False)]
    lonely, = scores(Sampler(model, tokenizer), score)
    sampler = Sampler(model, tokenizer, max_batch=2)
    mixed = sampler.generate([asks[0], score, asks[1], asks[2], score], progress=False)
    assert [mixed[i][0].ids for i in (0, 2, 3)] == alone
    for i in (1, 4):
        reply, = mixed[i]
        assert reply.scores == pytest.approx(lonely, abs=1e-4)
        assert (reply.finish, reply.text, reply.ids, reply.tokens_out) == ("score", "", [], 0)
        assert reply.prompt_ids == tokenizer.chat(QUESTION)


def test_the_prompt_of_continuations_is_computed_once(tiny, monkeypatch):
    model, tokenizer = tiny
    sampler, computed = Sampler(model, tokenizer), []
    hidden = sampler.network.hidden
    monkeypatch.setattr(sampler.network, "hidden",
                        lambda ids, *rest: computed.append(len(ids)) or hidden(ids, *rest))
    prompt = len(tokenizer.chat(QUESTION))
    scores(sampler, Request(QUESTION, continuations=WORDS))
    assert prompt <= sum(computed) < prompt + sum(len(tokenizer.encode(words)) for words in WORDS)


def test_each_request_is_scored_by_its_own_adapter(random_model):
    model = random_model()
    lora.add(model, r=4, name="judge")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    ids, words = [5, 6, 7, 8], [9, 10, 11]

    class Numbers:
        stop_ids, directory = frozenset([0]), None
        def decode(self, ids, skip_special=True): return " ".join(map(str, ids))
        def following(self, text): return [int(word) for word in text.split()]

    given = ("9 10 11",)
    with lora.off(model):
        found = scores(Sampler(model, Numbers()), Request(ids=ids, continuations=given),
                       Request(ids=ids, continuations=given, adapter="judge"))
        base = plain(model, ids, words)
    with lora.use(model, "judge"):
        judged = plain(model, ids, words)
    assert [each[given[0]] for each in found] == pytest.approx([base, judged], abs=3e-5)
    assert abs(base - judged) > 0.01


def test_an_empty_continuation_and_one_that_does_not_fit_are_refused(tiny):
    sampler = Sampler(*tiny)
    for words, said in (("", "empty continuation"), ("nuts " * 2000, "prompt of")):
        with pytest.raises(BadInput, match=said):
            sampler.submit(Request(QUESTION, continuations=("Yes", words)))


def with_rivals(**rivals):
    """A server that sends these first tokens and their log-probs."""
    def quirk(number, body, reply):
        top = [{"token": token, "logprob": logprob} for token, logprob in rivals.items()]
        if body.get("logprobs"):
            reply["choices"][0] |= {"logprobs": {"content": [{"token": "Yes", "top_logprobs": top}]},
                                    "finish_reason": "length"}
        return 200, reply
    return quirk


def asked_of(quirk, words=("Yes", "No")):
    with serve(lambda *_: "Yes", quirk=quirk) as server:
        endpoint = Endpoint(server.url, "careless", tries=1)
        endpoint.submit(Request(QUESTION, continuations=words))
        landed = []
        try:
            while endpoint.pending:
                landed += endpoint.step()
        finally:
            endpoint.close()
    (_, _, reply), = landed
    return reply, server.bodies[0]


def test_an_endpoint_scores_single_tokens_by_the_likeliest_first_ones():
    reply, body = asked_of(with_rivals(Yes=-0.1, No=-2.5, Maybe=-4.0))
    assert reply.scores == {"Yes": -0.1, "No": -2.5} and reply.finish == "score" and reply.text == ""
    wanted = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 20}
    assert wanted.items() <= body.items()
    reply, _ = asked_of(with_rivals(Yes=-0.1, Maybe=-4.0))
    assert reply.scores == {"Yes": -0.1, "No": -4.0}  # at most that
    assert "none of Yes, No" in asked_of(with_rivals(Maybe=-4.0))[0].error


def test_an_endpoint_scores_longer_words_by_the_token_that_begins_one_of_them():
    def scores(words=("CORRECT", "INCORRECT"), **rivals):
        return asked_of(with_rivals(**rivals), words)[0].scores

    both = {"CORRECT": -0.2, "INCORRECT": -2.0}
    assert scores(**{"COR": -0.2, "CORR": -9.0, "IN": -2.0, "In": -1.5, "": -5.0}) == both
    assert scores(**{" COR": -0.2, " CORRECT": -3.0, "IN": -2.0}) == both
    assert scores(COR=-0.2, I=-0.1, X=-2.0) == both  # "I" is a word
    assert scores(("Right", "Rather"), R=-0.1, Ri=-4.0, X=-6.0) == {"Right": -4.0, "Rather": -6.0}
    assert scores(("1", "10"), **{"1": -0.1, "10": -4.0, "7": -5.0}) == {"1": -0.1, "10": -4.0}


@pytest.mark.parametrize("top", [None, [], {}, 5, [{"token": "Yes"}], [{"token": "Yes", "logprob": None}],
                                 [["Yes", -0.1]], [{"token": "Yes", "logprob": "high"}]])
def test_log_probs_that_cannot_be_read_are_none(top):
    content = [{"top_logprobs": top}]
    for choice in {"logprobs": {"content": content}}, {"logprobs": {"content": []}}, {"logprobs": None}, {}:
        assert first_tokens(choice) == {}


REFUSED = refuses("logprobs", 400, {"error": {"message": "no logprobs here"}})


@pytest.mark.parametrize("quirk", [None, REFUSED], ids=["it sends none", "it refuses the field"])
def test_a_server_without_log_probs_is_one_sentence(quirk):
    with pytest.raises(BadInput, match="expected a server with top_logprobs"):
        asked_of(quirk)


# ---- a scripted policy and verifier ----------------------------------------------------------------------

class Table(Backend):
    """tree: solution so far -> what follows it, the k-th time that this is asked the k-th text. A text that
    ends with a new line or a fence ends a step, any other the turn. yes: solution -> the verifier's P(yes).
    Both may be functions."""

    def __init__(self, tree, yes=None, order="fifo", batch=100):
        super().__init__(None, order, batch)
        self.tree, self.yes, self.written = tree, yes or {}, Counter()
        self.judged, self.sampled = [], []

    def prompt_ids(self, messages):
        asked, turn = messages[0]["content"], "".join(m["content"] for m in messages[1:])
        return [1, *map(ord, asked), 2, *map(ord, turn)]

    def answer(self, request, i):
        asked, ids = request.messages[-1], self.prompt_ids(request.messages)
        if request.continuations:
            solution = asked["content"].partition("so far: ")[2].rpartition("\nIs the last")[0]
            self.judged.append(solution)
            yes = self.yes(solution) if callable(self.yes) else self.yes.get(solution, 0.5)
            scores = {"CORRECT": math.log(yes) - 3, "INCORRECT": math.log(1 - yes) - 3}  # not normalised
            return Reply("", finish="score", prompt_ids=ids, scores=scores)
        solution = asked["content"] if asked["role"] == "assistant" else ""
        options = self.tree(solution) if callable(self.tree) else self.tree[solution]
        text = options[self.written[solution] % len(options)]
        self.written[solution] += 1
        self.sampled.append(text)
        assert not text.endswith("\n") or "\n" in request.sampling.stop or "\n```\n" in request.sampling.stop
        new = [ord(c) for c in text]
        finish = "stop_string" if text.endswith(("\n", "```")) else "stop"
        return Reply(text, new, [-0.5] * len(new), finish, ids)


def play(workflow, tree, yes=None, **options):
    """Run a search on one question -> (episode, backend)."""
    def search(question):
        return (yield from workflow(question, **options))
    backend = Table(tree, yes)
    jobs = jobs_for([problem("p", "Q?")], search)
    episode, = run_episodes(jobs, backend, Sandbox(), sampling=Sampling(100))
    return episode, backend


ABCD = {"": ["a\n", "b\n", "c\n", "d\n"]}


# ---- the step generator ----------------------------------------------------------------------------------

def test_code_runs_when_its_fence_closes_and_its_output_belongs_to_the_step():
    first = "```python\nx = 6\nprint(x * 7)\n```"
    after = first + prompts.OUTPUT(output="42")
    second = after + "Now more.\n```python\n"
    tree = {"": ["```python\n"], "```python\n": ["x = 6\nprint(x * 7)\n```"], after: ["Now more.\n"],
            after + "Now more.\n": ["```python\n"], second: ["print(x + 1)\n```"],
            second + "print(x + 1)\n```" + prompts.OUTPUT(output="7"): ["So \\boxed{7}."]}
    episode, backend = play(searches.best_of_n, tree, budget=1)
    assert episode.answer == "7" and len(episode.runs) == 2
    assert [run.outcome.stdout for run in episode.runs] == ["42\n", "42\n7\n"]
    record, = episode.records()  # one turn, one record
    assert "".join(chr(i) for i, m in zip(record.ids, record.mask) if m) == "".join(backend.sampled)
    stops = [request.sampling.stop for request in backend.requests[:2]]
    assert stops == [("\n", "\n```\n"), ("```",)]


def test_a_line_without_a_word_is_no_step():
    tree = {"": ["<think>\n"], "<think>\n": ["\n"], "<think>\n\n": ["2 + 3 = 5\n"],
            "<think>\n\n2 + 3 = 5\n": ["\\boxed{5}"]}
    _, backend = play(searches.best_of_n_min, tree, budget=1)
    assert backend.judged == ["<think>\n\n2 + 3 = 5", "<think>\n\n2 + 3 = 5\n\\boxed{5}"]


def test_steps_that_lead_nowhere_are_given_up():
    bad = "```python\n1 / 0\n```"
    failed = bad + prompts.OUTPUT(output="ZeroDivisionError: division by zero")
    again = failed + bad
    tree = {"": ["on\n", "I give up.", bad], failed: [bad],
            **{"on\n" * n: ["on\n"] for n in range(1, 20)}}
    episode, backend = play(searches.self_consistency, tree, budget=3)
    assert episode.answer is None
    assert backend.written["on\n" * 15] == 1 and not backend.written["on\n" * 16]  # 16 steps are the most
    assert backend.written[failed] == 1 and not any(text.startswith(again) for text in backend.written)


@pytest.mark.parametrize("rule, stop", [("paragraph", "\n\n"), ("line", "\n"), ("sentence", ". ")])
def test_the_rule_of_the_run_says_where_a_step_ends(rule, stop):
    backend = Table({"": ["\\boxed{1}"]})
    jobs = jobs_for([problem("p", "Q?")], searches.best_of_n)
    run_episodes(jobs, backend, sampling=Sampling(step_rule=rule))
    assert stop in backend.requests[0].sampling.stop and backend.requests[0].sampling.keep_stop


def test_interactive_python_goes_on_behind_the_output_in_the_same_turn():
    code = "Compute it.\n```python\nprint(2 + 3)\n```\n"
    tree = {"": [code], code + "```output\n5\n```\n": ["So it is \\boxed{5}."]}
    episode, backend = play(searches.interactive_python, tree)
    assert episode.answer == "5" and backend.requests[0].sampling.stop == ("\n```\n",)
    record, = episode.records()
    assert "".join(map(chr, record.ids)).endswith(code + "```output\n5\n```\nSo it is \\boxed{5}.")
    assert sum(record.mask) == len(code + "So it is \\boxed{5}.")
    closed = code.rstrip("\n")  # a model that ends its turn after the code gets its output all the same
    tree = {"": [closed + " "], closed + " " + prompts.OUTPUT(output="5"): ["\\boxed{5}"]}
    assert play(searches.interactive_python, tree)[0].answer == "5"


CODE = "```python\nx = 3. \n\nprint(x)\n```\n"
RAN = CODE + "```output\n3.0\n\n```\n"


@pytest.mark.parametrize("rule, parts", [
    ("line", [""]), ("line", ["One"]), ("line", ["One.\n", "\nTwo.\n"]), ("line", ["\n\n"]),
    ("line", ["<think>\nOne.\n", "</think>\nTwo.\n", "\\boxed{3}"]),
    ("line", ["So\n", "\\[\nx = 2\n\\]\n"]), ("line", ["---\n**Step 1:** add\n", "2 + 3 = 5\r\n", "Done."]),
    ("line", ["Run:\n", RAN, "It is 3.\n"]), ("line", [CODE, "then " + CODE]),
    ("line", ["Run:\n", "```python\nx = 1\nnever closed"]), ("line", ["答えは\n", "５です。\n"]),
    ("paragraph", ["One.\nTwo.\n\n", "Three."]), ("paragraph", ["One.\n\n", "\nTwo."]),
    ("paragraph", ["Run:\n" + RAN, "It is 3.\nSo.\n\n"]),
    ("paragraph", ["\\[\n\nx = 2\n\n", "So.\n\n\\]\n\n"]),
    ("sentence", ["It is 3.5 nuts. ", "So 2! ", "Is it? ", "Yes.\n", "Done."]),
    ("sentence", [RAN, "It is 3. ", "Yes."])])
def test_solutions_are_cut_into_steps(rule, parts):
    assert steps.cut("".join(parts), rule) == parts


def test_the_steps_of_any_text_join_to_it():
    rng = random.Random(0)
    pieces = ["a", ". ", "\n", "\n\n", "```", "```python\n", "```output\n", "</think>"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=12))
        for rule in STEPS:
            assert "".join(steps.cut(text, rule)) == text


# ---- solutions side by side ------------------------------------------------------------------------------

FOUR = {"": ["a\n", "b\n", "c\n", "\\boxed{9}"], "a\n": ["\\boxed{1}"], "b\n": ["\\boxed{1}"],
        "c\n": ["\\boxed{2}"]}
LIKES = {"a": 0.9, "b": 0.5, "c": 0.7, "a\n\\boxed{1}": 0.2, "b\n\\boxed{1}": 0.5, "c\n\\boxed{2}": 0.6,
         "\\boxed{9}": 0.45}


@pytest.mark.parametrize("search, answer, judged", [
    (searches.self_consistency, "1", 0),   # two of four
    (searches.best_of_n, "2", 4),          # 0.6 is the highest last score
    (searches.best_of_n_min, "2", 7),      # min: 0.2, 0.5, 0.6, 0.45
    (searches.best_of_n_product, "9", 7),  # product: 0.18, 0.25, 0.42, 0.45
    (searches.weighted_vote, "1", 4)])     # 0.2 + 0.5 for 1, 0.6 for 2, 0.45 for 9
def test_solutions_side_by_side(search, answer, judged):
    episode, backend = play(search, FOUR, LIKES, budget=4)
    assert episode.answer == answer and len(backend.judged) == judged
    assert backend.written == {"": 4, "a\n": 1, "b\n": 1, "c\n": 1}


# ---- beams -----------------------------------------------------------------------------------------------

BEAM = ABCD | {"a\n": ["x\n", "\\boxed{1}"], "c\n": ["u\n", "\\boxed{2}"], "a\nx\n": ["\\boxed{3}"],
               "c\nu\n": ["\\boxed{4}"]}
BEAM_LIKES = {"a": 0.9, "b": 0.2, "c": 0.8, "d": 0.1, "a\nx": 0.3, "a\n\\boxed{1}": 0.6, "c\nu": 0.7,
              "c\n\\boxed{2}": 0.95, "a\nx\n\\boxed{3}": 0.2, "c\nu\n\\boxed{4}": 0.9}


def test_beam_search_goes_on_from_the_best():
    episode, backend = play(searches.beam_search, BEAM, BEAM_LIKES, budget=4, width=2)
    assert backend.written == {"": 4, "a\n": 2, "c\n": 2, "a\nx\n": 2, "c\nu\n": 2}
    assert episode.answer == "2"


def test_the_trees_of_dvts_do_not_compete():
    likes = {"a": 0.9, "b": 0.85, "c": 0.2, "d": 0.1, "a\n\\boxed{1}": 0.3, "c\n\\boxed{2}": 0.4}
    tree = ABCD | {"a\n": ["\\boxed{1}"], "b\n": ["\\boxed{7}"], "c\n": ["\\boxed{2}"]}
    episode, backend = play(searches.dvts, tree, likes, budget=4, width=2)
    assert backend.written == {"": 4, "a\n": 2, "c\n": 2}  # a beam would go on from a and b
    assert episode.answer == "2"
    other = likes | {"a": 0.3}  # what happens in the first tree changes nothing in the second
    _, backend = play(searches.dvts, tree, other, budget=4, width=2)
    assert backend.written == {"": 4, "b\n": 2, "c\n": 2}


def test_rebase_shares_its_budget_by_the_softmax_of_the_scores():
    likes = {"a": 0.9, "b": 0.2, "c": 0.8, "d": 0.1}
    # e^0, e^-1, e^-7, e^-8 of 1.369 in all, times 4: 2.92, 1.07, 0.003, 0.001 -> 3, 1, 0, 0
    tree = ABCD | {"a\n": ["\\boxed{1}", "x\n", "x\n"], "c\n": ["y\n"], "a\nx\n": ["\\boxed{2}"],
                   "c\ny\n": ["\\boxed{2}"]}
    episode, backend = play(searches.rebase, tree, likes, budget=4)
    assert backend.written == {"": 4, "a\n": 3, "c\n": 1, "a\nx\n": 2, "c\ny\n": 1}  # 3: a solution is there
    assert episode.answer == "2"  # three votes of 0.5 against one


def test_allotments_sum_to_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        scores, budget = [rng.random() for _ in range(rng.randint(1, 9))], rng.randint(1, 40)
        counts = allot(scores, budget)
        assert sum(counts) == budget and min(counts) >= 0
        exact = [budget * math.exp(s / 0.1) / sum(math.exp(t / 0.1) for t in scores) for s in scores]
        assert all(abs(count - share) < 1 for count, share in zip(counts, exact))


# ---- trees -----------------------------------------------------------------------------------------------

def grown(monkeypatch, workflow, *args, **options):
    """(text -> node of the tree, answer, backend) of a tree search."""
    roots, below = [], steps.Node.below
    monkeypatch.setattr(steps.Node, "below", lambda node: roots.append(node) or below(node))
    episode, backend = play(workflow, *args, **options)
    root = next(roots[0].up()) if roots else None
    while root.parent:
        root = root.parent
    return {node.text: node for node in below(root)}, episode.answer, backend


def test_mcts_on_a_tree_worked_by_hand(monkeypatch):
    tree = {"": ["a\n", "b\n"], "a\n": ["\\boxed{1}", "2\n"], "b\n": ["I give up", "2\n"],
            "b\n2\n": ["\\boxed{3}", "\\boxed{4}"], "a\n2\n": ["\\boxed{5}", "\\boxed{6}"]}
    yes = {"a": .8, "b": .6, "a\n\\boxed{1}": .3, "a\n2": .5, "b\n2": .9, "b\n2\n\\boxed{3}": .7,
           "b\n2\n\\boxed{4}": .4, "a\n2\n\\boxed{5}": .9, "a\n2\n\\boxed{6}": .2}
    # 1: nothing was found yet, so the higher value 0.6 leads to a; it finds 1, worth -0.4; a: (0.6 - 0.4) / 2
    # 2: ln 1 = 0, so b with 0.2 against 0.1; its second child is alive, and finds 3 (0.4) and 4 (-0.2)
    # 3: nothing is open below b, so a, then its second child: 5 (0.8) and 6 (-0.6)
    for budget, written in ((1, ["", "a\n"]), (2, ["", "a\n", "b\n", "b\n2\n"]),
                            (9, ["", "a\n", "b\n", "b\n2\n", "a\n2\n"])):
        nodes, answer, backend = grown(monkeypatch, searches.mcts, tree, yes, budget=budget, width=2)
        assert backend.written == dict.fromkeys(written, 2)
    stats = {text: (node.visits, round(node.total, 9)) for text, node in nodes.items()}
    assert stats == {
        "": (5, 0.0), "a\n": (4, 0.4), "b\n": (3, 0.4), "a\n\\boxed{1}": (1, -0.4), "a\n2\n": (3, 0.2),
        "a\n2\n\\boxed{5}": (1, 0.8), "a\n2\n\\boxed{6}": (1, -0.6), "b\nI give up": (1, -1.0),
        "b\n2\n": (3, 1.0), "b\n2\n\\boxed{3}": (1, 0.4), "b\n2\n\\boxed{4}": (1, -0.2)}
    assert searches.uct(nodes["a\n"]) == pytest.approx(0.1 + 2 * math.sqrt(math.log(5) / 4))
    assert answer == "5"


def test_with_signs_a_solution_is_worth_one_or_minus_one(monkeypatch):
    tree = {"": ["\\boxed{1}", "\\boxed{2}", "on\n"], "on\n": ["\\boxed{3}"]}
    yes = {"\\boxed{1}": 0.9, "\\boxed{2}": 0.2, "on": 0.4, "on\n\\boxed{3}": 0.7}
    nodes, _, _ = grown(monkeypatch, searches.mcts, tree, yes, budget=2, width=3, signs=1)
    assert (nodes[""].visits, nodes[""].total) == (5, 3.0)  # +1, -1, and three times +1
    assert (nodes["on\n"].visits, nodes["on\n"].total) == (4, pytest.approx(2.8))


def luck(text, salt):
    return random.Random(f"{salt} {text}").random()


def wild(salt):
    """A random tree of at most four steps, as functions for a Table."""
    def tree(text):
        depth = text.count("\n")
        return [f"\\boxed{{{k}}}" if luck(text + str(k), salt) < 0.3 or depth == 3 else
                "xyz"[k] + "?" if luck(text + str(k), salt) > 0.9 else "xyz"[k] + "\n" for k in range(3)]
    return tree, lambda text: 0.05 + 0.9 * luck(text, salt)


def by_brute_force(tree, yes, budget, width):
    """rStar's search again, over texts and dictionaries: visits and totals, how often each text was grown."""
    visits, total, children, dead = Counter(), Counter(), {}, set()

    def is_open(text):
        if text in dead or "boxed" in text:
            return False
        return text not in children or any(is_open(child) for child in children[text])

    def uct(child, parent):
        bonus = 2 * (math.log(visits[parent]) / visits[child]) ** 0.5 if visits[parent] else 0
        return total[child] / visits[child] + bonus

    for _ in range(budget):
        way, done = [""], False
        while is_open(way[-1]) and not done:
            text = way[-1]
            if text in children:
                way.append(max(filter(is_open, children[text]), key=lambda child: uct(child, text)))
                continue
            children[text] = [text + step for step in tree(text)[:width]]
            for child in children[text]:
                dead |= {child} if child.endswith("?") else set()
                value = -1 if child in dead else 2 * yes(child.strip()) - 1
                visits[child] += 1
                total[child] += value
                for node in way if "boxed" in child else []:
                    visits[node] += 1
                    total[node] += value
                    done = True
    return visits, total, children


@pytest.mark.parametrize("salt", range(12))
def test_mcts_is_what_a_second_writing_of_it_gives(salt, monkeypatch):
    tree, yes = wild(salt)
    nodes, _, backend = grown(monkeypatch, searches.mcts, tree, yes, budget=6, width=3)
    visits, total, children = by_brute_force(tree, yes, 6, 3)
    assert backend.written == dict.fromkeys(children, 3)
    for text, node in nodes.items():
        assert node.visits == visits[text] and node.total == pytest.approx(total[text])


@pytest.mark.parametrize("count, budget, plan", [
    (8, 24, [(8, 1), (4, 2), (2, 4)]), (4, 8, [(4, 1), (2, 2)]), (4, 16, [(4, 2), (2, 4)]), (1, 5, [(1, 5)]),
    (2, 7, [(2, 3)]), (4, 3, [(4, 0), (2, 1)]), (3, 6, [(3, 1), (1, 3)])])
def test_sequential_halving(count, budget, plan):
    assert halving(count, budget) == plan
    assert sum(n * each for n, each in plan) <= budget


def test_gumbel_search_spends_its_rollouts_by_halving():
    """A tree without dead ends: each rollout below a first step grows one leaf, which finds a solution."""
    def tree(text):
        return ABCD[""] if not text else [f"\\boxed{{{len(text)}}}", "on\n"]
    yes = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5}
    _, backend = play(searches.gumbel_mcts, tree, yes, budget=8, width=4)
    grew = Counter(text[:1] for text in backend.written.elements() if text)
    draw = random.Random(seed_of("Q?"))
    noise = {letter: -math.log(-math.log(draw.random())) for letter in "abcd"}
    best, second, *others = sorted("abcd", key=noise.get, reverse=True)  # all values are equal: noise decides
    assert grew == {best: 4 * 3, second: 4 * 3, **dict.fromkeys(others, 4)}  # 4 asks a growth
    assert backend.written[""] == 4


def test_gumbel_search_follows_the_verifier_if_it_is_sure():
    def yes(text):
        return 0.9 if text.startswith("c") else 0.1
    tree = ABCD | {f"{letter}\n": [f"\\boxed{{{k}}}"] for k, letter in enumerate("abcd")}
    assert play(searches.gumbel_mcts, tree, yes, budget=4, width=4)[0].answer == "2"


# ---- all searches ----------------------------------------------------------------------------------------

NAMES = [search.__name__ for search in SEARCHES]


def test_searches_are_listed_where_workflows_are():
    for search in SEARCHES:
        assert workflows.workflow(search.__name__) is search


def test_no_search_is_longer_than_a_page_and_each_names_its_paper():
    for search in SEARCHES:
        assert len(inspect.getsource(search).splitlines()) <= 60
        assert any(word in search.__doc__ for word in ("arXiv", "search-and-learn", "same paper"))


@pytest.mark.parametrize("search", SEARCHES[:-1], ids=NAMES[:-1])
@pytest.mark.parametrize("salt", [0, 1])
def test_no_search_asks_for_more_than_its_budget_and_every_token_is_recorded(search, salt):
    tree, yes = wild(salt)
    for budget in (1, 4, 6):
        episode, backend = play(search, tree, yes, budget=budget)
        depths = Counter()
        for text, count in backend.written.items():
            depths[text.count("\n")] += count
        if "mcts" in search.__name__:
            assert sum(depths.values()) <= (budget + 1) * 4 * 4  # rollouts, width, depth of this tree
        else:
            assert max(depths.values()) <= budget
        sampled = sum(map(len, backend.sampled))
        assert sum(sum(record.mask) for record in episode.records()) == sampled == episode.tokens_out
        assert episode.answer is not None or not any("boxed" in text for text in backend.sampled)


@pytest.mark.parametrize("search", SEARCHES, ids=NAMES)
def test_a_search_does_not_depend_on_the_order_of_replies(search):
    def by_seed(request):
        prompt, seed = request.messages[-1]["content"], request.sampling.seed
        text = random.Random(f"{prompt} {seed}").choice(["\\boxed{1}", "\\boxed{2}", "on\n", "off\n"])
        return text, "stop_string" if text.endswith("\n") else "stop"

    class Seeded(Table):
        def answer(self, request, i):
            if request.continuations:
                return super().answer(request, i)
            (text, finish), ids = by_seed(request), self.prompt_ids(request.messages)
            return Reply(text, [7] * len(text), [-0.5] * len(text), finish, ids)

    def small(question):
        return (yield from search(question, 3))

    jobs = jobs_for([problem(f"p{i}", f"Q{i}?") for i in range(3)], small)
    runs = [run_episodes(jobs, Seeded({}, lambda text: 0.05 + 0.9 * luck(text, 3), order, batch), Sandbox())
            for order, batch in (("fifo", 100), ("lifo", 1), ("shuffled", 4))]
    assert runs[0] == runs[1] == runs[2]


def two_rollouts(question):
    return (yield from searches.mcts(question, 2, 2))


def test_fifty_trees_at_once_are_those_grown_alone_and_keep_their_tokens(tmp_path, monkeypatch, capsys):
    """A random model writes no lines: here a step ends behind an e, and there are at most four."""
    monkeypatch.setitem(STEPS, "line", ("e",))
    monkeypatch.setattr(steps, "DEPTH", 4)
    model, tokenizer = checkpoint.load(write_small(tmp_path / "small"))
    jobs = jobs_for([problem(f"p{i}", f"What is {i} + {i}?") for i in range(50)], two_rollouts)
    together = run_episodes(jobs, Sampler(model, tokenizer), Sandbox(), sampling=Sampling(30), seed=3)
    for k in (0, 17, 49):
        alone, = run_episodes([jobs[k]], Sampler(model, tokenizer), Sandbox(), sampling=Sampling(30), seed=3)
        assert alone.answer == together[k].answer
        assert [t.reply.ids for t in alone.turns] == [t.reply.ids for t in together[k].turns]
    deepest = max(together, key=lambda episode: len(episode.turns))
    records = deepest.records()
    assert len(records) < sum(turn.role == "solver" for turn in deepest.turns)  # steps that go on in a record
    assert sum(sum(r.mask) for r in records) == sum(len(t.reply.ids) for t in deepest.turns)
    with torch.no_grad():
        logp, _ = losses.score(model, [r.ids for r in records], [r.mask for r in records], temperature=0.8)
    sampled = [p for r in records for p, m in zip(r.logprobs, r.mask) if m]
    assert torch.allclose(logp, torch.tensor(sampled), atol=1e-4)
    assert "tokenized anew" not in capsys.readouterr().err


def test_the_examples_in_the_docstrings():
    for module in (searches, steps):
        assert not doctest.testmod(module).failed
