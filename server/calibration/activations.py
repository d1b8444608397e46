"""What a transformers model computes at the end of prompts and of their continuations.

A continuation is tokenised by itself and follows the prompt's tokens, as generated tokens do. The
rows of a prompt and of its wanted continuation come from one run: later tokens do not change what
earlier ones see.

transformers symbols relied on: `PreTrainedModel.get_decoder`, the modules `self_attn.o_proj`,
`post_attention_layernorm` and `pre_feedforward_layernorm` of a decoder layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from headway.server.calibration import residual
from headway.server.calibration.head_outputs import output_projections
from headway.server.calibration.pairs import Pair
from headway.server.calibration.residual import decoder_layers
from headway.steering.program import ResidualSite

Span = tuple[int, int]
"""Positions first .. end - 1 of a text, over which rows are averaged."""

SITES = (ResidualSite.BLOCK_OUTPUT, ResidualSite.AFTER_ATTENTION)
"""Where in a decoder layer the stream can be read for a profile."""


class Reading(StrEnum):
    """Where a continuation is read.

    One answer word is read at its last token. Of a longer text that tells how it ends, a closing
    brace against an `end`, more than what it is, and directions of it steer little.
    """

    MEAN = "mean"  # at all of its tokens, on average
    LAST = "last"  # at its last token


@dataclass(frozen=True)
class Tap:
    """What enters a module (of_input), or what it returns: [batch, num_tokens, width]."""

    module: torch.nn.Module
    of_input: bool


@dataclass(frozen=True)
class PairRows:
    """Rows of all taps at the ends of prompts and in their continuations, float32.

    prompts: [num_pairs, num_taps, width], at the last token of the prompt. targets: the same, read
    in the wanted continuation. others: for each pair [num_others, num_taps, width], in the unwanted
    ones.
    """

    prompts: np.ndarray
    targets: np.ndarray
    others: tuple[np.ndarray, ...]

    @property
    def differences(self) -> np.ndarray:
        """d = h(prompt + target) - mean over the others of h(prompt + other), as `targets`."""
        return self.targets - np.stack([rows.mean(axis=0) for rows in self.others])


def stream_taps(model: Any, site: ResidualSite) -> list[Tap]:
    """The residual stream at a site of every decoder layer, in order.

    Raises ValueError for a model whose layers do not have the site.
    """
    layers = decoder_layers(model)
    if site is ResidualSite.BLOCK_OUTPUT:
        return [Tap(layer, of_input=False) for layer in layers]
    return [Tap(_mlp_norm(model, layer), of_input=True) for layer in layers]


def head_taps(model: Any) -> list[Tap]:
    """The outputs of all heads, side by side, of every decoder layer. Raises ValueError."""
    return [Tap(projection, of_input=True) for projection in output_projections(model)]


def pair_rows(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    taps: Sequence[Tap],
    reading: Reading,
    batch_size: int,
) -> PairRows:
    """The rows of pairs. Raises ValueError for a text that the model has no positions for."""
    sequences: list[list[int]] = []
    spans: list[list[Span]] = []
    prompts = residual.tokenize(tokenizer, [pair.prompt for pair in pairs])
    for pair, prompt in zip(pairs, prompts, strict=True):
        for continuation in (pair.target, *pair.others):
            added = tokenizer(continuation, add_special_tokens=False)["input_ids"]
            sequences.append([*prompt, *added])
            end = len(sequences[-1])
            first = len(prompt) if reading is Reading.MEAN else end - 1
            spans.append([(len(prompt) - 1, len(prompt)), (first, end)])
    found = iter(mean_rows(model, sequences, spans, taps, batch_size))
    wanted, others = [], []
    for pair in pairs:
        wanted.append(next(found))
        others.append(np.stack([next(found)[1] for _ in pair.others]))
    both = np.stack(wanted)
    return PairRows(both[:, 0], both[:, 1], tuple(others))


def mean_rows(
    model: Any,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Span]],
    taps: Sequence[Tap],
    batch_size: int,
) -> list[np.ndarray]:
    """Mean rows over the spans of each sequence: float32 [num_spans, num_taps, width] each.

    sequences: token ids, run `batch_size` at a time, those of like length together, padded on the
    right, where no token sees the padding. Raises ValueError for one that is too long.
    """
    _check_lengths(model, sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    found: dict[int, np.ndarray] = {}
    with tqdm(total=len(order), desc="activations", unit="text") as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            streams = _run(model, [sequences[index] for index in batch], taps)
            for row, index in enumerate(batch):
                means = [
                    torch.stack([stream[row, first:end].float().mean(dim=0) for stream in streams])
                    for first, end in spans[index]
                ]
                found[index] = torch.stack(means).numpy()
            progress.update(len(batch))
    return [found[index] for index in range(len(sequences))]


def _run(model: Any, batch: Sequence[Sequence[int]], taps: Sequence[Tap]) -> list[torch.Tensor]:
    """What every tap has for a batch: [batch, num_tokens, width] each, padding included."""
    longest = max(map(len, batch))
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(batch):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    seen: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), _observed(taps, seen):
        # Without the language model's head, whose logits nobody reads.
        model.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False)
    return [seen[index] for index in range(len(taps))]


@contextmanager
def _observed(taps: Sequence[Tap], seen: dict[int, torch.Tensor]) -> Iterator[None]:
    """Put into `seen` what each tap has, by its index."""

    def entering(index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leaving(index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        tap.module.register_forward_pre_hook(entering(index), with_kwargs=True)
        if tap.of_input
        else tap.module.register_forward_hook(leaving(index))
        for index, tap in enumerate(taps)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mlp_norm(model: Any, layer: torch.nn.Module) -> torch.nn.Module:
    """The norm before the MLP, which the stream enters after the attention. Raises ValueError."""
    before = getattr(layer, "pre_feedforward_layernorm", None)
    if before is None and not hasattr(layer, "post_feedforward_layernorm"):
        # Beside a norm of the MLP's output this name is that of the attention's.
        before = getattr(layer, "post_attention_layernorm", None)
    if not isinstance(before, torch.nn.Module):
        name = type(model).__name__
        raise ValueError(f"{name}: its layers have no norm between attention and MLP")
    return before


def _check_lengths(model: Any, sequences: Sequence[Sequence[int]]) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, sequences))
    if most is not None and longest > most:
        raise ValueError(f"a prompt with its continuation has {longest} tokens; at most {most}")
