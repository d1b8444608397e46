"""Saliencies of the candidates for the tokens of a step (SGRS, arXiv 2601.20279).

For the row at position t and the loss L = -log p(candidate), at a target layer,

    S[j] = sum over heads of | w[h, j] * dL/dw[h, j] |,    S = S / ||S||_2 over all keys j <= t,

w being the weights with which the layer mixes values. The saliency of the candidate is the mean of
S over the history and over the target layers.

Keys and values of older positions do not depend on the row at t. What is differentiated is thus the
path of one token from the lowest target layer up, and the forward pass left all of it behind but
what lies between attention and the feed-forward layer (`SaliencyTape`). Going back is written out
by hand, for all candidates of all rows at once: with an automatic derivative the calls to make and
to walk its graph would cost as much as the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from headway.kernels.attention_rows import AttentionRows
from headway.server.engine.decoder_parts import Decoder, DecoderLayer, Rotation
from headway.server.engine.saliency_tape import SaliencyTape


@dataclass
class SaliencyPass:
    """The way back through one step.

    logits: float32 [num_rows, vocabulary] of the rows of the tape, the model's own. dtype: of the
    model's activations.
    """

    decoder: Decoder
    tape: SaliencyTape
    logits: torch.Tensor
    dtype: torch.dtype
    _rotations: dict[tuple[int, tuple[int, ...]], Rotation] = field(default_factory=dict)
    _middles: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def saliencies(self, chosen: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Of some rows' candidates, float32 [num_rows, num_candidates]; NaN without history.

        chosen: int64 [num_rows], indices of the tape's rows; candidates: int64 [num_rows,
        num_candidates], token ids. What a row gets does not depend on what else is asked.
        Raises KeyError if the forward pass left a layer out.
        """
        if self.tape.error is not None:
            raise self.tape.error
        history = self.tape.history(chosen)
        targets = [set(self.tape.rows[index].layers) for index in chosen.tolist()]
        counts = torch.tensor([len(layers) for layers in targets], dtype=torch.float32)
        total = torch.zeros(candidates.shape)
        last = max(self.decoder.layers)
        head = self.decoder.head
        grad = head.backward(self.logits.index_select(0, chosen), candidates)
        for index in range(last, self.tape.lowest - 1, -1):
            layer = self.decoder.layers[index]
            middle, gate_up = self._forward(layer, chosen)
            if index == last:
                stream = middle + self._feedforward(layer, gate_up)
                grad = head.norm.backward(stream.unsqueeze(1), grad)
            grad = self._through_feedforward(layer, middle, gate_up, grad)
            rows, grad_output = self._through_output(layer, chosen, grad)
            if any(index in layers for layers in targets):
                counted = torch.tensor([float(index in layers) for layers in targets])
                total += counted[:, None] * _over_history(rows.saliency(grad_output), history)
            if index > self.tape.lowest:
                grad = grad + self._through_attention(layer, chosen, rows, grad_output)
        return torch.where(history.any(-1, keepdim=True), total / counts[:, None], torch.nan)

    def _forward(
        self, layer: DecoderLayer, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream between attention and feed-forward layer, and the latter's gate and input.

        Computed for all rows at once: who refuses a candidate comes back for the others.
        """
        if layer.index not in self._middles:
            added = layer.output(self.tape.records[layer.index].output.flatten(1))
            if layer.after_attention is not None:
                added = layer.after_attention(added)
            middle = self.tape.streams[layer.index] + added
            gate_up = layer.gate_up(layer.feedforward_norm(middle).to(self.dtype))
            self._middles[layer.index] = middle, gate_up
        middle, gate_up = self._middles[layer.index]
        return middle.index_select(0, chosen), gate_up.index_select(0, chosen)

    def _feedforward(self, layer: DecoderLayer, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        added = layer.down((layer.activation(gate) * up).to(self.dtype))
        return added if layer.after_feedforward is None else layer.after_feedforward(added)

    def _through_feedforward(
        self, layer: DecoderLayer, middle: torch.Tensor, gate_up: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        gate, up = gate_up.unsqueeze(1).chunk(2, dim=-1)
        activated, added = layer.activation(gate), grad
        if layer.after_feedforward is not None:
            given = layer.down((activated * up).squeeze(1).to(self.dtype)).unsqueeze(1)
            added = layer.after_feedforward.backward(given, grad)
        inner = layer.down.backward(added)
        inner = torch.cat([inner * (up * layer.slope(gate)), inner * activated], dim=-1)
        taken = layer.gate_up.backward(inner)
        return grad + layer.feedforward_norm.backward(middle.unsqueeze(1), taken)

    def _through_output(
        self, layer: DecoderLayer, chosen: torch.Tensor, grad: torch.Tensor
    ) -> tuple[AttentionRows, torch.Tensor]:
        """The rows' attention, and dL/dz of its output before scaling."""
        added = grad
        record = self.tape.records[layer.index]
        if layer.after_attention is not None:
            output = record.output.index_select(0, chosen).flatten(1)
            added = layer.after_attention.backward(layer.output(output).unsqueeze(1), grad)
        grad_output = layer.output.backward(added).unflatten(-1, record.output.shape[1:])
        scale = self.tape.scale(layer.index, chosen)
        if scale is not None:
            grad_output = grad_output * scale
        return self.tape.attention(layer.index, chosen), grad_output

    def _through_attention(
        self,
        layer: DecoderLayer,
        chosen: torch.Tensor,
        rows: AttentionRows,
        grad_output: torch.Tensor,
    ) -> torch.Tensor:
        """What attention gives back to the stream that enters the layer."""
        grad_query, grad_key, grad_value = rows.vjp(grad_output)
        rotation = self._rotation(layer, chosen)
        grad_query, grad_key = rotation.backward(grad_query), rotation.backward(grad_key)
        stream = self.tape.streams[layer.index].index_select(0, chosen)
        if layer.query_norm is not None and layer.key_norm is not None:
            taken = layer.qkv(layer.attention_norm(stream).to(self.dtype)).unsqueeze(1)
            sizes = [each.shape[2] * each.shape[3] for each in (grad_query, grad_key, grad_value)]
            query, key, _ = taken.split(sizes, dim=-1)
            grad_query = layer.query_norm.backward(
                query.unflatten(-1, grad_query.shape[2:]), grad_query
            )
            grad_key = layer.key_norm.backward(key.unflatten(-1, grad_key.shape[2:]), grad_key)
        parts = [each.flatten(2) for each in (grad_query, grad_key, grad_value)]
        taken = layer.qkv.backward(torch.cat(parts, dim=-1))
        return layer.attention_norm.backward(stream.unsqueeze(1), taken)

    def _rotation(self, layer: DecoderLayer, chosen: torch.Tensor) -> Rotation:
        key = id(layer.rotary), tuple(chosen.tolist())
        if key not in self._rotations:
            positions = self.tape.positions.index_select(-1, chosen)
            self._rotations[key] = Rotation.of(layer.rotary, positions, self.dtype)
        return self._rotations[key]


def _over_history(saliency: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Mean over the history of rows of norm 1, float32 [num_rows, num_candidates].

    saliency: [num_rows, num_candidates, num_keys], zero beyond a row's end. A row of zeros stays
    zero: nothing that was attended to matters to the candidate.
    """
    norm = saliency.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    counted = (saliency / norm)[..., : history.shape[-1]] * history[:, None]
    return counted.sum(-1) / history.sum(-1, keepdim=True)
