"""Saving a sketch and going on from it: one safetensors file, written whole or not at all, read without running it.

The arrays of the state are tensors; parameters, shapes and the few numbers beside the arrays are JSON in the metadata,
with a version of the format and a checksum over everything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._array import Array, array_namespace, dtype_name, finfo, is_floating, library_name
from ._checks import check_example, check_flag, check_integer
from ._consistency import check_sizes, check_state
from ._inputs import autocast_off
from .budget import Bytes, Fixed, Power, Share
from .files import FileError, as_path, existing_file, from_bfloat16, read_tensors, reading, write_file
from .means import ClusterMeans, MeansState, clear_room
from .paper import Paper
from .rounding import SCALE_UNIT
from .sketch import AttentionSketch, Layout
from .tail import Tail

__all__ = ["FORMAT", "VERSION", "load", "save"]

FORMAT = "subgen sketch"
# 1: counts of members in int32, and in 16 bits no roots (`_in_units_of`). 2: in int64, and roots.
VERSION = 2
_DTYPES = ("float16", "float32", "float64", "bfloat16")
_HELP = "expected a file written by AttentionSketch.save"


def save(sketch: AttentionSketch, path: str | Path) -> None:
    """Write a sketch; see `subgen.AttentionSketch.save`."""
    path = as_path(path)
    if path.suffix.lower() != ".safetensors":
        raise FileError(f"{path}: a sketch is saved as .safetensors; give the file that ending")
    with reading(path, _HELP):
        from safetensors.numpy import save as to_bytes
    tensors: dict[str, NDArray[Any]] = {}
    plain: dict[str, Any] = {}
    config: dict[str, Any] = {"method": _describe(sketch), "check_finite": sketch.check_finite, "layout": None}
    state, layout = sketch.state, sketch.layout
    if state is not None and layout is not None:
        config["layout"] = {
            "leading": list(layout.leading),
            "head_dim": layout.head_dim,
            "value_dim": layout.value_dim,
            "dtype": dtype_name(layout.example.dtype),
        }
        # As it was when the save began: a copy of the sketch may go on in another thread, in the room of the arrays.
        with autocast_off(layout.example):
            _flatten(clear_room(state) if isinstance(state, MeansState) else state, "", tensors, plain)
    config["plain"] = plain
    text = json.dumps(config, sort_keys=True)
    metadata = {"format": FORMAT, "version": str(VERSION), "config": text, "sha256": _checksum(text, tensors)}
    # Contiguous and native: safetensors writes the bytes as they lie.
    data = to_bytes(tensors, metadata)
    write_file(path, lambda file: file.write(data))


def load(path: str | Path, like: Array | None = None) -> AttentionSketch:
    """Read a sketch written by `subgen.AttentionSketch.save`, to go on from where it was.

    Nothing in the file is executed. A sketch goes on bit for bit as the one that was saved would have, on the same
    library; on another the discrete decisions are those of that library's arithmetic from here on.

    Parameters
    ----------
    path : str or Path
    like : array, optional
        An array of the library, device and dtype to go on with; ``None`` means NumPy and the dtype that was saved.

    Returns
    -------
    AttentionSketch

    Raises
    ------
    FileError
        If the file is missing, cannot be read, is cut short, altered, foreign or of a newer version, or holds
        bfloat16, which NumPy has no dtype for, and no ``like`` was given.
    TypeError
        If ``like`` is not an array of a dtype that sketches compute with.
    MemoryError
        If memory does not suffice.

    Examples
    --------
    >>> import numpy as np, subgen, tempfile, pathlib
    >>> keys = np.random.default_rng(0).normal(size=(2, 500, 8))
    >>> sketch = subgen.AttentionSketch(32, window=16)
    >>> sketch.update(keys[:, :300], keys[:, :300])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sketch.save(pathlib.Path(folder) / "sketch.safetensors")
    ...     resumed = subgen.load(pathlib.Path(folder) / "sketch.safetensors")
    >>> for each in (sketch, resumed):
    ...     each.update(keys[:, 300:], keys[:, 300:])
    >>> bool(np.all(sketch.attend(keys) == resumed.attend(keys)))
    True
    """
    if isinstance(like, type) or (like is not None and not hasattr(like, "device")):
        raise TypeError(
            f"like must be an array, for its library, dtype and device, got {like!r}: pass one with any numbers, for "
            f"example numpy.zeros(1, numpy.float32) or torch.zeros(1, dtype=torch.float16, device='cuda')"
        )
    like = None if like is None else check_example("like", like)
    path = existing_file(path, _HELP)
    with reading(path, _HELP):
        metadata, _, tensors = read_tensors(path)
    config = _verify(path, metadata, tensors)
    try:
        if metadata["version"] == "1":
            tensors = _in_64_bits(tensors)
        with autocast_off(like):
            return _restore(config, tensors, like, int(metadata["version"]))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    # A file that is well signed, but says what no sketch is. What a device lacks is none of these.
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FileError(f"{path}: holds no sketch ({type(error).__name__}: {error}); {_HELP}") from error


def _verify(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Check format, version and checksum, and return the configuration."""
    if metadata.get("format") != FORMAT:
        raise FileError(f"{path}: a safetensors file, but no sketch; {_HELP}")
    version = metadata.get("version", "")
    if not version.isdecimal() or len(version) > 9 or int(version) < 1:
        raise FileError(f"{path}: version {version!r} is none; {_HELP}")
    if int(version) > VERSION:
        raise FileError(f"{path}: version {version} of the format; this release reads up to {VERSION}: upgrade subgen")
    text = metadata.get("config", "")
    if metadata.get("sha256") != _checksum(text, tensors):
        raise FileError(f"{path}: altered since it was written (the checksum does not fit); use another copy")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise FileError(f"{path}: holds no configuration ({type(error).__name__}: {error}); {_HELP}") from error
    if not isinstance(config, dict):
        raise FileError(f"{path}: holds no configuration; {_HELP}")
    return config


def _in_64_bits(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file with counts of members in int64; version 1 has them in int32."""
    counts = tensors.get("counts")
    if counts is None or counts.dtype != np.int32:
        return tensors
    return {**tensors, "counts": counts.astype(np.int64)}


def _checksum(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype.str} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def _describe(sketch: AttentionSketch) -> dict[str, Any]:
    """Return the arguments that make such a sketch."""
    method = sketch.method
    if isinstance(method, Paper):
        return {
            "kind": "paper",
            "delta": method.delta,
            "samples_per_cluster": method.t,
            "value_samples": method.s,
            "scale": method.scale,
            "seed": method.seed,
        }
    if not isinstance(method, ClusterMeans):
        raise TypeError(f"cannot save a sketch by {type(method).__name__}")
    described = {
        name: getattr(method, name)
        for name in ("delta", "window", "sink", "scale", "storage", "residual_samples", "seed")
    }
    budget = method.budget
    if isinstance(budget, Fixed):
        described["max_clusters"] = budget.max_clusters
    elif isinstance(budget, Power):
        described["max_clusters"] = {"coefficient": budget.coefficient, "exponent": budget.exponent}
    elif isinstance(budget, Bytes):
        described["max_bytes"] = budget.max_bytes
    elif isinstance(budget, Share):
        described["compression_ratio"] = budget.compression_ratio
    elif budget is not None:
        raise TypeError(f"cannot save a budget of {type(budget).__name__}")
    return {"kind": "means", **described}


def _restore(
    config: dict[str, Any], tensors: dict[str, NDArray[Any]], like: Array | None, version: int
) -> AttentionSketch:
    arguments = dict(config["method"], check_finite=config["check_finite"])
    kind = arguments.pop("kind")
    if kind == "paper":
        sketch = AttentionSketch.paper(**arguments)
    elif kind == "means":
        if isinstance(arguments.get("max_clusters"), dict):
            arguments["max_clusters"] = Power(**arguments["max_clusters"])
        sketch = AttentionSketch(**arguments)
    else:
        raise FileError(f"a sketch of kind {kind!r}, which this release does not know: upgrade subgen")
    described = config["layout"]
    if described is None:
        if tensors or config["plain"]:
            raise FileError("holds arrays and no layout")
        return sketch
    saved = described["dtype"]
    if saved not in _DTYPES:
        raise FileError(f"holds {saved!r}, expected one of {', '.join(_DTYPES)}")
    if like is None:
        if saved == "bfloat16":
            raise FileError("holds bfloat16, which NumPy has no dtype for: pass like=, for example a torch tensor")
        like = np.zeros((), dtype=saved)
    xp = array_namespace(like)
    same = dtype_name(like.dtype) == saved
    leading = tuple(check_integer("a leading axis", x) for x in described["leading"])
    head_dim, value_dim = (check_integer(name, described[name]) for name in ("head_dim", "value_dim"))
    method: Any = sketch.method
    if kind == "means":
        tensors = _in_units_of(tensors, saved, dtype_name(like.dtype), version)
    check_sizes({name: x.shape for name, x in tensors.items()}, method, math.prod(leading), head_dim, value_dim)
    empty = xp.zeros((*leading, 0, head_dim), dtype=like.dtype, device=like.device)
    layout = Layout(leading, head_dim, value_dim, empty)
    flat = layout.flat(empty)
    template = method.init(flat, xp.zeros((flat.shape[0], 0, value_dim), dtype=like.dtype, device=like.device))
    if kind == "means" and "nearest" in tensors:  # an empty sketch has none
        template = replace(template, nearest=xp.zeros((flat.shape[0], 0), dtype=xp.int32, device=like.device))
    plain = dict(config["plain"])
    state = _unflatten(template, "", dict(tensors), plain, same)
    arrays = {name: from_bfloat16(x) if x.dtype == np.uint16 else x for name, x in tensors.items()}
    check_state(state, arrays, method, finite=sketch.check_finite)
    sketch.resume(layout, state)
    return sketch


def _in_units_of(tensors: dict[str, NDArray[Any]], saved: str, dtype: str, version: int) -> dict[str, NDArray[Any]]:
    """Give what 16 bits hold as roots, or in another unit, as the dtype to go on with holds it; see `subgen.rounding`.

    The first version of the format had neither: there they were as in 32 bits.
    """
    narrow = {"float16", "bfloat16"}
    before, after = version > 1 and saved in narrow, dtype in narrow
    if before == after:
        return tensors

    def converted(name: str, x: NDArray[Any]) -> NDArray[Any]:
        wide = (from_bfloat16(x) if x.dtype == np.uint16 else x).astype(np.float64)
        if name in ("spread", "importance"):
            # What is below zero stays so, to be refused.
            wide = np.copysign(np.sqrt(np.abs(wide)) if after else wide * wide, wide)
        else:
            wide = wide / SCALE_UNIT if after else wide * SCALE_UNIT
        if saved == dtype == "bfloat16":
            # To nearest, of two as near to the even one.
            bits = wide.astype(np.float32).view(np.uint32)
            return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # Of the dtype that was saved where that is the one to go on with; else wide enough to be cast once.
        return wide.astype(x.dtype) if saved == dtype else wide

    changed = ("spread", "importance", "key_codes.scales", "value_codes.scales")
    return tensors | {name: converted(name, tensors[name]) for name in changed if name in tensors}


def _flatten(value: Any, prefix: str, tensors: dict[str, NDArray[Any]], plain: dict[str, Any]) -> None:
    for field in fields(value):
        name, x = prefix + field.name, getattr(value, field.name)
        if x is None or isinstance(x, Tail):
            continue
        if is_dataclass(x):
            _flatten(x, name + ".", tensors, plain)
        elif hasattr(x, "shape"):
            tensors[name] = _to_numpy(x)
        else:
            plain[name] = x


def _unflatten(template: Any, prefix: str, tensors: dict[str, NDArray[Any]], plain: dict[str, Any], same: bool) -> Any:
    """Fill the structure of an empty state; what is missing, left over or of another shape or dtype is an error."""
    changes: dict[str, Any] = {}
    for field in fields(template):
        name, x = prefix + field.name, getattr(template, field.name)
        if x is None or isinstance(x, Tail):
            continue
        if is_dataclass(x):
            changes[field.name] = _unflatten(x, name + ".", tensors, plain, same)
        elif hasattr(x, "shape"):
            changes[field.name] = _from_numpy(name, tensors.pop(name), x, same)
        elif isinstance(x, tuple):
            changes[field.name] = tuple(check_flag(name, one) for one in plain.pop(name))
        else:
            changes[field.name] = check_integer(name, plain.pop(name), minimum=0)
    if not prefix and (tensors or plain):
        raise FileError(f"holds {sorted([*tensors, *plain])}, which no such sketch has")
    return replace(template, **changes)


def _to_numpy(x: Array) -> NDArray[Any]:
    """Bring an array home; bfloat16 as its bits."""
    xp = array_namespace(x)
    bits = dtype_name(x.dtype) == "bfloat16"
    if bits:
        x = xp.astype(x, xp.float32)
    name = library_name(xp)
    if name == "torch":
        x = x.detach().cpu().numpy()
    elif name == "cupy":
        x = x.get()
    else:
        x = np.from_dlpack(x) if not isinstance(x, np.ndarray) else x
    home: NDArray[Any] = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    return (home.view(np.uint32) >> 16).astype(np.uint16) if bits else home


def _from_numpy(name: str, x: NDArray[Any], template: Array, same: bool) -> Array:
    """Give an array the library, device and dtype of the empty one that stands in its place."""
    xp = array_namespace(template)
    if x.dtype == np.uint16:
        x = from_bfloat16(x)
        floating, fits = True, not same or dtype_name(template.dtype) == "bfloat16"
    else:
        floating = x.dtype.kind == "f"
        fits = x.dtype.name == dtype_name(template.dtype) or (not same and floating)
    if floating != is_floating(template.dtype, xp) or not fits:
        raise FileError(f"{name} is {x.dtype}, expected {template.dtype}")
    if x.ndim != template.ndim or x.shape[:1] != template.shape[:1] or x.shape[2:] != tuple(template.shape[2:]):
        raise FileError(f"{name} has shape {x.shape}, expected that of {tuple(template.shape)} but for the second axis")
    if floating and not same and x.size and float(np.abs(x).max()) > finfo(template.dtype, xp).max:
        raise FileError(f"{name} has numbers that {template.dtype} does not hold: pass like= in a wider dtype")
    array = xp.asarray(np.array(x), device=template.device)
    return xp.astype(array, template.dtype) if floating else array
