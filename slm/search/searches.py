r"""Searches: workflows in which a verifier chooses among the steps of solutions.

steps.py has the step generator: `grow` writes steps, `judge` gives them the verifier's P(right). That score
is all that a search knows: no gold answer is in reach. `budget` is the number of solutions, of beams, or of
rollouts; each docstring says how many steps that is at most. What a search has to beat, at the same number of
tokens, is `self_consistency`.

Not covered: lookahead (a step's score by what may follow it), a value other than the verifier's.
"""

import math
import random
from collections.abc import Callable
from operator import attrgetter, itemgetter

from slm import prompts
from slm.episode import seed_of
from slm.grading import equal, extract, printed
from slm.search.steps import STEP, Node, grow, judge, stated, write

C_UCT, C_VISIT = 2.0, 50  # constants of rStar-Math and of Gumbel MuZero
TURN = {"keep_stop": True, "stop": STEP["stop"]}


# ---- parts that the searches share -----------------------------------------------------------------------

def tally(answers: list[str | None], weights: list[float] | None = None) -> list[tuple[str, float]]:
    """Each answer and how often it was given, or the sum of its weights, equivalent ones together; the
    largest first, then the earliest.

    >>> tally(["0.5", None, "3", "1/2"]), tally(["0.5", "3", "1/2"], [0.2, 0.9, 0.3])
    ([('0.5', 2), ('3', 1)], [('3', 0.9), ('0.5', 0.5)])
    """
    sums: dict[str, float] = {}
    for answer, weight in zip(answers, weights or [1] * len(answers)):
        if answer:
            known = next((other for other in sums if equal(answer, other)), answer)
            sums[known] = sums.get(known, 0) + weight
    return sorted(sums.items(), key=lambda entry: -entry[1])


def candidates(question: str, nodes: list[Node]):
    """The next step of each of the nodes, grown and judged, less those that were given up."""
    children = yield from grow(question, nodes)
    yield from judge(question, children)
    return [child for child in children if child.answer or not child.closed]


# ---- many solutions side by side -------------------------------------------------------------------------

def best(nodes: list[Node], value: Callable[[list[float]], float] = itemgetter(-1)) -> str | None:
    """The answer of the solution with the highest value of its steps' scores, by default the last of them;
    the earliest of equals, None without a solution."""
    values = {node: value(node.scores()) for node in nodes if node.answer}
    return max(values, key=values.get, default=Node()).answer


def vote(nodes: list[Node], weights: list[float] | None = None) -> str | None:
    """The answer with most votes, or with the largest sum of weights; None without a solution."""
    votes = tally([node.answer for node in nodes], weights)
    return votes[0][0] if votes else None


def chains(question: str, nodes: list[Node]):
    """From each of the nodes on a solution, written on its own, step by step; those that have an answer."""
    found: list[Node] = []
    while nodes:
        nodes = yield from grow(question, nodes)
        found += [node for node in nodes if node.answer]
        nodes = [node for node in nodes if not node.closed]
    return found


def judged_chains(question: str, count: int):
    """The same, and the verifier has judged every step of them."""
    found = yield from chains(question, [Node()] * count)
    yield from judge(question, [step for node in found for step in node.path()])
    return found


def self_consistency(question: str, budget: int = 16):
    """The control: `budget` solutions, and the answer that most of them give (Wang et al. 2022, arXiv
    2203.11171). No verifier. A search has to beat this at the same number of tokens."""
    return vote((yield from chains(question, [Node()] * budget)))


def best_of_n(question: str, budget: int = 16):
    """`budget` solutions, and the one whose last step the verifier likes best (Cobbe et al. 2021, arXiv
    2110.14168; "last" is how search-and-learn reads a verifier of steps)."""
    found = yield from chains(question, [Node()] * budget)
    yield from judge(question, found)
    return best(found)


def best_of_n_min(question: str, budget: int = 16):
    """As best_of_n, but a solution is as good as its worst step (Lightman et al. 2023, arXiv 2305.20050)."""
    return best((yield from judged_chains(question, budget)), min)


def best_of_n_product(question: str, budget: int = 16):
    """As best_of_n, but a solution's value is the chance that all its steps are right (the same paper)."""
    return best((yield from judged_chains(question, budget)), math.prod)


def weighted_vote(question: str, budget: int = 16):
    """`budget` solutions vote, each with the verifier's score of its last step (Li et al. 2022, arXiv
    2206.02336)."""
    found = yield from chains(question, [Node()] * budget)
    yield from judge(question, found)
    return vote(found, [node.score for node in found])


# ---- beams -----------------------------------------------------------------------------------------------

def beam_search(question: str, budget: int = 16, width: int = 4):
    """Beam search over steps (Snell et al. 2024, arXiv 2408.03314): at most `budget` steps at each depth. The
    first ones follow the question; then `width` follow each of the budget / width best that are not over.
    Solutions leave the beam, and with `budget` of them the search ends. The best one answers."""
    found: list[Node] = []
    nodes = yield from candidates(question, [Node()] * budget)
    while nodes and len(found) < budget:
        found += [node for node in nodes if node.answer]
        beam = sorted((node for node in nodes if not node.closed), key=attrgetter("score"), reverse=True)
        beam = beam[:max(1, budget // width)]
        nodes = (yield from candidates(question, beam * min(width, budget))) if beam else []
    return best(found + nodes)


def dvts(question: str, budget: int = 16, width: int = 4):
    """Diverse verifier tree search (Beeching et al. 2024, search-and-learn): budget / width trees that never
    meet. Each samples `width` steps and goes on from the best one, until that is a solution or none is left.
    So there are at most `budget` steps at each depth. The best solution of all trees answers."""
    width, found = min(width, budget), []
    tips = [Node()] * (budget // width)
    while tips:
        children = yield from grow(question, [tip for tip in tips for _ in range(width)])
        yield from judge(question, children)
        trees = [children[i:i + width] for i in range(0, len(children), width)]
        kept = [max(tree, key=attrgetter("score")) for tree in trees]
        found += [node for node in kept if node.answer]
        tips = [node for node in kept if not node.closed]
    return best(found)


def allot(scores: list[float], budget: int, temperature: float = 0.1) -> list[int]:
    """Shares of a budget by softmax(score / temperature), in whole numbers that sum to the budget: rounded
    down, then one more for the largest remainders.

    >>> allot([0.9, 0.8, 0.2], 8)
    [6, 2, 0]
    """
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    shares = [budget * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in order[:budget - sum(counts)]:
        counts[i] += 1
    return counts


def rebase(question: str, budget: int = 16):
    """Reward-balanced search (Wu et al. 2024, arXiv 2408.00724): at each depth the budget, less one for each
    solution so far, is shared among all partial solutions by the softmax of their scores; those without a
    share end. The solutions vote, weighted by their scores."""
    found: list[Node] = []
    nodes = yield from candidates(question, [Node()] * budget)
    while nodes:
        found += [node for node in nodes if node.answer]
        nodes = [node for node in nodes if not node.closed]
        if not nodes or len(found) >= budget:
            break
        shares = allot([node.score for node in nodes], budget - len(found))
        plan = [node for node, share in zip(nodes, shares) for _ in range(share)]
        nodes = yield from candidates(question, plan)
    return vote(found, [node.score for node in found])


# ---- trees -----------------------------------------------------------------------------------------------

def expand(question: str, leaf: Node, width: int, signs: int = 0):
    """Grow and judge `width` steps under a leaf. Each starts with one visit and its value: 2 P(right) - 1,
    and -1 if it was given up. A solution's value (with `signs`, +-1) also goes to every node above it."""
    children = yield from grow(question, [leaf] * width)
    yield from judge(question, children)
    leaf.adopt(children)
    for child in children:
        child.visit(2 * child.score - 1)
        for node in leaf.up() if child.answer else ():
            node.visit(math.copysign(1, child.total) if signs else child.total)


def descend(question: str, node: Node, width: int, choose: Callable[[list[Node]], Node], signs: int = 0):
    """One rollout: down from a node, `choose` names the way among open children, and every leaf on it grows.
    It ends when a leaf grew a solution, or when nothing is open."""
    while not node.closed:
        if node.children:
            node = choose([child for child in node.children if not child.closed])
        else:
            yield from expand(question, node, width, signs)
            if any(child.answer for child in node.children):
                return


def uct(node: Node) -> float:
    """Q / N + c sqrt(ln N_parent / N); no bonus before a solution was found under the parent."""
    bonus = C_UCT * math.sqrt(math.log(node.parent.visits) / node.visits) if node.parent.visits else 0.0
    return node.total / node.visits + bonus


def mcts(question: str, budget: int = 8, width: int = 4, signs: int = 0):
    """Monte Carlo tree search as in rStar-Math (Guan et al. 2025, arXiv 2501.04519): `budget` rollouts by
    UCT, each of at most 16 growths of `width` steps. A node starts with the verifier's value; a step that was
    given up has -1, which goes no further. The solution with the best score answers.

    Departs: no gold answer is in reach, so a solution is worth its score, or with signs=1 the sign of it,
    where rStar's training has +1 for a right answer and -1 for a wrong one."""
    return best((yield from tree(question, budget, width, signs)).below())


def tree(question: str, budget: int, width: int, signs: int = 0):
    """The root of what these rollouts grow."""
    root = Node()
    for _ in range(budget):
        yield from descend(question, root, width, lambda nodes: max(nodes, key=uct), signs)
    return root


def sigma(nodes: list[Node]) -> list[float]:
    """Gumbel MuZero's scale for the mean values (between 0 and 1) of children of one node: the more visits,
    the more they count."""
    scale = C_VISIT + max(node.visits for node in nodes)
    return [scale * (1 + node.total / node.visits) / 2 for node in nodes]


def most_lacking(nodes: list[Node]) -> Node:
    """Gumbel MuZero's choice below the root: the child whose share of the visits lacks most of its improved
    policy, softmax(sigma). The priors are equal, as the children were sampled from the policy."""
    worth = sigma(nodes)
    weights = [math.exp(x - max(worth)) for x in worth]
    seen = 1 + sum(node.visits for node in nodes)
    return max(zip(nodes, weights), key=lambda pair: pair[1] / sum(weights) - pair[0].visits / seen)[0]


def halving(count: int, budget: int) -> list[tuple[int, int]]:
    """Sequential halving: (candidates left, rollouts for each) of every phase, together at most the budget.

    >>> halving(8, 24), halving(4, 3)
    ([(8, 1), (4, 2), (2, 4)], [(4, 0), (2, 1)])
    """
    plan, rest, phases = [], budget, max(1, math.ceil(math.log2(count)))
    for _ in range(phases):
        each = min(max(1, budget // (phases * count)), rest // count)
        plan.append((count, each))
        rest, count = rest - count * each, max(1, count // 2)
    return plan


def gumbel_mcts(question: str, budget: int = 8, width: int = 4):
    """The repair of tree search that loses accuracy with its budget (ReSCALE, arXiv 2603.21162; Danihelka et
    al. 2022, "Policy improvement by planning with Gumbel"): `width` first steps get Gumbel noise and share
    `budget` rollouts by sequential halving; the half with less noise + sigma leaves after each phase. Below
    them the choice has no bonus. The best solution under the winner answers."""
    root = Node()
    yield from expand(question, root, width)
    left = [child for child in root.children if child.answer or not child.closed]
    draw = random.Random(seed_of(question))
    noise = {child: -math.log(-math.log(draw.random())) for child in left}
    for count, each in halving(len(left), budget) if left else ():
        left = left[:count]
        for child in left * each:
            yield from descend(question, child, width, most_lacking)
        ranks = {child: noise[child] + worth for child, worth in zip(left, sigma(left))}
        left.sort(key=ranks.get, reverse=True)
    winner = best(left[0].below()) if left else None
    return winner or best(root.below())


# ---- not a search: one turn with code in it --------------------------------------------------------------

def interactive_python(question: str, rounds: int = 8):
    """Code runs as soon as its fence closes, and the turn goes on behind the output (ToRA, Gou et al. 2023,
    arXiv 2309.17452), for at most `rounds` programs. Answers with the box, else with the last number printed.
    The model never writes an output itself, and sees it before its next word."""
    node = Node()
    for _ in range(rounds + 1):
        before = node.blocks
        yield from write([node], question, TURN, prompts.HINT)
        goes_on = node.finish == "stop_string" or node.blocks > before
        if not goes_on or extract(node.text, strict=True):
            break
    return stated(node.text) or printed(node.outcome)


SEARCHES = (self_consistency, best_of_n, best_of_n_min, best_of_n_product, weighted_vote, beam_search, dvts,
            rebase, mcts, gumbel_mcts, interactive_python)
