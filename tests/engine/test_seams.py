"""The contract with vLLM: every symbol we rely on exists in the installed release."""

from __future__ import annotations

import pytest

from headway.server.engine import seams
from headway.server.engine.seam_list import CPU_MODULES, Seam
from headway.server.engine.seams import check_seams

pytestmark = pytest.mark.unit

CHECKS = check_seams()


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_seam(check):
    assert check.ok, f"{check.name}: {check.detail}"


def test_a_moved_symbol_is_named(monkeypatch):
    gone = Seam("vllm.v1.engine.input_processor", "InputProcessor.process_everything")
    changed = Seam("vllm", "SamplingParams", ("extra_args", "nonsense"))
    monkeypatch.setattr(seams, "SEAMS", (gone, changed))
    monkeypatch.setattr(seams, "ATTRIBUTES", (("vllm.v1.request", "Request", ("self.xyz",)),))
    _, first, second, third = check_seams()
    assert not first.ok and "process_everything" in first.detail
    assert not second.ok and second.detail == "lacks nonsense"
    assert not third.ok and "self.xyz" in third.detail


def test_what_needs_a_cpu_is_left_alone_elsewhere(monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: False)
    monkeypatch.setattr(seams, "import_module", lambda name: imported.append(name))
    imported: list[str] = []
    check_seams()
    assert "vllm.v1.worker.gpu.model_runner" in imported
    assert not set(CPU_MODULES) & set(imported)
