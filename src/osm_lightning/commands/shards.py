"""`osm shards`: raw dataset folders to shards, and looking at what is in them.

A subcommand is a module `shards_<name>.py` beside this one, with a text `HELP` and the functions `add_arguments` and
`run`; it is imported when it is called, or described.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

HELP = "Build shards from raw datasets; inspect, verify and browse them."

SUBCOMMANDS = ("build", "inspect", "verify", "browse")

WITH_SETTINGS = ("browse",)
"""Subcommands that also take settings of a config: the words that their parser does not know, as `args.settings`."""


def main(argv: Sequence[str]) -> int:
    """Runs `osm shards` with the arguments that follow it; returns the exit status.

    Raises:
        ValueError: what the subcommand makes of its arguments and files.
    """
    name = argv[0] if argv else ""
    if name not in SUBCOMMANDS:
        parser = _overview()
        parser.parse_args(argv)  # prints the help or says what is wrong, and exits
        parser.error("the COMMAND comes first")
    module = _module(name)
    parser = argparse.ArgumentParser(prog=f"osm shards {name}", description=module.HELP, allow_abbrev=False)
    module.add_arguments(parser)
    args, unknown = parser.parse_known_args(argv[1:])
    if name in WITH_SETTINGS:
        args.settings = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return int(module.run(args))


def _overview() -> argparse.ArgumentParser:
    """A parser that knows no more than the subcommands' names."""
    parser = argparse.ArgumentParser(prog="osm shards", description="Shards: build them, and look at what they hold.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        commands.add_parser(name, help=_module(name).HELP)
    return parser


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"osm_lightning.commands.shards_{name}")
