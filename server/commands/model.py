"""A model's configuration without an engine.

vLLM symbols relied on: `vllm.engine.arg_utils.EngineArgs.create_model_config`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace
from typing import Any

from headway.server.engine.config import unsupported_model
from headway.server.engine.geometry import geometry_of
from headway.steering import ModelGeometry

PRESET_OPTION = "--steering-preset"
PROFILE_OPTION = "--steering-profile"


def add_preset_option(parser: Any) -> None:
    """Add the repeatable `--steering-preset name=path` to a parser or a group of one."""
    parser.add_argument(
        PRESET_OPTION,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help='A named method list, from a JSON file {"methods": [...]}; repeatable. '
        "Clients use it as the preset NAME or as the model BASE:NAME.",
    )


def add_profile_option(parser: Any) -> None:
    """Add the repeatable `--steering-profile name=path` to a parser or a group of one."""
    parser.add_argument(
        PROFILE_OPTION,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="A profile of this model, as `headway calibrate` writes it; repeatable.",
    )


def model_only(engine_args: Any) -> Any:
    """What stands in for vLLM's configuration where only the model matters."""
    return SimpleNamespace(
        model_config=engine_args.create_model_config(),
        additional_config=engine_args.additional_config,
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )


def read_model(model: str) -> Any:
    """`model_only` of a directory or a name. Raises ValueError if vLLM does not know the model."""
    from vllm.engine.arg_utils import EngineArgs

    return model_only(EngineArgs(model=model))


def steerable_geometry(vllm_config: Any) -> ModelGeometry:
    """Sizes of a model that can be steered. Raises ValueError that says why it cannot."""
    reason = unsupported_model(vllm_config)
    if reason:
        raise ValueError(f"Headway cannot steer {vllm_config.model_config.model}: {reason}")
    return geometry_of(vllm_config)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what libraries print while they are imported and configured to stderr."""
    with redirect_stdout(sys.stderr):
        yield
