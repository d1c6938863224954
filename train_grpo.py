"""Stage 3: reinforcement learning from checked answers (GRPO and its relatives), single turn or through a
workflow.

    python train_grpo.py                                             the built-in model, minutes
    python train_grpo.py --adapter runs/sft-tiny-lora/adapter        from the fine-tuned adapter
    python train_grpo.py --workflow python_tools --adapter ...       trains what agents.py runs
    python train_grpo.py --model Qwen/Qwen2.5-Math-1.5B --adapter DIR --data gsm8k

Every step: K answers to each of a batch of problems are sampled; a right final box earns +1, anything else
-1; an answer's advantage is how it did against the others to the same problem; the log-probability of its
tokens is pushed that way, and held near the reference (the model before this run) by a KL penalty.

The policy is the model with a LoRA adapter, the reference is the same model with the adapter off. An SFT
adapter is merged first. Sampling and loss use one distribution, so the ratio between them is 1 at the start
of each step; the metric dlogp shows by how much rounding makes it differ. An episode whose sampling failed
has no reward and is left out. Not covered: a value model, asynchronous rollouts, top-p or top-k in sampling
(the loss would be another).

What to watch: reward and solve rate rise, entropy falls slowly, kl (with --kl) grows slowly. The loss means
little: its value is near 0 by construction.
"""

from dataclasses import dataclass

from slm.runs import cli

PAPER = {"lr": 5e-6, "batch": 16, "samples": 2, "kl": 0.05, "epochs": 1, "temperature": 0.7,
         "max_tokens": 2048, "micro_tokens": 2048, "warmup": 0.1, "save_every": 20, "steps": 0}
TINY = {"lr": 3e-3, "batch": 16, "samples": 8, "kl": 0.0, "temperature": 1.0, "max_tokens": 200,
        "micro_tokens": 4096, "warmup": 0.05, "save_every": 1000, "steps": 16}


@dataclass(frozen=True)
class Algorithm:
    """advantage and normalisation as in losses.py; ratio: token, sequence or none; clip: 1 - low to 1 +
    high."""
    advantage: str
    ratio: str
    low: float
    high: float
    normalise: str


ALGORITHMS = {
    "grpo": Algorithm("std", "token", 0.2, 0.2, "sequence"),
    "dr_grpo": Algorithm("mean", "token", 0.2, 0.2, "constant"),
    "dapo": Algorithm("std", "token", 0.2, 0.28, "token"),
    "gspo": Algorithm("std", "sequence", 3e-4, 4e-4, "sequence"),
    "rloo": Algorithm("loo", "none", 0, 0, "constant"),
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

import shlex
import time
from itertools import pairwise

import torch

from slm import BadInput, checkpoint, lora, losses, problems, report, training, workflows
from slm.episode import Job, Sampling, run_episodes, seed_of, user
from slm.grading import grade
from slm.prompts import SOLVER
from slm.runs import ranks
from slm.runs.device import memory, parameters, peak_memory, pick_device
from slm.runs.files import readable_rows
from slm.runs.rundir import RunDir, new_path, settled
from slm.sampling import Sampler
from slm.sandbox import Sandbox

# ---- rollouts --------------------------------------------------------------------------------------------

@dataclass
class Sample:
    """One token sequence to learn from. old: log-probs of its trained tokens when they were sampled."""
    ids: list[int]
    mask: list[int]
    old: list[float]
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the loss


@dataclass
class Scored:
    """One episode with its reward (NaN: it failed and has none) and what there is to learn from it."""
    group: int
    reward: float
    reason: str
    samples: list[Sample]

    @property
    def tokens(self) -> int:
        return sum(len(s.old) for s in self.samples)


def judge(episode, gold: str, no_box: float) -> tuple[float, str]:
    """Reward and reason: +1 for a right answer in a box, -1 for a wrong one, no_box for none, NaN where the
    sampling failed."""
    broken = next((t.reply.error for t in episode.turns if t.reply.error), None)
    if broken or not episode.turns:
        return float("nan"), f"failed: {broken or episode.error}"
    result = grade(episode.response, gold, strict=True)
    if result.answer is None:
        return no_box, "no box"
    return (1.0 if result.correct else -1.0), result.reason


def rollout(problems, first_group: int, workflow, sampler, sandbox, step: int, args) -> list:
    """K episodes of each problem, all at once, in order; groups are numbered from first_group."""
    jobs = [Job(p.id, p.question, workflow, first_group + i, k)
            for i, p in enumerate(problems) for k in range(args.samples)]
    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, stop_at_box=False)
    seed = seed_of(args.seed, "grpo", step)
    return run_episodes(jobs, sampler, sandbox, sampling=sampling, seed=seed, fixed=True,
                        bar=None if args.quiet else f"step {step + 1}")


def scored(episodes, problems, args) -> list[Scored]:
    """Episodes -> rewards and token sequences (of the trained roles)."""
    result = []
    for i, episode in enumerate(episodes):
        reward, reason = judge(episode, problems[i // args.samples].gold, args.no_box)
        records = [] if reward != reward else episode.records(args.roles)
        result.append(Scored(episode.group, reward, reason, [
            Sample(r.ids, r.mask, [p for p, m in zip(r.logprobs, r.mask) if m]) for r in records]))
    return result


def give_credit(mine: list[Scored], everyone: list[tuple], algorithm: Algorithm, args) -> int:
    """Fill in every sample's advantage and token weight; returns the divisor of the loss. everyone: (rank,
    group, reward, tokens) of all ranks' episodes: means, lengths and divisor are global."""
    _, groups, rewards, tokens = zip(*everyone)
    advantage = losses.advantages(torch.tensor(rewards), torch.tensor(groups), algorithm.advantage).tolist()
    weights, divisor = losses.token_weights(torch.tensor(tokens), algorithm.normalise, args.max_tokens)
    own = [i for i, row in enumerate(everyone) if row[0] == ranks.rank()]
    for i, episode in zip(own, mine):
        for sample in episode.samples:
            sample.advantage, sample.weight = advantage[i], weights[i].item()
    return max(1, divisor)


# ---- learning --------------------------------------------------------------------------------------------

def losses_of(model, samples: list[Sample], algorithm: Algorithm, args):
    """One micro-batch -> weighted sum of the loss, {sums over trained tokens for the log}, largest gap
    between the sampler's log-prob and ours."""
    sequences = [s.ids for s in samples], [s.mask for s in samples]
    logp, entropy = losses.score(model, *sequences, args.temperature)
    lengths = torch.tensor([len(s.old) for s in samples], device=logp.device)
    spread = lambda values: torch.tensor(values, device=logp.device).repeat_interleave(lengths)
    old = torch.tensor([p for s in samples for p in s.old], device=logp.device)
    advantage, weight = spread([s.advantage for s in samples]), spread([s.weight for s in samples])
    if algorithm.ratio == "token":
        loss = losses.clipped(logp, old, advantage, algorithm.low, algorithm.high)
    elif algorithm.ratio == "sequence":
        sequence = spread(list(range(len(samples))))
        loss = losses.sequence_clipped(logp, old, advantage, sequence, algorithm.low, algorithm.high)
    else:
        loss = losses.reinforce(logp, advantage)
    kl, penalty = {}, 0.0
    if args.kl > 0:
        with torch.no_grad(), lora.off(model):
            ref, _ = losses.score(model, *sequences, args.temperature)
        penalty = losses.kl(logp, ref, args.kl_kind)
        kl = {"kl": penalty.detach().sum()}
    gap = (logp.detach() - old).abs()
    ratio = (logp.detach() - old).exp()
    cut = ((ratio > 1 + algorithm.high) & (advantage > 0)) | ((ratio < 1 - algorithm.low) & (advantage < 0))
    total = ((loss + args.kl * penalty) * weight).sum()
    sums = {"loss": total.detach(), **kl, "entropy": entropy.sum(), "dlogp": gap.sum(),
            "clipped": cut.sum() if algorithm.ratio == "token" else 0.0, "learned": float(len(logp))}
    return total, {k: float(v) for k, v in sums.items()}, gap.max().item()


def learn(model, samples: list[Sample], divisor: int, trained, optimizer, lr: float, algorithm, args) -> dict:
    """One optimizer step on all samples; the returned values are global. Samples that can't have a gradient
    (no advantage and no KL penalty) are left out of the work, not out of the divisor."""
    device = next(model.parameters()).device
    active = [s for s in samples if s.advantage or args.kl > 0]
    if not ranks.summed({"n": float(len(active))}, device)["n"]:
        return {"skipped": 1}
    idle = not active  # this rank has nothing to learn, but must meet the others: two tokens of weight 0
    active = active or [Sample([0, 0], [0, 1], [0.0])]
    micro = losses.pack([len(s.ids) for s in active], args.micro_tokens)
    sums, worst = {}, 0.0
    for i, members in enumerate(micro):
        ranks.last_micro_batch(model, i == len(micro) - 1)
        loss, part, gap = losses_of(model, [active[j] for j in members], algorithm, args)
        (loss / divisor).backward()
        sums = {k: sums.get(k, 0.0) + (0.0 if idle else v) for k, v in part.items()}
        worst = max(worst, 0.0 if idle else gap)
    norm = training.update(optimizer, trained.values(), lr, args.clip)
    sums = ranks.summed(sums, device)
    n = sums.pop("learned")
    return {"loss": sums.pop("loss") / divisor, **{k: v / n for k, v in sums.items()},
            "dlogp_max": max(ranks.gather([worst])), "grad_norm": norm, "learned_tokens": int(n)}


# ---- the run ---------------------------------------------------------------------------------------------

def main(args):
    cli.resolve(args, PAPER, TINY)
    algorithm = ALGORITHMS[args.algorithm]
    args.quiet = cli.is_small(args.model)
    for folder in () if args.resume else filter(None, (args.model, args.adapter)):
        checkpoint.resolve(folder)  # a misspelt one must not claim the run directory
    workflow = workflows.workflow(args.workflow)
    workflows.refuse_roles("--roles", args.roles or ())
    if args.samples == 1 and algorithm.advantage not in ("batch", "none"):
        raise BadInput(f"--samples 1: {args.algorithm} compares a problem's samples and needs 2 or more")
    out = new_path(args.out, f"grpo-{cli.model_name(args.model)}", args.resume)
    args.out = str(out)
    device, dtype, reason = pick_device(args.device, settled(out, args), args.model)
    ranks.start_ranks(device)
    torch.manual_seed(args.seed)
    args.data = args.data or ["tiny" if cli.is_small(args.model) else "gsm8k"]
    pool = problems.load_all(args.data, "train", args.limit)
    check_rewards(pool)
    args.dtype = str(dtype).removeprefix("torch.")
    rundir = RunDir(out, vars(args), problems.fingerprint(pool), args.resume, log=ranks.rank() == 0)
    model, tokenizer = prepare(out, device, dtype, args)
    pool = fitting(pool, tokenizer, model.config.positions)
    plan = training.batches(len(pool), args.batch, args.epochs, args.seed)
    while args.steps and len(plan) < args.steps:
        plan += training.batches(len(pool), args.batch, 1, args.seed + len(plan))
    plan = plan[:args.steps or None]
    if ranks.rank() == 0:
        cli.show(vars(args))
        introduce(model, tokenizer, pool, plan, device, dtype, reason, args)
    train(model, tokenizer, pool, plan, workflow, algorithm, rundir, args)
    finish(model, out, args)


def prepare(out, device, dtype, args):
    """The policy: the model, its SFT adapter merged in float32, and a new adapter. The merged model is kept
    in <run>/base, since the new adapter belongs to it; it is also the reference."""
    merged = args.adapter or (checkpoint.resolve(args.model) / "adapter_config.json").is_file()
    args.base = str((out / "base").resolve()) if merged else args.model
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
    model, tokenizer = checkpoint.load(args.base, device, dtype)
    model.recompute = args.recompute
    lora.add(model, args.rank, args.alpha, cli.TARGETS[args.targets])
    return model, tokenizer


def fitting(pool, tokenizer, context: int) -> list:
    """The problems whose prompt leaves room for an answer; says how many don't."""
    sizes = [len(tokenizer.chat([user(SOLVER(question=p.question))])) for p in pool]
    fit = [p for p, size in zip(pool, sizes) if size < context - 32]
    if not fit:
        raise BadInput(f"all {len(pool)} prompts are too long: {min(sizes)} tokens or more of {context}")
    if len(fit) < len(pool):
        print(f"left out: {len(pool) - len(fit)} of {len(pool)} prompts are too long for {context} tokens")
    return fit


def check_rewards(pool) -> None:
    """Gold answers must be rewarded, and other problems' golds mostly not: otherwise grader and data do not
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


def introduce(model, tokenizer, pool, plan, device, dtype, reason, args):
    """What is about to happen, before it does."""
    every, updated = (sum(p.numel() for p in ps) for ps in parameters(model))
    rollouts = args.batch * args.samples
    print(f"device: {device}, {str(dtype).removeprefix('torch.')} ({reason})")
    print(f"policy: {args.base} with a new LoRA of rank {args.rank} on {args.targets}, {every:,} parameters, "
          f"{updated:,} trained; reference: the same with the adapter off")
    print(f"work: {len(plan)} steps of {args.batch} problems x {args.samples} samples, at most "
          f"{rollouts * args.max_tokens:,} new tokens a step; {memory(model, args.micro_tokens)}")
    print("the first prompt:\n" + tokenizer.render([user(SOLVER(question=pool[plan[0][0]].question))]))


def train(model, tokenizer, pool, plan, workflow, algorithm, rundir, args):
    """All steps from the last checkpoint on."""
    ranks.shard(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    sampler, sandbox = Sampler(model, tokenizer), Sandbox() if args.workflow != "solver" else None
    try:
        for step, bar in training.steps(len(plan), rundir, trained, optimizer, args):
            lr = args.lr * training.cosine(step, len(plan), args.warmup)
            row, lines = one_step(model, [pool[i] for i in plan[step]], workflow, sampler, sandbox, step,
                                  trained, optimizer, lr, algorithm, args)
            rundir.log("metrics", row)
            rundir.log("episodes", *lines)
            bar.set_postfix_str(f"reward {row['reward']:+.2f}, solved {row['solved']:.0%}, "
                                f"{row['mean_tokens']:.0f} tokens, {row['tokens_per_s']:,} tok/s")
    finally:
        if sandbox:
            sandbox.close()


def one_step(model, problems, workflow, sampler, sandbox, step, trained, optimizer, lr, algorithm, args):
    """Sample, grade, compare, learn. Returns the line for metrics.jsonl and those for episodes.jsonl."""
    mine = problems[ranks.rank()::ranks.world()]
    clock = [time.perf_counter()]
    with ranks.whole(model):
        episodes = rollout(mine, ranks.rank() * len(problems), workflow, sampler, sandbox, step, args)
        sampler.close()  # gives the cache's memory back, and no step depends on an earlier one's cache
    clock.append(time.perf_counter())
    scores = scored(episodes, mine, args)
    everyone = ranks.gather([(ranks.rank(), s.group, s.reward, s.tokens) for s in scores])
    divisor = give_credit(scores, everyone, algorithm, args)
    clock.append(time.perf_counter())
    samples = [sample for s in scores for sample in s.samples]
    for update in range(args.updates):
        learned = learn(model, samples, divisor, trained, optimizer, lr, algorithm, args)
        if update == 0:
            row = learned  # the gap to the sampler is that of the first update
        row.update({k: v for k, v in learned.items() if not k.startswith("dlogp")})
    clock.append(time.perf_counter())
    row = {"step": step + 1, **summary(episodes, scores), **row, "lr": lr, **shares(clock, episodes)}
    return row, [line(step + 1, e, s) for e, s in zip(episodes, scores)]


def summary(episodes, scores: list[Scored]) -> dict:
    """What the step's episodes were like. Rates are over episodes with a reward; `failed` counts the
    others."""
    turns = [t for e in episodes for t in e.turns]
    known = [s for s in scores if s.reward == s.reward]
    groups: dict[int, set] = {}
    for s in known:
        groups.setdefault(s.group, set()).add(s.reward)
    parts = ranks.gather([(len(known), sum(s.reward for s in known), sum(s.reward == 1 for s in known),
                         sum(s.reason == "no box" for s in scores), len(scores),
                         sum(t.reply.finish == "length" for t in turns), len(turns),
                         sum(e.tokens_out for e in episodes),
                         sum(len(g) == 1 for g in groups.values()), len(groups))])
    n, reward, solved, unboxed, total, cut, asked, tokens, even, of = (sum(column) for column in zip(*parts))
    share = lambda part, whole: part / whole if whole else 0.0
    return {"reward": share(reward, n), "solved": share(solved, n), "no_answer": share(unboxed, total),
            "truncated": share(cut, asked), "mean_tokens": share(tokens, total),
            "zero_spread": share(even, of), "failed": total - n}


def shares(clock: list[float], episodes) -> dict:
    """Seconds of the step and where they went, and tokens sampled a second of sampling."""
    spans = [b - a for a, b in pairwise(clock)]
    seconds = clock[-1] - clock[0]
    tokens = sum(e.tokens_out for e in episodes)
    return {"seconds": round(seconds, 3), "tokens_per_s": round(tokens / spans[0]),
            **{f"{part}_share": round(span / seconds, 3)
               for part, span in zip(("generate", "score", "learn"), spans)}}


def line(step: int, episode, score: Scored) -> dict:
    """An episode for episodes.jsonl."""
    reward = score.reward if score.reward == score.reward else None
    return {"step": step, "problem": episode.problem_id, "sample": episode.sample, "reward": reward,
            "reason": score.reason, "answer": episode.answer, "tokens": episode.tokens_out,
            "advantage": score.samples[0].advantage if score.samples else None,
            "turns": [{"role": t.role, "reply": {"text": t.reply.text, "finish": t.reply.finish}}
                      for t in episode.turns]}


def finish(model, out, args):
    """Write the adapter under its final name with a report, and say what to do with it."""
    ranks.unshard(model)
    if ranks.rank() == 0:
        lora.save(model, out / "adapter", base=args.base)
    ranks.barrier()
    if ranks.rank() == 0:
        report.write(out)
        if all("skipped" in row for row in readable_rows(out / "metrics.jsonl")):
            print("nothing was learned: in no step did the samples of a problem differ in reward, or the "
                  "--roles never spoke; episodes.jsonl shows what was said")
        print(f"peak memory {peak_memory(model):.1f} GB; the result is {out / 'adapter'}")
        print(f"curves and samples: {out / 'report.html'}")
        print(f"next: python eval.py --model {shlex.quote(str(out / 'adapter'))}")


if __name__ == "__main__":
    cli.run(main, args)
