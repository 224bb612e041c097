"""Bad input: a clear error that says what was given and what to do, and the sketch exactly as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from libraries import Library

from subgen import AttentionSketch, attention

GOOD = {"delta": 1.0, "samples_per_cluster": 2, "value_samples": 4}
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(2, 3, 8, 4)).astype(np.float32)
VALUES = RNG.normal(size=(2, 3, 8, 5)).astype(np.float32)
QUERIES = RNG.normal(size=(2, 6, 8, 4)).astype(np.float32)


def broken(x: np.ndarray, number: float) -> np.ndarray:
    x = x.copy()
    x[0, 1, 2, 3] = number
    return x


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"delta": -0.5}, ValueError, "delta.*at least 0.*-0.5"),
        ({"delta": float("nan")}, ValueError, "delta.*nan"),
        ({"delta": float("inf")}, ValueError, "delta.*inf"),
        ({"delta": "4"}, TypeError, "delta.*'4'"),
        ({"delta": None}, TypeError, "delta.*None"),
        ({"samples_per_cluster": 0}, ValueError, "samples_per_cluster.*at least 1.*0"),
        ({"samples_per_cluster": 2.0}, TypeError, "samples_per_cluster.*integer.*2.0"),
        ({"value_samples": 0}, ValueError, "value_samples.*at least 1.*0"),
        ({"value_samples": True}, TypeError, "value_samples.*True"),
        ({"scale": 0.0}, ValueError, "scale.*above 0"),
        ({"scale": -1}, ValueError, "scale.*above 0"),
        ({"seed": -1}, ValueError, "seed.*at least 0"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed.*integer"),
    ],
)
def test_parameters(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        AttentionSketch.paper(**{**GOOD, **change})


BLOCKS = {
    "lists": (KEYS.tolist(), VALUES, None, TypeError, "keys must be an array.*list.*numpy.asarray"),
    "integers": (KEYS.astype(int), VALUES, None, TypeError, "floating dtype.*int64.*cast"),
    "complex": (KEYS.astype(np.complex64), VALUES, None, TypeError, "floating dtype.*complex64"),
    "one axis": (KEYS[0, 0, 0], VALUES, None, ValueError, r"tokens, head_dim.*\(4,\)"),
    "scalar": (np.float32(1), VALUES, None, (TypeError, ValueError), "keys"),
    "empty block": (KEYS[:, :, :0], VALUES[:, :, :0], None, ValueError, "empty.*skip the call"),
    "no head_dim": (KEYS[..., :0], VALUES, None, ValueError, "empty"),
    "other lengths": (KEYS[:, :, :7], VALUES, None, ValueError, "agree in every axis.*7.*8"),
    "other heads": (KEYS[:, :2], VALUES[:, :2], None, ValueError, "the stream has keys.*'n'.*start another"),
    "other batch": (KEYS[:1], VALUES[:1], None, ValueError, "the stream has keys"),
    "other head_dim": (KEYS[..., :3], VALUES, None, ValueError, "the stream has keys"),
    "other value_dim": (KEYS, VALUES[..., :3], None, ValueError, "the stream has keys"),
    "fewer axes": (KEYS[0], VALUES[0], None, ValueError, "the stream has keys"),
    "NaN key": (broken(KEYS, np.nan), VALUES, None, ValueError, "keys holds NaN or infinity; nothing was changed"),
    "infinite value": (KEYS, broken(VALUES, -np.inf), None, ValueError, "values holds NaN"),
    "NaN query": (KEYS, VALUES, broken(QUERIES, np.nan), ValueError, "queries holds NaN"),
    "other dtype": (KEYS.astype(float), VALUES.astype(float), None, TypeError, "float64.*stream so far.*float32"),
    "mixed dtypes": (KEYS, VALUES.astype(np.float16), None, TypeError, "values has dtype float16 but keys float32"),
    "heads not a multiple": (KEYS, VALUES, QUERIES[:, :4], ValueError, "multiple.*4 query heads.*3 key-value"),
    "other query length": (KEYS, VALUES, QUERIES[:, :, :5], ValueError, "one query.*5 queries for 8"),
    "other query head_dim": (KEYS, VALUES, QUERIES[..., :3], ValueError, "head_dim 3"),
    "other query batch": (KEYS, VALUES, QUERIES[:1], ValueError, "leading axes"),
    "query dtype": (KEYS, VALUES, QUERIES.astype(float), TypeError, "queries has dtype float64"),
}


@pytest.mark.parametrize("case", list(BLOCKS))
@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_bad_blocks_change_nothing(case: str) -> None:
    keys, values, queries, kind, message = BLOCKS[case]
    sketch, twin = AttentionSketch.paper(**GOOD), AttentionSketch.paper(**GOOD)
    for each in (sketch, twin):
        each.update(KEYS, VALUES)
    state = sketch.state
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        sketch.update(keys, values, queries=queries)
    with pytest.raises(kind):
        sketch.step(QUERIES if queries is None else queries, keys, values)
    assert sketch.state is state
    for each in (sketch, twin):
        each.update(KEYS[::-1], VALUES[::-1])
    np.testing.assert_array_equal(sketch.attend(QUERIES), twin.attend(QUERIES))


def test_a_bad_first_block_leaves_the_sketch_empty_and_free() -> None:
    sketch = AttentionSketch.paper(**GOOD)
    with pytest.raises(ValueError, match="NaN"):
        sketch.update(broken(KEYS, np.nan), VALUES)
    assert sketch.n_seen == 0
    sketch.update(KEYS[0], VALUES[0])  # another shape is fine: nothing was fixed yet
    assert sketch.n_seen == 8


@pytest.mark.parametrize(
    ("queries", "kind", "message"),
    [
        (QUERIES.tolist(), TypeError, "queries must be an array"),
        (QUERIES[:, :4], ValueError, "multiple"),
        (QUERIES[..., :2], ValueError, "head_dim 2"),
        (QUERIES[0], ValueError, "leading axes"),
        (QUERIES[:, :, :0], ValueError, "empty"),
        (broken(QUERIES, np.inf), ValueError, "NaN or infinity"),
        (QUERIES.astype(np.float16), TypeError, "float16.*float32"),
    ],
)
def test_bad_queries(queries: Any, kind: type[Exception], message: str) -> None:
    sketch = AttentionSketch.paper(**GOOD)
    sketch.update(KEYS, VALUES)
    with pytest.raises(kind, match=message):
        sketch.attend(queries)


def test_another_library_is_refused(library: Library) -> None:
    if library.name == "numpy":
        pytest.skip("the library of the stream")
    sketch = AttentionSketch.paper(**GOOD)
    sketch.update(KEYS, VALUES)
    state = sketch.state
    with pytest.raises(TypeError, match="convert one of them"):
        sketch.update(library.array(KEYS), library.array(VALUES))
    with pytest.raises(TypeError, match="convert one of them"):
        sketch.update(library.array(KEYS), VALUES)
    with pytest.raises(TypeError, match="convert one of them"):
        sketch.attend(library.array(QUERIES))
    assert sketch.state is state


def test_another_device_is_refused() -> None:
    strict = pytest.importorskip("array_api_strict")
    other = strict.Device("device1")
    sketch = AttentionSketch.paper(**GOOD)
    sketch.update(strict.asarray(KEYS), strict.asarray(VALUES))
    state = sketch.state
    with pytest.raises(TypeError, match="move one of them"):
        sketch.update(strict.asarray(KEYS, device=other), strict.asarray(VALUES, device=other))
    with pytest.raises(TypeError, match="move one of them"):
        sketch.attend(strict.asarray(QUERIES, device=other))
    assert sketch.state is state


def test_streams_live_on_their_device() -> None:
    strict = pytest.importorskip("array_api_strict")
    other = strict.Device("device1")
    keys, values, queries = (strict.asarray(x, device=other) for x in (KEYS, VALUES, QUERIES))
    sketch = AttentionSketch.paper(**GOOD)
    assert sketch.step(queries, keys, values).device == other
    assert attention(queries, keys, values, causal=True).device == other


def test_attention_arguments() -> None:
    with pytest.raises(ValueError, match="at most 8 queries"):
        attention(np.concatenate([QUERIES, QUERIES], axis=2), KEYS, VALUES, causal=True)
    with pytest.raises(ValueError, match="NaN"):
        attention(QUERIES, broken(KEYS, np.nan), VALUES)
    with pytest.raises(ValueError, match="scale"):
        attention(QUERIES, KEYS, VALUES, scale=float("inf"))
    with pytest.raises(TypeError, match="queries must be an array"):
        attention(None, KEYS, VALUES)


def test_jax_without_64_bits_is_told_what_to_do() -> None:
    pytest.importorskip("jax")
    program = (
        "import jax.numpy as jnp, subgen\n"
        "try: subgen.attention(*[jnp.zeros((3, 2))] * 3)\n"
        "except TypeError as error: print(error)\n"
    )
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "jax.config.update('jax_enable_x64', True)" in done.stdout


def test_ml_dtypes_bfloat16_in_numpy_is_told_what_to_do() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match="cast it first"):
        attention(*[np.zeros((3, 2), dtype=ml_dtypes.bfloat16)] * 3)
