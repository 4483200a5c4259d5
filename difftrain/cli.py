"""The command line: arguments, messages and exit codes. What a command does is in `commands`.

Exit codes: 0 clean, 1 findings or changes, 2 usage or i/o, 3 a device or package that is absent
here, 4 the run failed, 70 our own bug, 128 + its number a signal that ended it (SIGINT 130, SIGTERM
143, SIGHUP 129). Results go to stdout, progress and problems to stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from difftrain import __version__
from difftrain.commands.console import complain
from difftrain.commands.failure import CLEAN, FINDINGS, USAGE, Failure, failure
from difftrain.commands.stopping import code as ended_by
from difftrain.commands.stopping import stoppable
from difftrain.language.finding import SpecError
from difftrain.language.nearest import nearest

Option = tuple[tuple[str, ...], dict]


def arg(*flags: str, **settings) -> Option:
    return flags, settings


def _one_of(what: str, *words: str) -> Callable[[str], str]:
    """A word out of a list; anything else is told with the list."""

    def read(text: str) -> str:
        if text not in words:
            listed = ", ".join(f"`{w}`" for w in words)
            raise argparse.ArgumentTypeError(f"there is no {what} `{text}`: it is one of {listed}")
        return text

    return read


def _prompt(text: str) -> str:
    """A text; the bytes of a command line may be none."""
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise argparse.ArgumentTypeError(
            "a prompt has bytes that are no UTF-8: write it as UTF-8"
        ) from cause
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number")
    return int(text)


def _width(text: str) -> float:
    """A width of a power function: at 1 / sqrt(12) every step weighs the same."""
    number = float(text) if re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text) else 0.0
    if not 0 < number <= 0.288:
        raise argparse.ArgumentTypeError(
            f"`{text}` is no width of an average: give a number between 0 and 0.288"
        )
    return number


def _some(text: str) -> int:
    """A number of pictures."""
    number = int(text) if re.fullmatch(r"\d{1,9}", text) else 0
    if not 1 <= number <= MOST:
        raise argparse.ArgumentTypeError(
            f"`{text}` is no number of pictures: give one from 1 to {MOST}"
        )
    return number


MOST = 100_000  # pictures drawn by one command
PATHS = arg("paths", nargs="*", metavar="PATH", help="files or folders; none is this folder")
SPEC = arg("spec", nargs="?", default=".", metavar="SPEC", help="a .diff file, or its folder")
OBJECTIVE = arg("--objective", metavar="NAME", help="which one, where a file has several")
SET = arg(
    "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
    help="a param, or a dotted path to an option: `gamma=3`, `train.steps=200`",
)  # fmt: skip
TRAINING = (
    arg("--data", metavar="PATH", help="pictures instead of those the spec names"),
    arg("--steps", type=_count, metavar="N", help="optimizer steps in all"),
    arg("--resume", metavar="PATH", help="a checkpoint or a run to go on from, or `auto`"),
    arg("-o", "--out", metavar="FOLDER", help="the run's; a new one in `runs` if not said"),
)


@dataclass(frozen=True)
class Command:
    """A command: where its function `(args) -> exit code` is, what it does, what it takes."""

    function: str
    summary: str
    options: tuple[Option, ...]

    def run(self, args: argparse.Namespace) -> int:
        module, name = self.function.split(":")
        return getattr(import_module(f"difftrain.commands.{module}"), name)(args)


COMMANDS: dict[str, Command] = {
    "lint": Command(
        "check:lint",
        "say what is wrong with specs, without running them",
        (
            PATHS,
            SET,
            arg(
                "--format",
                type=_one_of("format", "text", "github", "json"),
                default="text",
                metavar="FORMAT",
                help="text, github or json",
            ),
        ),
    ),
    "fmt": Command(
        "check:fmt",
        "write specs in the one layout",
        (PATHS, arg("--check", action="store_true", help="change nothing, exit 1 if it would")),
    ),
    "explain": Command(
        "show:explain",
        "tell what a spec trains, or what a finding's code means",
        (
            arg(
                "spec", nargs="?", default=".", metavar="SPEC|CODE", help="a .diff file, or DIF203"
            ),
            SET,
            OBJECTIVE,
            arg("--passes", action="store_true", help="also what each pass of the compiler does"),
        ),
    ),
    "graph": Command(
        "show:graph",
        "print the graph of a quantity",
        (
            SPEC,
            SET,
            OBJECTIVE,
            arg("--quantity", default="loss", metavar="NAME", help="which one; `loss` if not said"),
            arg("--before", metavar="PASS", help="as it is before this pass"),
            arg("--after", metavar="PASS", help="as it is after this pass"),
        ),
    ),
    "diff": Command(
        "show:diff",
        "say whether two specs train the same",
        (arg("first", metavar="A"), arg("second", metavar="B"), SET),
    ),
    "import": Command(
        "convert:convert",
        "write another trainer's configuration as a spec",
        (
            arg("config", metavar="CONFIG", help="a YAML file"),
            arg("-o", "--output", metavar="FILE", help="where to; stdout if not said"),
        ),
    ),
    "compile": Command(
        "run:compile_spec",
        "write one executable file that trains",
        (
            SPEC,
            SET,
            arg(
                "--target",
                default="auto",
                metavar="TARGET",
                help="what to compile the step for ahead: `auto`, `none`, `cpu`, or the GPU here by"
                " a part of its name, `h100`; `auto` is that GPU, or nothing",
            ),
            arg("-o", "--output", metavar="FILE", help="the spec's name if not said"),
        ),
    ),
    "train": Command(
        "run:train",
        "train what a spec declares",
        (SPEC, SET, *TRAINING),
    ),
    "sample": Command(
        "run:sample",
        "make pictures with a trained model",
        (
            arg("run", metavar="RUN", help="the folder of a run, or a checkpoint"),
            arg(
                "--prompt",
                type=_prompt,
                action="append",
                default=[],
                metavar="TEXT",
                dest="prompts",
                help="what to draw; several are drawn in turn, none draws captions",
            ),
            arg("-n", "--count", type=_some, metavar="N", help="how many pictures"),
            arg("--solver", metavar="SOLVER", help="another one: `heun`, or `ddim(eta = 1)`"),
            arg("--steps", type=_count, metavar="N", help="of the solver"),
            arg("--guidance", metavar="W", help="1 is none"),
            arg("--save", metavar="FILE", help="an .npz for all pictures, beside the grid"),
            arg("--score", action="store_true", help="say how near they are to real pictures"),
            arg("--fid", metavar="FILE", help="score with FID too: Inception's TorchScript file"),
            arg("--weights", metavar="FILE", help="others than the newest, as `ema` wrote them"),
            SET,
            arg(
                "-o",
                "--output",
                metavar="FILE",
                help="a PNG, or an .npz of arrays; the run's name if not said",
            ),
        ),
    ),
    "export": Command(
        "export:export",
        "write a trained model as files that sample without difftrain",
        (
            arg("run", metavar="RUN", help="the folder of a run, or a checkpoint"),
            arg(
                "--to",
                type=_one_of("target", "onnx", "pt2", "tensorrt", "diffusers"),
                required=True,
                metavar="TARGET",
                help="onnx, pt2, tensorrt or diffusers",
            ),
            arg("--weights", metavar="FILE", help="others than the newest, as `ema` wrote them"),
            SET,
            arg("-o", "--output", metavar="PATH", help="the run's name and the target if not said"),
        ),
    ),
    "ema": Command(
        "run:ema",
        "make averaged weights of another width from a run's snapshots",
        (
            arg("run", metavar="RUN", help="the folder of a run"),
            arg(
                "--std",
                type=_width,
                required=True,
                metavar="STD",
                help="width of the power function, relative to the steps so far: `0.08`",
            ),
            arg("--step", type=_count, metavar="N", help="of which snapshot; the last if not said"),
            arg("-o", "--output", metavar="FILE", help="in the run's folder if not said"),
        ),
    ),
}


class Parser(argparse.ArgumentParser):
    """Arguments whose problems are raised, in our words."""

    def error(self, message: str):
        text = re.sub(r"^argument (\S+?)(/\S+)?: expected", r"`\1` expects", message)
        text = re.sub(r"^argument \S+: ", "", text)
        text = re.sub(r"^the following arguments are required: ", f"`{self.prog}` needs ", text)
        raise Failure(text, USAGE)


def main(argv: list[str] | None = None) -> int:
    """The exit code of a command line."""
    return guarded(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def guarded(program: Callable[[], int]) -> int:
    """The exit code of a program; whatever it raises is told and has a code of its own."""
    try:
        with stoppable():
            code = program()
        sys.stdout.flush()
        return code
    except SpecError as error:
        complain(error.findings)
        return FINDINGS
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return ended_by(stop)
    except Exception as error:
        return _fail(error)


def _fail(error: Exception) -> int:
    """Tells one sentence, and the traceback to whoever asks for it."""
    told = failure(error)
    print(f"error: {told}", file=sys.stderr)
    if os.environ.get("DIFFTRAIN_TRACEBACK") == "1" and not isinstance(error, Failure):
        traceback.print_exception(error)
    return told.code


def _dispatch(argv: list[str]) -> int:
    match argv:
        case []:
            print(usage(), end="", file=sys.stderr)
            return USAGE
        case [("-h" | "--help" | "help"), *_]:
            print(usage(), end="")
            return 0
        case ["--version", *_]:
            print(f"difftrain {__version__}")
            return 0
        case [name, *rest] if name in COMMANDS:
            return _run(name, rest)
    close = nearest(argv[0], [*COMMANDS, "--help", "--version"])
    hint = f"did you mean `{close}`?" if close else "`difftrain --help` lists them"
    what = "option" if argv[0].startswith("-") else "command"
    raise Failure(f"there is no {what} `{argv[0]}`: {hint}", USAGE)


def _run(name: str, argv: list[str]) -> int:
    command = COMMANDS[name]
    args = parse(f"difftrain {name}", command.summary, command.options, argv)
    return CLEAN if args is None else command.run(args)


def parse(
    program: str, summary: str, options: Sequence[Option], argv: list[str]
) -> argparse.Namespace | None:
    """The arguments of a program, or None where help was asked for and is printed."""
    parser = Parser(prog=program, description=summary, allow_abbrev=False)
    for flags, settings in options:
        parser.add_argument(*flags, **settings)
    if {"-h", "--help"} & set(argv):
        print(parser.format_help(), end="")
        return None
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise Failure(_unknown(program, options, unknown[0]), USAGE)
    return args


def _unknown(program: str, options: Sequence[Option], word: str) -> str:
    if not word.startswith("-"):
        return f"`{program}` does not know what to do with `{word}`"
    flag = word.partition("=")[0]
    flags = [f for names, _ in options for f in names if f.startswith("-")]
    close = nearest(flag, flags)
    hint = f"did you mean `{close}`?" if close else f"`{program} --help` lists them"
    return f"`{program}` has no option `{flag}`: {hint}"


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:9} {command.summary}" for name, command in COMMANDS.items()]
    head = "difftrain: a compiler for diffusion training objectives\n\n"
    head += "usage: difftrain COMMAND ...        (difftrain COMMAND --help says what it takes)\n\n"
    return head + "\n".join(lines) + "\n"
