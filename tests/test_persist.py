"""Saving and going on: exact, atomic, and deaf to broken files."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import pickle
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
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
from subgen.compare import Comparison, compare
from subgen.files import Capture, FileError, read_capture, write_arrays, write_file
from subgen.means import FEW_CLUSTERS
from subgen.persist import FORMAT, VERSION, _checksum
from subgen.plot import plot_comparison

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


def small() -> AttentionSketch:
    _, k, v = stream(0, (1,), 30)
    sketch = AttentionSketch(5, window=8)
    sketch.update(k, v)
    return sketch


#: What the library writes: a sketch, captures and pictures; and what reads it.
WRITERS: dict[str, Any] = {
    "a.safetensors": lambda path: small().save(path),
    "outputs.safetensors": lambda path: write_arrays(path, {name: np.ones((1, 9, 4)) for name in "qkv"}),
    "outputs.npz": lambda path: write_arrays(path, {name: np.ones((1, 9, 4)) for name in "qkv"}),
    "plot.png": lambda path: plot_comparison(compared(), path),
}
READERS: dict[str, Any] = {
    "a.safetensors": subgen.load,
    "outputs.safetensors": read_capture,
    "outputs.npz": read_capture,
}
posix = pytest.mark.skipif(sys.platform == "win32", reason="modes and links of POSIX")


@cache
def compared() -> Comparison:
    x = np.random.default_rng(0).normal(size=(1, 60, 4))
    return compare(Capture(x, x, x), [0.5], methods=["uniform", "streaming-llm"], window=4)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
class TestAccess:
    """Who may read a file is up to the umask, or to who made it; a link is followed."""

    @pytest.fixture(autouse=True)
    def umask(self) -> Iterator[None]:
        before = os.umask(0o022)
        yield
        os.umask(before)

    @pytest.mark.parametrize("name", WRITERS)
    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
    def test_a_new_file_follows_the_umask(self, name: str, mask: int, tmp_path: Path) -> None:
        os.umask(mask)
        WRITERS[name](tmp_path / name)
        assert mode(tmp_path / name) == 0o666 & ~mask
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("name", WRITERS)
    @pytest.mark.parametrize("old", [0o664, 0o600, 0o640, 0o444, 0o777])
    def test_an_old_file_keeps_its_mode(self, name: str, old: int, tmp_path: Path) -> None:
        path = tmp_path / name
        path.touch()
        path.chmod(old)
        WRITERS[name](path)
        assert mode(path) == old
        assert path.stat().st_size > 0

    @pytest.mark.parametrize("name", WRITERS)
    def test_a_link_is_followed(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "far").mkdir()
        target, link, second = tmp_path / "far" / name, tmp_path / name, tmp_path / f"second{Path(name).suffix}"
        link.symlink_to(Path("far") / name)
        second.symlink_to(link)
        WRITERS[name](link)  # to nothing yet: the file is made where the link leads
        first = target.stat()
        WRITERS[name](second)
        assert link.is_symlink()
        assert second.is_symlink()
        assert not target.is_symlink()
        assert target.stat().st_ino != first.st_ino  # in one step, and not written over
        assert [path.name for path in (tmp_path / "far").iterdir()] == [name]
        if name in READERS:
            READERS[name](second)

    def test_the_old_file_stays_where_writing_fails(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"old")

        def fails(file: Any) -> None:
            file.write(b"new")
            raise OSError(errno.ENOSPC, "no space left")

        with pytest.raises(FileError, match=r"cannot be written.*no space left"):
            write_file(path, fails)
        with pytest.raises(KeyboardInterrupt):
            write_file(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
        assert path.read_bytes() == b"old"
        assert [*tmp_path.iterdir()] == [path]

    def test_names_as_long_as_the_system_takes(self, tmp_path: Path) -> None:
        path = tmp_path / ("é" * 120 + ".safetensors")  # 252 bytes; that of a temporary file has more letters
        small().save(path)
        assert subgen.load(path).n_seen == 30

    @pytest.mark.parametrize("name", READERS)
    def test_what_is_no_file(self, name: str, tmp_path: Path) -> None:
        write, read = WRITERS[name], READERS[name]
        folder, nowhere, loop = tmp_path / f"folder.{name}", tmp_path / f"to_nowhere.{name}", tmp_path / f"loop.{name}"
        fifo = tmp_path / f"fifo.{name}"
        folder.mkdir()
        nowhere.symlink_to(tmp_path / "nowhere" / name)
        loop.symlink_to(loop)
        os.mkfifo(fifo)
        for path, words, of_reading in (
            (folder, "cannot be written: .*Is a directory", "no such file, but a folder; expected"),
            (nowhere, "no such folder, make it first", f"no such file, but a link to .*nowhere/{name}; expected"),
            (tmp_path / "none" / name, "no such folder, make it first", "no such file; expected"),
            (loop, "symbolic links", "cannot be read: .*symbolic links"),
            (fifo, "not a regular file", "not a regular file; expected"),
            (tmp_path / ("x" * 300 + name), "cannot be written: .*too long", "cannot be read: .*too long"),
        ):
            with pytest.raises(FileError, match=words):
                write(path)
            with pytest.raises(FileError, match=of_reading):
                read(path)
        assert folder.is_dir()
        assert nowhere.is_symlink()
        assert loop.is_symlink()
        assert fifo.is_fifo()

    def test_others_may_not(self, tmp_path: Path) -> None:
        """As another user, in a process of its own: root may do anything."""
        closed = tmp_path / "closed"
        closed.mkdir()
        for name in ("a.safetensors", "outputs.npz"):
            WRITERS[name](closed / name)
            (closed / name).chmod(0o600)
        program = (
            "import os, sys, subgen\n"
            "from subgen.files import read_capture\n"
            "sketch = subgen.AttentionSketch(5)\n"
            "closed = sys.argv[1]\n"
            "if os.geteuid() == 0: os.setegid(65534), os.seteuid(65534)\n"
            "else: [os.chmod(f'{closed}/{name}', 0) for name in os.listdir(closed)], os.chmod(closed, 0o500)\n"
            "for call in (lambda: subgen.load(f'{closed}/a.safetensors'),\n"
            "             lambda: read_capture(f'{closed}/outputs.npz'),\n"
            "             lambda: sketch.save(f'{closed}/new.safetensors')):\n"
            "    try: call()\n"
            "    except subgen.files.FileError as error: print(error)\n"
        )
        for path in (tmp_path, *tmp_path.parents):  # what pytest makes is closed to others
            if path == Path(tempfile.gettempdir()):
                break
            path.chmod(path.stat().st_mode | 0o055)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program, str(closed)], capture_output=True, text=True, env=environment, check=True
        )
        closed.chmod(0o700)
        lines = done.stdout.splitlines()
        assert len(lines) == 3
        for line in lines[:2]:
            assert re.search("cannot be read: .*Permission denied", line)
        assert re.search("cannot be written: .*Permission denied.*its folder must allow new files", lines[2])


@pytest.mark.parametrize("name", READERS)
class TestFaultsOfOthers:
    """What is no fault of the file is not blamed on it."""

    def test_without_safetensors(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        WRITERS[name](tmp_path / name)
        for module in [module for module in sys.modules if module.split(".")[0] == "safetensors"]:
            monkeypatch.setitem(sys.modules, module, None)
        for call in (READERS[name], WRITERS[name]):
            if name.endswith(".npz"):
                call(tmp_path / name)
                continue
            with pytest.raises(FileError, match=r"\.safetensors files need safetensors: pip install safetensors"):
                call(tmp_path / name)

    def test_what_is_no_path(self, name: str) -> None:
        for path in (None, 3, io.BytesIO(), b"a.safetensors"):
            for call in (READERS[name], WRITERS[name]):
                with pytest.raises(TypeError, match=r"path must be a str or a pathlib\.Path, got"):
                    call(path)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space")
def test_a_lack_of_memory_is_no_fault_of_the_file(tmp_path: Path) -> None:
    x = np.zeros((1, 1 << 18, 16), np.float32)  # 16 MiB
    sketch = AttentionSketch(5, window=1 << 18)
    sketch.update(x, x)
    sketch.save(tmp_path / "a.safetensors")
    for name in ("outputs.safetensors", "outputs.npz"):
        write_arrays(tmp_path / name, dict.fromkeys("qkv", x))
    program = (
        "import resource, sys, safetensors.numpy, subgen\n"
        "from subgen.files import read_capture\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (8 << 20), -1))\n"
        "folder = sys.argv[1]\n"
        "for read, name in ((subgen.load, 'a.safetensors'), (read_capture, 'outputs.safetensors'),\n"
        "                   (read_capture, 'outputs.npz')):\n"
        "    try: read(f'{folder}/{name}')\n"
        "    except MemoryError: print(name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["a.safetensors", "outputs.safetensors", "outputs.npz"]


def test_like_is_an_array(tmp_path: Path) -> None:
    small().save(tmp_path / "a.safetensors")
    for like in ([1.0], np.float32, "torch", np.dtype("f4")):
        with pytest.raises(TypeError, match=r"like must be an array.*numpy\.zeros\(1, numpy\.float32\)"):
            subgen.load(tmp_path / "a.safetensors", like=like)
    with pytest.raises(TypeError, match="like must have a real floating dtype"):
        subgen.load(tmp_path / "a.safetensors", like=np.zeros(1, int))


def test_a_member_of_an_archive_that_states_more_than_there_is(tmp_path: Path) -> None:
    """Memory is not taken for what a header says alone."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1, 2**40, 8)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(FileError, match=r"broken or foreign file .*is of 70,368,744,177,664 bytes by its header, and"):
        read_capture(tmp_path / "a.npz")


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_kill_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that does nothing but save is killed at any moment; a longer run: ``make kills``."""
    kill_while_saving(tmp_path / "sketch.safetensors", 8)
    assert (tmp_path / "sketch.safetensors").exists()
