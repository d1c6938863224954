"""Sampling speed: ours beside transformers, its continuous batching, llama.cpp and vLLM, on the same prompts.

    python bench/sampler.py --repeat 3                             # tiny, 64 sequences: a second of work each
    python bench/sampler.py --model DIR --data gsm8k --prompts 48 --tokens 192
    python bench/sampler.py --model DIR --data gsm8k --prompts 8 --samples 8
    python bench/sampler.py --model DIR --data gsm8k --prompts 4 --batch 1
    python bench/sampler.py --device cuda --model DIR --data gsm8k --prompts 256 --lengths gold --tokens 512

Each contender runs in a process of its own, so that its peak memory is its own, and with
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow down what else runs. (Importing slm lets them
spin for 0.1 ms first, in transformers' process too; GOMP_SPINCOUNT=0 switches that off.) Same prompt ids,
same stop ids, answers of their natural lengths; greedy, or temperature 1 where --samples is above 1. With
--lengths gold (for random weights, which never stop) an answer is as long as the problem's own solution.
transformers gets left-padded batches of each size in --peer-batch, and its best one counts. Time is from the
first prompt to the last reply, the models loaded and warm: on a GPU ours has answered as many others before,
and so has what they share with these (a chat template's beginning) in its cache.

The floor is what memory allows: the weights once a step and the live cache of every row, over the bandwidth
of a large copy measured afterwards. The last line is JSON. Peers need requirements-dev.txt; --peers names
more than transformers' generate.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from slm import BadInput
from slm.runs import cli


def arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    p.add_argument("--model", default="tiny", help="tiny, a directory or a hub id")
    p.add_argument("--data", default="tiny", help="where the prompts come from, as for eval.py")
    p.add_argument("--prompts", type=cli.positive, default=64)
    p.add_argument("--samples", type=cli.positive, default=1, help="samples of each prompt")
    p.add_argument("--tokens", type=cli.positive, default=192, help="new tokens at most")
    p.add_argument("--lengths", choices=("natural", "gold"), default="natural", help="where answers end")
    p.add_argument("--batch", type=cli.positive, help="rows of our batch; default: the sampler's own")
    p.add_argument("--peer-batch", type=int, nargs="+", help="of transformers; default: all at once")
    p.add_argument("--device", default="cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--peer-dtype", choices=("float32", "bfloat16"), nargs="+", help="default: the same")
    p.add_argument("--gguf", help="the model as GGUF for llama.cpp (batch 1; needs llama-cpp-python)")
    p.add_argument("--adapter", type=cli.positive, help="measure ours with a LoRA adapter of this rank too")
    p.add_argument("--peers", nargs="*", default=["transformers"],
                   choices=("transformers", "transformers-continuous", "llama.cpp", "vllm", "vllm-eager"))
    p.add_argument("--vllm", metavar="PYTHON", help="the Python of vLLM's own environment, for these peers")
    p.add_argument("--repeat", type=cli.positive, default=1, help="runs of each, in turns; the best counts")
    p.add_argument("--seconds", type=cli.positive, default=600, help="a contender is stopped after this long")
    p.add_argument("--only", help=argparse.SUPPRESS)
    return p.parse_args()


def prompts(args, tokenizer, skip: int = 0) -> tuple[list[list[int]], list[int]]:
    """The ids of each prompt, and how many tokens its answer may have."""
    from slm import problems
    from slm.prompts import SOLVER
    found = problems.load(args.data, "test", skip + args.prompts)[skip:]
    return ([tokenizer.chat([{"role": "user", "content": SOLVER(question=p.question)}]) for p in found],
            [min(args.tokens, len(tokenizer.encode(p.solution)) if args.lengths == "gold" else args.tokens)
             for p in found])


def bandwidth(device, size: int = 1 << 28) -> float:
    """Bytes a second that a large copy moves, read and written."""
    import torch
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    best = float("inf")
    for _ in range(5):
        start = clock(device)
        b.copy_(a)
        best = min(best, clock(device) - start)
    return 2 * size / best


def matrix_rate(device, dtype, n: int = 2048) -> float:
    """Floating-point operations a second of a large square product."""
    import torch
    a = torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = clock(device)
        a @ a
        best = min(best, clock(device) - start)
    return 2 * n ** 3 / best


def clock(device) -> float:
    if str(device).startswith("cuda"):
        import torch
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device) -> float:
    """GB"""
    if str(device).startswith("cuda"):
        import torch
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---- the contenders: each returns a dict with tokens, seconds, replies -----------------------------------

def ours(args, rank: int = 0) -> dict:
    import torch

    from slm import checkpoint, lora
    from slm.episode import Request, Sampling
    from slm.sampling import Sampler
    begin = time.perf_counter()
    model, tokenizer = checkpoint.load(args.model, args.device, getattr(torch, args.dtype))
    if rank:  # B stays zero, so that it writes what the model without it writes
        lora.add(model, r=rank)
    sampler = Sampler(model, tokenizer, max_batch=args.batch)
    temperature = 1.0 if args.samples > 1 else 0.0

    def requests(skip=0):
        return [Request(ids=x, sampling=Sampling(n, temperature), n=args.samples)
                for x, n in zip(*prompts(args, tokenizer, skip))]

    cuda, first = args.device.startswith("cuda"), None
    others = requests(args.prompts if cuda else 0)
    sampler.generate([replace(r, sampling=Sampling(4, temperature)) for r in others[:4]], progress=False)
    ready = time.perf_counter() - begin
    if cuda:  # all sizes of a batch get recorded
        start = clock(args.device)
        sampler.generate(others, progress=False)
        first = clock(args.device) - start
    else:
        sampler.forget()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    steps = watched(sampler, weights, args.device)
    work = requests()
    start = clock(args.device)
    replies = [reply for group in sampler.generate(work, progress=False) for reply in group]
    seconds, memory = clock(args.device) - start, peak(args.device)
    tokens, rounds = sum(len(r.ids) for r in replies), sum(s["rounds"] for s in steps)
    gb_s, flop_s = bandwidth(args.device, 1 << 32 if cuda else 1 << 28), matrix_rate(
        args.device, getattr(torch, args.dtype), 8192 if cuda else 2048)
    full = [s for s in steps if s["rows"] >= 0.75 * max(s["rows"] for s in steps)]
    share = lambda some: sum(s["bytes"] for s in some) / gb_s / sum(s["seconds"] for s in some)
    decode = sum(s["seconds"] for s in steps)
    flops = 2 * tokens * sum(p.numel() for p in model.parameters())
    return {"tokens": tokens, "seconds": seconds, "decode_seconds": decode, "decode_steps": rounds,
            "tokens_a_step": tokens / rounds, "floor_share": share(steps), "floor_share_full": share(full),
            "matrix_share": flops / flop_s / decode, "gb_s": gb_s / 1e9, "gflop_s": flop_s / 1e9,
            "startup_seconds": ready, "first_seconds": first, "finish": count(r.finish for r in replies),
            "replies": [r.ids for r in replies], "peak_gb": memory}


def watched(sampler, weights: int, device) -> list[dict]:
    """For each of the sampler's decoding steps from now on: its seconds, rows, rounds of one token a row (or
    of several, where they are guessed), and the bytes that these must read: weights and live cache."""
    steps, decode, rounds = [], sampler._decode, [0]
    round_ = "_recorded_round" if sampler.recorded else "_round"
    inner = getattr(sampler, round_)

    def one_round(*args):
        rounds[0] += 1
        return inner(*args)

    def step():
        rows, before, start = sampler.slots.live, rounds[0], clock(device)
        held = [len(row.tokens) for row in rows]
        decode()
        n, new = rounds[0] - before, [len(row.tokens) - many for row, many in zip(rows, held)]
        live = sum(many * count + count * (count - 1) // 2 for many, count in zip(held, new))
        steps.append({"seconds": clock(device) - start, "rows": len(rows), "rounds": n,
                      "bytes": n * weights + live * sampler.cache.token_bytes})
    setattr(sampler, round_, one_round)
    sampler._decode = step
    return steps


def transformers(args, dtype: str, batch: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from slm import checkpoint
    from slm.tokenizer import Tokenizer
    folder = checkpoint.resolve(args.model)
    tokenizer = Tokenizer.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(args.device).eval()
    stops, (ids, limits), replies = sorted(tokenizer.stop_ids), prompts(args, tokenizer), []
    batch = max(1, (batch or len(ids) * args.samples) // args.samples)

    def generate(some, tokens):
        width = max(map(len, some))
        padded = torch.tensor([[stops[0]] * (width - len(x)) + x for x in some], device=args.device)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in some], device=args.device)
        how = ({"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
                "num_return_sequences": args.samples} if args.samples > 1 else {"do_sample": False})
        with torch.inference_mode():
            out = model.generate(padded, attention_mask=mask, max_new_tokens=tokens, eos_token_id=stops,
                                 pad_token_id=stops[0], **how)
        return out[:, width:].tolist()

    generate(ids[:4], 4)
    start = clock(args.device)
    for i in range(0, len(ids), batch):
        rows = generate(ids[i:i + batch], max(limits[i:i + batch]))
        replies += [cut(row[:limits[i + j // args.samples]], stops) for j, row in enumerate(rows)]
    seconds = clock(args.device) - start
    return {"tokens": sum(map(len, replies)), "seconds": seconds, "replies": replies}


def transformers_continuous(args) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from slm import checkpoint
    from slm.tokenizer import Tokenizer
    folder = checkpoint.resolve(args.model)
    tokenizer = Tokenizer.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    work = [pair for pair in zip(*prompts(args, tokenizer)) for _ in range(args.samples)]
    stops, replies = sorted(tokenizer.stop_ids), {}
    config = {"eos_token_id": stops, "pad_token_id": stops[0], "do_sample": args.samples > 1,
              "temperature": 1.0, "top_k": 0}
    model.generate_batch(inputs=[ids for ids, _ in work[:4]],
                         generation_config=GenerationConfig(max_new_tokens=4, **config))
    config = GenerationConfig(max_new_tokens=args.tokens, **config)
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        start = clock(args.device)
        order = [manager.add_request(ids, max_new_tokens=limit) for ids, limit in work]
        while len(replies) < len(work):
            result = manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError(f"nothing came for a minute after {len(replies)} replies")
            if result.is_finished():
                replies[result.request_id] = cut(list(result.generated_tokens), stops)
        seconds = clock(args.device) - start
    return {"tokens": sum(map(len, replies.values())), "seconds": seconds,
            "replies": [replies[request] for request in order]}


def llama_cpp(args) -> dict:
    from llama_cpp import Llama

    from slm import checkpoint
    from slm.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(checkpoint.resolve(args.model))
    model = Llama(args.gguf, n_ctx=2048, n_threads=os.cpu_count(), verbose=False)
    ids, limits = prompts(args, tokenizer)

    def write(prompt, limit):
        reply = []
        for token in model.generate(prompt, temp=0.0, reset=True):
            reply.append(token)
            if token in tokenizer.stop_ids or len(reply) == limit:
                return reply

    write(ids[0][:8], 4)
    start = time.perf_counter()
    replies = [write(*pair) for pair in zip(ids, limits)]
    return {"tokens": sum(map(len, replies)), "seconds": time.perf_counter() - start, "replies": replies}


def vllm(args, eager: bool = False) -> dict:
    """In vLLM's own Python and in one process, so that its peak memory is seen. eager: not compiled."""
    import torch  # noqa: F401  vLLM finds its operators through it
    from vllm import LLM, SamplingParams

    from slm import checkpoint
    from slm.tokenizer import Tokenizer
    folder = checkpoint.resolve(args.model)
    tokenizer = Tokenizer.load(folder)
    ids, limits = prompts(args, tokenizer)
    longest = max(len(x) + limit for x, limit in zip(ids, limits))
    model = LLM(model=str(folder), dtype=args.dtype, max_model_len=longest, enforce_eager=eager,
                max_num_seqs=args.batch or len(ids) * args.samples, disable_log_stats=True)
    stops, temperature = sorted(tokenizer.stop_ids), 1.0 if args.samples > 1 else 0.0

    def write(some, most):
        asked = [SamplingParams(n=args.samples, temperature=temperature, max_tokens=n, stop_token_ids=stops,
                                detokenize=False) for n in most]
        done = model.generate([{"prompt_token_ids": x} for x in some], asked, use_tqdm=False)
        return [list(reply.token_ids) for request in done for reply in request.outputs]

    write(ids, [4] * len(ids))
    model.reset_prefix_cache()  # ours starts without one
    start = time.perf_counter()
    if args.batch == 1:
        replies = [write([x], [limit])[0] for x, limit in zip(ids, limits)]
    else:
        replies = write(ids, limits)
    return {"tokens": sum(map(len, replies)), "seconds": time.perf_counter() - start, "replies": replies}


def cut(ids: list[int], stops: list[int]) -> list[int]:
    """The ids up to and with the first stop id."""
    return ids[:next((i + 1 for i, t in enumerate(ids) if t in stops), len(ids))]


def count(items) -> dict:
    items = list(items)
    return {x: items.count(x) for x in sorted(set(items))}


# ---- one process each, and the comparison ----------------------------------------------------------------

def contender(args) -> None:
    """In the child: run one contender and print its result as the last line."""
    name, *more = (int(x) if x.isdigit() else x for x in args.only.split(":"))
    call = {"ours": ours, "transformers": transformers, "transformers-continuous": transformers_continuous,
            "llama.cpp": llama_cpp, "vllm": vllm, "vllm-eager": partial(vllm, eager=True)}[name]
    result = call(args, *more)
    print(json.dumps({"peak_gb": peak(args.device), **result}))


def measure(name: str, args) -> dict | None:
    seconds, python, more = args.seconds, sys.executable, {}
    if name.startswith("vllm"):  # as many threads as the others, on all cores that this process may use
        python = args.vllm or python
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(Path(__file__).parents[1])}
    try:
        done = subprocess.run([python, __file__, *sys.argv[1:], "--only", name], text=True,
                              capture_output=True, timeout=seconds,
                              env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **more})
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {seconds} s")
        return None
    if done.returncode:
        print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}")
        return None
    result = json.loads(done.stdout.splitlines()[-1])
    result["rate"] = result["tokens"] / result["seconds"]
    r = result
    print(f"{name:34} {r['rate']:9.1f} tok/s  ({r['tokens']:,} tokens in {r['seconds']:.1f} s, "
          f"peak {r['peak_gb']:.2f} GB)", flush=True)
    if "floor_share" in r:
        print(f"{'':34} decode: {r['floor_share']:.0%} of the bandwidth floor ({r['floor_share_full']:.0%} "
              f"while the batch is three quarters full or more), {r['matrix_share']:.0%} of "
              f"the matrix rate, {r['tokens_a_step']:.1f} tokens a step "
              f"({r['gb_s']:.0f} GB/s, {r['gflop_s']:.0f} GFLOP/s)")
    return result


def main(args) -> None:
    names = ["ours", *([f"ours:{args.adapter}"] if args.adapter else [])]
    for dtype in args.peer_dtype or [args.dtype]:
        names += [f"transformers:{dtype}:{b}" for b in args.peer_batch or [args.batch or 0]
                  if "transformers" in args.peers]
    names += [p for p in args.peers if p != "transformers"]
    results: dict[str, dict] = {}
    for name in names * args.repeat:
        r = measure(name, args)
        if r and r["rate"] > results.get(name, {"rate": 0})["rate"]:
            results[name] = r
    if "ours" not in results:
        raise BadInput("nothing to compare: ours failed, see above")
    mine = results.pop("ours")
    summary = {"model": str(args.model), "device": args.device, "dtype": args.dtype, "prompts": args.prompts,
               "samples": args.samples, "tokens": args.tokens,
               "ours": {k: v for k, v in mine.items() if k != "replies"}}
    if with_adapter := results.pop(f"ours:{args.adapter}", None):
        summary["adapter cost"] = round(with_adapter["seconds"] / mine["seconds"] - 1, 3)
        print(f"with an adapter of rank {args.adapter}: {summary['adapter cost']:+.0%} time")
    for peer in ("transformers", "transformers-continuous", "llama.cpp", "vllm", "vllm-eager"):
        found = [r for name, r in results.items() if name.split(":")[0] == peer]
        if found:
            best = max(found, key=lambda r: r["rate"])
            same = sum(a == b for a, b in zip(mine["replies"], best["replies"]))
            summary[peer] = {k: v for k, v in best.items() if k != "replies"}
            summary[f"ratio to {peer}"] = round(mine["rate"] / best["rate"], 2)
            print(f"ours / {peer}: {mine['rate'] / best['rate']:.2f}"
                  + (f"; {same} of {len(mine['replies'])} replies the same" if args.samples == 1 else ""))
    print(json.dumps(summary))


if __name__ == "__main__":
    args = arguments()
    cli.run(contender if args.only else main, args)
