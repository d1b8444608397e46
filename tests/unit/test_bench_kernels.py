"""`headway bench kernels` without a GPU: the model's arithmetic, refusals, the static report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.benchmarks import kernels as bench
from headway.benchmarks.kernels import device, model, static
from headway.kernels import aot
from headway.kernels.head_word import Mass

pytestmark = pytest.mark.unit

SMALL = model.Gpu("small", ("NVIDIA Small",), bandwidth=100e9, peak=1e12, vector_peak=1e11, sms=10)


# The model, against figures computed by hand


def test_segment_attention_reads_k_and_v_once():
    # 2 requests, 32 keys, 2 KV heads of 8 values, 4 query heads, bf16.
    work = model.segment_attention("", 2, 1, 32, num_heads=4, num_kv_heads=2, head_size=8)
    kv = 2 * 32 * 2 * (8 + 8) * 2
    tags_by_position = 2 * 32
    blocks = 2 * 2 * (4 + 32)  # a table entry and a sector of tags by slot
    rows = 2 * 4 * (8 * 2 + 80)
    assert (kv, tags_by_position, blocks, rows) == (4096, 64, 144, 768)
    assert (work.read, work.written) == (4096 + 64 + 144 + 768, 2 * 4 * 8 * 2)
    assert work.launches == 1


def test_weights_are_multiplied_with_the_values_once_for_each_accumulator():
    shape = dict(num_heads=4, num_kv_heads=2, head_size=8)
    # A KV head's group of 2 is padded to 16 rows; 2 * 8 flops a (row, key) pair and product.
    product = 64 * 2 * 16 * 16
    assert model.segment_attention("", 2, 1, 32, **shape).flops == 4 * product
    assert model.segment_attention("", 2, 1, 32, **shape, moves=False).flops == 2 * product
    padded = shape | {"head_size": 5}
    assert model.segment_attention("", 2, 1, 32, **padded).flops == 4 * product


@pytest.mark.parametrize(("moves", "accumulators"), [(True, 3), (False, 1)])
def test_splits_write_their_parts_and_a_second_kernel_reads_them(moves, accumulators):
    shape = dict(num_heads=4, num_kv_heads=2, head_size=8, moves=moves)
    whole = model.segment_attention("", 2, 1, 32, **shape)
    split = model.segment_attention("", 2, 1, 32, **shape, num_splits=2)
    partial = 2 * 4 * 2 * (accumulators * 8 + 8) * 4
    assert (split.read - whole.read, split.written - whole.written) == (partial, partial)
    assert split.launches == 2 and split.flops == whole.flops


def test_a_prompt_attends_causally():
    work = model.segment_attention("", 1, 4, 6, 2, 1, 8, moves=False)
    assert work.flops == (3 + 4 + 5 + 6) * 1 * 2 * 2 * 2 * 8


def test_head_affine_reads_and_writes_z_and_a_sector_of_each_word():
    work = model.head_affine("", 16, 32, 128, shift=False)
    assert (work.read, work.written) == (512 * 256 + 512 * 32 + 64, 512 * 256)
    assert model.head_affine("", 16, 32, 128, shift=True).read - work.read == 512 * 128 * 4


def test_residual_edit_counts_each_table_once():
    work = model.residual_edit("", 3, 10, num_clusters=2, num_edits=1)
    # Rows and their edits, the probe's two rows, the two directions, strength and bias.
    assert work.read == 3 * (40 + 4) + 2 * 40 + 2 * 40 + 3 * 4
    assert work.written == 3 * 20


def test_roofline_is_the_slower_of_memory_and_tensor_cores():
    memory = model.Work("k", "", read=600, written=400, flops=1000)
    tensor_cores = model.Work("k", "", read=0, written=100, flops=10_000)
    assert model.roofline_seconds(memory, SMALL) == pytest.approx(1e-8)
    assert model.roofline_seconds(tensor_cores, SMALL) == pytest.approx(1e-8)
    vector = model.Work("k", "", read=0, written=100, vector_flops=2000)
    assert model.roofline_seconds(vector, SMALL) == pytest.approx(2e-8)
    assert model.bound_by(memory, SMALL) == "launch"


def test_modelled_time_is_the_assumed_share_of_the_roofline_and_the_launches():
    work = model.Work("k", "", read=100_000_000, written=0, launches=2)
    expected = 1e-3 / model.BANDWIDTH_EFFICIENCY + 2 * model.LAUNCH_SECONDS
    assert model.modelled_seconds(work, SMALL) == pytest.approx(expected)
    assert model.bound_by(work, SMALL) == "bandwidth"


def test_a_grid_that_leaves_multiprocessors_idle_gets_its_share_of_the_bandwidth():
    work = model.Work("k", "", read=100_000_000, written=0, programs=2)
    expected = 1e-3 / model.BANDWIDTH_EFFICIENCY * 5 + model.LAUNCH_SECONDS
    assert model.modelled_seconds(work, SMALL) == pytest.approx(expected)
    assert model.roofline_seconds(work, SMALL) == pytest.approx(1e-3)


def test_saliency_row_reads_k_and_v_once():
    work = model.saliency_row("", 5, 64, num_heads=4, num_kv_heads=2, head_size=8)
    kv, table, query, grads = 64 * 2 * 16 * 2, 4 * 4, 4 * 8 * 2, 5 * 4 * 8 * 4
    assert work.read == kv + table + query + grads
    assert work.written == 5 * 64 * 4 + 4 * 4
    assert work.vector_flops == 64 * 4 * 7 * 16
    assert (work.programs, work.launches) == (4, 2)


def test_gpus_are_known_by_the_driver_s_name_alone():
    assert model.gpu_of("NVIDIA H100 80GB HBM3") is model.GPUS[1]
    assert model.gpu_of("NVIDIA A100 80GB PCIe") is None


def test_modelled_times_stand_under_a_heading_that_says_so():
    lines = static.modelled_table(model.report(["head_affine"])).splitlines()
    assert lines[0] == "MODELLED, not measured"
    assert model.ASSUMPTIONS in lines[1]
    assert not any("segment_attention" in line for line in lines)


# Measuring


@pytest.fixture
def attention(monkeypatch):
    """The attention cases of a small model."""
    module = pytest.importorskip("headway.benchmarks.kernels.segment_attention")
    monkeypatch.setattr(module, "HEADS", 4)
    monkeypatch.setattr(module, "KV_HEADS", 1)
    return module


def test_segment_attention_is_launched_as_its_work_is_described(attention):
    """Under the interpreter, on short sequences; what is computed is tested with the kernel."""
    load = attention.Load
    loads = load(2, 1, 40), load(1, 1, 600), load(1, 20, 40)
    names = []
    for case in attention.cases(loads, device="cpu", num_sms=1):
        names.append(case.work.case)
        output = case.launch.args[2].fill_(7.0)
        case.launch()
        untouched = (output == 7.0).all(-1)
        assert output.isfinite().all()
        assert untouched.all() if "none steered" in names[-1] else not untouched.any()
    assert names == [
        "decode, 2 x 40, moves mass",
        "decode, 2 x 40, logits only",
        "decode, 1 x 600, in 2 parts, moves mass",
        "decode, 1 x 600, in 2 parts, logits only",
        "prompt chunk of 20, moves mass",
        "prompt chunk of 20, logits only",
        "decode, 2 x 40, none steered",
    ]


def test_the_condition_of_var_s_words_holds_in_what_is_timed(attention):
    case, *_ = attention.cases([attention.Load(2, 1, 100)], "cpu", num_sms=1)
    case.launch.keywords["readings"] = readings = torch.zeros(2, 4, 8)
    case.launch.args[4].reading_rows.copy_(torch.arange(2))
    case.launch()
    assert (readings[..., Mass.EDITED] == 1).all()


def test_timing_is_the_median_and_the_quartiles():
    assert device.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == device.Timing(3.0, 2.0, 4.0)


def test_bytes_per_second_stand_beside_the_roofline_of_a_known_device():
    work = model.Work("k", "", read=3350, written=0)
    timing = device.Timing(2e-9, 2e-9, 2e-9)
    known = device.figures(work, timing, "NVIDIA H100 80GB HBM3")
    assert known["bytes_per_second"] == pytest.approx(1675e9)
    assert known["roofline_seconds"] == pytest.approx(1e-9)
    assert device.figures(work, timing, "NVIDIA Small")["roofline_seconds"] is None


def test_the_table_of_measurements_names_the_device_and_shows_errors():
    timing = device.Timing(2e-6, 1e-6, 3e-6)
    good = {"kernel": "k", "case": "good"}
    good |= device.figures(model.Work("k", "good", 2_000_000, 0), timing, "NVIDIA Small")
    result = {
        "device": "NVIDIA Small",
        "repetitions": 5,
        "floor_seconds": {"median": 1.5e-6},
        "cases": [good, {"kernel": "k", "case": "bad", "error": "ValueError: no\nmore"}],
    }
    heading, _, _, first, second, *_ = device.table(result).splitlines()
    assert heading.startswith("MEASURED on NVIDIA Small")
    assert " ".join(first.split()) == "k: good 2.00 1.00 .. 3.00 1000 0.0 unknown"
    assert " ".join(second.split()) == "k: bad error: ValueError: no"


@pytest.mark.parametrize("cuda", [False, True])
def test_nothing_is_measured_under_the_interpreter(cuda, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert bench.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_nothing_is_measured_without_cuda(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line and "no measurements" in line and "--static" in line


def test_options_of_the_compiler_are_refused_when_measuring(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--arch", "90"])
    assert "--static" in capsys.readouterr().err


# The static report


def test_static_says_what_to_do_under_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench.main(["--static"]) == 2
    assert "unset it" in capsys.readouterr().err


@pytest.mark.slow
def test_static_reports_compiled_and_modelled_apart(tmp_path: Path):
    pytest.importorskip("triton")
    path = tmp_path / "report.json"
    command = [sys.executable, "-P", "-m", "headway.server.cli", "bench", "kernels", "--static"]
    command += [
        "--kernel",
        "head_affine",
        "--match",
        "bf16-64",
        "--arch",
        "90",
        "--json",
        str(path),
    ]
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "COMPILED, not run" in run.stdout and "MODELLED, not measured" in run.stdout

    report = json.loads(path.read_text())
    assert report["measured"] is False
    assert {row["kernel"] for row in report["compiled"]} == {"head_affine"}
    assert all(row["arch"] == 90 and row["spills"] == 0 for row in report["compiled"])
    assert report["modelled"]["assumptions"] == model.ASSUMPTIONS
    cases = report["modelled"]["cases"]
    assert {case["kernel"] for case in cases} == {"head_affine"}
    assert set(cases[0]["gpus"]) == {"A100-80GB-SXM", "H100-SXM"}


def test_an_unknown_kernel_is_refused_by_name(monkeypatch, capsys):
    with pytest.raises(aot.AotError, match="no cases for nothing"):
        list(bench.cases(["nothing"]))
