"""Steering at work: one question, answered by SmolLM2 as it is and in two steered ways; a picture.

    python -m headway.server.demo

Starts `headway serve`, asks over the OpenAI client and ends the server. The unsteered and the
first steered request run at the same time, in one batch; the last one is streamed. Then a coding
question is answered towards C++ (`vector_demo.py`), and the same is done for a picture
(`image_demo.py`), which is saved with its answers.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from headway.server import image_demo, launch, vector_demo
from headway.server.models.smollm2 import ensure_smollm2

MODEL = "smollm2"
QUESTION = "Give me one good reason to learn a musical instrument."
SIX_HEADS = [[4, 0], [11, 5], [16, 6], [23, 7], [24, 4], [26, 7]]
INLINE = {"methods": [{"method": "vhr", "alpha": 2.0, "heads": SIX_HEADS}]}
PRESET = "personal"
PRESET_FILE = {
    "description": "Sixteen heads, amplified a little.",
    "methods": [
        {
            "method": "vhr",
            "alpha": 1.5,
            "heads": [
                *([4, 7], [5, 2], [8, 7], [10, 4], [12, 6], [14, 4], [15, 1], [17, 3]),
                *([17, 8], [18, 2], [20, 4], [20, 7], [21, 4], [22, 3], [24, 0], [24, 7]),
            ],
        }
    ],
}


class DemoError(RuntimeError):
    """The demo did not show what it should."""


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and the steering it was given with as the server tells it."""

    title: str
    text: str
    steering: dict[str, Any] | None = None


def main() -> int:
    """Run the demo; 0 if steering was seen to work."""
    with tempfile.TemporaryDirectory(prefix="headway-demo-") as folder:
        log = Path(folder) / "server.log"
        try:
            with serve(Path(folder), log) as url:
                answers = ask(url)
                coded = vector_demo.ask(url, MODEL)
            check(answers)
            show(answers)
            vector_demo.show(*coded)
            rows = image_demo.run(Path(folder), log)
        except Exception as error:
            if log.exists():
                print(f"the end of the server's log:\n{log.read_text()[-4000:]}", file=sys.stderr)
            print(f"the demo failed: {error}", file=sys.stderr)
            return 1
    image_demo.show(rows)
    return 0


def show(answers: Sequence[Answer]) -> None:
    """Print the answers side by side, and what the server reports of their steering."""
    width = shutil.get_terminal_size((100, 24)).columns
    print(f"\nQuestion: {QUESTION}\n")
    print(side_by_side(answers, width))
    for answer in answers:
        if answer.steering is not None:
            print(f"\n{answer.title}, as the server reports it:")
            print(textwrap.indent(echo_lines(answer.steering, width - 2), "  "))
    print(flush=True)


@contextmanager
def serve(folder: Path, log: Path) -> Iterator[str]:
    """A Headway server of SmolLM2 with the preset; yields its URL once it answers, and ends it.

    Raises LaunchError if it does not start, or does not end by itself with exit code 0.
    """
    preset = folder / "preset.json"
    preset.write_text(json.dumps(PRESET_FILE))
    flags = ["--served-model-name", MODEL, "--max-model-len", "2048", "--enforce-eager"]
    flags += ["--max-num-seqs", "8", "--steering-preset", f"{PRESET}={preset}"]
    flags += vector_demo.FLAGS
    print("starting headway serve on SmolLM2, usually in less than a minute")
    with launch.serve(ensure_smollm2(), flags, folder, log) as url:
        yield url


def ask(url: str) -> list[Answer]:
    """The unsteered and a steered answer from one batch, then a steered one from a stream."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    titles = ("unsteered", "steered", f'steered by the preset "{PRESET}", streamed')
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda steering: complete(client, steering), (None, INLINE)))
    answers = [*together, stream(client, {"preset": PRESET})]
    return [Answer(title, *answer) for title, answer in zip(titles, answers, strict=True)]


def complete(client: Any, steering: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
    """The text of one answer and the `steering` object beside it."""
    body = {"steering": steering} if steering else None
    answer = client.chat.completions.create(**_request(), extra_body=body)
    return answer.choices[0].message.content, (answer.model_extra or {}).get("steering")


def stream(client: Any, steering: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The same from a stream, where the `steering` object comes with the last chunk."""
    text, echo = "", None
    chunks = client.chat.completions.create(
        **_request(), stream=True, extra_body={"steering": steering}
    )
    for chunk in chunks:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        echo = (chunk.model_extra or {}).get("steering") or echo
    return text, echo


def check(answers: Sequence[Answer]) -> None:
    """Raises DemoError unless the answers show steering, and the server vouches for it."""
    unsteered, *steered = answers
    if not all(answer.text.strip() for answer in answers):
        raise DemoError("an answer is empty")
    if unsteered.steering is not None:
        raise DemoError("the unsteered answer claims to be steered")
    for answer in steered:
        if answer.text == unsteered.text:
            raise DemoError(f"the answer {answer.title} equals the unsteered one")
        if not answer.steering or not answer.steering.get("positions_edited"):
            raise DemoError(f"the answer {answer.title} lacks the report of what was edited")


def side_by_side(answers: Sequence[Answer], width: int) -> str:
    """Columns of wrapped text, one per answer, in at most `width` characters."""
    gap = "   "
    column = max(20, (width - len(gap) * (len(answers) - 1)) // len(answers))
    titles = [textwrap.wrap(answer.title.upper(), column) for answer in answers]
    height = max(map(len, titles))
    columns = [
        [*title, *[""] * (height - len(title)), "-" * column, *_paragraphs(answer.text, column)]
        for title, answer in zip(titles, answers, strict=True)
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(gap.join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def echo_lines(steering: dict[str, Any], width: int) -> str:
    """The report of a steered answer: fingerprint, methods, positions edited."""
    edited, computed = steering["positions_edited"], steering.get("positions_computed", "?")
    lines = [
        f"fingerprint  {steering['fingerprint'][:16]}",
        f"positions    {edited} edited of {computed} computed",
    ]
    for method in steering["methods"]:
        heads = method.get("heads", [])
        layers = ", ".join(map(str, method.get("layers", [])))
        text = f"{method['method']}, alpha {method.get('alpha')}, {len(heads)} heads"
        lines.append(f"method       {text} in layers {layers}")
    return "\n".join(
        wrapped
        for line in lines
        for wrapped in textwrap.wrap(line, width, subsequent_indent=" " * 13)
    )


def _request() -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": MODEL, "messages": messages, "max_tokens": 80, "temperature": 0}


def _paragraphs(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]


if __name__ == "__main__":
    sys.exit(main())
