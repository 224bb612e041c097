"""Files that nobody meant are refused in words, or work; and each of those that once did neither."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
from libraries import Library, skip_compiling, to_numpy
from safetensors.numpy import save_file
from sketches import feed, make, resign, stream

import subgen
from subgen import AttentionSketch
from subgen.default.algorithm import FEW_CLUSTERS
from subgen.io.captures import FileError, read_capture
from subgen.io.save import FORMAT, VERSION, _checksum


@pytest.mark.skipif(sys.platform == "win32", reason="bounds memory and time by POSIX")
def test_some_hundred_mutated_files() -> None:
    """In a process of its own, whose memory is bounded; many more: ``make fuzz``."""
    done = subprocess.run([sys.executable, fuzz.__file__, "--inputs", "500"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "500 inputs, 0 bugs" in done.stdout
    for kind in fuzz.KINDS:
        assert kind in done.stdout


def test_a_refusal_of_no_known_kind_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="no known kind"):
        fuzz.refused_by("sketch.safetensors: because")


# A sketch that is well signed.


def signed(path: Path, text: str, **metadata: str) -> None:
    said = {"format": FORMAT, "version": str(VERSION), "config": text, "sha256": _checksum(text, {}), **metadata}
    save_file({}, path, said)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "7" * 5000, "\ufeff{}", "[]", "null"])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    signed(tmp_path / "a.safetensors", text)
    with pytest.raises(FileError, match="no configuration"):
        subgen.load(tmp_path / "a.safetensors")


def test_a_version_of_thousands_of_digits(tmp_path: Path) -> None:
    signed(tmp_path / "a.safetensors", "{}", version="9" * 5000)
    with pytest.raises(FileError, match="version"):
        subgen.load(tmp_path / "a.safetensors")


def number(name: str, value: float, at: tuple[int, ...] = (0, 0)) -> Any:
    def change(tensors: dict[str, Any], config: Any, metadata: Any) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = value

    return change


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("corrected", number("clusters.importance", np.nan), "importance"),
        ("corrected", number("clusters.importance", -1.0), "importance"),
        ("corrected", number("clusters.key_variance", -1.0, (0, 0, 0)), "key variance below zero"),
        ("corrected", number("residual.due", 2**62), "moments of the sample"),
        ("corrected", number("residual.due", 1), "moments of the sample"),
        ("corrected", number("exact.keys", np.nan, (0, 0, 0)), "NaN or infinity, of a stream that was checked"),
        ("corrected", number("residual.values", np.inf, (0, 0, 0)), "NaN or infinity, of a stream that was checked"),
        ("paper", number("clusters.due", -5, (0, 0, 0)), "moments of the samples"),
        ("paper", number("clusters.due", 2**62, (0, 0, 0)), "moments of the samples"),
        ("paper", number("reservoir.weight", np.inf, (0,)), "weights"),
        ("paper", number("reservoir.weight", np.nan, (0,)), "weights"),
        ("paper", number("reservoir.due", 0.0), "weights"),
        ("default", lambda t, c, m: c["plain"].update(n_seen="60"), "n_seen must be an integer"),
        ("default", lambda t, c, m: c["plain"].update(n_seen=True), "n_seen must be an integer"),
        ("default", lambda t, c, m: c["plain"].update({"exact.n": "8"}), "exact.n must be an integer"),
        ("default", lambda t, c, m: c["plain"].update({"exact.n": 11}), "exact tokens"),
        ("default", lambda t, c, m: c["layout"].update(leading=[0]), "a leading axis must be"),
        ("default", lambda t, c, m: c["layout"].update(leading=["2"]), "a leading axis must be"),
        ("default", lambda t, c, m: c["layout"].update(dtype="S2000000000"), "holds 'S2000000000', expected one of"),
        ("default", lambda t, c, m: c["method"].update(window=10**9), "by the parameters beside it"),
        ("default", lambda t, c, m: c["method"].update(window=10**400), "window must be .* at most 2147483647"),
        ("corrected", lambda t, c, m: c["method"].update(residual_samples=10**9), "by the parameters beside it"),
        ("paper", lambda t, c, m: c["method"].update(samples_per_cluster=10**9), "by the parameters beside it"),
        ("paper", lambda t, c, m: c["method"].update(value_samples=10**9), "by the parameters beside it"),
        ("default", lambda t, c, m: c.update(layout=None), "arrays and no layout"),
        ("default", lambda t, c, m: t.pop("exact.values"), "exact.values is missing"),
    ],
)
def test_a_state_that_no_stream_leaves_behind(variant: str, change: Any, message: str, tmp_path: Path) -> None:
    """Each of these once loaded, and failed or never came back later, or asked for memory without end."""
    q, k, v = stream(0, (2,), 60)
    path = tmp_path / "a.safetensors"
    sketch = make(variant)
    sketch.update(k, v, queries=q)
    sketch.save(path)
    resign(path, change)
    with pytest.raises(FileError, match=message):
        subgen.load(path)


@pytest.mark.parametrize(
    "change",
    [
        number("clusters.nearest", -2),
        number("clusters.nearest", 0),
        number("clusters.nearest", 2**30),
        lambda t, c, m: t.pop("clusters.nearest"),
    ],
    ids=["below", "itself", "beyond", "missing"],
)
def test_nearest_clusters_that_no_stream_leaves_behind(change: Any, tmp_path: Path) -> None:
    """Many clusters cache their neighbours; a sketch goes on with those in a file, or says what is wrong with them."""
    q, k, v = stream(0, (1,), 1200)
    path = tmp_path / "a.safetensors"
    sketch = AttentionSketch(FEW_CLUSTERS + 8, window=32)
    sketch.update(k[:, :1100], v[:, :1100], queries=q[:, :1100])
    sketch.save(path)
    again = subgen.load(path)
    for each in (sketch, again):
        each.update(k[:, 1100:], v[:, 1100:], queries=q[:, 1100:])
    for name in ("keys", "counts", "nearest"):
        np.testing.assert_array_equal(getattr(again.state.clusters, name), getattr(sketch.state.clusters, name))
    resign(path, change)
    with pytest.raises(FileError, match="nearest clusters"):
        subgen.load(path)


def test_what_overflowed_is_saved_and_read_all_the_same(tmp_path: Path) -> None:
    """Whatever `save` wrote, `load` reads: the variance of keys like these is beyond float32."""
    q, k, v = stream(0, (2,), 60)
    sketch = make("corrected")
    with np.errstate(all="ignore"):
        sketch.update(1e25 * k, v, queries=q)
        sketch.save(tmp_path / "a.safetensors")
        again = subgen.load(tmp_path / "a.safetensors")
        assert not np.isfinite(again.state.clusters.key_variance).all()
        for each in (sketch, again):
            each.update(k, v, queries=q)
    np.testing.assert_array_equal(again.state.clusters.keys, sketch.state.clusters.keys)
    np.testing.assert_array_equal(again.state.exact.keys, sketch.state.exact.keys)


def test_the_other_byte_order_is_saved(tmp_path: Path) -> None:
    q, k, v = (x.astype(">f4") for x in stream(0, (2,), 60))
    sketch = make("default")
    sketch.update(k, v, queries=q)
    sketch.save(tmp_path / "a.safetensors")
    again = subgen.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again.attend(q.astype("f4")), sketch.attend(q))


def test_budgets_beyond_every_integer(library: Library) -> None:
    skip_compiling(library)
    q, k, v = stream(0, (1,), 30)
    mine = [library.array(x) for x in (k, v, q)]
    for budget in ({"max_clusters": 10**30}, {"max_clusters": subgen.Power(2.0**40, 1.0)}, {"max_bytes": 10**30}):
        sketch = AttentionSketch(window=8, **budget)
        feed(sketch, *mine)
        assert int(to_numpy(sketch.n_clusters)[0]) == 30 - sketch.state.exact.n


# A capture.


def archive(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def members(*names: str) -> list[tuple[str, bytes]]:
    return [(name, fuzz.npy_of(np.ones((2, 9, 4), "f4"))) for name in names]


@pytest.mark.parametrize("names", [("q.npy", "q", "k.npy"), ("q.npy", "k.npy", "k.npy", "v.npy")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_twice(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="an array twice"):
        read_capture(archive(tmp_path / "a.npz", members(*names)))


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", [("q.npy", b"what"), *members("k.npy", "v.npy")])
    with pytest.raises(FileError, match="broken or foreign file"):
        read_capture(path)


def test_dtypes_that_nothing_computes_with(tmp_path: Path) -> None:
    x = np.ones((2, 9, 4), np.longdouble)
    np.savez(tmp_path / "a.npz", q=x, k=x, v=x)
    if x.itemsize > 8:
        with pytest.raises(FileError, match=r"dtype (float128|longdouble)"):
            read_capture(tmp_path / "a.npz")


def test_the_other_byte_order_is_read(tmp_path: Path) -> None:
    arrays = {name: np.random.default_rng(0).normal(size=(2, 9, 4)).astype(">f4") for name in "qkv"}
    np.savez(tmp_path / "a.npz", **arrays)
    capture = read_capture(tmp_path / "a.npz")
    assert capture.k.dtype.isnative
    np.testing.assert_array_equal(capture.k, arrays["k"])


def test_an_archive_that_would_fill_the_memory(tmp_path: Path) -> None:
    """Two gigabytes of zeros in two megabytes: refused by what the archive says of itself, before they are unpacked."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1, 2**27, 4)})
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("q.npy", "v.npy"):
            archive.writestr(name, file.getvalue())
        with archive.open("k.npy", "w", force_zip64=True) as member:
            member.write(file.getvalue())
            for _ in range(33):
                member.write(bytes(1 << 25))
    assert path.stat().st_size < 10_000_000
    with pytest.raises(FileError, match="would unpack to 1,107,"):
        read_capture(path)


def test_json_of_the_header_is_not_trusted(tmp_path: Path) -> None:
    header = json.dumps({"q": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    for read in (subgen.load, read_capture):
        with pytest.raises(FileError, match="broken or foreign file"):
            read(tmp_path / "a.safetensors")
