"""Read the first two versions of the format of saved sketches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_flag
from .captures import FileError

__all__ = ["from_old_version"]

Arrays = dict[str, NDArray[Any]]


def from_old_version(config: dict[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Convert what a file of version 1 or 2 holds to version 3.

    There, means in the dtype of the input lay in front of the exact tokens, sinks had no query, and flags marked the
    tokens of the window that came with one. In version 1 counts were int32.

    Parameters
    ----------
    config : dict
        The JSON of the metadata.
    tensors : dict of str to NumPy array

    Returns
    -------
    config, tensors

    Raises
    ------
    FileError
        If the flags or the queries do not fit the exact tokens; `subgen.io.validate` checks the rest.
    """
    if config["method"]["kind"] != "means" or config["layout"] is None:
        return config, tensors
    arguments, plain, old = config["method"], dict(config["plain"]), dict(tensors)
    counts = old.pop("counts")
    # Other dtypes are left for the reader to refuse.
    new: Arrays = {"clusters.counts": counts.astype(np.int64) if counts.dtype == np.int32 else counts}
    before = 0 if arguments["storage"] == "int8" else counts.shape[1]
    for name in ("keys", "values"):
        x = old.pop(name)
        new[f"exact.{name}"] = x[:, before:]
        if arguments["storage"] == "int8":
            for part in ("codes", "scales"):
                new[f"clusters.{name}.{part}"] = old.pop(f"{name.removesuffix('s')}_codes.{part}")
        else:
            new[f"clusters.{name}"] = x[:, :before]
    places = new["exact.keys"].shape[1]
    has_query = [check_flag("asked", flag) for flag in plain.pop("asked")]
    if len(has_query) != max(0, plain["n_exact"] - arguments["sink"]):
        raise FileError("holds a state that contradicts itself: queries of the window")
    for part in ("codes", "scales"):
        x = old.pop(f"queries.{part}")
        if arguments["sink"] + x.shape[1] != places:
            raise FileError(f"queries.{part} has shape {x.shape}, expected the window by the parameters beside it")
        queries = np.zeros((x.shape[0], places, *x.shape[2:]), x.dtype)
        some = np.flatnonzero(has_query)
        queries[:, arguments["sink"] + some] = x[:, some]
        new[f"exact.queries.{part}"] = queries
    for name, now in (("spread", "key_variance"), ("importance",) * 2, ("leaders",) * 2, ("nearest",) * 2):
        if name in old:
            new[f"clusters.{now}"] = old.pop(name)
    plain = {"n_seen": plain.pop("n_seen"), "exact.n": plain.pop("n_exact"), **plain}
    return {**config, "plain": plain}, {**new, **old}
