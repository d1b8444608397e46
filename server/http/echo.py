"""The `steering` object of an answer: what was really applied, as the workers account for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headway.server.engine.report import EngineReport
from headway.server.http.state import ResolvedSteering
from headway.server.registry.readings import ProfileReading
from headway.steering.program import AppliedMethod, Readout

SALIENCY_COUNTS = ("draws", "refusals", "fallbacks")
"""What is counted of the tokens of a sequence that a gate judges."""


def echo_of(
    steering: ResolvedSteering, report: EngineReport | None, readings: Mapping[int, ProfileReading]
) -> dict[str, Any]:
    """The object. report: None of steering that changes nothing. readings: by index of a method."""
    program, spec = steering.program, steering.spec
    echo: dict[str, Any] = {
        "fingerprint": program.fingerprint,
        "identity": program.is_identity,
        "methods": [
            _applied(applied, report, readings.get(index))
            for index, applied in enumerate(program.applied)
        ],
        "report": spec.report.level,
        "positions_edited": report.positions_edited if report else 0,
        "warnings": list(program.warnings),
    }
    if spec.preset is not None:
        echo["preset"] = spec.preset
    if report is not None:
        echo["positions_computed"] = report.positions_computed
        echo["sequences"] = report.sequences
        echo |= attention_echo(report.readings)
        if Readout.SALIENCY in program.readouts:
            gated = program.sampling_gate is not None
            echo["saliency"] = saliency_echo(report.saliency, gated)
    return echo


def positions_edited(applied: AppliedMethod, report: EngineReport | None) -> int:
    """How many positions a method edited."""
    if report is None or applied.scope is None or not applied.edits:
        return 0
    return report.by_scope.get(str(applied.scope), 0)


def _applied(
    applied: AppliedMethod, report: EngineReport | None, read: ProfileReading | None
) -> dict[str, Any]:
    """One method as it was carried out; heads that were chosen in place of how to choose."""
    echo = applied.as_dict()
    if applied.scope is not None:
        echo["positions_edited"] = positions_edited(applied, report)
    if applied.gates:
        # Of an identity (a gate that refuses nobody) nothing was drawn.
        counts = report.saliency if report else []
        echo |= {name: sum(each[name] for each in counts) for name in SALIENCY_COUNTS}
    if applied.chooses_heads and report is not None:
        echo["heads"] = report.heads
    if read is not None:
        picked = zip(read.reading.layers, read.reading.clusters, strict=True)
        echo["clusters"] = {str(layer): cluster for layer, cluster in picked}
    return echo


def saliency_echo(sequences: list[dict[str, Any]], gated: bool) -> list[list[dict[str, Any]]]:
    """What an answer shows of the saliency of its tokens: a list per sequence.

    Where a gate judged them also the threshold and how many candidates were drawn and refused.
    """
    names = ("position", "token_id", "saliency", "threshold", "draws", "refusals", "fallback")
    shown = names if gated else names[:3]
    echo = []
    for sequence in sequences:
        tokens = [dict(zip(names, token, strict=True)) for token in sequence["tokens"]]
        for token in tokens:
            token["fallback"] = bool(token["fallback"])
        echo.append([{name: token[name] for name in shown} for token in tokens])
    return echo


def attention_echo(readings: dict[str, Any] | None) -> dict[str, Any]:
    """What an answer shows of the masses that were read in the workers.

    image_centric_share: of the (query, head, layer) triples whose edit has a condition, the share
    where it held. class_masses: per (layer, head), the masses of the edit's class A, class B and
    of the image, at the last position and as the mean over the output positions.
    """
    echo: dict[str, Any] = {}
    if readings and readings["considered"]:
        echo["image_centric_share"] = readings["met"] / readings["considered"]
    if readings and readings["masses"]:
        names = ("class_a", "class_b", "image")
        echo["class_masses"] = [
            {
                "layer": layer,
                "head": head,
                "last": dict(zip(names, last, strict=True)),
                "output_mean": dict(zip(names, mean, strict=True)),
            }
            for layer, head, last, mean in sorted(readings["masses"])
        ]
    return echo
