"""Do a team and process rewards pay? Three seeds on the built-in model, beside what they have to beat.

    python bench/roles.py                            all that is missing, then the tables
    python bench/roles.py --only team single         some arms
    python bench/roles.py --judge DIR                also the arm whose steps a verifier judges
    python bench/roles.py --table                    only the tables, from results/roles

Two questions, each arm from the same SFT adapter, with the same settings but for what the arm names. The
adapter has learned the stand-in teacher's solutions, and to verify an answer by code: the base model's own
programs that print the right answer, after a right or a wrong proposal. (From solutions alone no verdict of
the verifier is ever right, and there is nothing that it could learn from.)

A team: solver and verifier of solver_verifier, trained together, against the solver trained alone. `single`
takes as many steps as the team; `matched`, the control, as many as sample the same number of tokens as `team`
did. All are evaluated greedily in both workflows, on the same test problems.

Process reward: each step is paid for its equations (`steps`) or by a verifier (`judge`), beside the answer,
against the answer alone (`single`). The control of a verifier is a coin for each step (`coins`).

A run leaves one small file, results/roles/NAME-SEED.json; a run that has its file is not made again. The
tables: accuracy over all seeds, and its difference to the control, paired: both with a 95 % interval by a
bootstrap over problems (the seeds of a problem stay together); the lowest and highest seed; thousands of
tokens sampled while training; the share of right turns of each role in the last four steps.
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.objectives import LAST
from bench.shared import ROOT, at, bits, by_seed, made_by, over, rows, script, shares, shortened
from slm import prompts
from slm.backends import own_model
from slm.episode import Job, run_episodes, seed_of, user
from slm.grading import equal
from slm.problems import load
from slm.runs import stats
from slm.runs.files import as_lines
from slm.sandbox import Sandbox
from slm.workflows import CODING, ask, execute, printed

RUNS, RESULTS = ROOT / "runs/roles", ROOT / "results/roles"
SFT = RUNS / "sft/adapter"
STEPS = 16
TEAM = ["--workflow", "solver_verifier", "--roles", "solver,verifier", "--adapters", "role"]
ARMS = {  # name: options of train_grpo.py
    "team": [*TEAM, "--credit", "role", "--reward", "own"],
    "team_shared": [*TEAM[:4], "--credit", "role", "--reward", "own"],
    "team_outcome": [*TEAM, "--credit", "role", "--reward", "correct"],
    "team_turn": [*TEAM, "--credit", "turn", "--reward", "own"],
    "team_maporl": [*TEAM, "--credit", "role", "--reward", "team,bonus:0.5"],
    "team_random": [*TEAM, "--credit", "role", "--reward", "random"],
    "single": [],
    "matched": [],
    "steps": ["--credit", "step", "--reward", "correct,steps"],
    "coins": ["--credit", "step", "--reward", "correct,random"],
    "judge": ["--credit", "step", "--reward", "correct,judge"],
}
TABLES = {"in solver_verifier": ("team", "team_shared", "team_outcome", "team_turn", "team_maporl",
                                 "team_random", "single", "matched"),
          "in solver": ("single", "matched", "steps", "judge", "coins", "team")}
CONTROL = {"in solver_verifier": "matched", "in solver": "single"}
KEPT = ("step", "reward", "solved", "entropy", "mean_tokens", "truncated", "zero_spread", "with_advantage",
        "grad_norm")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME",
                   help=", ".join(ARMS))
    p.add_argument("--judge", metavar="DIR", help="the verifier of the arm judge: a model or an adapter")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        start()
        wanted = [(name, seed) for seed in range(args.seeds) for name in args.only
                  if not result_of(name, seed).exists() and (name != "judge" or args.judge)]
        for later in (False, True):  # `matched` has to know what the others sampled
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda arm: learn(*arm, args.judge),
                              [arm for arm in wanted if (arm[0] == "matched") == later]))
    print(tables(RESULTS))


def result_of(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-{seed}.json"


def tables(results: Path) -> str:
    """A table for each workflow, with the arms that have run."""
    found = {name: by_seed(results, name) for name in ARMS}
    return "\n\n".join("\n".join(table(place, {name: found[name] for name in names if found[name]}))
                       for place, names in TABLES.items())


def start() -> None:
    """Make the SFT adapter that all arms start from, if it is not there."""
    if not SFT.is_dir():
        script(RUNS, "make_data.py", "--out", RUNS / "data")
        both = rows(RUNS / "data/records.jsonl") + verifications()
        (RUNS / "start.jsonl").write_bytes(as_lines(both))
        script(RUNS, "train_sft.py", "--lora", "--validate", 0, "--data", RUNS / "start.jsonl",
               "--out", SFT.parent)


def verifications(limit: int = 400) -> list[dict]:
    """Records of a verifier: a proposed answer, every second one wrong, and a program that computes it."""
    problems, records = load("tiny", "train", limit), []
    with closing(own_model("tiny", "auto", "auto")) as backend, closing(Sandbox()) as sandbox:
        jobs = [Job(p.id, p.question, coded) for p in problems]
        episodes = run_episodes(jobs, backend, sandbox, bar="programs")
    for p, episode in zip(problems, episodes):
        if equal(episode.answer or "", p.gold):
            wrong = seed_of("proposal", p.id) % 2 * (1 + seed_of("by", p.id) % 20)
            asked = prompts.VERIFIER(question=p.question, answer=str(int(p.gold) + wrong))
            program = {"role": "assistant", "content": episode.turns[0].reply.text}
            records.append({"id": p.id, "messages": [user(asked), program]})
    return records


def coded(question: str):
    """The number that a program of the model prints."""
    reply = yield from ask("solver", prompts.PYTHON(question=question), **CODING)
    return printed((yield from execute(reply)))


def learn(name: str, seed: int, judge: str | None) -> None:
    """Train an arm with a seed, score it in both workflows, and leave its file."""
    out = RUNS / f"{name}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    options = ARMS[name] + (["--judge", judge] if name == "judge" else [])
    train = ["train_grpo.py", "--adapter", SFT, "--batch", 8, "--evaluate", 0, "--seed", seed, "--steps",
             matched(seed) if name == "matched" else STEPS, *options, "--out", out]
    script(RUNS, *train)
    served = ["--model", out / "adapter"]
    if "--adapters" in options:
        served = ["--model", out / "base", *(word for role in ("solver", "verifier") for word in (
            "--adapter", f"{role}={out / 'adapter' / role}"))]
    done, right = [train], {}
    for workflow in ("solver", "solver_verifier"):
        scored = RUNS / f"{name}-{seed}-{workflow}"
        shutil.rmtree(scored, ignore_errors=True)
        done.append(["eval.py", *served, "--data", "tiny", "--workflow", workflow, "--out", scored])
        script(RUNS, *done[-1])
        right[f"in {workflow}"] = bits(rows(scored / "answers.jsonl"))
    metrics = [row for row in rows(out / "metrics.jsonl") if row["step"]]
    result = {**made_by(done), "right": right, "tokens": sampled(out),
              "metrics": [{key: shortened(row[key]) for key in row if key in KEPT or "/" in key}
                          for row in metrics]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    result_of(name, seed).write_text(json.dumps(result, indent=0) + "\n")
    shares_right = {place: f"{100 * bits.count('1') / len(bits):.1f} %" for place, bits in right.items()}
    print(f"{name}, seed {seed}: {shares_right}, {result['tokens']:,} tokens", flush=True)


def sampled(out: Path) -> int:
    """The tokens that a run has sampled to learn from."""
    return sum(row["tokens"] for row in rows(out / "episodes.jsonl"))


def matched(seed: int) -> int:
    """How many steps of the solver alone sample as many tokens as the team did, by the runs of this seed."""
    team, single = (json.loads(result_of(name, seed).read_text())["tokens"] for name in ("team", "single"))
    return max(1, round(STEPS * team / single))


def table(place: str, found: dict[str, list[dict]]) -> list[str]:
    """The arms, evaluated in one workflow."""
    lines = [f"| {place} | seeds | greedy % | lowest, highest | over {CONTROL[place]} | thousand tokens "
             "| right turns % |", "| --- | --- | --- | --- | --- | --- | --- |"]
    control = found.get(CONTROL[place])
    for name, results in found.items():
        here = at(results, place)
        now, single = shares(here), [100 * r["right"].count("1") / len(r["right"]) for r in here]
        gain = over(at(control, place), here) if control and name != CONTROL[place] else ""
        last = [row for r in results for row in r["metrics"][-LAST:]]
        roles = sorted({key for row in last for key in row if key.startswith("solved/")}) or ["solved"]
        means = ", ".join(f"{key.removeprefix('solved/').replace('solved', 'solver')} "
                          f"{100 * sum(row.get(key, 0) for row in last) / len(last):.0f}" for key in roles)
        tokens = sum(r["tokens"] for r in results) / len(results) / 1000
        cells = [name, len(results), f"{100 * sum(now) / len(now):.1f} ({stats.span(*stats.interval(now))})",
                 f"{min(single):.1f}, {max(single):.1f}", gain, f"{tokens:.0f}", means]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main()
