"""The PyTorch backend keeps the contract of the portable operations, and builds no autograd graph."""

from __future__ import annotations

import pytest
from test_attention import TOLERANCE, weighted

from subgen.backends import PORTABLE, get

torch = pytest.importorskip("torch")
import numpy as np  # noqa: E402


def operation(name: str):
    return get("torch").operations[name]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ["one", "each"])
def test_weighted_attention(stored: torch.dtype, rows: str) -> None:
    q, k, v, w = map(torch.asarray, weighted(np.random.default_rng(5)))
    k, v = k.to(stored), v.to(stored)
    if rows == "each":
        w = w + torch.zeros(1, q.shape[1], 1)
    given = [x.clone() for x in (q, k, v, w)]
    output, logsumexp = operation("weighted_attention")(q, k, v, w)
    for x, copy in zip((q, k, v, w), given, strict=True):
        assert torch.equal(x, copy)
    expected = PORTABLE["weighted_attention"](q, k.float(), v.float(), w)
    np.testing.assert_allclose(output, expected[0], **TOLERANCE)
    np.testing.assert_allclose(logsumexp, expected[1], **TOLERANCE)
    assert (output.dtype, logsumexp.dtype) == (torch.float32, torch.float32)
    assert bool((output[1] == 0).all())
    assert bool(torch.isneginf(logsumexp[1]).all())


def test_double_precision_stays() -> None:
    q, k, v, w = (torch.asarray(x).double() for x in weighted(np.random.default_rng(6)))
    output, _ = operation("weighted_attention")(q, k, v, w)
    torch.testing.assert_close(output, PORTABLE["weighted_attention"](q, k, v, w)[0], rtol=1e-12, atol=1e-12)


def test_no_autograd_graph() -> None:
    q, k, v, w = (torch.asarray(x).requires_grad_() for x in weighted(np.random.default_rng(7)))
    assert not operation("weighted_attention")(q, k, v, w)[0].requires_grad
