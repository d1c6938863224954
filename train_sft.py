"""Stage 2: supervised fine-tuning on worked solutions, LoRA or full, solver or verifier data.

    python train_sft.py                                         the built-in model, a minute
    python train_sft.py --model Qwen/Qwen2.5-Math-1.5B --data runs/data-gsm8k-math/records.jsonl
    torchrun --nproc_per_node 8 train_sft.py ...                the same on 8 GPUs

Data: JSON lines. A row has `question` and `response`, as make_data.py writes them (the solver's prompt is put
around the question), or it is taken as it is: `messages`, `prompt` and `completion`, Alpaca, ShareGPT (see
slm/formats/rows.py). Every response or assistant message is trained with the token that ends it, as much as
its `weight` says (0 to 1; without one 1). Rows over --max-length are left out, counted.

A step trains on --batch rows, packed without padding into micro-batches of --micro-tokens. The loss of each
is a sum, divided by the weight of all trained tokens in the batch: micro-batches don't change the gradient.

--validate problems are held out. Before the first step and ten times on the way their loss is measured, and
how many greedy replies have the answer of the row. best/ is the adapter or model of the lowest held-out loss.
"""

from slm.runs import cli

PAPER = {"batch": 128, "epochs": 2, "max_length": 2048, "micro_tokens": 2048, "dropout": 0.05, "warmup": 0.03,
         "weight_decay": 0.01, "save_every": 20, "validate": 100, "targets": "qkvo"}
TINY = {"batch": 16, "max_length": 1024, "micro_tokens": 4096, "dropout": 0.0, "save_every": 1000,
        "validate": 20}
RATES = {"paper": {"lora": 1e-4, "full": 5e-5}, "tiny": {"lora": 1e-2, "full": 1e-3}}


def options():
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", default="tiny", help="tiny, a directory or a hub id (default tiny)")
    g.add_argument("--data", nargs="+", action=cli.Names, metavar="A,B",
                   help="JSON lines; for tiny: default the newest run of make_data.py")
    g.add_argument("--limit", type=cli.positive, help="only the first rows")
    cli.prompt_option(g)
    g.add_argument("--max-length", type=cli.positive, help=f"tokens a row may have ({both('max_length')})")
    g.add_argument("--validate", type=lambda text: cli.positive(text, 0), metavar="N",
                   help=f"problems held out, a tenth of all at most ({both('validate')})")
    g.add_argument("--train-on", choices=("response", "all"), default="response",
                   help="tokens in the loss; `all` is what the report did (default response)")
    g = p.add_argument_group("what is trained")
    how = g.add_mutually_exclusive_group()
    how.add_argument("--lora", action="store_true", default=True, help="a LoRA adapter (the default)")
    how.add_argument("--full", dest="lora", action="store_false", help="all weights")
    cli.adapter_options(g, both)
    g.add_argument("--dropout", type=cli.number(0, 0.99), help=f"on the adapter's input ({both('dropout')})")
    g = p.add_argument_group("optimization")
    g.add_argument("--lr", type=cli.number(0, 10), help="(default LoRA 1e-4, full 5e-5; tiny 1e-2, 1e-3)")
    g.add_argument("--batch", type=cli.positive, help=f"sequences a step ({both('batch')})")
    g.add_argument("--epochs", type=cli.positive, help=f"({both('epochs')})")
    g.add_argument("--weight-decay", type=cli.number(0), help=f"({both('weight_decay')})")
    cli.training_options(p, g, both, "runs/sft-<model>-<lora or full>")
    return p


if __name__ == "__main__":
    args = options().parse_args()  # before the heavy imports, so that --help answers at once

import math
import re
import shlex
import time
from collections import Counter
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import torch

from slm import BadInput, checkpoint, lora, losses, problems, prompts, training
from slm.episode import Request, Sampling, TokenRecord, user
from slm.formats import lora_files
from slm.formats.rows import read as read_row
from slm.grading import extract, grade
from slm.report import write as write_report
from slm.runs import files, ranks
from slm.runs.device import parameter_counts, peak_memory
from slm.runs.forecast import memory
from slm.runs.rundir import RunDir, name_of
from slm.runs.steps import timed, token_by_token
from slm.sampling import Sampler


def main(args):
    how = "lora" if args.lora else "full"
    cli.resolve(args, {**PAPER, "lr": RATES["paper"][how]}, {**TINY, "lr": RATES["tiny"][how]})
    if args.data is None and not cli.is_small(args.model):
        raise BadInput("--data is missing: records of make_data.py, or gsm8k for its worked solutions")
    if checkpoint.is_adapter(checkpoint.resolve(args.model)):
        raise BadInput(f"--model {args.model}: an adapter, expected a model; export it first: "
                       f"python -m slm.checkpoint export {args.model} DIR")
    args.data = args.data or [newest()]
    every_row = [row for data in args.data for row in read(data, args.limit)]
    train, held_out = training.hold_out(every_row, itemgetter(0), args.validate, args.seed)
    device, dtype, words = training.settle(args, f"sft-{name_of(args.model).lower()}-{how}")
    model, tokenizer = checkpoint.load(args.model, device, dtype if args.lora else torch.float32)
    model.recompute = lora.recompute(model) if args.recompute else None
    if args.lora:
        lora.add(model, args.rank, args.alpha, cli.TARGETS[args.targets], args.dropout)
    longest = min(args.max_length, model.config.positions)
    rows, held_out = fitting(tokenizer, train, longest, args.train_on), fitting(tokenizer, held_out, longest)
    plan = training.batches(len(rows), args.batch, args.epochs, args.seed)
    heaviest = max(plan, key=lambda step: size([rows[i] for i in step]))
    largest = [rows[i] for i in heaviest]
    if not args.dry_run:
        data = files.fingerprint([(row.ids, row.mask) for row in rows])
        rundir = RunDir(args.out, vars(args), data, args.resume, log=ranks.rank() == 0)
    if ranks.rank() == 0:
        introduce(model, tokenizer, rows, held_out, plan, largest, words, args)
        if not args.dry_run:
            files.write_json(rundir.path / "tokens.json", token_by_token(rows[0], tokenizer))

    trained, optimizer = training.start(model, args.weight_decay)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=not args.lora and dtype == torch.bfloat16)
    save = (partial(lora_files.save, model, base=args.model) if args.lora else
            partial(checkpoint.save, model, tokenizer))
    look_once = partial(look, model, Sampler(model, tokenizer), held_out, autocast)
    model.train()
    if args.dry_run:
        for _ in range(2):  # the first pays for moments, caches and the like
            row, spent = one_step(model, largest, optimizer, args.lr, autocast, args), Counter()
            with timed(spent, "look"):
                row |= look_once() if held_out else {}
        tokens = args.epochs * size(rows)
        seconds = tokens / max(1, row["tokens_per_s"])
        return training.forecast(model, len(plan), tokens, seconds, spent["look"])
    first = look_once if held_out else None
    for step, lr, bar in training.steps(len(plan), rundir, trained, optimizer, args, look=first):
        row = one_step(model, [rows[i] for i in plan[step]], optimizer, lr, autocast, args)
        if held_out and training.look_due(step, len(plan)):
            row |= look_once()
            row["best"] = keep_best(model, save, row["held_out_loss"], rundir.path)
        rundir.log("metrics", {"step": step + 1, **row})
        bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:,} tok/s")
    finish(model, save, rundir.path, args)


def one_step(model, batch: list[TokenRecord], optimizer, lr: float, autocast, args) -> dict:
    """One optimizer step on the mean loss of the batch's trained tokens; returns what metrics.jsonl tells."""
    began = time.perf_counter()
    count, loss = sum(sum(row.mask) for row in batch), 0.0
    for rows in training.micro_batches(model, batch[ranks.rank()::ranks.world()], args.micro_tokens):
        with autocast:
            logp, _ = losses.score(model, [row.ids for row in rows], [row.mask for row in rows])
        loss_sum, _ = losses.sft_loss(logp * weights(rows).to(logp))
        (loss_sum * (1 / count)).backward()
        loss += loss_sum.item() * (1 / count)
    norm = training.update(optimizer, lr, args.clip)
    loss = ranks.summed({"loss": loss})["loss"]
    if not math.isfinite(loss):
        raise BadInput(f"the loss is {loss}: lower --lr {args.lr}, or use --dtype float32")
    tokens, seconds = size(batch), time.perf_counter() - began
    return {"loss": loss, "grad_norm": norm, "tokens": tokens, "trained_tokens": count, "lr": lr,
            "tokens_per_s": round(tokens / seconds)}


def weights(rows: list[TokenRecord]) -> torch.Tensor:
    """Of the trained tokens (N,), in order."""
    return torch.tensor([weight for row in rows for weight in row.mask if weight], dtype=torch.float32)


# ---- the held-out rows -----------------------------------------------------------------------------------

def look(model, sampler, held_out: list[TokenRecord], autocast) -> dict:
    """Mean loss of the held-out responses' tokens, and the share of rows to which a greedy reply (of at most
    twice the longest response) has the same answer: what stands in the box, or if there is none, the text."""
    tails = [row.mask[::-1].index(0) for row in held_out]  # tokens of the last response
    own = list(zip(held_out, tails))[ranks.rank()::ranks.world()]
    how = Sampling(2 * max(tails), stop_at_box=True)
    model.eval()
    with ranks.whole(model):
        with torch.no_grad(), autocast:
            scores = [losses.score(model, [row.ids], [row.mask])[0].cpu() * weights([row]) for row, _ in own]
        replies = sampler.generate([Request(ids=row.ids[:-tail], sampling=how) for row, tail in own], False)
        sampler.close()  # gives the cache's memory back
    model.train()
    if not all(replies):  # a second Ctrl-C, after which the sampler gives what it has
        raise KeyboardInterrupt
    n = {"loss": -sum(float(x.sum()) for x in scores), "tokens": sum(sum(row.mask) for row, _ in own),
         "right": 0, "rows": sum(row.mask[-1] for row, _ in own)}
    for (row, tail), [reply] in zip(own, replies):
        said = sampler.tokenizer.decode(row.ids[-tail:])
        answer = extract(said)
        same = grade(reply.text, answer).correct if answer else reply.text.strip() == said.strip()
        n["right"] += same * row.mask[-1]
    n = ranks.summed(n)
    return {"held_out_loss": n["loss"] / n["tokens"], "held_out_right": n["right"] / n["rows"]}


def keep_best(model, save, loss: float, out: Path) -> bool:
    """Save what the run has so far as best/ if no earlier look found so low a loss; tells whether it did."""
    earlier = [row.get("held_out_loss", math.inf) for row in files.readable_rows(out / "metrics.jsonl")]
    best = ranks.rank() == 0 and loss < min(earlier)
    with ranks.whole(model):
        if best:
            save(out / "best")
    return best


# ---- data ------------------------------------------------------------------------------------------------

def newest() -> str:
    """The records of the newest run of make_data.py on the tiny world, or else that world's own solutions."""
    found = Path("runs").glob("data-*/records.jsonl")
    made = [path for path in found if path.stat().st_size and of_tiny(path)]
    if not made:
        print("no run of make_data.py found: training on the tiny world's own solutions")
    return str(max(made, key=lambda path: path.stat().st_mtime)) if made else "tiny"


def of_tiny(records: Path) -> bool:
    settings = files.read_json(records.with_name("settings.json"), {}).get("settings", {})
    return all(name.startswith("tiny") for name in settings.get("data", ["unknown"]))


def read(data: str, limit: int | None) -> list[tuple[str, list[dict]]]:
    """(question, conversation) of each row of a file of records, or of a problem set's worked solutions."""
    path = Path(data)
    if path.is_file():
        rows = files.read_rows(path)
        if not rows:
            raise BadInput(f"{path}: no rows; expected JSON lines with question and response, or messages")
        first = read_row(rows[0][1])
        if first.response or first.gold is None:
            return [messages_of(row, f"{path} line {n}") for n, row in rows[:limit]]
    solved = [p for p in problems.load(data, "train", limit) if p.solution]
    if not solved:
        raise BadInput(f"--data {data}: problems without solutions; make_data.py gets them from a teacher")
    return [(p.question, conversation(p.question, written_out(p))) for p in solved]


def conversation(question: str, response: str) -> list[dict]:
    return [user(prompts.SOLVER(question=question)), {"role": "assistant", "content": response}]


def written_out(problem) -> str:
    """A worked solution without GSM8K's <<48/2=24>> notes, with its answer in a box."""
    text = re.sub("<<.*?>>", "", problem.solution)
    return text if "\\boxed" in text else f"{text}\nThe answer is \\boxed{{{problem.gold}}}."


def messages_of(row: dict, where: str) -> tuple[str, list[dict]]:
    """A record as (question, conversation). BadInput, naming `where` it stands, for any other row."""
    found = read_row(row)
    messages, response = found.messages, found.response or found.solution
    if not messages and found.question and response:
        return found.question, conversation(found.question, response)
    if not messages:
        there = [str(key) if str(value or "").strip() else f"{key} (empty)" for key, value in row.items()]
        raise BadInput(f"{where}: expected question and response, or messages; found {', '.join(there)}")
    good = [isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            and isinstance(m.get("weight"), int | float | None) and 0 <= (m.get("weight") or 0) <= 1
            and not m.get("tool_calls")
            and (m["content"].strip() or not trained(m)) for m in messages]
    asked = [m["content"] for m in messages if m["role"] == "user"] if all(good) else []
    if not asked or not any(map(trained, messages)):
        raise BadInput(f"{where}: messages must be a list of role and content (and weight, from 0 to 1), "
                       "no tool_calls, one of the user, at least one of the assistant, not of weight 0, no "
                       "such one empty")
    return found.question or asked[0], messages


def trained(message: dict) -> float:
    """How much a message counts in the loss: the assistant's its weight (as in OpenAI's files), or else 1."""
    weight = message.get("weight")
    return 0 if message["role"] != "assistant" else 1 if weight is None else weight


def encode(tokenizer, messages: list[dict], train_on: str = "response") -> TokenRecord:
    """A conversation as tokens, up to its last trained message. The mask is the weight of the assistant's
    messages and their end tokens; with `all` 1 on the rest, less the first token, which nothing predicts."""
    ids, mask = [], []
    last = max(i for i, message in enumerate(messages) if trained(message))
    for i, message in enumerate(messages[:last + 1]):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.chat(messages[:i], generation=True)
        if prompt[:len(ids)] != ids:
            raise BadInput("the chat template rewrites earlier turns: several of them can't be one sequence")
        reply = [*tokenizer.following(tokenizer.after_prompt(message["content"])), tokenizer.end_of_turn]
        mask += [int(train_on == "all")] * (len(prompt) - len(ids)) + [trained(message)] * len(reply)
        ids = prompt + reply
    return TokenRecord(ids, [0] + mask[1:])


def size(rows: list[TokenRecord]) -> int:
    return sum(len(row.ids) for row in rows)


def fitting(tokenizer, conversations, longest: int, train_on: str = "response") -> list[TokenRecord]:
    """Of (question, conversation) those of at most `longest` tokens, encoded. Prints how many are longer;
    BadInput when all are."""
    rows = [encode(tokenizer, messages, train_on) for _, messages in conversations]
    fit = [row for row in rows if len(row.ids) <= longest]
    if len(fit) < len(rows):
        print(f"left out: {len(rows) - len(fit)} of {len(rows)} rows are longer than --max-length "
              f"{longest} (the longest has {max(len(row.ids) for row in rows)} tokens)")
    if rows and not fit:
        raise BadInput(f"--max-length {longest}: all {len(rows)} rows are longer")
    return fit


# ---- what a person reads ---------------------------------------------------------------------------------

def introduce(model, tokenizer, rows, held_out, plan, largest, device: str, args):
    """Print what the run will do, before it starts."""
    tokens, trained = size(rows), sum(sum(row.mask) for row in rows)
    parameters, updated = parameter_counts(model)
    cli.show(vars(args))
    print(f"device: {device}")
    print(f"model: {args.model}, {parameters:,} parameters, {updated:,} trained "
          f"({f'LoRA rank {args.rank} on {args.targets}' if args.lora else 'all'})")
    print(f"data: {', '.join(args.data)}: {cli.count(len(rows), 'row')}, {cli.count(tokens, 'token')}, "
          f"{trained / tokens:.0%} in the loss; held out: {cli.count(len(held_out), 'row')}")
    print(f"work: {cli.count(args.epochs, 'epoch')}, {cli.count(len(plan), 'step')} of "
          f"{cli.count(args.batch, 'row')}, {cli.count(args.epochs * tokens, 'token')}; "
          f"{memory(model, min(size(largest), args.micro_tokens), size(held_out))}")
    sizes = model.model.embed_tokens.weight.detach().float().norm(dim=1)
    if args.lora and sizes[tokenizer.end_of_turn] < 0.5 * sizes.median():
        print("note: the token that ends an answer has a small embedding, as if this model never met it. "
              "LoRA does not train embeddings: answers may not end; prefer --full")
    print("the first row, trained tokens marked:\n" + training.marked(tokenizer, rows[0].ids, rows[0].mask))


def finish(model, save, out, args):
    """Write the result under its final name, and print what to do with it."""
    result = out / ("adapter" if args.lora else "model")
    ranks.unshard(model)
    if ranks.rank() == 0:
        save(result)
        rows = list(files.readable_rows(out / "metrics.jsonl"))
        print(f"loss {rows[-1]['loss']:.4f} after {cli.count(rows[-1]['step'], 'step')}, peak memory "
              f"{peak_memory(model):.2f} GB; the result is {result}; curves: {write_report(out)}")
        print(verdict(rows, out))
        result = shlex.quote(str(result))
        policy = f"--model {args.model} --adapter {result}" if args.lora else f"--model {result}"
        print(f"next: python eval.py --model {result}{prompts.option()}\n"
              f"  or: python train_grpo.py {policy}{prompts.option()}")
    ranks.barrier()


def verdict(rows: list[dict], out: Path) -> str:
    """What the metrics say of a run: which step was the best, or that nothing was learned."""
    looks = [row for row in rows if "held_out_loss" in row]
    if looks:
        best = min(looks, key=itemgetter("held_out_loss"))
        words = "; ".join(f"held-out loss {row['held_out_loss']:.4f}, {row['held_out_right']:.0%} right "
                          f"after step {row['step']}" for row in (looks[0], best, looks[-1]))
        return f"{words}; " + (f"the second is {out / 'best'}" if best["step"] else
                               "nothing was learned that lowers it, so there is no best/")
    tenth = max(1, len(rows) // 10)
    told = [row["loss"] for row in rows]
    before, after = fmean(told[:tenth]), fmean(told[-tenth:])
    return (f"loss {before:.4f} in the first tenth of the steps, {after:.4f} in the last"
            + "; nothing was learned" * (after >= before and len(rows) > 1))


if __name__ == "__main__":
    cli.run(main, args, stopped=write_report)
