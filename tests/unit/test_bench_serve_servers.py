"""The servers of `headway bench serve`, with a small program in place of vLLM and Headway."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from headway.benchmarks.serve_servers import Order, check, serving
from headway.server import launch
from headway.server.launch import LaunchError

pytestmark = pytest.mark.unit

PROGRAM = """\
#!{python}
import http.server, os, signal, sys
arguments = sys.argv[1:]
steers = "headway.server.cli" in arguments or "--leaky" in arguments
print(*arguments, "plugins:" + os.environ.get("VLLM_PLUGINS", "unset"))
sys.stdout.flush()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if "steering" in self.path and not steers else 200)
        self.end_headers()
        self.wfile.write(b"headway_active_requests 0.0" if steers else b"vllm:x 1.0")
    def log_message(self, *ignored):
        pass
signal.signal(signal.SIGTERM, lambda *ignored: sys.exit(0))
port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(path))


def test_stock_loads_no_plugin_whatever_the_caller_has(
    program: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "headway")
    logs = {name: tmp_path / f"{name}.log" for name in ("stock", "headway")}
    orders = {name: Order(name, Path("m"), log, ["--own"]) for name, log in logs.items()}
    with serving(orders, ["--shared"], tmp_path) as servers:
        assert list(servers) == ["stock", "headway"]
        for server in servers.values():
            assert 1 < server.rss_mib() <= server.peak_mib < 500
            assert server.cpu_seconds() > 0
    stock, headway = (log.read_text().split() for log in logs.values())
    assert stock[2:4] == ["vllm.entrypoints.openai.api_server", "--model"]
    assert headway[2:4] == ["headway.server.cli", "serve"]
    assert stock[4:7] == headway[4:7] == ["m", "--shared", "--own"]
    assert (stock[-1], headway[-1]) == ("plugins:", "plugins:headway")


def test_a_stock_server_that_has_headway_in_it_is_an_error(program: None, tmp_path: Path) -> None:
    orders = {"stock": Order("stock", Path("m"), tmp_path / "log")}
    with (
        pytest.raises(LaunchError, match="the stock server answers 200"),
        serving(orders, ["--leaky"], tmp_path),
    ):
        pytest.fail("it is no stock server")
    with (
        serving(orders, [], tmp_path) as servers,
        pytest.raises(LaunchError, match="the headway server answers 404"),
    ):
        check("headway", servers["stock"].url)
