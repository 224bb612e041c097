"""Modes of torch that are set for all that runs inside change no bit of a sketch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import subgen
from subgen import AttentionSketch
from subgen.evaluation.cover import delta_for_clusters, k_center_radii

torch = pytest.importorskip("torch")


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
    "cached neighbours": lambda: AttentionSketch(800, window=8, sink=2),
    "paper": lambda: AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=8, scale=0.3),
}


def everything(sketch: Callable[[], AttentionSketch], rows: list[torch.Tensor], file: Path, mode: Any) -> list[Any]:
    """Results of every call, each of them in a mode of its own."""
    q, k, v = rows
    one, other = sketch(), sketch()
    with mode():
        one.update(k[:, :40], v[:, :40], queries=q[:, :40])
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
                    sketches[i].update(k[part], v[part], queries=q[part])
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
        compiled.update(k, v, queries=q)
        return compiled.attend(2 * q) + 1

    got = torch.compile(read, backend="eager")(queries, keys, values)
    plain.update(keys, values, queries=queries)
    assert compiled.n_seen == 60
    assert torch.equal(got, plain.attend(2 * queries) + 1)
