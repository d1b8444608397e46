"""`headway compile`: the program that a request would get, without an engine.

The same as POST /v1/steering/compile on a server of the same model and presets, with the profiles
and presets of the registry under $HEADWAY_HOME.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from headway.server.commands.model import (
    add_preset_option,
    add_profile_option,
    quiet_stdout,
    read_model,
    steerable_geometry,
)
from headway.steering import Reason, SteeringError

if TYPE_CHECKING:
    from headway.server.http.state import SteeringState


def main(argv: Sequence[str]) -> int:
    """Print the program as JSON, or the error as a server would answer it; 2 for an error."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with quiet_stdout():
            from headway.server.commands.serve import add_profiles
            from headway.server.engine.config import KEY
            from headway.server.engine.geometry import PROFILES
            from headway.server.http.dry_run import compile_body, describe

            body = read_request(args.request)
            config = read_model(args.model)
            profiles = add_profiles({}, args.steering_profile)
            config.additional_config = {KEY: {PROFILES: profiles}}
            state = dry_state(config, args.steering_preset)
            result = describe(compile_body(state, body))
    except SteeringError as error:
        from headway.server.http.errors import error_body

        print(json.dumps(error_body(error), indent=2), file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"headway compile: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="headway compile",
        description="Show what the steering of a request compiles to, without an engine. "
        "An error is printed to stderr as a server would answer it; the exit code is then 2.",
    )
    parser.add_argument(
        "request",
        metavar="REQUEST.json",
        help='a request body with a "steering" object; "-" reads stdin',
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="the model: only its configuration is read"
    )
    add_preset_option(parser)
    add_profile_option(parser)
    return parser


def read_request(path: str) -> dict[str, Any]:
    """The body of a request, from a file or stdin.

    Raises SteeringError(E_BAD_PARAM) if it is no JSON object, OSError if it cannot be read.
    """
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    try:
        body = json.loads(text)
    except ValueError as error:
        raise SteeringError(Reason.BAD_PARAM, f"not JSON: {error}", "request") from None
    if not isinstance(body, dict):
        raise SteeringError(Reason.BAD_PARAM, "must be a JSON object", "request")
    return body


def dry_state(config: Any, preset_options: Sequence[str]) -> SteeringState:
    """The state of a server without its engine; config: see `model_only`. Raises ValueError."""
    from headway.server.http.admin import AdminKeys
    from headway.server.http.state import SteeringState
    from headway.server.registry.registry import Registry
    from headway.server.registry.store import Store

    registry = Registry(steerable_geometry(config), Store(), AdminKeys(), preset_options)
    presets = registry.presets
    # Under which name the model is served is unknown: all names are, but for aliases of presets.
    names = SimpleNamespace(
        is_base_model=lambda name: name.rpartition(":")[2] not in presets or ":" not in name,
        lora_requests={},
    )
    client: Any = None
    return SteeringState(config, registry.geometry, client, names, presets, registry=registry)
