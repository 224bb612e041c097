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

from .._array import Array, array_namespace, dtype_name, finfo, is_floating, library_name
from .._checks import check_example, check_flag, check_integer
from .._inputs import autocast_off
from .._tree import leaves
from ..default.algorithm import ClusterMeans
from ..default.state import BufferOwner, State, clear_free_space
from ..layout import Layout
from ._units import convert_units
from .captures import FileError, as_path, existing_file, from_bfloat16, read_tensors, reading, write_file
from .old_versions import from_old_version
from .validate import check_sizes, check_state

__all__ = ["FORMAT", "VERSION", "load", "save"]

FORMAT = "subgen sketch"
# 1: counts in int32, and no roots in 16 bits. 2: both mended. 3: clusters in arrays of their own.
VERSION = 3
_DTYPES = ("float16", "float32", "float64", "bfloat16")
_HELP = "expected a file written by AttentionSketch.save"


def save(
    path: str | Path, kind: str, arguments: dict[str, Any], check_finite: bool, layout: Layout | None, state: Any
) -> None:
    """Write a sketch; see `subgen.AttentionSketch.save`.

    Parameters
    ----------
    path : str or Path
    kind : str
        Of the algorithm.
    arguments : dict
        Its parameters, as JSON can hold them.
    check_finite : bool
    layout : Layout or None
    state : State, PaperState or None
        ``None`` before the first token, as the layout.
    """
    path = as_path(path)
    if path.suffix.lower() != ".safetensors":
        raise FileError(f"{path}: a sketch is saved as .safetensors; give the file that ending")
    with reading(path, _HELP):
        from safetensors.numpy import save as to_bytes
    tensors: dict[str, NDArray[Any]] = {}
    plain: dict[str, Any] = {}
    config: dict[str, Any] = {"method": {"kind": kind, **arguments}, "check_finite": check_finite, "layout": None}
    if state is not None and layout is not None:
        config["layout"] = {
            "leading": list(layout.leading),
            "head_dim": layout.head_dim,
            "value_dim": layout.value_dim,
            "dtype": dtype_name(layout.example.dtype),
        }
        plain["n_seen"] = state.n_seen
        if isinstance(state, State):
            plain["exact.n"] = state.exact.n
        with autocast_off(layout.example):
            if isinstance(state, State):
                # A copy of the sketch may be appending behind the last token, in another thread.
                state = clear_free_space(state)
            tensors = {name: _to_numpy(x) for name, x in leaves(state)}
    config["plain"] = plain
    text = json.dumps(config, sort_keys=True)
    metadata = {"format": FORMAT, "version": str(VERSION), "config": text, "sha256": _checksum(text, tensors)}
    # Contiguous and native: safetensors writes the bytes as they lie.
    data = to_bytes(tensors, metadata)
    write_file(path, lambda file: file.write(data))


def load(path: str | Path, like: Array | None, kinds: Mapping[str, type[Any]]) -> tuple[Any, bool, Layout | None, Any]:
    """Read a sketch; see `subgen.load`.

    Parameters
    ----------
    path : str or Path
    like : array or None
    kinds : mapping of str to type
        Algorithms by name; each has ``from_arguments``.

    Returns
    -------
    method, check_finite, layout, state
        As given to `save`.
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
        if int(metadata["version"]) < 3:
            config, tensors = from_old_version(config, tensors)
        with autocast_off(like):
            return _restore(config, tensors, like, kinds, int(metadata["version"]))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    # The checksum fits, but the content is not a sketch. A device that is missing raises none of these.
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


def _checksum(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype.str} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def _restore(
    config: dict[str, Any],
    tensors: dict[str, NDArray[Any]],
    like: Array | None,
    kinds: Mapping[str, type[Any]],
    version: int,
) -> tuple[Any, bool, Layout | None, Any]:
    arguments, finite = dict(config["method"]), check_flag("check_finite", config["check_finite"])
    kind = arguments.pop("kind")
    if kind not in kinds:
        raise FileError(f"a sketch of kind {kind!r}, which this release does not support: upgrade subgen")
    method = kinds[kind].from_arguments(**arguments)
    described = config["layout"]
    if described is None:
        if tensors or config["plain"]:
            raise FileError("holds arrays and no layout")
        return method, finite, None, None
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
    if isinstance(method, ClusterMeans):
        tensors = convert_units(tensors, saved, dtype_name(like.dtype), plain=version == 1)
    check_sizes({name: x.shape for name, x in tensors.items()}, method, math.prod(leading), head_dim, value_dim)
    empty = xp.zeros((*leading, 0, head_dim), dtype=like.dtype, device=like.device)
    layout = Layout(leading, head_dim, value_dim, empty)
    flat = layout.flat(empty)
    template = method.init(flat, xp.zeros((flat.shape[0], 0, value_dim), dtype=like.dtype, device=like.device))
    if "clusters.nearest" in tensors and isinstance(template, State):  # an empty sketch has none
        nearest = xp.zeros((flat.shape[0], 0), dtype=xp.int32, device=like.device)
        template = replace(template, clusters=replace(template.clusters, nearest=nearest))
    state = _unflatten(template, "", dict(tensors), dict(config["plain"]), same)
    arrays = {name: from_bfloat16(x) if x.dtype == np.uint16 else x for name, x in tensors.items()}
    check_state(state, arrays, method, finite=finite)
    return method, finite, layout, state


def _unflatten(template: Any, prefix: str, tensors: dict[str, NDArray[Any]], plain: dict[str, Any], same: bool) -> Any:
    """Fill the structure of an empty state; what is missing, left over or of another shape or dtype is an error."""
    changes: dict[str, Any] = {}
    for field in fields(template):
        name, x = prefix + field.name, getattr(template, field.name)
        if is_dataclass(x):
            changes[field.name] = _unflatten(x, name + ".", tensors, plain, same)
        elif hasattr(x, "shape"):
            changes[field.name] = _from_numpy(name, tensors.pop(name), x, same)
        elif isinstance(x, int):
            changes[field.name] = check_integer(name, plain.pop(name), minimum=0)
    if "owner" in {field.name for field in fields(template)}:
        changes["owner"] = BufferOwner(changes["n"])
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
