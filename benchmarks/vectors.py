"""What a vector profile does to answers: the language of code that was asked for, and the damage.

    headway bench vectors --profile gact.safetensors

One engine answers the held-out prompts of `quality/data/`, which name no language: unsteered, with
the profile at several strengths, and with drawn directions of the same lengths in its place, which
tells whether the directions matter or only that something is added. Of each arm are reported the
share of answers in each language (`quality/language.py`, a heuristic), the share that is well
formed (a closed block of code, and not mostly repetition), and the perplexity of neutral text,
where the edit is applied at all positions. Greedy; 95 % bootstrap intervals over prompts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headway.benchmarks.engine import settings
from headway.benchmarks.environment import cuda_device, environment
from headway.benchmarks.options import chosen_model, output_file, save
from headway.benchmarks.quality.coding import held_out_prompts
from headway.benchmarks.quality.intervals import difference, draws, interval, ratio
from headway.benchmarks.quality.language import FENCE, LANGUAGES, language_of
from headway.benchmarks.quality.neutral_text import PARAGRAPHS
from headway.steering.errors import SteeringError
from headway.steering.vectors import VectorProfile

NAME = "headway bench vectors"
STRENGTHS = (0.5, 1.0, 2.0)
"""In units of the strength that the profile's header gives."""
MAX_TOKENS = 160
PROFILE, DRAWN = "profile", "drawn"
REPEATED = 0.5
"""Share of words that stand in a run of four words seen before, from which an answer is broken."""


@dataclass(frozen=True)
class Arm:
    """One way of answering all prompts: a profile of the engine and a strength, or none."""

    name: str
    profile: str | None = None
    strength: float = 0.0

    def spec(self, kind: str, scope: str) -> dict[str, Any] | None:
        """Its `steering` object, None for the unsteered arm."""
        if self.profile is None:
            return None
        options = {"profile": self.profile, "strength": self.strength, "scope": scope}
        return {"methods": [{"method": kind, **options}]}


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON; 2 for a profile that cannot be used."""
    args = build_parser().parse_args(argv)
    try:
        profile = VectorProfile.load(args.profile)
    except SteeringError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    model = chosen_model(args.model)
    base = profile.header.strength
    arms = [Arm("unsteered")]
    arms += [Arm(f"strength {each * base:g}", PROFILE, each * base) for each in args.strengths]
    arms += [Arm(f"drawn directions, {base:g}", DRAWN, base)]
    prompts = held_out_prompts()[: args.prompts]
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
        paths = {
            PROFILE: Path(folder, "made.safetensors"),
            DRAWN: Path(folder, "drawn.safetensors"),
        }
        profile.save(paths[PROFILE])
        drawn(profile, args.seed).save(paths[DRAWN])
        answers, perplexities = serve(model, paths, profile.kind, arms, prompts, args.dtype)
    result = report(arms, answers, perplexities, args.target)
    result |= {
        "profile": {"digest": profile.digest, **profile.header.model_dump(mode="json")},
        "model": model.name,
        "dtype": args.dtype,
        "seed": args.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "answers": answers,
    }
    save(result, table(result), output_file("vectors", args.output))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Measure what a vector profile does to answers."
    )
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", type=Path, metavar="DIR", help="SmolLM2-135M by default")
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=STRENGTHS,
        metavar="X",
        help="in units of the profile's own strength (default: %(default)s)",
    )
    parser.add_argument("--target", choices=LANGUAGES, default="C++")
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N only")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn directions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes")
    return parser


def drawn(profile: VectorProfile, seed: int) -> VectorProfile:
    """The same profile with directions drawn at random, each as long as the one it replaces."""
    name = "shifts" if profile.kind == "act" else "directions"
    given = profile.tensors[name]
    rows = np.random.default_rng(seed).standard_normal(given.shape).astype(np.float32)
    lengths = np.linalg.norm(given, axis=-1, keepdims=True)
    rows *= lengths / np.linalg.norm(rows, axis=-1, keepdims=True)
    return replace(profile, tensors={**profile.tensors, name: rows})


def serve(
    model: Path,
    paths: dict[str, Path],
    kind: str,
    arms: Sequence[Arm],
    prompts: Sequence[str],
    dtype: str,
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The answers of every arm by its name, and its perplexity of neutral text."""
    # The engine lives in this process: one of its own outlived the run, and the run waited for it.
    for name, value in settings(cuda_device() is not None).items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    from headway.steering import sampling_params

    profiles = {name: str(path) for name, path in paths.items()}
    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 30,
        seed=0,
        additional_config={"headway": {"profiles": profiles}},
    )
    chats: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers, perplexities = {}, {}
    for arm in arms:
        generate = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        read = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        spec = arm.spec(kind, "from_last_prompt_token")
        everywhere = arm.spec(kind, "all")
        outputs = llm.chat(chats, sampling_params(generate, spec) if spec else generate)
        answers[arm.name] = [output.outputs[0].text for output in outputs]
        texts = llm.generate(
            list(PARAGRAPHS), sampling_params(read, everywhere) if everywhere else read
        )
        values = [
            next(iter(token.values())).logprob
            for output in texts
            for token in (output.prompt_logprobs or [])
            if token
        ]
        perplexities[arm.name] = math.exp(-float(np.mean(values)))
    return answers, perplexities


def is_well_formed(answer: str) -> bool:
    """Whether it has a closed block of code and is not mostly repetition."""
    closed = answer.count("```") >= 2 and bool(FENCE.search(answer))
    return closed and repeated_share(answer) < REPEATED


def repeated_share(answer: str) -> float:
    """The share of its runs of four words that occurred before in it; 0 for fewer words."""
    words = answer.split()
    runs = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def report(
    arms: Sequence[Arm],
    answers: dict[str, list[str]],
    perplexities: dict[str, float],
    target: str,
) -> dict[str, Any]:
    """The figures of every arm, and the paired differences of the target's share."""
    count = len(answers[arms[0].name])
    weights, ones = draws(count), np.ones(count)
    hits = {
        arm.name: np.array([language_of(answer) == target for answer in answers[arm.name]], float)
        for arm in arms
    }
    baseline = ratio(hits[arms[0].name], ones)
    rows = []
    for arm in arms:
        found = Counter(map(language_of, answers[arm.name]))
        formed = np.array([is_well_formed(answer) for answer in answers[arm.name]], float)
        row = {
            **asdict(arm),
            "target_share": asdict(interval(ratio(hits[arm.name], ones), weights)),
            "languages": {name: number / count for name, number in sorted(found.items())},
            "well_formed": asdict(interval(ratio(formed, ones), weights)),
            "repeated": float(np.mean([repeated_share(each) for each in answers[arm.name]])),
            "perplexity": perplexities[arm.name],
        }
        if arm is not arms[0]:
            gained = difference(ratio(hits[arm.name], ones), baseline, weights)
            row["target_share_gained"] = asdict(gained)
        rows.append(row)
    return {"benchmark": "vectors", "target": target, "prompts": count, "arms": rows}


def table(result: dict[str, Any]) -> str:
    """The report for people."""
    target = result["target"]
    lines = [f"{result['model']}, {result['prompts']} held-out prompts, 95 % intervals"]
    head = ("arm", f"answers in {target}", "well formed", "perplexity")
    lines.append(f"{head[0]:28} {head[1]:>22} {head[2]:>22} {head[3]:>11}")
    for row in result["arms"]:
        shares = " ".join(f"{_interval(row[key]):>22}" for key in ("target_share", "well_formed"))
        lines.append(f"{row['name']:28} {shares} {row['perplexity']:>11.2f}")
    return "\n".join(lines)


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
