"""Rows that are NaN, infinite or lost are found, and fail the steered requests they belong to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.server.engine.nonfinite import PendingCheck, fail_lost_rows, lost, magnitudes
from headway.server.engine.scheduler import FAILED_REQUESTS
from tests.unit.test_steering_state import payload, run_step, state

pytestmark = pytest.mark.unit

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(
    st.lists(st.sampled_from([None, NAN, INF, -INF]), min_size=1, max_size=6),
    st.integers(0, 40),
    st.sampled_from(DTYPES),
)
def test_one_number_is_enough_wherever_it_stands(bad, column, dtype):
    hidden = torch.randn(len(bad), 41).to(dtype)
    hidden[:, 0] = 1.0  # a row that was all zeros would be lost too
    for row, value in enumerate(bad):
        if value is not None:
            hidden[row, column] = value
    expected = [row for row, value in enumerate(bad) if value is not None]
    assert lost(magnitudes(hidden)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_numbers_and_zeros_are_none(dtype):
    hidden = torch.full((3, 8), torch.finfo(dtype).max, dtype=dtype)
    hidden[1] = 0.0
    hidden[2] = torch.finfo(dtype).tiny
    assert lost(magnitudes(hidden)) == [1]


def steered(*names: str):
    steering = state()
    for name in names:
        steering.add(name, payload(f"report-{name}", (0, 0, 2.0)))
    return steering


def rows(*bad: int) -> torch.Tensor:
    hidden = torch.ones(3, 32)
    hidden[list(bad)] = NAN
    return hidden


def test_a_lost_row_fails_its_request_and_no_other():
    steering = steered("a", "b")
    run_step(steering, {"a": 2, "x": 1, "b": 1})
    logits = torch.full((3, 5), NAN)
    fail_lost_rows(steering, ["a", "x", "b"], rows(0, 1), logits)
    assert [bool(row.isnan().any()) for row in logits] == [False, True, True]
    assert steering.take_failed() == ("a",)
    report = steering.pop_report("report-a")
    assert (report.failed_stage, report.is_complete) == ("nonfinite", False)
    assert steering.pop_report("report-b").is_complete


def test_without_steered_requests_nothing_is_looked_at():
    fail_lost_rows(state(), ["x"], None, None)  # type: ignore[arg-type]


def test_a_look_that_fails_fails_all_steered_requests():
    steering = steered("a", "b")
    fail_lost_rows(steering, ["a", "b"], None, None)  # type: ignore[arg-type]
    assert sorted(steering.take_failed()) == ["a", "b"]


class Output:
    """Stands for vLLM's AsyncOutput."""

    def __init__(self, **attributes: object) -> None:
        self.result = SimpleNamespace(**attributes)

    def get_output(self) -> SimpleNamespace:
        return self.result


def pending(steering, names: list[str], hidden: torch.Tensor) -> PendingCheck:
    """Of a step in which each request has two rows, and tokens are sampled from the second."""
    two = hidden.repeat_interleave(2, dim=0)
    slots = [0 if name in steering.requests else -1 for name in names for _ in range(2)]
    check = PendingCheck(
        steering, names, two, torch.arange(1, 2 * len(names), 2), torch.tensor([*slots, 7])
    )
    for index, name in enumerate(names):
        given = hidden[index].isnan().any()
        assert two[2 * index].isnan().any() == given
        zeroed = bool((two[2 * index + 1] == 0).all())
        assert zeroed is bool(given and name in steering.requests)
    return check


def test_where_the_host_does_not_wait_the_result_tells():
    steering = steered("a", "b")
    run_step(steering, {"a": 1, "x": 1, "b": 1})
    output = Output(**{FAILED_REQUESTS: ("other",)})
    pending(steering, ["a", "x", "b"], rows(1, 2)).ride(output)
    steering.remove(["a", "b"])  # the next step has begun
    assert getattr(output.get_output(), FAILED_REQUESTS) == ("other", "b")
    assert steering.pop_report("report-b").failed_stage == "nonfinite"
    assert steering.pop_report("report-a").is_complete


def test_a_result_without_lost_rows_stays_as_it_is():
    steering = steered("a")
    output = Output()
    pending(steering, ["a", "x", "y"], rows(1)).ride(output)
    assert not hasattr(output.get_output(), FAILED_REQUESTS)
