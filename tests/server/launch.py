"""Starts a Headway server as the command line does: `python launch.py MODEL [flags]`."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> None:
    """Serve until terminated."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser())
    parser.add_argument("--steering-preset", action="append", default=[])
    model, *flags = arguments
    enabled = ["--additional-config", '{"headway": {}}']
    args = parser.parse_args(["--model", model, *enabled, *flags])
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))


if __name__ == "__main__":
    os.environ["VLLM_PLUGINS"] = "headway"
    main(sys.argv[1:])
