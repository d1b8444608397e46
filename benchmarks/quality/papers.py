"""What the papers report, to set beside what is measured here, and how far that carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A figure of CHAIR in per cent, without and with a method, as its authors report it.

    model: "" where it was not noted which one the figure is of.
    """

    method: str
    model: str
    measure: str
    before: float
    after: float
    source: str
    note: str = ""


REPORTED = (
    Reported("vhr", "LLaVA-1.5-7B", "CHAIR_S", 49.68, 33.32, "arXiv 2412.13949"),
    Reported("vhr", "LLaVA-1.5-7B", "CHAIR_I", 14.32, 9.71, "arXiv 2412.13949"),
    Reported(
        "locore",
        "",
        "CHAIR_S",
        48.0,
        38.4,
        "arXiv 2601.20279",
        "an independent reproduction found no effect",
    ),
    Reported(
        "sgrs",
        "",
        "CHAIR_S",
        48.0,
        36.5,
        "arXiv 2601.20279",
        "the released code accepts every candidate",
    ),
)

SCENES_LIMITS = """\
The model here has 135 million parameters and knows sixteen drawn objects; on the counter split its
language model says "yes" out of habit to a partner that is absent. This can tell whether a method
is wired up and moves answers, in which direction, whether its choice of heads does better than
random heads, and whether it separates present from absent better than a threshold on the unsteered
margin. It cannot tell how large an effect is on a 7B model and photographs: the layers that help
here are not the papers' default ones, no image token is a sink by VAR's criterion, captions are one
sentence, and there is one training run. A first token "Yes" or "No" is predicted from the prompt,
so that methods which edit output positions only (LocoRE, SGRS) cannot change it; their effect is to
be looked for in captions."""
