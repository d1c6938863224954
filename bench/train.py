"""Training speed: a step of SFT and of GRPO, ours beside a plain loop with transformers and peft.

    python bench/train.py --model DIR                      SmolLM2-135M: some ten minutes on two quiet cores
    python bench/train.py --model DIR --only grpo --device cuda

Both train LoRA of rank 16 on all linear layers in bfloat16 (--full: all weights, SFT only), without dropout,
on the same problems. SFT: --rows worked solutions of GSM8K a step. GRPO: --prompts x --samples replies of at
most --tokens tokens, temperature 1, rewards of +1 and -1 in turns (so that every reply has an advantage), KL
off. The plain loop is what people write, and what trainers on transformers do inside: it pads micro-batches
of --peer-batch rows, and makes the logits of all their tokens.

The contenders take turns, each in a process of its own, which warms up with a step and measures --steps more.
The step with the most tokens a second counts, since others may use the machine as well. Share of the matrix
rate: operations of the linear layers that the step needs, over what a large product reaches right after. The
last line is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_grpo
import train_sft
from bench.sampler import matrix_rate
from slm import checkpoint, lora, problems, training
from slm.prompts import SOLVER
from slm.runs import cli

CONTENDERS = "ours", "transformers + peft"


def arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    p.add_argument("--model", required=True, help="a directory or a hub id")
    p.add_argument("--only", choices=("sft", "grpo"), nargs="+", default=["sft", "grpo"])
    p.add_argument("--full", action="store_true", help="SFT of all weights")
    p.add_argument("--rows", type=cli.positive, default=16)
    p.add_argument("--prompts", type=cli.positive, default=4)
    p.add_argument("--samples", type=cli.positive, default=4)
    p.add_argument("--tokens", type=cli.positive, default=128)
    p.add_argument("--micro-tokens", type=cli.positive, default=2048)
    p.add_argument("--peer-batch", type=cli.positive, default=4)
    p.add_argument("--steps", type=cli.positive, default=2)
    p.add_argument("--repeat", type=cli.positive, default=2, help="processes of each contender, in turns")
    p.add_argument("--device", default="cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    p.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    return p.parse_args()


def main(args) -> None:
    if args.contender:
        print(json.dumps(measure(args, args.only[0])))
        return
    found = {}
    for what in args.only:
        best = {}
        for _ in range(args.repeat):
            for name in CONTENDERS:
                words = [sys.executable, __file__, *sys.argv[1:], "--only", what, "--contender", name]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name}, {what}: {done.stderr[-2000:]}")
                told = json.loads(done.stdout.splitlines()[-1])
                best[name] = max(told, best.get(name, told), key=lambda x: x["tokens"] / x["seconds"])
                print(f"{what} {name:20} {told['seconds']:.2f} s a step, {told['tokens']:,} tokens, "
                      f"{told['peak_gb']:.2f} GB, {told['matrix_share']:.0%} of the matrix rate", flush=True)
        ours, peer = (best[name] for name in CONTENDERS)
        rate = [x["tokens"] / x["seconds"] for x in (ours, peer)]
        print(f"{what}: {rate[0]:,.0f} and {rate[1]:,.0f} tokens/s, ratio {rate[0] / rate[1]:.2f}; "
              f"memory {ours['peak_gb'] / peer['peak_gb']:.2f}")
        found[what] = {"ratio": round(rate[0] / rate[1], 3), "ours": ours, "peer": peer,
                       "memory": round(ours["peak_gb"] / peer["peak_gb"], 3)}
    print(json.dumps({"model": args.model, "device": args.device, **found}))


def measure(args, what: str) -> dict:
    """Seconds of the fastest step, its tokens, peak memory and share of the matrix rate."""
    one_step, size = (ours if args.contender == CONTENDERS[0] else plain)(args, what)
    one_step(0)
    steps = []
    for number in range(1, args.steps + 1):
        clock(args)
        start = time.perf_counter()
        tokens, passes = one_step(number)
        clock(args)
        steps.append((time.perf_counter() - start, tokens, passes))
    seconds, tokens, passes = min(steps, key=lambda step: step[0] / step[1])
    rate = matrix_rate(args.device, torch.bfloat16, 8192 if args.device == "cuda" else 2048)
    memory = (torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    return {"seconds": seconds, "tokens": tokens, "peak_gb": memory,
            "matrix_share": passes * 2 * size / seconds / rate}


def clock(args) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def work(args, tokenizer, what: str, number: int) -> list:
    """The problems of a step, GRPO, or its rows of ids and mask, SFT."""
    count = args.rows if what == "sft" else args.prompts
    some = problems.load("gsm8k", "train", (args.steps + 1) * count)[number * count:(number + 1) * count]
    if what == "grpo":
        return some
    talks = [(p.question, train_sft.conversation(p.question, train_sft.written_out(p))) for p in some]
    return train_sft.fitting(tokenizer, talks, 4096)


# ---- ours ------------------------------------------------------------------------------------------------

def ours(args, what: str):
    """(a function: number of a step -> (tokens, tokens x passes of the network), numbers in the network)"""
    dtype = torch.float32 if args.full else torch.bfloat16
    model, tokenizer = checkpoint.load(args.model, torch.device(args.device), dtype)
    model.recompute, size = None, sum(p.numel() for p in model.parameters())
    if not args.full:
        lora.add(model, 16, 32, cli.TARGETS["all"])
    passes = 3 if args.full else 2  # forward, backward to the inputs, backward to the weights
    _, optimizer = training.start(model, 0.0)
    if what == "sft":
        model.train()
        autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.full)
        how = SimpleNamespace(micro_tokens=args.micro_tokens, clip=1.0)

        def one_step(number: int) -> tuple[int, int]:
            rows = work(args, tokenizer, what, number)
            train_sft.one_step(model, rows, optimizer, 1e-5, autocast, how)
            return train_sft.size(rows), passes * train_sft.size(rows)
        return one_step, size
    return reinforced(args, model, tokenizer, optimizer), size


def reinforced(args, model, tokenizer, optimizer):
    words = ["--model", args.model, "--samples", args.samples, "--max-tokens", args.tokens, "--kl", 0,
             "--temperature", 1, "--batch", args.prompts, "--micro-tokens", args.micro_tokens,
             "--truncated", "keep", "--importance-cap", 2, "--dppo-mask", 0.2, "--resample", 0]
    how = train_grpo.options().parse_args(list(map(str, words)))
    cli.resolve(how, train_grpo.PAPER, train_grpo.TINY)
    algorithm, workflow = train_grpo.ALGORITHMS["grpo"], train_grpo.workflows.workflow("solver")
    sampler = train_grpo.Sampler(model, tokenizer)

    def one_step(number: int) -> tuple[int, int]:
        seconds = train_grpo.Counter()
        episodes, _ = train_grpo.roll_out(work(args, tokenizer, "grpo", number), [], number, model, workflow,
                                          sampler, None, seconds, how)
        for place, episode in enumerate(episodes):
            episode.reward = 1.0 - 2 * (place % 2)
        records, divisor = train_grpo.give_credit(episodes, algorithm, {"sum": 0.0, "steps": 0.0}, how)
        train_grpo.update_policy(model, records, divisor, optimizer, 1e-5, algorithm, how)
        learned = sum(len(record.ids) for own in records for record in own)
        sampled = sum(e.tokens_out for e in episodes)
        return sampled, sampled + args.prompts * len(episodes[0].turns[0].reply.prompt_ids) + 2 * learned
    return one_step


# ---- the plain loop --------------------------------------------------------------------------------------

def plain(args, what: str):
    """As `ours`, with transformers and peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from slm.tokenizer import Tokenizer
    folder = checkpoint.resolve(args.model)
    tokenizer = Tokenizer.load(folder)
    dtype = torch.float32 if args.full else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)
    size = sum(p.numel() for p in model.parameters())
    if not args.full:
        shape = LoraConfig(r=16, lora_alpha=32, target_modules=list(cli.TARGETS["all"]))
        model = get_peft_model(model, shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.full)

    def update(rows: list[list[int]], masks: list[list[int]], worth: list[float]) -> None:
        """A step on the sum of worth x log-prob of the rows' trained tokens, over their number."""
        count = sum(map(sum, masks))
        for at in range(0, len(rows), args.peer_batch):
            some, width = rows[at:at + args.peer_batch], max(map(len, rows[at:at + args.peer_batch]))
            ids = torch.tensor([x + [0] * (width - len(x)) for x in some], device=args.device)
            seen = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in some], device=args.device)
            mask = torch.tensor([m + [0] * (width - len(m)) for m in masks[at:at + args.peer_batch]],
                                device=args.device)
            with autocast:
                logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1]
            logp = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            factor = torch.tensor(worth[at:at + args.peer_batch], device=args.device)[:, None]
            ratio = (logp - logp.detach()).exp() if what == "grpo" else logp
            (-(ratio * factor * mask[:, 1:]).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def sft_step(number: int) -> tuple[int, int]:
        rows = work(args, tokenizer, what, number)
        model.train()
        update([r.ids for r in rows], [[int(m > 0) for m in r.mask] for r in rows], [1.0] * len(rows))
        tokens = sum(len(r.ids) for r in rows)
        return tokens, (3 if args.full else 2) * tokens

    def grpo_step(number: int) -> tuple[int, int]:
        stops, chats = sorted(tokenizer.stop_ids), []
        for p in work(args, tokenizer, what, number):
            chats.append(tokenizer.chat([{"role": "user", "content": SOLVER(question=p.question)}]))
        width = max(map(len, chats))
        ids = torch.tensor([[stops[0]] * (width - len(x)) + x for x in chats], device=args.device)
        seen = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in chats], device=args.device)
        model.eval()
        with torch.no_grad():
            drawn = model.generate(
                input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=args.tokens, num_return_sequences=args.samples, eos_token_id=stops,
                pad_token_id=stops[0])
        rows, masks = [], []
        for place, new in enumerate(drawn[:, width:].tolist()):
            end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))
            prompt = chats[place // args.samples]
            rows.append(prompt + new[:end])
            masks.append([0] * len(prompt) + [1] * end)
        model.train()
        update(rows, masks, [1.0 - 2 * (place % 2) for place in range(len(rows))])
        sampled, learned = sum(map(sum, masks)), sum(map(len, rows))
        return sampled, sampled + sum(map(len, chats)) + 2 * learned
    return {"sft": sft_step, "grpo": grpo_step}[what], size


if __name__ == "__main__":
    cli.run(main, arguments())
