"""What `headway bench soak` asks for: kinds of traffic, drawn from a seed.

Script number i is the same for the same seed and server, whoever sends it and when. A new kind is
a function and a row of `KINDS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from headway.benchmarks.soak_asks import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    STEERING_ROUTES,
    Ask,
    Expected,
    Place,
    Script,
)
from headway.benchmarks.soak_bodies import (
    body,
    carried,
    hot_prompt,
    long_prompt,
    options,
    own_prompt,
    sampled_options,
)
from headway.benchmarks.soak_profiles import artifact
from headway.benchmarks.soak_refusals import refusals
from headway.benchmarks.soak_specs import MIXES, SPECS, ZEROS

HOT_SCRIPTS = 12
"""So many scripts after one another share a prompt, so that some of them run at the same time."""
REFUSALS_AT_ONCE = 6
SLOW_TOKENS = 16
LEAVING_TOKENS = 100
METHODS = tuple(name for name in SPECS if name != "sgrs")


class Draw:
    """The random choices of one script."""

    def __init__(self, place: Place, seed: int, number: int) -> None:
        self.place = place
        self.random = random.Random(f"{seed}-{number}")
        self.name = f"soak-{seed}-{number}"
        self.number = number

    def prompt(self) -> str:
        """One that other scripts have as well, or one of its own."""
        if self.random.random() < 0.3:
            return hot_prompt(self.number // HOT_SCRIPTS)
        return own_prompt(self.random, self.name)

    def methods(self, name: str, prompt: str) -> list[dict[str, Any]]:
        """The methods of a spec, or of a mix of specs."""
        parts = MIXES.get(name, (name,))
        return [SPECS[part](self.random, self.place.geometry, prompt) for part in parts]

    def available(self, *names: str) -> list[str]:
        """Those specs and mixes of which the server has every method."""
        return [name for name in names if self.place.methods.issuperset(MIXES.get(name, (name,)))]


def script(place: Place, seed: int, number: int) -> Script:
    """Script number `number`: steps one after the other, the requests of a step together.

    Every kind comes as often in each `DECK` of scripts as its row says.
    """
    round_, card = divmod(number, len(DECK))
    kind = random.Random(f"{seed}-deck-{round_}").sample(DECK, len(DECK))[card]
    return KINDS[kind][1](Draw(place, seed, number), kind)


def _unsteered(draw: Draw, kind: str) -> Script:
    path = draw.random.choice((CHAT, COMPLETIONS))
    fields = options(draw.random, path)
    return [[Ask(kind, path, body(draw.place, draw.random, path, draw.prompt(), **fields))]]


def _sampled(draw: Draw, kind: str) -> Script:
    """Unsteered, to be asked of stock vLLM as well."""
    return [[_to_compare(draw, kind, draw.prompt())]]


def _to_compare(draw: Draw, kind: str, prompt: str, **fields: Any) -> Ask:
    path = draw.random.choice((CHAT, COMPLETIONS))
    asked = body(
        draw.place, draw.random, path, prompt, **sampled_options(draw.random, path), **fields
    )
    return Ask(kind, path, asked, steered="steering" in fields, sampled=True)


def _zero(draw: Draw, kind: str) -> Script:
    """Steered with strength zero: as unsteered, and to be asked of stock vLLM so."""
    name = draw.random.choice([zero for zero in ZEROS if zero in draw.place.methods])
    return [[_to_compare(draw, kind, draw.prompt(), steering={"methods": [ZEROS[name]]})]]


def _steered(draw: Draw, kind: str) -> Script:
    return _one_of(draw, kind, METHODS)


def _mixed(draw: Draw, kind: str) -> Script:
    return _one_of(draw, kind, tuple(MIXES))


def _sgrs(draw: Draw, kind: str) -> Script:
    return _one_of(draw, kind, ("sgrs",))


def _one_of(draw: Draw, kind: str, names: tuple[str, ...]) -> Script:
    found = draw.available(*names)
    if not found:
        return []
    prompt = draw.prompt()
    path = draw.random.choice((CHAT, COMPLETIONS))
    steering = carried(draw.random, draw.methods(draw.random.choice(found), prompt))
    fields = options(draw.random, path) | steering
    return [[Ask(kind, path, body(draw.place, draw.random, path, prompt, **fields), steered=True)]]


def _preset(draw: Draw, kind: str) -> Script:
    """By alias or by name."""
    name = draw.random.choice(list(draw.place.presets))
    path = draw.random.choice((CHAT, COMPLETIONS, RESPONSES))
    fields: dict[str, Any] = {"model": f"{draw.place.model}:{name}"}
    if draw.random.random() < 0.3:
        fields = {"steering": {"preset": name}}
    fields |= options(draw.random, path)
    return [
        [
            Ask(
                kind,
                path,
                body(draw.place, draw.random, path, draw.prompt(), **fields),
                steered=True,
            )
        ]
    ]


def _responses(draw: Draw, kind: str) -> Script:
    prompt = draw.prompt()
    fields = options(draw.random, RESPONSES)
    steered = draw.random.random() < 0.6
    if steered:
        name = draw.random.choice(draw.available(*METHODS))
        fields |= carried(draw.random, draw.methods(name, prompt))
    asked = body(draw.place, draw.random, RESPONSES, prompt, **fields)
    return [[Ask(kind, RESPONSES, asked, steered=steered)]]


def _refused(draw: Draw, kind: str) -> Script:
    """Several at once, since nothing is computed for them."""
    rows = draw.random.sample(refusals(draw.place, kind), REFUSALS_AT_ONCE)
    return [rows]


def _too_long(draw: Draw, kind: str) -> Script:
    path = draw.random.choice((CHAT, COMPLETIONS))
    fields: dict[str, Any] = {"stream": draw.random.random() < 0.5}
    if draw.random.random() < 0.5:
        fields |= {"steering": {"methods": draw.methods("vhr", "")}}
    prompt = long_prompt(draw.place.max_model_len)
    asked = body(draw.place, draw.random, path, prompt, **fields)
    return [[Ask(kind, path, asked, expected=Expected((400,)))]]


def _leaving(draw: Draw, kind: str) -> Script:
    """The client goes away: after some lines of a stream, or some seconds of waiting."""
    prompt = draw.prompt()
    path = draw.random.choice((CHAT, COMPLETIONS, RESPONSES))
    stream = draw.random.random() < 0.7
    fields: dict[str, Any] = {"stream": stream, "tokens": LEAVING_TOKENS, "ignore_eos": True}
    steered = draw.random.random() < 0.7
    if steered:
        names = draw.available("sgrs", *METHODS, *MIXES)
        fields |= carried(draw.random, draw.methods(draw.random.choice(names), prompt))
    asked = body(draw.place, draw.random, path, prompt, **fields)
    leave: dict[str, Any] = {"leave_seconds": draw.random.uniform(0.01, 2.0)}
    if stream and draw.random.random() < 0.7:
        leave = {"leave_lines": draw.random.randrange(0, 20)}
    return [[Ask(kind, path, asked, steered=steered, **leave)]]


def _slow(draw: Draw, kind: str) -> Script:
    """A stream of long chunks, read more slowly than it is made."""
    path, steered = draw.random.choice((CHAT, COMPLETIONS)), draw.random.random() < 0.5
    prompt = draw.prompt()
    wide = {"logprobs": True, "top_logprobs": 20} if path == CHAT else {"logprobs": 20}
    fields: dict[str, Any] = {**wide, "stream": True, "tokens": SLOW_TOKENS, "ignore_eos": True}
    if steered:
        fields |= carried(draw.random, draw.methods("vhr", prompt))
    asked = body(draw.place, draw.random, path, prompt, **fields)
    return [[Ask(kind, path, asked, steered=steered, pause=draw.random.uniform(0.05, 0.25))]]


def _identical(draw: Draw, kind: str) -> Script:
    """One prompt at the same time unsteered and steered in two ways, twice: cached and not."""
    prompt = hot_prompt(-1 - draw.number)
    step = [_to_compare(draw, kind, prompt)]
    for name in draw.random.sample(draw.available(*METHODS), 2):
        asked = body(
            draw.place,
            draw.random,
            COMPLETIONS,
            prompt,
            temperature=0.0,
            steering={"methods": draw.methods(name, prompt)},
        )
        step.append(Ask(kind, COMPLETIONS, asked, steered=True))
    return [step, step]


def _registry(draw: Draw, kind: str) -> Script:
    """A profile and a preset are put, used, kept while in use, and deleted."""
    name, model = draw.name, draw.place.model
    digest, content = artifact(draw.place.geometry, "gact", draw.number)
    profile, preset = (f"{STEERING_ROUTES}/{each}/{name}" for each in ("profiles", "presets"))
    methods = [{"method": "gact", "profile": name}]
    if "gact" not in draw.place.methods:
        return []

    def admin(verb: str, path: str, expected: Expected, **what: Any) -> list[Ask]:
        return [Ask(kind, path, verb=verb, admin=True, expected=expected, **what)]

    def use(fields: dict[str, Any], expected: Expected | None = None) -> list[Ask]:
        asked = body(draw.place, draw.random, CHAT, draw.prompt(), **fields)
        if expected is not None:
            return [Ask(kind, CHAT, asked, expected=expected)]
        return [Ask(kind, CHAT, asked, steered=True)]

    put, done = Expected((200, 201)), Expected()
    by_name, by_alias = {"steering": {"methods": methods}}, {"model": f"{model}:{name}"}
    in_use = Expected((409,), "E_IN_USE", "name")
    gone = Expected((404,), "E_PROFILE_NOT_FOUND", "steering.methods[0].profile")
    artifact_path = f"{STEERING_ROUTES}/artifacts/sha256:{digest}"
    named = {"artifact": f"sha256:{digest}"}
    return [
        admin("PUT", artifact_path, put, content=content),
        admin("PUT", profile, put, body=named),
        admin("PUT", preset, put, body={"methods": methods}) + use(by_name),
        use(by_alias) + use({"steering": {"preset": name}}),
        admin("DELETE", profile, in_use),
        admin("DELETE", preset, done),
        admin("DELETE", profile, done),
        use(by_name, gone) + use(by_alias, Expected((404,))),
    ]


LOOKS = (
    "/health",
    "/metrics",
    "/v1/models",
    "/openapi.json",
    *(f"{STEERING_ROUTES}/{name}" for name in ("capabilities", "presets", "profiles")),
)


def _looking(draw: Draw, kind: str) -> Script:
    return [[Ask(kind, path, verb="GET") for path in draw.random.sample(LOOKS, 3)]]


Builder = Callable[[Draw, str], Script]

KINDS: Mapping[str, tuple[int, Builder]] = {
    "unsteered": (9, _unsteered),
    "unsteered, also asked of stock": (8, _sampled),
    "strength zero": (2, _zero),
    "one method": (14, _steered),
    "several methods": (6, _mixed),
    "sgrs": (5, _sgrs),
    "preset": (4, _preset),
    "responses": (4, _responses),
    "bad request": (5, _refused),
    "prompt too long": (2, _too_long),
    "client that leaves": (5, _leaving),
    "slow reader": (2, _slow),
    "same prompt": (2, _identical),
    "registry": (2, _registry),
    "looking": (2, _looking),
}
"""Kind -> how many of each `DECK` of scripts, and what makes one."""

DECK = tuple(kind for kind, (cards, _) in KINDS.items() for _ in range(cards))
