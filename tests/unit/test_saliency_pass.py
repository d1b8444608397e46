"""The way back through whole layers of vLLM's models, against autograd over their own modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig

from headway.kernels.cache_rows import cache_rows
from headway.server.engine.decoder_parts import read_decoder
from headway.server.engine.saliency import SaliencyPass
from headway.server.engine.saliency_tape import SaliencyRow, SaliencyTape
from headway.server.engine.slots import SlotTables
from headway.server.engine.step_plan import AttentionCall
from headway.steering import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords
from tests.decoder_models import CONFIGS, SIZES, decoder_model, one_rank

pytestmark = pytest.mark.unit

BLOCK_SIZE, NUM_BLOCKS = 4, 16
HIDDEN, VOCABULARY, HEADS = SIZES["hidden_size"], SIZES["vocab_size"], SIZES["num_attention_heads"]
PROMPT_LEN = 3
GEOMETRY = ModelGeometry(2, HEADS, SIZES["num_key_value_heads"], 32, HIDDEN)
CANDIDATES = torch.tensor([[1, 7, 3], [7, 30, 12], [0, 1, 2]])


def no_slot_tags(layer: int) -> None:
    """No key is a sink."""


@dataclass
class Sequence:
    """A row of the batch; position: its own, and the number of keys before it. past: by layer."""

    row: int
    position: int
    layers: tuple[int, ...]
    history: tuple[tuple[int, int], ...]
    stream: torch.Tensor
    past: list[tuple[torch.Tensor, torch.Tensor]]
    scale: torch.Tensor  # [num_layers, num_heads]


class Case:
    """Three sequences in a batch of five rows; what the forward pass leaves, and autograd says."""

    def __init__(self, kind: str, vllm_config: VllmConfig) -> None:
        self.model, attention = decoder_model(kind, vllm_config)
        for module in self.model.modules():
            if hasattr(module, "quant_method"):
                module.cpu_linear = torch.nn.functional.linear  # as before vLLM packs the weights
        self.layers: Any = self.model.model.layers
        self.decoder = read_decoder(self.model, attention)
        self.draw = torch.Generator().manual_seed(1)
        own = self.layers[0].self_attn
        kv_heads, size = own.num_kv_heads, own.head_dim
        self.caches = [self.drawn(NUM_BLOCKS, kv_heads, BLOCK_SIZE, 2 * size) for _ in range(2)]
        self.block_table = torch.randperm(NUM_BLOCKS, generator=self.draw)[:15].view(3, 5).int()
        self.tables = SlotTables(GEOMETRY, 3)
        output, rest = ((PROMPT_LEN, 1 << 62),), ((1, 2), (4, 1 << 62))
        self.sequences = [
            self.sequence(0, 4, 9, (0,), output),
            self.sequence(1, 0, 16, (0, 1), rest),
            self.sequence(2, 3, 5, (1,), output, scaled=True),
        ]

    def drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draw)

    def sequence(
        self, index: int, row: int, position: int, layers: Any, history: Any, scaled: bool = False
    ) -> Sequence:
        past = []
        for cache in self.caches:
            key, value = cache_rows(cache, self.block_table[index : index + 1].long())
            key, value = key[0].permute(2, 0, 1)[:position], value[0].transpose(0, 1)[:position]
            past.append((key.clone(), value.clone()))
        scale = 2.0 * self.drawn(2, HEADS) if scaled else torch.ones(2, HEADS)
        return Sequence(row, position, layers, history, self.drawn(1, HIDDEN), past, scale)

    def forward(self, each: Sequence) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """By vLLM's modules: what each layer computed for the row, and the row's logits."""
        x, found = each.stream, []
        for index, layer in enumerate(self.layers):
            attention, group = layer.self_attn, HEADS // layer.self_attn.num_kv_heads
            sizes = [attention.q_size, attention.kv_size, attention.kv_size]
            normed = layer.input_layernorm.forward_native(x)
            query, key, value = (
                part.view(1, -1, attention.head_dim)
                for part in attention.qkv_proj(normed)[0].split(sizes, dim=-1)
            )
            if hasattr(attention, "q_norm"):
                query = attention.q_norm.forward_native(query)
                key = attention.k_norm.forward_native(key)
            position = torch.tensor([each.position])
            rotated = attention.rotary_emb.forward_native(
                position, query.flatten(1), key.flatten(1)
            )
            query, key = rotated[0].view(query.shape), rotated[1].view(key.shape)
            keys = torch.cat([each.past[index][0], key]).repeat_interleave(group, dim=1)
            values = torch.cat([each.past[index][1], value]).repeat_interleave(group, dim=1)
            logits = torch.einsum("hd,jhd->hj", query[0], keys) * attention.scaling
            weights = logits.softmax(-1)
            mixed = torch.einsum("hj,jhd->hd", weights, values) * each.scale[index][:, None]
            step = {"stream": x, "query": query, "key": key, "value": value, "output": mixed[None]}
            found.append({**step, "weights": weights})
            added = attention.o_proj(mixed.view(1, -1))[0]
            before_mlp = layer.post_attention_layernorm
            if hasattr(layer, "pre_feedforward_layernorm"):
                added = layer.post_attention_layernorm.forward_native(added)
                before_mlp = layer.pre_feedforward_layernorm
            x = x + added
            inner = layer.mlp.gate_up_proj(before_mlp.forward_native(x))[0]
            added = layer.mlp.down_proj(layer.mlp.act_fn.forward_native(inner))[0]
            if hasattr(layer, "post_feedforward_layernorm"):
                added = layer.post_feedforward_layernorm.forward_native(added)
            x = x + added
        x = self.model.model.norm.forward_native(x)
        return found, self.model.logits_processor(self.model.lm_head, x)[0]

    def expected(self, index: int) -> torch.Tensor:
        """The saliencies of a sequence's candidates by autograd, [num_candidates]."""
        each = self.sequences[index]
        with torch.enable_grad():
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)
            steps, logits = self.forward(each)
            targets = [steps[layer]["weights"] for layer in each.layers]
            losses = -logits.log_softmax(-1)[CANDIDATES[index]]
            grads = [torch.autograd.grad(loss, targets, retain_graph=True) for loss in losses]
        position = torch.arange(each.position + 1)
        counted = torch.zeros(len(position), dtype=torch.bool)
        for start, stop in each.history:
            counted |= (position >= start) & (position < stop)
        rows = torch.stack([
            torch.stack([(w * g).abs().sum(0) for w, g in zip(targets, grad, strict=True)])
            for grad in grads
        ])  # fmt: skip
        return (rows / rows.norm(dim=-1, keepdim=True))[..., counted].mean(-1).mean(-1).detach()

    @torch.no_grad()
    def way_back(self, split_stream: bool) -> SaliencyPass:
        """The pass over a tape filled as by a step; split_stream: the residual comes apart."""
        rows = []
        for index, each in enumerate(self.sequences):
            slot = -1
            if not torch.equal(each.scale, torch.ones(2, HEADS)):
                words = HeadWords.identity(GEOMETRY)
                words.table[..., HeadField.SCALE] = each.scale.numpy()
                slot = self.tables.acquire(words)
            at = each.row, index, each.position, PROMPT_LEN, slot, -1
            rows.append(SaliencyRow(str(index), *at, each.layers, each.history))
        positions = torch.tensor([each.position for each in self.sequences])
        tape = SaliencyTape(self.tables, tuple(rows), positions, no_slot_tags)
        passes = [self.forward(each) for each in self.sequences]
        for layer, cache in enumerate(self.caches):
            size = cache.shape[-1] // 2
            stream, query = self.drawn(5, HIDDEN), self.drawn(5, HEADS, size)
            output = self.drawn(5, HEADS, size)
            for index, (each, (steps, _)) in enumerate(zip(self.sequences, passes, strict=True)):
                step = steps[layer]
                stream[each.row], query[each.row] = step["stream"][0], step["query"][0]
                output[each.row] = step["output"][0]
                block = int(self.block_table[index, each.position // BLOCK_SIZE])
                halves = cache[block].view(cache.shape[1], 2, -1)
                offset = each.position % BLOCK_SIZE
                halves[:, 0].view(-1, size, BLOCK_SIZE)[:, :, offset] = step["key"][0]
                halves[:, 1].view(-1, BLOCK_SIZE, size)[:, offset] = step["value"][0]
            residual = self.drawn(5, HIDDEN) if split_stream else None
            tape.keep_stream(layer, stream if residual is None else stream - residual, residual)
            scaling = self.layers[layer].self_attn.scaling
            nothing = torch.empty(0)
            tape.keep_attention(
                layer,
                AttentionCall(
                    query, cache, output, self.block_table, nothing, nothing, nothing,
                    scaling, 0.0, -1,
                ),
            )  # fmt: skip
        assert tape.error is None
        logits = torch.stack([logits for _, logits in passes])
        return SaliencyPass(self.decoder, tape, logits, torch.float32)


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[VllmConfig]:
    with one_rank() as config:
        yield config


@pytest.mark.parametrize("split_stream", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_saliencies_are_those_of_autograd(kind, split_stream, vllm_config):
    case = Case(kind, vllm_config)
    way_back = case.way_back(split_stream)
    want = torch.stack([case.expected(index) for index in range(3)])
    assert (want[:, :1] != want[:, 1:]).any()
    with torch.no_grad():
        together = way_back.saliencies(torch.arange(3), CANDIDATES)
        torch.testing.assert_close(together, want, atol=1e-5, rtol=1e-3)
        for chosen in ([2], [1, 0]):
            some = way_back.saliencies(torch.tensor(chosen), CANDIDATES[chosen])
            torch.testing.assert_close(some, together[chosen], atol=1e-6, rtol=1e-5)


def test_a_row_without_history_has_no_saliency(vllm_config):
    case = Case("llama", vllm_config)
    case.sequences[1].history = ((17, 1 << 62),)
    way_back = case.way_back(True)
    with torch.no_grad():
        found = way_back.saliencies(torch.arange(3), CANDIDATES)
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()


def test_what_went_wrong_in_the_forward_pass_is_raised(vllm_config):
    way_back = Case("llama", vllm_config).way_back(False)
    del way_back.tape.records[1]
    with pytest.raises(KeyError, match="1"):
        way_back.saliencies(torch.arange(1), CANDIDATES[:1])
    way_back.tape.keep_stream(1, torch.zeros(2, HIDDEN), None)
    with pytest.raises(IndexError):
        way_back.saliencies(torch.arange(1), CANDIDATES[:1])
