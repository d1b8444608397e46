"""A program as the plain values that cross the process boundary to the workers.

Only what changes the computation travels, and sparse: the words that are not the identity, as
little-endian bytes. The engine's MessagePack transport carries bytes as they are.
"""

from __future__ import annotations

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
    return SteeringProgram(
        head_edits=tuple(_decode_edit(edit, geometry) for edit in wire["head_edits"]),
        residual_edits=tuple(_decode_residual(edit, geometry) for edit in wire["residual_edits"]),
        head_selection=_decode_selection(wire["head_selection"], geometry),
        sink_rule=rule,
        readouts=tuple(Readout(name) for name in wire["readouts"]),
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
