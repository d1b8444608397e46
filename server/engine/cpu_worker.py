"""Seam: vLLM's V1 runner on CPU.

vLLM symbols relied on: `vllm.v1.worker.cpu_worker` (`CPUWorker`, and its module global
`CPUModelRunner`, swapped for a subclass), and of the runner `load_model`, `_update_states`,
`_prepare_inputs`, `_model_forward`, `execute_model`, `execute_model_state` (`logits`,
`sample_hidden_states`, one row a request without speculation), `sample_tokens`,
`discard_request_mask`, `positions`, `mrope_positions`, `uses_mrope`, `input_batch.req_ids` and
`num_computed_tokens_cpu`, `CompilationConfig.static_forward_context`,
`scheduler_output.scheduled_new_reqs` and `finished_req_ids`.

`_prepare_inputs` is where a plan is made: the batch then holds the requests of this very step in
their final order, new ones included.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from headway.server.engine import attention, cpu_attention, layer_boundary
from headway.server.engine.config import edits_after_attention, unsupported_saliency
from headway.server.engine.cpu_generators import only_streams_in_use
from headway.server.engine.cpu_plan import CpuPlanner
from headway.server.engine.cpu_sampling import gated_sampling
from headway.server.engine.decoder_parts import Decoder, UnknownStructureError, read_decoder
from headway.server.engine.kept_weights import keeping_weights
from headway.server.engine.nonfinite import fail_lost_rows
from headway.server.engine.request import EXTRA_ARG
from headway.server.engine.scheduler import FAILED_REQUESTS
from headway.server.engine.slots import SlotTables
from headway.server.engine.steering_state import SteeringState
from headway.server.engine.step_plan import current
from headway.server.engine.tainted_blocks import clear_blocks
from headway.server.engine.worker_rpc import SteeringRpc
from headway.server.engine.worker_tables import gather_heads, worker_tables

logger = logging.getLogger(__name__)


class SteeringCPUModelRunner(CPUModelRunner):
    """vLLM's CPU runner, which also keeps the steered requests and plans every step."""

    steering: SteeringState
    decoder: Decoder | None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        wants_saliency = unsupported_saliency(self.vllm_config) is None
        with keeping_weights() if wants_saliency else nullcontext():
            super().load_model(*args, **kwargs)
        tables = worker_tables(SlotTables, self.vllm_config)
        self.steering = SteeringState(tables.geometry, CpuPlanner(tables, gather_heads))
        context = self.vllm_config.compilation_config.static_forward_context
        layers = attention.decoder_layers(context, self.model)
        layer_boundary.install(self.model, layers, edits_after_attention(self.vllm_config))
        self.decoder = self._read_decoder(layers) if wants_saliency else None

    def _read_decoder(self, layers: dict[str, Any]) -> Decoder | None:
        try:
            return read_decoder(self.model, layers)
        except UnknownStructureError as error:
            # Nobody may ask for it; whoever does gets this for an answer.
            self.steering.no_saliency = str(error)
            logger.warning("requests for saliencies will fail: %s", error)
            return None

    def _update_states(self, scheduler_output: Any) -> Any:
        result = super()._update_states(scheduler_output)
        steering = self.steering
        clear_blocks(self, scheduler_output)
        with steering.guard("arrival"):
            steering.remove(scheduler_output.finished_req_ids)
            for request in scheduler_output.scheduled_new_reqs:
                params = request.sampling_params
                if params is not None and params.extra_args and EXTRA_ARG in params.extra_args:
                    steering.add(request.req_id, params.extra_args[EXTRA_ARG], params)
        return result

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        with self.steering.guard("plan"):
            batch = self.input_batch
            discarded = self.discard_request_mask.np[: len(batch.req_ids)]
            current.plan = self.steering.plan_step(
                batch.req_ids,
                num_scheduled_tokens,
                batch.num_computed_tokens_cpu,
                ~discarded,
                self.mrope_positions.gpu if self.uses_mrope else self.positions,
            )
        return result

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        tape = current.plan.tape if current.plan is not None else None
        if tape is None or self.decoder is None or not self.model_config.enforce_eager:
            return super()._model_forward(*args, **kwargs)
        with tape.watching(self.decoder):
            return super()._model_forward(*args, **kwargs)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().execute_model(*args, **kwargs)
        finally:
            plan, current.plan = current.plan, None
            if plan is not None:
                with self.steering.guard("report"):
                    self.steering.close_step(plan)

    def sample_tokens(self, grammar_output: Any) -> Any:
        state = self.execute_model_state
        if state is not None:
            rows = state.sample_hidden_states
            fail_lost_rows(self.steering, self.input_batch.req_ids, rows, state.logits)
        with only_streams_in_use(self), self._gated_sampling():
            output = super().sample_tokens(grammar_output)
        failed = self.steering.take_failed()
        if failed:
            setattr(output, FAILED_REQUESTS, failed)
        return output

    def _gated_sampling(self) -> AbstractContextManager[None]:
        tape, state = self.steering.take_tape(), self.execute_model_state
        if tape is None or state is None:
            return nullcontext()
        return gated_sampling(self, tape, state.logits)


class HeadwayCPUWorker(SteeringRpc, cpu_worker.CPUWorker):
    """vLLM's CPU worker with the steering runner."""

    def init_device(self) -> None:
        """Build vLLM's device and runner, the runner being ours."""
        if self.use_v2_model_runner:
            raise RuntimeError("Headway steers on vLLM's V1 model runner only, V2 was selected")
        cpu_worker.CPUModelRunner = SteeringCPUModelRunner
        cpu_attention.install()
        super().init_device()
