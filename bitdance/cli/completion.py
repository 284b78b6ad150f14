"""`bitdance completion bash|zsh`: a script with which the shell completes commands and options.

    eval "$(bitdance completion bash)"                                            in this shell; in ~/.bashrc for all
    bitdance completion zsh > ~/.zfunc/_bitdance                                  a folder of $fpath

The options are those of the commands' own parsers, so the script of an installation knows what that installation can do.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from bitdance.cli import FROM_ENTRY_POINTS, OWN, Parser, UsageError, foreign_commands, load_command

SHELLS = ("bash", "zsh")


def run(argv: Sequence[str]) -> int:
    """Print the script."""
    parser = Parser(
        prog="bitdance completion",
        description="Print a script that makes the shell complete bitdance's commands and options.",
        epilog='bash: add this line to ~/.bashrc:  eval "$(bitdance completion bash)"',
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that you use")
    shell = parser.parse_args(argv).shell
    try:
        import shtab
    except ModuleNotFoundError:
        raise UsageError("completion needs the package shtab; install it: pip install shtab") from None
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> Parser:
    """One parser of all commands, with the options of each. Commands whose packages are not installed have none."""
    parser = Parser(prog="bitdance")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command")
    foreign = foreign_commands()
    for name in [*OWN, *foreign]:
        commands.add_parser(name, help=(OWN | FROM_ENTRY_POINTS).get(name, ""))
        try:
            command = load_command(name, foreign)
        except UsageError:  # it needs an extra
            continue
        commands.choices[name] = parser_of(command)
    return parser


def parser_of(command: Callable[[Sequence[str]], int], *words: str) -> Parser:
    """The parser that a command reads its arguments with, those of its own sub-commands included. `words` lead to it."""
    with Parser.caught() as caught:
        command(list(words))
    (parser,) = caught
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                if not inner._actions:  # an empty one stands for a module that is imported when it is asked for
                    action.choices[name] = parser_of(partial(_under, command, words), name)
    return parser


def _under(command: Callable[[Sequence[str]], int], words: Sequence[str], rest: Sequence[str]) -> int:
    return command([*words, *rest])
