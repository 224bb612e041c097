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
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import kill_while_saving
from libraries import LIBRARIES, Library, skip_compiling, to_numpy
from safetensors.numpy import load_file, safe_open, save_file
from test_budgets import VARIANTS
from test_means import assert_same, stream

import subgen
from subgen import AttentionSketch
from subgen.files import FileError
from subgen.means import FEW_CLUSTERS
from subgen.persist import FORMAT, VERSION, _checksum

PAPER = {"delta": 1.0, "samples_per_cluster": 3, "value_samples": 7, "scale": None}
# Files of version 1, float16, and what the release that wrote them answered.
VERSION_1 = Path(__file__).parent / "data" / "version_1"
ANSWERS: dict[str, Any] = json.loads((VERSION_1 / "answers.json").read_text())


def make(variant: str) -> AttentionSketch:
    if variant == "paper":
        return AttentionSketch.paper(**PAPER, seed=5)
    if variant == "default":
        return AttentionSketch(9, window=8, sink=2, seed=5)
    return AttentionSketch(window=8, sink=2, seed=5, **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["default", "paper", *VARIANTS])
def test_resumed_equals_uninterrupted_bit_for_bit(variant: str, tmp_path: Path) -> None:
    n = 120
    q, k, v = (x.astype(np.float16) for x in stream(0, (3, 2), n, group=2))
    whole, saved = make(variant), make(variant)
    whole.update(k, v, q)
    for cut in (1, 20, 63):
        saved = make(variant)
        saved.update(k[..., :cut, :], v[..., :cut, :], q[..., :cut, :])
        saved.save(tmp_path / "sketch.safetensors")
        resumed = subgen.load(tmp_path / "sketch.safetensors")
        assert repr(resumed) == repr(saved)
        for sketch in (resumed, copy.copy(saved), copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
            sketch.update(k[..., cut:, :], v[..., cut:, :], q[..., cut:, :])
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
    whole.update(k, v, q)
    saved.update(k[:, :47], v[:, :47], q[:, :47])
    torch.save(saved, tmp_path / "sketch.pt")
    loaded = torch.load(tmp_path / "sketch.pt", weights_only=False)
    for sketch in (loaded, copy.copy(saved), copy.deepcopy(saved), pickle.loads(pickle.dumps(saved)), saved):
        sketch.update(k[:, 47:], v[:, 47:], q[:, 47:])
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
    mine.update(*(library.array(x) for x in (k, v, q)))
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
        sketch.update(*half)
        sketch.save(path)
        again = subgen.load(path, like=half[0])
        assert torch.equal(again.attend(half[2]), sketch.attend(half[2]))
        with pytest.raises(FileError, match=r"bfloat16.*like="):
            subgen.load(path)
        wide = subgen.load(path, like=k)
        wide.update(k, v, q)
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
    sketch.update(k, v, q)
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


@pytest.mark.parametrize("name", ANSWERS)
def test_files_of_version_1_are_read(name: str, tmp_path: Path) -> None:
    """They have counts in int32; they are answered from, go on, and are written anew as files of this version."""
    path, again = VERSION_1 / f"{name}.safetensors", tmp_path / "again.safetensors"
    said = ANSWERS[name]
    queries, answers = (np.asarray(said[what], np.float16) for what in ("queries", "answers"))
    sketch = subgen.load(path)
    assert (sketch.n_seen, np.asarray(sketch.n_clusters).tolist()) == (said["n_seen"], said["clusters"])
    # Float32 in another order, rounded to float16.
    np.testing.assert_allclose(sketch.attend(queries), answers, atol=2e-3)
    state: Any = sketch.state
    if name != "paper":
        assert (load_file(path)["counts"].dtype, state.counts.dtype) == (np.int32, np.int64)
        assert state.counts.sum(axis=1).tolist() == [sketch.n_seen - state.n_exact] * len(state.counts)
        assert (state.nearest is not None) == (name == "many") == (state.counts.shape[1] > FEW_CLUSTERS)
    sketch.save(again)
    with safe_open(again, framework="numpy") as archive:
        assert archive.metadata()["version"] == str(VERSION) == "2"
    loaded = subgen.load(again)
    # More tokens, and a merge.
    rng = np.random.default_rng(0)
    layout: Any = sketch.layout
    keys, values = (rng.normal(size=(*layout.leading, 40, dim)) for dim in (layout.head_dim, layout.value_dim))
    for one in (sketch, loaded):
        one.update(keys.astype(np.float16), values.astype(np.float16))
    np.testing.assert_array_equal(loaded.attend(queries), sketch.attend(queries))
    both = subgen.merge(sketch, loaded)
    assert both.n_seen == 2 * (said["n_seen"] + 40)
    assert np.isfinite(both.attend(queries)).all()
    if name == "everything":  # a budget of bytes, by which there are fewer clusters now
        assert sketch.nbytes <= 2200
        assert both.nbytes <= 2200


def resign(path: Path, change: Any) -> None:
    """Alter a file and sign it anew: what a checksum cannot catch."""
    with safe_open(path, framework="numpy") as archive:
        metadata = archive.metadata()
    tensors, config = load_file(path), json.loads(metadata["config"])
    change(tensors, config, metadata)
    text = json.dumps(config, sort_keys=True)
    metadata |= {"config": text, "sha256": _checksum(text, tensors)}
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c, m: m.update(format="other"), "no sketch"),
        (lambda t, c, m: m.update(version="3"), "version 3.*upgrade subgen"),
        (lambda t, c, m: m.update(version="-1"), "version"),
        (lambda t, c, m: t.pop("counts"), "holds no sketch.*counts"),
        (lambda t, c, m: t.update(more=np.zeros(3)), "more.*no such sketch has"),
        (lambda t, c, m: t.update(counts=t["counts"] - 5), "contradicts itself: counts"),
        (lambda t, c, m: t["counts"].__iadd__(2**62), "contradicts itself: counts"),
        (lambda t, c, m: c["plain"].update(n_seen=2**62), "more than can be counted"),
        (lambda t, c, m: t.update(counts=t["counts"].astype(np.float32)), "counts is float32"),
        (lambda t, c, m: t.update(spread=t["spread"][:, :-1]), "contradicts itself: places"),
        (lambda t, c, m: t.update(keys=t["keys"][..., :-1]), "keys has shape"),
        (lambda t, c, m: t.update({"residual.cluster": t["residual.cluster"] + 1000}), "clusters of the sample"),
        (lambda t, c, m: c["plain"].update(n_exact=10**9), "contradicts itself"),
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
    """A process that does nothing but save is killed at any moment; a longer run: ``make kills``."""
    kill_while_saving(tmp_path / "sketch.safetensors", 8)
    assert (tmp_path / "sketch.safetensors").exists()
