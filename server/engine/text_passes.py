"""Text passes: what the workers know of prompts without their images, and what is on its way.

vLLM symbols relied on: `vllm.v1.request.Request`, its constructor, `_block_hasher`, `status`,
`num_computed_tokens`, `num_prompt_tokens`, `num_preemptions`; `SamplingParams.extra_args`.

A request whose heads are chosen by its prompt is compared with a pass over its prompt without the
images: a request of its own, once per text, that the scheduler makes (`text_pass_scheduler.py`).
What it gives stays in the workers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from copy import copy
from typing import Any

from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from headway.server.engine.request import EXTRA_ARG, FORGOTTEN_TEXTS, TEXT, TEXT_PASS

MAX_TEXTS = 128
"""Texts whose passes the workers keep: num_layers * num_heads * head_size floats each."""

PREFIX = "headway-text-"
"""Of the request ids of text passes."""


def selection_of(request: Any) -> dict[str, Any] | None:
    """The encoded selection of heads of a request, None if it selects none or runs a text pass."""
    payload = payload_of(request)
    if payload is None or TEXT_PASS in payload:
        return None
    selection: dict[str, Any] | None = payload.get("head_selection")
    return selection


def payload_of(request: Any) -> dict[str, Any] | None:
    """The encoded steering of a request."""
    params = request.sampling_params
    payload: dict[str, Any] | None = (params and params.extra_args or {}).get(EXTRA_ARG)
    return payload


def text_tokens(token_ids: list[int], image_spans: Any) -> list[int]:
    """A prompt without its images."""
    kept, start = [], 0
    for low, high in image_spans:
        kept += token_ids[start:low]
        start = high
    return kept + list(token_ids[start:])


class TextPasses:
    """Which texts the workers know, and which passes are on their way.

    known: key of each, the last used last. running: key -> the request of its pass. passes: how
    many were made so far.
    """

    def __init__(self) -> None:
        self.known: OrderedDict[str, None] = OrderedDict()
        self.running: dict[str, Request] = {}
        self.passes = 0
        self._stale: list[str] = []

    def take(self, request: Request, waiting: list[Request]) -> Request | None:
        """Tell a new request which text it is compared with; the pass, where one is needed.

        waiting: requests whose texts must not be forgotten.
        """
        payload, selection, params = (
            payload_of(request),
            selection_of(request),
            copy(request.sampling_params),
        )
        assert payload is not None and selection is not None and params is not None
        tokens = text_tokens(list(request.prompt_token_ids or ()), payload["facts"]["image_spans"])
        adapter = request.lora_request.lora_int_id if request.lora_request else None
        key = hashlib.sha256(repr((tokens, adapter, request.cache_salt)).encode()).hexdigest()
        if selection["reinforce_baseline"]:
            key = f"{key}-{request.request_id}"  # its heads are scaled as this request's are
        # The sequences of one request (n > 1) may share their parameters.
        params.extra_args = {**(params.extra_args or {}), EXTRA_ARG: {**payload, TEXT: key}}
        request.sampling_params = params
        self.note_computed()
        if key in self.known:
            self.known.move_to_end(key)
        if key in self.known or key in self.running:
            return None
        self.passes += 1
        self.running[key] = self._request(request, key, tokens, self._forget(waiting))
        return self.running[key]

    def clear(self) -> None:
        """What the workers keep is of no use any more."""
        self._stale += self.known
        self.known.clear()

    def pass_of(self, request: Request) -> Request | None:
        """The pass that a request waits for, if it is still to come."""
        return self.running.get((payload_of(request) or {}).get(TEXT, ""))

    def runs_for(self, request: Request) -> bool:
        """Whether the pass of a request, or the request as a pass, is still to come."""
        payload = payload_of(request) or {}
        return payload.get(TEXT, payload.get(TEXT_PASS)) in self.running

    def is_ready(self, request: Request, partial: set[Request]) -> bool:
        """Whether a request may run: its text is known, or its pass ends in this step.

        partial: requests that have more of their prompt to run after this step. A request whose
        pass failed may run too, and fails in the workers.
        """
        text = self.pass_of(request)
        if text is None or text.is_finished():
            return True
        return text.status == RequestStatus.RUNNING and text not in partial

    def note_computed(self) -> None:
        """After a step was scheduled: passes that it completes are known from the next on.

        What a pass that ended before was to tell the workers to forget, another has to.
        """
        for key, text in list(self.running.items()):
            is_computed = text.num_computed_tokens >= text.num_prompt_tokens
            if not is_computed and not text.is_finished():
                continue
            del self.running[key]
            if is_computed and not is_paired(text):
                self.known[key] = None
            else:
                self._stale.append(key)
            if not is_computed:
                self._stale += (payload_of(text) or {})[FORGOTTEN_TEXTS]

    def failed(self, request_id: str) -> None:
        """The workers have not got what a pass should have given."""
        if request_id.startswith(PREFIX):
            key = request_id.removeprefix(PREFIX).split("-", 1)[0]
            if key in self.known:
                del self.known[key]
                self._stale.append(key)

    def _forget(self, waiting: list[Request]) -> list[str]:
        """Make room: the keys of texts that nobody waits for, the oldest first."""
        needed = {(payload_of(request) or {}).get(TEXT) for request in waiting}
        count = max(len(self.known) + 1 - MAX_TEXTS, 0)
        oldest = [key for key in self.known if key not in needed][:count]
        for key in oldest:
            del self.known[key]
        stale = [key for key in self._stale if key not in needed]
        self._stale = [key for key in self._stale if key in needed]
        return oldest + [key for key in stale if key not in self.known and key not in self.running]

    def _request(
        self, request: Request, key: str, tokens: list[int], forgotten: list[str]
    ) -> Request:
        payload = payload_of(request)
        assert payload is not None
        name = f"{PREFIX}{key}-{self.passes}"
        baseline = payload["head_selection"]["reinforce_baseline"]
        params = SamplingParams(temperature=0.0, max_tokens=1)
        params.extra_args = {
            EXTRA_ARG: {
                "report_id": name,
                "fingerprint": "",
                "head_edits": [],
                "residual_edits": [],
                "head_selection": payload["head_selection"] if baseline else None,
                "sink_rule": None,
                "saliency": None,
                "sampling_gate": None,
                "readouts": [],
                "facts": {
                    "prompt_len": len(tokens),
                    "image_spans": [],
                    "image_tokens": [],
                    "marks": [],
                },
                "cache_keys": [(0, name)] if baseline else [],
                TEXT_PASS: key,
                FORGOTTEN_TEXTS: forgotten,
            }
        }
        return Request(
            request_id=name,
            prompt_token_ids=tokens,
            sampling_params=params,
            pooling_params=None,
            client_index=request.client_index,
            # Before the request that waits for it, also where requests go by priority.
            arrival_time=request.arrival_time - 1e-6,
            lora_request=request.lora_request,
            cache_salt=request.cache_salt,
            priority=request.priority,
            block_hasher=request._block_hasher,
        )


def is_paired(request: Request) -> bool:
    """Whether a request and its text pass must run in one step, both having their heads scaled."""
    selection = (payload_of(request) or {}).get("head_selection")
    return bool(selection and selection["reinforce_baseline"])


def must_run_at_once(request: Request) -> bool:
    """Whether the whole prompt of a request must run in one step, its heads being unchosen."""
    return request.num_preemptions == 0 and selection_of(request) is not None
