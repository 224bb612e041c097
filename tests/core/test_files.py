"""Files that the library writes and reads: whole or not at all, with modes and links as the system has them."""

from __future__ import annotations

import errno
import io
import os
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
from sketches import stream

import subgen
from subgen import AttentionSketch
from subgen.evaluation.compare import Comparison, compare
from subgen.evaluation.plot import plot_comparison
from subgen.io.captures import Capture, FileError, read_capture, write_arrays, write_file


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
            "from subgen.io.captures import read_capture\n"
            "sketch = subgen.AttentionSketch(5)\n"
            "closed = sys.argv[1]\n"
            "if os.geteuid() == 0: os.setegid(65534), os.seteuid(65534)\n"
            "else: [os.chmod(f'{closed}/{name}', 0) for name in os.listdir(closed)], os.chmod(closed, 0o500)\n"
            "for call in (lambda: subgen.load(f'{closed}/a.safetensors'),\n"
            "             lambda: read_capture(f'{closed}/outputs.npz'),\n"
            "             lambda: sketch.save(f'{closed}/new.safetensors')):\n"
            "    try: call()\n"
            "    except subgen.io.captures.FileError as error: print(error)\n"
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
        "from subgen.io.captures import read_capture\n"
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
