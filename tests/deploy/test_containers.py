"""The container files, by a small linter, and the probe that they install, against real servers."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from dockerfile_parse import DockerfileParser

from tests.deploy.chart import CHART, DEPLOY, ROOT

pytestmark = pytest.mark.unit

CONTAINERS = DEPLOY / "containers"
FILES = ("Containerfile.cpu", "Containerfile.gpu")
PATHS = ("/health", "/v1/models", "/v1/steering/capabilities")


def instructions(file: str) -> list[tuple[str, str]]:
    """Instruction and value of each line, in order."""
    with (CONTAINERS / file).open("rb") as opened:
        parsed = DockerfileParser(fileobj=opened, env_replace=False).structure
    return [(each["instruction"], each["value"]) for each in parsed]


def last_stage(file: str) -> list[tuple[str, str]]:
    found = instructions(file)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def value(file: str, instruction: str) -> str:
    return [text for name, text in last_stage(file) if name == instruction][-1]


@pytest.mark.parametrize("file", FILES)
def test_the_base_is_pinned(file: str) -> None:
    arguments = dict(
        text.split("=", 1) for name, text in instructions(file) if name == "ARG" and "IMAGE" in text
    )
    for name, text in instructions(file):
        if name == "FROM":
            variable = re.fullmatch(r"\$\{([A-Z_]+)\}( AS [a-z]+)?", text)
            assert variable, text
            tag = arguments[variable[1]].rpartition(":")[2]
            assert re.match(r"(v0\.32\.\d+|3\.11-slim-[a-z]+)$", tag), tag
            assert f'base.name="{arguments[variable[1]]}"' in value(file, "LABEL")


@pytest.mark.parametrize("file", FILES)
def test_the_user_is_that_of_the_chart(file: str) -> None:
    numbers = re.findall(r"runAsUser: (\d+)|runAsGroup: (\d+)", (CHART / "values.yaml").read_text())
    user, group = (max(each) for each in numbers)
    assert value(file, "USER") == f"{user}:{group}" != "0:0"


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_fetched_or_baked_in_that_should_not_be(file: str) -> None:
    for name, text in instructions(file):
        assert name != "ADD"
        assert "://" not in text, text
        if name in ("ENV", "ARG"):
            assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)", text), text
    labels = value(file, "LABEL")
    for label in ("title", "description", "version", "revision", "licenses", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels


@pytest.mark.parametrize("file", FILES)
def test_all_that_is_written_is_on_volumes(file: str) -> None:
    environment = dict(re.findall(r"([A-Z_]+)=(\S+)", value(file, "ENV")))
    volumes = (*json.loads(value(file, "VOLUME")), "/tmp")
    for name in (
        "HOME",
        "TMPDIR",
        "HEADWAY_HOME",
        "HF_HOME",
        "VLLM_CACHE_ROOT",
        "VLLM_CONFIG_ROOT",
    ):
        assert environment[name].startswith(volumes), name
    mounted = re.findall(r"mountPath: (\S+)", (CHART / "templates" / "model.yaml").read_text())
    assert set(volumes) <= set(mounted)


@pytest.mark.parametrize("file", FILES)
def test_it_serves_and_says_whether_it_is_well(file: str) -> None:
    assert json.loads(value(file, "ENTRYPOINT")) == ["headway", "serve"]
    assert value(file, "HEALTHCHECK").endswith('CMD ["headway-ready"]')
    copied = [text for name, text in last_stage(file) if name == "COPY"]
    assert any(text.endswith("ready.py /usr/local/bin/headway-ready") for text in copied)


def test_what_is_copied_is_in_the_build_context() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    needed = {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "deploy/containers/ready.py"}
    pyproject = (ROOT / "pyproject.toml").read_text()
    needed |= set(re.findall(r'^"headway\.[a-z]+" = "([a-z]+)"$', pyproject, re.MULTILINE))
    assert {"server", "kernels", "steering"} < needed <= allowed
    assert all((ROOT / path).exists() for path in allowed)


@contextmanager
def server(answers: dict[str, int], key: str | None = None) -> Iterator[int]:
    """A server of status codes by path; with a key, 401 under /v1 without it. Yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == f"Bearer {key}"
            guarded = key is not None and self.path.startswith("/v1")
            self.send_response(401 if guarded and not known else answers.get(self.path, 404))
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield running.server_port
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def probe(port: int, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(CONTAINERS / "ready.py"), str(port)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment or {}, timeout=30
    )


def test_the_probe_passes_a_server_that_can_steer() -> None:
    with server(dict.fromkeys(PATHS, 200)) as port:
        assert probe(port).returncode == 0


@pytest.mark.parametrize("missing", PATHS)
def test_the_probe_names_what_does_not_answer(missing: str) -> None:
    with server({path: 200 for path in PATHS if path != missing}) as port:
        result = probe(port)
    assert result.returncode == 1
    assert missing in result.stderr


def test_the_probe_sends_the_api_key() -> None:
    with server(dict.fromkeys(PATHS, 200), key="k") as port:
        assert probe(port, {"VLLM_API_KEY": "k"}).returncode == 0
        assert probe(port, {"VLLM_API_KEY": "other"}).returncode == 1
        assert probe(port).returncode == 1


def test_the_probe_fails_without_a_server() -> None:
    with server({}) as port:
        pass
    assert probe(port).returncode == 1
