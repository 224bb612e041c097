"""Reading captured queries, keys and values, and writing outputs; nothing in a file is ever executed."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .._checks import check_block, check_groups, check_numpy
from ._disk import replace_file

__all__ = [
    "Capture",
    "FileError",
    "as_path",
    "check_capture",
    "existing_file",
    "from_bfloat16",
    "read_capture",
    "read_tensors",
    "reading",
    "sample",
    "write_arrays",
    "write_file",
]

_HELP = (
    "expected an .npz or .safetensors file with floating arrays q, k and v, each of shape "
    "(streams, tokens, head_dim); q may have a multiple of the streams of k"
)
# dtypes of safetensors, as they lie in a file.
_SAFETENSORS = {
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    **{f"{sign}{bits}": f"<{sign.lower()}{bits // 8}" for sign in "IU" for bits in (8, 16, 32, 64)},
    **{"BF16": "<u2", "BOOL": "?"},
}
# An .npz may unpack to this many bytes, or to this many times its own: more is not a capture, but a file made to fill
# the memory.
_UNPACKED = 1 << 30
_RATIO = 32


class FileError(ValueError):
    """A file is missing, broken, or does not hold what was expected."""


@dataclass(frozen=True)
class Capture:
    """Queries, keys and values of one text: ``(q_streams, n, head_dim)`` and ``(streams, n, dim)``."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]


def check_capture(capture: Any) -> Capture:
    """Return a capture in native-endian arrays.

    Parameters
    ----------
    capture : Capture

    Raises
    ------
    TypeError, ValueError
        If it is not a capture, an array is not NumPy's, or shapes, dtypes or numbers are not as `read_capture` gives
        them.
    """
    if not isinstance(capture, Capture):
        raise TypeError(
            f"capture must be a subgen.io.captures.Capture, got {type(capture).__name__}: read one by "
            f"subgen.io.captures.read_capture, or make it of arrays, Capture(q, k, v)"
        )
    check_numpy("a capture", q=capture.q, k=capture.k, v=capture.v)
    k, v = check_block(capture.k, capture.v)
    q = check_groups(capture.q, k)
    if q.ndim != 3 or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"a capture has a query for each token, q (q_streams, n, head_dim) and k (streams, n, head_dim): got "
            f"{q.shape} and {k.shape}"
        )
    return Capture(q, k, v)


def read_capture(path: str | Path) -> Capture:
    """Read ``q``, ``k`` and ``v`` from an ``.npz`` or ``.safetensors`` file.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Capture
        In the dtype of the file; bfloat16 becomes float32, which NumPy can compute with.

    Raises
    ------
    FileError
        If the file is missing, cannot be read, is broken or of another kind, or the arrays are missing or do not fit.
    """
    path = existing_file(path, _HELP)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise FileError(f"{path}: cannot read files ending in {path.suffix!r}; {_HELP}")
    with reading(path, _HELP):
        return _as_capture(path, reader(path))


def sample() -> Capture:
    """Return the real sample that the package ships: two heads of a small language model reading Python source.

    Returns
    -------
    Capture
        float16, each of shape (2, 1536, 64); the model's logits are ``q . k / 8``.
    """
    with resources.as_file(resources.files("subgen") / "data" / "sample.npz") as path:
        return read_capture(path)


def write_arrays(path: str | Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to an ``.npz`` or ``.safetensors`` file, by its ending.

    Parameters
    ----------
    path : str or Path
    arrays : mapping of str to NumPy array

    Raises
    ------
    FileError
        If the ending is another, or the file cannot be written.
    """
    path = as_path(path)
    if path.suffix.lower() == ".npz":
        write_file(path, lambda file: np.savez_compressed(file, **dict(arrays)))  # type: ignore[arg-type]
    elif path.suffix.lower() == ".safetensors":
        with reading(path, _HELP):
            from safetensors.numpy import save
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        write_file(path, lambda file: file.write(data))
    else:
        raise FileError(f"{path}: cannot write files ending in {path.suffix!r}; use .npz or .safetensors")


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put a file in place in one step; see ``subgen._disk.replace_file``.

    Parameters
    ----------
    path : Path
    write : callable
        Called with a binary file, open for writing.

    Raises
    ------
    FileError
        If it cannot be written: with the reason of the system.
    """
    try:
        replace_file(path, write)
    except PermissionError as error:
        raise FileError(
            f"{path}: cannot be written: {error}; a file is put in place whole, so its folder must allow new files"
        ) from error
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error}") from error


def existing_file(path: str | Path, expected: str) -> Path:
    """Return the path of a file that there is.

    Parameters
    ----------
    path : str or Path
    expected : str
        What is expected, for the message.

    Raises
    ------
    TypeError
        If it is not a path.
    FileError
        If there is no such file, it is not a regular file, or access is denied.
    """
    path = as_path(path)
    with reading(path, expected):
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            target = f", but a link to {os.readlink(path)}" if path.is_symlink() else ""
            raise FileError(f"{path}: no such file{target}; {expected}") from None
        if not regular:
            what = "no such file, but a folder" if path.is_dir() else "not a regular file"
            raise FileError(f"{path}: {what}; {expected}")
        with path.open("rb"):  # safetensors takes a file that it may not read for one that is missing
            pass
    return path


def as_path(path: Any) -> Path:
    """Return a path as one of pathlib.

    Parameters
    ----------
    path : str or os.PathLike

    Raises
    ------
    TypeError
        If it is neither.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a pathlib.Path, got {type(path).__name__}")
    return Path(path)


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Raise faults of a file as `FileError`; lack of memory and interrupts pass through.

    Parameters
    ----------
    path : Path
    expected : str
        What is expected, for the message.
    """
    try:
        yield
    except (FileError, MemoryError):
        raise
    except ImportError as error:
        package = (error.name or "safetensors").split(".")[0]
        raise FileError(f"{path}: {path.suffix} files need {package}: pip install {package}") from error
    except OSError as error:
        # Offsets that a broken file states make no sense to the system either.
        if error.errno in (None, errno.EINVAL):
            raise _broken(path, error, expected) from error
        raise FileError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # whatever a broken file makes the readers raise
        raise _broken(path, error, expected) from error


def _broken(path: Path, error: Exception, expected: str) -> FileError:
    return FileError(f"{path}: broken or foreign file ({type(error).__name__}: {error}); {expected}")


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not zipfile.is_zipfile(path):
        raise FileError(f"{path}: not an .npz file (no zip archive), or cut short; {_HELP}")
    with np.load(path, allow_pickle=False) as archive:
        names = _wanted(path, archive.files)
        packed = path.stat().st_size
        unpacked = sum(one.file_size for one in archive.zip.infolist() if one.filename.removesuffix(".npy") in names)
        if unpacked > max(_UNPACKED, _RATIO * packed):
            raise FileError(
                f"{path}: {packed:,} bytes that would unpack to {unpacked:,}, far more than keys and values do; "
                f"write it with numpy.savez if it is what you want"
            )
        for name in names:
            _check_length(archive, name)
        return {name: archive[name] for name in names}


def _check_length(archive: Any, name: str) -> None:
    """Check that a member is as long as its header says: memory for it is taken before it is read."""
    member = name if name in archive.zip.namelist() else f"{name}.npy"
    with archive.zip.open(member) as file:
        head = io.BytesIO(file.read(1 << 16))
    version = np.lib.format.read_magic(head)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(head)
    stated, there = math.prod(shape) * dtype.itemsize, archive.zip.getinfo(member).file_size
    if stated > there:
        raise ValueError(f"{name} is of {stated:,} bytes by its header, and there are {there:,}")


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    _, kinds, arrays = read_tensors(path, lambda found: _wanted(path, found))
    if "BF16" not in kinds.values():
        return arrays
    for name, kind in kinds.items():
        if kind != "BF16":
            raise FileError(f"{path}: {name} has dtype {kind} and another BF16; store one dtype")
    return {name: from_bfloat16(x) for name, x in arrays.items()}


def read_tensors(
    path: Path, choose: Callable[[list[str]], list[str]] = list
) -> tuple[dict[str, str], dict[str, str], dict[str, NDArray[Any]]]:
    """Read a safetensors file.

    Parameters
    ----------
    path : Path
    choose : callable, optional
        Returns which of the names to read; default all.

    Returns
    -------
    metadata : dict of str to str
    kinds : dict of str to str
        dtypes, in the words of the format.
    arrays : dict of str to NumPy array
        bfloat16, which NumPy does not have, by its bits in uint16.

    Raises
    ------
    Exception
        Whatever a broken file makes the readers raise; see `reading`.

    Notes
    -----
    safetensors checks the header. It ends the process where there is no memory for an array, so the arrays are read
    here.
    """
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as archive:
        metadata: dict[str, str] = archive.metadata() or {}
        names = choose(list(archive.keys()))
    kinds, arrays = {}, {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name in names:
            entry = header[name]
            begin, end = entry["data_offsets"]
            kinds[name] = entry["dtype"]
            x = np.empty(entry["shape"], dtype=_SAFETENSORS[kinds[name]])
            if x.nbytes != end - begin:
                raise ValueError(f"{name} is of {x.nbytes:,} bytes by its shape, and {end - begin:,} by its place")
            file.seek(8 + length + begin)
            if file.readinto(x.reshape(-1).view(np.uint8)) != x.nbytes:  # type: ignore[arg-type]
                raise ValueError(f"cut short in {name}")
            arrays[name] = x.astype(x.dtype.newbyteorder("="), copy=False)
    return metadata, kinds, arrays


def from_bfloat16(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 whose upper halves are these bits.

    Parameters
    ----------
    words : uint16 array
        bfloat16 by its bits.

    Returns
    -------
    float32 array of the same shape
    """
    return (words.astype(np.uint32) << 16).view(np.float32)


def _wanted(path: Path, found: list[str]) -> list[str]:
    """Return the names to read; other arrays in the file are left alone."""
    wanted = [name for name in found if name in ("q", "k", "v")]
    if len(wanted) > len({*wanted}):
        raise FileError(f"{path}: holds an array twice: {sorted(wanted)}; {_HELP}")
    if len(wanted) < 3:
        raise FileError(f"{path}: holds {sorted(found) or 'nothing'} and lacks {sorted({*'qkv'} - {*wanted})}; {_HELP}")
    return wanted


def _as_capture(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Capture:
    # In the byte order of this machine, as other libraries have no other.
    arrays = {name: np.asarray(array, dtype=array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.ndim != 3 or 0 in array.shape or array.dtype not in (np.float16, np.float32, np.float64):
            raise FileError(f"{path}: {name} has shape {array.shape} and dtype {array.dtype}; {_HELP}")
        if not np.isfinite(array).all():
            raise FileError(f"{path}: {name} holds NaN or infinity")
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    fits = k.shape[:2] == v.shape[:2] and q.shape[1:] == k.shape[1:] and q.shape[0] % k.shape[0] == 0
    if not fits:
        raise FileError(f"{path}: q {q.shape}, k {k.shape} and v {v.shape} do not fit; {_HELP}")
    if not q.dtype == k.dtype == v.dtype:
        raise FileError(f"{path}: q is {q.dtype}, k {k.dtype} and v {v.dtype}; store one dtype")
    return Capture(q, k, v)
