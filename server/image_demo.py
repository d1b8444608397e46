"""Steering of an image request: a drawn scene, asked for what usually goes with what it shows.

The demo model has learnt which objects come in pairs and says yes to the absent partner of a
present object. The unsteered and the steered request run at the same time, in one batch.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from headway.benchmarks.quality.scenes import CAPTION_PROMPT, Scene, question, scene
from headway.server import launch
from headway.server.models.demo_vlm import ensure_demo_vlm

MODEL = "demo-vlm"
SCENE = ("test_counter", 71)
ABSENT = "chair"
STEERING = {"methods": [{"method": "vhr", "alpha": 1.5, "layers": list(range(8, 15))}]}
FLAGS = [
    *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "512", "--max-num-seqs", "8"),
]
PICTURE = Path("headway-demo.png")
WIDTH, MARGIN, ZOOM = 940, 24, 4


class ImageDemoError(RuntimeError):
    """The image demo did not show what it should."""


def run(folder: Path, log: Path) -> list[tuple[str, str, str]]:
    """Serve the demo model, ask, save the picture with the answers to `PICTURE`.

    Returns (question, unsteered answer, steered answer) for each question. Raises LaunchError,
    ImageDemoError.
    """
    drawn = scene(*SCENE)
    print("starting headway serve on the demo image model, usually in less than a minute")
    with launch.serve(ensure_demo_vlm(), FLAGS, folder, log) as url:
        answers = ask(url, drawn, [question(ABSENT), CAPTION_PROMPT])
    rows = [(asked, plain["text"], steered["text"]) for asked, plain, steered in answers]
    for _, plain, steered in answers:
        check(plain, steered)
    if not any(plain != steered for _, plain, steered in rows):
        raise ImageDemoError("every steered answer equals the unsteered one")
    heads = [steered["steering"]["methods"][0]["heads"] for _, _, steered in answers]
    picture(drawn, rows, [len(chosen) for chosen in heads]).save(PICTURE)
    return rows


def show(rows: Sequence[tuple[str, str, str]]) -> None:
    """Print what `run` returned."""
    for asked, plain, steered in rows:
        print(f"\n{asked}\n  unsteered  {plain}\n  vhr        {steered}")
    print(f"\nThe picture is in {PICTURE}.")


def ask(
    url: str, drawn: Scene, questions: Sequence[str]
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each question with its unsteered and its steered answer, from one batch."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    buffer = io.BytesIO()
    drawn.image.save(buffer, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def complete(job: tuple[str, dict[str, Any] | None]) -> dict[str, Any]:
        text, steering = job
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": text},
        ]
        answer: Any = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
            max_tokens=40,
            temperature=0,
            extra_body={"steering": steering} if steering else None,
        )
        echo = (answer.model_extra or {}).get("steering")
        return {"text": answer.choices[0].message.content, "steering": echo}

    jobs = [(text, steering) for text in questions for steering in (None, STEERING)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(complete, jobs))
    return list(zip(questions, found[::2], found[1::2], strict=True))


def check(plain: dict[str, Any], steered: dict[str, Any]) -> None:
    """Raises ImageDemoError unless one answer is unsteered and the server vouches for the other."""
    if not plain["text"].strip() or not steered["text"].strip():
        raise ImageDemoError("an answer is empty")
    if plain["steering"] is not None:
        raise ImageDemoError("the unsteered answer claims to be steered")
    echo = steered["steering"]
    if not echo or not echo["positions_edited"] or not echo["methods"][0]["heads"]:
        raise ImageDemoError("the steered answer lacks the report of the heads that were chosen")


def picture(
    drawn: Scene, rows: Sequence[tuple[str, str, str]], heads: Sequence[int]
) -> Image.Image:
    """The scene, enlarged, with its questions and answers beside it."""
    shown = drawn.image.resize(
        (drawn.image.width * ZOOM, drawn.image.height * ZOOM), Image.Resampling.NEAREST
    )
    page = Image.new("RGB", (WIDTH, shown.height + 2 * MARGIN), "white")
    page.paste(shown, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(page)
    left, top = shown.width + 2 * MARGIN, MARGIN
    small, normal = (ImageFont.load_default(size) for size in (17, 21))
    columns = (WIDTH - MARGIN - left) // 10

    def write(text: str, font: Any, colour: str) -> None:
        nonlocal top
        for line in textwrap.wrap(text, columns):
            draw.text((left, top), line, fill=colour, font=font)
            top += round(font.size * 1.35)

    write(f"In the picture: {', '.join(sorted(drawn.objects))}", small, "#555555")
    for (asked, plain, steered), count in zip(rows, heads, strict=True):
        top += 20
        write(asked, normal, "black")
        write(f"unsteered: {plain}", normal, "#b03030")
        write(f"vhr, {count} heads: {steered}", normal, "#207040")
    return page
