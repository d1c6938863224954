"""Stage 3: reinforcement learning from checked answers (GRPO and its relatives), single turn or through a
workflow.

    python train_grpo.py                                             the built-in model, minutes
    python train_grpo.py --adapter runs/sft-tiny-lora/adapter        from the fine-tuned adapter
    python train_grpo.py --workflow python_tools --adapter ...       trains what agents.py runs
    python train_grpo.py --model Qwen/Qwen2.5-Math-1.5B --adapter DIR --data gsm8k

A step is roll_out, then update_policy. roll_out samples K episodes of each problem of a batch, gives +1 for a
right final box and -1 for anything else, and compares each reward with the others of the same problem: this
is the episode's advantage. update_policy makes the sampled tokens more likely where the advantage is positive
and less likely where it is negative, and keeps the policy near the reference by a KL penalty.

The policy is the model with a new LoRA adapter. The reference, the model before this run, is the same model
with the adapter off. An SFT adapter is merged first. Sampling and loss use one distribution, so the ratio
between them is 1 at the start of each step; the metric dlogp shows how far rounding moves it. An episode
whose sampling failed has no reward and counts nowhere.

What to watch: reward and solve rate rise, entropy falls slowly, kl (with --kl) grows slowly. The loss means
little: its value is near 0 by construction. Not covered: a value model, asynchronous rollouts, top-p or
top-k in sampling (the loss would be another).
"""

from dataclasses import dataclass

from slm.runs import cli

PAPER = {"lr": 5e-6, "batch": 16, "samples": 2, "kl": 0.05, "epochs": 1, "temperature": 0.7,
         "max_tokens": 2048, "micro_tokens": 2048, "warmup": 0.1, "save_every": 20, "steps": 0}
TINY = {"lr": 3e-3, "batch": 16, "samples": 8, "kl": 0.0, "temperature": 1.0, "max_tokens": 200,
        "micro_tokens": 4096, "warmup": 0.05, "save_every": 1000, "steps": 16}


@dataclass(frozen=True)
class Algorithm:
    advantage: str  # a kind that losses.advantages knows
    ratio: str      # token, sequence or none: between the policy now and when it sampled
    low: float      # the ratio is clipped to 1 - low ... 1 + high
    high: float
    normalise: str  # a way that losses.token_weights knows


ALGORITHMS = {
    "grpo": Algorithm("std", "token", 0.2, 0.2, "sequence"),
    "dr_grpo": Algorithm("mean", "token", 0.2, 0.2, "constant"),
    "dapo": Algorithm("std", "token", 0.2, 0.28, "token"),
    "gspo": Algorithm("std", "sequence", 3e-4, 4e-4, "sequence"),
    "rloo": Algorithm("loo", "none", 0, 0, "constant"),  # the paper's gradient / --max-tokens
    "report": Algorithm("batch", "none", 0, 0, "sequence"),
}


def options():
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    g = p.add_argument_group("model and problems")
    g.add_argument("--model", default="tiny", help="tiny, a directory or a hub id (default tiny)")
    g.add_argument("--adapter", help="an SFT adapter's directory: merged into the model before the start")
    g.add_argument("--data", nargs="+", action=cli.Names, metavar="A,B",
                   help="problem sets or JSON lines files (default tiny; gsm8k for other models)")
    g.add_argument("--limit", type=cli.positive, help="only the first problems")
    g.add_argument("--workflow", default="solver", help="of agents.py (default solver: one answer)")
    g.add_argument("--roles", nargs="+", action=cli.Names, help="train only these roles (default all)")
    g = p.add_argument_group("sampling")
    g.add_argument("--batch", type=cli.positive, help=f"problems a step ({both('batch')})")
    g.add_argument("--samples", type=cli.positive, help=f"K, episodes a problem ({both('samples')})")
    g.add_argument("--temperature", type=cli.number(0.01), help=f"({both('temperature')})")
    g.add_argument("--max-tokens", type=cli.positive, help=f"new tokens of a reply ({both('max_tokens')})")
    g.add_argument("--no-box", type=cli.number(-1, 1), default=-1.0,
                   help="reward without a final box; the report's -0.5 pays for silence (default -1)")
    g = p.add_argument_group("objective")
    g.add_argument("--algorithm", choices=ALGORITHMS, default="grpo",
                   help="(default grpo; losses.py names the papers)")
    g.add_argument("--kl", type=cli.number(0), help=f"weight of the KL penalty ({both('kl')})")
    g.add_argument("--kl-kind", choices=("k1", "k2", "k3"), default="k3", help="its estimator (default k3)")
    g.add_argument("--updates", type=cli.positive, default=1, help="optimizer steps a batch (default 1)")
    g = p.add_argument_group("optimization")
    g.add_argument("--lr", type=cli.number(0, 10), help=f"learning rate ({both('lr')})")
    g.add_argument("--steps", type=lambda text: cli.positive(text, 0),
                   help=f"batches in all, 0: as the epochs give ({both('steps')})")
    g.add_argument("--epochs", type=cli.positive, help=f"({both('epochs')})")
    cli.adapter_options(g)
    cli.training_options(p, g, both, "runs/grpo-<model>")
    return p


if __name__ == "__main__":
    args = options().parse_args()  # before the heavy imports, so that --help answers at once

import contextlib
import shlex
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from slm import BadInput, checkpoint, lora, losses, problems, report, training, workflows
from slm.episode import Episode, Sampling, TokenRecord, jobs_for, run_episodes, seed_of, user
from slm.grading import grade
from slm.prompts import SOLVER
from slm.runs import ranks
from slm.runs.device import memory, parameter_counts, peak_memory, pick_device
from slm.runs.files import readable_rows
from slm.runs.rundir import RunDir, new_path, settled
from slm.sampling import Sampler
from slm.sandbox import Sandbox


def main(args):
    cli.resolve(args, PAPER, TINY)
    algorithm, workflow = checked(args)
    out = new_path(args.out, f"grpo-{cli.model_name(args.model)}", args.resume)
    device, dtype, reason = pick_device(args.device, settled(out, args), args.model)
    args.data = args.data or ["tiny" if cli.is_small(args.model) else "gsm8k"]
    args.out, args.dtype = str(out), str(dtype).removeprefix("torch.")  # all settings are resolved now
    ranks.start_ranks(device)
    torch.manual_seed(args.seed)  # the adapter's initial values
    pool = problems.load_all(args.data, "train", args.limit)
    check_rewards(pool)
    rundir = RunDir(out, vars(args), problems.fingerprint(pool), args.resume, log=ranks.rank() == 0)
    policy, tokenizer, base = prepare(out, device, dtype, args)
    pool = fitting(pool, tokenizer, policy.config.positions)
    plan = batches(len(pool), args)
    if ranks.rank() == 0:
        cli.show(vars(args))
        introduce(policy, tokenizer, base, pool, plan, f"{device}, {args.dtype} ({reason})", args)

    trained, optimizer = training.start(policy, weight_decay=0.0)
    sampler = Sampler(policy, tokenizer)
    with contextlib.nullcontext() if args.workflow == "solver" else Sandbox() as sandbox:
        for step, lr, bar in training.steps(len(plan), rundir, trained, optimizer, args):
            batch, clock = [pool[i] for i in plan[step]], [time.perf_counter()]
            rollout = roll_out(batch, step, policy, workflow, sampler, sandbox, algorithm, clock, args)
            learned = update_policy(rollout, policy, optimizer, lr, algorithm, args)
            clock.append(time.perf_counter())
            row = {"step": step + 1, **summary(rollout.episodes), **learned, "lr": lr,
                   **shares(clock, rollout.episodes)}
            rundir.log("metrics", row)
            rundir.log("episodes", *lines(step + 1, rollout))
            bar.set_postfix_str(f"reward {row['reward']:+.2f}, solved {row['solved']:.0%}, "
                                f"{row['mean_tokens']:.0f} tokens, {row['tokens_per_s']:,} tok/s")
    finish(policy, base, out, args)


# ---- a step: roll out ------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """What this rank sampled in one step."""
    episodes: list[Episode]
    records: list[list[TokenRecord]]  # of each episode, with advantage and weight; none without a reward
    divisor: int                      # of the loss, over all ranks


def roll_out(batch, step, policy, workflow, sampler, sandbox, algorithm, clock, args) -> Rollout:
    """Sample K episodes of each problem, reward them, and compare each with the others of its problem.
    `clock` gets the times when the sampling and the rest was done."""
    mine = batch[ranks.rank()::ranks.world()]
    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, stop_at_box=False)
    bar = None if cli.is_small(args.model) else f"step {step + 1}"
    with ranks.whole(policy):
        episodes = run_episodes(jobs_for(mine, workflow, args.samples), sampler, sandbox, sampling=sampling,
                                seed=seed_of(args.seed, "grpo", step), fixed=True, bar=bar)
        sampler.close()  # gives the cache's memory back, and no step depends on an earlier one's cache
    clock.append(time.perf_counter())
    for episode in episodes:
        episode.reward, episode.reason = reward_of(episode, mine[episode.group].gold, args.no_box)
    records = [[] if e.reward is None else e.records(args.roles) for e in episodes]
    divisor = give_credit(episodes, records, algorithm, args.max_tokens)
    clock.append(time.perf_counter())
    return Rollout(episodes, records, divisor)


def reward_of(episode: Episode, gold: str, no_box: float) -> tuple[float | None, str]:
    """Reward and reason: +1 for a right answer in a box, -1 for a wrong one, `no_box` for none, None when the
    sampling failed."""
    broken = next((turn.reply.error for turn in episode.turns if turn.reply.error), None)
    if broken or not episode.turns:
        return None, f"failed: {broken or episode.error}"
    result = grade(episode.response, gold, strict=True)
    if result.answer is None:
        return no_box, "no box"
    return (1.0 if result.correct else -1.0), result.reason


def give_credit(episodes, records, algorithm: Algorithm, max_tokens: int) -> int:
    """Fill in the advantage and weight of every record; returns the divisor of the loss. What counts are the
    episodes of all ranks that have a reward."""
    rewarded = [(e, own) for e, own in zip(episodes, records) if e.reward is not None]
    everyone = ranks.gather([(ranks.rank(), e.group * ranks.world() + ranks.rank(), e.reward, length(own))
                             for e, own in rewarded])
    if not everyone:
        return 1
    owners, groups, rewards, lengths = zip(*everyone)
    advantages = losses.advantages(torch.tensor(rewards), torch.tensor(groups), algorithm.advantage).tolist()
    weights, divisor = losses.token_weights(torch.tensor(lengths), algorithm.normalise, max_tokens)
    first = owners.index(ranks.rank()) if rewarded else 0
    for i, (_, own) in enumerate(rewarded, first):
        for record in own:
            record.advantage, record.weight = advantages[i], weights[i].item()
    return max(1, divisor)


def length(records: list[TokenRecord]) -> int:
    """How many tokens of an episode are trained."""
    return sum(sum(record.mask) for record in records)


# ---- a step: update the policy ---------------------------------------------------------------------------

def update_policy(rollout: Rollout, policy, optimizer, lr: float, algorithm: Algorithm, args) -> dict:
    """--updates optimizer steps on what was rolled out; returns what metrics.jsonl tells, over all ranks.

    Without a KL penalty, a record whose advantage is 0 has no gradient. It is left out of the work, but its
    tokens stay in the divisor."""
    every = [record for own in rollout.records for record in own]
    active = [record for record in every if record.advantage or args.kl > 0]
    if not ranks.summed({"active": len(active)})["active"]:
        return {"skipped": 1}
    first = {}
    for _ in range(args.updates):
        sums, gap = {}, 0.0
        for records in training.micro_batches(policy, active, args.micro_tokens):
            loss, part, part_gap = micro_batch_loss(policy, records, algorithm, args)
            (loss / rollout.divisor).backward()
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
            gap = max(gap, part_gap)
        norm = training.update(optimizer, lr, args.clip)
        sums = ranks.summed(sums)
        loss, tokens = sums.pop("loss") / rollout.divisor, sums.pop("tokens")
        means = {name: value / tokens for name, value in sums.items()}
        learned = {"loss": loss, **means, "dlogp_max": max(ranks.gather([gap])), "grad_norm": norm,
                   "learned_tokens": int(tokens)}
        first = first or learned  # only the first update starts from the policy that sampled
    return {**learned, "dlogp": first["dlogp"], "dlogp_max": first["dlogp_max"]}


def micro_batch_loss(policy, records: list[TokenRecord], algorithm: Algorithm, args):
    """(weighted sum of the loss over trained tokens, {its parts for the log, as sums}, largest gap between
    the log-probs of the sampler and the trainer)."""
    sequences = [r.ids for r in records], [r.mask for r in records]
    logp, entropy = losses.score(policy, *sequences, args.temperature)
    lengths = torch.tensor([sum(r.mask) for r in records], device=logp.device)

    def per_token(values: list) -> torch.Tensor:
        return torch.tensor(values, device=logp.device).repeat_interleave(lengths)

    old = torch.tensor([p for r in records for p, m in zip(r.logprobs, r.mask) if m], device=logp.device)
    advantage, weight = per_token([r.advantage for r in records]), per_token([r.weight for r in records])
    if algorithm.ratio == "token":
        loss = losses.clipped(logp, old, advantage, algorithm.low, algorithm.high)
    elif algorithm.ratio == "sequence":
        sequence = per_token(list(range(len(records))))
        loss = losses.sequence_clipped(logp, old, advantage, sequence, algorithm.low, algorithm.high)
    else:
        loss = losses.reinforce(logp, advantage)
    kl, penalty = {}, 0.0
    if args.kl > 0:
        with torch.no_grad(), lora.off(policy):
            reference, _ = losses.score(policy, *sequences, args.temperature)
        penalty = losses.kl(logp, reference, args.kl_kind)
        kl = {"kl": penalty.detach().sum()}
    total = ((loss + args.kl * penalty) * weight).sum()
    gap = (logp.detach() - old).abs()
    ratio = (logp.detach() - old).exp()
    cut = ((ratio > 1 + algorithm.high) & (advantage > 0)) | ((ratio < 1 - algorithm.low) & (advantage < 0))
    sums = {"loss": total.detach(), **kl, "entropy": entropy.sum(), "dlogp": gap.sum(),
            "clipped": cut.sum() if algorithm.ratio == "token" else 0.0, "tokens": len(logp)}
    largest = gap.max().item() if len(gap) else 0.0
    return total, {name: float(value) for name, value in sums.items()}, largest


# ---- before the first step -------------------------------------------------------------------------------

def checked(args) -> tuple[Algorithm, Callable]:
    """(algorithm, workflow). BadInput for what this script can't train, before a run directory is claimed."""
    for folder in (args.model, args.adapter):
        if folder and not args.resume:
            checkpoint.resolve(folder)
    workflows.refuse_roles("--roles", args.roles or ())
    algorithm = ALGORITHMS[args.algorithm]
    if args.samples == 1 and algorithm.advantage not in ("batch", "none"):
        raise BadInput(f"--samples 1: {args.algorithm} compares a problem's samples and needs 2 or more")
    return algorithm, workflows.workflow(args.workflow)


def check_rewards(pool) -> None:
    """Gold answers must be rewarded, and other problems' golds mostly not. Otherwise grader and data do not
    fit together, and no training would help."""
    some = pool[:50]
    right = [grade(f"\\boxed{{{p.gold}}}", p.gold, strict=True).correct for p in some]
    wrong = [grade(f"\\boxed{{{q.gold}}}", p.gold, strict=True).correct for p, q in pairwise(some)]
    if sum(right) < 0.9 * len(right):
        bad = some[right.index(False)]
        raise BadInput(f"{bad.id}: the grader does not accept the gold answer {bad.gold!r}; expected a "
                       "number or a formula")
    print(f"reward check: {sum(right)} of {len(right)} gold answers are accepted, "
          f"{sum(wrong)} of {len(wrong)} golds of another problem")


def prepare(out, device, dtype, args):
    """(policy, tokenizer, base). The policy is the base with a new adapter; the base is --model, or this with
    its SFT adapter merged in float32. A merged base is kept in <run>/base, since the new adapter belongs to
    it; it is also the reference."""
    merged = args.adapter or (checkpoint.resolve(args.model) / "adapter_config.json").is_file()
    base = str((out / "base").resolve()) if merged else args.model
    if merged and not (args.resume and (out / "base").is_dir()):
        model, tokenizer = checkpoint.load(args.model, device, torch.float32)
        if args.adapter:
            lora.load(model, checkpoint.resolve(args.adapter), "sft")
        for adapter in list(lora.names(model)):
            gap = lora.merge(model, adapter)
            lora.remove(model, adapter)
            if ranks.rank() == 0:
                print(f"merged {args.adapter or args.model} in float32 (logits change by at most "
                      f"{gap:.1e}); a new adapter starts on top, and the reference is the merged model")
        if ranks.rank() == 0:
            checkpoint.save(model.to(dtype), tokenizer, out / "base")
        ranks.barrier()
    policy, tokenizer = checkpoint.load(base, device, dtype)
    policy.recompute = args.recompute
    lora.add(policy, args.rank, args.alpha, cli.TARGETS[args.targets])
    return policy, tokenizer, base


def fitting(pool, tokenizer, context: int) -> list:
    """The problems whose prompt leaves room for an answer. Prints how many don't; BadInput when none does."""
    sizes = [len(tokenizer.chat([user(SOLVER(question=p.question))])) for p in pool]
    fit = [p for p, size in zip(pool, sizes) if size < context - 32]
    if not fit:
        raise BadInput(f"all {len(pool)} prompts are too long: {min(sizes)} tokens or more of {context}")
    if len(fit) < len(pool):
        print(f"left out: {len(pool) - len(fit)} of {len(pool)} prompts are too long for {context} tokens")
    return fit


def batches(n: int, args) -> list[list[int]]:
    """Problem numbers of every step: --epochs over n problems, or --steps steps."""
    plan = training.batches(n, args.batch, args.epochs, args.seed)
    while len(plan) < args.steps:
        plan += training.batches(n, args.batch, 1, args.seed + len(plan))
    return plan[:args.steps or None]


# ---- what a person reads ---------------------------------------------------------------------------------

def introduce(policy, tokenizer, base: str, pool, plan, device: str, args):
    """Print what the run will do, before it starts."""
    parameters, updated = parameter_counts(policy)
    print(f"device: {device}")
    print(f"policy: {base} with a new LoRA of rank {args.rank} on {args.targets}, {parameters:,} parameters, "
          f"{updated:,} trained; reference: the same with the adapter off")
    print(f"work: {len(plan)} steps of {args.batch} problems x {args.samples} samples, at most "
          f"{args.batch * args.samples * args.max_tokens:,} new tokens a step; "
          f"{memory(policy, args.micro_tokens)}")
    print("the first prompt:\n" + tokenizer.render([user(SOLVER(question=pool[plan[0][0]].question))]))


def summary(episodes: list[Episode]) -> dict:
    """What the episodes of all ranks were like. Means are over those with a reward; `failed` counts the
    others."""
    rewarded = [e for e in episodes if e.reward is not None]
    turns = [turn for e in episodes for turn in e.turns]
    rewards: dict[int, set] = {}
    for e in rewarded:
        rewards.setdefault(e.group, set()).add(e.reward)
    n = ranks.summed({
        "reward": sum(e.reward for e in rewarded), "solved": sum(e.reward == 1 for e in rewarded),
        "rewarded": len(rewarded), "no box": sum(e.reason == "no box" for e in episodes),
        "tokens": sum(e.tokens_out for e in episodes), "episodes": len(episodes),
        "cut": sum(turn.reply.finish == "length" for turn in turns), "turns": len(turns),
        "even": sum(len(values) == 1 for values in rewards.values()), "groups": len(rewards)})

    def share(part: str, whole: str) -> float:
        return n[part] / n[whole] if n[whole] else 0.0

    return {"reward": share("reward", "rewarded"), "solved": share("solved", "rewarded"),
            "no_answer": share("no box", "episodes"), "truncated": share("cut", "turns"),
            "mean_tokens": share("tokens", "episodes"), "zero_spread": share("even", "groups"),
            "failed": int(n["episodes"] - n["rewarded"])}


def shares(clock: list[float], episodes: list[Episode]) -> dict:
    """Seconds of the step, what shares of them its parts took, and tokens sampled a second of sampling."""
    spans = [end - start for start, end in pairwise(clock)]
    parts = zip(("generate_share", "score_share", "learn_share"), spans)
    return {"seconds": round(sum(spans), 3),
            "tokens_per_s": round(sum(e.tokens_out for e in episodes) / spans[0]),
            **{name: round(span / sum(spans), 3) for name, span in parts}}


def lines(step: int, rollout: Rollout) -> list[dict]:
    """The episodes for episodes.jsonl."""
    rows = []
    for e, records in zip(rollout.episodes, rollout.records):
        turns = [{"role": t.role, "reply": {"text": t.reply.text, "finish": t.reply.finish}} for t in e.turns]
        rows.append({"step": step, "problem": e.problem_id, "sample": e.sample, "reward": e.reward,
                     "reason": e.reason, "answer": e.answer, "tokens": e.tokens_out,
                     "advantage": records[0].advantage if records else None, "turns": turns})
    return rows


def finish(policy, base: str, out, args):
    """Write the adapter under its final name with a report, and print what to do with it."""
    with ranks.whole(policy):
        if ranks.rank() == 0:
            lora.save(policy, out / "adapter", base=base)
    ranks.barrier()
    if ranks.rank() == 0:
        report.write(out)
        if all("skipped" in row for row in readable_rows(out / "metrics.jsonl")):
            print("nothing was learned: in no step did the samples of a problem differ in reward, or the "
                  "--roles never spoke; episodes.jsonl shows what was said")
        print(f"peak memory {peak_memory(policy):.1f} GB; the result is {out / 'adapter'}")
        print(f"curves and samples: {out / 'report.html'}")
        print(f"next: python eval.py --model {shlex.quote(str(out / 'adapter'))}")


if __name__ == "__main__":
    cli.run(main, args)
