"""`headway calibrate`: measures a model once and writes a profile for `--steering-profile`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headway.server.calibration import head_outputs, heads, residual, sinks
from headway.server.calibration.pictures import (
    DESCRIBE,
    Asked,
    ask_about_files,
    ask_about_scenes,
    image_files,
)
from headway.server.calibration.prompts import PROMPTS, read_prompts
from headway.server.commands import calibrate_vectors
from headway.server.commands.calibrate_options import (
    add_files,
    check_outputs,
    count,
    layer_run,
    positive,
)
from headway.server.commands.model import quiet_stdout, read_model, steerable_geometry
from headway.steering.methods.base import check_layers
from headway.steering.methods.vhr import default_layers
from headway.steering.sinks import MAX_DIMS


def main(argv: Sequence[str]) -> int:
    """Run one calibration: 0 if the profile was written, 1 if nothing was found, 2 for an error."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        code: int = args.run(args)
        return code
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
    _add_sinks(what)
    _add_heads(what)
    calibrate_vectors.add_commands(what)
    return parser


def _add_sinks(what: Any) -> None:
    options = what.add_parser(
        "sinks",
        help="find the dimensions in which attention sinks stand out (for the method var)",
        description="Find the sink dimensions of a model: those that on the first token are far "
        "larger than all others in the middle layers. Runs the model in float32 on the CPU. Exit "
        "code 1 if there is none.",
    )
    add_files(options, "sinks.json")
    options.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="short prompts, one a line; default: built-in ones",
    )
    options.add_argument(
        "--tau",
        type=positive,
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
    options.set_defaults(run=calibrate_sinks)


def _add_heads(what: Any) -> None:
    options = what.add_parser(
        "heads",
        help="find the heads that images move most (for the method vhr)",
        description="Find, in each layer, the heads whose output at the end of a prompt changes "
        "more than the median when its image is left out, on average over pictures. Runs the model "
        "in float32 on the CPU. Exit code 1 if there is none.",
    )
    add_files(options, "heads.json")
    pictures = options.add_mutually_exclusive_group()
    pictures.add_argument(
        "--images", type=Path, metavar="DIR", help="pictures; default: drawn scenes of the demo"
    )
    pictures.add_argument(
        "--scenes",
        type=count,
        default=40,
        metavar="N",
        help="how many scenes to draw (default: %(default)s)",
    )
    options.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="asked about every picture; repeatable. Default: for scenes whether one of its "
        f'objects is there, for other pictures "{DESCRIBE}"',
    )
    options.add_argument(
        "--layers",
        type=layer_run,
        nargs="+",
        metavar="LAYER",
        help="choose heads of these layers, such as 1 8-23; default: as vhr does",
    )
    options.add_argument(
        "--alpha",
        type=positive,
        default=2.0,
        metavar="A",
        help="a scale to note in the profile; the choice does not depend on it "
        "(default: %(default)g)",
    )
    options.set_defaults(run=calibrate_heads)


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


def calibrate_heads(args: argparse.Namespace) -> int:
    """Find the heads that images move most, print them, write profile and plot.

    Raises OSError or ValueError for a model, pictures, layers or an output that cannot be used.
    """
    check_outputs(args)
    asked: Iterable[Asked]
    questions = tuple(dict.fromkeys(args.question))
    if args.images:
        files = image_files(args.images)
        questions = questions or (DESCRIBE,)
        asked, num_images = ask_about_files(files, questions), len(files)
        total = num_images * len(questions)
    else:
        asked, num_images = list(ask_about_scenes(args.scenes, questions)), args.scenes
        questions, total = tuple(dict.fromkeys(text for _, text in asked)), len(asked)
    with quiet_stdout():
        geometry = steerable_geometry(read_model(args.model))
        if not geometry.supports_images:
            raise ValueError(f"{args.model}: this model takes no images")
        layers = default_layers(geometry)
        if args.layers:
            layers = check_layers([each for run in args.layers for each in run], geometry, "layers")
        model, processor = head_outputs.load_image_model(args.model)
        vhd = head_outputs.mean_divergence(model, processor, asked, total, geometry.num_heads)
    if not heads.select_heads(vhd, layers):
        print(f"headway calibrate: {heads.explain_none(vhd, layers)}", file=sys.stderr)
        return 1
    profile = heads.make_profile(vhd, layers, args.alpha, num_images, questions, geometry)
    print(heads.table(profile))
    profile.save(args.output)
    print(f"profile: {args.output}")
    if args.plot:
        from headway.server.calibration.head_plot import save_plot

        save_plot(profile, args.plot)
        print(f"plot: {args.plot}")
    return 0
