"""Carries a step's plan out on GPU: launches of the Triton kernels over persistent buffers.

What a launch does is read on the device, so that one captured in a CUDA graph serves every later
step. In eager layers the host launches only what the step needs; while graphs are captured, all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from headway.kernels.triton.base_seq_lens import base_seq_lens_
from headway.kernels.triton.head_affine import head_affine_
from headway.kernels.triton.head_selection import select_heads_
from headway.kernels.triton.residual_edit import residual_edit_
from headway.kernels.triton.segment_attention import (
    Rows,
    Workspace,
    segment_attention,
    splits_of,
)
from headway.kernels.triton.sink_tags import tag_sinks_
from headway.server.engine.gpu_buffers import StepBuffers
from headway.server.engine.gpu_readings import GpuReadings
from headway.server.engine.gpu_tables import GpuTables
from headway.server.engine.head_choice import Gather, choose_heads
from headway.server.engine.readings import RequestReadings
from headway.server.engine.step_plan import AttentionCall, Scheduled, Span, StepPlan


@dataclass
class GpuStepPlan(StepPlan):
    """A step on GPU, or, where it is `capturing`, what is recorded for all steps to come."""

    planner: GpuPlanner
    readings: list[tuple[Span, RequestReadings, int]] = field(default_factory=list)
    capturing: bool = False
    moves: bool = False
    _told_base: bool = False

    def __post_init__(self) -> None:
        slots = [span.slot for span in self.spans]
        self._attends: np.ndarray = np.any(self.tables.attends[slots], axis=0)
        self._affine: np.ndarray = np.any(self.tables.affine[slots], axis=0)
        self._moves: np.ndarray = np.any(self.tables.moves[slots], axis=0)
        self._adds: np.ndarray = np.any(self.tables.adds[slots], axis=0)
        self._sinks: np.ndarray = np.zeros_like(self._attends)
        for rows in self.sink_rows:
            self._sinks |= rows.layers

    def attends(self, layer: int) -> bool:
        # A layer without a bound cache is one whose attention weights are never edited.
        if self.capturing:
            return layer in self.planner.sink_tags
        return bool(self._attends[layer])

    @property
    def watches_residual(self) -> bool:
        return self.capturing or bool(self._adds.any() or self._sinks.any())

    def edits_at(self, point: int) -> bool:
        return self.planner.captures_residual if self.capturing else bool(self._adds[point])

    def edit_residual(
        self, point: int, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        planner, tables = self.planner, self.planner.tables
        if not self.edits_at(point):
            return
        row = tables.row_of_point(point)
        with self._attempt(lambda: self._users_of(tables.adds, point)):
            residual_edit_(
                hidden_states,
                residual,
                planner.buffers.row_slots,
                tables.added[row],
                tables.strengths[row],
                tables.forms[row],
                tables.probe_weights,
                tables.probe_bias,
                tables.directions,
            )
            self.residual_done.add(point)

    def observe_residual(
        self, layer: int, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        planner, buffers = self.planner, self.planner.buffers
        captured = planner.can_tag and layer in planner.sink_tags
        if not (captured if self.capturing else self._sinks[layer]):
            return
        with self._attempt(lambda: [rows.request_id for rows in self.sink_rows]):
            tag_sinks_(
                planner.sink_tags[layer],
                hidden_states,
                residual,
                planner.slot_mappings[layer],
                buffers.row_rules,
                buffers.rule_tau[planner.tables.row_of(layer)],
                buffers.rule_dims,
            )
            self.sinks_done.add(layer)

    def edit_attention(
        self, layer: int, call: AttentionCall, base: Callable[[torch.Tensor | None], None]
    ) -> None:
        def edited() -> list[str]:
            return self._users_of(self.tables.attends, layer)

        if self.capturing and layer == min(self.planner.sink_tags):
            self._told_base = False  # another graph begins
        lens = None
        with self._attempt(edited):
            lens = self._base_seq_lens(layer, call)
        base(lens)
        with self._attempt(edited):
            self._edit(layer, call)
            self.attention_done.add(layer)
        if layer not in self.attention_done and lens is not None:
            base(None)  # every row gets its unedited attention

    def edit_head_outputs(self, layer: int, output: torch.Tensor) -> None:
        tables = self.planner.tables
        if self.captures or self.choices:
            self.choose_heads(layer, output.view(len(output), tables.local_heads, -1))
        if not self.capturing and not self._affine[layer]:
            return
        with self._attempt(lambda: self._users_of(tables.affine, layer)):
            heads = output.view(output.shape[0], tables.local_heads, -1)
            words = tables.head_words[tables.row_of(layer)]
            head_affine_(heads, self.planner.buffers.row_slots, words, tables.shifts)
            self.affine_done.add(layer)

    def collect(self) -> None:
        layers = self.tables.layers
        for span, readings, _ in self.readings:
            words = self.tables.conditional[span.slot, layers.start : layers.stop].sum()
            readings.considered += int(words) * (span.stop - span.start)

    def replayed(self, captured: GpuStepPlan, attention: bool) -> None:
        """A graph ran instead of the layers; attention: whether it holds attention as well."""
        self.sinks_done |= captured.sinks_done
        self.residual_done |= captured.residual_done
        if attention:
            self.attention_done |= captured.attention_done
            self.affine_done |= captured.affine_done

    def _users_of(self, edits: np.ndarray, place: int) -> list[str]:
        return [span.request_id for span in self.spans if edits[span.slot, place]]

    @contextmanager
    def _attempt(self, request_ids: Callable[[], list[str]]) -> Iterator[None]:
        """Time a launch; if it fails the requests it is for fail, and the engine goes on."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if self.capturing:
                raise  # an engine must not start with graphs that lack their edits
            for request_id in request_ids():
                self.failures.setdefault(request_id, error)
        self.seconds += time.perf_counter() - started

    def _base_seq_lens(self, layer: int, call: AttentionCall) -> torch.Tensor | None:
        """What the base kernel is told, None for the truth; found for all layers at the first."""
        buffers, row = self.planner.buffers, self.planner.tables.row_of(layer)
        if not call.base_takes_seq_lens:
            return None
        if not self._told_base:
            base_seq_lens_(
                buffers.base_seq_lens, call.seq_lens, call.query_start_loc, buffers.replaced
            )
            self._told_base = True
        return buffers.base_seq_lens[row, : len(call.seq_lens)]

    def _edit(self, layer: int, call: AttentionCall) -> None:
        planner, buffers, tables = self.planner, self.planner.buffers, self.planner.tables
        row = tables.row_of(layer)
        num_reqs = len(call.seq_lens)
        splits = 1
        if call.max_query_len == 1 and num_reqs <= planner.workspace.max_reqs:
            kv_heads = call.kv_cache.shape[1]
            splits = splits_of(num_reqs, kv_heads, call.max_seq_len, planner.num_sms)
        segment_attention(
            call.query,
            call.kv_cache,
            call.output,
            call.block_table,
            Rows(
                call.query_start_loc,
                call.seq_lens,
                buffers.row_slots,
                buffers.prompt_lens,
                buffers.tag_rows,
                buffers.reading_rows,
                call.max_query_len,
            ),
            tables.head_words[row],
            tables.edits[row],
            call.softmax_scale,
            call.soft_cap,
            call.sliding_window,
            tables.position_tags,
            planner.sink_tags[layer],
            planner.readings.buffer[row],
            planner.workspace,
            splits,
            moves=self.moves or bool(self.readings) or bool(self._moves[layer]),
        )


class GpuPlanner:
    """Plans the steps of a GPU worker, and owns its buffers.

    num_sms: multiprocessors of the device. can_tag: whether sinks are tagged in CUDA graphs too;
    captures_residual: whether CUDA graphs have residual edits. gather: over tensor-parallel ranks.
    sink_tags: layer -> uint8 [num_blocks * block_size]; slot_mappings: layer -> int64
    [max_num_tokens], vLLM's persistent buffer; both set when the KV cache is there.
    captured: what the CUDA graphs hold, once they are captured.
    """

    MAX_SPLIT_REQS = 64

    def __init__(
        self,
        tables: GpuTables,
        max_num_tokens: int,
        device: torch.device | str,
        num_sms: int,
        can_tag: bool,
        captures_residual: bool = False,
        gather: Gather | None = None,
    ) -> None:
        self.tables = tables
        self._gather = gather or (lambda tensor: tensor)
        self.buffers = StepBuffers(tables, max_num_tokens, device)
        self.readings = GpuReadings(tables, device)
        max_reqs = min(tables.max_num_seqs, self.MAX_SPLIT_REQS)
        head_size = tables.geometry.head_size
        self.workspace = Workspace(max_reqs, tables.local_heads, head_size, device)
        self.num_sms, self.can_tag = num_sms, can_tag
        self.captures_residual = captures_residual
        self.sink_tags: dict[int, torch.Tensor] = {}
        self.slot_mappings: dict[int, torch.Tensor] = {}
        self.captured = self.everything()
        self._loaded: tuple[Span, ...] | None = None

    def everything(self, moves: bool = True) -> GpuStepPlan:
        """A plan that launches whatever a step may need, for capturing and for warming up.

        moves: with the accumulators that edits after the softmax need.
        """
        plan = GpuStepPlan(self.tables, (), (), self, capturing=True)
        plan.moves = moves
        return plan

    def plan(self, step: Scheduled) -> GpuStepPlan:
        """The plan of a step that has something to do; uploads what changed."""
        spans, sink_rows = tuple(step.spans), tuple(step.sink_rows)
        if self._loaded != spans or sink_rows:
            rows = {span.sequence: self.readings.row_of(kept) for span, kept, _ in step.readings}
            self._loaded = None
            self.buffers.load(step, rows)
            self._loaded = None if sink_rows else spans
        return GpuStepPlan(
            self.tables,
            spans,
            sink_rows,
            self,
            step.readings,
            captures=tuple(step.captures),
            choices=tuple(step.choices),
            scale=self._scale,
        )

    def _scale(self, z: torch.Tensor, z_text: torch.Tensor, alpha: float) -> torch.Tensor:
        tables = self.tables
        if tables.local_heads < tables.geometry.num_heads:
            return choose_heads(z, z_text, alpha, tables.heads, self._gather)
        scale = torch.empty(len(z), device=z.device)
        select_heads_(scale, z, z_text, alpha)
        return scale

    def idle(self) -> None:
        """The step steers nothing."""
        if self._loaded != ():
            self.buffers.clear()
            self._loaded = ()

    def bind_cache(self, layer: int, num_slots: int, slot_mapping: torch.Tensor) -> None:
        """Take note of a layer's KV cache: its tags, one a slot, and where a row's slot is told."""
        self.slot_mappings[layer] = slot_mapping
        # Also where graphs tag nothing: they read what an eager step tagged.
        self.sink_tags[layer] = torch.zeros(
            num_slots, dtype=torch.uint8, device=slot_mapping.device
        )

    def changed(self) -> None:
        """A slot or a row of tags was taken or given back."""
        self._loaded = None

    def reserve(self, readings: RequestReadings) -> None:
        """Make room for what a request reads. Raises RuntimeError if there is none."""
        self.readings.row_of(readings)

    def release(self, readings: RequestReadings) -> None:
        """A request that reads leaves the batch."""
        self.readings.release(readings)
        self.changed()
