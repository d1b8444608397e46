"""The `headway` command. It only dispatches; a command is imported when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "serve": "serve a model: vLLM's own server, whose requests may steer",
    "compile": "show what the steering of a request compiles to, or why it is refused",
    "calibrate": "measure a model once, for the methods that need it",
    "profile": "show, import and upload profiles",
    "doctor": "check the installation, and whether a model can be steered",
    "bench": "measure the cost of steering",
}
"""Name -> one line of help; a command is the module of its name in `headway.server.commands`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        command = import_module(f"headway.server.commands.{arguments[0]}")
        code: int = command.main(arguments[1:])
        return code
    parser().parse_args(arguments)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of everything before a command: help, version, and errors."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    result = argparse.ArgumentParser(
        prog="headway",
        usage="headway [-h] [--version] COMMAND ...",
        description="Serve a model with vLLM and let every request steer its attention.",
        epilog="\n".join(["commands:", *lines, "", "headway COMMAND --help shows its options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"headway {_version()}")
    result.add_argument(
        "command", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS
    )
    return result


def _version() -> str:
    try:
        return version("headway")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
