"""A prompt as the chat template rendered it, and where its messages stand in it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text: offsets[i] are the characters of token i, specials those of special tokens
    such as the marks between chat messages. Both ascend.
    """

    text: str
    offsets: Sequence[Range]
    specials: Sequence[Range] = ()


@dataclass(frozen=True)
class Piece:
    """Characters of a message that stand unchanged in the rendered prompt."""

    start: int  # in the message
    at: int  # in the prompt
    length: int

    @property
    def stop(self) -> int:
        """Position in the prompt after the last character."""
        return self.at + self.length


def find_messages(
    messages: Sequence[str], prompt: RenderedPrompt
) -> list[tuple[Piece, ...] | None]:
    """Where each message stands in the rendered prompt.

    None for a message that the template changed, and for one that may stand in two places: as
    another message does, or text of the template.

    Messages are looked for from the last to the first, because templates like to put text of their
    own in front; first where a special token follows, as it does after a message, and then
    anywhere. A template may strip white space, or handle the parts of a message one by one.
    Where no special token follows every message (as after one that is to be continued, or after
    those of users in some templates), those that the two ways put in different places are refused,
    unless only the second way finds them all.
    """
    view = _View(prompt)
    places, anywhere = view.places(messages), view.places(messages, anywhere=True)
    if places != anywhere and not view.are_closed(messages, places):
        if None in places and None not in anywhere:
            places = anywhere
        else:
            pairs = zip(places, anywhere, strict=True)
            places = [one if one == other else None for one, other in pairs]
    start = 0
    for index, pieces in enumerate(places):
        if pieces and not view.is_first(pieces, start):
            places[index] = None
        elif pieces:
            start = pieces[-1].stop
    return places


class _View:
    """A rendered prompt, prepared for searching from its end."""

    def __init__(self, prompt: RenderedPrompt) -> None:
        self._text = prompt.text
        words: list[str] = []
        ends = set()
        at = 0
        for start, stop in prompt.specials:
            words += [prompt.text[at:start], " " * (stop - start)]
            if words[-2].strip():
                ends.add(at + len(words[-2].rstrip()))
            at = stop
        self._ends = sorted(ends)  # of what stands in front of a special token
        self._unclosed_below: dict[str, int] = {}
        # Positions in it are positions in the prompt.
        self._without_specials = "".join([*words, prompt.text[at:]])

    def places(
        self, messages: Sequence[str], anywhere: bool = False
    ) -> list[tuple[Piece, ...] | None]:
        """The last places of messages in their order; anywhere: as for `find`."""
        limit = len(self._text)
        found = []
        for text in reversed(messages):
            pieces = self.find(text, limit, anywhere)
            if pieces:
                limit = pieces[0].at
            found.append(pieces)
        found.reverse()
        return found

    def are_closed(
        self, messages: Sequence[str], places: Sequence[tuple[Piece, ...] | None]
    ) -> bool:
        """Whether a special token follows every message, and the last one is not to be continued.

        Behind a message that is to be continued there is nothing, not even white space.
        """
        last = messages[-1].rstrip()
        line = last.rpartition("\n")[2].strip()
        if line and self._text.endswith((line, line + messages[-1][len(last) :])):
            return False
        return all(pieces is not None and self._is_closed(pieces) for pieces in places)

    def _is_closed(self, pieces: Sequence[Piece]) -> bool:
        if not pieces:
            return True
        index = bisect_left(self._ends, pieces[-1].stop)
        return index < len(self._ends) and self._ends[index] == pieces[-1].stop

    def is_first(self, pieces: Sequence[Piece], start: int) -> bool:
        """Whether the same text is not found earlier from `start` on.

        Where a special token follows: not found earlier in front of a special token.
        """
        if not self._is_closed(pieces):
            piece = pieces[0]
            return self._text.find(self._text[piece.at : piece.stop], start) == piece.at
        piece = pieces[-1]
        text = self._text[piece.at : piece.stop]
        earlier = slice(bisect_left(self._ends, start), bisect_left(self._ends, piece.stop))
        return not any(self._text.endswith(text, start, end) for end in self._ends[earlier])

    def find(self, text: str, limit: int, anywhere: bool) -> tuple[Piece, ...] | None:
        """Where a message stands in front of `limit`, in one piece or line by line.

        anywhere: not only in second choice where no special token follows.
        """
        whole = self._last(text, 0, limit, anywhere)
        if whole is not None:
            return (whole,) if whole.length else ()
        pieces: list[Piece] = []
        end = len(text)
        for line in reversed(text.split("\n")):
            start = end - len(line)
            end = start - 1
            # Nothing but white space and special tokens may stand between two lines.
            piece = self._last(line, start, limit, anywhere or bool(pieces))
            if piece is None or (pieces and self._without_specials[piece.stop : limit].strip()):
                return None
            if piece.length:
                pieces.append(piece)
                limit = piece.at
        return tuple(reversed(pieces))

    def _last(self, line: str, start: int, limit: int, anywhere: bool) -> Piece | None:
        """The last place in front of `limit` of a line, stripped.

        start: offset of the line in its message. anywhere: also where no special token follows,
        which is else the second choice.
        """
        text = line.strip()
        if not text:
            return Piece(start, limit, 0)
        start += len(line) - len(line.lstrip())
        end = limit
        while not anywhere and limit > self._unclosed_below.get(text, -1):
            index = bisect_right(self._ends, end) - 1
            at = self._text.rfind(text, 0, self._ends[index]) if index >= 0 else -1
            if at < 0:
                # Remembered, as chats repeat short messages.
                self._unclosed_below[text] = limit
            elif at + len(text) == self._ends[index]:
                return Piece(start, at, len(text))
            end = at + len(text)
        at = self._text.rfind(text, 0, limit)
        return Piece(start, at, len(text)) if at >= 0 else None
