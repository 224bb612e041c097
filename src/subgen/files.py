"""Reading captured queries, keys and values, and writing outputs; nothing in a file is ever executed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Capture", "FileError", "from_bfloat16", "read_capture", "sample", "write_arrays"]

_HELP = (
    "expected an .npz or .safetensors file with floating arrays q, k and v, each of shape "
    "(streams, tokens, head_dim); q may have a multiple of the streams of k"
)
# An .npz may unpack to this many bytes, or to this many times its own: more is no capture, but a file made to fill
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
        If the file is missing, broken or of another kind, or the arrays are missing or do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file; {_HELP}")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise FileError(f"{path}: cannot read files ending in {path.suffix!r}; {_HELP}")
    try:
        return _as_capture(path, reader(path))
    except FileError:
        raise
    except Exception as error:  # whatever a broken file makes the readers raise
        raise FileError(f"{path}: broken or foreign file ({type(error).__name__}: {error}); {_HELP}") from error


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
    path = Path(path)
    try:
        if path.suffix.lower() == ".npz":
            np.savez_compressed(path, **dict(arrays))  # type: ignore[arg-type]
        elif path.suffix.lower() == ".safetensors":
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
        else:
            raise FileError(f"{path}: cannot write files ending in {path.suffix!r}; use .npz or .safetensors")
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error}") from error


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
        return {name: archive[name] for name in names}


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as archive:
        names = _wanted(path, list(archive.keys()))
        if any(archive.get_slice(name).get_dtype() == "BF16" for name in names):
            return _read_bfloat16(path, names)
        return {name: archive.get_tensor(name) for name in names}


def _read_bfloat16(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    """Read tensors that NumPy has no dtype for: the upper halves of float32. The header was checked by `safe_open`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = file.read()
    arrays: dict[str, NDArray[Any]] = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] != "BF16":
            raise FileError(f"{path}: {name} has dtype {entry['dtype']} and another BF16; store one dtype")
        begin, end = entry["data_offsets"]
        arrays[name] = from_bfloat16(np.frombuffer(data[begin:end], dtype="<u2")).reshape(entry["shape"])
    return arrays


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
