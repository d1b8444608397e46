"""The prefix-cache salt of a steered request.

A cached KV block may be reused only where a cold computation would give the same keys and values.
Edits at all positions are covered by the program's fingerprint: any request with the same program
and the same tokens computes the same block, in a prompt or in an output, in this turn or a later
one. Unsteered requests keep the caller's salt untouched and so share with stock traffic.
"""

from __future__ import annotations

import hashlib

from headway.steering.program import QueryScope, SteeringProgram


def cache_salt(caller_salt: str | None, program: SteeringProgram) -> str:
    """Salt that separates the blocks of this (caller, program) from all others.

    Raises ValueError for a scope that the fingerprint alone does not cover: there the prompt
    length has to be part of the key.
    """
    if any(edit.scope is not QueryScope.ALL for edit in program.head_edits):
        raise ValueError("the cache key of a partial query scope needs the prompt length")
    digest = hashlib.sha256(b"headway-salt-1")
    # The presence byte keeps "no salt" apart from an empty one.
    digest.update(b"\0" if caller_salt is None else b"\1" + caller_salt.encode())
    digest.update(bytes.fromhex(program.fingerprint))
    return f"headway-{digest.hexdigest()}"
