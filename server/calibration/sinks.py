"""Finding the sink dimensions of a model (VAR, arXiv 2503.03321).

The rule. The first token of every text is an attention sink, and a few dimensions of its residual
stream x are then far larger than all others. The middle layers are num_layers // 4 .. num_layers -
num_layers // 4 - 1: sinks build up in the first layers and are taken back in the last. For a
prompt, the level of a dimension d is the median over the middle layers of |x[d]| / RMS(x) on the
first token, RMS(x) = sqrt(mean x^2), x entering the layer, without gain. In that prompt d stands
out if

  - its level is at least 100 times the median of the levels of all dimensions, and
  - its level is at least sqrt(hidden_size) / 4, so that d alone makes up a sixteenth of |x|^2.

d is a sink dimension if it stands out in at least three quarters of the prompts. Where more than
`max_dims` do, those of the highest mean level are taken. Large dimensions that all tokens share are
tens of times the median; published sink dimensions are hundreds to thousands of times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from headway.steering import ModelGeometry
from headway.steering.sinks import DimMeasurement, SinkProfile

TIMES_MEDIAN = 100.0
LEAST_SHARE = 1 / 16
AGREEMENT = 0.75


def middle_layers(num_layers: int) -> range:
    """The half of the layers around the middle."""
    return range(num_layers // 4, num_layers - num_layers // 4)


def first_token_levels(magnitudes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The level of each dimension in each prompt: float32 [num_prompts, hidden_size].

    magnitudes: |x[d]| / RMS(x), float32 [num_layers, num_tokens, hidden_size] per prompt.
    """
    middle = middle_layers(len(magnitudes[0]))
    first = (prompt[middle.start : middle.stop, 0] for prompt in magnitudes)
    return torch.stack([levels.quantile(0.5, dim=0) for levels in first])


def select_dims(levels: torch.Tensor, max_dims: int) -> tuple[int, ...]:
    """The sink dimensions by the rule above, ascending; levels: [num_prompts, hidden_size]."""
    least = math.sqrt(levels.shape[1] * LEAST_SHARE)
    medians = levels.quantile(0.5, dim=1, keepdim=True)
    stands_out = (levels >= TIMES_MEDIAN * medians) & (levels >= least)
    agreed = stands_out.float().mean(dim=0) >= AGREEMENT
    mean = levels.mean(dim=0).where(agreed, torch.tensor(0.0))
    strongest = mean.topk(min(max_dims, int(agreed.sum()))).indices
    return tuple(sorted(strongest.tolist()))


def explain_none(levels: torch.Tensor) -> str:
    """Why `select_dims` found none: how far the strongest dimension is from standing out."""
    level, dim = levels.mean(dim=0).max(dim=0)
    times = level / levels.quantile(0.5, dim=1).mean().clamp_min(1e-30)
    least = math.sqrt(levels.shape[1] * LEAST_SHARE)
    return (
        f"no sink dimension found: the strongest, {int(dim)}, has on the first token "
        f"{float(level):.2f} of the RMS and {float(times):.0f} times the median of all dimensions; "
        f"at least {least:.2f} and {TIMES_MEDIAN:.0f} times are needed in {AGREEMENT:.0%} of the "
        "prompts"
    )


def make_profile(
    magnitudes: Sequence[torch.Tensor],
    dims: Sequence[int],
    tau: float,
    geometry: ModelGeometry,
) -> SinkProfile:
    """The profile of a model with these sink dimensions; magnitudes as for `first_token_levels`.

    Raises ValueError if no prompt has a second token to compare with.
    """
    phi = [prompt[:, :, list(dims)] for prompt in magnitudes]
    first = torch.stack([prompt[:, 0] for prompt in phi]).mean(dim=0)
    others = torch.cat([prompt[:, 1:] for prompt in phi], dim=1)
    if not others.shape[1]:
        raise ValueError("no prompt has more than one token")
    other = others.median(dim=1).values
    is_sink = torch.cat([(prompt >= tau).any(dim=0) for prompt in phi])
    return SinkProfile.of(
        geometry,
        dims=tuple(dims),
        tau=tau,
        num_prompts=len(phi),
        num_tokens=len(is_sink),
        sink_tokens=int(is_sink.any(dim=1).sum()),
        measurements=tuple(
            DimMeasurement(
                dim=dim,
                phi_first=_rounded(first[:, index]),
                phi_other=_rounded(other[:, index]),
                sink_tokens=int(is_sink[:, index].sum()),
            )
            for index, dim in enumerate(dims)
        ),
    )


def table(profile: SinkProfile) -> str:
    """The profile for people.

    phi first: mean over the middle layers; phi others: median over them of the layers' medians.
    """
    middle = middle_layers(profile.num_layers)
    layers_title = f"layers phi >= {profile.tau:g}"
    rows = [("dim", "phi first", "phi others", layers_title, "sinks")]
    for measured in profile.measurements:
        first = torch.tensor(measured.phi_first)[middle.start : middle.stop].mean()
        other = torch.tensor(measured.phi_other)[middle.start : middle.stop].quantile(0.5)
        reached = [i for i, phi in enumerate(measured.phi_first) if phi >= profile.tau]
        rows.append(
            (
                str(measured.dim),
                f"{float(first):.2f}",
                f"{float(other):.2f}",
                _ranges(reached),
                str(measured.sink_tokens),
            )
        )
    if len(profile.dims) > 1:
        rows.append(("any", "", "", "", str(profile.sink_tokens)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    title = (
        f"{profile.architecture}, {profile.num_layers} layers, hidden size {profile.hidden_size}: "
        f"{profile.num_tokens} tokens of {profile.num_prompts} prompts, middle layers "
        f"{middle.start} .. {middle.stop - 1}"
    )
    return "\n".join([title, *lines, *_warning(profile)])


def _warning(profile: SinkProfile) -> list[str]:
    if profile.sink_tokens:
        return []
    highest = max(max(measured.phi_first) for measured in profile.measurements)
    ceiling = math.sqrt(profile.hidden_size)
    return [
        f"At tau {profile.tau:g} no token is a sink: the first one has phi {highest:.2f} at most "
        f"(no token of this model can exceed {ceiling:.2f}). Steer with a smaller tau."
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: `2 .. 9, 12`, or `none`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spelled = (f"{low} .. {high}" if low < high else f"{low}" for low, high in runs)
    return ", ".join(spelled) or "none"


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values.tolist())
