"""The sizes of the served model, read from vLLM's configuration.

vLLM symbols relied on: `ModelConfig.get_total_num_hidden_layers`, `get_total_num_kv_heads`,
`get_head_size`, `get_hidden_size`, `model_arch_config`, `is_multimodal_model`, `quantization`.
"""

from __future__ import annotations

from typing import Any

from headway.steering import ModelGeometry


def geometry_of(vllm_config: Any) -> ModelGeometry:
    """Sizes of the whole model, whatever the parallelism it is served with."""
    model = vllm_config.model_config
    return ModelGeometry(
        num_layers=model.get_total_num_hidden_layers(),
        num_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        hidden_size=model.get_hidden_size(),
        supports_images=bool(model.is_multimodal_model),
        quantized=model.quantization is not None,
        architecture=str(model.architecture),
    )
