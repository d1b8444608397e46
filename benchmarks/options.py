"""What the command lines of benchmarks have in common: options, the model, and where results go."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headway.benchmarks.environment import cuda_device, has_native_bfloat16

RESULTS = Path(__file__).resolve().parent / "results"


def new_parser(
    name: str,
    description: str,
    *,
    seed: str,
    rounds: int | None = None,
    quick: str | None = None,
    dtype: str | None = None,
) -> argparse.ArgumentParser:
    """A parser with --rounds, --dtype, --model, --output and --seed.

    seed: what it is of. rounds: how many where none are asked for; quick: what --quick does; None
    for no such option. dtype: where none is asked for, None for what is fast on this machine.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    if rounds:
        parser.add_argument(
            "--rounds", type=rounds_option, help=f"number of rounds, {rounds} by default"
        )
    fast = "bfloat16" if has_native_bfloat16() or cuda_device() else "float32"
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=dtype or fast,
        help="%(default)s by default" if dtype else "%(default)s on this machine",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="SmolLM2-135M by default")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=0, help=f"of {seed}")
    return parser


def rounds_option(value: str) -> int:
    """The value of `--rounds`. Raises ArgumentTypeError, or ValueError for no number."""
    rounds = int(value)
    if rounds < 2:
        raise argparse.ArgumentTypeError("at least 2, an interval needs them")
    return rounds


def chosen_model(given: Path | None) -> Path:
    """The folder of the model, absolute since engines run in another folder.

    SmolLM2-135M-Instruct where none is given. Raises FileNotFoundError if its package is missing.
    """
    from headway.server.models.smollm2 import ensure_smollm2

    return given.absolute() if given else ensure_smollm2()


def output_file(benchmark: str, given: Path | None) -> Path:
    """Where the JSON of a benchmark goes: as given, or a file of now; its folder is made.

    Raises OSError.
    """
    output = given or RESULTS / f"{benchmark}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def save(result: dict[str, Any], text: str, output: Path) -> None:
    """Write the JSON of a benchmark, and print what it says and where it is. Raises OSError."""
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(text)
    print(f"written to {output}")
