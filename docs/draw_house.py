"""Draws docs/house.svg from the imports in the source tree: `python docs/draw_house.py`, or `make house`.

The rooms are the steps of a staircase: the five scripts, then the core modules, then the engine rooms, each
before what it imports. A line leaves a room downwards and turns right into every room that it imports from.
An import that goes up (an engine room uses the core) leaves on the right. Each line carries its two ends as
data-from and data-to, so that tests/test_house.py can compare the picture with the tree. The same tree gives
the same bytes. The functions at the top, which read the tree, serve that test too.
"""

import ast
import functools
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

SCRIPTS = ("make_data.py", "train_sft.py", "train_grpo.py", "agents.py", "eval.py")  # by stage
OPEN_ROOMS = ("formats", "runs")  # engine rooms in which every module is a door


# ---- Reading the tree --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Import:
    """One name that one module imports: `from slm.grading import grade` in line 12 of slm/episode.py is
    Import("slm.episode", "slm.grading", "grade", "slm.grading", 12). The target is the module that the name
    is, or lies in. `import slm.model` has no package: Import(..., "", "slm.model", "slm.model", ...)."""
    importer: str
    package: str
    name: str
    target: str
    line: int


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for the scripts ("eval") and all of slm/ ("slm.grading.boxes")."""
    found = {Path(script).stem: root / script for script in SCRIPTS if (root / script).exists()}
    for path in sorted((root / "slm").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def syntax(source: str) -> tuple[ast.AST, ...]:
    """Every node of a Python source, the module first. Cached: every check of the house reads every file."""
    return tuple(ast.walk(ast.parse(source)))


def imports(root: Path) -> list[Import]:
    """Every import of one of our modules by another, in the order of the files and lines."""
    known = modules(root)
    found = []
    for importer, path in known.items():
        for node in syntax(path.read_text()):
            for package, name in imported(node, importer, path.name == "__init__.py"):
                full = f"{package}.{name}" if package else name
                target = full if full in known else package
                if target in known:
                    found.append(Import(importer, package, name, target, node.lineno))
    return found


def imported(node: ast.AST, importer: str, is_package: bool) -> list[tuple[str, str]]:
    """The (package, name) pairs of an import statement, the package without dots in front; else none."""
    if isinstance(node, ast.Import):
        return [("", alias.name) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = node.module or ""
    if node.level:  # one dot is the package that the importer lies in, each further dot the one above
        above = importer.split(".")
        above = above[:len(above) - node.level + is_package]
        package = ".".join(above + package.split(".") if package else above)
    return [(package, alias.name) for alias in node.names]


def door(path: Path) -> list[str]:
    """The names in a room's `__all__`, as its __init__.py lists them; [] if it has none."""
    for node in syntax(path.read_text()):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def room(module: str) -> str:
    """The room that a module belongs to: "eval.py", "model" for slm/model.py, "grading" for slm/grading/*.py,
    "slm" for slm/__init__.py."""
    parts = module.split(".")
    if parts[0] != "slm":
        return f"{module}.py"
    return parts[1] if len(parts) > 1 else "slm"


def edges(root: Path) -> list[tuple[str, str]]:
    """The imports between rooms, sorted. slm/__init__.py is left out, since nearly every room imports it."""
    folders = {path.name for path in (root / "slm").iterdir() if (path / "__init__.py").exists()}

    def box(module: str) -> str:
        return room(module) + ("/" if room(module) in folders else "")
    pairs = {(box(i.importer), box(i.target)) for i in imports(root)}
    return sorted((a, b) for a, b in pairs if a != b and "slm" not in (a, b))


# ---- Placing the rooms -------------------------------------------------------------------------------------

WIDTH, MARGIN = 960, 14
STEP = {"scripts": 29, "core": 26, "engine": 17}  # pixels from one room's left side to the next's, at most
ENGINE = 530  # where the engine rooms begin: more core modules make narrower steps
ROW, BOX, LINE = 30, 25, 15
CHARACTER, SMALL = 8.0, 6.2  # widths of a letter, at most, since every reader's font is another one
ROOF, HEADER, GAP = 74, 34, 12


@dataclass
class Box:
    """A room in the picture: its left upper corner, its size, and the lines of small print below its name."""
    name: str
    floor: str
    x: float
    y: float
    width: float
    height: float
    small: list[str]
    lane: float = 0.0  # where its line on the right goes up

    @property
    def middle(self) -> float:
        return self.y + BOX / 2


def ordered(names: list[str], pairs: list[tuple[str, str]]) -> list[str]:
    """The names, each before those that it imports, else in the order given. A circle is cut at the first."""
    left, order = list(names), []
    while left:
        imported_by_others = {b for a, b in pairs if a in left}
        free = [name for name in left if name not in imported_by_others]
        order.append((free or left)[0])
        left.remove(order[-1])
    return order


def floors(root: Path) -> dict[str, dict[str, list[str]]]:
    """Floor -> room -> the modules that the room lists: only engine rooms do."""
    known = modules(root)
    lists: dict[str, list[str]] = {}
    for module in known:
        parts = module.split(".")
        if len(parts) > 2 and known[module].name != "__init__.py":
            lists.setdefault(parts[1] + "/", []).append("/".join(parts[2:]))
    core = [m.split(".")[1] for m in known if m.count(".") == 1 and known[m].name != "__init__.py"]
    pairs = edges(root)
    longest_first = sorted(lists, key=lambda name: (-len(" ".join(lists[name])), name))
    return {"scripts": {s: [] for s in SCRIPTS if (root / s).exists()},
            "core": {name: [] for name in ordered(core, pairs)},
            "engine": {name: sorted(lists[name]) for name in ordered(longest_first, pairs)}}


def place(root: Path) -> dict[str, Box]:
    """Room -> its box, from the top of the stairs to the bottom."""
    boxes: dict[str, Box] = {}
    going_up = upward(root)
    right = WIDTH - MARGIN - 26 - 11 * len(going_up)  # where engine rooms end and the lanes begin
    x, y = MARGIN + 16.0, ROOF + HEADER
    for floor, rooms in floors(root).items():
        start = x
        for name, listed in rooms.items():
            width = right - x if floor == "engine" else 22 + CHARACTER * len(name)
            small = small_print(root, name, listed, width) if floor == "engine" else []
            height = BOX + LINE * len(small) + (3 if small else 0)
            boxes[name] = Box(name, floor, x, y, width, height, small)
            step = min(STEP[floor], (ENGINE - start) / len(rooms)) if floor == "core" else STEP[floor]
            x, y = x + step, y + height + ROW - BOX
        y += HEADER + GAP
    for k, name in enumerate(reversed(going_up)):  # the lowest room has the lane nearest to the boxes
        boxes[name].lane = right + 20 + 11 * k
    return boxes


def small_print(root: Path, name: str, listed: list[str], width: float) -> list[str]:
    """The lines below the name of an engine room: its door and its modules."""
    exported = ", ".join(door(root / "slm" / name / "__init__.py"))
    words = "every module is a door" if name.strip("/") in OPEN_ROOMS else exported and f"door: {exported}"
    letters = int((width - 22) / SMALL)
    return textwrap.wrap(words, letters) + textwrap.wrap("inside:  " + "  ".join(listed), letters)


def upward(root: Path) -> list[str]:
    """The rooms that import from a room above them, from the top down."""
    order = [name for rooms in floors(root).values() for name in rooms]
    sources = {a for a, b in edges(root) if order.index(b) < order.index(a)}
    return [name for name in order if name in sources]


# ---- Drawing -----------------------------------------------------------------------------------------------

STYLE = """
  .paper { fill: #fbfaf7 } .roof { fill: #e9e4da } .floor { fill: #f1eee7 }
  .scripts rect { fill: #fff1df; stroke: #c2701c } .core rect { fill: #e6f0fb; stroke: #2f6db3 }
  .engine rect { fill: #e6f3ea; stroke: #3a8457 }
  text { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif;
         fill: #23262b; font-size: 13px }
  .name { font-weight: 600 } .small { font-size: 11.5px; fill: #4b5158 }
  .title { font-size: 21px; font-weight: 700 }
  .heading { font-size: 14px; font-weight: 700 } .note { font-size: 12.5px; fill: #4b5158 }
  .import { fill: none; stroke-width: 1.5 }
  .import.scripts { stroke: #d08a43 } .import.core { stroke: #5b8ec6 } .import.engine { stroke: #5a9d75 }
  .head.down { fill: #6a7078 } .head.up { fill: #5a9d75 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #14171b } .roof { fill: #2a2c2f } .floor { fill: #1c2025 }
    .scripts rect { fill: #3a2a18; stroke: #d9913f } .core rect { fill: #17293d; stroke: #5c9be0 }
    .engine rect { fill: #18301f; stroke: #57ad78 }
    text { fill: #e8eaed } .small, .note { fill: #aab1b9 }
    .import.scripts { stroke: #b5742f } .import.core { stroke: #4580bd } .import.engine { stroke: #489062 }
    .head.down { fill: #9aa2ab } .head.up { fill: #489062 }
  }"""

HEADINGS = {"scripts": ("Five scripts", "one for each stage"),
            "core": ("Teaching core: slm/*.py", "what to read to learn how post-training works"),
            "engine": ("Engine rooms: slm/*/", "skip them at first")}
NOTES = ("A line leaves a room downwards and turns into each room that it imports from.",
         "The lines on the right go up: engine rooms import core modules, too.",
         "Left out: slm/__init__.py, which nearly every room imports.")


def text(x: float, y: float, words: str, kind: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}"{more}>{escape(words)}</text>'


def draw_box(box: Box) -> list[str]:
    out = [f'<g class="{box.floor}" data-room="{box.name}">',
           f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="6"/>',
           text(box.x + 11, box.y + 17, box.name, "name")]
    for k, line in enumerate(box.small):
        out.append(text(box.x + 11, box.y + BOX + 8 + LINE * k, line, "small", ' xml:space="preserve"'))
    return out + ["</g>"]


def draw_import(a: Box, b: Box) -> str:
    """The line from room a, which imports, to room b: one rounded turn on the way down, two on the way up."""
    turn, end = 8, b.x - 6
    if b.y > a.y:
        x = a.x + 11
        path = f"M{x:g} {a.y + a.height:g}V{b.middle - turn:g}q0 {turn} {turn} {turn}H{end:g}"
    else:
        end = b.x + b.width + 6
        path = (f"M{a.x + a.width:g} {a.middle:g}H{a.lane - turn:g}q{turn} 0 {turn} -{turn}"
                f"V{b.middle + turn:g}q0 -{turn} -{turn} -{turn}H{end:g}")
    return (f'<path class="import {a.floor}" data-from="{a.name}" data-to="{b.name}" d="{path}">'
            f"<title>{a.name} imports {b.name}</title></path>")


def draw_heads(boxes: dict[str, Box], pairs: list[tuple[str, str]]) -> list[str]:
    """An arrow head for every room where lines arrive: on its left, and on its right for lines from below."""
    down = sorted({b for a, b in pairs if boxes[b].y > boxes[a].y})
    up = sorted({b for a, b in pairs if boxes[b].y < boxes[a].y})
    tips = [("down", boxes[name].x, boxes[name].middle, -8) for name in down]
    tips += [("up", boxes[name].x + boxes[name].width, boxes[name].middle, 8) for name in up]
    return [f'<path class="head {way}" d="M{x:g} {y:g}l{length} -4.5v9z"/>' for way, x, y, length in tips]


def draw_floors(boxes: dict[str, Box]) -> tuple[list[str], float]:
    """The roof with the title, a band for each floor with its heading, and the y where the house ends."""
    middle, bottom = WIDTH / 2, 0.0
    out = [f'<path class="roof" d="M{MARGIN} {ROOF - 8}L{middle:g} 10L{WIDTH - MARGIN} {ROOF - 8}z"/>',
           text(middle, ROOF - 22, "The house of slm", "title", ' text-anchor="middle"')]
    for floor, (heading, note) in HEADINGS.items():
        rooms = [box for box in boxes.values() if box.floor == floor]
        top, bottom = rooms[0].y - HEADER, rooms[-1].y + rooms[-1].height + 12
        out.append(f'<rect class="floor" x="{MARGIN}" y="{top:g}" width="{WIDTH - 2 * MARGIN}" '
                   f'height="{bottom - top:g}" rx="4"/>')
        out.append(f'<text x="{rooms[0].x:g}" y="{top + 22:g}" class="heading">{escape(heading)}'
                   f'<tspan class="note" font-weight="400" dx="10">{escape(note)}</tspan></text>')
        if floor == "scripts":
            out += [text(415, top + 58 + 21 * k, line, "note") for k, line in enumerate(NOTES)]
    return out, bottom


def draw(root: Path) -> str:
    """The whole picture as SVG."""
    boxes, pairs = place(root), edges(root)
    house, bottom = draw_floors(boxes)
    height = bottom + MARGIN
    rooms = []
    for box in boxes.values():
        rooms += draw_box(box)
    body = house + [draw_import(boxes[a], boxes[b]) for a, b in pairs] + draw_heads(boxes, pairs) + rooms
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="Which room of slm imports which">',
        f"<style>{STYLE}\n</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height:g}" rx="10"/>', *body, "</svg>", ""])


if __name__ == "__main__":
    here = Path(__file__).parents[1]
    (here / "docs" / "house.svg").write_text(draw(here))
    print("wrote docs/house.svg", file=sys.stderr)
