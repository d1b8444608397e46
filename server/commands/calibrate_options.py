"""What the commands of `headway calibrate` have in common: options and checks."""

from __future__ import annotations

import argparse
import math
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXTRA = 'pip install "headway[calibrate]"'

UNTOLD = ("help", "output", "report", "plot")
"""Options that change nothing of what a profile holds."""


def add_files(options: argparse.ArgumentParser, output: str, plot: bool = True) -> None:
    """Add the model and the files to write; output: the default name of the profile."""
    options.add_argument("model", metavar="MODEL", help="a directory, or a name on the model hub")
    options.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help="the profile (default: %(default)s)",
    )
    if plot:
        options.add_argument(
            "--plot", type=Path, metavar="FILE", help="a picture too (.png, .pdf, .svg)"
        )


def check_outputs(args: argparse.Namespace) -> None:
    """Raise ValueError now for what would else fail after minutes of work."""
    plot = getattr(args, "plot", None)
    for path in filter(None, (args.output, getattr(args, "report", None), plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder does not exist")
    if plot and find_spec("matplotlib") is None:
        raise ValueError(f"--plot needs matplotlib: {EXTRA}")


def require_sklearn() -> None:
    """Raise ValueError that says how to install scikit-learn where it is missing."""
    if find_spec("sklearn") is None:
        raise ValueError(f"this calibration needs scikit-learn: {EXTRA}")


def command_line(options: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that gives the same profile: `headway calibrate gact MODEL --pairs pairs.jsonl`.

    Of paths the last part alone; defaults and what only says where to write are left out.
    """
    model = Path(args.model)
    words = [*options.prog.split(), model.resolve().name if model.exists() else args.model]
    for action in options._actions:
        value: Any = getattr(args, action.dest, None)
        if action.dest in UNTOLD or not action.option_strings or value == action.default:
            continue
        words.append(action.option_strings[0])
        if action.nargs != 0:
            words += [_word(each) for each in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def positive(text: str) -> float:
    """A positive number."""
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def strength(text: str) -> float:
    """A strength that a profile may note."""
    value = float(text)
    if not abs(value) <= 100.0:
        raise argparse.ArgumentTypeError(f"must be within -100 .. 100, got {text}")
    return value


def folds(text: str) -> int:
    """A number of folds: from 2 on."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return value


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def layer_run(text: str) -> range:
    """One layer, or a run of them: `3`, `8-23`."""
    first, dash, last = text.partition("-")
    found = range(int(first), int(last if dash else first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"holds no layer: {text}")
    return found


def _word(value: Any) -> str:
    if isinstance(value, range):
        return str(value.start) if len(value) == 1 else f"{value.start}-{value.stop - 1}"
    return value.name if isinstance(value, Path) else str(value)
