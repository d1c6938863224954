"""Stage 2: supervised fine-tuning on worked solutions, LoRA or full, solver or verifier data.

    python train_sft.py                                         the built-in model, a minute
    python train_sft.py --full
    python train_sft.py --model Qwen/Qwen2.5-Math-1.5B --data runs/data-gsm8k-math/records.jsonl
    torchrun --nproc_per_node 8 train_sft.py ...                the same on 8 GPUs

Data: JSON lines with `question` and `response` (what make_data.py writes; the standard prompt is put around
the question), or with `messages`: a list of role and content, where every assistant message is trained on.
The loss is taken on responses and the token that ends them. Rows longer than --max-length are left out and
counted.

A batch is --batch sequences; it is packed without padding and cut into micro-batches of --micro-tokens.
Losses are sums, divided by the batch's number of trained tokens: the cut does not change the gradient.
"""

from slm.runs import cli

PAPER = {"batch": 128, "epochs": 2, "max_length": 2048, "micro_tokens": 2048, "dropout": 0.05, "warmup": 0.03,
         "weight_decay": 0.01, "save_every": 20}
TINY = {"batch": 16, "max_length": 1024, "micro_tokens": 4096, "dropout": 0.0, "save_every": 1000}
RATES = {"paper": {"lora": 1e-4, "full": 5e-5}, "tiny": {"lora": 1e-2, "full": 1e-3}}


def options():
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", default="tiny", help="tiny, a directory or a hub id (default tiny)")
    g.add_argument("--data", nargs="+", action=cli.Names, metavar="A,B",
                   help="JSON lines; for tiny: default the newest run of make_data.py")
    g.add_argument("--limit", type=cli.positive, help="only the first rows")
    g.add_argument("--max-length", type=cli.positive, help=f"tokens a row may have ({both('max_length')})")
    g.add_argument("--train-on", choices=("response", "all"), default="response",
                   help="tokens in the loss; `all` is what the report did (default response)")
    g = p.add_argument_group("what is trained")
    how = g.add_mutually_exclusive_group()
    how.add_argument("--lora", action="store_true", help="a LoRA adapter (the default)")
    how.add_argument("--full", action="store_true", help="all weights")
    cli.adapter_options(g)
    g.add_argument("--dropout", type=cli.number(0, 0.99), help=f"on the adapter's input ({both('dropout')})")
    g = p.add_argument_group("optimization")
    g.add_argument("--lr", type=cli.number(0, 10),
                   help="learning rate (default LoRA 1e-4, full 5e-5; tiny 1e-2, 1e-3)")
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
from pathlib import Path

import torch

from slm import BadInput, checkpoint, lora, lora_files, problems, report, training
from slm.episode import user
from slm.losses import pack, score, sft_loss
from slm.prompts import SOLVER
from slm.runs import files, ranks
from slm.runs.device import memory, parameters, peak_memory, pick_device
from slm.runs.files import readable_rows
from slm.runs.rundir import RunDir, new_path, settled

# ---- data ------------------------------------------------------------------------------------------------

def newest() -> str:
    """The records of the newest run of make_data.py, or else the tiny world's own solutions."""
    made = sorted(Path("runs").glob("data-*/records.jsonl"), key=lambda p: p.stat().st_mtime)
    if not made:
        print("no run of make_data.py found: training on the tiny world's own solutions")
    return str(made[-1]) if made else "tiny"


def read(data: str, limit: int | None) -> list[list[dict]]:
    """The conversations of a file of records, or the worked solutions of a problem set."""
    if (path := Path(data)).is_file():
        rows = files.read_rows(path)
        if not rows:
            raise BadInput(f"{path}: no rows; expected JSON lines with question and response, or messages")
        first = set(rows[0][1])
        if first & {"response", "messages"} or not first & {"answer", "gold"}:
            return [messages_of(row, f"{path} line {n}") for n, row in rows[:limit]]
    known = [p for p in problems.load(data, "train", limit) if p.solution]
    if not known:
        raise BadInput(f"--data {data}: problems without solutions; make_data.py gets them from a teacher")
    return [conversation(p.question, written_out(p)) for p in known]


def conversation(question: str, response: str) -> list[dict]:
    return [user(SOLVER(question=question)), {"role": "assistant", "content": response}]


def written_out(problem) -> str:
    """A worked solution without GSM8K's <<48/2=24>> notes, with its answer in a box."""
    text = re.sub("<<.*?>>", "", problem.solution)
    return text if "\\boxed" in text else f"{text}\nThe answer is \\boxed{{{problem.gold}}}."


def messages_of(row: dict, where: str) -> list[dict]:
    """A record as a conversation. BadInput, naming where it stands, if it is none."""
    if isinstance(row.get("question"), str) and isinstance(row.get("response"), str):
        if not (row["question"].strip() and row["response"].strip()):
            raise BadInput(f"{where}: the question or the response is empty")
        return conversation(row["question"], row["response"])
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise BadInput(f"{where}: expected question and response, or messages; found {', '.join(row)}")
    is_text = lambda m: isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
    if not all(map(is_text, messages)) or not any(m["role"] == "assistant" for m in messages):
        raise BadInput(f"{where}: messages must be a list of role and content, at least one of the assistant")
    return messages


def encode(tokenizer, messages: list[dict], train_on: str = "response") -> tuple[list[int], list[int]]:
    """A conversation -> ids and mask; 1 on assistant messages and their end token, with `all` on
    everything."""
    ids, mask = [], []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.chat(messages[:i], generation=True)
        if prompt[:len(ids)] != ids:
            raise BadInput("the chat template rewrites earlier turns: several of them can't be one sequence")
        reply = [*tokenizer.encode(message["content"]), tokenizer.end_of_turn]
        mask += [0] * (len(prompt) - len(ids)) + [1] * len(reply)
        ids = prompt + reply
    if train_on == "all":
        mask = [0] + [1] * (len(ids) - 1)
    return ids, mask


def fitting(tokenizer, conversations, args) -> list[tuple[list[int], list[int]]]:
    """Encoded rows of at most --max-length tokens; says how many are longer."""
    rows = [encode(tokenizer, messages, args.train_on) for messages in conversations]
    fit = [row for row in rows if len(row[0]) <= args.max_length]
    if len(fit) < len(rows):
        print(f"left out: {len(rows) - len(fit)} of {len(rows)} rows are longer than --max-length "
              f"{args.max_length} (the longest has {max(len(ids) for ids, _ in rows)} tokens)")
    if not fit:
        raise BadInput(f"--max-length {args.max_length}: all {len(rows)} rows are longer")
    return fit


# ---- training --------------------------------------------------------------------------------------------

def main(args):
    how = "full" if args.full else "lora"
    cli.resolve(args, {**PAPER, "lr": RATES["paper"][how]}, {**TINY, "lr": RATES["tiny"][how]})
    if args.data is None and not cli.is_small(args.model):
        raise BadInput("--data is missing: records of make_data.py, or gsm8k for its worked solutions")
    args.data = args.data or [newest()]
    conversations = [c for data in args.data for c in read(data, args.limit)]
    out = new_path(args.out, f"sft-{cli.model_name(args.model)}-{how}", args.resume)
    args.out = str(out)
    device, dtype, reason = pick_device(args.device, settled(out, args), args.model)
    ranks.start_ranks(device)
    torch.manual_seed(args.seed)  # the adapter's initial values

    model, tokenizer = checkpoint.load(args.model, device, torch.float32 if args.full else dtype)
    model.recompute = lora.recompute(model) if args.recompute else None
    if not args.full:
        lora.add(model, args.rank, args.alpha, cli.TARGETS[args.targets], args.dropout)
    args.max_length = min(args.max_length, model.config.positions)
    rows = fitting(tokenizer, conversations, args)
    steps = training.batches(len(rows), args.batch, args.epochs, args.seed)

    args.dtype = str(dtype).removeprefix("torch.")
    rundir = RunDir(out, vars(args), files.fingerprint(rows), args.resume, log=ranks.rank() == 0)
    if ranks.rank() == 0:
        cli.show(vars(args))
        introduce(model, tokenizer, rows, steps, device, dtype, reason, args)
    train(model, rows, steps, rundir, device, dtype, args)
    finish(model, tokenizer, out, args)


def introduce(model, tokenizer, rows, steps, device, dtype, reason, args):
    """What is about to happen, before it does."""
    tokens, trained = (sum(len(ids) for ids, _ in rows), sum(sum(mask) for _, mask in rows))
    every, updated = (sum(p.numel() for p in ps) for ps in parameters(model))
    print(f"device: {device}, {str(dtype).removeprefix('torch.')} ({reason})")
    print(f"model: {args.model}, {every:,} parameters, {updated:,} trained "
          f"({'all' if args.full else f'LoRA rank {args.rank} on {args.targets}'})")
    print(f"data: {', '.join(args.data)}: {len(rows):,} rows, {tokens:,} tokens, "
          f"{trained / tokens:.0%} in the loss")
    print(f"work: {args.epochs} epochs, {len(steps)} steps of {args.batch} rows, "
          f"{args.epochs * tokens:,} tokens; {memory(model, args.micro_tokens)}")
    sizes = model.model.embed_tokens.weight.detach().float().norm(dim=1)
    if not args.full and sizes[tokenizer.end_of_turn] < 0.5 * sizes.median():
        print("note: the token that ends an answer has a small embedding, as if this model never met it. "
              "LoRA does not train embeddings: answers may not end; prefer --full")
    print("the first row, trained tokens marked:\n" + training.marked(tokenizer, *rows[0]))


def train(model, rows, steps, rundir, device, dtype, args):
    """All steps from the last checkpoint on."""
    ranks.shard(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.full and dtype == torch.bfloat16)
    model.train()
    for step, bar in training.steps(len(steps), rundir, trained, optimizer, args):
        began = time.perf_counter()
        lr = args.lr * training.cosine(step, len(steps), args.warmup)
        with autocast:
            row = one_step(model, [rows[i] for i in steps[step]], trained, optimizer, lr, args)
        rate = row["tokens"] / (time.perf_counter() - began)
        rundir.log("metrics", {"step": step + 1, **row, "lr": lr, "tokens_per_s": round(rate)})
        bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:,.0f} tok/s")


def one_step(model, batch, trained, optimizer, lr, args) -> dict:
    """One optimizer step on a batch of (ids, mask): sums over micro-batches and ranks, one division."""
    count = sum(sum(mask) for _, mask in batch)
    mine = batch[ranks.rank()::ranks.world()]
    weight = 1 / count if mine else 0.0  # a rank without a row still has to meet the others
    mine = mine or batch[:1]
    micro = pack([len(ids) for ids, _ in mine], args.micro_tokens)
    loss_sum = 0.0
    for i, members in enumerate(micro):
        ranks.last_micro_batch(model, i == len(micro) - 1)
        logp, _ = score(model, [mine[j][0] for j in members], [mine[j][1] for j in members])
        loss, _ = sft_loss(logp)
        (loss * weight).backward()
        loss_sum += loss.item() * weight
    norm = training.update(optimizer, trained.values(), lr, args.clip)
    loss = ranks.summed({"loss": loss_sum}, logp.device)["loss"]
    if not math.isfinite(loss):
        raise BadInput(f"the loss is {loss}: lower --lr {args.lr}, or use --dtype float32")
    tokens = sum(len(ids) for ids, _ in batch)
    return {"loss": loss, "grad_norm": norm, "tokens": tokens, "trained_tokens": count}


def finish(model, tokenizer, out, args):
    """Write the result under its final name, and say what to do with it."""
    result = out / ("model" if args.full else "adapter")
    ranks.unshard(model)
    if ranks.rank() == 0 and args.full:
        checkpoint.save(model, tokenizer, result)
    elif ranks.rank() == 0:
        lora_files.save(model, result, base=args.model)
    ranks.barrier()
    if ranks.rank() == 0:
        *_, last = readable_rows(out / "metrics.jsonl")
        print(f"loss {last['loss']:.4f} after {last['step']} steps, peak memory "
              f"{peak_memory(model):.1f} GB; the result is {result}; curves: {report.write(out)}")
        result = shlex.quote(str(result))
        print(f"next: python eval.py --model {result}")
        print("  or: python train_grpo.py " + (f"--model {result}" if args.full else
                                               f"--model {args.model} --adapter {result}"))


if __name__ == "__main__":
    cli.run(main, args)
