"""The rules of the house: how many lines it has, who imports whom, and what no function does.

Every check is a function that reads a source tree and returns its faults, a sentence each. The real tree must
have none. Each check also has tests on a small tree with one planted fault, so that no check can go blind.
"""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from docs.draw_house import OPEN_ROOMS, SCRIPTS, door, draw, edges, imports, modules, room, syntax

ROOT = Path(__file__).parents[1]

# The most lines that each part may have; blank lines and docstrings count. LOG.md has a line for every number
# that rose.
LIMITS = {
    "the teaching core": 5180,  # the five scripts and the modules directly in slm/
    "the whole": 14740,         # the five scripts and all of slm/
    "slm/model.py": 190,
    "slm/attention.py": 80,
    "slm/lora.py": 240,
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTION_LINES = 60
DOCSTRING_LINES = 3  # of an engine room

# What code may set on an object of another room or of a library, and why. A star stands for any text.
ALLOWED = {
    "args.data": "a script fills in its own arguments before it saves them",
    "args.dtype": "the same",
    "args.out": "the same",
    "args.ranks": "the same",
    "setattr(args, *)": "argparse's own way to do so",
    "model.recompute": "a switch of the network, which Qwen2 declares and explains",
    "policy.recompute": "the same",
    "episode.reward": "a field that Episode keeps for the trainer",
    "episode.reason": "the same",
    "episode.parts": "the same",
    "episode.solved": "the same",
    "record.*": "fields that TokenRecord keeps for the trainer",
    "turn.*": "fields that Turn keeps for the trainer",
    "made.prec": "a setting of mpmath",
    "limited.__name__": "a function that carries its workflow's name",
    "ctx.*": "torch.autograd.Function keeps there what the backward pass needs",
    "p.data": "PyTorch's own place for a parameter's numbers",
    "dynamo.config.*": "a setting of PyTorch's compiler",
    "session.trust_env": "a setting of requests",
    "pool.ConnectionCls": "a setting of urllib3",
    "t.*": "a setting of the tokenizers package",
    "setattr(multiprocessing*": "the sandbox gives a run threads in the place of processes",
    "concurrent.futures.ProcessPoolExecutor": "the same",
    "part.stack": "a field of traceback's own record of an error",
    "sys.std*": "the streams of a process of our own",
    "tempfile.tempdir": "the folder of a process of our own",
}


# ---- Lines -------------------------------------------------------------------------------------------------

def too_many_lines(root: Path) -> list[str]:
    counts = {file: len((root / file).read_text().splitlines()) for file in files(root)}
    parts = counts | {"the whole": sum(counts.values()),
                      "the teaching core": sum(n for file, n in counts.items() if file.count("/") < 2)}
    return [f"{part} has {parts[part]} lines, {limit} are allowed" for part, limit in LIMITS.items()
            if parts.get(part, 0) > limit]


def long_functions(root: Path) -> list[str]:
    return [f"{file}:{node.lineno}: {node.name} has {length(node)} lines" for file, node in nodes(root)
            if isinstance(node, FUNCTION) and length(node) > FUNCTION_LINES]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


# ---- Imports -----------------------------------------------------------------------------------------------

def imports_past_a_door(root: Path) -> list[str]:
    """From outside, an engine room is imported as `from slm.ROOM import NAME`, with NAME in its `__all__`."""
    faults = []
    for i in imports(root):
        inner = room(i.target)
        init = root / "slm" / inner / "__init__.py"
        if inner == room(i.importer) or not init.exists():
            continue
        if inner in OPEN_ROOMS:
            through = i.target != f"slm.{inner}" and i.package.startswith(f"slm.{inner}")
        else:
            through = i.package == f"slm.{inner}" and i.name in door(init)
        if not through:
            faults.append(f"{i.importer}:{i.line} imports {i.name} of {i.package or i.target}: no door")
    return faults


def imports_of_scripts(root: Path) -> list[str]:
    return [f"{i.importer}:{i.line} imports the script {i.target}" for i in imports(root)
            if f"{i.target}.py" in SCRIPTS]


def imports_inside_functions(root: Path) -> list[str]:
    faults = []
    for file, function in nodes(root):
        if isinstance(function, FUNCTION):
            faults += [f"{file}:{node.lineno}: {ast.unparse(node)} inside a function"
                       for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
    return sorted(set(faults))  # a function inside a function is walked twice


def circles(root: Path) -> list[str]:
    """A module needs what it imports, and the __init__ of every package on the way there. It does not need
    the packages that it lies in itself: Python has run these by then."""
    needs: dict[str, set[str]] = {name: set() for name in modules(root)}
    for i in imports(root):
        needs[i.importer] |= {i.target} | (packages(i.target) - packages(i.importer) - {i.importer})
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as e:
        return ["a circle of imports: " + " <- ".join(e.args[1])]
    return []


def packages(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}


# ---- Style -------------------------------------------------------------------------------------------------

COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def named_lambdas(root: Path) -> list[str]:
    return [f"{file}:{node.lineno}: a lambda has a name" for file, node in nodes(root)
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
            and isinstance(node.value, ast.Lambda)]


def nested_comprehensions(root: Path) -> list[str]:
    return [f"{file}:{node.lineno}: a comprehension inside a comprehension" for file, node in nodes(root)
            if isinstance(node, COMPREHENSION) and contains(node, COMPREHENSION)]


def walrus_in_ternary(root: Path) -> list[str]:
    return [f"{file}:{node.lineno}: a walrus inside a ternary" for file, node in nodes(root)
            if isinstance(node, ast.IfExp) and contains(node, ast.NamedExpr)]


def contains(node: ast.AST, kind: type | tuple[type, ...]) -> bool:
    return any(isinstance(inner, kind) for inner in ast.walk(node) if inner is not node)


def attributes_hung_on_others(root: Path) -> list[str]:
    return [f"{file}:{line}: {what}" for file, line, what in hung(root)
            if not any(fnmatchcase(what, allowed) for allowed in ALLOWED)]


def hung(root: Path) -> Iterator[tuple[str, int, str]]:
    """Every `x.attr = ...` where no class of the same room declares attr, and every setattr, but not those on
    self and cls. What the classes of a room declare may be set anywhere in that room: a check that reads no
    types cannot tell whose object x is."""
    for module, path in modules(root).items():
        file, source = str(path.relative_to(root)), path.read_text()
        own = set()
        for other, neighbour in modules(root).items():
            if room(other) == room(module):
                own |= declared(neighbour.read_text())
        for node in syntax(source):
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                if not is_self(node.value) and node.attr not in own:
                    yield file, node.lineno, ast.unparse(node)
            elif isinstance(node, ast.Call) and re.search(r"(set|del)attr(__)?$", ast.unparse(node.func)):
                if not (node.args and is_self(node.args[0])):
                    yield file, node.lineno, ast.unparse(node)


@functools.cache
def declared(source: str) -> set[str]:
    """The attributes of all classes in a file: names set in a class body, and those set on self or cls."""
    found = set()
    for owner in syntax(source):
        if isinstance(owner, ast.ClassDef):
            for statement in owner.body:
                targets = statement.targets if isinstance(statement, ast.Assign) else [
                    getattr(statement, "target", None)]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            found |= {node.attr for node in ast.walk(owner) if isinstance(node, ast.Attribute)
                      and isinstance(node.ctx, ast.Store) and is_self(node.value)}
    return found


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


# ---- What is written about the house -----------------------------------------------------------------------

def table_of_files(root: Path) -> list[str]:
    """README names every file once, and none that is not there. A row begins with a file (`slm/lora.py`)
    or with an engine room (`slm/runs/`); the row of a room names the files in it (`cli.py`)."""
    named = []
    for row in re.findall(r"^\| `.*$", (root / "README.md").read_text(), re.M):
        paths = re.findall(r"`([\w/]+(?:\.py|/))`", row)
        first = paths[0] if paths and row.startswith(f"| `{paths[0]}`") else ""
        if first.startswith("slm/") and first.endswith("/"):
            named += [first + path for path in paths[1:]]
        elif first.endswith(".py"):
            named.append(first)
    there = {file for file in files(root) if not file.endswith("__init__.py")}
    twice = {file for file in named if named.count(file) > 1}
    return ([f"README's table lacks {file}" for file in sorted(there - set(named))]
            + [f"README's table names {file}, which is not there" for file in sorted(set(named) - there)]
            + [f"README's table names {file} twice" for file in sorted(twice)])


def short_docstrings(root: Path) -> list[str]:
    """The __init__ of an engine room explains the room."""
    faults = []
    for init in sorted((root / "slm").glob("*/__init__.py")):
        lines = (ast.get_docstring(syntax(init.read_text())[0]) or "").splitlines()
        if len([line for line in lines if line.strip()]) < DOCSTRING_LINES:
            faults.append(f"slm/{init.parent.name}/__init__.py explains its room in {len(lines)} lines")
    return faults


def stale_picture(root: Path) -> list[str]:
    """docs/house.svg shows the imports of this tree, and is what docs/draw_house.py draws."""
    picture = (root / "docs" / "house.svg").read_text()
    drawn, real = set(re.findall(r'data-from="(.*?)" data-to="(.*?)"', picture)), set(edges(root))
    faults = [f"docs/house.svg lacks {a} -> {b}" for a, b in sorted(real - drawn)]
    faults += [f"docs/house.svg shows {a} -> {b}, which is not there" for a, b in sorted(drawn - real)]
    if not faults and picture != draw(root):
        faults.append("docs/house.svg is older than the tree or than docs/draw_house.py")
    return [f"{fault}: run make house" for fault in faults]


# ---- Reading a tree ----------------------------------------------------------------------------------------

def files(root: Path) -> list[str]:
    """The scripts and all of slm/, as paths from the root."""
    return [str(path.relative_to(root)) for path in modules(root).values()]


def nodes(root: Path) -> Iterator[tuple[str, ast.AST]]:
    for file in files(root):
        for node in syntax((root / file).read_text()):
            yield file, node


# ---- The tests ---------------------------------------------------------------------------------------------

CHECKS = (too_many_lines, long_functions, imports_past_a_door, imports_of_scripts, imports_inside_functions,
          circles, named_lambdas, nested_comprehensions, walrus_in_ternary, attributes_hung_on_others,
          table_of_files, short_docstrings, stale_picture)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_the_house_keeps(check):
    faults = check(ROOT)
    assert not faults, "\n" + "\n".join(faults)


SMALL = {  # a tree without a fault
    "eval.py": "from slm.runs import cli\nfrom slm.grading import grade\nfrom slm.runs.cli import parser\n",
    "agents.py": "from slm import episode\n",
    "slm/__init__.py": "class BadInput(Exception):\n    pass\n",
    "slm/episode.py": "from slm import BadInput\nfrom slm.grading import grade\n",
    "slm/model.py": "class Model:\n    def __init__(self):\n        self.size = 1\n\n\nModel().size = 2\n",
    "slm/grading/__init__.py": '"""One.\n\nTwo.\nThree.\n"""\nfrom slm.grading.grader import grade\n'
                               '__all__ = ["grade"]\n',
    "slm/grading/grader.py": "from slm.grading.values import Value, real\nfrom slm.model import Model\n\n"
                             "Value().real = 2\n\n\n"
                             "def grade(text):\n    return [x for x in text if x]\n",
    "slm/grading/values.py": "class Value:\n    real: int = 1\n\n\nreal = 1\n",
    "slm/runs/__init__.py": '"""One.\nTwo.\nThree."""\n',
    "slm/runs/cli.py": "def parser():\n    pass\n",
    "README.md": "| `eval.py` | x |\n| `agents.py` | x |\n| `slm/episode.py` | x |\n| `slm/model.py` | x |\n"
                 "| `slm/grading/` | `grader.py`, `values.py` |\n| `slm/runs/` | `cli.py` |\n"
                 "| `tests/` | x |\n"}

LONG = "def f():\n" + "    pass\n" * 60
PLANTED = [  # the check, the file that is changed, what is added to it, a part of the fault
    (too_many_lines, "slm/model.py", "\n" * 190, "slm/model.py has"),
    (too_many_lines, "slm/episode.py", "\n" * LIMITS["the teaching core"], "the teaching core has"),
    (too_many_lines, "slm/grading/values.py", "\n" * LIMITS["the whole"], "the whole has"),
    (long_functions, "slm/model.py", LONG, "f has 61 lines"),
    (long_functions, "slm/model.py", "class C:\n    async " + LONG.replace("\n", "\n    "), "f has 61 lines"),
    (imports_past_a_door, "eval.py", "from slm.grading.grader import grade\n", "slm.grading.grader: no door"),
    (imports_past_a_door, "eval.py", "from slm.grading import grader\n", "grader of slm.grading: no door"),
    (imports_past_a_door, "eval.py", "from slm.grading import *\n", "* of slm.grading: no door"),
    (imports_past_a_door, "eval.py", "from slm import grading\n", "grading of slm: no door"),
    (imports_past_a_door, "slm/model.py", "import slm.grading.values\n", "no door"),
    (imports_past_a_door, "slm/model.py", "from .grading.values import real\n", "no door"),
    (imports_past_a_door, "slm/model.py", "from slm import runs\n", "runs of slm: no door"),
    (imports_past_a_door, "slm/model.py", "import slm.runs.cli\n", "no door"),
    (imports_past_a_door, "slm/runs/cli.py", "from ..grading.values import real\n", "no door"),
    (imports_of_scripts, "eval.py", "import agents\n", "the script agents"),
    (imports_of_scripts, "slm/runs/cli.py", "from eval import main\n", "slm.runs.cli:3 imports"),
    (imports_inside_functions, "slm/model.py", "def f():\n    if f:\n        import os\n", "import os"),
    (circles, "slm/model.py", "from slm.episode import Ask\n", "circle"),
    (circles, "slm/model.py", "def f():\n    from slm import episode\n", "circle"),
    (circles, "slm/model.py", "from slm.grading.values import real\n", "circle"),  # by the room's __init__
    (circles, "slm/grading/values.py", "from slm.grading import grade\n", "circle"),
    (named_lambdas, "slm/model.py", "f = lambda x: x\n", "model.py:7: a lambda"),
    (named_lambdas, "slm/model.py", "print(f := lambda x: x)\n", "model.py:7: a lambda"),
    (nested_comprehensions, "slm/model.py", "print([sum(x for x in y) for y in []])\n", "model.py:7"),
    (walrus_in_ternary, "slm/model.py", "print(x if (x := 1) else 2)\n", "model.py:7"),
    (attributes_hung_on_others, "slm/episode.py", "grade.lora = 1\n", "grade.lora"),
    (attributes_hung_on_others, "slm/grading/grader.py", "Model().size = 1\n", "Model().size"),
    (attributes_hung_on_others, "slm/episode.py", "for grade.x in []:\n    pass\n", "grade.x"),
    (attributes_hung_on_others, "slm/episode.py", "setattr(grade, 'lora', 1)\n", "setattr"),
    (attributes_hung_on_others, "slm/episode.py", "object.__setattr__(grade, 'lora', 1)\n", "setattr"),
    (table_of_files, "slm/losses.py", "x = 1\n", "lacks slm/losses.py"),
    (table_of_files, "slm/runs/files.py", "x = 1\n", "lacks slm/runs/files.py"),
    (table_of_files, "README.md", "| `slm/gone.py` | x |\n", "names slm/gone.py"),
    (table_of_files, "README.md", "| `slm/runs/` | `gone.py` |\n", "names slm/runs/gone.py"),
    (table_of_files, "README.md", "| `eval.py` | x |\n", "names eval.py twice"),
    (short_docstrings, "slm/teachers/__init__.py", '"""One.\n\nTwo."""\n', "slm/teachers/__init__.py"),
    (stale_picture, "agents.py", "from slm.model import Model\n", "lacks agents.py -> model: run make house"),
    (stale_picture, "docs/house.svg", '<path data-from="model" data-to="runs/"/>', "shows model -> runs/"),
    (stale_picture, "slm/grading/boxes.py", "x = 1\n", "is older"),
]


@pytest.fixture
def small(tmp_path):
    for file, words in SMALL.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(words)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "house.svg").write_text(draw(tmp_path))
    return tmp_path


def test_a_small_house_has_no_fault(small):
    for check in CHECKS:
        assert not check(small)


@pytest.mark.parametrize("check, file, more, fault", PLANTED,
                         ids=[f"{check.__name__}-{k}" for k, (check, *_) in enumerate(PLANTED)])
def test_a_planted_fault_is_found(small, check, file, more, fault):
    path = small / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + more)
    found = check(small)
    assert len(found) == 1 and fault in found[0], found


def test_every_check_has_a_planted_fault():
    assert {check for check, *_ in PLANTED} == set(CHECKS)


def test_every_permission_is_used():
    what = [words for _, _, words in hung(ROOT)]
    for allowed in ALLOWED:
        assert any(fnmatchcase(words, allowed) for words in what), f"nothing needs {allowed} any more"
