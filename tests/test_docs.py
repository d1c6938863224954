"""What docs/ says is true of the code."""

import doctest
import re
from pathlib import Path

import pytest

from bench import gpus

ROOT = Path(__file__).parents[1]
SOURCES = [path.read_text() for folder in (".", "slm", "slm/*") for path in ROOT.glob(f"{folder}/*.py")]
CODE = re.sub(r'"\s*\n\s*f?"', "", "\n".join(SOURCES))  # a sentence over several lines of source is one


def quoted() -> list[str]:
    """What the first column of the tables in troubleshooting.md quotes."""
    rows = re.findall(r"^\| (.*?) \| .* \|$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    return [text for row in rows for text in re.findall("`(.*?)`", row)]


@pytest.mark.parametrize("text", quoted())
def test_what_troubleshooting_quotes_is_what_the_code_says(text):
    if text.startswith("the loss is "):
        text = "the loss is {loss}"
    assert text in CODE, "no script prints this"


def test_the_tour_s_numbers_come_out():
    found = doctest.testfile(str(ROOT / "docs/tour.md"), module_relative=False)
    assert found.failed == 0 and found.attempted > 20


def test_the_library_s_lines_in_the_readme_work():
    found = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert found.failed == 0 and found.attempted > 10


def test_readme_s_table_of_gpus_is_what_its_script_prints(capsys):
    gpus.main()
    printed, readme = capsys.readouterr().out, (ROOT / "README.md").read_text()
    for line in printed.splitlines():
        assert f"\n{line}\n" in readme
