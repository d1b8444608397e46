"""Saliencies of the candidates for the tokens of a step (SGRS, arXiv 2601.20279).

For the row at position t and the loss L = -log p(candidate), at a target layer,

    S[j] = sum over heads of | w[h, j] * dL/dw[h, j] |,    S = S / ||S||_2 over all keys j <= t,

w being the weights with which the layer mixes values. The saliency of the candidate is the mean of
S over the history and over the target layers.

Keys and values of older positions do not depend on the row at t. What is differentiated is thus the
path of one token from the lowest target layer up, and the forward pass left what it was there
behind (`SaliencyTape`); where the model is compiled, all but what lies between attention and the
feed-forward layer, which is computed again. Going back is written out by hand, for all candidates
of all rows at once: with an automatic derivative the calls to make and to walk its graph would cost
as much as the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from headway.kernels.attention_rows import AttentionRows
from headway.kernels.row_gradients import Turn, gate_backward, turn_back
from headway.server.engine.decoder_parts import Decoder, DecoderLayer, HeadRows, turn_of
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
    _turns: dict[tuple[int, tuple[int, ...]], Turn] = field(default_factory=dict)

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
        grad = head.backward(self._head_rows.of(chosen), candidates)
        for index in range(last, self.tape.lowest - 1, -1):
            layer = self.decoder.layers[index]
            middle, gate_up = self._forward(layer, chosen)
            if index == last:
                stream = middle + self._feedforward(layer, gate_up)
                grad = head.norm.backward(stream, grad)
            grad = self._through_feedforward(layer, middle, gate_up, grad)
            rows, grad_output = self._through_output(layer, chosen, grad)
            if any(index in layers for layers in targets):
                counted = torch.tensor([float(index in layers) for layers in targets])
                total += counted[:, None] * _over_history(rows.saliency(grad_output), history)
            if index > self.tape.lowest:
                grad = grad + self._through_attention(layer, chosen, rows, grad_output)
        return torch.where(history.any(-1, keepdim=True), total / counts[:, None], torch.nan)

    @cached_property
    def _head_rows(self) -> HeadRows:
        return self.decoder.head.rows(self.logits)

    def _forward(
        self, layer: DecoderLayer, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream between attention and feed-forward layer, and the latter's gate and input.

        As the forward pass left them, or computed again: for all rows at once, since who refuses a
        candidate comes back for the others.
        """
        middles, gates = self.tape.middles, self.tape.gates
        if layer.index not in middles or layer.index not in gates:
            added = layer.output(self.tape.records[layer.index].output.flatten(1))
            if layer.after_attention is not None:
                added = layer.after_attention(added)
            middle = self.tape.streams[layer.index] + added
            middles[layer.index] = middle
            gates[layer.index] = layer.gate_up(layer.feedforward_norm(middle).to(self.dtype))
        middle, gate_up = middles[layer.index], gates[layer.index]
        return middle.index_select(0, chosen), gate_up.index_select(0, chosen)

    def _feedforward(self, layer: DecoderLayer, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        added = layer.down((layer.activation(gate) * up).to(self.dtype))
        return added if layer.after_feedforward is None else layer.after_feedforward(added)

    def _through_feedforward(
        self, layer: DecoderLayer, middle: torch.Tensor, gate_up: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated, added = layer.activation(gate), grad
        if layer.after_feedforward is not None:
            given = layer.down((activated * up).to(self.dtype))
            added = layer.after_feedforward.backward(given, grad)
        inner = gate_backward(layer.down.backward(added), up, activated, layer.slope(gate))
        taken = layer.gate_up.backward(inner)
        return grad + layer.feedforward_norm.backward(middle, taken)

    def _through_output(
        self, layer: DecoderLayer, chosen: torch.Tensor, grad: torch.Tensor
    ) -> tuple[AttentionRows, torch.Tensor]:
        """The rows' attention, and dL/dz of its output before scaling."""
        added = grad
        record = self.tape.records[layer.index]
        if layer.after_attention is not None:
            output = record.output.index_select(0, chosen).flatten(1)
            added = layer.after_attention.backward(layer.output(output), grad)
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
        stream = self.tape.streams[layer.index].index_select(0, chosen)
        turn = self._turn(layer, chosen)
        if layer.query_norm is None or layer.key_norm is None:
            taken = turn_back([(grad_query, turn), (grad_key, turn), (grad_value, None)])
        else:
            qkv = layer.qkv(layer.attention_norm(stream).to(self.dtype))
            sizes = [each.shape[2] * each.shape[3] for each in (grad_query, grad_key, grad_value)]
            inputs, parts = qkv.split(sizes, dim=-1), [grad_value.flatten(2)]
            for at, (norm, grad) in enumerate(
                ((layer.query_norm, grad_query), (layer.key_norm, grad_key))
            ):
                shape = grad.shape[2:]
                turned = turn_back([(grad, turn)]).unflatten(-1, shape)
                normed = norm.backward(inputs[at].unflatten(-1, shape), turned)
                parts.insert(at, normed.flatten(2))
            taken = torch.cat(parts, dim=-1)
        return layer.attention_norm.backward(stream, layer.qkv.backward(taken))

    def _turn(self, layer: DecoderLayer, chosen: torch.Tensor) -> Turn:
        key = id(layer.rotary), tuple(chosen.tolist())
        if key not in self._turns:
            positions = self.tape.positions.index_select(-1, chosen)
            self._turns[key] = turn_of(layer.rotary, positions, self.dtype)
        return self._turns[key]


def _over_history(saliency: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Mean over the history of rows of norm 1, float32 [num_rows, num_candidates].

    saliency: [num_rows, num_candidates, num_keys], zero beyond a row's end. A row of zeros stays
    zero: nothing that was attended to matters to the candidate.
    """
    norm = saliency.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    counted = (saliency / norm)[..., : history.shape[-1]] * history[:, None]
    return counted.sum(-1) / history.sum(-1, keepdim=True)
