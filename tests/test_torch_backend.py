"""The PyTorch backend keeps the contract of the portable operations, and builds no autograd graph."""

from __future__ import annotations

import pytest
from test_attention import TOLERANCE, weighted

from subgen import AttentionSketch, backends
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


def test_a_token_is_written_where_it_belongs_and_not_into_tensors_of_inference_mode() -> None:
    write = operation("write")
    x, block = torch.zeros(2, 5, 3), torch.ones(2, 2, 3, requires_grad=True)
    written = write(x, 1, block)
    assert written.data_ptr() == x.data_ptr()
    assert not written.requires_grad
    np.testing.assert_array_equal(written, PORTABLE["write"](torch.zeros(2, 5, 3), 1, block.detach()))
    with torch.inference_mode():
        x = torch.zeros(2, 5, 3)
        assert write(x, 3, block).data_ptr() == x.data_ptr()
    assert bool((x[:, 3:] == 1).all())
    np.testing.assert_array_equal(write(x, 0, block), PORTABLE["write"](x, 0, block.detach()))
    assert bool((x[:, :2] == 0).all())


@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_read_and_rounded_as_the_portable_code_does(
    storage: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few of many numbers: the least that the dtype tells apart, where they lie on the edge of two."""
    keys, values, queries = torch.randn(3, 2, 150, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    sketches, outputs = [], []
    for portable in (False, True):
        if portable:
            monkeypatch.setitem(backends._resolved, "torch", backends.Operations())
        sketch = AttentionSketch(24, window=12, sink=2, storage=storage)
        sketch.update(keys[:, :60], values[:, :60], queries[:, :60])
        rows = [[x[:, i : i + 1] for x in (queries, keys, values)] for i in range(60, 150)]
        outputs.append(torch.cat([sketch.step(*row) for row in rows], dim=1).float())
        sketches.append(sketch)
    (one, other), unit = (sketch.state for sketch in sketches), torch.finfo(dtype).eps
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.queries.codes, other.queries.codes)
    for name in ("keys", "values", "spread", "importance"):
        x, y = getattr(one, name), getattr(other, name)
        assert x.dtype == y.dtype == dtype
        assert (x != y).float().mean() < 0.01, name
        torch.testing.assert_close(x, y, rtol=2 * unit, atol=2 * unit)
    if storage == "int8":
        for x, y in ((one.key_codes, other.key_codes), (one.value_codes, other.value_codes)):
            assert (x.codes != y.codes).float().mean() < 0.01
            torch.testing.assert_close(x.scales, y.scales, rtol=2 * unit, atol=0)
    # A unit where the output is rounded, and those of the numbers that differ.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2 * unit, atol=2 * unit)


def test_16_bits_without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with them, but for what is summed up in another order."""
    from subgen_numpy import _absorbing, _attention, _merging, _rounding
    from subgen_torch import _shared

    keys, values, queries = torch.randn(3, 2, 90, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs = []
    for loops in (True, False):
        if not loops:
            for module in (_absorbing, _attention, _merging, _rounding, _shared):
                monkeypatch.setattr(module, "compiled", lambda what: None)
        sketch = AttentionSketch(24, window=12, sink=2)
        sketch.update(keys[:, :60], values[:, :60], queries[:, :60])
        rows = [[x[:, i : i + 1] for x in (queries, keys, values)] for i in range(60, 90)]
        outputs.append(torch.cat([sketch.step(*row) for row in rows], dim=1).float())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("delta", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_that_goes_in_and_out_of_inference_mode(delta: float | None, dtype: torch.dtype) -> None:
    """The same state as outside all along, keys that ask for gradients included."""
    keys, values, queries = torch.randn(3, 2, 120, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    sketches = [AttentionSketch(12, delta=delta, window=8, sink=2) for _ in range(2)]
    for start in range(0, 120, 5):
        part = slice(start, start + 5)
        sketches[0].update(keys[:, part], values[:, part], queries[:, part])
        with torch.inference_mode(start % 3 == 0):
            asking = (x[:, part].clone().requires_grad_() for x in (keys, values, queries))
            sketches[1].update(*asking)
    one, other = (sketch.state for sketch in sketches)
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.queries.codes, other.queries.codes)
    assert not other.keys.requires_grad
