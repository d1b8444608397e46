"""The examples of the README run as printed, against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headway.server.vector_demo import PROFILE
from tests.server.conftest import ADMIN_KEY

pytestmark = pytest.mark.engine

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PRINTED_URL = "http://localhost:8000"


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(server):
    (example,) = (block for block in blocks("bash") if '"vhr"' in block)
    assert PRINTED_URL in example
    answer = json.loads(run(["bash", "-s"], example.replace(PRINTED_URL, server.url)))
    assert answer["choices"][0]["message"]["content"]
    assert answer["steering"]["methods"][0]["method"] == "vhr"
    assert answer["steering"]["positions_edited"] > 0


def test_curl_of_sgrs(server):
    (example,) = (block for block in blocks("bash") if '"sgrs"' in block)
    assert PRINTED_URL in example
    answer = json.loads(run(["bash", "-s"], example.replace(PRINTED_URL, server.url)))
    (method,) = answer["steering"]["methods"]
    (tokens,) = answer["steering"]["saliency"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    for total, each in (("draws", "draws"), ("refusals", "refusals"), ("fallbacks", "fallback")):
        assert method[total] == sum(token[each] for token in tokens)
    assert method["draws"] >= len(tokens)


def test_curl_of_gact(server):
    (example,) = (block for block in blocks("bash") if '"gact"' in block)
    assert PRINTED_URL in example
    put = [sys.executable, "-m", "headway.server.cli", "profile", "put", "prefer-cpp"]
    os.environ["HEADWAY_STEERING_API_KEY"] = ADMIN_KEY
    try:
        run([*put, str(PROFILE), "--url", server.url], "")
    finally:
        del os.environ["HEADWAY_STEERING_API_KEY"]
    answer = json.loads(run(["bash", "-s"], example.replace(PRINTED_URL, server.url)))
    (method,) = answer["steering"]["methods"]
    assert method["profile"] == "prefer-cpp@1" and method["strength"] == pytest.approx(2.4)
    assert method["positions_edited"] == answer["usage"]["completion_tokens"]
    assert set(method["clusters"]) == {"12", "14", "16", "18"}


def test_openai_sdk(server):
    (example,) = (block for block in blocks("python") if "OpenAI(" in block)
    assert PRINTED_URL in example
    *text, proof = run([sys.executable, "-"], example.replace(PRINTED_URL, server.url)).splitlines()
    assert "".join(text).strip()
    fingerprint, edited = proof.split()
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert int(edited) > 0


def test_the_error_shown_is_the_one_given(server):
    (example,) = (block for block in blocks("json") if '"error"' in block)
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "hi"}],
        "steering": {"methods": [{"method": "vhr", "heads": [[99, 0]]}]},
    }
    assert server.http.post("/v1/chat/completions", json=body).json() == json.loads(example)


def test_the_emphasis_example(server):
    (example,) = (block for block in blocks("json") if '"emphasis"' in block)
    text = "What do cats like? Answer in one word."
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        **json.loads(example),
    }
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["steering"]["methods"][0]["positions_edited"] > 0


@pytest.mark.unit
def test_offline_example_is_valid_code():
    (example,) = (block for block in blocks("python") if "sampling_params" in block)
    compile(example, "README.md", "exec")
    assert "additional_config" in example
