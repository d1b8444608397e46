"""How much of the server clients may take: places of steered requests, and sizes of bodies.

A place is a sequence: a request of n choices takes n, a text completion of several prompts n for
each. Whoever finds no place is refused, and never waits, nor is served unsteered. Requests whose
steering changes nothing take none. Every API server process counts for itself.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, fields
from math import inf
from typing import Any, NamedTuple

from headway.steering import Reason, SteeringError, SteeringProgram

DEFAULT_BODY_MIB = 64
DEFAULT_BODY_SECONDS = 120
"""Of the body of a request: how large it may be, with its images, and how long it may take."""


@dataclass(frozen=True)
class Limits:
    """The limits of a server, named as their options; None: no limit."""

    max_steered_requests: int | None = None
    max_steered_per_key: int | None = None
    max_sgrs_per_key: int | None = None
    max_request_body: int = DEFAULT_BODY_MIB
    request_body_timeout: int = DEFAULT_BODY_SECONDS

    @classmethod
    def of(cls, args: Namespace) -> Limits:
        """Those of parsed arguments."""
        given = {each.name: getattr(args, each.name, None) for each in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def body_bytes(self) -> int:
        """Largest body of a request."""
        return self.max_request_body * 1024 * 1024


@dataclass(frozen=True)
class Place:
    """What one request takes. client: see `Clients.identify`; is_gated: whether it needs the pass
    that reads saliencies."""

    client: str
    sequences: int
    is_gated: bool


class Bound(NamedTuple):
    """A limit, and what of it is taken. whose, what: words for messages."""

    option: str
    given: int | None
    taken: int
    whose: str = ""
    what: str = "steered sequences"

    @property
    def limit(self) -> float:
        """The limit, infinity where none was given."""
        return inf if self.given is None else self.given

    @property
    def allows(self) -> str:
        """Which option it is, and what that allows."""
        return f"{self.option} allows {self.given}"


class Places:
    """The places that are taken."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._steered: Counter[str] = Counter()
        self._gated: Counter[str] = Counter()

    def take(self, client: str, program: SteeringProgram, body: Any) -> Place | None:
        """A place for a request, to be released when it has ended; None if it needs none.

        Raises SteeringError: E_CAPACITY where too many are taken; E_BAD_PARAM where the request
        alone takes more than there are.
        """
        if program.is_identity:
            return None
        place = Place(client, sequences_of(body), needs_saliency(program))
        for bound in self._bounds(place):
            if place.sequences > bound.limit:
                message = f"the request has {place.sequences} {bound.what}; {bound.allows}"
                raise SteeringError(Reason.BAD_PARAM, message, too_many(body, bound.limit))
        for bound in self._bounds(place):
            if bound.taken + place.sequences > bound.limit:
                message = (
                    f"{bound.taken} {bound.what}{bound.whose} are being served and the request has "
                    f"{place.sequences}; {bound.allows}; send it again later"
                )
                raise SteeringError(Reason.CAPACITY, message)
        self._add(place, place.sequences)
        return place

    def release(self, place: Place) -> None:
        """Give a place back."""
        self._add(place, -place.sequences)

    def _add(self, place: Place, count: int) -> None:
        for counter in (self._steered, self._gated) if place.is_gated else (self._steered,):
            counter[place.client] += count
            if not counter[place.client]:
                del counter[place.client]  # keys come and go

    def _bounds(self, place: Place) -> list[Bound]:
        """The limits that a request is under."""
        limits, mine = self._limits, " of this client"
        steered, gated = self._steered[place.client], self._gated[place.client]
        bounds = [
            Bound("--max-steered-requests", limits.max_steered_requests, self._steered.total()),
            Bound("--max-steered-per-key", limits.max_steered_per_key, steered, mine),
        ]
        if place.is_gated:
            what = "sequences that read saliencies"
            bounds.append(Bound("--max-sgrs-per-key", limits.max_sgrs_per_key, gated, mine, what))
        return bounds


def needs_saliency(program: SteeringProgram) -> bool:
    """Whether a program needs the pass that reads saliencies, to refuse tokens or to report."""
    return program.sampling_gate is not None or program.saliency is not None


def sequences_of(body: Any) -> int:
    """How many sequences a validated request makes: its choices, for each of its prompts."""
    return _choices(body) * max(1, sum(_prompts(body).values()))


def too_many(body: Any, limit: float) -> str:
    """The field that makes more sequences than a limit: `n`, or else the longer list of prompts."""
    prompts = _prompts(body)
    return "n" if _choices(body) > limit else max(prompts, key=prompts.__getitem__)


def _choices(body: Any) -> int:
    return getattr(body, "n", None) or 1


def _prompts(body: Any) -> dict[str, int]:
    """How many prompts there are in each field that has them."""
    return {name: _count(getattr(body, name, None)) for name in ("prompt", "prompt_embeds")}


def _count(prompts: Any) -> int:
    """How many prompts there are; a list of numbers is one."""
    if not isinstance(prompts, list):
        return int(prompts is not None)
    return 1 if prompts and isinstance(prompts[0], int) else len(prompts)
