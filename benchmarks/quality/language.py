"""In which programming language is an answer? A heuristic, for activation steering towards one.

The tag of the first fenced block decides where it names a language. Otherwise telling pieces of
syntax are counted in the fenced code, or in the whole answer if it has none, and the language with
most of them wins; too few or a draw is no language. It reads no grammar: short snippets and code
that mixes languages are misjudged, and what it cannot place counts as "none", not as another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LANGUAGES = ("C++", "Python", "Java", "Julia")
NONE = "none"
TAGS = {
    "C++": {"c++", "cpp", "cxx", "cc", "hpp"},
    "Python": {"python", "python3", "py"},
    "Java": {"java"},
    "Julia": {"julia", "jl"},
}
MARKERS = {
    "C++": (
        r"^\s*#include\s*[<\"]",
        r"\bstd::\w+",
        r"\busing\s+namespace\s+\w+\s*;",
        r"\b(cout|cin|cerr)\s*(<<|>>)",
        r"^\s*template\s*<",
        r"\bint\s+main\s*\(",
        r"\b(unsigned|const\s+\w+\s*&|\w+::\w+\s*<)",
    ),
    "Python": (
        r"^\s*def\s+\w+\s*\(.*\)\s*(->[^:]+)?:\s*$",
        r"^\s*(from\s+[\w.]+\s+)?import\s+[\w.]+(\s+as\s+\w+)?\s*$",
        r"^\s*(for\b.*\bin\b.*|if\b.*|elif\b.*|else|while\b.*|try|with\b.*):\s*$",
        r"\bself\.\w+",
        r"__\w+__",
        r"\bnp\.\w+\(",
    ),
    "Java": (
        r"\bpublic\s+(static\s+)?(final\s+)?(class|interface|void|int|double|String)\b",
        r"\bSystem\.out\.print",
        r"^\s*import\s+java[\w.]*(\.\*)?\s*;",
        r"\bString\[\]\s+\w+",
        r"\bnew\s+(ArrayList|HashMap|Scanner)\b",
        r"\bprivate\s+(static\s+)?(final\s+)?\w+",
    ),
    "Julia": (
        r"^\s*function\s+\w+!?\s*[({].*$",
        r"^\s*end\s*$",
        r"^\s*using\s+[A-Z]\w*(\s*,\s*[A-Z]\w*)*\s*$",
        r"\bprintln\(",
        r"::(Int|Float|Vector|Matrix|Array|AbstractArray)\w*",
        r"\w\.\(|\s\.[-+*/^]\s",
    ),
}
"""Pieces of syntax that are usual in one of the languages and rare in the others."""
LEAST_MARKERS = 2

FENCE = re.compile(r"```[ \t]*([\w+#]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BY_TAG = {tag: language for language, tags in TAGS.items() for tag in tags}
_PATTERNS = {
    language: [re.compile(marker, re.MULTILINE) for marker in markers]
    for language, markers in MARKERS.items()
}


def language_of(answer: str) -> str:
    """One of LANGUAGES, or "none" where nothing tells."""
    blocks = FENCE.findall(answer)
    for tag, _ in blocks:
        if tag:
            return _BY_TAG.get(tag.lower(), NONE)
    code = "\n".join(body for _, body in blocks) or answer
    scores = {
        language: sum(pattern.search(code) is not None for pattern in patterns)
        for language, patterns in _PATTERNS.items()
    }
    most = max(scores.values())
    winners = [language for language, score in scores.items() if score == most]
    return winners[0] if most >= LEAST_MARKERS and len(winners) == 1 else NONE


def language_shares(answers: Iterable[str]) -> dict[str, float]:
    """The share of each language, and of "none", among the answers. Raises ValueError for none."""
    found = [language_of(answer) for answer in answers]
    if not found:
        raise ValueError("no answers")
    return {name: found.count(name) / len(found) for name in (*LANGUAGES, NONE)}
