"""Which peers are measured: those that were asked for, as far as they can run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headway.benchmarks.peer_systems.environments import Unavailable, python_of
from headway.benchmarks.peer_systems.protocol import Peer
from headway.benchmarks.peer_systems.report import Measurement


def selected(peers: Sequence[Peer], text: str) -> list[tuple[Peer, tuple[str, ...]]]:
    """Peers and those of their methods that have a text in "peer, method". Raises ValueError."""
    chosen = [
        (
            peer,
            tuple(each for each in peer.methods if text.lower() in f"{peer.name}, {each}".lower()),
        )
        for peer in peers
    ]
    if not any(methods for _, methods in chosen):
        names = "; ".join(f"{peer.name}, {each}" for peer in peers for each in peer.methods)
        raise ValueError(f'nothing has "{text}" in its name; there are: {names}')
    return [(peer, methods) for peer, methods in chosen if methods]


def available(
    chosen: Sequence[tuple[Peer, tuple[str, ...]]], measurement: Measurement, find: Any = python_of
) -> list[tuple[Peer, tuple[str, ...], Path]]:
    """Peers that can run, and the interpreter of each; the others are noted with the reason.

    find: makes the environment of a peer.
    """
    ready = []
    for peer, methods in tqdm(chosen, desc="environments", unit="peer", leave=False):
        try:
            ready.append((peer, methods, find(peer)))
        except Unavailable as error:
            measurement.lost(peer, methods, str(error), error.command)
    return ready
