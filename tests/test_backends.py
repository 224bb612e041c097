"""The registry, and the contracts every backend is held to."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import numpy as np
import pytest
from libraries import to_numpy

import subgen
from subgen import backends
from subgen.backends import PORTABLE, Backend, BackendError


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of the test's own."""
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(backends, "_resolved", {})


def pretend_installed(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = importlib.metadata.EntryPoint(name, value, "subgen.backends")
    monkeypatch.setattr(backends, "_entry_points", lambda: {name: point})


def installed() -> list[Backend]:
    found = []
    for name in backends.names():
        try:
            found.append(backends.get(name))
        except BackendError:  # its array library is not installed here
            continue
    return found


def test_numpy_enters_by_the_door_for_strangers() -> None:
    points = importlib.metadata.entry_points(group="subgen.backends")
    assert points["numpy"].value == "subgen_numpy:BACKEND"
    assert "numpy" in backends.names()
    assert backends.operations_for(np.zeros(1)).threefry2x32 is backends.get("numpy").operations["threefry2x32"]


@pytest.mark.parametrize("backend", installed(), ids=lambda backend: backend.name)
def test_operations_have_the_portable_signature(backend: Backend) -> None:
    for name, operation in backend.operations.items():
        expected = list(inspect.signature(PORTABLE[name]).parameters)
        assert list(inspect.signature(operation).parameters) == expected, name


def test_arrays_without_a_backend_run_on_the_portable_code() -> None:
    strict = pytest.importorskip("array_api_strict")
    assert backends.operations_for(strict.zeros(1)) == backends.Operations()


@pytest.mark.usefixtures("registry")
def test_a_registered_backend_is_used_at_once_and_can_be_replaced() -> None:
    calls = []

    def counting(*args: Any) -> Any:
        calls.append(1)
        return PORTABLE["weighted_attention"](*args)

    x = np.ones((3, 2))
    subgen.attention(x, x, x)
    with pytest.raises(BackendError, match="exists already; pass replace=True"):
        backends.register(Backend("numpy", {"weighted_attention": counting}))
    assert not calls
    backends.register(Backend("numpy", {"weighted_attention": counting}), replace=True)
    subgen.attention(x, x, x)
    assert calls


@pytest.mark.usefixtures("registry")
def test_a_new_backend_serves_its_library() -> None:
    strict = pytest.importorskip("array_api_strict")
    calls = []

    def counting(*args: Any) -> Any:
        calls.append(1)
        return PORTABLE["assign_leaders"](*args)

    backends.register(Backend("array_api_strict", {"assign_leaders": counting}))
    assert "array_api_strict" in backends.names()
    sketch = subgen.AttentionSketch.paper(delta=1.0, samples_per_cluster=1, value_samples=1)
    sketch.update(strict.zeros((4, 2)), strict.zeros((4, 2)))
    assert calls


def test_unknown_backends_and_operations() -> None:
    with pytest.raises(BackendError, match=r"no backend named 'nympy'; installed: .*numpy"):
        backends.get("nympy")
    with pytest.raises(BackendError, match=r"unknown operations \['atend'\]; the operations are .*weighted_attention"):
        Backend("mine", {"atend": print})
    with pytest.raises(TypeError, match="got str"):
        backends.register("numpy")  # type: ignore[arg-type]


@pytest.mark.usefixtures("registry")
def test_a_backend_that_does_not_import_says_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "numpy", "subgen_missing:BACKEND")
    assert backends.names() == ["numpy"]  # listed without importing
    with pytest.raises(BackendError, match=r"'numpy' \(subgen_missing:BACKEND\).*No module named 'subgen_missing'"):
        backends.get("numpy")
    x = np.ones((3, 2))
    with pytest.raises(BackendError, match="does not load"):
        subgen.attention(x, x, x)


@pytest.mark.usefixtures("registry")
def test_an_entry_point_must_give_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "numpy", "subgen_numpy:__name__")
    with pytest.raises(BackendError, match=r"must give a subgen.backends.Backend, got str"):
        backends.get("numpy")


def test_the_portable_code_and_the_numpy_backend_agree_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(-5, 6, size=(3, 100, 2)).astype(np.float32)
    values = rng.integers(-2, 3, size=(3, 100, 4)).astype(np.float32)
    queries = rng.normal(size=(3, 100, 2)).astype(np.float32) / 4
    results = []
    for portable in (False, True):
        if portable:
            monkeypatch.setattr(backends, "_resolved", {"numpy": backends.Operations()})
        sketch = subgen.AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=9)
        results.append((sketch.step(queries, keys, values), sketch.state))
    (out, state), (portable_out, portable_state) = results
    np.testing.assert_allclose(out, portable_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(state.clusters.samples), portable_state.clusters.samples)
    np.testing.assert_array_equal(state.reservoir.keys, portable_state.reservoir.keys)
    np.testing.assert_array_equal(state.reservoir.due, portable_state.reservoir.due)
