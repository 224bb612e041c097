"""Kinds of arrays: read as they are meant, or refused in words that say what to pass, and nothing is changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import subgen
from subgen import AttentionSketch, attention

RNG = np.random.default_rng(0)
KEYS, VALUES, QUERIES = RNG.normal(size=(3, 2, 60, 8)).astype(np.float32)


def unaligned(x: np.ndarray) -> np.ndarray:
    """The same numbers, one byte further than where words lie."""
    return np.frombuffer(b"x" + x.tobytes(), dtype=np.uint8)[1:].view(x.dtype).reshape(x.shape)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


#: Other forms of the same numbers.
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda x: x,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": read_only,
    "negative strides": lambda x: np.flip(np.flip(x, -2).copy(), -2),
    "every second number": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "Fortran order": np.asfortranarray,
    "unaligned": unaligned,
}


class Own(np.ndarray):
    """A subclass with, for all that is known, rules of its own."""


def answers(q: Any, k: Any, v: Any, **parameters: Any) -> list[Any]:
    """What sketches and exact attention answer: all of one call after another."""
    sketch = AttentionSketch(9, window=8, sink=2, **parameters)
    sketch.update(k[..., :50, :], v[..., :50, :], queries=q[..., :50, :])
    stepped = sketch.step(q[..., 50:, :], k[..., 50:, :], v[..., 50:, :])
    paper = AttentionSketch.paper(delta=1.0, samples_per_cluster=2, value_samples=5, scale=None)
    paper.update(k, v)
    return [stepped, sketch.attend(q), paper.attend(q), attention(q, k, v, causal=True)]


def assert_refused(keys: Any, values: Any, bad: Any, message: str) -> None:
    """Every call refuses an array in words, and a sketch of good ones is left unchanged."""
    sketch = AttentionSketch(9, window=8)
    sketch.update(keys, values)
    state = sketch.state
    with pytest.raises(TypeError, match=message):
        sketch.update(bad, bad)
    with pytest.raises(TypeError, match=message.replace("keys", "queries")):
        sketch.attend(bad)
    with pytest.raises(TypeError, match=message):
        sketch.step(bad, bad, bad)
    with pytest.raises(TypeError, match=message):
        attention(bad, bad, bad)
    assert sketch.state is state


class TestNumPy:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_of_an_array_gives_the_same_bits(self, form: str, dtype: str) -> None:
        q, k, v = (x.astype(dtype) for x in (QUERIES, KEYS, VALUES))
        for got, expected in zip(answers(*map(FORMS[form], (q, k, v))), answers(q, k, v), strict=True):
            assert type(got) is np.ndarray
            assert got.dtype == np.dtype(dtype)
            assert got.dtype.isnative
            np.testing.assert_array_equal(got, expected)

    def test_a_memmap_is_an_array(self, tmp_path: Path) -> None:
        mapped = []
        for i, x in enumerate((QUERIES, KEYS, VALUES)):
            np.save(tmp_path / f"{i}.npy", x)
            mapped.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
        for got, expected in zip(answers(*mapped), answers(QUERIES, KEYS, VALUES), strict=True):
            assert type(got) is np.ndarray
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_a_big_endian_stream_is_saved_and_goes_on(self, dtype: str, tmp_path: Path) -> None:
        big = FORMS["big-endian"]
        q, k, v = (x.astype(dtype) for x in (QUERIES, KEYS, VALUES))
        sketch, native = AttentionSketch(9, window=8), AttentionSketch(9, window=8)
        sketch.update(big(k[:, :40]), big(v[:, :40]), queries=big(q[:, :40]))
        native.update(k[:, :40], v[:, :40], queries=q[:, :40])
        sketch.save(tmp_path / "a.safetensors")
        loaded = subgen.load(tmp_path / "a.safetensors", like=big(k))
        for each in (sketch, loaded):  # the byte order may change on the way
            each.update(k[:, 40:], v[:, 40:], queries=q[:, 40:])
        native.update(k[:, 40:], v[:, 40:], queries=q[:, 40:])
        for each in (sketch, loaded):
            np.testing.assert_array_equal(each.attend(big(q)), native.attend(q))
        np.testing.assert_array_equal(subgen.merge(sketch, sketch).attend(q), subgen.merge(native, native).attend(q))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda x: np.ma.array(x), r"keys is a masked array.*leave masked tokens out.*numpy\.ma\.filled\(keys"),
            (lambda x: np.ma.masked_invalid(np.where(x > 2, np.nan, x)), "keys is a masked array"),
            (lambda x: np.matrix(x[0]), r"keys is a numpy\.matrix.*pass numpy\.asarray\(keys\)"),
            (lambda x: x.view(Own), r"test_inputs\.Own, a subclass of numpy\.ndarray.*numpy\.asarray\(keys\)"),
            (lambda x: np.rec.fromarrays([x[0]]), r"recarray.*numpy\.asarray\(keys\)"),
            (lambda x: x.view([("a", "f4")]), "got .*'a'.*pass one of its fields"),
            (lambda x: x.astype(object), r"16 to 64 bits.*got object.*keys\.astype\(numpy\.float32\)"),
            (lambda x: x.astype("U9"), "got <U9"),
            (lambda x: x > 0, "got bool"),
            (lambda x: x.astype(complex), r"got complex128; pass its real part, .* side by side, keys\.real and"),
            (lambda x: memoryview(x), "keys must be an array .* got memoryview; convert it first"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:the matrix subclass")
    def test_what_would_be_misread_is_refused(self, make: Any, message: str) -> None:
        bad = make(KEYS)
        assert_refused(KEYS, VALUES, bad, message)

    @pytest.mark.skipif(np.dtype(np.longdouble) == np.float64, reason="as wide as float64 here")
    @pytest.mark.parametrize("order", ["=", ">"])
    def test_longdouble_is_not_narrowed_unasked(self, order: str) -> None:
        x = KEYS.astype(np.dtype(np.longdouble).newbyteorder(order))
        for keys in (x, x.astype(np.clongdouble)):
            with pytest.raises(TypeError, match=r"cast it first, by keys\.astype\(numpy\.float64\)|real part"):
                attention(keys, keys, keys)

    @pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
    def test_dtypes_that_numpy_only_stores(self, name: str) -> None:
        x = KEYS.astype(np.int8).astype(getattr(pytest.importorskip("ml_dtypes"), name))
        with pytest.raises(TypeError, match=rf"got {name}; cast it first.*keys\.astype\(numpy\.float32\)"):
            AttentionSketch(9).update(x, x)

    def test_underflow_is_no_error(self) -> None:
        """Weights of attention underflow to zero, whatever NumPy is told to do about it."""
        q, k, v = (10 * x.astype(np.float16) for x in (QUERIES, KEYS, VALUES))
        expected = answers(q, k, v)
        with np.errstate(all="raise"):
            got = answers(q, k, v)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)


class TestTorch:
    @pytest.fixture
    def torch(self) -> Any:
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_every_form_of_a_tensor_gives_the_same(self, torch: Any, dtype: str) -> None:
        plain = [torch.asarray(x).to(getattr(torch, dtype)) for x in (QUERIES, KEYS, VALUES)]
        expected = answers(*plain)

        def imaginary(x: Any) -> Any:
            """A view with the negative bit: the imaginary part of a conjugate, where there is such a complex dtype."""
            if x.dtype.itemsize == 2:
                return torch._neg_view(-x)
            return torch.complex(torch.zeros_like(x), -x).conj().imag

        unit = torch.finfo(plain[0].dtype).eps
        for form, exact in (
            (lambda x: torch._neg_view(-x), True),
            (imaginary, True),
            (lambda x: x.clone().requires_grad_(), True),
            (lambda x: 1 * x.clone().requires_grad_(), True),
            (torch.nn.Parameter, True),
            # Sums are taken in another order where numbers lie in another.
            (lambda x: x.mT.contiguous().mT, False),
            (lambda x: x.repeat_interleave(2, dim=-1)[..., ::2], False),
        ):
            given = [form(x) for x in plain]
            for x, y in zip(given, plain, strict=True):
                assert torch.equal(x.detach().resolve_neg(), y)
            for got, other in zip(answers(*given), expected, strict=True):
                assert not got.requires_grad
                tolerance = 0.0 if exact else 8 * unit
                torch.testing.assert_close(got, other, rtol=tolerance, atol=tolerance)

    def test_no_state_keeps_a_graph(self, torch: Any) -> None:
        q, k, v = (torch.asarray(x).requires_grad_() * 1 for x in (QUERIES, KEYS, VALUES))
        for sketch in (
            AttentionSketch(9, window=8, delta=1.0, residual_samples=3),
            AttentionSketch.paper(delta=1.0, samples_per_cluster=2, value_samples=5),
        ):
            sketch.step(q, k, v)
            tensors = [x for x in parts(sketch.state) if isinstance(x, torch.Tensor)]
            assert tensors
            assert not any(x.requires_grad for x in tensors)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda t, x: x.to(t.float8_e4m3fn),
                r"got torch\.float8_e4m3fn; cast it first.*keys\.to\(torch\.float32\)",
            ),
            (lambda t, x: x.to(t.float8_e5m2), r"got torch\.float8_e5m2"),
            (lambda t, x: x.to(t.complex64).conj(), r"got torch\.complex64; pass its real part"),
            (lambda t, x: x.int(), r"got torch\.int32"),
            (lambda t, x: x.to_sparse(), r"layout torch\.sparse_coo, and attention is dense: pass keys\.to_dense\(\)"),
            (lambda t, x: x.to_mkldnn(), r"pass keys\.to_dense\(\)"),
            (lambda t, x: t.quantize_per_tensor(x, 0.1, 0, t.qint8), r"got torch\.qint8; pass keys\.dequantize\(\)"),
            (lambda t, x: x.to("meta"), "meta device, which holds no values: make it on a device"),
            (lambda t, x: t.nested.nested_tensor(list(x)), r"nested tensor: keep a sketch for each of keys\.unbind"),
            (lambda t, x: t.nested.nested_tensor(list(x), layout=t.jagged), r"nested: .* keys\.unbind"),
            (lambda t, x: x.as_subclass(own_tensor()), r"OwnTensor.*keys\.as_subclass\(torch\.Tensor\)"),
            (lambda t, x: t.masked.masked_tensor(x, x > 0), r"masked.*keys\.to_tensor\(0\.0\)"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")  # of nested, masked and quantized tensors, which are prototypes
    def test_what_would_be_misread_is_refused(self, torch: Any, make: Any, message: str) -> None:
        good = torch.asarray(KEYS)
        bad = make(torch, good)
        assert_refused(good, good, bad, message)

    @pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_transformations_of_functions_are_refused(self, torch: Any, transform: str) -> None:
        keys = torch.asarray(KEYS)
        sketch = AttentionSketch(9, window=8)
        sketch.update(keys, keys)
        state = sketch.state
        called: dict[str, Any] = {
            "vmap": lambda f: torch.func.vmap(f)(keys[None]),
            "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(keys),
            "jvp": lambda f: torch.func.jvp(f, (keys,), (keys,)),
        }
        for function in (sketch.attend, lambda x: sketch.update(x, x), lambda x: attention(x, x, x)):
            with pytest.raises(TypeError, match=r"traced by torch\.func .*call subgen outside.*leading axis"):
                called[transform](function)
        assert sketch.state is state

    def test_tensors_without_data_are_refused(self, torch: Any) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        keys = torch.asarray(KEYS)
        sketch = AttentionSketch(9, window=8)
        sketch.update(keys, keys)
        with FakeTensorMode() as mode, pytest.raises(TypeError, match=r"FakeTensor.*call subgen outside"):
            sketch.attend(mode.from_tensor(keys))


def parts(state: Any) -> list[Any]:
    """Everything that a state holds."""
    if not is_dataclass(state):
        return [state]
    return [part for field in fields(state) for part in parts(getattr(state, field.name))]


def own_tensor() -> type:
    import torch

    return type("OwnTensor", (torch.Tensor,), {})


class TestJax:
    @pytest.fixture
    def jax(self) -> Any:
        return pytest.importorskip("jax")

    def test_traced_arrays_are_refused(self, jax: Any) -> None:
        keys, values = map(jax.numpy.asarray, (KEYS[:, :6], VALUES[:, :6]))
        sketch = AttentionSketch(9, window=8, check_finite=False)
        sketch.update(keys, values)
        state = sketch.state
        message = "keys is traced by JAX .*call subgen outside of the transformation"
        # Outside arrays are as bad: whatever is computed of them inside is traced.
        for call in (
            lambda x: sketch.update(x, x),
            lambda x: sketch.update(keys, values),
            lambda x: sketch.step(x, x, x),
            lambda x: attention(x, x, x),
            lambda x: attention(keys, keys, values),
            lambda x: sketch.attend(x),
            lambda x: sketch.attend(keys),
        ):
            with pytest.raises(TypeError, match=message.replace("keys", "(keys|queries)")):
                jax.jit(call)(keys)
        with pytest.raises(TypeError, match=message):
            jax.grad(lambda x: attention(x, x, x).sum())(keys)
        with pytest.raises(TypeError, match=message):
            jax.vmap(lambda x: attention(x, x, x))(keys)
        assert sketch.state is state

    def test_dtypes_and_keys_of_random_numbers(self, jax: Any) -> None:
        with pytest.raises(TypeError, match=r"got float8_e5m2; cast.*keys\.astype\(jax\.numpy\.float32\)"):
            attention(*[jax.numpy.zeros((3, 2), jax.numpy.float8_e5m2)] * 3)
        with pytest.raises(TypeError, match="got key"):
            attention(*[jax.random.key(0)] * 3)

    def test_sharded_arrays_are_refused(self, jax: Any) -> None:
        """In a process of its own, as the number of devices is fixed when JAX starts."""
        program = (
            "import jax, numpy, subgen\n"
            "from jax.sharding import Mesh, NamedSharding, PartitionSpec\n"
            "mesh = Mesh(numpy.array(jax.devices()), 'x')\n"
            "x = jax.device_put(numpy.ones((4, 6, 2)), NamedSharding(mesh, PartitionSpec('x')))\n"
            "try: subgen.AttentionSketch(9).update(x, x)\n"
            "except TypeError as error: print(error)\n"
        )
        environment = {
            "PATH": "",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        assert "keys is sharded over 2 devices: pass jax.device_put(keys, one_device), or keep a sketch" in done.stdout


def test_dask_arrays_are_sent_to_their_module() -> None:
    da = pytest.importorskip("dask.array")
    keys = da.from_array(KEYS)
    for call in (lambda: AttentionSketch(9).update(keys, keys), lambda: attention(keys, keys, keys)):
        with pytest.raises(TypeError, match=r"keys is a Dask array.*subgen\.dask\.sketch.*keys\.compute\(\)"):
            call()


class TestMisuse:
    """Mistakes in calls: each is answered by what to write instead."""

    def sketch(self) -> AttentionSketch:
        sketch = AttentionSketch(9, window=8)
        sketch.update(KEYS, VALUES)
        return sketch

    def test_merge(self) -> None:
        sketch = self.sketch()
        with pytest.raises(TypeError, match=r"got list as argument 1; .*merge\(\*sketches\) for a list"):
            subgen.merge([sketch, sketch])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="at least two sketches, got 1"):
            subgen.merge(sketch)
        with pytest.raises(TypeError, match="at least two sketches, got 0"):
            subgen.merge()
        with pytest.raises(TypeError, match="got ndarray as argument 2"):
            subgen.merge(sketch, KEYS)  # type: ignore[arg-type]

    def test_take(self) -> None:
        sketch = AttentionSketch(9, window=8)
        sketch.update(KEYS[:, None], VALUES[:, None])
        for bad in (1, None, "01"):
            with pytest.raises(TypeError, match=r"indices must be a sequence of integers, such as \[0, 2\], got"):
                sketch.take(bad)  # type: ignore[arg-type]
        strict = pytest.importorskip("array_api_strict")
        with pytest.raises(TypeError, match=r"an array of numpy, as the sketch is of.*pass indices\.tolist\(\)"):
            sketch.take(strict.asarray([0]))

    def test_what_is_measured_with_numpy(self) -> None:
        from subgen.evaluation.compare import compare
        from subgen.evaluation.stream import stream_capture
        from subgen.io.captures import Capture

        strict = pytest.importorskip("array_api_strict")
        others = [strict.asarray(x) for x in (QUERIES, KEYS, VALUES)]
        message = "computes with NumPy: .* must be a numpy.ndarray, got array_api_strict"
        with pytest.raises(TypeError, match=f"plan {message}"):
            subgen.plan(0.1, queries=others[0], keys=others[1], values=others[2])
        for call in (lambda x: compare(x), lambda x: stream_capture(AttentionSketch(9), x)):
            with pytest.raises(TypeError, match=f"a capture {message}"):
                call(Capture(*others))
            with pytest.raises(TypeError, match=r"must be a subgen\.io\.captures\.Capture, got tuple: read one by"):
                call((QUERIES, KEYS, VALUES))
            with pytest.raises(ValueError, match="a query for each token"):
                call(Capture(QUERIES[:, :5], KEYS, VALUES))
        with pytest.raises(TypeError, match="sketch must be an AttentionSketch, got dict"):
            stream_capture({}, Capture(QUERIES, KEYS, VALUES))  # type: ignore[arg-type]

    def test_big_endian_captures_are_measured_alike(self) -> None:
        from subgen.evaluation.compare import compare
        from subgen.io.captures import Capture

        given = Capture(QUERIES, KEYS, VALUES)
        big = Capture(*map(FORMS["big-endian"], (QUERIES, KEYS, VALUES)))
        results = [compare(x, [0.9], methods=["subgen"], window=4, sinks=2) for x in (given, big)]
        np.testing.assert_array_equal(results[0].error, results[1].error)
