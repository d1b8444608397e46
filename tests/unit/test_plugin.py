"""What switching Headway on changes in an engine's configuration, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headway.server.engine import plugin
from headway.server.engine.config import is_enabled, unsupported_request

pytestmark = pytest.mark.unit

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


def scheduler_class(name: str) -> type:
    module, _, qualname = name.rpartition(".")
    return type(qualname, (), {"__module__": module})


def configuration(worker=CPU_WORKER, scheduler="vllm.v1.core.sched.scheduler.Scheduler", **model):
    described = {
        "model": "the-model",
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "is_attention_free": False,
        "is_hybrid": False,
        "use_mla": False,
        "model_arch_config": SimpleNamespace(per_layer_overrides=None),
        **model,
    }
    return SimpleNamespace(
        additional_config={"headway": {}},
        model_config=SimpleNamespace(**described),
        parallel_config=SimpleNamespace(worker_cls=worker, decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(
            scheduler_cls=None, get_scheduler_cls=lambda: scheduler_class(scheduler)
        ),
        speculative_config=None,
    )


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        ("scheduler.Scheduler", "SteeringScheduler"),
        ("async_scheduler.AsyncScheduler", "AsyncSteeringScheduler"),
    ],
)
def test_worker_and_scheduler_are_replaced(stock, ours):
    config = configuration(scheduler=f"vllm.v1.core.sched.{stock}")
    plugin.enable(config)
    assert config.parallel_config.worker_cls.endswith("HeadwayCPUWorker")
    assert config.scheduler_config.scheduler_cls.endswith(f".{ours}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"worker": "vllm.v1.worker.gpu_worker.Worker"}, "worker vllm.v1.worker.gpu_worker"),
        ({"scheduler": "mine.Scheduler"}, "scheduler mine.Scheduler"),
        ({"runner_type": "pooling"}, "pooling"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"is_hybrid": True}, "other than attention"),
        ({"is_attention_free": True}, "other than attention"),
        ({"use_mla": True}, "latent attention"),
        (
            {"model_arch_config": SimpleNamespace(per_layer_overrides=[{}, {"head_size": 64}])},
            "differ in their heads",
        ),
    ],
)
def test_what_cannot_be_steered_is_refused_at_start(changes, words):
    with pytest.raises(ValueError, match=words):
        plugin.enable(configuration(**changes))


def test_a_bad_profile_ends_the_start():
    config = configuration()
    config.additional_config = {"headway": {"profiles": {"a b": "sinks.json"}}}
    with pytest.raises(ValueError, match="headway.profiles.a b"):
        plugin.enable(config)


@pytest.mark.parametrize("extra", [{}, {"headway": None}, {"headway": True}, {"other": {}}, None])
def test_inert_unless_switched_on(extra):
    assert not is_enabled(SimpleNamespace(additional_config=extra))


def test_engines_whose_requests_cannot_be_steered():
    config = configuration()
    assert unsupported_request(config) is None
    config.speculative_config = object()
    assert "speculative" in unsupported_request(config)
