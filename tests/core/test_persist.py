"""Saving and going on: exact, atomic, and deaf to broken files."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_test import kill_while_saving
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import LIBRARIES, Library, skip_compiling, to_numpy
from safetensors.numpy import load_file, safe_open, save_file
from sketches import PAPER, VARIANTS, assert_same, feed, make, resign, stream

import subgen
from subgen import AttentionSketch
from subgen.default.algorithm import FEW_CLUSTERS
from subgen.io.captures import FileError
from subgen.io.save import FORMAT, VERSION


@pytest.mark.parametrize("variant", ["default", "paper", *VARIANTS])
def test_resumed_equals_uninterrupted_bit_for_bit(variant: str, tmp_path: Path) -> None:
    n = 120
    q, k, v = (x.astype(np.float16) for x in stream(0, (3, 2), n, group=2))
    whole, saved = make(variant), make(variant)
    whole.update(k, v, queries=q)
    for cut in (1, 20, 63):
        saved = make(variant)
        saved.update(k[..., :cut, :], v[..., :cut, :], queries=q[..., :cut, :])
        saved.save(tmp_path / "sketch.safetensors")
        resumed = subgen.load(tmp_path / "sketch.safetensors")
        assert repr(resumed) == repr(saved)
        for sketch in (resumed, copy.copy(saved), copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
            sketch.update(k[..., cut:, :], v[..., cut:, :], queries=q[..., cut:, :])
            np.testing.assert_array_equal(sketch.attend(q), whole.attend(q))
            assert sketch.nbytes == whole.nbytes
            if variant != "paper":
                assert_same(sketch.state, whole.state)


@pytest.mark.parametrize("variant", ["default", "paper", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_saves_and_copies_sketches(variant: str, dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x).to(getattr(torch, dtype)) for x in stream(0, (2,), 90))
    whole, saved = make(variant), make(variant)
    whole.update(k, v, queries=q)
    saved.update(k[:, :47], v[:, :47], queries=q[:, :47])
    torch.save(saved, tmp_path / "sketch.pt")
    loaded = torch.load(tmp_path / "sketch.pt", weights_only=False)
    for sketch in (loaded, copy.copy(saved), copy.deepcopy(saved), pickle.loads(pickle.dumps(saved)), saved):
        sketch.update(k[:, 47:], v[:, 47:], queries=q[:, 47:])
        assert torch.equal(sketch.attend(q), whole.attend(q))
        if variant != "paper":
            assert_same(sketch.state, whole.state)


@pytest.mark.parametrize("variant", ["default", "paper", "everything"])
def test_every_library_reads_what_another_wrote(library: Library, variant: str, tmp_path: Path) -> None:
    if variant != "default":
        skip_compiling(library)
    q, k, v = stream(1, (2,), 50)
    path = tmp_path / "sketch.safetensors"
    mine = make(variant)
    feed(mine, *(library.array(x) for x in (k, v, q)))
    mine.save(path)
    here = subgen.load(path)
    back = subgen.load(path, like=library.array(k))
    # The same numbers; float32 sums in another order.
    np.testing.assert_allclose(here.attend(q), to_numpy(mine.attend(library.array(q))), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(to_numpy(back.attend(library.array(q))), to_numpy(mine.attend(library.array(q))))
    assert here.nbytes == mine.nbytes
    assert (here.n_seen, to_numpy(here.n_clusters).tolist()) == (mine.n_seen, to_numpy(mine.n_clusters).tolist())
    more = here.step(q, k, v)
    assert np.isfinite(more).all()


def test_another_dtype_and_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = stream(1, (2,), 60)
    path = tmp_path / "sketch.safetensors"
    half = [torch.asarray(x).to(torch.bfloat16) for x in (k, v, q)]
    for variant in ("default", "int8"):
        sketch = make(variant)
        feed(sketch, *half)
        sketch.save(path)
        again = subgen.load(path, like=half[0])
        assert torch.equal(again.attend(half[2]), sketch.attend(half[2]))
        with pytest.raises(FileError, match=r"bfloat16.*like="):
            subgen.load(path)
        wide = subgen.load(path, like=k)
        wide.update(k, v, queries=q)
        asked = half[2].float().numpy()
        expected = sketch.attend(half[2]).float().numpy()
        np.testing.assert_allclose(subgen.load(path, like=k).attend(asked), expected, rtol=0.01, atol=0.01)
    large = AttentionSketch(9, window=8)
    large.update(k * 1e6, v)
    large.save(path)
    with pytest.raises(FileError, match="does not hold"):
        subgen.load(path, like=k.astype(np.float16))


def test_an_empty_sketch_keeps_its_parameters(tmp_path: Path) -> None:
    path = tmp_path / "sketch.safetensors"
    for sketch in (
        AttentionSketch(subgen.Power(3.0, 0.5), scale=0.3, check_finite=False),
        AttentionSketch(max_bytes=10**6, delta=0.1),
        AttentionSketch(compression_ratio=0.25),
        AttentionSketch.paper(**PAPER),
    ):
        sketch.save(path)
        assert repr(subgen.load(path)) == repr(sketch)
        assert subgen.load(path).check_finite == sketch.check_finite


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    q, k, v = stream(2, (2,), 60)
    path = tmp_path_factory.mktemp("good") / "sketch.safetensors"
    sketch = AttentionSketch(9, window=8, residual_samples=3, delta=1.0)
    sketch.update(k, v, queries=q)
    sketch.save(path)
    return path.read_bytes()


@settings(max_examples=300)
@given(data=st.data())
def test_broken_files_are_refused(good: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "broken.safetensors"
    changed = bytearray(good)
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "noise", "zeros"]))
    at = data.draw(st.integers(0, len(good) - 1))
    if kind == "cut":
        del changed[at:]
    elif kind == "flip":
        changed[at] ^= data.draw(st.integers(1, 255))
    elif kind == "insert":
        changed[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "noise":
        changed = bytearray(data.draw(st.binary(max_size=200)))
    else:
        changed[at : at + 50] = bytes(len(changed[at : at + 50]))
    path.write_bytes(changed)
    try:
        loaded = subgen.load(path)
    except FileError:
        return
    # Only what is no part of the content may differ: the padding of the header.
    assert loaded.n_seen == 60
    assert np.isfinite(loaded.attend(np.ones((2, 1, 4), np.float32))).all()


COUNTS, VARIANCE = "clusters.counts", "clusters.key_variance"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c, m: m.update(format="other"), "no sketch"),
        (lambda t, c, m: m.update(version=str(VERSION + 1)), "version 4.*upgrade subgen"),
        (lambda t, c, m: m.update(version="-1"), "version"),
        (lambda t, c, m: t.pop("clusters.counts"), "holds no sketch.*counts"),
        (lambda t, c, m: t.update(more=np.zeros(3)), "more.*no such sketch has"),
        (lambda t, c, m: t.update({COUNTS: t[COUNTS] - 5}), "contradicts itself: counts"),
        (lambda t, c, m: t.update({COUNTS: t[COUNTS].astype(np.float32)}), "counts is float32"),
        (lambda t, c, m: t.update({VARIANCE: t[VARIANCE][:, :-1]}), "contradicts itself: places"),
        (lambda t, c, m: t.update({"exact.keys": t["exact.keys"][..., :-1]}), "keys has shape"),
        (lambda t, c, m: t.update({"residual.cluster": t["residual.cluster"] + 1000}), "clusters of the sample"),
        (lambda t, c, m: c["plain"].update({"exact.n": 10**9}), "contradicts itself"),
        (lambda t, c, m: c["method"].update(kind="magic"), "magic.*upgrade"),
        (lambda t, c, m: c["method"].update(window=-3), "window"),
        (lambda t, c, m: c["method"].update(hook="os.system"), "holds no sketch"),
        (lambda t, c, m: c["layout"].update(head_dim=10**15), "holds no sketch|shape"),
        (lambda t, c, m: c["layout"].update(dtype="object"), "holds .object., expected one of float16"),
        (lambda t, c, m: c.pop("layout"), "holds no sketch.*layout"),
    ],
)
def test_signed_files_that_say_what_no_sketch_is(good: bytes, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "sketch.safetensors"
    path.write_bytes(good)
    resign(path, change)
    with pytest.raises(FileError, match=message):
        subgen.load(path)


DATA = Path(__file__).parents[1] / "data"
# Files of earlier versions of the format, written by the releases that had them, and what these then answered.
VERSION_1 = DATA / "version_1"
IN_FLOAT16 = {
    (version, name): answer
    for version in (1, 2)
    for name, answer in json.loads((DATA / f"version_{version}_float16" / "answers.json").read_text()).items()
}


@pytest.mark.parametrize(("version", "name"), IN_FLOAT16)
def test_files_in_float16_of_earlier_versions_are_read(version: int, name: str, tmp_path: Path) -> None:
    """They answer, go on, merge, and are written as files of the current version."""
    path, again = DATA / f"version_{version}_float16" / f"{name}.safetensors", tmp_path / "again.safetensors"
    expected = IN_FLOAT16[version, name]
    queries, answers = (np.asarray(expected[what], np.float16) for what in ("queries", "answers"))
    sketch = subgen.load(path)
    assert (sketch.n_seen, np.asarray(sketch.n_clusters).tolist()) == (expected["n_seen"], expected["clusters"])
    # Float32 in another order, rounded to float16.
    np.testing.assert_allclose(sketch.attend(queries), answers, atol=2e-3)
    state: Any = sketch.state
    if name != "paper":
        clusters = state.clusters
        assert (load_file(path)["counts"].dtype, clusters.counts.dtype) == ([np.int32, np.int64][version - 1], np.int64)
        assert clusters.counts.sum(axis=1).tolist() == [sketch.n_seen - state.exact.n] * len(clusters.counts)
        assert (clusters.nearest is not None) == (name == "many") == (clusters.counts.shape[1] > FEW_CLUSTERS)
    sketch.save(again)
    with safe_open(again, framework="numpy") as archive:
        assert archive.metadata()["version"] == str(VERSION) == "3"
    loaded = subgen.load(again)
    # More tokens, and a merge.
    rng = np.random.default_rng(0)
    layout: Any = sketch.layout
    keys, values = (rng.normal(size=(*layout.leading, 40, dim)) for dim in (layout.head_dim, layout.value_dim))
    for one in (sketch, loaded):
        one.update(keys.astype(np.float16), values.astype(np.float16))
    np.testing.assert_array_equal(loaded.attend(queries), sketch.attend(queries))
    both = subgen.merge(sketch, loaded)
    assert both.n_seen == 2 * (expected["n_seen"] + 40)
    assert np.isfinite(both.attend(queries)).all()


@pytest.mark.parametrize("name", sorted(path.stem for path in VERSION_1.glob("*.npz")))
def test_files_of_version_1_answer_and_go_on(name: str, tmp_path: Path) -> None:
    path = VERSION_1 / f"{name}.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["version"] == "1"
    with np.load(VERSION_1 / f"{name}.npz") as archive:
        told = dict(archive)
    array: Any = np.asarray
    if name == "bfloat16":
        torch = pytest.importorskip("torch")

        def array(x: Any) -> Any:
            return torch.asarray(x).to(torch.bfloat16)

    like = array(told["queries"])
    sketch = subgen.load(path, like=like)
    assert sketch.n_seen == told["n_seen"]
    np.testing.assert_array_equal(to_numpy(sketch.n_clusters), told["n_clusters"])
    # Sums of the dtype to compute in, in another order; rounded to 11 and 8 bits with 16 of them.
    tolerance = {"input": 2e-3, "nearest": 2e-3, "bfloat16": 1.6e-2}.get(name, 2e-5)
    sketch.save(tmp_path / "again.safetensors")
    for one in (sketch, subgen.load(tmp_path / "again.safetensors", like=like)):
        for which in ("answers", "later"):
            if which == "later":
                one.update(*(array(told[f"more_{x}"]) for x in "kv"), queries=array(told["more_q"]))
            answers = to_numpy(one.attend(array(told["queries"])))
            np.testing.assert_allclose(answers, told[which], rtol=tolerance, atol=tolerance)
            if "error" in told:
                _, error = one.attend(told["queries"], return_error=True)
                expected = told["error" if which == "answers" else "later_error"]
                np.testing.assert_allclose(error, expected, rtol=1e-4, atol=1e-5)


def test_all_kinds_of_files_of_version_1_are_there() -> None:
    assert {path.stem for path in VERSION_1.glob("*.npz")} == {
        "bfloat16",
        "delta",
        "exact",
        "input",
        "int8",
        "nearest",
        "paper",
        "residual",
    }
    cached = subgen.load(VERSION_1 / "nearest.safetensors").state.clusters
    assert cached.counts.shape[1] > FEW_CLUSTERS
    assert (cached.nearest >= 0).any()
    exact = subgen.load(VERSION_1 / "exact.safetensors")
    assert exact.state.exact.n == exact.n_seen
    # Sinks had no query, nor have tokens that came without one.
    scales = subgen.load(VERSION_1 / "int8.safetensors").state.exact.queries.scales
    np.testing.assert_array_equal(scales[0] > 0, np.r_[0, 0, 1, 1, 1, 0, 0, 1, 0, 0].astype(bool))


def test_an_empty_sketch_of_version_1_keeps_its_parameters() -> None:
    sketch = subgen.load(VERSION_1 / "empty.safetensors")
    made = AttentionSketch(subgen.Power(3.0, 0.5), scale=0.3, storage="int8", check_finite=False)
    assert repr(sketch) == repr(made)
    assert not sketch.check_finite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c, m: c["plain"].update(asked="a" * len(c["plain"]["asked"])), "asked must be True or"),
        (lambda t, c, m: c["plain"]["asked"].append(True), "contradicts itself: queries of the window"),
        (lambda t, c, m: c["plain"].pop("asked"), "holds no sketch.*asked"),
        (lambda t, c, m: c["plain"].update(n_exact=10**9), "contradicts itself"),
        (lambda t, c, m: c["plain"].update(more=1), "more.*no such sketch has"),
        (lambda t, c, m: c["method"].update(sink=10**9), "contradicts itself|by the parameters beside it"),
        (lambda t, c, m: c["method"].update(sink=3), "contradicts itself: queries of the window"),
        (lambda t, c, m: c["method"].update(window=10**9), "by the parameters beside it"),
        (lambda t, c, m: c["method"].update(window=10**400), "window must be .* at most 2147483647"),
        (lambda t, c, m: c["method"].update(storage="int8"), "holds no sketch.*key_codes"),
        (lambda t, c, m: t.pop("counts"), "holds no sketch.*counts"),
        (lambda t, c, m: t.update(counts=t["counts"] - 5), "contradicts itself: counts"),
        (lambda t, c, m: t.update(counts=t["counts"].astype(np.float32)), "counts is float32"),
        (lambda t, c, m: t.update(spread=t["spread"][:, :-1]), "contradicts itself: places"),
        (lambda t, c, m: t.update(spread=t["spread"] - 100), "key variance below zero"),
        (lambda t, c, m: t.update(keys=t["keys"][..., :-1]), "keys has shape"),
        (lambda t, c, m: t.update({"queries.codes": t["queries.codes"][:, :-1]}), "queries.codes has shape"),
        (lambda t, c, m: t.update(more=np.zeros(3)), "more.*no such sketch has"),
    ],
)
def test_signed_files_of_version_1_that_say_what_no_sketch_is(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "sketch.safetensors"
    path.write_bytes((VERSION_1 / "input.safetensors").read_bytes())
    resign(path, change)
    with pytest.raises(FileError, match=message):
        subgen.load(path)


def test_clear_errors(tmp_path: Path) -> None:
    sketch = AttentionSketch(5)
    with pytest.raises(FileError, match=r"saved as \.safetensors"):
        sketch.save(tmp_path / "sketch.npz")
    with pytest.raises(FileError, match="cannot be written"):
        sketch.save(tmp_path / "nowhere" / "sketch.safetensors")
    with pytest.raises(FileError, match="no such file"):
        subgen.load(tmp_path / "sketch.safetensors")
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="no sketch"):
        subgen.load(tmp_path / "other.safetensors")
    assert FORMAT == "subgen sketch"
    full = AttentionSketch(5)
    _, k, v = stream(0, (1,), 3)
    full.update(k, v)
    with pytest.raises(RuntimeError, match="seen tokens already"):
        full.resume(full.layout, full.state)
    assert set(LIBRARIES) >= {"numpy"}


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_kill_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that does nothing but save is killed at any moment; a longer run: ``make crash-test``."""
    kill_while_saving(tmp_path / "sketch.safetensors", 8)
    assert (tmp_path / "sketch.safetensors").exists()
