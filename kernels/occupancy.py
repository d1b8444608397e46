"""How many warps of a kernel fit on a streaming multiprocessor, and what bounds their number.

Limits per architecture: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", the table of
technical specifications per compute capability (8.0, 9.0, 10.0). The granularities in which
registers and shared memory are handed out: NVIDIA's CUDA Occupancy Calculator.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP_SIZE = 32
REGISTER_UNIT = 256
"""Registers are handed to a warp in multiples of this."""
SUB_PARTITIONS = 4
"""A multiprocessor's registers are in four files; a warp lives in one of them."""
SHARED_UNIT = 128
"""Bytes; shared memory is handed to a block in multiples of this."""
RESERVED_SHARED = 1024
"""Bytes of shared memory that every block has beside its own, since compute capability 8.0."""


@dataclass(frozen=True)
class Limits:
    """What one streaming multiprocessor has; shared memory in bytes.

    tensor_memory: columns of tensor memory, 0 where there is none. Source: NVIDIA, PTX ISA,
    "Tensor Memory".
    """

    warps: int
    blocks: int
    registers: int
    registers_per_thread: int
    shared: int
    shared_per_block: int
    tensor_memory: int = 0


LIMITS = {
    80: Limits(64, 32, 65536, 255, 164 * 1024, 163 * 1024),
    90: Limits(64, 32, 65536, 255, 228 * 1024, 227 * 1024),
    100: Limits(64, 32, 65536, 255, 228 * 1024, 227 * 1024, tensor_memory=512),
}
"""Compute capability times ten -> its limits."""


@dataclass(frozen=True)
class Occupancy:
    """warps: most warps resident on a multiprocessor; share: of those it can hold.

    bound_by: what allows no more, "warps", "blocks", "registers", "shared" or "tensor memory".
    """

    warps: int
    share: float
    bound_by: str


def occupancy(
    arch: int, num_warps: int, registers: int, shared: int, tensor_memory: int = 0
) -> Occupancy:
    """The occupancy of blocks of `num_warps` warps on an architecture of LIMITS.

    registers: per thread. shared: bytes per block, without what is reserved. tensor_memory:
    columns per block. A block that does not fit has no warps.
    """
    limits = LIMITS[arch]
    blocks = {"warps": limits.warps // num_warps, "blocks": limits.blocks}
    if registers:
        per_warp = _round_up(registers * WARP_SIZE, REGISTER_UNIT)
        resident = limits.registers // SUB_PARTITIONS // per_warp * SUB_PARTITIONS
        blocks["registers"] = resident // num_warps
    if shared > limits.shared_per_block:
        blocks["shared"] = 0
    else:
        blocks["shared"] = limits.shared // _round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    if tensor_memory:
        blocks["tensor memory"] = limits.tensor_memory // tensor_memory
    bound_by = min(blocks, key=lambda name: blocks[name])
    warps = blocks[bound_by] * num_warps
    return Occupancy(warps, warps / limits.warps, bound_by)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
