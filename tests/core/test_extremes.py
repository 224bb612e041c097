"""Sixteen bits at their ends: the largest numbers, the smallest, constants and zeros give finite answers.

float16 ends at 65504, and every product of its numbers fits float32, in which all is computed. bfloat16 ends where
float32 does: there what is multiplied must fit, and 1e5 does, in all variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from libraries import LIBRARIES, to_numpy
from sketches import PAPER

from subgen import AttentionSketch, attention
from subgen.default.quantization import Dither, from_roots, round_roots

N, D = 60, 8
SHAPE = (2, N, D)
Streams = tuple[np.ndarray, np.ndarray, np.ndarray]


def signs(rng: np.random.Generator) -> np.ndarray:
    return np.sign(rng.normal(size=SHAPE))


def mixed(rng: np.random.Generator, largest: float, smallest: float) -> np.ndarray:
    scale = np.asarray([largest, smallest, 1.0])[rng.integers(0, 3, (2, N, 1))]
    return scale * rng.uniform(-1, 1, SHAPE)


# Queries, keys and values of a stream.
STREAMS: dict[str, Callable[[np.random.Generator, float, float], Streams]] = {
    "largest": lambda rng, big, small: (big * signs(rng), big * signs(rng), big * signs(rng)),
    "largest, constant": lambda rng, big, small: (np.full(SHAPE, big),) * 3,
    "largest, negative": lambda rng, big, small: (np.full(SHAPE, big), np.full(SHAPE, -big), np.full(SHAPE, -big)),
    "subnormal": lambda rng, big, small: tuple(small * rng.integers(-9, 10, SHAPE) for _ in range(3)),
    "smallest, constant": lambda rng, big, small: (np.full(SHAPE, small),) * 3,
    "zeros": lambda rng, big, small: (np.zeros(SHAPE),) * 3,
    "ones": lambda rng, big, small: (np.ones(SHAPE),) * 3,
    "zero values": lambda rng, big, small: (rng.normal(size=SHAPE), rng.normal(size=SHAPE), np.zeros(SHAPE)),
    "all sizes": lambda rng, big, small: tuple(mixed(rng, big, small) for _ in range(3)),
    "a jump": lambda rng, big, small: (np.where(np.arange(N)[:, None] < N // 2, rng.normal(size=SHAPE), big),) * 3,
}

SKETCHES: dict[str, dict[str, Any]] = {
    "default": {"max_clusters": 9},
    "int8": {"max_clusters": 9, "storage": "int8"},
    "threshold": {"max_clusters": 9, "delta": 1.0},
    "corrected": {"max_clusters": 9, "residual_samples": 12},
    "everything": {"max_clusters": 9, "delta": 0.0, "storage": "int8", "residual_samples": 5},
    "paper": PAPER,
}


def make(variant: str) -> AttentionSketch:
    if variant == "paper":
        return AttentionSketch.paper(**PAPER)
    return AttentionSketch(window=16, sink=2, **SKETCHES[variant])


def answers(variant: str, q: Any, k: Any, v: Any) -> Iterator[np.ndarray]:
    sketch = make(variant)
    yield to_numpy(sketch.step(q[:, :20], k[:, :20], v[:, :20]))
    sketch.update(k[:, 20:], v[:, 20:], queries=q[:, 20:])
    yield to_numpy(sketch.attend(q[:, :30]))
    alone = make(variant)
    alone.update(k, v)
    yield to_numpy(alone.attend(q[:, :30]))


@pytest.mark.parametrize("variant", SKETCHES)
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("dtype", ["numpy float16", "torch float16", "torch bfloat16"])
def test_answers_are_finite_and_means_of_values(dtype: str, name: str, variant: str) -> None:
    library, kind = dtype.split()
    largest, smallest = (1e5, 2.0**-133) if kind == "bfloat16" else (65504.0, 2.0**-24)
    streams = STREAMS[name](np.random.default_rng(0), largest, smallest)
    if library == "torch":
        torch = pytest.importorskip("torch")
        q, k, v = (torch.asarray(x).to(getattr(torch, kind)) for x in streams)
    else:
        q, k, v = (x.astype(kind) for x in streams)
    peak = float(np.abs(to_numpy(v).astype(np.float64)).max())
    for answer in answers(variant, q, k, v):
        assert np.isfinite(answer).all()
        # A mean of values is no larger than the largest; 8 bits of mantissa, and those of codes, may add a little.
        if variant != "paper":
            assert float(np.abs(answer.astype(np.float64)).max()) <= 1.01 * peak + smallest
    if "residual_samples" in SKETCHES[variant]:
        sketch = make(variant)
        sketch.update(k, v, queries=q)
        for part in sketch.attend(q[:, :10], return_error=True):
            assert np.isfinite(to_numpy(part)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_constant_stream_is_its_constant(dtype: str) -> None:
    """Dithered means stay exactly where every member is."""
    torch = pytest.importorskip("torch")
    for number in (65504.0, 0.1, 2.0**-24, -3.0, 0.0):
        x = torch.full((1, 200, 4), number, dtype=getattr(torch, dtype))
        for storage in ("input", "int8"):
            sketch = AttentionSketch(5, window=8, storage=storage)
            sketch.update(x, x)
            # Codes of int8: half a unit of 127, and the rounding of the scale to the dtype.
            tolerance = 0.0 if storage == "input" else 0.012 * abs(number) + 2.0**-24
            torch.testing.assert_close(sketch.attend(x[:, :2]), x[:, :2], rtol=2.0**-10, atol=tolerance)


def test_values_whose_squares_overflow_end() -> None:
    """The paper's reservoir weighs by squared norms; where these are beyond float64 it once never came back."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 1, 50, 4))
    sketch = AttentionSketch.paper(**PAPER)
    sketch.update(k, 1e200 * v)
    sketch.update(k, 1e200 * v)
    assert np.isfinite(sketch.attend(k)).all()


def error_in(dtype: str, scale: float, unit: float, storage: str) -> float:
    """The relative error of answers, with keys so many times as large, queries as much smaller, and values in a unit.

    Keys in forty clumps, of which five are crowds: most of a cluster's mass is in the correction by its variance.
    """
    rng = np.random.default_rng(0)
    crowd = np.where(np.arange(600) < 400, rng.integers(0, 5, 600), rng.integers(0, 40, 600))
    k = rng.normal(size=(40, 32))[crowd] + 0.5 * rng.normal(size=(600, 32))
    v = rng.normal(size=(40, 32))[crowd] + 0.3 * rng.normal(size=(600, 32))
    q = 1.5 * rng.normal(size=(600, 32))
    given = [x[None] for x in (q / scale, k * scale, v * unit)]
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        q, k, v = (torch.asarray(x).to(torch.bfloat16) for x in given)
    else:
        q, k, v = (x.astype(dtype) for x in given)
    sketch = AttentionSketch(60, window=32, storage=storage)
    sketch.update(k, v, queries=q)
    got = to_numpy(sketch.attend(q[:, -128:])).astype(np.float64)
    exact = attention(*(to_numpy(x).astype(np.float64) for x in (q[:, -128:], k, v)))
    return float(np.sqrt(((got - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_know_the_variance_of_keys_of_any_size(dtype: str, storage: str) -> None:
    """In float16 the variance of keys of 1e-4 is less than the least number, and that of keys of 1e3 too large."""
    expected = error_in("float64", 1.0, 1.0, storage)
    for scale in (1.5e-4, 1e-2, 1e3, 1e4):
        # Rounding to 16 and to 8 bits is dithered: other dithers, other errors, by a tenth in trials.
        assert error_in(dtype, scale, 1.0, storage) < 1.2 * expected, scale


def test_codes_of_small_values_have_a_scale() -> None:
    """A 127th of 1e-5 has two digits in float16, and that of 1e-6 is zero."""
    expected = error_in("float64", 1.0, 1.0, "int8")
    assert error_in("float16", 1.0, 1e-5, "int8") < 1.2 * expected
    assert error_in("float16", 1.0, 1e-6, "int8") < 1.6 * expected  # values are numbers of one digit


def test_importance_may_grow_beyond_float16() -> None:
    """Tokens weigh up to 625 times the root of 1000 over their position, and clusters add that up."""
    rng = np.random.default_rng(0)
    uniform = Dither(0.3)
    for dtype in (np.float16, np.float32):
        x = (10.0 ** rng.uniform(-6, 8, (2, 50))).astype(np.float32)
        again = from_roots(round_roots(x, dtype, uniform), np.float32)
        np.testing.assert_allclose(again, x, rtol=2e-3 if dtype is np.float16 else 0)  # two roundings to 11 bits
        np.testing.assert_array_equal(from_roots(round_roots(again, dtype, uniform), np.float32), again)


@pytest.mark.parametrize("name", ["numpy", "strict", "torch"])
def test_two_far_groups_of_keys_are_merged_as_in_float64(name: str) -> None:
    """Distances within a group are a millionth of the squares that float32 would compute them from."""
    library = LIBRARIES[name]
    pytest.importorskip(library.module)
    rng = np.random.default_rng(0)
    crowd, side = rng.integers(0, 12, 400), np.where(rng.random(400) < 0.5, -3e4, 3e4)
    k = rng.normal(size=(12, 16))[crowd] + 0.2 * rng.normal(size=(400, 16))
    v = rng.normal(size=(12, 16))[crowd] + 0.2 * rng.normal(size=(400, 16))
    q = 1.5 * rng.normal(size=(400, 16))
    k[:, 0] += side
    q[:, 0] *= 1e-5
    exact, errors = attention(q[None, -50:], k[None], v[None]), []
    for dtype in (np.float64, np.float32):
        queries, keys, values = (library.array(x[None].astype(dtype)) for x in (q, k, v))
        sketch = AttentionSketch(40, window=16)
        sketch.update(keys, values, queries=queries)
        errors.append(np.abs(to_numpy(sketch.attend(queries[:, -50:, :])) - exact).mean())
    assert errors[1] < 1.05 * errors[0]
