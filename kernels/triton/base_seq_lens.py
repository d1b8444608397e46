"""Sequence lengths for the attention kernel that runs before Headway's: what it may leave out.

A sequence all of whose rows Headway computes is given no keys but its new rows: vLLM's kernels find
a query's keys from these lengths, so that it costs them next to nothing, and what they write there
is overwritten. Done on the device, so that a captured CUDA graph sees the lengths of its replay.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from headway.kernels.triton.specialisation import Specialisation

BLOCK = 128


@triton.jit(do_not_specialize=["num_reqs"])
def base_seq_lens_kernel(
    pretended: tl.tensor,
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    replaced: tl.tensor,
    num_reqs: tl.tensor,
    pretended_stride: tl.tensor,
    replaced_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    layer = tl.program_id(1)
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = request < num_reqs
    length = tl.load(seq_lens + request, mask=inside, other=0)
    rows = tl.load(query_start_loc + request + 1, mask=inside, other=0)
    rows -= tl.load(query_start_loc + request, mask=inside, other=0)
    spared = tl.load(replaced + layer * replaced_stride + request, mask=inside, other=0) != 0
    tl.store(
        pretended + layer * pretended_stride + request,
        tl.where(spared, rows, length),
        mask=inside,
    )


def base_seq_lens_(
    pretended: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    replaced: torch.Tensor,
) -> None:
    """Write, for every layer and request, its length or, where it is replaced, its rows' number.

    pretended: int32 [num_layers, >= num_reqs]. seq_lens: int32 [num_reqs]. query_start_loc: int32
    [num_reqs + 1]. replaced: uint8 [num_layers, >= num_reqs], not 0 where all rows of a request
    are computed elsewhere.
    """
    num_reqs = len(seq_lens)
    base_seq_lens_kernel[triton.cdiv(num_reqs, BLOCK), len(pretended)](
        pretended,
        seq_lens,
        query_start_loc,
        replaced,
        num_reqs,
        pretended.stride(0),
        replaced.stride(0),
        BLOCK=BLOCK,
    )


def specialisations() -> Iterator[Specialisation]:
    """There is one."""
    pointers = {name: "*i32" for name in ("pretended", "seq_lens", "query_start_loc")}
    sizes = dict.fromkeys(("num_reqs", "pretended_stride", "replaced_stride"), "i32")
    yield Specialisation(
        "base_seq_lens",
        "int32",
        base_seq_lens_kernel,
        pointers | {"replaced": "*u8"} | sizes,
        {"BLOCK": BLOCK},
        (*pointers, "replaced", "pretended_stride", "replaced_stride"),
    )
