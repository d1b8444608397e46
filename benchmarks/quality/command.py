"""`headway bench quality`: options, the endpoint, and where the report goes."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headway.benchmarks.engine import SERVER_SETTINGS
from headway.benchmarks.environment import environment
from headway.benchmarks.quality import methods
from headway.benchmarks.quality.client import CONCURRENCY, Client, EndpointError
from headway.benchmarks.quality.neutral_text import PARAGRAPHS
from headway.benchmarks.quality.plan import (
    QUICK_PARAGRAPHS,
    QUICK_SCENES,
    SCENES,
    Plan,
    make_plan,
)
from headway.benchmarks.quality.report import markdown
from headway.benchmarks.quality.run import ArmRun, Runner
from headway.benchmarks.quality.summary import summarise
from headway.server.launch import LaunchError, serve

NAME = "headway bench quality"
RESULTS = Path(__file__).resolve().parents[1] / "results"
DEMO_NAME = "demo-vlm"
DEMO_FLAGS = (
    *("--served-model-name", DEMO_NAME),
    *("--dtype", "float32"),
    "--enforce-eager",
    *("--max-num-seqs", "16"),
    *("--max-model-len", "1024"),
    *("--limit-mm-per-prompt", '{"image": 2}'),
    # Small enough for the questions about a picture to share most of its tokens in the cache.
    *("--block-size", "32"),
)


def run(argv: Sequence[str]) -> int:
    """Measure, print the report and write it: 0, 1 if an arm failed, 2 for wrong options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        plan = make_plan(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    folder: Path = args.output or RESULTS / f"quality-{stamp}"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    answers, problem = None, None
    try:
        with endpoint(args, folder) as url:
            answers = asyncio.run(ask(args, plan, url))
    except (EndpointError, LaunchError, OSError) as error:
        problem = error
        print(f"{NAME}: error: {error}", file=sys.stderr)
    if answers is None:
        return 1
    # A server that does not end well takes nothing from the answers it gave before.
    runs, left_out = answers
    result = {
        "benchmark": "quality",
        "model": args.model or DEMO_NAME,
        "url": args.url,
        "demo": not args.url,
        "suites": [
            summarise(suite, found, args.seed)
            for suite, found in zip(plan.suites, runs, strict=True)
        ],
        "left_out": left_out,
        "sweeps": plan.sweeps,
        "seed": args.seed,
        "environment": environment(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started,
    }
    write(result, plan, runs, folder)
    print(markdown(result))
    print(f"{result['seconds']:.0f} s; written to {folder}")
    failed = [run.arm.name for found in runs for run in found if run.error]
    return 1 if failed or problem else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Measure what steering does to answers: hallucinated objects, and language.",
        epilog="Without --url, `headway serve` is started with the demo model, on its own scenes.",
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SCENES} scenes, fewer arms")
    where = parser.add_argument_group("the endpoint")
    where.add_argument("--url", help="of an OpenAI-compatible server; needs --model")
    where.add_argument("--model", help="the name it serves the model under")
    where.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="its API key")
    where.add_argument("--concurrency", type=int, default=CONCURRENCY, help="requests at a time")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--split", choices=("prior", "counter", "both"), default="counter")
    what.add_argument("--scenes", type=int, metavar="N", help=f"pictures, {SCENES} by default")
    what.add_argument("--first", type=int, default=0, metavar="INDEX", help="the first scene")
    what.add_argument(
        "--focus-only",
        action="store_true",
        help="of the scenes, those with an absent partner, and questions about pairs alone",
    )
    what.add_argument("--pope", type=Path, nargs="+", metavar="FILE", help="POPE's JSON lines")
    what.add_argument(
        "--chair-annotations",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="COCO's instances and, if wanted, captions",
    )
    what.add_argument("--synonyms", type=Path, metavar="FILE", help="of the CHAIR release")
    what.add_argument("--images", type=Path, metavar="DIR", help="the pictures of both")
    what.add_argument("--caption-prompt", help="what to ask for captions")
    what.add_argument("--caption-tokens", type=int, help="the limit on a caption's tokens")
    what.add_argument("--answer-tokens", type=int, help="the same of a yes/no answer")
    what.add_argument("--no-logprobs", action="store_true", help="no margins, hence no AUC")
    what.add_argument(
        "--perplexity",
        choices=("chat", "completions", "none"),
        default="chat",
        help="of neutral text: as the answer to a picture (vLLM only), or by itself",
    )
    arms = parser.add_argument_group("the arms")
    arms.add_argument("--arms", help=f"comma-separated, of {', '.join(methods.NAMES)}; or own ones")
    arms.add_argument("--arm", action="append", default=[], metavar="NAME=JSON", help="methods")
    arms.add_argument("--sweep", action="append", default=[], metavar="METHOD.PARAM=v1,v2,...")
    arms.add_argument("--vhr-layers", metavar="A-B", help='such as 1-14, or "default"')
    arms.add_argument("--vhr-alpha", type=float)
    arms.add_argument("--vhd", type=Path, metavar="FILE", help="of `headway calibrate heads`")
    arms.add_argument("--random-seeds", type=int, metavar="N", help="arms with random heads")
    parser.add_argument("--seed", type=int, default=0, help="of questions, draws and controls")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the report goes")
    return parser


@contextmanager
def endpoint(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The URL to ask: the one given, or that of a server of the demo model while it is needed.

    Raises LaunchError, with the log's name, if the server does not start.
    """
    if args.url:
        yield args.url
        return
    from headway.server.models.demo_vlm import ensure_demo_vlm

    log = folder / "server.log"
    print("starting headway serve on the demo model, usually in less than a minute", flush=True)
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as scratch:
        try:
            model = ensure_demo_vlm()
            with serve(model, DEMO_FLAGS, Path(scratch), log, SERVER_SETTINGS) as url:
                yield url
        except LaunchError as error:
            raise LaunchError(f"{error}; see {log}") from None


async def ask(
    args: argparse.Namespace, plan: Plan, url: str
) -> tuple[list[list[ArmRun]], dict[str, str]]:
    """Every suite's runs, and why arms were left out. Raises EndpointError or OSError."""
    model = args.model or DEMO_NAME
    async with Client(url, model, args.api_key, args.concurrency) as client:
        capabilities = await client.capabilities()
        reasons = {
            arm.name: methods.left_out(arm, plan.settings, capabilities) for arm in plan.arms
        }
        runner = Runner(
            client,
            capabilities["model"]["num_heads"] if capabilities else 0,
            plan.settings.vhd,
            PARAGRAPHS[:QUICK_PARAGRAPHS] if args.quick else PARAGRAPHS,
            args.perplexity,
            not args.no_logprobs,
        )
        arms = [arm for arm in plan.arms if reasons[arm.name] is None]
        runs = [await runner.run(suite, arms) for suite in plan.suites]
    return runs, {name: reason for name, reason in reasons.items() if reason}


def write(
    result: dict[str, Any], plan: Plan, runs: Sequence[Sequence[ArmRun]], folder: Path
) -> None:
    """The report as JSON and Markdown, every answer as JSON lines, and the plots."""
    (folder / "report.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    (folder / "report.md").write_text(markdown(result), encoding="utf-8")
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for suite, found in zip(plan.suites, runs, strict=True):
            for run in found:
                for row in run.rows:
                    line = {"suite": suite.name, "arm": run.arm.name, **row.as_dict()}
                    file.write(json.dumps(line) + "\n")
    try:
        from headway.benchmarks.quality.plots import save_plots
    except ImportError as error:
        print(f"{NAME}: no plots: {error}", file=sys.stderr)
        return
    save_plots(result, folder)
