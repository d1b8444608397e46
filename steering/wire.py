"""A program as the plain values that cross the process boundary to the workers.

Only what changes the computation travels, and sparse: the words that are not the identity, as
little-endian bytes. The engine's MessagePack transport carries bytes as they are.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import IDENTITY_WORD, HeadWords
from headway.steering.positions import PromptFacts
from headway.steering.program import (
    HeadEdit,
    HeadSelection,
    QueryScope,
    Readout,
    ResidualEdit,
    SaliencyRule,
    SamplingGate,
    SinkRule,
    SteeringProgram,
)


def encode_program(program: SteeringProgram) -> dict[str, Any]:
    """Plain values (str, int, bytes, list, dict) for `decode_program`."""
    return {
        "fingerprint": program.fingerprint,
        "head_edits": [_encode_edit(edit) for edit in program.head_edits],
        "residual_edits": [asdict(edit) for edit in program.residual_edits],
        "head_selection": asdict(program.head_selection) if program.head_selection else None,
        "sink_rule": asdict(program.sink_rule) if program.sink_rule else None,
        "saliency": _encode_saliency(program.saliency),
        "sampling_gate": asdict(program.sampling_gate) if program.sampling_gate else None,
        "readouts": [str(readout) for readout in program.readouts],
    }


def decode_program(wire: dict[str, Any], geometry: ModelGeometry) -> SteeringProgram:
    """The part of an encoded program that the workers carry out, for the model of `geometry`.

    Raises ValueError, KeyError or IndexError if the values do not fit the model.
    """
    rule = wire["sink_rule"]
    if rule is not None:
        rule = SinkRule(tuple(int(dim) for dim in rule["dims"]), float(rule["tau"]))
        if not all(0 <= dim < geometry.hidden_size for dim in rule.dims):
            raise ValueError(f"sink dimensions {rule.dims} of {geometry.hidden_size}")
    saliency = _decode_saliency(wire["saliency"], geometry)
    readouts = tuple(Readout(name) for name in wire["readouts"])
    if saliency is None and (wire["sampling_gate"] is not None or Readout.SALIENCY in readouts):
        raise ValueError("a program that needs a saliency and does not say which")
    return SteeringProgram(
        head_edits=tuple(_decode_edit(edit, geometry) for edit in wire["head_edits"]),
        residual_edits=tuple(_decode_residual(edit, geometry) for edit in wire["residual_edits"]),
        head_selection=_decode_selection(wire["head_selection"], geometry),
        sink_rule=rule,
        saliency=saliency,
        sampling_gate=_decode_gate(wire["sampling_gate"]),
        readouts=readouts,
    )


def _decode_residual(wire: dict[str, Any], geometry: ModelGeometry) -> ResidualEdit:
    edit = ResidualEdit(**{**wire, "scope": QueryScope(wire["scope"])})
    if not 0 <= edit.layer < geometry.num_layers:
        raise ValueError(f"a residual edit of layer {edit.layer} of {geometry.num_layers}")
    return edit


def _decode_selection(wire: dict[str, Any] | None, geometry: ModelGeometry) -> HeadSelection | None:
    if wire is None:
        return None
    layers = tuple(sorted(int(layer) for layer in wire["layers"]))
    if not layers or not 0 <= layers[0] <= layers[-1] < geometry.num_layers:
        raise ValueError(f"a selection of heads in layers {layers} of {geometry.num_layers}")
    return HeadSelection(layers, float(wire["alpha"]), bool(wire["reinforce_baseline"]))


def _encode_saliency(rule: SaliencyRule | None) -> dict[str, Any] | None:
    if rule is None:
        return None
    return {"layers": list(rule.layers), "history": str(rule.history)}


def _decode_saliency(wire: dict[str, Any] | None, geometry: ModelGeometry) -> SaliencyRule | None:
    if wire is None:
        return None
    rule = SaliencyRule(tuple(int(layer) for layer in wire["layers"]), QueryScope(wire["history"]))
    distinct = sorted(set(rule.layers))
    if not distinct or list(rule.layers) != distinct:
        raise ValueError(f"a saliency of layers {rule.layers}, which do not ascend")
    if not 0 <= distinct[0] <= distinct[-1] < geometry.num_layers:
        raise ValueError(f"a saliency of layers {rule.layers} of {geometry.num_layers}")
    if rule.history not in (QueryScope.OUTPUT, QueryScope.AFTER_IMAGE):
        raise ValueError(f"a saliency over {rule.history}")
    return rule


def _decode_gate(wire: dict[str, Any] | None) -> SamplingGate | None:
    if wire is None:
        return None
    gate = SamplingGate(
        float(wire["alpha"]), int(wire["top_k"]), int(wire["max_resample"]), int(wire["window"])
    )
    if not math.isfinite(gate.alpha) or gate.alpha < 0.0:
        raise ValueError(f"a sampling gate of alpha {gate.alpha}")
    if min(gate.top_k, gate.max_resample, gate.window) < 1:
        raise ValueError(f"a sampling gate with a count below 1: {gate}")
    return gate


def encode_facts(facts: PromptFacts) -> dict[str, Any]:
    """Plain values for `decode_facts`."""
    return asdict(facts)


def decode_facts(wire: dict[str, Any]) -> PromptFacts:
    """The facts of a prompt. Raises KeyError, TypeError or ValueError for other values."""
    ranges = {
        name: tuple((int(start), int(stop)) for start, stop in wire[name])
        for name in ("image_spans", "image_tokens", "marks")
    }
    return PromptFacts(int(wire["prompt_len"]), **ranges)


def _encode_edit(edit: HeadEdit) -> dict[str, Any]:
    layers, heads = np.nonzero(edit.words.edited)
    return {
        "scope": str(edit.scope),
        "layers": layers.astype("<i4").tobytes(),
        "heads": heads.astype("<i4").tobytes(),
        "words": edit.words.table[layers, heads].astype("<f4").tobytes(),
        "shifts": edit.words.shifts.astype("<f4").tobytes(),
    }


def _decode_edit(wire: dict[str, Any], geometry: ModelGeometry) -> HeadEdit:
    layers = np.frombuffer(wire["layers"], "<i4")
    heads = np.frombuffer(wire["heads"], "<i4")
    rows = np.frombuffer(wire["words"], "<f4").reshape(len(layers), len(IDENTITY_WORD))
    if len(layers) and (layers.min() < 0 or heads.min() < 0):
        raise ValueError("negative layer or head in an encoded program")
    shifts = np.frombuffer(wire["shifts"], "<f4").reshape(-1, geometry.head_size)
    words = HeadWords.identity(geometry)
    words.table[layers, heads] = rows
    return HeadEdit(HeadWords(words.table, shifts), QueryScope(wire["scope"]))
