"""Starting and ending the server process, with a small program in place of `headway serve`."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from headway.server import launch
from headway.server.launch import LaunchError, serve

pytestmark = pytest.mark.unit

PROGRAM = """\
#!{python}
import http.server, os, signal, sys
arguments = sys.argv[1:]
print(*arguments, *(os.environ.get(f"SET_BY_{{name}}", "") for name in ("CALLER", "NOBODY")))
sys.stdout.flush()
if "--break" in arguments:
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/steering/capabilities" else 404)
        self.end_headers()
    def log_message(self, *ignored):
        pass
code = 5 if "--bad-end" in arguments else 0
signal.signal(signal.SIGTERM, lambda *ignored: sys.exit(code))
port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(path))


def test_a_server_runs_while_it_is_needed(
    program: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("SET_BY_CALLER", "mine")
    settings = {"SET_BY_CALLER": "other", "SET_BY_NOBODY": "given"}
    with serve(Path("model"), ["--dtype", "float32"], tmp_path, log, settings) as url:
        assert httpx.get(f"{url}/v1/steering/capabilities").status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
    asked = log.read_text().split()
    assert asked[:5] == ["-P", "-m", "headway.server.cli", "serve", "model"]
    assert asked[5:7] == ["--dtype", "float32"]
    assert asked[-2:] == ["mine", "given"]


def test_a_server_that_ends_at_once_is_an_error(program: None, tmp_path: Path) -> None:
    with (
        pytest.raises(LaunchError, match="ended at its start, exit code 3"),
        serve(Path("model"), ["--break"], tmp_path, tmp_path / "log"),
    ):
        pytest.fail("it never answered")


def test_a_server_that_ends_badly_is_an_error(program: None, tmp_path: Path) -> None:
    with (
        pytest.raises(LaunchError, match="ended with exit code 5"),
        serve(Path("model"), ["--bad-end"], tmp_path, tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_answers_is_given_up(
    program: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "START_SECONDS", 0)
    with (
        pytest.raises(LaunchError, match="did not start within 0 s"),
        serve(Path("model"), [], tmp_path, tmp_path / "log"),
    ):
        pytest.fail("it cannot have answered")
