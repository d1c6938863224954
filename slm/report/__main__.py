"""python -m slm.report RUN: build the page of a run directory again."""

from slm.report import write
from slm.runs import cli


def main(args) -> None:
    print(write(args.run))


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("run", metavar="RUN", help="a run directory of any script")
    cli.run(main, p.parse_args())
