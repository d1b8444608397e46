"""Seam: vLLM's V2 runner, which it uses on GPU.

vLLM symbols relied on: `vllm.v1.worker.gpu.model_runner.GPUModelRunner` (`load_model`,
`finish_requests`, `execute_model` with `dummy_run`, `execute_model_state` (`input_batch`,
`hidden_states`), `sample_tokens`, which returns an `AsyncOutput`, `capture_model`,
`cudagraph_manager.dispatch`, `run_fullgraph` and `run_pw_graph`, `model_state`, `attn_groups`),
`BlockTables.slot_mappings`, `model_states.resolve_model_state_cls`, which is swapped for ours, and
the hooks of the `ModelState` that it names: `add_request`, `preprocess_state`,
`initialize_kv_cache`; `InputBatch.req_ids`, `num_scheduled_tokens`, `num_computed_tokens_np`,
`logits_indices`.

`preprocess_state` is where a plan is made: it runs for real batches only, after the batch has its
final order and before the forward pass. A request that is preempted leaves the runner and comes
back as a new one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

from headway.server.engine import layer_boundary
from headway.server.engine.attention import decoder_layers, layer_index
from headway.server.engine.config import (
    captures_residual,
    edits_after_attention,
    unsupported_attention,
    unsupported_request,
    unsupported_residual,
)
from headway.server.engine.gpu_attention import unsupported_cache, unsupported_layer
from headway.server.engine.gpu_plan import GpuPlanner, GpuStepPlan
from headway.server.engine.gpu_tables import GpuTables
from headway.server.engine.nonfinite import STAGE, PendingCheck
from headway.server.engine.request import EXTRA_ARG
from headway.server.engine.scheduler import FAILED_REQUESTS
from headway.server.engine.steering_state import SteeringState
from headway.server.engine.step_plan import current
from headway.server.engine.tainted_blocks import clear_blocks
from headway.server.engine.worker_tables import gather_heads, worker_tables

logger = logging.getLogger(__name__)


class SteeringModelRunner:
    """Mixed into a V2 runner: keeps the steered requests and plans every step."""

    steering: SteeringState
    planner: GpuPlanner

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        model_states.resolve_model_state_cls = _steering_model_state
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        context = self.vllm_config.compilation_config.static_forward_context
        layers = decoder_layers(context, self.model)
        edits = unsupported_attention(self.vllm_config) is None
        for name, layer in layers.items():
            if reason := unsupported_layer(layer, edits):
                raise ValueError(f"Headway cannot steer layer {name}: {reason}")
        residual = unsupported_residual(self.vllm_config) is None
        tables = worker_tables(GpuTables, self.vllm_config, self.device, residual=residual)
        geometry = tables.geometry
        self.planner = GpuPlanner(
            tables,
            self.max_num_tokens,
            self.device,
            _num_sms(self.device),
            # Who steers by the image may name sink dimensions that the model is not known for.
            can_tag=geometry.supports_images or geometry.sink_dims != (),
            captures_residual=captures_residual(self.vllm_config),
            gather=gather_heads,
        )
        self.steering = SteeringState(geometry, self.planner)
        if self.planner.can_tag or residual:
            layer_boundary.install(self.model, layers, edits_after_attention(self.vllm_config))
        self.model_state.headway = self

    def finish_requests(self: Any, scheduler_output: Any) -> None:
        super().finish_requests(scheduler_output)  # type: ignore[misc]
        clear_blocks(self, scheduler_output)
        with self.steering.guard("arrival"):
            self.steering.preempt(scheduler_output.preempted_req_ids or ())
            self.steering.remove(scheduler_output.finished_req_ids)

    def execute_model(
        self: Any,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if dummy_run:
            self.planner.idle()  # it replays graphs, and nobody plans it
        try:
            return super().execute_model(  # type: ignore[misc]
                scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs
            )
        finally:
            plan = current.plan
            if isinstance(plan, GpuStepPlan) and not plan.capturing:
                current.plan = None
                with self.steering.guard("report"):
                    self.steering.close_step(plan)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        check = self._check_rows()
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if output is not None and self.is_last_pp_rank:
            failed = self.steering.take_failed()
            if failed:
                # Sampled tokens are copied while the next step runs; the output is this object.
                setattr(getattr(output, "model_runner_output", output), FAILED_REQUESTS, failed)
            if check is not None:
                check.ride(output)
        return output

    def _check_rows(self: Any) -> PendingCheck | None:
        """Have the rows looked at that tokens are to be sampled from, where any is steered."""
        state = self.execute_model_state
        if state is None or state.hidden_states is None or not self.steering.requests:
            return None
        with self.steering.guard(STAGE):
            batch, slots = state.input_batch, self.planner.buffers.row_slots
            return PendingCheck(
                self.steering, batch.req_ids, state.hidden_states, batch.logits_indices, slots
            )
        return None

    def warm_up_steering(self: Any) -> None:
        """Have the kernels of eager steps compiled before the first request that needs them.

        Decode steps of a captured graph are compiled when it is captured.
        """
        if unsupported_request(self.vllm_config) is not None:
            return
        rows = min(2 * self.max_num_reqs, self.max_num_tokens)
        try:
            for moves in (True, False):
                current.plan = self.planner.everything(moves)
                self._dummy_run(rows, skip_eplb=True)
                self._dummy_run(1, uniform_decode=True, skip_eplb=True)
        except Exception:
            # They are compiled when they are needed, then.
            logger.warning("the steering kernels were not warmed up", exc_info=True)
        finally:
            current.plan = None

    def capture_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Where no request can be steered the graphs are vLLM's own.
        if unsupported_request(self.vllm_config) is None:
            current.plan = self.planner.captured
        try:
            return super().capture_model(*args, **kwargs)  # type: ignore[misc]
        finally:
            current.plan = None


def _steering_model_state(vllm_config: Any, model: torch.nn.Module) -> type:
    """The class that vLLM has for this model, with ours in front of it."""
    base = resolve_model_state_cls(vllm_config, model)
    return type(f"Steering{base.__name__}", (_ModelState, base), {})


class _ModelState:
    """Mixed into the runner's model state; headway: the runner."""

    headway: Any

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        steering: SteeringState = self.headway.steering
        with steering.guard("arrival"):
            params = new_req_data.sampling_params
            if params is not None and params.extra_args and EXTRA_ARG in params.extra_args:
                steering.add(new_req_data.req_id, params.extra_args[EXTRA_ARG])

    def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        super().preprocess_state(input_batch, *args, **kwargs)  # type: ignore[misc]
        steering: SteeringState = self.headway.steering
        current.plan = None
        with steering.guard("plan"):
            current.plan = steering.plan_step(
                input_batch.req_ids,
                input_batch.num_scheduled_tokens,
                input_batch.num_computed_tokens_np,
            )
        if current.plan is None:
            # Also after a failure: a graph must not be replayed over the tables of the last step.
            self.headway.planner.idle()

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)  # type: ignore[misc]
        runner, planner = self.headway, self.headway.planner
        if unsupported_attention(runner.vllm_config) is None:
            _bind_caches(runner, block_tables)
        _credit_replays(runner.cudagraph_manager, planner)
        _choose_without_graphs(runner)


def _bind_caches(runner: Any, block_tables: Any) -> None:
    """Tell the planner where the decoder's layers have their keys. Raises ValueError."""
    context = runner.vllm_config.compilation_config.static_forward_context
    layers = decoder_layers(context, runner.model)
    for group in (group for groups in runner.attn_groups for group in groups):
        if group.kernel_block_stride:
            raise ValueError("Headway cannot steer with a KV cache packed across layers")
        for name in layers.keys() & set(group.layer_names):
            if reason := unsupported_cache(layers[name]):
                raise ValueError(f"Headway cannot steer layer {name}: {reason}")
            cache = layers[name].kv_cache
            runner.planner.bind_cache(
                layer_index(name),
                cache.shape[0] * cache.shape[2],
                block_tables.slot_mappings[group.kv_cache_group_id],
            )


def _credit_replays(manager: Any, planner: GpuPlanner) -> None:
    """A replayed graph calls no Python: what was captured with it counts as done."""
    run_full, run_piecewise = manager.run_fullgraph, manager.run_pw_graph

    def credit(attention: bool) -> None:
        if isinstance(current.plan, GpuStepPlan) and not current.plan.capturing:
            current.plan.replayed(planner.captured, attention)

    def run_fullgraph(*args: Any, **kwargs: Any) -> Any:
        credit(attention=True)
        return run_full(*args, **kwargs)

    def run_pw_graph(*args: Any, **kwargs: Any) -> Any:
        credit(attention=False)
        return run_piecewise(*args, **kwargs)

    manager.run_fullgraph, manager.run_pw_graph = run_fullgraph, run_pw_graph


def _choose_without_graphs(runner: Any) -> None:
    """Have the layers called one by one in steps that choose heads: no graph holds the choice."""
    dispatch = runner.cudagraph_manager.dispatch

    def without_graphs(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        found = dispatch(num_reqs, num_tokens, *args, **kwargs)
        if found.cg_mode == CUDAGraphMode.NONE or not runner.steering.is_choosing:
            return found
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_active_loras=found.num_active_loras,
        )

    runner.cudagraph_manager.dispatch = without_graphs


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
