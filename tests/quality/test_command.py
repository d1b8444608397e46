"""`headway bench quality` from options to report, against an endpoint that answers by rule.

The endpoint knows the scenes. Unsteered it says "yes" to everything but random absent objects; VHR
takes 2 off every margin, VAR takes it off those of absent objects alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headway.benchmarks import quality
from headway.benchmarks.quality import command, intervals
from headway.benchmarks.quality.methods import Arm, Control
from headway.benchmarks.quality.plan import Plan, make_plan
from headway.benchmarks.quality.scenes import OBJECTS, PARTNER, caption
from headway.benchmarks.quality.suites import scene_suite
from headway.server.commands import bench
from tests.quality.endpoint import Endpoint, running

pytestmark = pytest.mark.unit

SCENES = 8
PICTURES = {picture.url: picture for picture in scene_suite("counter", SCENES).pictures.values()}


def asked_methods(body: dict[str, Any]) -> list[str]:
    return [method["method"] for method in body.get("steering", {}).get("methods", ())]


def margin(body: dict[str, Any]) -> float:
    image, text = body["messages"][0]["content"]
    objects = PICTURES[image["image_url"]["url"]].objects
    name = text["text"].removeprefix("Is there a ").removesuffix(" in the image?")
    present, partner = name in objects, PARTNER[name] in objects
    value = 4.0 if present else 1.5 if partner else -4.0
    value += 0.1 * (OBJECTS.index(name) % 5)
    for method in body.get("steering", {}).get("methods", ()):
        if method["method"] == "vhr":
            value -= 2.0
        if method["method"] == "var" and not present:
            value -= 4.0
    return value


def describe(body: dict[str, Any]) -> str:
    image, _ = body["messages"][0]["content"]
    objects = sorted(PICTURES[image["image_url"]["url"]].objects)
    wrong = [] if asked_methods(body) else [PARTNER[objects[0]]]
    return caption(objects + wrong)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with running(Endpoint()) as found:
        found.margin, found.caption = margin, describe
        yield found


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "draws", partial(intervals.draws, resamples=199))


@pytest.fixture(autouse=True)
def forget(request: pytest.FixtureRequest) -> None:
    if "endpoint" in request.fixturenames:
        endpoint = request.getfixturevalue("endpoint")
        endpoint.bodies, endpoint.refuses, endpoint.echoes = [], None, True
        endpoint.methods = ("vhr", "var", "locore")


def run(endpoint: Endpoint, folder: Path, *options: str, code: int = 0) -> dict[str, Any]:
    where = ("--url", endpoint.url, "--model", "tiny", "--output", str(folder))
    assert quality.main([*where, "--scenes", str(SCENES), *options]) == code
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def figures(report: dict[str, Any], arm: str) -> dict[str, Any]:
    (found,) = [each for each in report["suites"][0]["arms"] if each["name"] == arm]
    return {name: figure["value"] for name, figure in found["figures"].items()}


def contrast(report: dict[str, Any], arm: str, baseline: str = "unsteered") -> dict[str, Any]:
    (found,) = [
        each
        for each in report["suites"][0]["contrasts"]
        if (each["arm"], each["baseline"]) == (arm, baseline)
    ]
    return found


def test_the_whole_way(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = ("--quick", "--arms", "unsteered,vhr,var,locore,random,sgrs,lowest")
    report = run(endpoint, tmp_path, *options)
    unsteered, vhr, var = (figures(report, name) for name in ("unsteered", "vhr", "var"))
    assert (unsteered["partner/false_yes"], unsteered["partner/recall"]) == (1.0, 1.0)
    # A shift removes every false "yes" here, and a threshold would have done so too.
    assert (vhr["partner/false_yes"], vhr["partner/recall"]) == (0.0, 1.0)
    assert vhr["partner/auc"] == pytest.approx(unsteered["partner/auc"])
    assert vhr["partner/threshold"] == var["partner/threshold"] == 0.0
    assert contrast(report, "vhr")["differences"]["partner/false_yes"]["value"] == -1.0
    partners = report["suites"][0]["questions"]["partner"] // 2
    assert contrast(report, "vhr")["mcnemar_false_yes"]["partner"] == {
        "gained": 0,
        "lost": partners,
        "p": pytest.approx(2 / 2**partners),
    }
    assert contrast(report, "vhr", "random 0")["differences"]["partner/false_yes"]["value"] == 0
    assert (unsteered["captions/chair_s"], vhr["captions/chair_s"]) == (1.0, 0.0)
    assert unsteered["perplexity"] == pytest.approx(2.718281828**0.5)
    assert report["left_out"].keys() == {"sgrs", "lowest"}
    assert report["suites"][0]["questions"].keys() == {"partner", "adversarial"}

    written = (tmp_path / "report.md").read_text()
    assert written in capsys.readouterr().out
    for piece in ("| vhr - random 0", "locore edited no position in", "no method sgrs", "48.00"):
        assert piece in written
    # Shown once: every absent partner is adversarial here, and nothing else is.
    for piece in ("| partner = adversarial | unsteered", f"+0 -{partners}, p"):
        assert piece in written
    plot = tmp_path / "counter-recall.png"
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_every_answer_is_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    run(endpoint, tmp_path, "--arms", "unsteered,vhr", "--perplexity", "none")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert Counter(row["arm"] for row in rows).keys() == {"unsteered", "vhr"}
    assert len(rows) == len(endpoint.bodies)
    question = next(row for row in rows if row["arm"] == "vhr" and row["kind"] == "question")
    assert question["steering"]["methods"][0]["heads"] == [[1, 0], [1, 3], [2, 8]]
    assert {"truth", "sets", "yes", "margin", "answer"} <= question.keys()
    assert all("steering" not in row for row in rows if row["arm"] == "unsteered")


def test_controls_take_as_many_heads_for_the_same_request(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    vhd = tmp_path / "vhd.json"
    vhd.write_text(json.dumps({"vhd": [[9.0 - head for head in range(9)]] * 4}))
    options = ("--arms", "random,lowest,vhr,unsteered", "--random-seeds", "2", "--vhd", str(vhd))
    run(endpoint, tmp_path, *options, "--perplexity", "none")
    steered = [body["steering"]["methods"] for body in endpoint.bodies if "steering" in body]
    heads = [method["heads"] for (method,) in steered]
    drawn = [each for each in heads if each != "auto"]
    assert len(drawn) == 3 * (len(heads) - len(drawn))
    assert all(Counter(layer for layer, _ in each) == {1: 2, 2: 1} for each in drawn)
    lowest = [each for each in drawn if each == [[1, 7], [1, 8], [2, 8]]]
    assert len(lowest) >= len(drawn) // 3
    assert len({json.dumps(each) for each in drawn}) > 20


def test_a_refused_method_ends_its_arm_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.refuses = "vhr"
    report = run(endpoint, tmp_path, "--arms", "unsteered,vhr,var,random", code=1)
    arms = {arm["name"]: arm for arm in report["suites"][0]["arms"]}
    assert arms["vhr"]["error"] == "HTTP 400: vhr cannot be done here"
    assert arms["random 0"]["skipped"] == "there are no answers of vhr to match"
    assert arms["vhr"]["figures"] == {} and arms["var"]["figures"]
    assert "vhr failed: HTTP 400" in (tmp_path / "report.md").read_text()


def test_an_endpoint_that_ignores_steering_gives_no_steered_figures(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.echoes = False
    report = run(endpoint, tmp_path, "--arms", "unsteered,var", code=1)
    arms = {arm["name"]: arm for arm in report["suites"][0]["arms"]}
    assert "ignored it" in arms["var"]["error"] and arms["var"]["figures"] == {}
    assert arms["unsteered"]["figures"]


def test_any_other_endpoint_is_asked_unsteered(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.methods = None
    report = run(endpoint, tmp_path, "--arms", "unsteered,vhr,random", "--no-logprobs")
    assert [arm["name"] for arm in report["suites"][0]["arms"]] == ["unsteered"]
    assert figures(report, "unsteered")["random/accuracy"] == 1.0
    assert report["left_out"]["vhr"] == "the endpoint is no Headway server"
    assert "partner/auc" not in figures(report, "unsteered")
    assert figures(report, "unsteered")["partner/false_yes"] == 1.0
    assert not any("logprobs" in body and body["logprobs"] is True for body in endpoint.bodies)


def test_a_sweep_is_run_and_drawn(endpoint: Endpoint, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweeps = ("--sweep", "vhr.alpha=1,1.5,2", "--sweep", "vhr.layers=1-2,default")
    report = run(endpoint, tmp_path, "--arms", "unsteered,vhr", *sweeps, "--perplexity", "none")
    assert report["sweeps"]["vhr.alpha"] == ["vhr alpha=1", "vhr alpha=1.5", "vhr alpha=2"]
    sent = Counter(
        body["steering"]["methods"][0]["alpha"] for body in endpoint.bodies if "steering" in body
    )
    assert sent[1] == sent[1.5] > 0 and sent[2] > sent[1]  # 2 is also that of the other arms
    for name in ("counter-vhr-alpha.png", "counter-vhr-layers.png"):
        assert (tmp_path / name).stat().st_size > 5_000


def test_text_can_be_scored_by_itself(endpoint: Endpoint, tmp_path: Path) -> None:
    report = run(endpoint, tmp_path, "--arms", "unsteered", "--perplexity", "completions")
    assert figures(report, "unsteered")["perplexity"] == pytest.approx(2.718281828**2)


def test_a_method_that_cannot_score_text_is_measured_otherwise(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    options = ("--arms", "unsteered,var,locore", "--perplexity", "completions")
    report = run(endpoint, tmp_path, *options)
    assert "perplexity" in figures(report, "locore")
    assert "perplexity" not in figures(report, "var")
    assert figures(report, "var")["partner/false_yes"] == 0.0
    assert "var: no perplexity: HTTP 400" in (tmp_path / "report.md").read_text()


def test_an_endpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--url", "http://127.0.0.1:9", "--model", "m", "--output", str(tmp_path)]
    assert quality.main([*where, "--quick"]) == 1
    assert "ConnectError" in capsys.readouterr().err


# Options


def planned(*options: str) -> Plan:
    return make_plan(command.build_parser().parse_args(options))


def test_quick_is_small_and_the_demo_has_its_own_settings() -> None:
    quick = planned("--quick")
    assert [arm.name for arm in quick.arms] == [
        "unsteered", "vhr", "random 0", "var", "locore", "vhr+locore",
    ]  # fmt: skip
    assert [len(suite.pictures) for suite in quick.suites] == [40]
    assert quick.suites[0].sets == ["partner", "adversarial"]
    vhr = quick.arms[1].methods[0]
    assert (vhr["alpha"], vhr["layers"]) == (1.5, list(range(8, 15)))
    assert quick.arms[3].methods == ({"method": "var", "sink_dims": [507], "tau": 20},)


def test_elsewhere_methods_have_their_defaults() -> None:
    elsewhere = planned("--url", "u", "--model", "m", "--scenes", "2", "--split", "both")
    arms = {arm.name: arm for arm in elsewhere.arms}
    assert arms["vhr"].methods == ({"method": "vhr", "alpha": 2.0, "heads": "auto"},)
    assert arms["var"].methods == ({"method": "var"},)
    assert arms["random 2"] == Arm("random 2", control=Control("random", seed=2))
    assert [suite.name for suite in elsewhere.suites] == ["prior", "counter"]


def test_options_change_arms_and_suites() -> None:
    own = ("--arm", 'vhr=[{"method": "vhr", "heads": [[0, 1]]}]', "--arm", 'x=[{"method": "var"}]')
    changed = planned("--scenes", "2", "--first", "5", *own, "--arms", "unsteered,vhr")
    assert [arm.name for arm in changed.arms] == ["unsteered", "vhr", "x"]
    assert changed.arms[1].methods == ({"method": "vhr", "heads": [[0, 1]]},)
    assert list(changed.suites[0].pictures) == ["counter/5", "counter/6"]
    layers = planned("--scenes", "1", "--vhr-layers", "2-3", "--vhr-alpha", "1.25", "--arms", "vhr")
    expected = {"method": "vhr", "alpha": 1.25, "heads": "auto", "layers": [2, 3]}
    assert layers.arms[0].methods == (expected,)
    (suite,) = planned("--scenes", "1", "--caption-tokens", "9", "--answer-tokens", "3").suites
    assert (suite.caption_tokens, suite.answer_tokens) == (9, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "u"), "--url and --model go together"),
        (("--arms", "unsteered,magic"), "there is no arm 'magic'"),
        (("--arms", "vhr,vhr"), "given twice: vhr"),
        (("--arm", "x"), "is no NAME=JSON"),
        (("--sweep", "gact.strength=1"), "of an arm among"),
        (("--vhr-layers", "some"), "is no range"),
        (("--vhd", "missing.json"), "missing.json"),
        (("--pope", "a.json"), "need --images"),
        (("--chair-annotations", "a.json", "--images", "."), "needs --synonyms"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        quality.main(["--scenes", "1", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_is_listed_and_dispatched(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["quality", "--help"])
    assert ended.value.code == 0
    assert "--sweep METHOD.PARAM=v1,v2,..." in capsys.readouterr().out
