"""Stage 3: reinforcement learning from checked answers: GRPO and its relatives, through any workflow.

    python train_grpo.py                                             the built-in model, minutes
    python train_grpo.py --adapter runs/sft-tiny-lora/adapter        from the fine-tuned adapter
    python train_grpo.py --workflow python_tools --adapter ...       trains what agents.py runs
    python train_grpo.py --workflow solver_verifier --credit role --reward own     trains a team
    python train_grpo.py --model Qwen/Qwen2.5-Math-1.5B --adapter DIR --data gsm8k
    python train_grpo.py --model MODEL --data gsm8k --rollouts URL    samples on a vLLM server

A step is roll_out, give_credit, update_policy. roll_out samples K episodes of each problem and rewards them
(--reward: 1 for a right box, else -1). give_credit compares each reward with the others of its problem, or of
its role (--credit, slm/credit.py): this is the advantage. update_policy makes sampled tokens more likely if
their advantage is positive, less likely if it is negative, and keeps the policy near the reference by a KL
penalty. ALGORITHMS below names the other kinds of advantage and loss; slm/losses.py has the formulas.

The policy is the model with a new LoRA adapter, or one for each of --roles; an SFT adapter is merged first.
The reference is the same model with the new adapter off. Sampling and loss use one distribution, so the ratio
between them is 1 at the start of each step; the metric dlogp shows how far rounding moves it. If an episode's
sampling fails, it has no reward and counts nowhere. Not covered: a value model, asynchronous rollouts, top-p
or top-k sampling.

What to watch: reward and solve rate rise, entropy falls slowly, kl grows slowly. The loss means little: its
value is near 0 by construction. Before the first step and ten times on the way the policy answers --evaluate
other problems greedily: of the test split, or if --data has none, of those read, a tenth at most.
"""

from slm.runs import cli

PAPER = {"lr": 5e-6, "batch": 16, "samples": 2, "kl": 0.05, "epochs": 1, "temperature": 0.7,
         "max_tokens": 2048, "micro_tokens": 2048, "warmup": 0.1, "save_every": 20, "steps": 0,
         "targets": "all", "evaluate": 64, "step_rule": "paragraph"}
TINY = {"lr": 3e-3, "batch": 16, "samples": 8, "kl": 0.0, "temperature": 1.0, "max_tokens": 200,
        "micro_tokens": 4096, "warmup": 0.05, "save_every": 1000, "steps": 16, "targets": "qkvo",
        "evaluate": 32, "step_rule": "line"}


def options():
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    g = p.add_argument_group("model and problems")
    g.add_argument("--model", default="tiny", help="tiny, a directory or a hub id (default tiny)")
    g.add_argument("--adapter", help="an SFT adapter's directory: merged into the model before the start")
    g.add_argument("--data", nargs="+", action=cli.Names, metavar="A,B",
                   help="problem sets or JSON lines files (default tiny; gsm8k for other models)")
    g.add_argument("--limit", type=cli.positive, help="only the first problems")
    cli.prompt_option(g)
    g.add_argument("--evaluate", type=lambda text: cli.positive(text, 0), metavar="N",
                   help=f"problems not trained on, answered ten times on the way ({both('evaluate')})")
    g.add_argument("--workflow", default="solver",
                   help="of agents.py (default solver: one answer); FILE.py:NAME is yours")
    g.add_argument("--roles", nargs="+", action=cli.Names, help="train only these roles (default all)")
    g.add_argument("--adapters", choices=("shared", "role"), default="shared",
                   help="one adapter for all roles, or one for each of --roles (default shared)")
    g = p.add_argument_group("sampling")
    g.add_argument("--batch", type=cli.positive, help=f"problems a step ({both('batch')})")
    g.add_argument("--samples", type=cli.positive, help=f"K, episodes a problem ({both('samples')})")
    g.add_argument("--temperature", type=cli.number(0.01), help=f"({both('temperature')})")
    g.add_argument("--max-tokens", type=cli.positive, help=f"new tokens of a reply ({both('max_tokens')})")
    g.add_argument("--rollouts", metavar="URL",
                   help="sample on a vLLM server that sees --out, such as http://localhost:8000/v1; "
                        "docs/rollouts.md tells how to start it")
    cli.step_option(g, both)
    g = p.add_argument_group("reward")
    g.add_argument("--reward", nargs="+", action=cli.Names, default=["correct"], metavar="PART:WEIGHT",
                   help="such as correct:1,format:0.2; slm/rewards.py has all parts (default correct:1)")
    g.add_argument("--no-box", type=cli.number(-1, 1), default=-1.0,
                   help="correct without a final box; the report's -0.5 pays for silence (default -1)")
    g.add_argument("--truncated", choices=("keep", "zero", "soft"),
                   help="a reply cut at --max-tokens is graded (default), earns 0, or is graded with the "
                        "part length (dapo's default)")
    g.add_argument("--judge", metavar="DIR", help="the verifier of the part judge: a model or an adapter")
    g = p.add_argument_group("objective")
    g.add_argument("--algorithm", default="grpo",
                   help="of the table ALGORITHMS (default grpo; another word lists them)")
    g.add_argument("--credit", choices=("episode", "role", "turn", "step"), default="episode",
                   help="what is rewarded and compared; slm/credit.py explains (default episode)")
    g.add_argument("--resample", type=lambda text: cli.positive(text, 0),
                   help="times that a problem solved always or never makes way (default 0; dapo 3)")
    g.add_argument("--teacher", metavar="DIR",
                   help="distill: a model with the same tokens (default the policy, shown a solution)")
    g.add_argument("--kl", type=cli.number(0), help=f"weight of the KL penalty ({both('kl')})")
    g.add_argument("--kl-kind", choices=("k1", "k2", "k3"), default="k3", help="its estimator (default k3)")
    g.add_argument("--updates", type=cli.positive, default=1, help="optimizer steps a batch (default 1)")
    g.add_argument("--importance-cap", type=cli.number(0),
                   help="weigh tokens by p(trainer) / p(sampler), at most this (default 2; float32 0: off)")
    g.add_argument("--dppo-mask", type=cli.number(0, 1),
                   help="drop tokens that are this far from p(sampler) (default .2; float32 0: off)")
    g = p.add_argument_group("optimization")
    g.add_argument("--lr", type=cli.number(0, 10), help=f"learning rate ({both('lr')})")
    g.add_argument("--steps", type=lambda text: cli.positive(text, 0),
                   help=f"batches in all, 0: as the epochs give ({both('steps')})")
    g.add_argument("--epochs", type=cli.positive, help=f"({both('epochs')})")
    cli.adapter_options(g, both)
    cli.training_options(p, g, both, "runs/grpo-<model>")
    return p


if __name__ == "__main__":
    args = options().parse_args()  # before the heavy imports, so that --help answers at once

import contextlib
import math
import random
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, pairwise
from operator import attrgetter, sub
from pathlib import Path
from statistics import fmean

import torch

from slm import BadInput, checkpoint, lora, losses, problems, prompts, rewards, training, workflows
from slm.credit import give_credit, mark_steps
from slm.episode import Episode, Reply, Sampling, TokenRecord, Turn, jobs_for, run_episodes, seed_of, user
from slm.formats import lora_files
from slm.grading import equal, grade
from slm.prompts import SHOWN, SOLVER
from slm.report import write as write_report
from slm.rewards import reward_of
from slm.rollouts import Rollouts
from slm.runs import files, ranks, stats
from slm.runs.device import parameter_counts, peak_memory
from slm.runs.forecast import memory
from slm.runs.rundir import CHECKPOINTS, RunDir, name_of
from slm.runs.steps import lines, shares, summary, tell, timed
from slm.sampling import Sampler
from slm.sandbox import Sandbox


@dataclass(frozen=True)
class Algorithm:
    advantage: Callable        # of losses.py: the rewards of a problem's episodes -> their advantages
    objective: Callable        # of losses.py: the loss of each token
    normalise: str             # a way that losses.token_weights knows
    samples: int = 1           # K, at least
    whole_batch: bool = False  # compare the rewards of all episodes, not those of a problem
    decay: float = 0.0         # of the moving mean of earlier steps, which is taken from rewards; 0: none is
    resample: int = 0          # --resample and --truncated if they are not given
    truncated: str = "keep"
    two_valued: bool = False   # a reward above 0 is right, any other is wrong
    taught: bool = False       # a teacher's log-probs of each token take the place of the advantage


CLIPPED = partial(losses.clipped, low=0.2, high=0.2)
ALGORITHMS = {  # with "constant", the gradient is the paper's divided by --max-tokens
    "grpo": Algorithm(losses.over_std, CLIPPED, "sequence", 2),
    "dr_grpo": Algorithm(losses.minus_mean, CLIPPED, "constant", 2),
    "dapo": Algorithm(losses.over_std, partial(losses.clipped, low=0.2, high=0.28), "token", 2, resample=3,
                      truncated="soft"),
    "gspo": Algorithm(losses.over_std, partial(losses.sequence_clipped, low=3e-4, high=4e-4), "sequence", 2),
    "gmpo": Algorithm(losses.over_std, partial(losses.geometric, width=0.4), "sequence", 2),
    "cispo": Algorithm(losses.over_std, partial(losses.cispo, low=1, high=4), "token", 2),
    "max_rl": Algorithm(losses.max_rl, CLIPPED, "constant", 2, two_valued=True),
    "pass_at_k": Algorithm(partial(losses.pass_at_k, k=4), CLIPPED, "sequence", 5, two_valued=True),
    "rloo": Algorithm(losses.leave_one_out, losses.reinforce, "constant", 2),
    "reinforce": Algorithm(losses.raw, losses.reinforce, "constant", decay=0.9),
    "report": Algorithm(losses.raw, losses.reinforce, "constant"),  # the formula as the report writes it
    "report_code": Algorithm(losses.over_std, losses.reinforce, "sequence", whole_batch=True),  # as it ran
    "distill": Algorithm(losses.raw, losses.distill, "token", taught=True),
}


def main(args):
    """Settle all that the steps need, then take them; with --dry-run two, to say what all would take."""
    cli.resolve(args, PAPER, TINY)
    args.data = args.data or ["tiny" if cli.is_small(args.model) else "gsm8k"]
    algorithm, workflow = checked(args)
    device, dtype, words = training.settle(args, f"grpo-{name_of(args.model).lower()}")
    rounds = dtype == torch.bfloat16 or args.rollouts  # sampler and trainer differ by more than last digits
    cli.resolve(args, {"resample": algorithm.resample, "truncated": algorithm.truncated,
                       "importance_cap": 2.0 if rounds else 0.0, "dppo_mask": 0.2 if rounds else 0.0}, {})
    pool, held_out = split(problems.load_all(args.data, "train", args.limit), args)
    said = check_rewards(pool, args)
    with contextlib.ExitStack() as stack:
        out = args.out
        if args.dry_run:  # a folder for what two steps leave behind, the same one for all ranks
            out = ranks.gather([stack.enter_context(tempfile.TemporaryDirectory())])[0]
        claim = partial(RunDir, settings=vars(args), data=problems.fingerprint(pool + held_out),
                        resume=args.resume and not args.dry_run, log=ranks.rank() == 0)
        policy, tokenizer, base, rundir = prepare(Path(out), claim, device, dtype, args)
        pool = fitting(pool, tokenizer, policy.config.positions)
        epochs = max(args.epochs, math.ceil(args.steps * args.batch / len(pool)))
        plan = training.batches(len(pool), args.batch, epochs, args.seed)[:args.steps or None]
        trained, optimizer = training.start(policy, weight_decay=0.0)
        sampler = Sampler(policy, tokenizer)
        if args.rollouts:
            sampler = Rollouts(policy, tokenizer, args.rollouts, rundir.path / "rollouts")
        if args.adapters == "role":  # a role without an adapter is the reference
            stack.enter_context(lora.off(policy))
        if ranks.rank() == 0:
            introduce(policy, sampler, base, pool, held_out, plan, words, args)
            print(said)
        sandbox = None if args.workflow == "solver" else stack.enter_context(Sandbox())
        judge = args.judge and Sampler(*checkpoint.load(args.judge, device, dtype))
        sample = partial(roll_out, policy=policy, workflow=workflow, sampler=sampler, sandbox=sandbox,
                         args=args, judge=judge)
        look = partial(evaluate, held_out, workflow, policy, sampler, sandbox, args) if held_out else None
        ask = algorithm.taught and partial(ask_teacher, teacher_for(policy, tokenizer, device, dtype, args),
                                           policy, tokenizer, args=args)
        taken = plan[:2] if args.dry_run else plan
        train(policy, pool, taken, sample, ask, look, sampler, algorithm, rundir, trained, optimizer, args)
        if not args.dry_run:
            return finish(policy, base, rundir.path, args.workflow)
        fill(policy, len(tokenizer.chat([user(SOLVER(question=pool[0].question))])), args)
        if ranks.rank() == 0:
            forecast(policy, list(files.readable_rows(rundir.path / "metrics.jsonl")), plan, args)


def train(policy, pool, plan, sample, ask, look, sampler, algorithm, rundir, trained, optimizer, args):
    """Take the steps of the plan, each a list of places in pool. sample is roll_out for this policy; ask is
    ask_teacher and look the evaluation, where there is one."""
    moving = {"sum": 0.0, "steps": 0.0}
    for step, lr, bar in training.steps(len(plan), rundir, trained, optimizer, args, moving, look):
        batch, seconds = [pool[i] for i in plan[step]], Counter()
        spare = spare_problems(pool, plan[step], step, args)
        known = {p.id: p for p in (*batch, *spare)}
        episodes, replaced = sample(batch, spare, step, seconds=seconds)
        with timed(seconds, "score"):
            records, divisor = give_credit(episodes, algorithm, moving, args)
            if ask:
                ask(batch, episodes, records)
        with timed(seconds, "learn"):
            learned = drift(policy, episodes, records, args)
            learned |= update_policy(policy, records, divisor, optimizer, lr, algorithm, args)
        with timed(seconds, "evaluate"):
            learned |= look() if look and training.look_due(step, len(plan)) else {}
        learned |= sampler.told if args.rollouts else {}
        told = lines(step + 1, episodes, records, known, sampler.tokenizer)
        row = {"step": step + 1, **summary(told), **learned, "lr": lr,
               "replaced": int(ranks.summed({"n": len(replaced)})["n"]) // args.samples,
               **shares(seconds, episodes + replaced), "memory": round(peak_memory(policy), 3)}
        rundir.log("metrics", row)
        rundir.log("episodes", *told)
        if args.resample:
            rundir.log("discarded", *lines(step + 1, replaced, [[]] * len(replaced), known,
                                           sampler.tokenizer))
        tell(bar, row)


# ---- a step: roll out ------------------------------------------------------------------------------------

def roll_out(batch, spare, step, policy, workflow, sampler, sandbox, seconds, args, judge=None):
    """Sample K episodes of each problem of `batch` and reward them -> this rank's episodes, those replaced.

    Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): a problem whose episodes are all right or all wrong has
    nothing to compare. Up to --resample times, one of `spare` takes its place in `batch`, and what it sampled
    is replaced. Which one depends on seed and step alone."""
    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, step_rule=args.step_rule)
    bar = None if cli.is_small(args.model) else f"step {step + 1}"
    rules = rewards.rules_of(args, step)
    wanted, groups, replaced = range(ranks.rank(), len(batch), ranks.world()), {}, []
    with ranks.whole(policy):
        if isinstance(sampler, Rollouts):
            with timed(seconds, "generate"):
                sampler.refresh(args.temperature)
        for turn in range(args.resample + 1):
            jobs = [j for j in jobs_for(batch, workflow, args.samples) if j.group in wanted]
            with timed(seconds, "generate"):
                episodes = run_episodes(jobs, sampler, sandbox, sampling=sampling, fixed=True, bar=bar,
                                        seed=seed_of(args.seed, "grpo", step), adapters=by_role(policy))
            with timed(seconds, "score"):
                if args.credit == "step":
                    mark_steps(episodes, batch, sampler.tokenizer, judge, args)
                for episode in episodes:
                    episode.reward, episode.reason = reward_of(episode, batch[episode.group], rules)
            for group in wanted:
                groups[group] = [e for e in episodes if e.group == group]
            following = spare[turn * len(batch):(turn + 1) * len(batch)]
            wanted = [group for group in wanted if group < len(following) and even(groups[group])]
            for group in wanted:
                batch[group] = following[group]
                replaced += groups[group]
            if not wanted:
                break
        sampler.close()  # gives the cache's memory back, and no step depends on an earlier one's cache
    return list(chain.from_iterable(groups.values())), replaced


def even(episodes: list[Episode]) -> bool:
    """Whether all are right, or all wrong. Those without a reward don't count."""
    return len({e.solved for e in episodes if e.reward is not None}) < 2


def spare_problems(pool, chosen: list[int], step: int, args) -> list:
    """Problems outside the step's own that may take their places: --resample of them for each."""
    others = sorted(set(range(len(pool))) - set(chosen))
    count = min(len(others), args.resample * len(chosen))
    return [pool[i] for i in random.Random(f"{args.seed}/{step}/spare").sample(others, count)]


# ---- a step: give credit (slm/credit.py), or ask a teacher ----------------------------------------------

def teacher_for(policy, tokenizer, device, dtype, args):
    """The model that judges tokens: --teacher, else the policy itself."""
    if not args.teacher:
        return policy
    teacher, other = checkpoint.load(args.teacher, device, dtype)
    if other.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise BadInput(f"--teacher {args.teacher}: its tokens are not those of --model {args.model}")
    return teacher


def ask_teacher(teacher, policy, tokenizer, batch, episodes, records, args) -> None:
    """Give every record the teacher's log-probs, and as advantages teacher - sampler. A policy that teaches
    itself is shown the worked solution, or the right box (SDFT, arXiv 2601.19897)."""
    seen = []  # (record, ids and mask as the teacher sees them)
    shown = {}  # number of each problem -> the policy's prompt as its own teacher
    for group, problem in enumerate(batch if teacher is policy else ()):
        solution = problem.solution or f"\\boxed{{{problem.gold}}}"
        shown[group] = tokenizer.chat([user(SHOWN(question=problem.question, solution=solution))])
    for episode, own in zip(episodes, records):
        for record in own:
            start = record.mask.index(1)
            prompt = shown[episode.group] if shown else record.ids[:start]
            seen.append((record, prompt + record.ids[start:], [0] * len(prompt) + record.mask[start:]))
    with torch.no_grad(), ranks.whole(teacher):
        parts = losses.pack_for(teacher, [ids for _, ids, _ in seen], [mask for *_, mask in seen],
                                args.micro_tokens)
        for part in parts:
            owners, ids, masks = zip(*[seen[i] for i in part])
            logp, _ = losses.score(teacher, ids, masks, args.temperature)
            for record, found in zip(owners, logp.split([sum(mask) for mask in masks])):
                record.teacher = found.tolist()
                record.advantage = list(map(sub, record.teacher, compress(record.logprobs, record.mask)))


# ---- a step: update the policy ---------------------------------------------------------------------------

def update_policy(policy, records, divisor: int, optimizer, lr: float, algorithm: Algorithm, args) -> dict:
    """--updates optimizer steps on each episode's records; returns what metrics.jsonl tells, over all ranks.

    Without a KL penalty, a record whose advantages are 0 has no gradient. It is left out of the work, but its
    tokens stay in the divisor."""
    active = [record for own in records for record in own if any(record.advantage) or args.kl > 0]
    if not ranks.summed({"active": len(active)})["active"]:
        return {}
    for _ in range(args.updates):
        sums, tops = {}, [(0.0, 0.0)]
        for members in training.micro_batches(policy, active, args.micro_tokens):
            total, part, top = micro_batch_loss(policy, members, algorithm, args)
            (total / divisor).backward()
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
            tops.append(top)
        norm = training.update(optimizer, lr, args.clip)
    sums = ranks.summed(sums)
    loss, tokens = sums.pop("loss") / divisor, sums.pop("tokens")
    gaps, weights = zip(*ranks.gather(tops))
    return {"loss": loss, **{name: value / tokens for name, value in sums.items()}, "dlogp_max": max(gaps),
            "importance_max": max(weights), "grad_norm": norm, "learned_tokens": int(tokens)}


def micro_batch_loss(policy, records: list[TokenRecord], algorithm: Algorithm, args):
    """(sum to differentiate, {its parts for the log, as sums}, (largest |dlogp|, largest importance weight)).

    A token has three log-probs: `sampled`, the sampler's; `old`, this trainer's at the start of the step,
    which the first update computes on its way; logp, now. The ratio is logp against old, so clipping sees
    what the updates did and not how the sampler rounds. That the sampler drew the tokens is corrected alike
    for objectives with and without a ratio: the gradient of each token's log-prob is multiplied by
    losses.trust. The KL penalty is left as it is."""
    lengths = [sum(r.mask) for r in records]
    logp, entropy = score(policy, records, args)
    for record, own in zip(records, logp.detach().split(lengths)):
        record.old = record.old or own.tolist()

    def flat(rows: Iterable) -> torch.Tensor:
        return torch.tensor(list(chain.from_iterable(rows)), device=logp.device)

    sampled, old = flat(compress(r.logprobs, r.mask) for r in records), flat(r.old for r in records)
    advantage, weight = flat(r.teacher or r.advantage for r in records), flat(r.weight for r in records)
    sequence = torch.arange(len(records)).repeat_interleave(torch.tensor(lengths)).to(logp.device)

    loss = algorithm.objective(logp, old, advantage, sequence) * weight
    slope, = torch.autograd.grad(loss.sum(), logp)  # of the loss in each token's log-prob
    trust = losses.trust(logp.detach(), old, sampled, -slope, args.importance_cap, args.dppo_mask)
    penalty = torch.zeros_like(weight)
    if args.kl > 0:
        with torch.no_grad():
            reference, _ = score(policy, records, args, reference=True)
        penalty = losses.kl(logp, reference, args.kl_kind)
    total = (slope * trust * logp + args.kl * penalty * weight).sum()
    gap, importance = (old - sampled).abs(), losses.ratio(old, sampled)
    sums = {"loss": (loss + args.kl * penalty * weight).detach().sum(), "entropy": entropy.sum(),
            "dlogp": gap.sum(), "clipped": ((slope == 0) & (loss != 0)).sum(), "importance": importance.sum(),
            "cut": (trust != (importance if args.importance_cap else 1)).sum(), "tokens": len(logp)}
    top = max(gap.tolist(), default=0.0), max(importance.tolist(), default=0.0)
    return total, {name: float(value) for name, value in sums.items()}, top


def score(policy, records: list[TokenRecord], args, reference: bool = False):
    """losses.score of these records, each by its role's adapter, or all by the reference."""
    names = lora.names(policy)
    rows = [(r.role if r.role in names else names[0], len(r.ids)) for r in records]
    rows += [(name, 0) for name in names]  # each takes part, so that all ranks have the same gradients
    with lora.use(policy, None if reference else rows):
        return losses.score(policy, [r.ids for r in records], [r.mask for r in records], args.temperature)


def drift(policy, episodes, records, args) -> dict:
    """Estimate KL(policy || reference), in nats a token by k3, before the step changes the policy: on the
    first sample of the first eight problems, however many ranks there are."""
    some = [record for e, own in zip(episodes, records) if e.group < 8 and e.sample == 0 for record in own]
    found = []
    with torch.no_grad(), ranks.whole(policy):
        for record in some:
            logp, _ = score(policy, [record], args)
            reference, _ = score(policy, [record], args, reference=True)
            found += losses.kl(logp, reference).tolist()
    found = ranks.gather(found)
    return {"kl": fmean(found)} if found else {}


# ---- on the way: problems that are not trained -----------------------------------------------------------

def split(pool, args) -> tuple[list, list]:
    """(problems to train on, at most --evaluate others: of the test splits where all of --data have one)."""
    splits = problems.SOURCES | {"tiny": ("train", "test")}
    if args.evaluate and all("test" in splits.get(name, ()) for name in args.data):
        others = problems.load_all(args.data, "test")
        return pool, random.Random("held out").sample(others, min(args.evaluate, len(others)))
    return training.hold_out(pool, attrgetter("question"), args.evaluate, args.seed)


def evaluate(held_out, workflow, policy, sampler, sandbox, args) -> dict:
    """The share of held-out problems solved greedily, as eval.py counts it, and its 95 % interval."""
    own = held_out[ranks.rank()::ranks.world()]
    sampling = Sampling(args.max_tokens, stop_at_box=True, step_rule=args.step_rule)
    with ranks.whole(policy):
        if isinstance(sampler, Rollouts):
            sampler.refresh(args.temperature)
        episodes = run_episodes(jobs_for(own, workflow), sampler, sandbox, sampling=sampling, seed=args.seed,
                                adapters=by_role(policy))
        sampler.close()
    right = ranks.gather([grade(e.response, p.gold).correct for e, p in zip(episodes, own)])
    low, high = stats.wilson(sum(right), len(right))
    return {"evaluated": fmean(right), "evaluated_low": low, "evaluated_high": high}


# ---- before the first step -------------------------------------------------------------------------------

def checked(args):
    """(algorithm, workflow). BadInput for what this script can't train, before a run directory is claimed."""
    for folder in (args.model, args.adapter, args.teacher, args.judge):
        if folder and not args.resume:
            checkpoint.resolve(folder)
    workflow = workflows.workflow(args.workflow)
    workflows.refuse_roles("--roles", args.roles or (), args.workflow)
    if args.adapters == "role" and not args.roles:
        raise BadInput("--adapters role: no --roles; expected those that get an adapter")
    algorithm = ALGORITHMS.get(args.algorithm)
    if algorithm is None:
        raise BadInput(f"--algorithm {args.algorithm}: no such objective; there are {', '.join(ALGORITHMS)}")
    least = max(algorithm.samples, 2 if args.resample else 1)
    if args.samples < least:
        raise BadInput(f"--samples {args.samples}: {'--resample' if args.resample else args.algorithm} "
                       f"compares a problem's samples and needs {least} or more")
    paid = [part for part, weight in rewards.rules_of(args).weights.items() if weight]
    if ("judge" in paid) != bool(args.judge) or (args.judge and args.credit != "step"):
        raise BadInput(f"--judge {args.judge}, --credit {args.credit}, --reward {','.join(paid)}: the part "
                       "judge needs --judge and --credit step, and --judge needs that part")
    if algorithm.two_valued and len(paid) > 1:
        raise BadInput(f"--reward {','.join(paid)}: {args.algorithm} knows only right (more than 0) and "
                       "wrong; expected one part, and the weight 0 for others")
    if args.teacher and not algorithm.taught:
        raise BadInput(f"--teacher {args.teacher}: only distill has one, not --algorithm {args.algorithm}")
    if algorithm.taught and not args.teacher and (args.workflow, args.adapters) != ("solver", "shared"):
        raise BadInput(f"--workflow {args.workflow} --adapters {args.adapters}: distill without --teacher is "
                       "for the solver with a shared adapter only")
    return algorithm, workflow


def check_rewards(pool, args) -> str:
    """What the grader and the rules make of texts whose worth is known, for a person to read. BadInput where
    training could not help: gold answers are refused, or a hack pays as much as a right answer."""
    some, rules, accepted = pool[:50], rewards.rules_of(args), []
    for spelling in ("{}", "$ \\; {} $.", "\\mathbf{{{}}}"):  # text that can't be read equals only itself
        dressed = [f"So \\boxed{{{spelling.format(p.gold)}}}, I think." for p in some]
        right = [grade(text, p.gold, strict=True).correct for text, p in zip(dressed, some)]
        if sum(right) < 0.9 * len(some):
            bad = some[right.index(False)]
            raise BadInput(f"{bad.id}: the grader does not accept the gold answer {bad.gold!r} as "
                           f"{spelling.format(bad.gold)!r}; expected a number or a formula")
        accepted.append(str(sum(right)))
    problem = next((p for p in some if p.gold.isdecimal()), some[0])
    wrong = "42.5" if equal("41.5", problem.gold) else "41.5"
    paid = {}
    for name, text in rewards.samples(problem.question, problem.gold, wrong).items():
        turn = Turn("solver", [user(SOLVER(question=problem.question))], Reply(text, [0]))
        paid[name], _ = rewards.reward_of(Episode(problem.id, turns=[turn], response=text), problem, rules)
    right = paid.pop("right")
    worst = max(paid, key=paid.get)
    told = (f"a right answer earns {right:g}, {len(paid)} wrong texts at most {paid[worst]:g} "
            f"({worst})")
    if any(weight and (part in ("random", "judge") or ":" in part)
           for part, weight in rules.weights.items()):
        told = "a coin, a verifier or a function of yours decides what a wrong text earns"
    elif paid[worst] >= right:
        raise BadInput(f"--reward {','.join(rules.weights)}: {told}; give the part correct more weight")
    others = sum(equal(p.gold, q.gold) for p, q in pairwise(some))
    return (f"reward check: the grader takes {'/'.join(accepted)} of {len(some)} gold answers, written in 3 "
            f"ways, and {others} of them for the next problem's; {told}; a reply cut short "
            f"{rewards.TRUNCATED[args.truncated]}")


def prepare(out, claim, device, dtype, args):
    """(policy, tokenizer, base, the run directory that `claim` gives). The base is --model, with an SFT
    adapter merged in float32 if there is one: then it is kept in <run>/base, because the new adapter belongs
    to it. An adapter of another model is refused before the claim. The policy is the base with a new adapter;
    the reference is the base. A run that goes on without a checkpoint merges again: so it makes the same
    random draws before the new adapter's."""
    merged = args.adapter or checkpoint.is_adapter(checkpoint.resolve(args.model))
    if merged and args.rollouts:
        raise BadInput(f"--rollouts: the server can't know {args.adapter or args.model} merged into its "
                       "model; python -m slm.checkpoint export RUN DIR, serve DIR, and give --model DIR")
    base = str((out / "base").resolve()) if merged else args.model
    made = merged and not (args.resume and any(out.glob(CHECKPOINTS)))
    if made:
        model, tokenizer = checkpoint.load(args.model, device, torch.float32)
        if args.adapter:
            lora_files.load(model, checkpoint.resolve(args.adapter), "sft")
        for adapter in list(lora.names(model)):
            gap = lora.merge(model, adapter)
            lora.remove(model, adapter)
            if ranks.rank() == 0:
                print(f"merged {args.adapter or args.model} in float32 (logits change by at most "
                      f"{gap:.1e}); a new adapter starts on top, and the reference is the merged model")
    rundir = claim(out)
    if made:
        if ranks.rank() == 0:
            checkpoint.save(model.to(dtype), tokenizer, out / "base")
        ranks.barrier()
    policy, tokenizer = checkpoint.load(base, device, dtype)
    policy.recompute = lora.recompute(policy) if args.recompute else None
    for name in args.roles if args.adapters == "role" else ["default"]:
        lora.add(policy, args.rank, args.alpha, cli.TARGETS[args.targets], name=name)
    return policy, tokenizer, base, rundir


def by_role(policy) -> dict[str, str]:
    """Role -> adapter, for the roles with one of their own, which has the same name."""
    return {name: name for name in lora.names(policy)}


def fitting(pool, tokenizer, context: int) -> list:
    """The problems whose prompt leaves room for an answer. Prints how many don't; BadInput when none does."""
    sizes = [len(tokenizer.chat([user(SOLVER(question=p.question))])) for p in pool]
    fit = [p for p, size in zip(pool, sizes) if size < context - 32]
    if not fit:
        raise BadInput(f"every prompt is too long: {min(sizes)} tokens or more of {context}")
    if len(fit) < len(pool):
        print(f"left out: {len(pool) - len(fit)} of {len(pool)} prompts are too long for {context} tokens")
    return fit


# ---- what a person reads ---------------------------------------------------------------------------------

def introduce(policy, sampler, base: str, pool, held_out, plan, device: str, args):
    """Print what the run will do, before it starts."""
    parameters, updated = parameter_counts(policy)
    prompt, tokenizer = [user(SOLVER(question=pool[plan[0][0]].question))], sampler.tokenizer
    cached = args.batch * args.samples * (len(tokenizer.chat(prompt)) + args.max_tokens)
    cached = 0 if args.rollouts else min(cached, sampler.slots.max_tokens)
    cli.show(vars(args))
    print(f"device: {device}")
    each = f" for each of {', '.join(args.roles)}" if args.adapters == "role" else ""
    print(f"policy: {base} with a new LoRA of rank {args.rank} on {args.targets}{each}, {parameters:,} "
          f"parameters, {updated:,} trained; reference: the same with the adapter off")
    print(f"work: {cli.count(len(plan), 'step')} of {cli.count(args.batch, 'problem')} x "
          f"{cli.count(args.samples, 'sample')}, at most {args.batch * args.samples * args.max_tokens:,} new "
          f"tokens a step; held out: {cli.count(len(held_out), 'problem')}; "
          f"{memory(policy, args.micro_tokens, cached)}")
    print("the solver's prompt for the first problem:\n" + tokenizer.render(prompt))


def fill(policy, prompt: int, args) -> None:
    """Forward and backward pass of the largest micro-batch that a step may have. Two steps need not meet one,
    and its memory counts. prompt: tokens of one."""
    most = min(args.micro_tokens, args.batch * args.samples * (prompt + args.max_tokens))
    length = min(policy.config.positions, prompt + args.max_tokens)
    records = []
    for size in [length] * (most // length) + [most % length] * (most % length > 1):
        values = [1.0] * (size - 1)
        records.append(TokenRecord([0] * size, [0] + [1] * (size - 1), [0.0] * size, values, values))
    total, *_ = micro_batch_loss(policy, records, ALGORITHMS[args.algorithm], args)
    total.backward()


def forecast(policy, rows: list[dict], plan: list[list[int]], args) -> None:
    """Say what --dry-run found. rows: the metrics of the plan's first two steps, both evaluated. Replies keep
    their length in both; a token takes as long as in the second, as the first paid for caches."""
    rows = [row for row in rows if row["step"]]
    length = sum(row["mean_tokens"] for row in rows) / len(rows)
    taken = [len(step) + row["replaced"] for step, row in zip(plan, rows)]  # problems, with those replaced
    tokens = sum(map(len, plan)) * sum(taken) / sum(map(len, plan[:2])) * args.samples * length
    look = rows[-1]["seconds"] * rows[-1]["evaluate_share"]
    token = (rows[-1]["seconds"] - look) / max(1, taken[-1] * args.samples * rows[-1]["mean_tokens"])
    training.forecast(policy, len(plan), round(tokens), tokens * token, look,
                      f" while replies have {length:.0f} tokens, as now")


def finish(policy, base: str, out, workflow: str):
    """Write the adapter, or a folder for each role's, with a report, and print what to do with it."""
    ranks.unshard(policy)
    if ranks.rank() == 0:
        folders = {name: out / "adapter" / ("" if name == "default" else name) for name in lora.names(policy)}
        for name, folder in folders.items():
            lora_files.save(policy, folder, name, base)
        write_report(out)
        if not any(row.get("with_advantage") for row in files.readable_rows(out / "metrics.jsonl")):
            print("nothing was learned: in no step did the samples of a problem differ in reward, or the "
                  "--roles never spoke; episodes.jsonl shows what was said")
        words = ["--model", str(out / "adapter")]
        if "default" not in folders:  # one for each role
            words = ["--model", base, "--workflow", workflow]
            for role, folder in folders.items():
                words += ["--adapter", f"{role}={folder}"]
        print(f"peak memory {peak_memory(policy):.1f} GB; the result is {out / 'adapter'}\n"
              f"curves and samples: {out / 'report.html'}\nnext: python eval.py {shlex.join(words)}"
              f"{prompts.option()}")
    ranks.barrier()


if __name__ == "__main__":
    cli.run(main, args, stopped=write_report)
