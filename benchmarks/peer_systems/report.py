"""What `headway bench peers` found, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import fmean
from typing import Any

from headway.benchmarks.engine import server_settings
from headway.benchmarks.environment import cpu_warnings, environment
from headway.benchmarks.peer_systems.environments import version_of
from headway.benchmarks.peer_systems.headway_server import NAME as HEADWAY
from headway.benchmarks.peer_systems.properties import PROPERTIES
from headway.benchmarks.peer_systems.protocol import Peer
from headway.benchmarks.peer_systems.worker_process import SETTINGS
from headway.benchmarks.statistics import paired_ratio

Key = tuple[str, str]
"""A system and a method."""


@dataclass
class Measurement:
    """Output tokens per second of each system and method, round by round, and what was tried.

    properties, notes: of each as well. unavailable: peers that did not run, as the report has them.
    """

    speeds: dict[Key, list[float]] = field(default_factory=dict)
    properties: dict[Key, dict[str, str]] = field(default_factory=dict)
    notes: dict[Key, str] = field(default_factory=dict)
    unavailable: list[dict[str, str]] = field(default_factory=list)
    foreign_share: float = 0.0

    def lost(self, peer: Peer, methods: Sequence[str], reason: str, command: str) -> None:
        """Note that a peer does not run with these methods, why, and what was tried."""
        for method in methods:
            found = {"system": peer.name, "method": method, "reason": reason, "command": command}
            self.unavailable.append(found)
            self.speeds.pop((peer.name, method), None)


def report(
    measurement: Measurement,
    peers: Sequence[Peer],
    model: str,
    dtype: str,
    concurrency: int,
    rounds: int,
) -> dict[str, Any]:
    """Everything that was measured and what follows from it, as JSON values.

    What was tried and never measured, since no peer was left to compare it with, has no row.
    """
    versions = {HEADWAY: version("headway")} | {peer.name: version_of(peer) for peer in peers}
    return {
        "benchmark": "peers",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "model": model,
        "dtype": dtype,
        "rounds": rounds,
        "server_settings": server_settings(),
        "peer_settings": SETTINGS,
        "warnings": cpu_warnings(measurement.foreign_share),
        "rows": [
            {
                "system": name,
                "version": versions[name],
                "method": method,
                "concurrency": concurrency,
            }
            | compared(measurement, name, method)
            for (name, method), speeds in measurement.speeds.items()
            if speeds
        ],
        "unavailable": measurement.unavailable,
    }


def compared(measurement: Measurement, name: str, method: str) -> dict[str, Any]:
    """Mean speeds of a system and of Headway, and Headway's relative to it, None for itself.

    runs: the system's in each round.
    """
    theirs, ours = measurement.speeds[name, method], measurement.speeds[HEADWAY, method]
    ratio = None if name == HEADWAY else paired_ratio(ours, theirs)
    return {
        "tokens_per_second": fmean(theirs),
        "headway_tokens_per_second": fmean(ours),
        "ratio": ratio and ratio.value,
        "low": ratio and ratio.low,
        "high": ratio and ratio.high,
        "runs": theirs,
        "properties": measurement.properties[name, method],
        "notes": measurement.notes[name, method],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people: speeds, then properties, then what could not run."""
    facts = result["environment"]
    head = f"{'method':<11} {'system':<20} {'tokens/s':>9}"
    lines = ["", f"{head} {'Headway / it':>13} {'95 % interval':>19}"]
    rows = sorted(result["rows"], key=lambda row: row["method"])
    for row in rows:
        line = f"{row['method']:<11} {row['system']:<20} {row['tokens_per_second']:>9.2f}"
        if row["ratio"] is not None:
            interval = f"{row['low']:.2f} .. {row['high']:.2f}"
            line += f" {row['ratio']:>13.2f} {interval:>19}"
        lines.append(line)
    head = f"{'method':<11} {'system':<20}"
    lines += ["", head + "".join(f" {name:<14}" for name in PROPERTIES).rstrip()]
    for row in rows:
        found = "".join(f" {row['properties'][name]:<14}" for name in PROPERTIES)
        lines.append(f"{row['method']:<11} {row['system']:<20}{found}".rstrip())
    lines += [""]
    lines += [f"{row['system']}, {row['method']}: {row['notes']}" for row in rows]
    for row in result["unavailable"]:
        lines.append(f"unavailable: {row['system']}, {row['method']}: {row['reason']}")
        lines.append(f"    tried: {row['command']}")
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    lines += ["", f"{result['rounds']} rounds; {packages}; commit {facts['commit']}"]
    lines += [
        f"{result['model']}, {result['dtype']}; {facts['cpu']}, {facts['usable_threads']} threads"
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result["warnings"])])
