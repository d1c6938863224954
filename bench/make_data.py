"""The data pipeline under fire: every problem of GSM8K and MATH through a cascade at 200 requests at once,
with a server that is slow, busy and broken, killed with SIGKILL five times on the way.

    python bench/make_data.py [--limit 1000] [--kills 5]

Needs the data sets (downloaded once, or $SLM_DATA). The server answers from the gold, sometimes wrongly; it
runs in a process of its own and counts what it answered. At the end: nothing lost, nothing doubled, seconds
and peak memory.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from faulty_server import Faults, serve, solution

from slm.problems import load

SETS = ("gsm8k", "math")
REPLIES = {"no_think": 0.01, "no_box": 0.01, "cut": 0.01, "refusal": 0.005, "huge": 0.005}
TRIES = {"busy": 0.02, "broken": 0.02, "reset": 0.02, "torn": 0.01, "empty": 0.01}
CASCADE = """
[[teacher]]
name = "first"
base_url = "{url}"
model = "first"
workers = 200

[[teacher]]
name = "second"
round = 2
base_url = "{url}"
model = "second"
workers = 200
"""


def be_the_server(mean_latency: float) -> None:
    """The server, until its standard input closes; the last line it prints is how many it answered."""
    gold = {p.question: p.gold for name in SETS for p in load(name)}
    lost = {question for i, question in enumerate(gold) if i % 37 == 0}  # 2.7 % that nobody solves

    def answer(body: dict, rng: random.Random) -> str:
        question = body["messages"][-1]["content"]
        wrong = question in lost or rng.random() < (0.3 if body["model"] == "first" else 0.1)
        answer = "12345.678" if wrong else gold[question]
        thought = " ".join(rng.choices(question.split(), k=150)) + " 考える 🤔"
        steps = solution(f"From the text it follows: {answer}.", answer)
        return f"<think>\n{thought}\n</think>\n{steps}"

    faults = Faults(REPLIES, TRIES, latency=mean_latency, slowest=5.0, retry_after=1.0)
    with serve(answer, faults) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(json.dumps([sum(server.seen.values()), sum(server.answered.values())]), flush=True)


def rss(pid: int) -> float:
    """Peak resident memory of a process so far, in MB (0 when it has ended)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


def main(args) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        problems = {p.id: p for name in SETS for p in load(name, "train", args.limit)}
    folder = Path(tempfile.mkdtemp(prefix="slm-bench-"))
    out = folder / "out"
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(args.latency)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    (folder / "cascade.toml").write_text(CASCADE.format(url=server.stdout.readline().strip()))
    command = [sys.executable, str(ROOT / "make_data.py"), "--data", *SETS, "--out", str(out),
               "--cascade", str(folder / "cascade.toml")]
    command += ["--limit", str(args.limit)] if args.limit else []
    files = [out / "records.jsonl", out / "rejected.jsonl"]
    lines = lambda: sum(f.read_bytes().count(b"\n") for f in files if f.exists())
    start, peak = time.monotonic(), 0.0
    for kill in range(args.kills + 1):
        process = subprocess.Popen(command, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT)
        until = len(problems) * (kill + 1) // (args.kills + 1) if kill < args.kills else float("inf")
        while process.poll() is None and lines() < until:
            peak = max(peak, rss(process.pid))
            time.sleep(0.5)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"killed at {lines():,} attempts, {time.monotonic() - start:.0f} s", flush=True)
    seconds = time.monotonic() - start
    asked, answered = json.loads(server.communicate()[0])
    print((folder / "log").read_text().split("source ", 1)[-1])
    check(problems, files, answered, args.kills)
    print(f"{asked:,} HTTP requests, {answered:,} whole answers, {lines():,} attempts on disk")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of CPU, the server's included), "
          f"peak memory {peak:.0f} MB, load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores; "
          f"{folder}")


def check(problems: dict, files: list[Path], answered: int, kills: int) -> None:
    """Nothing lost, nothing doubled: every problem solved or out of attempts, no attempt twice."""
    tried, solved = Counter(), Counter()
    for file in files:
        with file.open() as f:
            for line in f:
                row = json.loads(line)
                tried[row["id"], row["teacher"], row["attempt"]] += 1
                solved[row["id"]] += row["cause"] is None
    summary = json.loads((files[0].parent / "summary.json").read_text())
    dropped = set(summary["overlaps"])
    for id in problems.keys() - dropped:
        spent = sum(tried[id, t, k] for t, most in (("first", 3), ("second", 5)) for k in range(1, most + 1))
        assert solved[id] == 1 or (solved[id] == 0 and spent == 8), (id, solved[id], spent)
    assert max(tried.values()) == 1, "an attempt is on disk twice"
    assert not dropped & {id for id, _, _ in tried}, "a dropped problem was asked"
    assert answered - sum(tried.values()) <= 200 * kills, "more was asked again than was on the wire"
    right = sum(solved.values())
    print(f"whole: {right:,} solved + {len(problems) - len(dropped) - right:,} without a solution + "
          f"{len(dropped):,} dropped = {len(problems):,} problems; no attempt twice")


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--limit", type=int, help="problems of each set (default all)")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.5, help="mean seconds of an answer (at most 5)")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    be_the_server(args.serve) if args.serve is not None else main(args)
