"""The options of `headway calibrate gact`, `caa` and `act`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headway.server.calibration.activations import SITES, Reading
from headway.server.calibration.pairs import MIN_PAIRS
from headway.server.commands.calibrate_options import add_files, count, folds, layer_run, strength
from headway.steering.program import ResidualSite
from headway.steering.vectors import MAX_CLUSTERS

SHARE = 0.1
"""Default strength of G-ACT in units of a row's length, |h| = rms(h) * sqrt(hidden_size)."""

PAIRS_HELP = (
    'pairs, one a line: {"prompt", "target", "other"} (a text or a list of texts), or {"prompt", '
    f'"continuations": {{label: text}}}} with --target; at least {MIN_PAIRS}'
)


def gact_options(what: Any) -> argparse.ArgumentParser:
    """Add the parser of `headway calibrate gact`."""
    options: argparse.ArgumentParser = what.add_parser(
        "gact",
        help="cluster steering directions and fit the probes that pick one (for the method gact)",
        description="Cluster the differences between wanted and unwanted continuations into "
        "directions and fit, layer by layer, a probe that tells from the prompt which of them it "
        "wants; keep the layers whose probes do best on prompts held out. Runs the model in "
        "float32 on the CPU. Exit code 1 if no probe tells anything.",
    )
    _add_pairs(options, "gact.safetensors")
    _add_site(options)
    options.add_argument(
        "--clusters",
        type=int,
        choices=range(1, MAX_CLUSTERS + 1),
        default=3,
        metavar="K",
        help=f"directions a layer, 1 .. {MAX_CLUSTERS} (default: %(default)s)",
    )
    options.add_argument(
        "--layers",
        type=layer_run,
        nargs="+",
        metavar="LAYER",
        help="steer these layers, such as 1 8-11; default: the best --num-layers",
    )
    options.add_argument(
        "--num-layers",
        type=count,
        default=4,
        metavar="N",
        help="how many layers to choose (default: %(default)s)",
    )
    options.add_argument(
        "--strength",
        type=strength,
        metavar="S",
        help="a strength to note in the profile, in units of a row's rms; default: "
        f"{SHARE:g} * sqrt(hidden size), a tenth of a row's length",
    )
    options.add_argument(
        "--feedback",
        action="store_true",
        help="allow a server to refine the probes with feedback, as new versions",
    )
    options.add_argument("--report", type=Path, metavar="FILE", help="all figures too, as JSON")
    options.add_argument(
        "--plot", type=Path, metavar="FILE", help="a picture too (.png, .pdf, .svg)"
    )
    return options


def caa_options(what: Any) -> argparse.ArgumentParser:
    """Add the parser of `headway calibrate caa`."""
    options: argparse.ArgumentParser = what.add_parser(
        "caa",
        help="take the mean difference of pairs as direction (for the method caa)",
        description="Take the mean difference between wanted and unwanted continuations as the "
        "direction of a layer. Runs the model in float32 on the CPU.",
    )
    _add_pairs(options, "caa.safetensors")
    _add_site(options)
    options.add_argument(
        "--layers",
        type=layer_run,
        nargs="+",
        metavar="LAYER",
        help="steer these layers, such as 14 or 10-19; default: the one of the middle third that "
        "best separates pairs held out",
    )
    options.add_argument(
        "--normalize", action="store_true", help="scale every direction to length 1"
    )
    options.add_argument(
        "--strength",
        type=strength,
        default=1.0,
        metavar="S",
        help="a strength to note in the profile (default: %(default)g)",
    )
    return options


def act_options(what: Any) -> argparse.ArgumentParser:
    """Add the parser of `headway calibrate act`."""
    options: argparse.ArgumentParser = what.add_parser(
        "act",
        help="fit shifts of the heads that tell wanted from unwanted best (for the method act)",
        description="Fit a probe to the output of every head that tells wanted from unwanted "
        "continuations, and shift the best heads along theirs. Runs the model in float32 on the "
        "CPU. Exit code 1 if no probe tells anything.",
    )
    _add_pairs(options, "act.safetensors")
    options.add_argument(
        "--heads",
        type=count,
        default=24,
        metavar="N",
        help="how many heads to choose (default: %(default)s)",
    )
    options.add_argument(
        "--strength",
        type=strength,
        default=15.0,
        metavar="S",
        help="a strength to note in the profile, in standard deviations; ITI's by default "
        "(default: %(default)g)",
    )
    return options


def _add_pairs(options: argparse.ArgumentParser, output: str) -> None:
    add_files(options, output, plot=False)
    options.add_argument("--pairs", type=Path, required=True, metavar="FILE", help=PAIRS_HELP)
    options.add_argument(
        "--read",
        type=Reading,
        choices=list(Reading),
        default=Reading.MEAN,
        metavar="WHERE",
        help="where a continuation is read: at all of its tokens, on average (mean, the default), "
        "or at its last token (last)",
    )
    options.add_argument("--target", metavar="LABEL", help="the label of the wanted continuations")
    options.add_argument(
        "--folds",
        type=folds,
        default=5,
        metavar="N",
        help="hold out each N-th part of the prompts in turn (default: %(default)s)",
    )
    options.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    options.add_argument(
        "--batch-size",
        type=count,
        default=8,
        metavar="N",
        help="texts run at a time (default: %(default)s)",
    )
    options.add_argument(
        "--licence", default="", metavar="SPDX", help="licence of what the profile is made from"
    )


def _add_site(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--site",
        type=ResidualSite,
        choices=SITES,
        default=ResidualSite.BLOCK_OUTPUT,
        metavar="SITE",
        help="where the stream is read and edited: block_output (the default) or after_attention",
    )
