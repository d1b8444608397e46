"""Which texts are run for requests whose heads are chosen by the prompt, and what is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from headway.server.engine import text_passes
from headway.server.engine.request import EXTRA_ARG, FORGOTTEN_TEXTS, TEXT, TEXT_PASS
from headway.server.engine.text_passes import (
    TextPasses,
    is_paired,
    must_run_at_once,
    payload_of,
    selection_of,
    text_tokens,
)

pytestmark = pytest.mark.unit

IMAGE = 9


def request(
    name: str, tokens: list[int], baseline: bool = False, salt: str | None = None
) -> Request:
    """A request whose image tokens are the run of 9s in its prompt, and that selects heads."""
    start = tokens.index(IMAGE)
    stop = start + tokens.count(IMAGE)
    params = SamplingParams(max_tokens=3)
    params.extra_args = {
        EXTRA_ARG: {
            "head_selection": {"layers": [1], "alpha": 2.0, "reinforce_baseline": baseline},
            "facts": {"image_spans": [(start, stop)], "marks": []},
            "cache_keys": [(0, "a key")],
        }
    }
    return Request(name, tokens, params, None, cache_salt=salt, arrival_time=7.0)


def payload(each: Request) -> dict[str, Any]:
    found = payload_of(each)
    assert found is not None
    return found


def done(passes: TextPasses, text: Request) -> None:
    """The scheduler has scheduled all of a pass."""
    text.status = RequestStatus.RUNNING
    text.num_computed_tokens = text.num_prompt_tokens
    passes.note_computed()


def test_images_are_left_out():
    assert text_tokens([1, 9, 9, 2, 9, 3], [(1, 3), (4, 5)]) == [1, 2, 3]
    assert text_tokens([1, 2], []) == [1, 2]


def test_a_pass_is_an_unsteered_request_of_one_token():
    passes = TextPasses()
    asked = request("a", [1, 9, 9, 2, 3])
    text = passes.take(asked, [])
    assert text is not None and list(text.prompt_token_ids) == [1, 2, 3]
    assert text.max_tokens == 1 and text.mm_features == []
    assert text.arrival_time < asked.arrival_time
    sent = payload(text)
    assert sent["cache_keys"] == [] and sent["head_selection"] is None
    assert sent[TEXT_PASS] == payload(asked)[TEXT]
    assert selection_of(asked) is not None and selection_of(text) is None
    assert must_run_at_once(asked) and not must_run_at_once(text)


def test_the_same_text_is_run_once():
    passes = TextPasses()
    first = passes.take(request("a", [1, 9, 9, 2, 3]), [])
    assert first is not None
    assert passes.take(request("b", [1, 2, 9, 3]), []) is None  # on its way
    done(passes, first)
    assert passes.take(request("c", [9, 1, 2, 3]), []) is None  # known
    assert passes.take(request("d", [9, 1, 2, 4]), []) is not None
    assert passes.passes == 2


def test_callers_with_other_salts_share_nothing():
    passes = TextPasses()
    assert passes.take(request("a", [1, 9], salt="one"), []) is not None
    assert passes.take(request("b", [1, 9], salt="two"), []) is not None


def test_sequences_that_share_their_parameters_are_told_apart():
    passes = TextPasses()
    one, other = request("a-0", [1, 9], baseline=True), request("a-1", [1, 9], baseline=True)
    other.sampling_params = one.sampling_params
    passes.take(one, [])
    passes.take(other, [])
    assert payload(one)[TEXT] != payload(other)[TEXT]


def test_a_request_waits_until_its_text_has_been_scheduled_to_its_end():
    passes = TextPasses()
    asked = request("a", [1, 9, 9, 2, 3])
    text = passes.take(asked, [])
    assert text is not None
    assert not passes.is_ready(asked, set())
    text.status = RequestStatus.RUNNING
    assert not passes.is_ready(asked, {text})  # a part of it, in this step
    assert passes.is_ready(asked, set())  # its end, in this step
    done(passes, text)
    assert passes.is_ready(asked, set()) and not passes.running


def test_a_pass_that_ended_early_holds_nobody_up_and_is_made_again():
    passes = TextPasses()
    asked = request("a", [1, 9, 9, 2, 3])
    text = passes.take(asked, [])
    assert text is not None
    text.status = RequestStatus.FINISHED_ABORTED
    assert passes.is_ready(asked, set())
    again = passes.take(request("b", [1, 9, 2, 3]), [])
    assert again is not None and again.request_id != text.request_id


def test_a_pass_that_failed_in_the_workers_is_made_again():
    passes = TextPasses()
    text = passes.take(request("a", [1, 9, 2]), [])
    assert text is not None
    done(passes, text)
    passes.failed("another request")
    assert passes.take(request("b", [1, 9, 2]), []) is None
    passes.failed(text.request_id)
    assert passes.take(request("c", [1, 9, 2]), []) is not None


def test_the_text_least_recently_used_is_forgotten(monkeypatch):
    monkeypatch.setattr(text_passes, "MAX_TEXTS", 3)
    passes = TextPasses()
    asked = [request(str(index), [index, 9]) for index in range(5)]
    for each in asked[:3]:
        text = passes.take(each, [])
        assert text is not None
        done(passes, text)
    assert passes.take(request("again", [0, 9]), []) is None
    waiting = [asked[1]]
    text = passes.take(asked[3], waiting)
    assert text is not None
    # 0 was used again, and somebody waits for 1.
    assert payload(text)[FORGOTTEN_TEXTS] == [payload(asked[2])[TEXT]]
    done(passes, text)
    text = passes.take(asked[4], [])
    assert text is not None and payload(text)[FORGOTTEN_TEXTS] == [payload(asked[1])[TEXT]]


def test_cleared_texts_are_forgotten_with_the_next_pass():
    passes = TextPasses()
    asked = request("a", [1, 9])
    text = passes.take(asked, [])
    assert text is not None
    done(passes, text)
    passes.clear()
    other = passes.take(request("b", [2, 9]), [asked])
    assert other is not None and payload(other)[FORGOTTEN_TEXTS] == []  # it is waited for
    third = passes.take(request("c", [3, 9]), [])
    assert third is not None and payload(third)[FORGOTTEN_TEXTS] == [payload(asked)[TEXT]]


def test_a_reinforced_baseline_has_a_pass_of_its_own():
    passes = TextPasses()
    one, other = request("a", [1, 9], baseline=True), request("b", [1, 9], baseline=True)
    texts = [passes.take(each, []) for each in (one, other)]
    assert all(texts) and all(is_paired(each) for each in (one, other, *texts))
    for each, text in zip((one, other), texts, strict=True):
        assert passes.pass_of(each) is text
        assert payload(text)["head_selection"] is not None
        assert payload(text)["cache_keys"]  # its blocks are nobody else's
    done(passes, texts[0])
    assert not passes.runs_for(one) and passes.runs_for(other) and not passes.known
    last = passes.take(request("c", [2, 9]), [])
    assert last is not None and payload(last)[FORGOTTEN_TEXTS] == [payload(one)[TEXT]]


def ended(passes: TextPasses, text: Request, computed: int = 0) -> None:
    """A pass was aborted, some of it computed; then a step was scheduled."""
    text.status = RequestStatus.FINISHED_ABORTED
    text.num_computed_tokens = computed
    passes.note_computed()


@pytest.mark.parametrize("step", [True, False], ids=["then a step", "at once"])
def test_what_a_pass_that_never_ran_was_to_have_forgotten_the_next_one_has(step):
    passes = TextPasses()
    asked = [request(str(index), [index, 9]) for index in range(3)]
    text = passes.take(asked[0], [])
    assert text is not None
    done(passes, text)
    passes.clear()
    text = passes.take(asked[1], [])
    assert text is not None and payload(text)[FORGOTTEN_TEXTS] == [payload(asked[0])[TEXT]]
    text.status = RequestStatus.FINISHED_ABORTED
    if step:
        passes.note_computed()
    again = passes.take(request("same", [1, 9]), [])
    assert again is not None and set(payload(again)[FORGOTTEN_TEXTS]) >= {payload(asked[0])[TEXT]}
    done(passes, again)
    last = passes.take(asked[2], [])
    assert last is not None and payload(last)[FORGOTTEN_TEXTS] == []  # they were told


def test_of_a_pass_that_ended_early_nothing_is_known():
    passes = TextPasses()
    asked = request("a", [1, 9, 2, 3])
    text = passes.take(asked, [])
    assert text is not None
    ended(passes, text, computed=1)
    assert not passes.known and not passes.running
    other = passes.take(request("b", [4, 9]), [])
    assert other is not None and payload(other)[FORGOTTEN_TEXTS] == [payload(asked)[TEXT]]


def test_a_text_that_is_run_again_is_not_forgotten_meanwhile():
    passes = TextPasses()
    first = passes.take(request("a", [1, 9]), [])
    assert first is not None
    done(passes, first)
    waited_for = request("b", [1, 9])
    passes.take(waited_for, [])
    passes.clear()
    again = passes.take(request("c", [1, 9]), [waited_for])
    assert again is not None and payload(again)[FORGOTTEN_TEXTS] == []
    other = passes.take(request("d", [2, 9]), [])
    assert other is not None and payload(other)[FORGOTTEN_TEXTS] == []


def test_what_a_failed_pass_left_is_forgotten():
    passes = TextPasses()
    asked = request("a", [1, 9])
    text = passes.take(asked, [])
    assert text is not None
    done(passes, text)
    passes.failed(text.request_id)
    other = passes.take(request("b", [2, 9]), [])
    assert other is not None and payload(other)[FORGOTTEN_TEXTS] == [payload(asked)[TEXT]]
