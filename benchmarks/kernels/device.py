"""Times kernels on a CUDA device.

Each case is captured in a CUDA graph, as the engine runs it, and the graph replayed between two
device events. Before every replay a buffer larger than the L2 cache is zeroed, so that what the
kernel reads comes from memory, as it does in a model whose other layers ran in between; while the
device zeroes, the host enqueues the rest and its speed is not in the figure. An interval holds the
start of a graph beside the kernel; the same interval around a graph that fills one number says
how much that is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headway.benchmarks.kernels.model import Work, gpu_of, roofline_seconds

REPETITIONS = 200
WARM_UP = 20
L2_MULTIPLE = 4
"""Size of the flushing buffer in L2 caches."""
MIN_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """One launch to time. work: its bytes and flops; work.case is its name.

    launch: calls the kernel's launcher; it runs many times on the same tensors, is captured in a
    CUDA graph, and must not wait for the device.
    """

    work: Work
    launch: Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Raises statistics.StatisticsError for fewer than two."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high)


def measure(launch: Callable[[], None], repetitions: int = REPETITIONS) -> Timing:
    """Time a launch on the current CUDA device, in CUDA graph replay with a cold L2 cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and allocates what a capture may not
            launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush_bytes = max(L2_MULTIPLE * l2_bytes, MIN_FLUSH_BYTES)
    flush = torch.empty(flush_bytes, dtype=torch.int8, device="cuda")
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repetitions)
    ]
    for _ in range(WARM_UP):
        flush.zero_()
        graph.replay()
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return Timing.of(start.elapsed_time(end) / 1e3 for start, end in events)


def measure_all(cases: Iterable[Case], repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Time every case; JSON values: the device, the floor of the method, a row a case.

    A case that fails is reported with its error, and the others go on.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    number = torch.zeros(1, device="cuda")

    def fill() -> None:
        number.fill_(1.0)

    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "repetitions": repetitions,
        "floor_seconds": asdict(measure(fill, repetitions)),
        "cases": [_row(case, properties.name, repetitions) for case in cases],
    }


def _row(case: Case, device: str, repetitions: int) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": case.work.kernel, "case": case.work.case}
    try:
        timing = measure(case.launch, repetitions)
    except Exception as error:  # whatever a launcher or the driver raises
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row | figures(case.work, timing, device)


def figures(work: Work, timing: Timing, device: str) -> dict[str, Any]:
    """What follows from a timing: bytes and flops per second, and the device's roofline."""
    gpu = gpu_of(device)
    return {
        "seconds": asdict(timing),
        "bytes": work.bytes,
        "bytes_per_second": work.bytes / timing.median,
        "tensor_core_flops_per_second": work.flops / timing.median,
        "roofline_seconds": roofline_seconds(work, gpu) if gpu else None,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    rows = result["cases"]
    names = [f"{row['kernel']}: {row['case']}" for row in rows]
    width = max(map(len, [*names, "kernel"]))
    lines = [
        f"MEASURED on {result['device']}, CUDA graph replay, cold L2, "
        f"{result['repetitions']} repetitions",
        "",
        f"{'kernel':<{width}} {'us':>9} {'quartiles':>19} {'GB/s':>7} {'TFLOP/s':>8}"
        f" {'roofline us':>12}",
    ]
    for name, row in zip(names, rows, strict=True):
        if "error" in row:
            lines.append(f"{name:<{width}} error: {row['error'].splitlines()[0]}")
            continue
        seconds, roofline = row["seconds"], row["roofline_seconds"]
        least = f"{roofline * 1e6:.2f}" if roofline is not None else "unknown"
        lines.append(
            f"{name:<{width}} {seconds['median'] * 1e6:>9.2f} {_quartiles(seconds):>19}"
            f" {row['bytes_per_second'] / 1e9:>7.0f}"
            f" {row['tensor_core_flops_per_second'] / 1e12:>8.1f} {least:>12}"
        )
    floor = result["floor_seconds"]
    lines += ["", f"a graph that fills one number: {floor['median'] * 1e6:.2f} us"]
    return "\n".join(lines)


def _quartiles(seconds: dict[str, float]) -> str:
    return f"{seconds['low'] * 1e6:.2f} .. {seconds['high'] * 1e6:.2f}"
