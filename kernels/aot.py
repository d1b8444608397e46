"""Compiles the Triton kernels ahead of time, without a GPU, and reads the result.

    python -m headway.kernels.aot --kernel head_affine --arch 90

Every `Specialisation` of every module of `headway.kernels.triton` is compiled for the chosen
architectures to the code a GPU of that kind would run: registers, spills, shared memory, the
occupancy they allow and the tensor-core instructions are properties of that code. How long it
takes to run is not. Triton keeps compiled code in its cache folder (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headway.kernels.occupancy import LIMITS, WARP_SIZE, occupancy
from headway.kernels.sass import inspect_cubin
from headway.kernels.triton.specialisation import Specialisation


class AotError(RuntimeError):
    """Nothing can be compiled here, or not what was asked for."""


@dataclass(frozen=True)
class Compiled:
    """What the code of one specialisation needs on one architecture.

    arch: compute capability times ten. registers, stack: per thread, stack in bytes. spill_stores,
    spill_loads: bytes per thread. shared: bytes per block, static and dynamic; shared_limit: what
    a block may have. tensor_memory: columns per block. warps_per_sm: how many warps can be
    resident on a multiprocessor; occupancy: as a share; bound_by: what allows no more.
    tensor_cores: instruction -> how often it is in the code; needs_tensor_cores: whether it must.
    seconds: of the compilation, next to none if Triton had it in its cache.
    error: why there is no code, else empty; then the figures are 0.
    """

    kernel: str
    name: str
    arch: int
    head_size: int
    dtype: str
    num_warps: int
    num_stages: int
    needs_tensor_cores: bool
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    shared_limit: int = 0
    tensor_memory: int = 0
    warps_per_sm: int = 0
    occupancy: float = 0.0
    bound_by: str = ""
    tensor_cores: Mapping[str, int] | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def spills(self) -> int:
        """Bytes stored and loaded because registers ran out, or the stack's if that is more."""
        return max(self.stack, self.spill_stores + self.spill_loads)

    def as_json(self) -> dict[str, Any]:
        """All fields and `spills`, as JSON values."""
        return {**asdict(self), "spills": self.spills}


def require_compiler() -> None:
    """Raises AotError where Triton is missing or would interpret instead of compile."""
    if interpreted():
        raise AotError(
            "TRITON_INTERPRET is set: kernels of Triton's interpreter cannot be compiled; unset it"
        )
    if not importable("triton"):
        raise AotError("Triton is needed to compile its kernels, and is not installed")


def importable(name: str) -> bool:
    """Whether a module can be imported; Triton is not there on every machine."""
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter, in the words that Triton accepts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def kernels() -> list[str]:
    """Names of the modules of `headway.kernels.triton`, whether or not they hold kernels."""
    package = import_module("headway.kernels.triton")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def specialisations(
    names: Sequence[str] = (), match: Sequence[str] = ()
) -> Iterator[Specialisation]:
    """The variants of these kernels, of all if none is named, whose name holds each of `match`.

    Raises AotError for a name that is no kernel's, and as `require_compiler`.
    """
    require_compiler()
    found = {}
    for name in kernels():
        module = import_module(f"headway.kernels.triton.{name}")
        if hasattr(module, "specialisations"):
            found[name] = module.specialisations
    if unknown := sorted(set(names) - set(found)):
        raise AotError(f"no kernel {', '.join(unknown)}; there are {', '.join(found) or 'none'}")
    for name in names or found:
        for specialisation in found[name]():
            if all(text in specialisation.name for text in match):
                yield specialisation


def compile_all(
    variants: Iterable[Specialisation], archs: Sequence[int] = tuple(LIMITS)
) -> Iterator[Compiled]:
    """Compile each variant for each architecture, one after the other.

    What does not compile is yielded with its error: one bad variant must not hide the others.
    """
    for variant in variants:
        for arch in archs:
            yield compile_one(variant, arch)


def compile_with_progress(
    variants: Sequence[Specialisation], archs: Sequence[int]
) -> list[Compiled]:
    """All of them, with a bar on stderr: without Triton's cache each takes seconds."""
    total = len(variants) * len(archs)
    return list(tqdm(compile_all(variants, archs), total=total, unit="variant", leave=False))


def compile_one(variant: Specialisation, arch: int) -> Compiled:
    """Compile one variant for one architecture of `occupancy.LIMITS`."""
    described: dict[str, Any] = {
        "kernel": variant.kernel,
        "name": variant.name,
        "arch": arch,
        "head_size": variant.head_size,
        "dtype": variant.dtype,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "needs_tensor_cores": variant.tensor_cores,
        "shared_limit": LIMITS[arch].shared_per_block,
    }
    started = time.perf_counter()
    try:
        code = _triton_compile(variant, arch)
        seconds = time.perf_counter() - started
        usage, found = inspect_cubin(code.asm["cubin"], arch)
    except Exception as error:  # Triton's passes raise whatever they like
        return Compiled(**described, error=f"{type(error).__name__}: {error}")
    shared = code.metadata.shared + usage.static_shared
    tensor_memory = getattr(code.metadata, "tmem_size", 0)
    # Warp specialisation adds warps to those asked for; the metadata has them all.
    described["num_warps"] = code.metadata.num_warps
    resident = occupancy(arch, code.metadata.num_warps, usage.registers, shared, tensor_memory)
    return Compiled(
        **described,
        registers=usage.registers,
        stack=usage.stack + usage.local,
        spill_stores=found.spill_stores,
        spill_loads=found.spill_loads,
        shared=shared,
        tensor_memory=tensor_memory,
        warps_per_sm=resident.warps,
        occupancy=resident.share,
        bound_by=resident.bound_by,
        tensor_cores=found.tensor_cores,
        seconds=seconds,
    )


def _triton_compile(variant: Specialisation, arch: int) -> Any:
    """Triton's CompiledKernel, as a launch with such arguments would make it."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.function.arg_names
    known = {**dict.fromkeys(variant.constants, "constexpr"), **variant.signature}
    wrong = set(names) ^ set(known)
    wrong |= set(variant.constants) & set(variant.signature)
    wrong |= set(variant.aligned) - set(variant.signature)
    if wrong:
        raise ValueError(f"arguments not described exactly once: {', '.join(sorted(wrong))}")
    signature = {name: known[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.function, signature, dict(variant.constants), aligned)
    # Fused multiply-adds are what a launch gets where nothing is asked for, with a warning.
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": True,
    }
    return triton_compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options=options)


def table(rows: Sequence[Compiled]) -> str:
    """The results for people."""
    width = max([len(f"{row.kernel} {row.name}") for row in rows] + [len("kernel")])
    lines = [
        f"{'kernel':<{width}} {'arch':>6} {'regs':>5} {'spills':>6} {'shared':>7} {'warps':>5}"
        f" {'per SM':>6} {'bound by':<13} {'seconds':>7}  tensor cores"
    ]
    for row in rows:
        start = f"{row.kernel + ' ' + row.name:<{width}} {f'sm_{row.arch}':>6}"
        if row.error:
            # Triton's errors begin with the source and end with the reason.
            reason = row.error.partition(":")[0], row.error.strip().splitlines()[-1].strip()
            lines.append(f"{start} {': '.join(dict.fromkeys(reason))}")
            continue
        found = ", ".join(f"{count} {name}" for name, count in (row.tensor_cores or {}).items())
        lines.append(
            f"{start} {row.registers:>5} {row.spills:>6} {row.shared:>7} {row.num_warps:>5}"
            f" {row.warps_per_sm:>6} {row.bound_by:<13} {row.seconds:>7.2f}  {found or '-'}"
        )
    lines += ["", "spills: bytes per thread; shared: bytes per block; per SM: warps that fit"]
    return "\n".join(lines)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what is compiled: kernel, arch, match."""
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="K", help="only this; may be repeated"
    )
    parser.add_argument(
        "--arch",
        action="append",
        type=int,
        choices=list(LIMITS),
        help="all by default; may be repeated",
    )
    parser.add_argument(
        "--match",
        action="append",
        default=[],
        metavar="TEXT",
        help="only variants whose name holds this; may be repeated",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a table, write the JSON; 1 if a variant did not compile, 2 if none could."""
    parser = argparse.ArgumentParser(
        prog="python -m headway.kernels.aot",
        description="Compile the Triton kernels for GPUs that need not be here.",
    )
    add_selection(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    args = parser.parse_args(argv)
    try:
        variants = list(specialisations(args.kernel, args.match))
        rows = compile_with_progress(variants, args.arch or tuple(LIMITS))
    except AotError as error:
        print(f"headway.kernels.aot: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps([row.as_json() for row in rows], indent=2) + "\n")
    print(table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
