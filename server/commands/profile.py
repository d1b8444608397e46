"""`headway profile`: looks at profiles, imports them, and brings them to a running server."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.server.commands.model import (
    PROFILE_OPTION,
    quiet_stdout,
    read_model,
    steerable_geometry,
)
from headway.server.commands.profile_text import describe, layer_words
from headway.server.commands.remote import RemoteError, Server
from headway.server.engine.geometry import VECTORS_SUFFIX, load_profile
from headway.server.http.admin import KEY_OPTION, KEY_VARIABLE
from headway.server.importers.formats import AUTO, FORMATS, read_vectors
from headway.server.importers.imported import make_profile
from headway.server.registry.names import is_name, parse_reference
from headway.steering.heads import HeadProfile
from headway.steering.profiles import AnyProfile
from headway.steering.vectors import VectorProfile, file_digest

NAME_CHARACTERS = "letters, digits, '.', '_' and '-'"


def main(argv: Sequence[str]) -> int:
    """Run one of the commands: 0, 1 if a server refused or did not answer, 2 for other errors."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        args.run(args)
    except RemoteError as error:
        print(f"headway profile: error: {error}", file=sys.stderr)
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"headway profile: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="headway profile",
        description="Look at profiles, import vectors of other libraries, and bring profiles to a "
        "running server. Exit code 1 if a server refuses or does not answer, 2 for other errors.",
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_show(what)
    _add_import(what)
    _add_put(what)
    _add_list(what)
    _add_delete(what)
    return parser


def _add_show(what: Any) -> None:
    options = what.add_parser(
        "show",
        help="print what a profile holds",
        description="Print the header, the shapes, the norms and the digest of a profile.",
    )
    _add_file(options, "a profile: .safetensors or JSON")
    options.set_defaults(run=show)


def _add_import(what: Any) -> None:
    options = what.add_parser(
        "import",
        help="make a profile from the vectors of another library",
        description="Make a profile of the kind caa from a control vector of repeng (GGUF), or "
        "from the plain tensors of a vector of steering-vectors (.pt). Its strength is what these "
        'libraries call coefficient and multiplier; they add at all positions: "scope": "all".',
    )
    _add_file(options, "the vectors")
    options.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="the model that they were made for: only its configuration is read",
    )
    options.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUT.safetensors",
        help="the profile",
    )
    options.add_argument(
        "--licence", default="", metavar="X", help="SPDX expression to note in the profile"
    )
    options.add_argument(
        "--format",
        choices=(AUTO, *FORMATS),
        default=AUTO,
        help="of the vectors (default: told by their first bytes)",
    )
    options.set_defaults(run=import_vectors)


def _add_put(what: Any) -> None:
    options = what.add_parser(
        "put",
        help="upload a profile to a running server",
        description="Upload a profile to a running server, as a new version of NAME unless the "
        "newest is the same. Vectors that the server has already are not sent again.",
    )
    options.add_argument("name", type=_name, metavar="NAME", help="what requests call the profile")
    _add_file(options, "a profile: vectors (.safetensors), or heads (JSON)")
    _add_server(options, changes=True)
    options.add_argument("--description", default="", metavar="TEXT", help="for people")
    options.set_defaults(run=put)


def _add_list(what: Any) -> None:
    options = what.add_parser("list", help="list the profiles of a running server")
    _add_server(options)
    options.set_defaults(run=list_profiles)


def _add_delete(what: Any) -> None:
    options = what.add_parser("delete", help="delete a profile of a running server")
    options.add_argument(
        "reference", type=_reference, metavar="NAME[@VERSION]", help="the profile, or one version"
    )
    _add_server(options, changes=True)
    options.set_defaults(run=delete)


def _add_file(options: argparse.ArgumentParser, words: str) -> None:
    options.add_argument("file", type=Path, metavar="FILE", help=words)


def _add_server(options: argparse.ArgumentParser, changes: bool = False) -> None:
    options.add_argument("--url", required=True, help="such as http://localhost:8000")
    options.add_argument(
        "--api-key-env",
        default="VLLM_API_KEY",
        metavar="VARIABLE",
        help="environment variable with vLLM's API key, if the server has one "
        "(default: %(default)s)",
    )
    if changes:
        options.add_argument(
            "--key-env",
            default=KEY_VARIABLE,
            metavar="VARIABLE",
            help="environment variable with the key for changes, or several with commas between "
            "them, of which the first is sent (default: %(default)s)",
        )


def show(args: argparse.Namespace) -> None:
    """Print what a profile holds. Raises OSError or ValueError."""
    print(describe(_read(args.file), file_digest(args.file)))


def import_vectors(args: argparse.Namespace) -> None:
    """Make a profile from the file of another library, and print what it holds.

    Raises OSError, ValueError, or ImportError where a package is missing.
    """
    if args.output.suffix != VECTORS_SUFFIX:
        raise ValueError(f"{args.output}: the name of a vector profile ends in {VECTORS_SUFFIX}")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"{args.output}: the folder does not exist")
    command = f"headway profile import {args.file.name}"
    try:
        found = read_vectors(args.file, args.format)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from None
    with quiet_stdout():
        geometry = steerable_geometry(read_model(args.model))
    try:
        profile = make_profile(found, geometry, args.licence, command)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from None
    digest = profile.save(args.output)
    print(describe(profile, digest))
    print(f"\nprofile: {args.output}")


def put(args: argparse.Namespace) -> None:
    """Upload a profile, and print the version that it became.

    Raises RemoteError, or OSError or ValueError for a file that is no profile.
    """
    profile = _read(args.file)
    server = _server(args)
    if isinstance(profile, VectorProfile):
        digest, size = profile.digest, args.file.stat().st_size
        if server.has_artifact(digest):
            print(f"artefact: sha256:{digest}, there already")
        else:
            server.put_artifact(digest, args.file.read_bytes())
            print(f"artefact: sha256:{digest}, {size} bytes")
        body: dict[str, Any] = {"artifact": f"sha256:{digest}"}
    elif isinstance(profile, HeadProfile):
        body = {"profile": profile.model_dump(mode="json")}
    else:
        raise ValueError(
            f"{args.file}: a server takes a profile of the kind {profile.kind} only at its start: "
            f"headway serve {PROFILE_OPTION} {args.name}={args.file}"
        )
    if args.description:
        body["description"] = args.description
    version, is_new = server.put_profile(args.name, body)
    print(f"profile: {args.name}@{version}" + ("" if is_new else ", there already"))


def list_profiles(args: argparse.Namespace) -> None:
    """Print a line for each profile of a server. Raises RemoteError."""
    rows = [_row(each) for each in _server(args).list_profiles()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _row(listed: dict[str, Any]) -> tuple[str, ...]:
    """Reference, kind, origin, layers, remarks."""
    name = listed.get("reference") or listed.get("name")
    origin = f"from {_plain(listed.get('from'))}"
    layers = listed.get("layers")
    where = f"layers {layer_words(layers)}" if layers else ""
    remarks = [_plain(listed[key]) for key in ("description", "error") if listed.get(key)]
    if not listed.get("fits", True) and not listed.get("error"):
        remarks.insert(0, "(of another model)")
    return _plain(name), _plain(listed.get("kind") or "?"), origin, where, " ".join(remarks)


def delete(args: argparse.Namespace) -> None:
    """Delete a profile of a server, and print its versions. Raises RemoteError."""
    versions = _server(args).delete_profile(args.reference)
    print(f"deleted: {', '.join(versions)}")


def _read(path: Path) -> AnyProfile:
    try:
        return load_profile(str(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _server(args: argparse.Namespace) -> Server:
    """The server that the options name. Raises ValueError without the key for changes."""
    admin_key = ""
    if "key_env" in args:
        admin_key = _key(args.key_env).partition(",")[0].strip()
        if not admin_key:
            raise ValueError(
                f"the environment variable {args.key_env} is not set: "
                f"it must hold a key of the server's {KEY_OPTION}"
            )
    return Server(args.url, _key(args.api_key_env), admin_key)


def _key(variable: str) -> str:
    """The key in an environment variable. Raises ValueError, without it, if it is no key."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {variable} holds what no HTTP header can")
    return key


def _name(text: str) -> str:
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"a name is made of {NAME_CHARACTERS}, got {text!r}")
    return text


def _reference(text: str) -> str:
    if parse_reference(text) is None:
        message = f"must be a name, made of {NAME_CHARACTERS}, or name@version, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return text


def _plain(value: object) -> str:
    """A value on one line, strings without quotes."""
    text = json.dumps(value)
    return text[1:-1] if isinstance(value, str) else text
