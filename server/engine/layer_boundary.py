"""Seam: the residual stream where it enters a decoder layer, its MLP, and the model's last norm.

vLLM symbols relied on: decoder layers take `hidden_states` and, in models that carry the residual
apart, `residual` as arguments of their forward; of a layer `post_attention_layernorm`, or
`pre_feedforward_layernorm` where there is one, of the model around the layers `norm`, called with
the stream, whole or in two parts; `CompilationConfig.static_forward_context`, layer name ->
attention module; `vllm.utils.torch_utils.direct_register_custom_op`.

A forward pre-hook on these modules calls, where torch.compile traces it, a custom op, which the
compiler keeps as it is, and else the function behind that op. The op is declared to change
hidden_states, so that the compiler can neither drop it nor move it past the module's first use of
them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
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
        plan.edit_residual(2 * layer, hidden_states, residual)
        plan.observe_residual(layer, hidden_states, residual)
    if plan.tape is not None:
        plan.tape.keep_stream(layer, hidden_states, residual)


def residual_point(hidden_states: torch.Tensor, residual: torch.Tensor | None, point: int) -> None:
    """Have the plan of this step edit the stream at a point that is not a layer's entrance."""
    plan = current.plan
    if plan is not None:
        plan.edit_residual(point, hidden_states, residual)


def _layer_boundary_fake(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, layer: int
) -> None:
    return None


def _residual_point_fake(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, point: int
) -> None:
    return None


@lru_cache(maxsize=1)
def _register() -> torch.library.Library:
    library = torch.library.Library("headway", "FRAGMENT")
    for name, function, fake in (
        ("layer_boundary", layer_boundary, _layer_boundary_fake),
        ("residual_point", residual_point, _residual_point_fake),
    ):
        direct_register_custom_op(
            name,
            function,
            mutates_args=["hidden_states"],
            fake_impl=fake,
            target_lib=library,
            dispatch_key="CompositeExplicitAutograd",
        )
    return library


_HOOKED: WeakSet[torch.nn.Module] = WeakSet()
"""Modules that have the hook already."""

MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")
"""What a layer calls the norm before its MLP; the first that it has."""

FINAL_NORM = "norm"

NORM_ARGUMENTS = ("x", "residual")
"""What vLLM's norms are called with; their `forward` only says `*args`."""


def install(
    model: torch.nn.Module, attention_layers: dict[str, Any], after_attention: bool = True
) -> None:
    """Hook the decoder layers of a loaded model.

    attention_layers: layer name -> attention module, for the decoder's attention layers.
    after_attention: whether the points between attention and MLP are wanted.
    """
    _register()
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    last = max(map(extract_layer_index, attention_layers), default=-1)
    for name, attention in attention_layers.items():
        index = extract_layer_index(name)
        path = paths.get(id(attention), name).split(".")
        if str(index) not in path:
            continue
        at = path.index(str(index))
        layer = modules[".".join(path[: at + 1])]
        arguments = list(inspect.signature(layer.forward).parameters)
        _hook(layer, arguments, partial(_enter_layer, layer=index))
        norm = next((each for each in MLP_NORMS if hasattr(layer, each)), None)
        if norm is not None and after_attention:
            _hook(getattr(layer, norm), NORM_ARGUMENTS, partial(_pass_point, point=2 * index + 1))
        around = modules[".".join(path[: at - 1])]
        if index == last and isinstance(getattr(around, FINAL_NORM, None), torch.nn.Module):
            _hook(
                getattr(around, FINAL_NORM),
                NORM_ARGUMENTS,
                partial(_pass_point, point=2 * index + 2),
            )


def _enter_layer(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    # A compiler must not see the plan, or it would guard on it.
    if torch.compiler.is_compiling():
        torch.ops.headway.layer_boundary(hidden, residual, layer)
    elif _watched():
        layer_boundary(hidden, residual, layer)


def _pass_point(hidden: torch.Tensor, residual: torch.Tensor | None, point: int) -> None:
    if torch.compiler.is_compiling():
        torch.ops.headway.residual_point(hidden, residual, point)
    elif _edited(point):
        residual_point(hidden, residual, point)


def _edited(point: int) -> bool:
    return current.plan is not None and current.plan.edits_at(point)


def _watched() -> bool:
    plan = current.plan
    return plan is not None and (plan.watches_residual or plan.tape is not None)


def _hook(
    module: torch.nn.Module,
    arguments: Sequence[str],
    show: Callable[[torch.Tensor, torch.Tensor | None], None],
) -> None:
    """Have a module show the stream that it is called with, by the names of its arguments."""
    hidden_name = next((name for name in ("hidden_states", "x") if name in arguments), None)
    if hidden_name is None or module in _HOOKED:
        return
    at_hidden = arguments.index(hidden_name)
    at_residual = arguments.index("residual") if "residual" in arguments else len(arguments)

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[at_hidden] if at_hidden < len(args) else kwargs[hidden_name]
        residual = args[at_residual] if at_residual < len(args) else kwargs.get("residual")
        show(hidden, residual)

    module.register_forward_pre_hook(hook, with_kwargs=True)
    _HOOKED.add(module)
