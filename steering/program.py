"""A compiled steering program: what the engine does for one request, free of method names.

A program says what to edit (head words, residual edits), where (query scopes, key classes), what
to let through (sampling gate) and what to read (readouts). Methods compile to programs and
programs compose; the engine knows programs only.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from headway.steering.artifacts import ResidualArtifact
from headway.steering.head_words import HeadWords, KeyTag

FINGERPRINT_VERSION = b"headway-program-3"
"""Part of every fingerprint; raised when the meaning of a field changes."""


class QueryScope(StrEnum):
    """Which query positions an edit applies to: a rule on absolute positions, never on steps."""

    ALL = "all"
    AFTER_IMAGE = "after_image"  # text after the first image, in prompt and output
    OUTPUT = "output"  # positions >= prompt length
    FROM_LAST_PROMPT_TOKEN = "from_last_prompt_token"  # positions >= prompt length - 1


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """Head words over one query scope."""

    words: HeadWords
    scope: QueryScope = QueryScope.ALL


@dataclass(frozen=True)
class SinkRule:
    """Which prompt tokens carry the tag SINK, decided layer by layer when they are computed.

    A token is a sink of a layer if max over `dims` of |x[d]| / sqrt(mean x^2) >= tau, x being the
    residual stream that enters the layer (VAR, arXiv 2503.03321).
    """

    dims: tuple[int, ...]
    tau: float


class ResidualSite(StrEnum):
    """Where in a decoder layer the residual stream is read and edited."""

    BLOCK_INPUT = "block_input"
    AFTER_ATTENTION = "after_attention"  # before the norm of the MLP
    BLOCK_OUTPUT = "block_output"  # after the MLP: what enters the next layer, or the final norm


class ResidualForm(StrEnum):
    """What an edit does to a row h, v being its direction."""

    RMS = "rms"  # h += strength * rms(h) * v
    ADD = "add"  # h += strength * v
    REMOVE = "remove"  # h -= strength * (h . v) / (v . v) * v


@dataclass(frozen=True)
class ResidualEdit:
    """An edit of the residual stream in one layer.

    v is a direction of a `ResidualArtifact`, named by its digest: the one that its probe picks for
    the row, or that of `cluster`.
    """

    layer: int
    artifact: str
    strength: float
    scope: QueryScope = QueryScope.FROM_LAST_PROMPT_TOKEN
    cluster: int | None = None
    site: ResidualSite = ResidualSite.BLOCK_INPUT
    form: ResidualForm = ResidualForm.RMS

    @property
    def point(self) -> int:
        """Where that is, counted through the model: see `num_points`."""
        return 2 * self.layer + POINT_IN_LAYER[self.site]

    def __post_init__(self) -> None:
        """Raises ValueError for a strength that is not finite."""
        if not math.isfinite(self.strength):
            raise ValueError(f"a residual edit of strength {self.strength}")


POINT_IN_LAYER = {
    ResidualSite.BLOCK_INPUT: 0,
    ResidualSite.AFTER_ATTENTION: 1,
    ResidualSite.BLOCK_OUTPUT: 2,
}


def num_points(num_layers: int) -> int:
    """Points of a model where the residual stream can be edited.

    Point 2 l is where it enters layer l, 2 l + 1 where it leaves the attention of layer l; the last
    one, 2 * num_layers, is where it leaves the last layer.
    """
    return 2 * num_layers + 1


@dataclass(frozen=True)
class HeadSelection:
    """Heads that the engine chooses by the prompt, then scales at all positions.

    In each of the layers, ascending, those heads whose output at the last prompt position differs
    most from that of the same prompt without its images; see `headway.kernels.head_selection`.
    reinforce_baseline: whether the prompt without images has its heads scaled too.
    """

    layers: tuple[int, ...]
    alpha: float
    reinforce_baseline: bool = False


@dataclass(frozen=True)
class SaliencyRule:
    """Which saliency belongs to a candidate for the token after position t.

    The mean over `layers` and over the history of sum_h |A[t, j] * dL/dA[t, j]|, divided by the L2
    norm of the sums over all keys j, with L = -log p(candidate). history: OUTPUT, the output
    positions <= t; AFTER_IMAGE, the positions <= t after the first image that hold no image.
    """

    layers: tuple[int, ...]
    history: QueryScope = QueryScope.OUTPUT


@dataclass(frozen=True)
class SamplingGate:
    """Refuse candidates whose saliency falls short (SGRS, arXiv 2601.20279).

    Candidates are drawn without replacement from the `top_k` most likely tokens, and taken if
    their saliency is at least alpha times the mean of those of the last `window` tokens taken.
    After `max_resample` draws the most salient of the `top_k` is taken.
    """

    alpha: float
    top_k: int
    max_resample: int
    window: int


class Readout(StrEnum):
    """What a request may ask to read instead of edit."""

    CLASS_MASSES = "class_masses"
    SALIENCY = "saliency"
    PROBES = "probes"  # what they read at the last prompt position; where an engine cannot: nothing


class Feature(StrEnum):
    """What a program needs from an engine; an engine states which of these it has."""

    HEAD_AFFINE = "head_affine"
    HEAD_SELECTION = "head_selection"
    ATTENTION_EDIT = "attention_edit"
    RESIDUAL_EDIT = "residual_edit"
    SAMPLING_GATE = "sampling_gate"
    READOUT = "readout"


@dataclass(frozen=True)
class ProbePoints:
    """Whose probes are read, for feedback: of which profile, and layer -> point of the model.

    profile: as `FoundProfile.reference` names it.
    """

    profile: str
    points: Mapping[int, int]


@dataclass(frozen=True)
class AppliedMethod:
    """What one method of the request really does, as reported back to the client.

    scope: the query positions it edits, None where it edits none; edits: whether its options
    change anything there (not a factor of 1, nor a strength of 0). attention_layers: layers whose
    attention weights it edits. chooses_heads: whether its heads are known only once the engine has
    chosen them. gates: whether it refuses candidates, which the engine counts. profile: digest
    (hex) of the vector profile that its vectors are from. probes: those that are read for feedback.
    """

    method: str
    details: dict[str, Any]
    scope: QueryScope | None = QueryScope.ALL
    attention_layers: int = 0
    chooses_heads: bool = False
    gates: bool = False
    profile: str | None = None
    probes: ProbePoints | None = None
    edits: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"method": self.method, **self.details}


@dataclass(frozen=True, eq=False)
class SteeringProgram:
    """Everything the engine must do for one request. Immutable; compare by `fingerprint`."""

    head_edits: tuple[HeadEdit, ...] = ()
    sink_rule: SinkRule | None = None
    marks: tuple[Any, ...] = ()  # span selectors, whose tokens carry the tag EMPHASISED
    marks_param: str = ""  # where in the request they stand, for errors
    image_param: str = ""  # the first method that means nothing without an image, "" for none
    residual_edits: tuple[ResidualEdit, ...] = ()
    artifacts: tuple[ResidualArtifact, ...] = ()  # those that the residual edits name
    head_selection: HeadSelection | None = None
    selection_param: str = ""  # the method that selects heads, for errors
    saliency: SaliencyRule | None = None
    sampling_gate: SamplingGate | None = None
    readouts: tuple[Readout, ...] = ()
    applied: tuple[AppliedMethod, ...] = ()
    warnings: tuple[str, ...] = ()
    report: str = field(default="summary")

    @property
    def is_identity(self) -> bool:
        """Whether the engine need not know of it: it is served exactly as an unsteered one."""
        return (
            all(edit.words.is_identity for edit in self.head_edits)
            and not self.residual_edits
            and self.head_selection is None
            and self.saliency is None
        )

    @cached_property
    def scopes(self) -> tuple[QueryScope, ...]:
        """Of the head edits, then of the residual edits, then of the selection of heads."""
        scopes = [edit.scope for edit in self.head_edits]
        scopes += [edit.scope for edit in self.residual_edits]
        return (*scopes, *([QueryScope.ALL] if self.head_selection else []))

    def mentions(self, tag: KeyTag) -> bool:
        """Whether a key class of any edit asks for this tag."""
        return any(edit.words.mentions(tag).any() for edit in self.head_edits)

    @property
    def features(self) -> frozenset[Feature]:
        """What the engine must be able to do to run this program."""
        needs = set()
        for edit in self.head_edits:
            needs.add(Feature.HEAD_AFFINE if edit.words.is_affine else Feature.ATTENTION_EDIT)
        if self.residual_edits:
            needs.add(Feature.RESIDUAL_EDIT)
        if self.head_selection:
            needs.add(Feature.HEAD_SELECTION)
        if self.sampling_gate:
            needs.add(Feature.SAMPLING_GATE)
        if any(readout is not Readout.PROBES for readout in self.readouts):
            needs.add(Feature.READOUT)
        return frozenset(needs)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything that shapes the request's keys, values and tokens.

        Two requests that ask for the same edits in other words have the same fingerprint. What
        is only read or reported (readouts, applied, warnings, report level) is left out, and so are
        the artefacts, whose digests the edits name.
        """
        digest = hashlib.sha256(FINGERPRINT_VERSION)
        for edit in self.head_edits:
            digest.update(edit.scope.encode())
            for array in (edit.words.table, edit.words.shifts):
                digest.update(struct.pack("<4q", array.ndim, *_padded(array.shape)))
                # + 0.0 turns -0.0 into 0.0: the same edit must not have two fingerprints.
                digest.update(np.ascontiguousarray(array + np.float32(0.0)).tobytes())
        rest = (self.sink_rule, self.marks, self.residual_edits, self.sampling_gate)
        digest.update(repr(rest).encode())
        if self.sampling_gate is not None:
            digest.update(repr(self.saliency).encode())
        if self.head_selection is not None:
            digest.update(repr(self.head_selection).encode())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> SteeringProgram:
        # vLLM deep-copies sampling parameters per request; a program never changes.
        return self

    def __repr__(self) -> str:
        methods = ", ".join(applied.method for applied in self.applied)
        return f"SteeringProgram({methods or 'identity'}, {self.fingerprint[:12]})"


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, *(0,) * (3 - len(shape)))
