"""A command line: parsed, its command called, its errors said in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro
from tyro.conf import subcommand

from pkv.cli.commands import Bench, Command, Plan, Sample, Score, Train
from pkv.cli.output import Output
from pkv.config import UserError

INTERRUPTED = 130
_COMMANDS = tuple(Command.__args__)
_FORM = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 2 the user's mistake, 130 interrupted, 1 anything else."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing: pkv has no use for it
    try:
        if arguments == ["--version"]:
            import pkv

            print(pkv.__version__)
            return 0
        command, flags = parse(arguments)
        return execute(command, flags)
    except UserError as error:
        print(f"pkv: {' '.join(str(error).split())}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        hint = "; the same command resumes at the last checkpoint" if arguments[:1] == ["train"] else ""
        print(f"\npkv: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read the results has enough, as in `pkv sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def execute(command: Command, flags: Sequence[str]) -> int:
    """Call a command, its results on stdout; whatever else prints is kept off it when it carries JSON."""
    out = Output(sys.stdout, command.json or isinstance(command, Sample | Score | Bench))
    with contextlib.redirect_stdout(sys.stderr) if out.json else contextlib.nullcontext():
        return command(out, flags) or 0


def parse(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """The command of a line, and flags of the config. Raises UserError; SystemExit after `--help`."""
    names = [kind.__name__.lower() for kind in _COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        near = difflib.get_close_matches(arguments[0], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise UserError(f"{arguments[0]}: no such command; {hint}")
    choices: Any = Union[tuple(Annotated[kind, subcommand(kind.__name__.lower())] for kind in _COMMANDS)]  # noqa: UP007
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command, rest = tyro.cli(
                choices, prog="pkv", description=_ABOUT, args=arguments, config=_FORM, return_unknown_args=True
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{one_line(box.getvalue())}; see pkv {' '.join(arguments[:1])} --help") from None
    if rest and not isinstance(command, Train | Plan):
        known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(command)]
        near = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see pkv {type(command).__name__.lower()} --help"
        raise UserError(f"{rest[0]}: unknown argument; {hint}")
    return command, rest


_ABOUT = "Teaches a language model to answer by competition, with judge-assisted GRPO."


def one_line(box: str) -> str:
    """tyro's framed message as one line: no frame, no title, nothing below its rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    message = itertools.takewhile(lambda line: line.strip("─╰╯"), lines)
    return " ".join(message).rstrip(".")
