"""CHAIR: which objects of a caption are not in the picture? (Rohrbach et al., arXiv 1809.02156)

CHAIR_S is the share of captions that name at least one absent object, CHAIR_I the share of absent
ones among all mentions of objects, every mention counted, as in the released script. Both fall when
captions get shorter, hence recall (of the objects there) and the length beside them. Captions must
be generated with the same limit on tokens in every arm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from headway.benchmarks.quality.intervals import Statistic, quotient

IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "tooth": "teeth",
    "woman": "women",
}
"""Plurals by the end of the word: "fireman", "firemen"."""


class ObjectMatcher:
    """Finds the objects that a text names.

    synonyms: for each object its name, then other words for it; phrases: words that contain a
    synonym but mean something else, with the object that they mean, or None for no object.
    Matches whole words, singular or plural, without regard to case, the longest phrase first.
    Raises ValueError where a word stands for two objects.
    """

    def __init__(
        self, synonyms: Iterable[Sequence[str]], phrases: Mapping[str, str | None] | None = None
    ) -> None:
        self._object: dict[str, str] = {}
        for words in synonyms:
            for word in words:
                if self._object.setdefault(word.lower(), words[0]) != words[0]:
                    message = f"{word!r} stands for {self._object[word.lower()]!r} and {words[0]!r}"
                    raise ValueError(message)
        meanings: dict[str, str | None] = {}
        # Plurals give way to words that are listed: "glasses" need not be several of "glass".
        for word, name in self._object.items():
            meanings |= dict.fromkeys(plurals(word), name)
        meanings |= self._object
        for phrase, meaning in (phrases or {}).items():
            meanings |= dict.fromkeys([phrase.lower(), *plurals(phrase.lower())], meaning)
        self._meanings = meanings
        longest_first = sorted(meanings, key=lambda word: (-len(word), word))
        words = "|".join(r"[\s-]+".join(map(re.escape, word.split())) for word in longest_first)
        self._pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)")

    def mentions(self, text: str) -> list[str]:
        """The objects that the text names, in its order, each as often as it is named."""
        found = (
            self._meanings[" ".join(re.split(r"[\s-]+", match.group()))]
            for match in self._pattern.finditer(text.lower())
        )
        return [name for name in found if name is not None]

    def name(self, word: str) -> str:
        """The object that a word stands for; the word itself where it is not listed."""
        return self._object.get(word.lower(), word)


def plurals(phrase: str) -> list[str]:
    """Ways to form the plural of a phrase's last word; more than one where spelling varies."""
    for singular, plural in IRREGULAR.items():
        if phrase.endswith(singular):
            return [phrase.removesuffix(singular) + plural, f"{phrase}s"]
    if re.search(r"[^aeiou]y$", phrase):
        return [f"{phrase[:-1]}ies"]
    if re.search(r"(s|x|z|ch|sh)$", phrase):
        return [f"{phrase}es"]
    regular = [f"{phrase}s"]
    if phrase.endswith("o"):
        regular.append(f"{phrase}es")
    if match := re.search(r"fe?$", phrase):
        regular.append(f"{phrase[: match.start()]}ves")
    return regular


def count(caption: str, mentions: Sequence[str], objects: Collection[str]) -> list[int]:
    """The row of one caption in the table of counts.

    1, 1 if an absent object is named, mentions, mentions of absent objects, objects named,
    objects there, words.
    """
    absent = sum(name not in objects for name in mentions)
    named = len(set(mentions) & set(objects))
    words = len(caption.split())
    return [1, int(absent > 0), len(mentions), absent, named, len(set(objects)), words]


def chair_s(table: np.ndarray) -> np.ndarray:
    """Share of captions with an absent object; table: counts [..., 7], as for those below."""
    return quotient(table[..., 1], table[..., 0])


def chair_i(table: np.ndarray) -> np.ndarray:
    """Of all mentions of objects, the share of those of absent ones."""
    return quotient(table[..., 3], table[..., 2])


def recall(table: np.ndarray) -> np.ndarray:
    """Of the objects there, the share that is named."""
    return quotient(table[..., 4], table[..., 5])


def words(table: np.ndarray) -> np.ndarray:
    """Mean length of a caption in words."""
    return quotient(table[..., 6], table[..., 0])


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "chair_s": chair_s,
    "chair_i": chair_i,
    "recall": recall,
    "words": words,
}


def statistic(measure: str, table: np.ndarray) -> Statistic:
    """A measure as a function of the weights of the pictures; table: counts [pictures, 7]."""
    return lambda weights: MEASURES[measure](weights @ table)
