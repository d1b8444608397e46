"""The options of `headway serve` that keep clients apart and within bounds."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from headway.server.http.isolation import OPTION, SECRET_VARIABLE
from headway.server.http.limits import DEFAULT_BODY_MIB, DEFAULT_BODY_SECONDS


def add_limit_options(options: Any) -> None:
    """Add them to a group of a parser."""
    options.add_argument(
        "--max-steered-requests",
        type=positive,
        metavar="N",
        help="How many steered sequences are served at a time; a request counts once for each of "
        "its choices (`n`) and prompts. Beyond it requests are refused with 429 and Retry-After, "
        "by each API server. Default: no limit.",
    )
    options.add_argument(
        "--max-steered-per-key",
        type=positive,
        metavar="N",
        help="The same for the requests of one API key. Default: no limit.",
    )
    options.add_argument(
        "--max-sgrs-per-key",
        type=positive,
        metavar="N",
        help="The same for those of them that use `sgrs` or read saliencies. Default: no limit.",
    )
    options.add_argument(
        "--max-request-body",
        type=positive,
        default=DEFAULT_BODY_MIB,
        metavar="MIB",
        help="Largest body of a request to a route that steers, images included. "
        f"Default: {DEFAULT_BODY_MIB}.",
    )
    options.add_argument(
        "--request-body-timeout",
        type=positive,
        default=DEFAULT_BODY_SECONDS,
        metavar="SECONDS",
        help=f"How long a client may take to send it. Default: {DEFAULT_BODY_SECONDS}.",
    )
    options.add_argument(
        OPTION,
        action="store_true",
        help="Share the prefix cache only among requests of the same API key, so that nobody "
        "learns from the speed of an answer what others asked. Servers that share a cache outside "
        f"of them need the same secret in the environment variable {SECRET_VARIABLE}.",
    )


def positive(text: str) -> int:
    """An option's number. Raises ArgumentTypeError unless it is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be an integer of 1 or more")
    return int(text)
