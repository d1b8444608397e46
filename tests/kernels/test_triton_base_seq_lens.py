"""Lengths that the base kernel is told, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from headway.kernels.triton.base_seq_lens import base_seq_lens_

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("num_reqs", [1, 7, 128, 300])
def test_replaced_sequences_are_as_long_as_their_rows(num_reqs):
    draw = torch.Generator().manual_seed(num_reqs)
    rows = torch.randint(0, 5, (num_reqs,), generator=draw).int()
    seq_lens = rows + torch.randint(0, 900, (num_reqs,), generator=draw).int()
    query_start_loc = torch.cat([torch.zeros(1), rows.cumsum(0)]).int()
    replaced = torch.randint(0, 2, (3, num_reqs + 4), generator=draw).to(torch.uint8)
    pretended = torch.full((3, num_reqs + 9), -7, dtype=torch.int32)
    base_seq_lens_(pretended, seq_lens, query_start_loc, replaced)
    expected = torch.where(replaced[:, :num_reqs] != 0, rows, seq_lens)
    assert (pretended[:, :num_reqs] == expected).all()
    assert (pretended[:, num_reqs:] == -7).all()
