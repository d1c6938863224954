"""The sandbox against a plain subprocess: what gets out, what still works, and what a run costs.

    python bench/sandbox.py            about a minute on two quiet cores; the last line is JSON

Attacks and benign programs are those of tests/sandbox_corpus.py. A run is contained when it neither reports
success nor leaves a trace outside; a benign program is right when its output is exactly the expected one. The
plain subprocess is `python -c` with its output captured; it doesn't show last expressions, which is most of
what it gets wrong.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
from sandbox_corpus import ATTACKS, BENIGN, SECRET, World, run_all, run_plain

from slm.runs import cli
from slm.sandbox import Sandbox

PROGRAMS = {
    "plain": "def f(n):\n    return n * f(n - 1) if n else 1\nprint(f(20), sum(i * i for i in range(999)))",
    "numpy": "import numpy as np\na = np.array([[2., 1], [1, 3]])\nprint(np.linalg.solve(a, [3, 5]))",
    "sympy": "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 7*x + 10, x), factor(x**3 - 8))",
}


def latency(run, code: str, times: int) -> tuple[float, float]:
    """Median and 95th percentile of the wall clock of one run after another, in milliseconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run(code)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), 1000 * sorted(seconds)[int(0.95 * times)]


def throughput(sandbox: Sandbox, code: str, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        sandbox.submit(code)
    while sandbox.pending:
        sandbox.poll(1)
    return times / (time.perf_counter() - start)


def plain_counts() -> dict:
    """The corpus in plain subprocesses, one after another."""
    breaches, right = [], 0
    for name in ATTACKS:
        world = World()
        try:
            with_secret = os.open(f"{world.folder}/secret", os.O_RDONLY)
            os.set_inheritable(with_secret, True)
            done = run_plain(world.program(name), 30, close_fds=False, cwd=world.folder)
            if "BREACH" in done.stdout or world.traces():
                breaches.append(name)
        except Exception as error:
            print(f"  {name}: {error!r:.80}")
        finally:
            os.close(with_secret)
            world.close()
    for code, want in BENIGN.values():  # some write files, and nothing keeps them out of where they run
        with contextlib.suppress(UnicodeError), tempfile.TemporaryDirectory() as folder:
            text = code if isinstance(code, str) else "\n".join(code)
            right += run_plain(text, 30, input="", cwd=folder).stdout == want
    return {"contained": len(ATTACKS) - len(breaches), "right": right}


def main(args) -> None:
    os.environ["SLM_TEST_SECRET"] = SECRET
    start = time.perf_counter()
    with Sandbox(workers=2) as sandbox:
        sandbox.run("1")
        result = {"isolation": sandbox.isolation, "start_s": round(time.perf_counter() - start, 2)}
        print(f"level: {sandbox.isolation}; first result after {result['start_s']} s")
        for name, code in PROGRAMS.items():
            median, high = latency(sandbox.run, code, args.runs)
            plain, _ = latency(run_plain, code, 5)
            result[f"{name}_ms"], result[f"{name}_subprocess_ms"] = round(median, 1), round(plain, 1)
            print(f"{name:6} median {median:6.1f} ms, 95 % under {high:6.1f} ms; "
                  f"plain subprocess {plain:7.1f} ms ({plain / median:.0f} times as long)")
        for name in PROGRAMS:
            result[f"{name}_per_s"] = round(throughput(sandbox, PROGRAMS[name], 2 * args.runs), 1)
            print(f"{name:6} {result[f'{name}_per_s']:6.1f} runs a second with 2 workers")
        counts = run_all(sandbox)
    result |= {"attacks": counts["attacks"], "contained": counts["attacks"] - len(counts["breaches"]),
               "benign": counts["benign"], "benign_right": counts["benign"] - len(counts["wrong"])}
    plain = plain_counts()
    result["subprocess_contained"] = plain["contained"]
    result["subprocess_benign_right"] = plain["right"]
    for who, kept, right in (("sandbox", result["contained"], result["benign_right"]),
                             ("plain subprocess", plain["contained"], result["subprocess_benign_right"])):
        print(f"{who:17} contains {kept} of {counts['attacks']} attacks, "
              f"{right} of {counts['benign']} benign right")
    print(json.dumps(result))


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--runs", type=cli.positive, default=200,
                        help="runs for each latency figure (200)")
    args = parser.parse_args()
    cli.run(main, args)
