"""The command `bitdance`. Nothing heavy is imported before the named sub-command runs, so that `--help` is quick.

Commands of this package are modules of `bitdance.cli` with `run(argv) -> int`. Commands of other packages are entry
points of the group `bitdance.commands`, each a function `(argv) -> int`; only names are read before one is called.

Exit codes: 0 all done, 1 some jobs failed, 2 bad usage or config, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, NoReturn

from bitdance.cli.memory import keep_freed_memory

GROUP = "bitdance.commands"
LONGEST = 4000  # letters of a message
OWN = {
    "generate": "draw pictures from prompts",
    "edit": "change a picture: where a mask is white, or where two prompts differ",
    "serve": "pictures over HTTP, in the form of OpenAI's images API",
    "info": "what a model folder holds, or how a picture was made",
    "sizes": "the picture sizes that a model makes",
    "doctor": "what this machine offers, and which model fits",
    "verify": "check whether a model is whole, or equals another",
    "convert": "make a model folder of what other systems published",
    "bench": "where a picture's time goes, and how fast this machine could be",
    "completion": "a script with which bash or zsh completes these commands",
}
FROM_ENTRY_POINTS = {
    "data": "pack captioned pictures into shards for training",
    "train": "train a tokenizer or a generator from a config",
    "tokenizer": "encode, decode and evaluate pictures as bits",
    "distill": "make a model faster: larger steps, or fewer evaluations of its head",
    "export": "make a model folder of a training checkpoint",
    "measure": "how well a model follows prompts or classes, and what settings lose",
    "evaluate": "the field's benchmarks and scores, such as GenEval and FID",
    "card": "write scores into a model card",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, `bitdance: error: …`, exit code 2."""

    _caught: ClassVar[list["Parser"] | None] = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, partial(_plain, True))  # what Python reads beside, "1_0" or "nan", no other door takes
        self.register("type", float, partial(_plain, False))

    @classmethod
    @contextmanager
    def caught(cls) -> Iterator[list["Parser"]]:
        """What runs inside ends at the first parser that is to read no arguments; the list holds that parser. So completion and
        tests see the options of a command as it has them, and nothing is built for them."""
        found: list[Parser] = []
        Parser._caught = found
        try:
            yield found
        except _Caught:
            pass
        finally:
            Parser._caught = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, unless this parser is to be `caught`; an empty one stands for a module that is imported when named."""
        if Parser._caught is not None and not args and self._actions:
            Parser._caught.append(self)
            raise _Caught
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Caught(BaseException):
    """Ends a command whose parser is all that was wanted."""


class UsageError(ValueError):
    """A command line that cannot be carried out."""


def number(name: str) -> Callable[[str], Any]:
    """A function for `type=` of an argument: it reads the number of that name, checked as at every other door
    (`bitdance.values`)."""

    def check(text: str) -> Any:
        from bitdance.values import from_text

        try:
            return from_text(name, text, "")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def _plain(whole: bool, text: str) -> Any:
    """The number that a text means, for `type=int` and `type=float`, in the letters that every other door takes."""
    from bitdance.values import Range, read_number, shown

    value = Range(-(2**63), 2**63 - 1, whole).number(read_number(text, whole))
    if value is None:
        kind = "whole" if whole else "finite"
        raise argparse.ArgumentTypeError(f"{shown(text)}; a {kind} number of at most 64 bits is allowed")
    return value


def count(text: str) -> Any:
    """Read a whole number from 1 on; for `type=` of an argument."""
    return number("count")(text)


def report(message: str, kind: str = "error", prog: str = "bitdance") -> None:
    """One line on standard error: `bitdance: error: …`. What a stranger wrote cannot steer the terminal."""
    from lfq_tokenizer.text import printable

    text = " ".join(message.split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    try:
        print(f"{prog}: {kind}: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:  # nobody can be told
        _let_go(sys.stderr)


def print_json(value: Any) -> None:
    """The value as indented JSON on standard output; what could steer a terminal is escaped."""
    from lfq_tokenizer.json_file import json_text

    _print(json_text(value))


def print_page(lines: Iterable[str]) -> None:
    """Lines for people on standard output; what could steer a terminal is written out."""
    from lfq_tokenizer.text import printable

    for line in lines:
        _print(printable(line))


_lost: list[OSError] = []  # why standard output of this command could not be written


def _print(text: str) -> None:
    """A line that is lost, because its reader has gone or its disk is full, does not end the work."""
    try:
        print(text)
    except OSError as error:
        _lost.append(error)
        _let_go(sys.stdout)


def _let_go(stream: Any) -> None:
    """Send what is still written there nowhere, so that nothing fails, nor when the interpreter ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def foreign_commands() -> dict[str, EntryPoint]:
    """The commands that other installed packages bring, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in OWN}


def _parser(foreign: Sequence[str]) -> Parser:
    def rows(names: Sequence[str]) -> str:
        return "\n".join(f"  {name:<10} {(OWN | FROM_ENTRY_POINTS).get(name, '')}".rstrip() for name in names)

    commands = "commands:\n" + rows(list(OWN))
    if foreign:
        order = list(FROM_ENTRY_POINTS)
        commands += "\n\ntraining commands:\n" + rows(
            sorted(foreign, key=lambda name: (order.index(name) if name in order else len(order), name))
        )
    parser = Parser(
        prog="bitdance",
        description="Draw pictures from text, and train the models that do it.",
        epilog=commands + "\n\nbitdance COMMAND --help shows the options of a command. A first one:\n"
        '  bitdance generate "a fox on blue" --seed 1 2 3 -o out --grid',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("command", nargs="?", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def load_command(name: str, foreign: dict[str, EntryPoint]) -> Callable[[Sequence[str]], int]:
    """What runs the command of that name. UsageError where there is none, or where it needs an extra."""
    if name in OWN:
        run: Callable[[Sequence[str]], int] = import_module(f"bitdance.cli.{name}").run
        return run
    if name in foreign:
        try:
            loaded: Callable[[Sequence[str]], int] = foreign[name].load()
            return loaded
        except ModuleNotFoundError as error:
            raise UsageError(
                f"command {name!r} needs the module {error.name!r}; install the training extra: pip install 'bitdance[train]'"
            ) from error
    if name in FROM_ENTRY_POINTS:
        raise UsageError(f"command {name!r} is not registered here; install the package: pip install -e '.[train]'")
    from lfq_tokenizer.text import did_you_mean

    known = [*OWN, *foreign]
    raise UsageError(f"unknown command {name!r}; {did_you_mean(name, known)}known: {', '.join(known)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` without the program's name; None reads `sys.argv`."""
    if argv is None:  # a process of its own
        keep_freed_memory()
        argv = sys.argv[1:]
    argv = list(argv)
    _lost.clear()
    for name in ("stdout", "stderr"):  # None where a scheduler has closed it; what is done counts all the same
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without "×" must not turn an answer into an error
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: report(str(message), "warning")
        return _run(argv)


def _run(argv: list[str]) -> int:
    try:
        foreign = foreign_commands()
        parser = _parser(list(foreign))
        options = parser.parse_args(argv)
        if options.version:
            from bitdance import __version__

            print(f"bitdance {__version__}")
            return 0
        if options.command is None:
            parser.print_help()
            return 2
        code = load_command(options.command, foreign)(options.arguments)
        return _flushed(code)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except BrokenPipeError:
        _let_go(sys.stdout)  # the reader (`| head`) has gone; without this the interpreter would complain at exit
        return 0
    except (ValueError, OSError) as error:
        report(_words(error))
        return 2
    except (RecursionError, MemoryError) as error:  # of an input that no limit foresaw
        report(f"{type(error).__name__}: an input is nested too deeply or too large for the memory")
        return 2
    except KeyboardInterrupt:
        report("SIGINT", "stopped")
        return 130


def _flushed(code: int) -> int:
    """The exit code once standard output is written; 1 where it cannot be, say because its disk is full."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _lost.append(error)
        _let_go(sys.stdout)  # so that the interpreter does not try again at exit
    if reason := next((lost.strerror for lost in _lost if not isinstance(lost, BrokenPipeError)), None):
        report(f"standard output could not be written ({reason}); what the command did counts")
        return max(code, 1)
    return code


def _words(error: ValueError | OSError) -> str:
    """What is wrong, with the file where the system names one."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None and not isinstance(error, ValueError):
        return f"{error.filename}: {error.strerror}"
    return str(error)
