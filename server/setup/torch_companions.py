"""Make torchvision, torchaudio and torchcodec harmless beside a CPU build of torch.

    python -m headway.server.setup.torch_companions

Their wheels on the Python package index are linked against CUDA torch. Beside the CPU torch their
compiled libraries cannot be loaded: torchvision dies with "operator torchvision::nms does not
exist", the others with "Could not load this library". transformers and vLLM import them for
ordinary text models: nothing loads. The Python parts of the first two, which is all that is used
here, are fine, and vLLM can do without torchcodec if only its import fails with an ImportError. A
small import hook (`torch_companions_hook`) sees to both. A `.pth` file puts it into every process
of the environment, spawned engine workers included.

Healthy packages are left alone, and a hook that is no longer needed is removed.
"""

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headway.server.setup import torch_companions_hook

MODULE_NAME = "_headway_torch_companions"
# What must run without an error; for torchcodec it is what vLLM does.
CHECKS = {
    "torchvision": "import torchvision",
    "torchaudio": "import torchaudio",
    "torchcodec": "try: import torchcodec\nexcept (ImportError, RuntimeError): pass",
}

# Run in a fresh interpreter that has taken our hook out again, to see the packages as they are.
_WITHOUT_HOOK = (
    "import sys; "
    "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'TorchCompanionsFinder']\n"
)


def repair(site_packages: Path | None = None, python: str = sys.executable) -> str:
    """Install or remove the hook in `site_packages` as needed, and say in one line what was done.

    `site_packages` (default: that of the running interpreter) belongs to `python`, the interpreter
    that is checked. Raises RuntimeError if a package does not import even with the hook, which is
    then removed again.
    """
    site_packages = site_packages or Path(sysconfig.get_path("purelib"))
    broken = failures(python, _WITHOUT_HOOK)
    if not broken:
        removed = remove_hook(site_packages)
        return "torch companions: " + ("removed the hook" if removed else "nothing to do")

    install_hook(site_packages)
    still_broken = failures(python)
    if still_broken:
        remove_hook(site_packages)
        raise RuntimeError(f"the import hook does not help: {describe(still_broken)}")
    return f"installed the import hook {MODULE_NAME}, it mends {describe(broken)}"


def failures(python: str, prelude: str = "") -> dict[str, str]:
    """The last line of the error of each package whose import fails; one not installed is fine."""

    def error_of(package: str) -> str | None:
        # -P keeps the current directory, perhaps a checkout with its `kernels`, off sys.path.
        command = [python, "-P", "-c", prelude + CHECKS[package]]
        done = subprocess.run(command, capture_output=True, text=True)
        error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        missing = error == f"ModuleNotFoundError: No module named '{package}'"
        return None if done.returncode == 0 or missing else error

    with ThreadPoolExecutor() as pool:
        errors = zip(CHECKS, pool.map(error_of, CHECKS), strict=True)
        return {package: error for package, error in errors if error is not None}


def describe(broken: dict[str, str]) -> str:
    return "; ".join(f"{package}: {error}" for package, error in broken.items())


def install_hook(site_packages: Path) -> None:
    """Copy the hook, then write the `.pth`, which must never name a module that is not there."""
    shutil.copyfile(torch_companions_hook.__file__, site_packages / f"{MODULE_NAME}.py")
    line = f"import {MODULE_NAME}; {MODULE_NAME}.install()\n"
    (site_packages / f"{MODULE_NAME}.pth").write_text(line)


def remove_hook(site_packages: Path) -> bool:
    """Remove the hook, the `.pth` first; True if there was one."""
    files = [site_packages / f"{MODULE_NAME}{suffix}" for suffix in (".pth", ".py")]
    present = [file for file in files if file.exists()]
    for file in present:
        file.unlink()
    return bool(present)


if __name__ == "__main__":
    try:
        print(repair())
    except RuntimeError as error:
        sys.exit(str(error))
