"""What a server with two API servers tells about its requests: metrics, log and traces."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from headway.server.http.metrics import POLL_SECONDS
from tests.deploy.exported import of_headway
from tests.server.calls import CHAT, COMPLETIONS, LOUD, bodies, chat_body, events, post, wait_for
from tests.server.conftest import MODEL, Server, running_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SLOTS = 8
FLAGS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--max-model-len", "512"),
    *("--max-num-seqs", str(SLOTS)),
    "--enforce-eager",
    *("--api-server-count", "2"),
    *("--logging-config.formatter", "json"),
)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
SGRS = [{"method": "sgrs", "alpha": 0.9, "layers": [10, 20]}]
SECRET = "nobody shall read this"


class Collector:
    """Receives spans as an OpenTelemetry collector does, over OTLP and HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest()
                sent.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in sent.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1/traces"

    def named(self, name: str, **attributes: Any) -> list[Any]:
        """The spans of a name with these attributes."""
        found = [span for span in list(self.spans) if span.name == name]
        return [span for span in found if attributes.items() <= attributes_of(span).items()]

    def below(self, parent: Any, name: str) -> list[Any]:
        """The spans of a name whose parent is this one."""
        return [span for span in self.named(name) if span.parent_span_id == parent.span_id]


def attributes_of(span: Any) -> dict[str, Any]:
    """The attributes of a span."""

    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        if kind == "array_value":
            return [value(each) for each in any_value.array_value.values]
        return getattr(any_value, kind)

    return {each.key: value(each.value) for each in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.http.serve_forever)
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture(scope="module")
def watched(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from headway.server.models.smollm2 import ensure_smollm2

    settings = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    settings["OTEL_BSP_SCHEDULE_DELAY"] = "200"  # ms
    flags = (*FLAGS, "--otlp-traces-endpoint", collector.url)
    folder = tmp_path_factory.mktemp("observability")
    yield from running_server(folder, ensure_smollm2(), flags, settings)


def lines(server: Server) -> list[dict[str, Any]]:
    """What the log tells about requests that asked for steering."""
    found = []
    for line in server.log.read_text().splitlines():
        if '"headway.requests"' in line:
            found.append(json.loads(line))
    return found


def test_a_request_is_told_in_one_line(watched: Server) -> None:
    before = len(lines(watched))
    body = chat_body(SECRET, steering={"methods": LOUD}, request_id='odd\n"id"')
    answer = post(watched, CHAT, body)
    post(watched, CHAT, chat_body(SECRET))
    refused = chat_body(SECRET, steering={"methods": [{"method": SECRET}]})
    assert watched.http.post(CHAT, json=refused).status_code == 400
    assert wait_for(lambda: len(lines(watched)) == before + 2)
    served, other = lines(watched)[before:]
    assert served["levelname"] == "INFO" and served["processName"].startswith("ApiServer_")
    told = served["headway"]
    assert told["request_id"] == answer["id"] == 'chatcmpl-odd\n"id"'
    assert told["fingerprint"] == answer["steering"]["fingerprint"]
    assert told["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert told["output_tokens"] == answer["usage"]["completion_tokens"]
    assert told["positions_edited"] == answer["steering"]["positions_edited"]
    assert 0 < told["steering_seconds"] < told["seconds"] < 60
    assert (told["outcome"], told["methods"], told["path"]) == ("ok", ["vhr"], CHAT)
    assert other["headway"]["outcome"] == "refused"
    assert other["headway"]["reason"] == "E_UNKNOWN_METHOD"
    assert SECRET not in watched.log.read_text()


def test_spans_join_vllms(watched: Server, collector: Collector) -> None:
    answer = watched.http.post(
        CHAT, json=chat_body(steering={"methods": LOUD}), headers=TRACEPARENT
    ).json()
    own = {"gen_ai.request.id": answer["id"]}
    assert wait_for(lambda: collector.named("headway.request", **own))
    (ours,) = collector.named("headway.request", **own)
    assert (ours.trace_id.hex(), ours.parent_span_id.hex()) == (TRACE, SPAN)
    assert attributes_of(ours)["headway.outcome"] == "ok"
    assert attributes_of(ours)["headway.fingerprint"] == answer["steering"]["fingerprint"]
    names = ("llm_request", "headway.compile", "headway.confirm")
    assert wait_for(lambda: all(collector.below(ours, name) for name in names))
    for name in names:
        (child,) = collector.below(ours, name)
        assert child.trace_id == ours.trace_id
    (vllms,) = collector.below(ours, "llm_request")
    assert attributes_of(vllms)["gen_ai.latency.time_in_queue"] >= 0
    assert ours.start_time_unix_nano <= vllms.end_time_unix_nano <= ours.end_time_unix_nano


@pytest.mark.parametrize("path", bodies().keys())
def test_every_route_and_stream_is_traced(watched: Server, collector: Collector, path: str) -> None:
    before = len(collector.named("headway.request"))
    events(watched, path, bodies(steering={"methods": LOUD})[path])
    assert wait_for(lambda: len(collector.named("headway.request")) == before + 1)
    ours = collector.named("headway.request")[-1]
    assert ours.parent_span_id == b""
    assert attributes_of(ours)["headway.path"] == path
    assert attributes_of(ours)["headway.outcome"] == "ok"
    assert wait_for(lambda: collector.below(ours, "llm_request"))
    assert collector.below(ours, "llm_request")[0].trace_id == ours.trace_id


def test_what_sgrs_did_is_told(watched: Server, collector: Collector) -> None:
    body = chat_body(steering={"methods": SGRS}, max_tokens=4)
    answer = post(watched, CHAT, body)
    (method,) = answer["steering"]["methods"]
    own = {"gen_ai.request.id": answer["id"]}
    assert wait_for(lambda: collector.named("headway.request", **own))
    attributes = attributes_of(collector.named("headway.request", **own)[0])
    (told,) = [line for line in lines(watched) if line["headway"].get("request_id") == answer["id"]]
    for name in ("draws", "refusals", "fallbacks"):
        assert attributes[f"headway.sgrs_{name}"] == method[name]
        assert told["headway"][f"sgrs_{name}"] == method[name]
    assert method["draws"] >= 4


def test_an_unsteered_request_is_told_by_vllm_alone(watched: Server, collector: Collector) -> None:
    before = len(collector.named("headway.request")), len(lines(watched))
    trace = "1" * 32
    headers = {"traceparent": f"00-{trace}-{SPAN}-01"}
    watched.http.post(COMPLETIONS, json=bodies()[COMPLETIONS], headers=headers)
    assert wait_for(
        lambda: any(each.trace_id.hex() == trace for each in collector.named("llm_request"))
    )
    assert (len(collector.named("headway.request")), len(lines(watched))) == before


def scraped(server: Server) -> dict[str, float]:
    """Headway's series, from whichever API server takes a new connection."""
    with httpx.Client(base_url=server.url) as fresh:
        text = fresh.get("/metrics/").text
    assert "vllm:num_requests_running{" in text
    lines = [line for line in text.splitlines() if line.startswith("headway_")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_every_api_server_tells_all_metrics(watched: Server) -> None:
    steps = scraped(watched)["headway_step_seconds_count"]
    body = chat_body(steering={"methods": LOUD})
    steps += post(watched, CHAT, body)["usage"]["completion_tokens"]  # a step for each at least

    def is_told() -> bool:
        told = scraped(watched)
        asked = told["headway_step_seconds_count"] >= steps
        return asked and told.get('headway_slots{state="used"}') == 0

    assert wait_for(is_told, POLL_SECONDS * 4)
    # The workers may be asked once more in between.
    assert wait_for(lambda: all(scraped(watched) == scraped(watched) for _ in range(5)))
    one = scraped(watched)
    names = {series.partition("{")[0] for series in one}
    # No profile of the registry was asked for.
    assert of_headway().keys() - names == {"headway_profile_info"}
    assert one['headway_slots{state="free"}'] == SLOTS
    assert one["headway_unsteered_total"] == one["headway_active_requests"] == 0
    assert one['headway_requests_total{method="vhr",outcome="ok"}'] >= 6
    assert one['headway_refused_total{reason="E_UNKNOWN_METHOD"}'] == 1


def test_both_api_servers_served(watched: Server) -> None:
    """Otherwise nothing above says anything about several."""
    for _ in range(20):
        if len({line["processName"] for line in lines(watched)}) == 2:
            break
        with httpx.Client(base_url=watched.url, timeout=60) as fresh:
            body = chat_body(steering={"methods": LOUD}, max_tokens=1)
            assert fresh.post(CHAT, json=body).status_code == 200
    assert {line["processName"] for line in lines(watched)} == {"ApiServer_0", "ApiServer_1"}
