"""Build the page of a run directory again, or one page about several runs.

    python -m slm.report runs/grpo-tiny              report.html in it
    python -m slm.report runs/grpo-tiny --watch      and again whenever the run grew, until Ctrl-C
    python -m slm.report compare runs/a runs/b --out both.html
"""

import time
from pathlib import Path

from slm import BadInput
from slm.report import compare, write
from slm.runs import cli

WATCH_SECONDS = 10


def main(args) -> None:
    first, *others = args.runs
    if first == "compare" and len(others) > 1 and args.out and not args.watch:
        return print(compare(others, args.out))
    if others or args.out:
        raise BadInput("expected one run directory; or compare RUN RUN ... --out FILE.html, without --watch")
    print(page := write(first))
    while args.watch:
        time.sleep(WATCH_SECONDS)
        if any(file.stat().st_mtime > page.stat().st_mtime for file in Path(first).glob("*.json*")):
            write(first)


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run directory; or compare RUN RUN ...")
    p.add_argument("--out", metavar="FILE.html", help="compare: the page to write")
    p.add_argument("--watch", action="store_true", help="keep on until Ctrl-C")
    cli.run(main, p.parse_args())
