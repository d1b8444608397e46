"""What a compiled CUDA kernel holds, read with the tools that come with Triton.

Registers, stack and static shared memory are those of `cuobjdump --dump-resource-usage`; spills
and tensor-core instructions are counted in the machine code that `nvdisasm` prints.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from headway.kernels.occupancy import RESERVED_SHARED

WORD_BYTES = 4
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
"""Address, predicate, opcode with modifiers, operands."""
USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
TENSOR_CORE = re.compile(r"[A-Z0-9]*MMA")
"""Root of an opcode of the tensor cores: HMMA, IMMA, HGMMA, QGMMA, UTCHMMA, UTCQMMA ..."""


class SassError(RuntimeError):
    """A tool is missing, failed, or printed what is not understood."""


@dataclass(frozen=True)
class ResourceUsage:
    """registers: per thread; stack, local: bytes per thread; static_shared: bytes per block."""

    registers: int
    stack: int
    static_shared: int
    local: int


@dataclass(frozen=True)
class MachineCode:
    """What was found in one kernel's code.

    spill_stores, spill_loads: bytes that the instructions to and from local memory move for one
    thread, each counted once however often it runs, as in ptxas' own report.
    tensor_cores: opcode with its modifiers -> number of such instructions.
    """

    spill_stores: int
    spill_loads: int
    tensor_cores: dict[str, int]


def inspect_cubin(cubin: bytes, arch: int) -> tuple[ResourceUsage, MachineCode]:
    """Read a cubin of one kernel. Raises SassError."""
    with tempfile.TemporaryDirectory(prefix="headway-aot-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = resource_usage(_tool("cuobjdump", "--dump-resource-usage", str(path)), arch)
        return usage, machine_code(_tool("nvdisasm", "-c", "-ndf", str(path)))


def resource_usage(text: str, arch: int) -> ResourceUsage:
    """Parse `cuobjdump --dump-resource-usage`. Raises SassError unless it tells of one kernel.

    From compute capability 9.0 on its SHARED holds what every block has reserved, as soon as the
    kernel uses shared memory at all; that is no use of the kernel's and taken off.
    """
    found = USAGE.findall(text)
    if len(found) != 1:
        raise SassError(f"expected the resource usage of one kernel, found {len(found)}: {text!r}")
    registers, stack, shared, local = map(int, found[0])
    if arch >= 90:
        shared = max(0, shared - RESERVED_SHARED)
    return ResourceUsage(registers, stack, shared, local)


def machine_code(text: str) -> MachineCode:
    """Parse machine code as nvdisasm prints it. Raises SassError where there is none."""
    opcodes = list(_opcodes(text))
    if not opcodes:
        raise SassError("no instruction in the disassembly")
    tensor_cores = Counter(
        opcode for opcode in opcodes if TENSOR_CORE.fullmatch(opcode.partition(".")[0])
    )
    return MachineCode(
        _bytes_moved(opcodes, "STL"),
        _bytes_moved(opcodes, "LDL"),
        dict(sorted(tensor_cores.items())),
    )


def _opcodes(text: str) -> Iterator[str]:
    return (match[1] for match in INSTRUCTION.finditer(text))


def _bytes_moved(opcodes: Iterable[str], root: str) -> int:
    total = 0
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name == root:
            bits = [int(modifier) for modifier in modifiers if modifier.isdigit()]
            narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
            small = [narrow[modifier] for modifier in modifiers if modifier in narrow]
            total += bits[0] // 8 if bits else small[0] if small else WORD_BYTES
    return total


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    try:
        command = [getattr(knobs.nvidia, name).path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise SassError(f"{name} failed: {error.stderr.strip()}") from error
    except (OSError, RuntimeError) as error:
        raise SassError(f"{name} cannot be run: {error}") from error
