"""The ways back through norm, gate and rotation against autograd, by the kernel and by torch."""

from __future__ import annotations

import pytest
import torch

from headway.kernels import row_gradients
from headway.kernels.row_gradients import Turn, gate_backward, norm_backward, turn_back

pytestmark = pytest.mark.unit

ROWS, CANDIDATES = 3, 5
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(row_gradients, "library", lambda: None)
    else:
        assert row_gradients.library() is not None
    return request.param


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_autograd(function, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of each candidate, in float64; x has no dimension of candidates."""
    x = x.double().requires_grad_()
    output = function(x)
    columns = [
        torch.autograd.grad(output, x, grad[:, index].double(), retain_graph=True)[0]
        for index in range(grad.shape[1])
    ]
    return torch.stack(columns, dim=1).float()


@pytest.mark.parametrize("size", [3, 7, 8, 576])
@pytest.mark.parametrize("heads", [(), (4,)], ids=["rows", "heads"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_norm(size, heads, scale):
    x, grad = drawn(ROWS, *heads, size, scale=scale), drawn(ROWS, CANDIDATES, *heads, size, seed=1)
    weight, eps = drawn(size, seed=2), 1e-5

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()

    want = by_autograd(norm, x, grad)
    found = norm_backward(x, grad, weight, eps)
    limit = 2e-5 * float(want.abs().max())
    torch.testing.assert_close(found, want, atol=limit, rtol=0)


@pytest.mark.parametrize("size", [1, 7, 8, 50])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gate(size, activation):
    act = getattr(torch.nn.functional, activation)
    gate_up, grad = drawn(ROWS, 2 * size, scale=2.0), drawn(ROWS, CANDIDATES, size, seed=1)

    def gated(x: torch.Tensor) -> torch.Tensor:
        return act(x[:, :size]) * x[:, size:]

    gate, up = gate_up.chunk(2, dim=-1)
    slope = by_autograd(act, gate, torch.ones(ROWS, 1, size))[:, 0]
    found = gate_backward(grad, up, act(gate), slope)
    torch.testing.assert_close(found, by_autograd(gated, gate_up, grad), **CLOSE)


@pytest.mark.parametrize("half", [2, 8, 13])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turn(half, interleaved):
    """Queries that are turned in part, keys, and values that are not, as attention gives them."""
    size = 2 * half + 3
    angle = drawn(ROWS, half, seed=3)
    turn = Turn(angle.cos() * 1.1, angle.sin() * 1.1, interleaved)
    cos, sin = turn.cos.double()[:, None], turn.sin.double()[:, None]
    # As attention gives them: the heads before the candidates.
    grads = [drawn(ROWS, heads, CANDIDATES, size, seed=heads).transpose(1, 2) for heads in (4, 2)]

    def turned(x: torch.Tensor) -> torch.Tensor:
        rest = x[..., 2 * half :]
        if interleaved:
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = x[..., :half], x[..., half : 2 * half]
            pairs = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([pairs, rest], dim=-1)

    found = turn_back([(grads[0], turn), (grads[1], turn), (grads[1], None)])
    want = [by_autograd(turned, torch.zeros(ROWS, each.shape[2], size), each) for each in grads]
    want = torch.cat([each.flatten(2) for each in (*want, grads[1])], dim=-1)
    torch.testing.assert_close(found, want, **CLOSE)


def test_what_the_kernel_does_not_take_is_left_to_torch():
    """Other dtypes, and nothing at all."""
    x, grad, weight = (
        each.double() for each in (drawn(2, 8), drawn(2, 3, 8, seed=1), drawn(8, seed=2))
    )
    found = norm_backward(x, grad, weight, 1e-6)
    single = norm_backward(x.float(), grad.float(), weight.float(), 1e-6)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), single, **CLOSE)
    assert gate_backward(drawn(0, 5, 8), *[drawn(0, 8)] * 3).shape == (0, 5, 16)
    assert turn_back([(drawn(0, 5, 2, 8), None)]).shape == (0, 5, 16)
