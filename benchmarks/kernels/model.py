"""Bytes, flops and the time they need at least: what can be said of a kernel without a GPU.

The roofline time is max(bytes / bandwidth, flops / peak). Bytes are those that must cross the
memory bus once, with nothing in L2 beforehand; flops those that the tensor cores are given,
padding included, and, in the saliency row, float32 ones outside of them. The modelled time takes a
share of that bandwidth and peak, less if there are too few programs to fill the device, and adds
the launches; how long a program waits for itself, load by load, is not in it. Nothing here is
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headway.kernels.head_word import Field

BANDWIDTH_EFFICIENCY = 0.8
"""Assumed share of the data sheet's bandwidth that a streaming kernel reaches."""
PEAK_EFFICIENCY = 0.5
"""Assumed share of the data sheet's peak flops that a kernel reaches."""
LAUNCH_SECONDS = 3e-6
"""Assumed cost of one kernel within a replayed CUDA graph: its start, its drain, a gap."""
ASSUMPTIONS = (
    f"{BANDWIDTH_EFFICIENCY:.0%} of the data sheet's bandwidth, {PEAK_EFFICIENCY:.0%} of its "
    f"peak, of both only a part if there are fewer programs than multiprocessors; "
    f"{LAUNCH_SECONDS * 1e6:g} us for every kernel launched; empty L2 cache"
)

SECTOR = 32
"""Least number of bytes that DRAM is asked for."""
WORD_BYTES = 4 * len(Field)
"""A head word, in float32."""
MIN_TILE_ROWS = 16
"""Least number of rows that a tensor-core product of Triton has."""


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes per second; peak, vector_peak: flops per second, dense bf16 on the tensor
    cores and float32 outside; sms: multiprocessors.

    names: what the driver calls it. Source: NVIDIA's data sheets "A100 80GB" and "H100", and its
    white papers on the two architectures for the multiprocessors.
    """

    name: str
    names: tuple[str, ...]
    bandwidth: float
    peak: float
    vector_peak: float
    sms: int


GPUS = (
    Gpu("A100-80GB-SXM", ("NVIDIA A100-SXM4-80GB",), 2039e9, 312e12, 19.5e12, 108),
    Gpu("H100-SXM", ("NVIDIA H100 80GB HBM3",), 3350e9, 989e12, 67e12, 132),
)


@dataclass(frozen=True)
class Work:
    """What one call of a kernel's launcher must move and multiply.

    case: the shapes, in words. read, written: bytes. flops: on the tensor cores, 0 where the
    kernel does not use them; vector_flops: in float32 outside, where they may matter. programs: of
    the grid, where that may not fill a device, else 0. launches: kernels that the call starts.
    """

    kernel: str
    case: str
    read: int
    written: int
    flops: int = 0
    vector_flops: int = 0
    programs: int = 0
    launches: int = 1

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


def gpu_of(device_name: str) -> Gpu | None:
    """The data sheet of a device by the driver's name for it, or None."""
    return next((gpu for gpu in GPUS if device_name in gpu.names), None)


def roofline_seconds(work: Work, gpu: Gpu) -> float:
    """The least time that the data sheet allows."""
    return max(
        work.bytes / gpu.bandwidth, work.flops / gpu.peak, work.vector_flops / gpu.vector_peak
    )


def modelled_seconds(work: Work, gpu: Gpu) -> float:
    """The time under ASSUMPTIONS: the launches, and the longest of what goes on at once."""
    terms = _terms(work, gpu)
    return terms.pop("launch") + max(terms.values())


def bound_by(work: Work, gpu: Gpu) -> str:
    """The largest term of it: "bandwidth", "tensor cores", "float32" or "launch"."""
    terms = _terms(work, gpu)
    return max(terms, key=lambda name: terms[name])


def _terms(work: Work, gpu: Gpu) -> dict[str, float]:
    filled = min(1.0, work.programs / gpu.sms) if work.programs else 1.0
    flops_share = PEAK_EFFICIENCY * filled
    return {
        "bandwidth": work.bytes / (gpu.bandwidth * BANDWIDTH_EFFICIENCY * filled),
        "tensor cores": work.flops / (gpu.peak * flops_share),
        "float32": work.vector_flops / (gpu.vector_peak * flops_share),
        "launch": work.launches * LAUNCH_SECONDS,
    }


EDITS = {True: "moves mass", False: "logits only"}
"""What the words of a case do, by whether they move mass."""


def parts(num_splits: int) -> str:
    """What a case's name says of divided sequences."""
    return f", in {num_splits} parts" if num_splits > 1 else ""


def segment_attention(
    case: str,
    num_reqs: int,
    query_len: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    element_bytes: int = 2,
    num_splits: int = 1,
    moves: bool = True,
) -> Work:
    """Requests of `query_len` rows that end a sequence of `seq_len` keys, all heads edited.

    K and V are read once, with a tag byte a key by position, and for 16 keys a block table entry
    and the tags by cache slot; a head word for every (row, head). Every key is multiplied with the
    queries once and every value with three weights, that of all keys, of those outside of class B
    and of those within; with the first alone where no word moves mass. Splits write as many
    accumulators and 8 sums in float32, which a second kernel reads.

    Not counted: what a prompt's tiles read again, from L2, and the arithmetic on the weights,
    outside of the tensor cores.
    """
    rows = num_reqs * query_len
    read = num_reqs * seq_len * num_kv_heads * 2 * head_size * element_bytes
    read += num_reqs * (seq_len + -(-seq_len // 16) * (4 + SECTOR))
    read += rows * num_heads * (head_size * element_bytes + WORD_BYTES)
    written = rows * num_heads * head_size * element_bytes
    accumulators = 3 if moves else 1
    if num_splits > 1:
        partial = rows * num_heads * num_splits * (accumulators * head_size + 8) * 4
        read += partial
        written += partial
    pairs = num_reqs * (query_len * seq_len - query_len * (query_len - 1) // 2)  # causal
    group = num_heads // num_kv_heads
    padded_group = max(group, MIN_TILE_ROWS) if query_len == 1 else group
    padded_size = 1 << (head_size - 1).bit_length()
    flops = pairs * num_kv_heads * padded_group * (1 + accumulators) * 2 * padded_size
    programs = num_reqs * num_kv_heads * num_splits if query_len == 1 else 0
    launches = 1 if num_splits == 1 else 2
    return Work(
        "segment_attention", case, read, written, flops, programs=programs, launches=launches
    )


def head_affine(
    case: str, num_rows: int, num_heads: int, head_size: int, shift: bool, element_bytes: int = 2
) -> Work:
    """z is read and written, two columns of each head word read, and a float32 shift if any."""
    heads = num_rows * num_heads
    read = heads * (head_size * element_bytes + SECTOR) + num_rows * 4
    read += heads * head_size * 4 if shift else 0
    return Work("head_affine", case, read, heads * head_size * element_bytes)


def residual_edit(
    case: str,
    num_rows: int,
    hidden_size: int,
    num_clusters: int,
    num_edits: int,
    element_bytes: int = 2,
    table_bytes: int = 4,
) -> Work:
    """hidden_states and residual are read, hidden_states written; probes and directions read.

    The rows share `num_edits` edits. A probe is read from memory once, and so is a direction; as
    many are counted as rows can pick.
    """
    picked = min(num_rows, num_edits * num_clusters)
    read = num_rows * (2 * hidden_size * element_bytes + 4)
    read += (num_edits * num_clusters + picked) * hidden_size * table_bytes
    read += num_edits * (num_clusters + 1) * 4
    written = num_rows * hidden_size * element_bytes
    return Work("residual_edit", case, read, written, programs=num_rows)


def sink_tags(case: str, num_rows: int, hidden_size: int, element_bytes: int = 2) -> Work:
    """hidden_states and residual are read, for their mean square; a tag byte a row is changed."""
    read = num_rows * (2 * hidden_size * element_bytes + 8 + 4 + 1)
    return Work("sink_tags", case, read, num_rows)


def saliency_row(
    case: str,
    candidates: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    element_bytes: int = 2,
    tile: int = 16,
) -> Work:
    """One sequence: a query and float32 gradients of the candidates against K and V.

    K is read by both kernels, the second time from L2: it is counted once. Two products with the
    queries and one with each gradient, in float32. The second kernel has a program for `tile` keys.
    """
    read = seq_len * num_kv_heads * 2 * head_size * element_bytes + -(-seq_len // 16) * 4
    read += num_heads * (head_size * element_bytes + candidates * head_size * 4)
    written = candidates * seq_len * 4 + num_heads * 4
    vector_flops = seq_len * num_heads * (2 + candidates) * 2 * head_size
    return Work(
        "saliency_row",
        case,
        read,
        written,
        vector_flops=vector_flops,
        programs=-(-seq_len // tile),
        launches=2,
    )


def head_selection(case: str, num_heads: int, head_size: int, element_bytes: int = 2) -> Work:
    """One layer: the attention outputs of a row, twice, are read, a scale a head is written."""
    read = 2 * num_heads * head_size * element_bytes
    return Work("head_selection", case, read, num_heads * 4, programs=1)


def works() -> list[Work]:
    """The cases reported: an 8B model of today (32 heads of 128, 8 KV heads, hidden 4096), bf16."""
    heads, kv_heads, size, hidden = 32, 8, 128, 4096
    shape = heads, kv_heads, size
    attention = [
        segment_attention(
            f"decode, {num_reqs} x {seq_len}{parts(num_splits)}, {edits}",
            num_reqs,
            1,
            seq_len,
            *shape,
            num_splits=num_splits,
            moves=moves,
        )
        # As the launcher divides them on GPUs of 108 and of 132 multiprocessors.
        for num_reqs, seq_len, num_splits in (
            (16, 512, 1),
            (16, 512, 2),
            (16, 4096, 1),
            (16, 4096, 2),
            (1, 4096, 16),
            (1, 32768, 16),
        )
        for moves, edits in EDITS.items()
    ]
    attention += [
        segment_attention(f"prompt chunk of 2048, {edits}", 1, 2048, 2048, *shape, moves=moves)
        for moves, edits in EDITS.items()
    ]
    return [
        *attention,
        head_affine("16 rows", 16, heads, size, shift=False),
        head_affine("16 rows, shifted", 16, heads, size, shift=True),
        residual_edit("16 rows, 1 edit of 5 clusters", 16, hidden, 5, 1),
        residual_edit("16 rows, 16 edits of 5 clusters", 16, hidden, 5, 16),
        sink_tags("2048 rows", 2048, hidden),
        saliency_row("K = 5, 600 keys", 5, 600, *shape),
        saliency_row("K = 5, 4096 keys", 5, 4096, *shape),
        head_selection("32 heads of 128", heads, size),
    ]


def report(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One JSON object a case, of these kernels or all; seconds by GPU."""
    return [
        {
            "kernel": work.kernel,
            "case": work.case,
            "bytes_read": work.read,
            "bytes_written": work.written,
            "tensor_core_flops": work.flops,
            "float32_flops": work.vector_flops,
            "programs": work.programs or None,
            "launches": work.launches,
            "gpus": {
                gpu.name: {
                    "roofline_seconds": roofline_seconds(work, gpu),
                    "modelled_seconds": modelled_seconds(work, gpu),
                    "bound_by": bound_by(work, gpu),
                }
                for gpu in GPUS
            },
        }
        for work in works()
        if not names or work.kernel in names
    ]
