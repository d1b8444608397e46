"""What the forward pass of a step leaves behind for the saliencies of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from headway.kernels.attention_rows import AttentionRows, RowEdits
from headway.kernels.cache_products import CacheProducts
from headway.kernels.head_word import Tag
from headway.server.engine.decoder_parts import Decoder
from headway.server.engine.slots import SlotTables
from headway.server.engine.step_plan import AttentionCall
from headway.steering.head_words import IDENTITY_WORD
from headway.steering.positions import Range


@dataclass(frozen=True)
class SaliencyRow:
    """A row of the batch from whose logits a token is drawn.

    row, sequence: of the batch. position: of the row, in tokens. slot: of the edits that its
    position has, -1 for none. layers: whose saliency counts. history: the keys that count.
    """

    request_id: str
    row: int
    sequence: int
    position: int
    prompt_len: int
    slot: int
    tag_row: int
    layers: tuple[int, ...]
    history: tuple[Range, ...]


@dataclass(frozen=True)
class LayerRecord:
    """What the rows had at one layer.

    output: [num_rows, num_heads, head_size], after scaling. slot_tags: of the layer's keys.
    """

    query: torch.Tensor
    output: torch.Tensor
    call: AttentionCall
    slot_tags: torch.Tensor | None


@dataclass
class SaliencyTape:
    """Filled by the layers from the lowest one that counts upwards.

    positions: int64 [num_rows] or, with M-RoPE, [3, num_rows]. streams: layer -> float32
    [num_rows, hidden_size], the residual stream that enters it. slot_tags: layer -> tags of keys.
    middles, gates: layer -> float32 [num_rows, ..], the stream between attention and feed-forward
    layer and the latter's gate and input, as far as `watching` saw them. seconds: spent in steering
    before.
    """

    tables: SlotTables
    rows: tuple[SaliencyRow, ...]
    positions: torch.Tensor
    slot_tags: Callable[[int], torch.Tensor | None]
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    records: dict[int, LayerRecord] = field(default_factory=dict)
    middles: dict[int, torch.Tensor] = field(default_factory=dict)
    gates: dict[int, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._known_places: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self.lowest = min(min(row.layers) for row in self.rows)
        self._index = torch.tensor([row.row for row in self.rows])

    def keep_stream(
        self, layer: int, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        """The residual stream that enters a layer; never raises."""
        if layer < self.lowest:
            return
        try:
            stream = hidden_states.index_select(0, self._index).float()
            if residual is not None:
                stream = stream + residual.index_select(0, self._index).float()
            self.streams[layer] = stream
        except Exception as error:
            self.error = error

    def keep_attention(self, layer: int, call: AttentionCall) -> None:
        """The query and the edited output of a layer; never raises."""
        if layer < self.lowest:
            return
        try:
            self.records[layer] = LayerRecord(
                call.query.index_select(0, self._index),
                call.output.index_select(0, self._index),
                call,
                self.slot_tags(layer),
            )
        except Exception as error:
            self.error = error

    @contextmanager
    def watching(self, decoder: Decoder) -> Iterator[None]:
        """Keep what feed-forward layers compute within the block; never raises.

        Where the model is compiled their modules are not called, and nothing is seen.
        """
        hooks = [
            module.register_forward_hook(partial(self._keep_feedforward, kept, index))
            for index, layer in decoder.layers.items()
            if index >= self.lowest
            for kept, module in (
                (self.middles, layer.feedforward_norm.module),
                (self.gates, layer.gate_up.module),
            )
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep_feedforward(
        self, kept: dict[int, torch.Tensor], layer: int, module: Any, args: Any, output: Any
    ) -> None:
        try:
            # A norm gives what it normed and the stream, a linear layer its output and a bias.
            wanted = output[1] if kept is self.middles else output[0]
            kept[layer] = wanted.index_select(0, self._index).float()
        except Exception as error:
            self.error = error

    def attention(self, layer: int, chosen: torch.Tensor) -> AttentionRows:
        """The attention of some rows at a layer; chosen: int64, indices of `rows`."""
        record = self.records[layer]
        call = record.call
        rows = [self.rows[index] for index in chosen.tolist()]
        block_size = call.kv_cache.shape[2]
        blocks, seq_lens = self._places(call.block_table, block_size, rows)
        return AttentionRows(
            record.query.index_select(0, chosen),
            CacheProducts(call.kv_cache, blocks, seq_lens),
            call.softmax_scale,
            call.soft_cap,
            call.sliding_window,
            self._edits(layer, rows, blocks, block_size, record),
        )

    def _places(
        self, block_table: torch.Tensor, block_size: int, rows: list[SaliencyRow]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks of some rows' keys, and how many keys those are; layers share their tables."""
        key = block_table.data_ptr(), block_size, tuple(row.sequence for row in rows)
        if key not in self._known_places:
            seq_lens = torch.tensor([row.position + 1 for row in rows])
            num_blocks = int(seq_lens.max() + block_size - 1) // block_size
            sequences = torch.tensor([row.sequence for row in rows])
            # Beyond a sequence's end the table holds whatever it held before.
            blocks = block_table[sequences, :num_blocks].long()
            used = torch.arange(num_blocks) * block_size < seq_lens[:, None]
            self._known_places[key] = blocks * used, seq_lens
        return self._known_places[key]

    def scale(self, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        """The scales of the head outputs, float32 [num_rows, 1, num_heads, 1]; None if all 1."""
        slots = [self.rows[index].slot for index in chosen.tolist()]
        if not any(slot >= 0 and self.tables.affine[slot, layer] for slot in slots):
            return None
        table = self.tables.scale[layer]
        rows = [table[slot] if slot >= 0 else torch.ones_like(table[0]) for slot in slots]
        return torch.stack(rows)[:, None, :, None]

    def history(self, chosen: torch.Tensor) -> torch.Tensor:
        """bool [num_rows, num_keys]: the keys that count."""
        rows = [self.rows[index] for index in chosen.tolist()]
        mask = torch.zeros(len(rows), max(row.position for row in rows) + 1, dtype=torch.bool)
        for index, row in enumerate(rows):
            for start, stop in row.history:
                mask[index, start : min(stop, row.position + 1)] = True
        return mask

    def _edits(
        self,
        layer: int,
        rows: list[SaliencyRow],
        blocks: torch.Tensor,
        block_size: int,
        record: LayerRecord,
    ) -> RowEdits | None:
        tables = self.tables
        if not any(row.slot >= 0 and tables.attends[row.slot, layer] for row in rows):
            return None
        words = torch.from_numpy(IDENTITY_WORD).repeat(len(rows), tables.local_heads, 1)
        longest = max(row.position for row in rows) + 1
        tags = torch.zeros(len(rows), longest, dtype=torch.uint8)
        for index, row in enumerate(rows):
            if row.slot < 0 or not tables.attends[row.slot, layer]:
                continue
            own = tables.words[layer][row.slot]
            words[index, :, : own.shape[-1]] = own
            if row.tag_row >= 0 and tables.tags is not None:
                length = min(tags.shape[1], tables.tags.shape[1])
                tags[index, :length] |= tables.tags[row.tag_row, :length]
            if record.slot_tags is not None:
                slots = (blocks[index, :, None] * block_size + torch.arange(block_size)).flatten()
                prompt = slots[: row.prompt_len]
                tags[index, : len(prompt)] |= record.slot_tags[prompt]
            tags[index, row.prompt_len :] |= int(Tag.OUTPUT)
        return RowEdits(words, tags)
