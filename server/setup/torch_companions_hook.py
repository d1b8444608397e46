"""Let torchvision, torchaudio and users of torchcodec load where the compiled libraries do not.

This file is copied into site-packages as `_headway_torch_companions.py` and loaded by a `.pth` line
at every interpreter start, so it costs next to nothing: the standard library only, and no torch
before one of the three is imported. `headway.server.setup.torch_companions` decides whether it is
needed and explains why.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class TorchCompanionsFinder:
    """A meta-path finder that steps in at one submodule of each package, and otherwise steps aside.

    A submodule, because libraries look for `torchvision` merely to see whether it is installed.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision._meta_registrations":  # imported right after the library was tried
            declare_operators()
        elif name in MENDED:
            return on_missing_library(PathFinder.find_spec(name, path, target), *MENDED[name])
        return None


def declare_operators() -> None:
    """Declare the operators that torchvision is about to register fake kernels for, if missing."""
    import torch

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", NMS_SCHEMA)


def on_missing_library(
    spec: ModuleSpec | None, loads_library: str, instead: Callable[[OSError], bool]
) -> ModuleSpec | None:
    """`spec`, with its function `loads_library` calling `instead` where it fails to load."""
    if spec is None or spec.loader is None:
        return spec
    execute = spec.loader.exec_module  # runs the module's own code

    def execute_and_patch(module: ModuleType) -> None:
        execute(module)
        original = getattr(module, loads_library)

        def load(*arguments: str) -> object:
            try:
                return original(*arguments)
            except OSError as error:
                return instead(error)

        setattr(module, loads_library, load)

    spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
    return spec


def say_not_shipped(error: OSError) -> bool:
    """What torchaudio's function returns when the wheel has no library, a case it supports."""
    return False


def say_not_importable(error: OSError) -> bool:
    """vLLM does without torchcodec on an ImportError, but not on an OSError."""
    raise ImportError("torchcodec's library does not load") from error


# The submodule that holds the function which loads the library, its name, and what to do instead.
MENDED = {
    "torchaudio._extension.utils": ("_load_lib", say_not_shipped),
    "torchcodec._internally_replaced_utils": ("load_image_library", say_not_importable),
}


def install() -> None:
    """Put the finder first; a second call changes nothing."""
    # Compared by name: this file may be loaded from site-packages and from the headway package.
    if not any(type(finder).__name__ == TorchCompanionsFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchCompanionsFinder())
