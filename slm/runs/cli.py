"""The command line of every script: grouped help, scaled defaults, one sentence for bad input.

Imports nothing heavy: a script parses its arguments, and answers --help, before it imports the rest.
"""

import argparse
import contextlib
import errno
import math
import os
import signal
import sys
import textwrap
from functools import partial
from pathlib import Path

from slm import BadInput, prompts
from slm.runs.files import CONFIG, base_of, read_json

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"all": (*QKVO, "gate_proj", "up_proj", "down_proj"), "qkvo": QKVO, "qv": ("q_proj", "v_proj")}
CANNOT_WRITE = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EEXIST,
                errno.ENOTDIR}


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that keeps the description's line breaks and refuses abbreviated options. From here
    on, a character that the terminal or log can't hold is printed as a question mark."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    shape = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=100)
    return Parser(description=description, formatter_class=shape, allow_abbrev=False)


class Parser(argparse.ArgumentParser):
    """With --resume, an option that is not given has the value that the run in --out was started with. RunDir
    refuses one that is given with another value."""

    def parse_args(self, words=None, namespace=None):
        args = super().parse_args(words, namespace)
        if getattr(args, "resume", False):
            if args.dry_run:
                self.error("--dry-run and --resume: expected one of them")
            if not args.out:
                self.error("--resume needs the folder of the run: --resume --out FOLDER, no more options")
            given = super().parse_args(words, argparse.Namespace(**dict.fromkeys(vars(args))))
            try:
                settings = read_json(Path(args.out) / "settings.json", {}).get("settings", {})
            except BadInput as e:
                self.error(str(e))
            for name in settings.keys() & vars(args).keys():
                if getattr(given, name) in (None, "auto"):  # where an option is given it is not None
                    setattr(args, name, settings[name])
        return args


class Names(argparse.Action):
    """An option with nargs="+" that holds names: `--data a,b` and `--data a b` are both ["a", "b"]."""

    def __call__(self, parser, args, words, option=None):
        names = [name for word in words for name in word.split(",") if name]
        if not names:
            parser.error(f"argument {option}: expected names with commas between them")
        setattr(args, self.dest, names)


def run_options(p: argparse.ArgumentParser, folder: str, resume: bool = True):
    """The group of options that every script has. resume=False: a run goes on by itself."""
    g = p.add_argument_group("run")
    g.add_argument("--out", help=f"run directory (default {folder})")
    if resume:
        g.add_argument("--resume", action="store_true", help="go on with the stopped run in --out")
    g.add_argument("--seed", type=lambda text: positive(text, 0), default=0,
                   help="of all that is drawn (default 0)")
    g.add_argument("--dry-run", action="store_true", help="do a part, predict time and memory of all, stop")
    device_options(g)
    return g


def device_options(g):
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")


def defaults(paper: dict, tiny: dict):
    """A function: an option's name -> what resolve() fills in, in words for the help."""
    return lambda name: f"default {paper[name]}; tiny {tiny.get(name, paper[name])}"


def resolve(args: argparse.Namespace, paper: dict, tiny: dict) -> argparse.Namespace:
    """Fill every option that was left at None: from `tiny` for `tiny` and what was trained from it, else from
    `paper`.

    >>> resolve(argparse.Namespace(model="tiny", lr=None, k=4), {"lr": 1e-4, "k": 2}, {"lr": 3e-3})
    Namespace(model='tiny', lr=0.003, k=4)
    """
    scaled = paper | tiny if is_small(args.model) else paper
    for name, value in scaled.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def is_small(model: str) -> bool:
    """Whether `model` is tiny, or a directory whose config.json or base model is that small."""
    if model == "tiny":
        return True
    with contextlib.suppress(BadInput, TypeError, RecursionError):
        config = Path(model) / CONFIG
        if config.is_file():
            return read_json(config).get("hidden_size", 1024) <= 256
        return is_small(base_of(Path(model)))
    return False


def count(n: int, thing: str) -> str:
    """1 step, 2 steps, 1,000 steps"""
    return f"{n:,} {thing}" + "s" * (n != 1)


def show(settings: dict) -> None:
    """Print the resolved settings, a few to a line."""
    items = (f"{k}={','.join(value) if isinstance(value, list) else value}" for k, value in settings.items())
    print(textwrap.fill(f"settings: {' '.join(items)}", 108, subsequent_indent=" " * 10,
                        break_long_words=False, break_on_hyphens=False))


def run(main, args: argparse.Namespace, stopped=None) -> None:
    """Call main(args), with --prompt in use. Bad input, a full disk and a locked folder end in one sentence
    and exit code 2. After Ctrl-C, the first rank calls stopped(args.out) if a run stands there."""
    prompts.use(getattr(args, "prompt", prompts.STANDARD[0]))
    try:
        main(args)
    except BadInput as e:
        give_up(e)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        if e.errno not in CANNOT_WRITE:
            raise
        where = e.filename or getattr(args, "out", None) or "the output"
        give_up(f"cannot write {where}: {e.strerror}; choose another --out")
    except KeyboardInterrupt:
        begun = getattr(args, "out", None) and Path(args.out, "settings.json").is_file()
        if begun and stopped and os.environ.get("RANK", "0") == "0":
            stopped(args.out)
        more = f"; --resume --out {args.out} goes on from there" if begun and hasattr(args, "resume") else ""
        print(f"\nstopped; what was finished is kept{more}", file=sys.stderr)
        sys.exit(130)


def give_up(sentence):
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


class Interrupt:
    """The first Ctrl-C or SIGTERM calls `first` and lets what is under way finish (`asked` turns true); the
    second stops at once."""

    def __init__(self, first=lambda: None):
        self.first, self.asked = first, False

    def __enter__(self):
        self.old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.first()

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def positive(text: str, least: int = 1) -> int:
    """argparse type: a whole number of 1 or more that 63 bits can hold."""
    if not text.isdecimal() or not least <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(text)


def number(low: float, high: float = math.inf):
    """argparse type: a number from low to high."""
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := float(text)) <= high and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
    return read


def prompt_option(g):
    g.add_argument("--prompt", type=prompt_file, default=prompts.STANDARD[0], metavar="FILE",
                   help="a text with {question} in it: what the solver is asked (default the report's)")


def prompt_file(name: str) -> str:
    """argparse type: the text of a prompt's file. The id of the standard prompt stays what it is."""
    if name == prompts.STANDARD[0]:
        return name
    try:
        text = Path(name).read_text(encoding="utf-8-sig").strip("\n")
    except (OSError, ValueError) as e:
        raise argparse.ArgumentTypeError(f"{name}: not readable as text ({e})") from None
    if "{question}" in text:
        return text
    raise argparse.ArgumentTypeError(f"{name}: no {{question}} in it; expected it where that goes")


def backend_options(p):
    """What answers: a model on this machine with its adapters, or a server."""
    g = p.add_argument_group("what answers")
    g.add_argument("--model", default="tiny",
                   help="tiny, a directory, a hub id, or the endpoint's model (default tiny)")
    g.add_argument("--adapter", action="append", default=[], metavar="[ROLE=]DIR",
                   help="LoRA adapter for a role (solver, checker, verifier, summarizer), or for all")
    g.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server: http://localhost:8000/v1")
    g.add_argument("--key-env", metavar="NAME", help="environment variable that holds the endpoint's key")


def answer_options(p, both):
    """What agents.py and eval.py both take: who answers which problems."""
    backend_options(p)
    g = p.add_argument_group("problems")
    g.add_argument("--data", nargs="+", action=Names, default=["tiny"], metavar="A,B",
                   help="names (tiny, tiny-unseen, gsm8k, math, math500, aime24, amc23, ...) or JSON lines "
                        "files (default tiny)")
    g.add_argument("--split", choices=("train", "test", "unseen"), default="test")
    g.add_argument("--limit", type=positive, help=f"the first N problems of each set ({both('limit')})")
    g.add_argument("--draw", type=lambda text: positive(text, 0), metavar="SEED",
                   help="not the first N, but N drawn at random with this seed")
    prompt_option(g)
    step_option(g, both)


def step_option(g, both):
    g.add_argument("--step-rule", choices=("paragraph", "line", "sentence"),
                   help=f"what ends a step of this model's solutions, for the searches ({both('step_rule')})")


def adapter_options(g, both):
    """The options of LoRA, in both trainers."""
    g.add_argument("--rank", type=positive, default=16, help="LoRA rank (default 16)")
    g.add_argument("--alpha", type=number(0), default=32.0,
                   help="LoRA scale is alpha / rank (default 32)")
    g.add_argument("--targets", choices=TARGETS,
                   help=f"all linear layers, qkvo, or qv as in the report's runs ({both('targets')})")


def training_options(p, g, both, folder: str):
    """What both trainers take beside their own options."""
    g.add_argument("--warmup", type=number(0, 1),
                   help=f"share of the steps, then cosine ({both('warmup')})")
    g.add_argument("--clip", type=number(1e-9), default=1.0, help="largest gradient norm (default 1)")
    g.add_argument("--micro-tokens", type=positive,
                   help=f"tokens in memory at once ({both('micro_tokens')})")
    g.add_argument("--recompute", action="store_true", help="less memory for a third more time")
    g = run_options(p, folder)
    g.add_argument("--save-every", type=positive, help=f"steps a checkpoint ({both('save_every')})")
