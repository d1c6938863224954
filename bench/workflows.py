"""Workflows: many problems at once beside one at a time, on the same problems.

    python bench/workflows.py                                          tiny, 64 problems, minutes
    python bench/workflows.py --model DIR --data gsm8k --problems 16 --max-tokens 128 --workflow majority_vote
    python bench/workflows.py --workflow mcts@8 dvts@8 --problems 200 --at-once-only

Problems a second, their ratio, and the share of the sampler's time in which its batch was at least three
quarters full or requests waited. In float32 (--dtype float32) the answers of both ways must be the same: if
they are not, this ends with an error. The last line is JSON.
"""

import argparse
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from slm import BadInput, problems, workflows
from slm.backends import own_model
from slm.episode import Sampling, jobs_for, run_episodes
from slm.runs import cli
from slm.sandbox import Sandbox

USUAL = ["majority_vote", "solver_checker_stateless", "solver_verifier"]


def arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    p.add_argument("--model", default="tiny", help="tiny, a directory or a hub id")
    p.add_argument("--data", default="tiny")
    p.add_argument("--problems", type=cli.positive, default=64)
    p.add_argument("--workflow", nargs="+", default=USUAL, metavar="NAME")
    p.add_argument("--max-tokens", type=cli.positive, default=200)
    p.add_argument("--batch", type=cli.positive, help="replies drawn at once (default: the sampler's own)")
    p.add_argument("--at-once-only", action="store_true", help="not one at a time")
    cli.step_option(p, cli.defaults({"step_rule": "paragraph"}, {"step_rule": "line"}))
    cli.device_options(p)
    return p.parse_args()


def main(args) -> None:
    cli.resolve(args, {"step_rule": "paragraph"}, {"step_rule": "line"})
    some, found = problems.load(args.data, "test", args.problems), {}
    sampler = own_model(args.model, args.device, args.dtype, batch=args.batch)
    sampling = Sampling(args.max_tokens, stop_at_box=True, step_rule=args.step_rule)
    with contextlib.closing(Sandbox()) as sandbox:
        for name in args.workflow:
            run = partial(timed, workflows.workflow(name), sampler, sandbox, sampling)
            run(some[:2])  # warm
            sampler.forget()
            sampler.busy.clear()
            answers, seconds = run(some)
            full = sampler.busy["full seconds"] / sampler.busy["seconds"]
            rate, told = len(some) / seconds, ""
            found[name] = {"at once": round(rate, 3), "full": round(full, 3)}
            if not args.at_once_only:
                alone = [run([problem]) for problem in some]
                slow = len(some) / sum(spent for _, spent in alone)
                same = sum(one == [answer] for (one, _), answer in zip(alone, answers))
                if next(sampler.model.parameters()).dtype.itemsize == 4 and same < len(some):
                    raise BadInput(f"{name}: {len(some) - same} answers depend on what else is in the batch")
                found[name] |= {"alone": round(slow, 3), "ratio": round(rate / slow, 2), "same": same}
                told = f", alone {slow:.2f}: ratio {rate / slow:.2f}; {same} of {len(some)} answers the same"
            print(f"{name:28} {rate:.2f} problems/s at once, the batch full in {full:.0%} of the time{told}",
                  flush=True)
    print(json.dumps({"model": args.model, "problems": args.problems, **found}))


def timed(workflow, sampler, sandbox, sampling: Sampling, few: list) -> tuple[list[str], float]:
    """(the responses to a few problems, seconds)"""
    start = time.perf_counter()
    episodes = run_episodes(jobs_for(few, workflow), sampler, sandbox, sampling=sampling)
    return [e.response for e in episodes], time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main, arguments())
