"""`headway calibrate`: measures a model once and writes a profile for `--steering-profile`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from headway.server.calibration import residual, sinks
from headway.server.calibration.prompts import PROMPTS, read_prompts
from headway.server.commands.model import quiet_stdout, read_model, steerable_geometry
from headway.steering.sinks import MAX_DIMS


def main(argv: Sequence[str]) -> int:
    """Run one calibration: 0 if the profile was written, 1 if nothing was found, 2 for an error."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return calibrate_sinks(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"headway calibrate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="headway calibrate",
        description="Measure a model once and write what was found as a profile, which "
        "`headway serve --steering-profile NAME=FILE` loads.",
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    options = what.add_parser(
        "sinks",
        help="find the dimensions in which attention sinks stand out (for the method var)",
        description="Find the sink dimensions of a model: those that on the first token are far "
        "larger than all others in the middle layers. Runs the model in float32 on the CPU. Exit "
        "code 1 if there is none.",
    )
    options.add_argument("model", metavar="MODEL", help="a directory, or a name on the model hub")
    options.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="short prompts, one a line; default: built-in ones",
    )
    options.add_argument(
        "--output",
        type=Path,
        default=Path("sinks.json"),
        metavar="FILE",
        help="the profile (default: %(default)s)",
    )
    options.add_argument(
        "--plot", type=Path, metavar="FILE", help="a picture too (.png, .pdf, .svg)"
    )
    options.add_argument(
        "--tau",
        type=_positive,
        default=20.0,
        metavar="T",
        help="tokens with phi >= T are sinks; for the table (default: %(default)g)",
    )
    options.add_argument(
        "--max-dims",
        type=int,
        choices=range(1, MAX_DIMS + 1),
        default=8,
        metavar="N",
        help=f"keep the N strongest dimensions, 1 .. {MAX_DIMS} (default: %(default)s)",
    )
    return parser


def calibrate_sinks(args: argparse.Namespace) -> int:
    """Find the sink dimensions of a model, print them, write profile and plot.

    Raises OSError or ValueError for a model, a prompt file or an output that cannot be used.
    """
    check_outputs(args)
    prompts = read_prompts(args.prompts) if args.prompts else PROMPTS
    with quiet_stdout():
        geometry = steerable_geometry(read_model(args.model))
        model, tokenizer = residual.load_model(args.model)
        tokens = residual.tokenize(tokenizer, prompts)
        magnitudes = residual.relative_magnitudes(model, tokens)
    levels = sinks.first_token_levels(magnitudes)
    dims = sinks.select_dims(levels, args.max_dims)
    if not dims:
        print(f"headway calibrate: {sinks.explain_none(levels)}", file=sys.stderr)
        return 1
    profile = sinks.make_profile(magnitudes, dims, args.tau, geometry)
    print(sinks.table(profile))
    profile.save(args.output)
    print(f"profile: {args.output}")
    if args.plot:
        from headway.server.calibration.sink_plot import save_plot

        save_plot(profile, levels, args.plot)
        print(f"plot: {args.plot}")
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """Raise ValueError now for what would else fail after minutes of work."""
    for path in filter(None, (args.output, args.plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder does not exist")
    if args.plot and find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "headway[calibrate]"')


def _positive(text: str) -> float:
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value
