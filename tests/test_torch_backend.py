"""The PyTorch backend keeps the contract of the portable operations, and builds no autograd graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import TOLERANCE, weighted

import subgen
from subgen import AttentionSketch, backends
from subgen.backends import PORTABLE, get
from subgen.kcenter import delta_for_clusters, k_center_radii

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


# Modes of torch that are set for all that runs inside.


@contextlib.contextmanager
def setting(get: Callable[[], object], use: Callable[[object], object], value: object) -> Iterator[None]:
    before = get()
    use(value)
    try:
        yield
    finally:
        use(before)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype float16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}

SKETCHES: dict[str, Callable[[], AttentionSketch]] = {
    "default": lambda: AttentionSketch(12, window=8, sink=2),
    "int8": lambda: AttentionSketch(12, window=8, sink=2, storage="int8"),
    "delta": lambda: AttentionSketch(12, window=8, sink=2, delta=2.0),
    "corrected": lambda: AttentionSketch(12, window=8, sink=2, residual_samples=8),
    "remembering": lambda: AttentionSketch(800, window=8, sink=2),
    "paper": lambda: AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=8, scale=0.3),
}


def everything(sketch: Callable[[], AttentionSketch], rows: list[torch.Tensor], file: Path, mode: Any) -> list[Any]:
    """Results of every call, each of them in a mode of its own."""
    q, k, v = rows
    one, other = sketch(), sketch()
    with mode():
        one.update(k[:, :40], v[:, :40], q[:, :40])
    with mode():
        other.update(k[:, 40:], v[:, 40:])
    results: list[Any] = []
    for call in (
        lambda: one.step(q[:, 40:41], k[:, 40:41], v[:, 40:41]),
        lambda: one.step(q[:, 41:], k[:, 41:], v[:, 41:]),
        lambda: one.attend(q[:, :2]),
        lambda: one.attend(q),
        lambda: one.attend(q, return_logsumexp=True)[1],
        lambda: one.attend(q, return_error=True)[1] if "residual_samples=8" in repr(one) else q,
        lambda: subgen.merge(one, other),
        lambda: (one.save(file), subgen.load(file, like=q))[1],
        lambda: subgen.attention(q, k, v),
        lambda: subgen.attention(q, k, v, causal=True),
        lambda: k_center_radii(k, 3),
        lambda: delta_for_clusters(k, 5),
    ):
        with mode():
            result = call()
        results.append(result.attend(q) if isinstance(result, AttentionSketch) else result)
    results += [one.attend(q), one.n_clusters]
    return results


@pytest.mark.parametrize(
    ("kind", "mode"),
    # Autocast reaches into every product; others into what is made anew, which the kinds share.
    [(kind, mode) for kind in SKETCHES for mode in MODES if "autocast" in mode or kind in ("default", "paper")],
)
def test_modes_change_no_bit(kind: str, mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if kind == "default" else (torch.float32,):
        rows = [torch.asarray(rng.normal(size=(heads, 80, 8))).to(dtype) for heads in (4, 2, 2)]
        expected = everything(SKETCHES[kind], rows, tmp_path / "a.safetensors", contextlib.nullcontext)
        got = everything(SKETCHES[kind], rows, tmp_path / "b.safetensors", MODES[mode])
        for one, other in zip(got, expected, strict=True):
            if isinstance(one, float):
                assert one == other
                continue
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@settings(max_examples=10)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["update", "step", "attend", "take"]), st.integers(1, 20), st.sampled_from([*MODES])),
        min_size=3,
        max_size=12,
    ),
    kind=st.sampled_from([*SKETCHES]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_stream_that_goes_through_all_modes(calls: list[tuple[str, int, str]], kind: str, dtype: torch.dtype) -> None:
    q, k, v = (
        torch.asarray(x).to(dtype) for x in np.random.default_rng(1).normal(size=(3, 1, 2, 300, 8)).astype(np.float32)
    )
    sketches, start = [SKETCHES[kind]() for _ in range(2)], 0
    for call, size, mode in [("update", 1, "grad"), *calls]:
        part, results = (..., slice(start, start + size), slice(None)), []
        for i in range(2):
            with MODES[mode]() if i else contextlib.nullcontext():
                if call == "update":
                    sketches[i].update(k[part], v[part], q[part])
                elif call == "step":
                    results.append(sketches[i].step(q[part], k[part], v[part]))
                elif call == "attend":
                    results.append(sketches[i].attend(q[part]))
                else:
                    sketches[i] = sketches[i].take([0])
        start += size if call in ("update", "step") else 0
        assert not results or torch.equal(*results)
    assert sketches[0].n_seen == sketches[1].n_seen == start
    assert torch.equal(*(sketch.attend(q) for sketch in sketches))


def test_compiled_functions_run_calls_as_they_are() -> None:
    keys, values, queries = torch.randn(3, 2, 60, 8, generator=torch.Generator().manual_seed(0))
    compiled, plain = AttentionSketch(12, window=8), AttentionSketch(12, window=8)

    def read(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        compiled.update(k, v, q)
        return compiled.attend(2 * q) + 1

    got = torch.compile(read, backend="eager")(queries, keys, values)
    plain.update(keys, values, queries)
    assert compiled.n_seen == 60
    assert torch.equal(got, plain.attend(2 * queries) + 1)
