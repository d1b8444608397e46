"""`headway serve`: vLLM's server with Headway switched on.

vLLM symbols relied on: `vllm.entrypoints.cli.serve.ServeSubcommand` (`subparser_init`, `validate`,
`cmd`), `FlexibleArgumentParser`, `cli_env_setup`, `configure_logging_from_args`. The `vllm`
command itself cannot be used: in the CPU distribution it looks for metadata of another package.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from headway.server.commands.limit_options import add_limit_options
from headway.server.commands.model import (
    PRESET_OPTION,
    PROFILE_OPTION,
    add_preset_option,
    add_profile_option,
    model_only,
    steerable_geometry,
)
from headway.server.commands.plugins import VARIABLE, PluginError, allow_headway, own_plugins
from headway.server.engine.config import (
    DEFAULT_SGRS_REQUESTS,
    DEFAULT_VECTOR_MEMORY,
    KEY,
    SGRS_REQUESTS,
    VECTOR_MEMORY,
)
from headway.server.engine.geometry import PROFILES
from headway.server.http.admin import (
    FILE_OPTION,
    FILE_VARIABLE,
    KEY_OPTION,
    KEY_VARIABLE,
    AdminKeys,
    check_keys,
    keys_in,
)
from headway.server.http.isolation import check_isolation
from headway.server.http.presets import named_file
from headway.server.registry.registry import Registry
from headway.server.registry.store import Store


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; both end it with exit code 0, also during the start.

    The death of the engine ends it with exit code 1.
    """
    shut_out = allow_headway(os.environ)  # before vLLM is imported, which reads it
    if shut_out:
        names = ", ".join(shut_out)
        print(f"headway serve: not loaded, name them in {VARIABLE}: {names}", file=sys.stderr)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    command = ServeSubcommand()
    # "serve" first: vLLM's parser rewrites a deprecated `--model` only behind it.
    args = build_parser(command).parse_args(["serve", *argv])
    configure_logging_from_args(args)
    try:
        switch_on(args)
        move_keys(args, os.environ)
        check_isolation(args, os.environ)
        command.validate(args)
        check(args)
    except (ValueError, PluginError) as error:
        print(f"headway serve: error: {error}", file=sys.stderr)
        return 2
    try:
        command.cmd(args)
    except KeyboardInterrupt:  # how vLLM ends a start that is interrupted
        return 0
    if engine_died(args):
        print("headway serve: error: the engine died; its log is above", file=sys.stderr)
        return 1
    return 0


def engine_died(args: Namespace) -> bool:
    """Whether a server that ended was left by its engine: vLLM then ends as if it had been asked.

    args: the server's, in which Headway's endpoints leave their `Lifetime`. With several API
    servers, which vLLM ends with an exception, they are in other processes.
    """
    lifetime = getattr(args, "headway_lifetime", None)
    return lifetime is not None and bool(lifetime.engine_died)


def build_parser(command: Any) -> Any:
    """vLLM's parser of `serve`, with Headway's options in a group of their own."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="headway")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve.usage = (
        f"headway serve MODEL [any option of vLLM] [{PRESET_OPTION} NAME=PATH ...] "
        f"[{PROFILE_OPTION} NAME=PATH ...]"
    )
    serve.description = "vLLM's OpenAI-compatible server, whose requests may steer the model."
    serve.epilog = (
        "headway serve --help=Headway shows the options that vLLM does not have,\n"
        "--help=all shows all, --help=GROUP a group, --help=WORD those with a word in their name."
    )
    options = serve.add_argument_group("Headway", "Steering, on top of vLLM's options.")
    add_preset_option(options)
    add_profile_option(options)
    options.add_argument(
        "--max-sgrs-requests",
        type=int,
        metavar="N",
        help="How many requests may use `sgrs`, or read saliencies, at a time; others wait. "
        "0 switches it off and saves the second copy of the weights that it needs on CPU. "
        f"Default: {DEFAULT_SGRS_REQUESTS}.",
    )
    options.add_argument(
        "--max-vector-memory",
        type=int,
        metavar="MIB",
        help="How much memory of each worker the vectors of the registry's profiles may take; "
        "those used least recently are dropped, and loaded again on use. "
        f"Default: {DEFAULT_VECTOR_MEMORY}.",
    )
    options.add_argument(
        "--disable-steering-log",
        action="store_true",
        help="Write no line to the log for each request that asked for steering. Such lines name "
        "the request, its fingerprint and how it ended, never its text; they are JSON with "
        "--logging-config.formatter json.",
    )
    options.add_argument(
        KEY_OPTION,
        action="append",
        default=[],
        metavar="KEY",
        help="A key with which clients may change profiles and presets, sent as Authorization: "
        "Bearer KEY, or as X-Steering-Api-Key: KEY where --api-key needs the former; repeatable. "
        f"Without it they cannot be changed. Instead of it, the environment variable "
        f"{KEY_VARIABLE} holds keys, separated by commas, which lists of processes do not show.",
    )
    options.add_argument(
        FILE_OPTION,
        metavar="PATH",
        help="A file of more such keys, one a line, which is read again when it changes. Or "
        f"{FILE_VARIABLE} holds its path.",
    )
    add_limit_options(options)
    return parser


def switch_on(args: Namespace) -> None:
    """Enable Headway in parsed arguments (changed in place), keeping its own settings.

    Profiles become settings, so that every process of the engine finds them. Raises ValueError for
    a front end that Headway's routes are not part of, and for a badly named profile.
    """
    from vllm import envs

    if args.grpc or envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError("Headway steers over vLLM's Python HTTP server only")
    if args.model_tag is not None:
        args.model = args.model_tag
    settings = dict(args.additional_config or {})
    settings.setdefault(KEY, {})
    if not isinstance(settings[KEY], dict):
        raise ValueError(f"--additional-config: the value of {KEY} must be an object")
    if args.steering_profile:
        profiles = settings[KEY].get(PROFILES) or {}
        if not isinstance(profiles, dict):
            raise ValueError(f"--additional-config: {KEY}.{PROFILES} must map names to paths")
        profiles = add_profiles(profiles, args.steering_profile)
        settings[KEY] = {**settings[KEY], PROFILES: profiles}
    for name in (SGRS_REQUESTS, VECTOR_MEMORY):  # options of the same names
        limit = getattr(args, name)
        if limit is not None:
            if limit < 0:
                raise ValueError(f"--{name.replace('_', '-')} {limit}: must not be negative")
            settings[KEY] = {**settings[KEY], name: limit}
    args.additional_config = settings


def move_keys(args: Namespace, environment: MutableMapping[str, str]) -> None:
    """Move admin keys from parsed arguments, which vLLM logs and hands on, to the environment.

    Keys in the arguments replace those of the environment; so does the path of a file of keys.
    Raises ValueError for a bad key, and for a file that cannot be read or has none.
    """
    keys = check_keys(args.steering_api_key)
    args.steering_api_key = []
    if keys:
        environment[KEY_VARIABLE] = ",".join(keys)
    if args.steering_api_key_file:
        environment[FILE_VARIABLE] = str(Path(args.steering_api_key_file).absolute())
    path = environment.get(FILE_VARIABLE)
    try:
        if path and not keys_in(Path(path)):
            raise ValueError(f"{FILE_OPTION} {path}: has no key")
    except OSError as error:
        raise ValueError(f"{FILE_OPTION} {path}: {error.strerror}") from None


def add_profiles(profiles: Mapping[str, str], options: Sequence[str]) -> dict[str, str]:
    """Profiles by name -> path, those of `name=path` options added with an absolute path.

    Raises ValueError that names the option, also for a name that is given twice.
    """
    named = dict(profiles)
    for option in options:
        name, path = named_file(option, PROFILE_OPTION)
        if name in named:
            raise ValueError(f"{PROFILE_OPTION}: the name {name} is given twice")
        named[name] = str(Path(path).absolute())
    return named


def check(args: Namespace) -> None:
    """Find now what would else end the start when the engine is up.

    Raises PluginError, or ValueError for a bad preset or profile.
    """
    own_plugins()
    if args.steering_preset or args.steering_profile:
        from vllm.engine.arg_utils import AsyncEngineArgs

        config = model_only(AsyncEngineArgs.from_cli_args(args))
        # With the registry, whose profiles the presets may name.
        Registry(steerable_geometry(config), Store(), AdminKeys(), args.steering_preset)
