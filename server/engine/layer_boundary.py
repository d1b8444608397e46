"""Seam: the residual stream where it enters a decoder layer.

vLLM symbols relied on: decoder layers take `hidden_states` and, in models that carry the residual
apart, `residual` as arguments of their forward; `CompilationConfig.static_forward_context`, layer
name -> attention module; `vllm.utils.torch_utils.direct_register_custom_op`.

A forward pre-hook on every decoder layer calls a custom op, which torch.compile keeps as it is. The
op is declared to change hidden_states, so that the compiler can neither drop it nor move it past
the layer's first use of them.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from headway.server.engine.step_plan import current


def layer_boundary(hidden_states: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    """Have the plan of this step, if there is one, edit and observe the stream entering a layer."""
    plan = current.plan
    if plan is None:
        return
    if plan.watches_residual:
        plan.edit_residual(layer, hidden_states, residual)
        plan.observe_residual(layer, hidden_states, residual)
    if plan.tape is not None:
        plan.tape.keep_stream(layer, hidden_states, residual)


def _layer_boundary_fake(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, layer: int
) -> None:
    return None


@lru_cache(maxsize=1)
def _register() -> torch.library.Library:
    library = torch.library.Library("headway", "FRAGMENT")
    direct_register_custom_op(
        "layer_boundary",
        layer_boundary,
        mutates_args=["hidden_states"],
        fake_impl=_layer_boundary_fake,
        target_lib=library,
        dispatch_key="CompositeExplicitAutograd",
    )
    return library


_HOOKED: WeakSet[torch.nn.Module] = WeakSet()
"""Layers that have the hook already."""


def install(model: torch.nn.Module, attention_layers: dict[str, Any]) -> None:
    """Hook the decoder layers of a loaded model.

    attention_layers: layer name -> attention module, for the decoder's attention layers.
    """
    _register()
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    for name, attention in attention_layers.items():
        index = extract_layer_index(name)
        path = paths.get(id(attention), name).split(".")
        if str(index) not in path:
            continue
        _hook(modules[".".join(path[: path.index(str(index)) + 1])], index)


def _watched() -> bool:
    plan = current.plan
    return plan is not None and (plan.watches_residual or plan.tape is not None)


def _hook(layer: torch.nn.Module, index: int) -> None:
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names or layer in _HOOKED:
        return
    at_hidden = names.index("hidden_states")
    at_residual = names.index("residual") if "residual" in names else len(names)

    def show(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiler must not see the plan, or it would guard on it.
        if not torch.compiler.is_compiling() and not _watched():
            return
        hidden = args[at_hidden] if at_hidden < len(args) else kwargs["hidden_states"]
        residual = args[at_residual] if at_residual < len(args) else kwargs.get("residual")
        torch.ops.headway.layer_boundary(hidden, residual, index)

    layer.register_forward_pre_hook(show, with_kwargs=True)
    _HOOKED.add(layer)
