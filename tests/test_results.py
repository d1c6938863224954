"""The committed results: collecting them, the tables that they give, the bands of the demo."""

import json
import random
from pathlib import Path

import pytest

import agents
import eval as evaluation
from bench import budgets, demo, half_billion, objectives, roles, self_evolution, verifiers
from bench.shared import rows
from slm.problems import load
from slm.runs import cli
from slm.runs.stats import wilson

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "RESULTS.md").read_text()


def run(script, out, *words):
    args = script.options().parse_args(["--out", str(out), *words])
    script.main(cli.resolve(args, script.PAPER, script.TINY))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/half_billion of some folder: evaluations and a search by the built-in model, two GRPO runs."""
    folder = tmp_path_factory.mktemp("somebody") / "runs/half_billion"
    for name, more in (("eval-base", ()), ("eval-grpo", ()),
                       ("eval-grpo-python_tools", ("--workflow", "python_tools", "--limit", "2")),
                       ("sampled-base", ("--samples", "2", "--temperature", "1")),
                       ("math-base", ("--data", "tiny-unseen"))):
        run(evaluation, folder / name, "--limit", "3", "--max-tokens", "100", *more)
    run(agents, folder / "searches", "--limit", "2", "--workflow", "weighted_vote", "--budget", "1,2")
    for name in ("grpo", "grpo-placebo", "dapo-base"):
        (folder / name).mkdir()
        settings = {"out": str(folder / name), "model": "/home/somebody/models/small", "batch": 8}
        about = {"settings": settings, "command": f"train_grpo.py --out {folder / name}"}
        (folder / name / "settings.json").write_text(json.dumps(about))
        steps = ({"step": i, "reward": i / 3, "solved": 0.1234567 * i} for i in range(1, 6))
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
        if name != "dapo-base":  # which is not finished
            (folder / name / "adapter").mkdir()
    return folder


@pytest.fixture(scope="module")
def results(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    half_billion.collect(runs, folder, "an abacus")
    return folder


def test_collected_runs_are_small_and_name_no_folder_of_the_machine(runs, results):
    assert {path.name for path in results.iterdir()} == {path.name for path in runs.iterdir()} - {"dapo-base"}
    everything = "".join(path.read_text() for path in results.rglob("*.json*"))
    assert "prompt_ids" not in everything and '"ids"' not in everything and '"question"' not in everything
    assert "/home/" not in everything and str(runs.parents[1]) not in everything
    about = json.loads((results / "grpo/settings.json").read_text())
    assert about["settings"] == {"out": "runs/half_billion/grpo", "model": "small", "batch": 8}
    assert (about["command"], about["device"]) == ("train_grpo.py --out runs/half_billion/grpo", "an abacus")
    assert rows(results / "grpo/metrics.jsonl")[1]["solved"] == 0.2469


def test_the_tables_of_the_small_files_are_those_of_the_runs(runs, results):
    text = half_billion.tables(results)
    for kind, names in (("eval", ["base", "grpo"]), ("sampled", ["base"]), ("math", ["base"])):
        whole = [evaluation.saved(runs / f"{kind}-{name}")[0] for name in names]
        for line in evaluation.table(whole, markdown=True).splitlines():
            assert line in text.splitlines()
    assert "Device: an abacus." in text
    assert "sft-self" not in text  # rows that are absent are left out


def test_a_workflow_is_compared_with_a_single_pass_on_its_own_problems(runs, results):
    asked = rows(runs / "eval-grpo-python_tools/answers.jsonl")
    alone = [row for row in rows(runs / "eval-grpo/answers.jsonl") if row["id"] in {r["id"] for r in asked}]
    assert len(alone) == len(asked) == 2
    lines = half_billion.tables(results).splitlines()
    top = lines.index("tiny: 2 problems, samples 1, temperature 0.0, max_tokens 100")
    single, worked = lines[top + 4:top + 6]
    for line, name, answers in ((single, "eval-grpo", alone), (worked, "eval-grpo:python_tools", asked)):
        cells = line.strip("| ").split(" | ")
        assert cells[0] == name
        assert float(cells[1].split()[0]) == 50 * sum(row["correct"] for row in answers)
    gain = 50 * sum(b["correct"] - a["correct"] for a, b in zip(alone, asked))
    assert worked.split(" | ")[3].startswith(f"{gain:+.1f} [") and gain > 0


def test_searches_are_told_beside_votes_with_as_many_tokens(runs, results):
    found = json.loads((runs / "searches/table.json").read_text())
    text = half_billion.tables(results)
    assert agents.against_control(found) in text and "weighted_vote@2" in agents.against_control(found)
    assert agents.table(found, 2).strip() in text


def test_small_files_can_be_graded_again(results, tmp_path, capsys):
    copy = tmp_path / "eval-grpo-python_tools"
    copy.mkdir()
    for path in (results / copy.name).iterdir():
        (copy / path.name).write_text(path.read_text())
    before = rows(copy / "answers.jsonl")
    evaluation.regrade(evaluation.saved(copy)[0])
    assert "0 of 2 answers graded differently" in capsys.readouterr().out
    assert rows(copy / "answers.jsonl") == before


def test_the_figure_has_the_curves_that_there_are(results, tmp_path):
    assert half_billion.draw(results, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count('id="axes_') == 2  # reward, solved
    assert not half_billion.draw(tmp_path, tmp_path / "none.svg")


def test_the_committed_files_give_the_tables_of_results_md():
    for line in objectives.table(objectives.read()):
        assert line in TEXT
    if half_billion.RESULTS.is_dir():
        for line in half_billion.tables(half_billion.RESULTS).splitlines():
            assert line in TEXT
        files = [path for path in half_billion.RESULTS.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < half_billion.LIMIT
    made = [verifiers.table(verifiers.read(verifiers.RESULTS)), roles.tables(roles.RESULTS).splitlines(),
            self_evolution.table(self_evolution.RESULTS), budgets.tables(budgets.RESULTS)]
    for lines in made:
        assert len(lines) <= 5 or all(line in TEXT for line in lines)  # no more than heads: none has run


# Arms that beat a control

def keep(folder, name, **result):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_an_arm_is_compared_with_its_control_on_the_same_problems(tmp_path):
    for name, right in (("matched", "1100"), ("team", "1110"), ("single", "0000")):
        places = {"in solver_verifier": right, "in solver": right[::-1]}
        keep(tmp_path, f"{name}-0", right=places, tokens=2000, metrics=[{"step": 1, "solved": 0.25}])
    lines = roles.tables(tmp_path).splitlines()
    team = next(line for line in lines if line.startswith("| team |"))
    low, high = wilson(3, 4)
    assert f"| 75.0 ({100 * low:.1f}-{100 * high:.1f}) | 75.0, 75.0 | +25.0 [" in team
    assert team.endswith(" | 2 | solver 25 |")
    assert any(line.startswith("| single | 1 | 0.0 (") and "| -50.0 [" in line for line in lines)


def test_a_policy_is_compared_with_the_start_and_with_plain_sampling(tmp_path):
    for name, right in (("start-0", "1000"), ("search-1", "1111"), ("sampling-1", "1100")):
        made = {} if name == "start-0" else {"solved": 3, "kept": 5, "tokens": 4000}
        keep(tmp_path, f"{name}-0", right=dict.fromkeys(self_evolution.PLACES.values(), right), **made)
    start, search, sampling = self_evolution.table(tmp_path)[2:]
    cells = search.strip("| ").split(" | ")
    assert cells[:5] == ["search-1", "1", "3", "5", "4"]
    assert [cell.split()[0] for cell in cells[5:8]] == ["100.0", "+75.0", "+50.0"]
    assert start.startswith("| start-0 | 1 |  |  |  | 25.0 (") and "| +25.0 [" in sampling
    assert self_evolution.table(tmp_path / "none")[2:] == []


def test_a_search_is_drawn_against_the_tokens_that_it_took(tmp_path):
    def one(right, tokens):
        return agents.summary([{"correct": r, "first_correct": r, "asks": 1, "tokens": tokens, "failures": [],
                                "answer": "1"} for r in right], None) | {"seconds": 1}

    found = {"solver": one([1, 0], 10), "self_consistency@2": one([1, 0], 40), "dvts@2": one([1, 1], 35),
             "self_consistency@1": one([0, 0], 20), "dvts@1": one([1, 0], 15), "python_tools": one([1, 1], 9)}
    curves = budgets.curves(found)
    assert {name: [point[:2] for point in points] for name, points in curves.items()} == {
        "self_consistency": [(20, 0), (40, 0.5)], "dvts": [(15, 0.5), (35, 1)]}
    budgets.draw({"tiny": found, "not run": {}}, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn.count('id="axes_') == 1 and 'id="FillBetweenPolyCollection_1"' in drawn
    (tmp_path / "table.json").write_text(json.dumps(found))
    lines = budgets.tables(tmp_path)
    assert lines[0].startswith("2 problems;")
    assert any(line.startswith("dvts@1") and "+50.0 [" in line and "over self_consistency@1" in line
               for line in lines)
    assert budgets.tables(tmp_path / "none") == []


class Written:
    def __init__(self, text):
        self.text = text


def test_right_solutions_are_kept_once_and_in_their_order():
    problem = load("tiny", "train", 1)[0]
    right, wrong = f"\\boxed{{{problem.gold}}}", "\\boxed{-1}"
    solutions = [Written(text) for text in (wrong, f"So {right}", f"So {right}", right, f"Yes, {right}")]
    rows = self_evolution.kept(problem, solutions)
    assert [row["messages"][1]["content"] for row in rows] == [f"So {right}", right]
    assert problem.question in rows[0]["messages"][0]["content"]


# The demo

def write_demo(folder, accuracy, solved):
    for name in ("eval-base", "grpo"):
        (folder / name).mkdir(parents=True)
    summary = {"data": {"tiny": {"accuracy": accuracy, "problems": 500}}}
    (folder / "eval-base/summary.json").write_text(json.dumps(summary))
    (folder / "grpo/settings.json").write_text(json.dumps({"settings": {"batch": 8}}))
    steps = ({"step": i, "solved": share} for i, share in enumerate(solved, 1))
    (folder / "grpo/metrics.jsonl").write_text(
        json.dumps({"step": 0, "evaluated": 0.5}) + "\n" + "".join(json.dumps(row) + "\n" for row in steps))
    return folder


def test_the_bands_of_a_demo_are_lowest_and_highest_seed_and_chance(tmp_path):
    seeds = [demo.figures(write_demo(tmp_path / f"{a}", a, [a, a, a])) for a in (0.2, 0.3, 0.25)]
    bands = demo.bands(seeds)
    for name, n in (("eval-base on tiny", 500), ("GRPO step 1", 8), ("GRPO step 3", 24)):
        low, mean, high = bands[name]
        assert (low, high) == pytest.approx((wilson(0.2 * n, n)[0], wilson(0.3 * n, n)[1]), abs=1e-4)
        assert mean == 0.25
    assert len(bands) == 4


def write_answers(folder, seed):
    """What each stage and each workflow of a demo leaves, on ten problems of two sets."""
    about = {"settings": {"seed": seed, "batch": 8, "data": ["tiny", "tiny-unseen"]}, "data": "x",
             "versions": {"commit": "abc"}}
    grpo, agents = folder / "grpo/settings.json", folder / "agents"
    for i, name in enumerate(demo.STAGES):
        out = folder / name
        out.mkdir(parents=True, exist_ok=True)
        answers = [{"id": f"{data}-{n}", "data": data, "correct": n < 2 * i + seed}
                   for data in ("tiny", "tiny-unseen") for n in range(9, -1, -1)]  # as they were finished
        found = {data: {"accuracy": (2 * i + seed) / 10, "problems": 10, "seconds": 1}
                 for data in ("tiny", "tiny-unseen")}
        (out / "settings.json").write_text(json.dumps(about))
        (out / "summary.json").write_text(json.dumps({"data": found}))
        (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    agents.mkdir()
    (agents / "settings.json").write_text(json.dumps(about))
    (agents / "table.json").write_text(json.dumps({"solver": {}, "python_tools": {}}))
    rows = [{"id": f"tiny-{n}", "data": "tiny", "workflow": name, "correct": n < count}
            for name, count in (("solver", 1), ("python_tools", 9)) for n in range(10)]
    (agents / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grpo.parent.mkdir()
    grpo.write_text(json.dumps(about))
    (folder / "grpo/metrics.jsonl").write_text(json.dumps({"step": 1, "solved": 0.5}) + "\n")
    return folder


def test_the_tables_of_kept_demos_are_those_of_their_answers(tmp_path):
    demos = [demo.kept(write_answers(tmp_path / f"{seed}", seed)) for seed in (0, 1)]
    assert demos[0]["right"]["eval-sft-lora on tiny-unseen"] == "1111000000"
    lines = demo.table(demos)
    cells = lines[5].strip("| ").split(" | ")  # below the heading: tiny, then tiny-unseen with seeds 0 and 1
    assert cells[:2] == ["`SEED=1 bash recipes/demo.sh`", "tiny-unseen"]
    assert [float(cell.split()[0]) for cell in cells[2:]] == [10, 30, 50, 70, 40, 20, 60]
    low, high = wilson(5, 10)
    assert cells[4] == f"50.0 ({100 * low:.1f}-{100 * high:.1f})"
    assert lines[-1].startswith("| python_tools | +80.0 [") and len(lines) == 10


@pytest.mark.skipif(not demo.RESULTS.is_dir(), reason="no demo is kept: bench/demo.py --make")
def test_the_committed_demos_give_the_tables_of_results_md_and_the_bands():
    demos = demo.read(demo.RESULTS)
    assert len(demos) == 3
    for line in demo.table(demos):
        assert line in TEXT
    bands = json.loads((demo.RESULTS / "bands.json").read_text())
    assert bands == demo.bands([one["figures"] for one in demos]) and len(bands) > 20
    for one in demos:
        for name, answers in one["right"].items():
            if name in bands:
                assert answers.count("1") / len(answers) == one["figures"][name][0]


def test_a_demo_of_the_same_kind_lies_inside_and_what_does_not_is_named(tmp_path, capsys, monkeypatch):
    rng, paths = random.Random(0), []
    for seed in range(4):
        accuracy = sum(rng.random() < 0.6 for _ in range(500)) / 500
        solved = [sum(rng.random() < 0.4 for _ in range(64)) / 64 for _ in range(6)]
        paths.append(str(write_demo(tmp_path / f"{seed}", accuracy, solved)))
    other = str(write_demo(tmp_path / "other", 0.4, [0.4] * 5))
    made = demo.bands([demo.figures(Path(path)) for path in paths[:3]])

    def said(*words):
        monkeypatch.setattr("sys.argv", ["demo.py", "--results", str(tmp_path), *words])
        demo.main()
        return capsys.readouterr().out

    assert said(paths[3]) == ""  # no bands yet
    (tmp_path / "bands.json").write_text(json.dumps(made))
    assert said(paths[3]) == "7 of 7 figures lie inside the bands of other seeds\n"
    told = said(other).splitlines()
    assert told[0] == "5 of 7 figures lie inside the bands of other seeds; outside are"
    assert told[1].startswith("  eval-base on tiny: 40.0 %, expected 5")
    assert told[2] == "  GRPO step 6: not there"
