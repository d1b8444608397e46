"""What switching Headway on changes in an engine's configuration, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headway.server.engine import config as config_module
from headway.server.engine import plugin
from headway.server.engine.config import (
    is_enabled,
    unsupported_attention,
    unsupported_request,
    unsupported_saliency,
)

pytestmark = pytest.mark.unit

GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
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
        "enable_sleep_mode": False,
        "model_arch_config": SimpleNamespace(per_layer_overrides=None),
        **model,
    }
    return SimpleNamespace(
        additional_config={"headway": {}},
        model_config=SimpleNamespace(**described),
        parallel_config=SimpleNamespace(
            worker_cls=worker,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
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


def test_on_gpu_the_worker_is_that_of_the_v2_runner():
    config = configuration(worker=GPU_WORKER)
    config.use_v2_model_runner = True
    plugin.enable(config)
    assert config.parallel_config.worker_cls.endswith("gpu_worker.HeadwayGPUWorker")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"worker": "vllm.v1.worker.xpu_worker.XPUWorker"}, "worker vllm.v1.worker.xpu_worker"),
        ({"worker": GPU_WORKER}, "V2 model runner, and vLLM chose V1"),
        ({"worker": GPU_WORKER, "enable_sleep_mode": True}, "sleep mode"),
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"use_ubatching": True}, "dual batch overlap"),
    ],
)
def test_engines_whose_requests_cannot_be_steered(change, words):
    config = configuration()
    assert unsupported_request(config) is None
    vars(config.parallel_config).update(change)
    assert words in unsupported_request(config)
    config.speculative_config = object()
    assert "speculative" in unsupported_request(config)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "words"),
    [
        (torch.bfloat16, "auto", None),
        (torch.float16, "auto", None),
        (torch.bfloat16, "fp8_e4m3", "a KV cache of fp8_e4m3"),
        (torch.float64, "auto", "takes float32, bfloat16, float16"),
    ],
)
def test_what_the_gpu_kernels_read(dtype, cache_dtype, words):
    config = configuration(dtype=dtype, hf_text_config=SimpleNamespace())
    config.cache_config = SimpleNamespace(cache_dtype=cache_dtype, block_size=16)
    config.use_v2_model_runner = True
    reason = unsupported_attention(config)
    assert reason is None if words is None else words in reason


def on_cpu(dtype=torch.bfloat16, cache_dtype="auto"):
    config = configuration(
        dtype=dtype,
        quantization=None,
        get_head_size=lambda: 64,
        hf_text_config=SimpleNamespace(model_type="llama"),
    )
    config.cache_config = SimpleNamespace(cache_dtype=cache_dtype, block_size=128)
    config.use_v2_model_runner = False
    return config


@pytest.mark.parametrize(
    ("layouts", "words"),
    [
        ({torch.bfloat16: "vec"}, None),
        ({torch.bfloat16: "amx", torch.float32: "vec"}, "`amx`"),
        ({torch.bfloat16: "neon", torch.float32: "neon"}, "`neon`"),
    ],
)
def test_what_reads_the_cache_is_refused_where_it_is_laid_out_otherwise(
    monkeypatch, layouts, words
):
    monkeypatch.setattr(config_module, "cache_layout", lambda dtype, *sizes: layouts[dtype])
    attention, saliency = unsupported_attention(on_cpu()), unsupported_saliency(on_cpu())
    if words is None:
        assert attention is None and saliency is None
        return
    assert words in attention and words in saliency[1]
    assert ("--dtype float32" in attention) is (layouts[torch.float32] == "vec")


def test_a_converted_cache_is_read_by_neither():
    config = on_cpu(cache_dtype="fp8_e4m3")
    assert "fp8_e4m3" in unsupported_attention(config)
    assert "fp8_e4m3" in unsupported_saliency(config)[1]
