"""The Triton kernels compiled for GPUs: no spills, tensor cores in use, shared memory that fits.

Compiling happens once a session, in subprocesses: under pytest the kernels are interpreted, and
what Triton's interpreter was given cannot be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headway.kernels import aot
from headway.kernels.occupancy import LIMITS, Occupancy, occupancy
from headway.kernels.sass import ResourceUsage, SassError, machine_code, resource_usage
from headway.kernels.triton.specialisation import Specialisation

HEAD_SIZES = {64, 80, 96, 128, 256}
BY_HEAD_SIZE = ("segment_attention", "head_affine")
OTHERS = ("residual_edit", "saliency_row", "head_selection", "sink_tags")
WITHOUT_DTYPE = ("base_seq_lens",)
VARIANTS = (
    "decode",
    "decode, logits only",
    "decode, divided",
    "join",
    "prompt",
    "prompt, logits only",
)
"""Of segment attention, for every dtype and head size."""
LOGITS_ONLY = ("decode, logits only, divided", "join, logits only")
"""Further variants, of head size 128."""

triton = pytest.mark.skipif(
    not aot.importable("triton"), reason="Triton, which compiles the kernels, is not installed"
)


# Compiled kernels


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every bf16 variant by head size on sm_80 and sm_90, and the other kernels on sm_90."""
    folder = tmp_path_factory.mktemp("aot")
    bf16 = "--match", "bf16"
    rows = _compile(folder / "head_size", BY_HEAD_SIZE, *bf16, "--arch", "80", "--arch", "90")
    rows += _compile(folder / "others", OTHERS, *bf16, "--arch", "90")
    return rows + _compile(folder / "without_dtype", WITHOUT_DTYPE, "--arch", "90")


def _compile(path: Path, kernels: Sequence[str], *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "headway.kernels.aot", "--json", str(path), *options]
    command += [option for name in kernels for option in ("--kernel", name)]
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['kernel']} {row['name']} sm_{row['arch']}" for row in rows]


@pytest.mark.slow
@triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", BY_HEAD_SIZE)
def test_every_head_size_is_compiled(compiled, kernel, arch):
    rows = [row for row in compiled if row["kernel"] == kernel and row["arch"] == arch]
    assert {row["head_size"] for row in rows} >= HEAD_SIZES


@pytest.mark.slow
@triton
@pytest.mark.parametrize("arch", [80, 90])
def test_every_variant_of_segment_attention_is_compiled(compiled, arch):
    rows = [row for row in compiled if row["kernel"] == "segment_attention" and row["arch"] == arch]
    wanted = {f"{what} bf16 head_size={size}" for what in VARIANTS for size in HEAD_SIZES}
    wanted |= {f"{what} bf16 head_size=128" for what in LOGITS_ONLY}
    assert {row["name"] for row in rows} >= wanted
    needed = {row["name"] for row in rows if row["needs_tensor_cores"]}
    assert needed >= {name for name in wanted if not name.startswith("join")}


@pytest.mark.slow
@triton
@pytest.mark.parametrize("kernel", BY_HEAD_SIZE + OTHERS + WITHOUT_DTYPE)
def test_kernels_compile_without_spills_and_fit(compiled, kernel):
    rows = [row for row in compiled if row["kernel"] == kernel]
    assert rows
    assert [row["error"] for row in rows if row["error"]] == []
    assert _names([row for row in rows if row["spills"]]) == []
    assert _names([row for row in rows if row["shared"] > row["shared_limit"]]) == []
    assert _names([row for row in rows if not row["warps_per_sm"]]) == []


@pytest.mark.slow
@triton
def test_tensor_cores_are_used_where_they_must_be(compiled):
    needed = [row for row in compiled if row["needs_tensor_cores"]]
    assert {row["kernel"] for row in needed} >= {"segment_attention"}
    assert _names([row for row in needed if not row["tensor_cores"]]) == []


# What cannot be compiled


@pytest.mark.unit
def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.unit
def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(aot.AotError, match="Triton is needed"):
        aot.require_compiler()


@pytest.mark.unit
@triton
@pytest.mark.parametrize(
    ("signature", "constants", "aligned", "named"),
    [
        ({"x": "*fp32"}, {"SIZE": 1}, (), "n"),
        ({"x": "*fp32", "n": "i32"}, {"n": 1, "SIZE": 1}, (), "n"),
        ({"x": "*fp32", "n": "i32"}, {"SIZE": 1, "OTHER": 2}, (), "OTHER"),
        ({"x": "*fp32", "n": "i32"}, {"SIZE": 1}, ("y",), "y"),
    ],
)
def test_arguments_must_be_described_exactly_once(signature, constants, aligned, named):
    function = SimpleNamespace(arg_names=["x", "n", "SIZE"])
    variant = Specialisation("k", "v", function, signature, constants, aligned)
    row = aot.compile_one(variant, 90)
    assert row.error == f"ValueError: arguments not described exactly once: {named}"


# Occupancy

KIB = 1024


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "expected"),
    [
        # 255 registers round to 256: 8192 a warp, two warps in each of the four files.
        (80, 4, 255, 0, Occupancy(8, 8 / 64, "registers")),
        # 33 round to 40: 1280 a warp, 12 in each file, 48 in all.
        (90, 8, 33, 0, Occupancy(48, 0.75, "registers")),
        (90, 8, 32, 0, Occupancy(64, 1.0, "warps")),
        # 164 KiB hold three blocks of 50, with the reserved 1 KiB each, not four of 40.
        (80, 4, 32, 50 * KIB, Occupancy(12, 12 / 64, "shared")),
        (80, 4, 32, 41 * KIB, Occupancy(12, 12 / 64, "shared")),
        (80, 4, 32, 40 * KIB, Occupancy(16, 16 / 64, "shared")),
        (90, 4, 32, 227 * KIB, Occupancy(4, 4 / 64, "shared")),
        (90, 4, 32, 227 * KIB + 1, Occupancy(0, 0.0, "shared")),
        (90, 1, 16, 0, Occupancy(32, 0.5, "blocks")),
    ],
)
def test_occupancy_is_bound_by_the_scarcest(arch, num_warps, registers, shared, expected):
    assert occupancy(arch, num_warps, registers, shared) == expected


@pytest.mark.unit
def test_tensor_memory_bounds_occupancy_where_there_is_any():
    assert occupancy(100, 4, 32, 0, tensor_memory=256) == Occupancy(8, 8 / 64, "tensor memory")
    assert LIMITS[90].tensor_memory == 0


# What the tools print

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:{registers} STACK:{stack} SHARED:{shared} LOCAL:0 CONSTANT[0]:400 TEXTURE:0
"""

CODE = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*3d30*/                   HMMA.16816.F32.BF16 R112, R16, R120.reuse, RZ ;
        /*3d40*/               @P0 HMMA.16816.F32.BF16 R100, R176, R120.reuse, RZ ;
        /*3ce0*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR28].tnspB, RZ, !UPT ;
        /*4030*/              @!UP1 UTCHMMA gdesc[UR4], gdesc[UR14], tmem[UR9], idesc[UR45], UPT ;
        /*4040*/                   UTCATOMSWS.AND URZ, UR5 ;
        /*4050*/                   FADD R2, R3, R4 ;
.L_x_1:
        /*4060*/                   STL.64 [R1+0x60], R6 ;
        /*4070*/                   STL [R1+0x58], R6 ;
        /*4080*/              @!P3 STL.U8 [R1+0x50], R6 ;
        /*4090*/                   LDL.LU.128 R6, [R1+0x60] ;
        /*40a0*/                   LDL.LU R6, [R1+0x58] ;
"""


@pytest.mark.unit
def test_registers_and_stack_are_read():
    text = USAGE.format(registers=255, stack=208, shared=64)
    assert resource_usage(text, 80) == ResourceUsage(255, 208, 64, 0)


@pytest.mark.unit
@pytest.mark.parametrize(("printed", "own"), [(0, 0), (1024, 0), (1088, 64)])
def test_reserved_shared_memory_is_not_the_kernel_s(printed, own):
    text = USAGE.format(registers=8, stack=0, shared=printed)
    assert resource_usage(text, 90).static_shared == own


@pytest.mark.unit
def test_one_kernel_is_expected():
    text = USAGE.format(registers=8, stack=0, shared=0)
    for unexpected in ("", text + text):
        with pytest.raises(SassError, match="one kernel"):
            resource_usage(unexpected, 80)


@pytest.mark.unit
def test_tensor_core_instructions_are_counted():
    assert machine_code(CODE).tensor_cores == {
        "HGMMA.64x128x16.F32.BF16": 1,
        "HMMA.16816.F32.BF16": 2,
        "UTCHMMA": 1,
    }


@pytest.mark.unit
def test_spills_are_counted_in_bytes():
    code = machine_code(CODE)
    assert (code.spill_stores, code.spill_loads) == (8 + 4 + 1, 16 + 4)


@pytest.mark.unit
def test_a_disassembly_without_instructions_is_an_error():
    with pytest.raises(SassError, match="no instruction"):
        machine_code(".text.kernel:\n")


DESCRIBED: dict[str, Any] = {
    "head_size": 0,
    "dtype": "",
    "num_warps": 4,
    "num_stages": 2,
    "needs_tensor_cores": False,
}


@pytest.mark.unit
def test_spills_are_the_stack_where_nothing_else_tells_of_them():
    row = aot.Compiled("k", "v", 90, **DESCRIBED, stack=16, spill_stores=4, spill_loads=4)
    assert row.spills == 16
    assert row.as_json()["spills"] == 16


@pytest.mark.unit
def test_the_table_shows_errors_and_instructions():
    good = aot.Compiled("k", "good", 90, **DESCRIBED, registers=12, tensor_cores={"HMMA": 3})
    bad = aot.Compiled("k", "bad", 80, **DESCRIBED, error="ValueError: at 1:2\nno\n")
    _, first, second, *_ = aot.table([good, bad]).splitlines()
    assert first.split()[:4] == ["k", "good", "sm_90", "12"] and first.endswith("3 HMMA")
    assert second.endswith("sm_80 ValueError: no")
