"""Seam: vLLM's V1 sampler, where a sampling gate decides which candidate is taken.

vLLM symbols relied on: `vllm.v1.sample.sampler.Sampler.sample`, called with the logits after all
processors that can change the argmax, `apply_temperature`, and of its `SamplingMetadata`
`all_greedy`, `all_random`, `temperature`, `top_k`, `top_p`, `logitsprocs.argmax_invariant`;
`vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p_pytorch`; of the runner `sampler`.

vLLM samples all rows; those of gated requests are then replaced. Log-probabilities are thus the
model's own, as they are without a gate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from headway.server.engine.saliency import SaliencyPass
from headway.server.engine.saliency_tape import SaliencyTape
from headway.server.engine.sampling_gate import Gate
from headway.server.engine.steering_state import SteeringState

GREEDY_BELOW = 1e-5
"""Temperatures below this one mean that nothing is drawn; vLLM's own limit."""

AT_ONCE = 5
"""Most candidates whose saliencies are computed before any of them was asked for."""


@contextmanager
def gated_sampling(runner: Any, tape: SaliencyTape, logits: torch.Tensor) -> Iterator[None]:
    """Have the rows of a tape go through their gates when the runner samples.

    logits: [num_reqs, vocabulary], the model's own: nothing has been applied to them yet. A failure
    ends the gated requests of this step, and so does a sampler that was not asked.
    """
    steering, sampler = runner.steering, runner.sampler
    request_ids = [row.request_id for row in tape.rows]
    sequences = torch.tensor([row.sequence for row in tape.rows])
    original = sampler.sample
    raw = logits.index_select(0, sequences).float()
    asked, counted = False, tape.seconds

    def sample(logits: torch.Tensor, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked = True
        started = time.perf_counter()
        drawn: tuple[torch.Tensor, torch.Tensor] | None = None
        with steering.guard("sampling", request_ids):
            # vLLM changes the logits in place.
            drawn = _processed(sampler, logits, metadata, sequences)
        tape.seconds += time.perf_counter() - started
        sampled, logprobs = original(logits, metadata, *args, **kwargs)
        started = time.perf_counter()
        if drawn is not None:
            way_back = SaliencyPass(runner.decoder, tape, raw, runner.dtype)
            _replace(steering, way_back, drawn, sampled, sequences)
        tape.seconds += time.perf_counter() - started
        return sampled, logprobs

    sampler.sample = sample
    try:
        yield
    finally:
        del sampler.sample
        steering.step_seconds.observe(tape.seconds)
        steering.count_time(request_ids, tape.seconds - counted)
        if not asked:
            with steering.guard("sampling", request_ids):
                raise RuntimeError("tokens were sampled without the gate")


def _replace(
    steering: SteeringState,
    way_back: SaliencyPass,
    drawn: tuple[torch.Tensor, torch.Tensor],
    sampled: torch.Tensor,
    sequences: torch.Tensor,
) -> None:
    """Write what the gates take into `sampled`; where something fails, find whose fault it is."""

    def take(indices: Sequence[int]) -> None:
        gates = [steering.gates.of_request[rows[index].request_id] for index in indices]
        step = GatedStep(way_back, indices, gates, *drawn)
        places = sequences[list(indices)]
        sampled[places] = step.take(sampled[places]).to(sampled.dtype)

    rows = way_back.tape.rows
    try:
        take(range(len(rows)))
    except Exception:
        for index, row in enumerate(rows):
            with steering.guard("sampling", [row.request_id]):
                take([index])


def _processed(
    sampler: Any, logits: torch.Tensor, metadata: Any, sequences: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that some rows are drawn from, float32, and whether a row is not drawn at all."""
    own = logits.index_select(0, sequences)
    if metadata.all_greedy:
        return own, torch.ones(len(own), dtype=torch.bool)
    whole = sampler.apply_temperature(logits.clone(), metadata.temperature, metadata.all_random)
    for processor in metadata.logitsprocs.argmax_invariant:
        whole = processor.apply(whole)
    top_k, top_p = (
        None if each is None else each[sequences] for each in (metadata.top_k, metadata.top_p)
    )
    drawn = apply_top_k_top_p_pytorch(
        whole.index_select(0, sequences), top_k, top_p, allow_cpu_sync=True
    )
    greedy = metadata.temperature[sequences] < GREEDY_BELOW
    return torch.where(greedy[:, None], own, drawn), greedy


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, list[int]]:
    """The highest of some logits, descending, and their tokens; none that is excluded.

    Of equals the lowest token comes first, as where vLLM samples greedily; topk takes any.
    """
    row = logits.numpy()
    least = torch.topk(logits, min(count, len(logits))).values[-1].item()
    tokens = np.flatnonzero((row >= least) & (row > -np.inf))
    tokens = tokens[np.argsort(-row[tokens], kind="stable")[:count]]
    return torch.from_numpy(row[tokens]), tokens.tolist()


class GatedStep:
    """The decisions of one step for some of its rows.

    indices: of the tape's rows; gates: theirs. processed: float32 [rows of the tape, vocabulary],
    the logits to draw from; greedy: bool [rows of the tape].
    """

    def __init__(
        self,
        saliencies: SaliencyPass,
        indices: Sequence[int],
        gates: list[Gate],
        processed: torch.Tensor,
        greedy: torch.Tensor,
    ) -> None:
        self.saliencies = saliencies
        self.indices = torch.tensor(indices)
        self.gates = gates
        self.rows = [saliencies.tape.rows[index] for index in indices]
        self.greedy = greedy[self.indices].tolist()
        self.tokens: list[list[int]] = []
        self.order: list[list[int]] = []
        self.known: list[list[float | None]] = []
        self._processed = processed[self.indices]

    def take(self, sampled: torch.Tensor) -> torch.Tensor:
        """The token of each row, int64 [num_rows]; sampled: what vLLM would take.

        The candidates are drawn one after the other, and most rows take the first: the others'
        saliencies are computed only for those rows that refuse it. With few rows all are computed
        at once, which takes as long as one.
        """
        taken: list[int | None] = [None] * len(self.rows)
        for index in range(len(self.rows)):
            self._candidates(index, int(sampled[index]))
        every = [range(len(tokens)) for tokens in self.tokens]
        at_once = sum(len(each) for each in every) <= AT_ONCE
        wanted: Sequence[Sequence[int]] = every if at_once else [each[:1] for each in self.order]
        while True:
            self._compute(wanted)
            for index, each in enumerate(taken):
                if each is None:
                    taken[index] = self._decide(index)
            if None not in taken:
                return torch.tensor(taken)
            wanted = [() if each is not None else every[at] for at, each in enumerate(taken)]

    def _candidates(self, index: int, sampled: int) -> None:
        gate, row = self.gates[index], self.rows[index]
        if gate.rule is None:
            tokens, order = [sampled], [0]
        else:
            values, tokens = _likeliest(self._processed[index], gate.rule.top_k)
            shares = torch.softmax(values, dim=-1).double().numpy()
            order = gate.order(shares, row.position + 1, self.greedy[index])
        has_history = any(start <= row.position for start, _ in row.history)
        self.tokens.append(tokens)
        self.order.append(order)
        # What has no probability is no candidate, and what has no history has no saliency.
        self.known.append(
            [None if has_history and at in order else np.nan for at in range(len(tokens))]
        )

    def _compute(self, wanted: Sequence[Sequence[int]]) -> None:
        """Saliencies of the candidates with these indices, as far as they are unknown."""
        wanted = [
            [at for at in each if self.known[index][at] is None]
            for index, each in enumerate(wanted)
        ]
        chosen = [index for index, each in enumerate(wanted) if each]
        if not chosen:
            return
        most = max(len(wanted[index]) for index in chosen)
        # Rows with fewer candidates repeat their last.
        padded = [
            [self.tokens[index][at] for at in wanted[index]]
            + [self.tokens[index][wanted[index][-1]]] * (most - len(wanted[index]))
            for index in chosen
        ]
        rows = self.indices[chosen]
        found = self.saliencies.saliencies(rows, torch.tensor(padded)).tolist()
        for index, values in zip(chosen, found, strict=True):
            for at, value in zip(wanted[index], values, strict=False):
                if not np.isfinite(value):
                    raise FloatingPointError(f"a saliency of {value}")
                self.known[index][at] = value

    def _decide(self, index: int) -> int | None:
        gate, position = self.gates[index], self.rows[index].position + 1
        if gate.rule is None:
            token, saliency = self.tokens[index][0], self.known[index][0]
            assert saliency is not None
            gate.read(position, token, saliency)
            return token
        accepted = gate.decide(position, self.tokens[index], self.order[index], self.known[index])
        return None if accepted is None else accepted.token_id
