"""Seam: what the prefix cache's key of a steered request covers.

vLLM symbols relied on: `vllm.v1.core.kv_cache_utils._gen_prompt_embeds_extra_hash_keys`, the one
part of a block's extra keys that is made from the `Request` (with `sampling_params`) and from the
positions of the block; its (tag, key) pairs enter the block's hash, and so, by chaining, the hashes
of all later blocks. Every module of vLLM that makes block keys calls it through this module.

A cached block may be reused only where a cold computation would give the same keys and values, so
the hash of a block covers everything that shaped the rows up to its end, and nothing else:

- rows before the first one that a program touches are those of an unsteered request and are shared
  with everyone; the block of the first touched row carries the program's fingerprint;
- where rows depend on where the prompt ends (output scopes, classes made of output tokens, sinks,
  which only prompt tokens can be), the block of that row carries the prompt's length;
- where heads are chosen by the prompt every row depends on all of it, images included, and the
  first block carries its digest;
- emphasised positions enter with the block they lie in;
- which tokens are taken (sampling gate) and what is only read shape no keys and values: they do not
  enter, and a request that does nothing else shares its blocks with unsteered ones.

Unsteered requests get vLLM's own keys. So does the caller's `cache_salt`, which stays vLLM's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

from headway.server.engine.request import EXTRA_ARG
from headway.steering.head_words import KeyTag
from headway.steering.positions import PromptFacts, scope_ranges
from headway.steering.program import QueryScope, SteeringProgram

OUTPUT_SCOPES = (QueryScope.OUTPUT, QueryScope.FROM_LAST_PROMPT_TOKEN)


def prompt_digest(token_ids: Sequence[int], mm_hashes: Iterable[str]) -> str:
    """Tells one prompt from others; mm_hashes: of its images, in order."""
    return hashlib.sha256(repr((list(token_ids), list(mm_hashes))).encode()).hexdigest()


def cache_keys(program: SteeringProgram, facts: PromptFacts, digest: str) -> list[tuple[int, str]]:
    """(position, key) for every position from which on blocks differ from those of others.

    digest: `prompt_digest` of the prompt.
    """
    if program.sampling_gate is not None:
        program = replace(program, sampling_gate=None, saliency=None)
    keys: list[tuple[int, str]] = []
    if not program.scopes and program.sink_rule is None:
        return keys
    scopes = set(program.scopes)
    starts = [start for scope in scopes for start, _ in scope_ranges(scope, facts)]
    touched = min(starts, default=0)
    if program.sink_rule is not None:
        # The tags that these requests write are part of what a block holds, from its first row.
        touched = 0
    keys.append((touched, program.fingerprint))
    if program.head_selection is not None:
        keys.append((touched, f"prompt={digest}"))
    if (
        scopes & set(OUTPUT_SCOPES)
        or program.sink_rule is not None
        or program.mentions(KeyTag.OUTPUT)
    ):
        start = facts.prompt_len - (QueryScope.FROM_LAST_PROMPT_TOKEN in scopes)
        keys.append((start, f"prompt_len={facts.prompt_len}"))
    return keys


def block_keys(payload: dict[str, Any], start: int, stop: int) -> list[tuple[str, str]]:
    """Tagged keys of the block of positions [start, stop) of a request with this payload."""
    keys = [key for position, key in payload["cache_keys"] if start <= position < stop]
    for low, high in payload["facts"]["marks"]:
        if low < stop and high > start:
            keys.append(f"mark={max(low, start)}:{min(high, stop)}")
    return [("headway", key) for key in keys]


def install() -> None:
    """Wrap vLLM's function that makes the keys; calling it again changes nothing."""
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils._gen_prompt_embeds_extra_hash_keys
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def extra_hash_keys(request: Any, start_token_idx: int, end_token_idx: int) -> list[Any]:
        keys: list[Any] = original(request, start_token_idx, end_token_idx)
        params = request.sampling_params
        payload = params and params.extra_args and params.extra_args.get(EXTRA_ARG)
        if payload:
            keys = keys + block_keys(payload, start_token_idx, end_token_idx)
        return keys

    kv_cache_utils._gen_prompt_embeds_extra_hash_keys = extra_hash_keys
