"""The operations of the PyTorch backend: on a CPU by the NumPy backend, over the same memory.

What is left to torch: attention of many rows, everything on other devices, and tensors of inference mode outside of it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from subgen_numpy import BACKEND as NUMPY
from subgen_numpy import BFLOAT16, compiled, thread_limit, threads
from subgen_numpy.rounding import quantize_to_nearest
from torch import Tensor

from subgen._array import saturating_cast
from subgen._tree import example, tree_map
from subgen.backends import PORTABLE, Backend
from subgen.default import attend as default_attend
from subgen.default.absorb import AbsorbOptions, upcast_clusters
from subgen.default.append import quantize_by_parts
from subgen.default.prompt import Prompt
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, State, reserve

from . import _attend
from ._attend import weighted_attention

__all__ = ["WITHOUT_CUPY", "with_kernels"]

# Up to this many rows NumPy's way is the faster one on a CPU, by a third for the rows of one token.
_FEW_ROWS = 32
# The floating dtypes that both libraries have; those of 16 bits, of which NumPy sees bfloat16 as words.
_NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
_HALVES = {torch.float16, torch.bfloat16}


def _without_graph(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Build no autograd graph in an operation, nor in the portable function where the operation refuses its input."""
    portable = PORTABLE[operation.__name__]

    @wraps(operation)
    def wrapped(*given: Any, **named: Any) -> Any:
        with torch.no_grad():
            result = operation(*given, **named)
            return portable(*given, **named) if result is NotImplemented else result

    return wrapped


def attend(state: State, rows: Tensor, causal: int = 0) -> tuple[Tensor, Tensor]:
    """Answer scaled queries from a state; see `subgen.default.attend.attend`."""
    if rows.shape[1] > _FEW_ROWS or rows.device.type != "cpu":
        return _attend.attend(state, rows, causal)
    if state.exact.keys.dtype in _HALVES and not _loops_read(state.exact.keys):
        keys, values = state.exact.keys.to(rows.dtype), state.exact.values.to(rows.dtype)
        clusters = upcast_clusters(state.clusters, rows.dtype)
        state = replace(state, clusters=clusters, exact=replace(state.exact, keys=keys, values=values))
    outputs, logsumexp = _call(NUMPY.operations["attend"], _view(state), _to_numpy(rows), causal)
    return torch.from_numpy(outputs), torch.from_numpy(logsumexp)


@_without_graph
def append(state: State, keys: Tensor, values: Tensor, queries: Quantized | None) -> State:
    """Append tokens behind the exact ones; see `subgen.default.append.append`. Written in place."""
    if _read_only(state):
        return NotImplemented
    if keys.device.type == "cpu":
        # torch would wake its threads for a few tokens, and they keep spinning while the others absorb.
        state = reserve(state, keys.shape[1])
        space = State(state.clusters, _exact_view(state.exact), None, state.n_seen)
        _call(NUMPY.operations["append"], space, *tree_map(_to_numpy, (keys, values, queries)))
        return _appended(state, keys.shape[1])
    n = keys.shape[1]
    state = reserve(state, n)
    exact = state.exact
    if queries is None:
        queries = tree_map(lambda x: x.new_zeros((x.shape[0], n, *x.shape[2:])), exact.queries)
    blocks = ((exact.keys, keys), (exact.values, values))
    codes = ((exact.queries.codes, queries.codes), (exact.queries.scales, queries.scales))
    for x, block in (*blocks, *codes):
        x.narrow(1, exact.n, n).copy_(block)
    return _appended(state, n)


@_without_graph
def decode(state: State, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[State, Tensor]:
    """Append one token and answer its queries; see `subgen.default.attend.decode`."""
    half = keys.dtype in _HALVES
    known = half or keys.dtype in _NUMPY_DTYPES
    if keys.device.type != "cpu" or not known or (half and not _loops_read(keys)) or _read_only(state):
        return NotImplemented
    rows = queries.float() if half else queries
    state = reserve(state, 1)
    _, outputs = _call(default_attend.decode, _view(state), *map(_to_numpy, (rows, keys, values)), scale)
    return _appended(state, 1), saturating_cast(torch.from_numpy(outputs), queries)


@_without_graph
def absorb(state: State, options: AbsorbOptions) -> State:
    """Absorb the oldest tokens of the window; see `subgen.default.absorb.absorb`."""
    if state.exact.keys.device.type != "cpu":
        return NotImplemented
    return _by_numpy(NUMPY.operations["absorb"], state, options)


@_without_graph
def merge_closest(
    clusters: Clusters, metric: Tensor | None, value_scale: Tensor, max_clusters: int, capacity: int
) -> tuple[Clusters, Tensor]:
    """Merge closest pairs of clusters; see `subgen.default.merging.merge_closest`."""
    if clusters.keys.device.type != "cpu":
        return NotImplemented
    merge = NUMPY.operations["merge_closest"]
    return _by_numpy(merge, clusters, metric, value_scale, max_clusters, capacity)


@_without_graph
def agglomerate(prompt: Prompt, max_clusters: int) -> tuple[Clusters, Tensor]:
    """Merge the tokens of a prompt; see `subgen.default.prompt.agglomerate`."""
    if prompt.keys.device.type != "cpu":
        return NotImplemented
    return _by_numpy(NUMPY.operations["agglomerate"], prompt, max_clusters)


@_without_graph
def quantize_queries(queries: Tensor, scale: float, n_seen: int, dtype: torch.dtype) -> Quantized:
    """Select, scale and round a query of each token; see `subgen.default.append.quantize_queries`."""
    if queries.device.type != "cpu":
        return NotImplemented
    stored = _NUMPY_DTYPES[dtype]

    def rounded(rows: Tensor) -> Quantized:
        quantized: Quantized = _by_numpy(lambda x: quantize_to_nearest(x, stored), rows)
        return quantized

    return quantize_by_parts(queries, scale, n_seen, rounded)


#: The backend without the kernels of `subgen_cupy`.
WITHOUT_CUPY = Backend(
    "torch",
    {
        "weighted_attention": weighted_attention,
        "attend": attend,
        "append": append,
        "decode": decode,
        "absorb": absorb,
        "merge_closest": merge_closest,
        "agglomerate": agglomerate,
        "quantize_queries": quantize_queries,
    },
)


def with_kernels(own: Backend) -> Backend:
    """Add the kernels of `subgen_cupy` for CUDA tensors, where torch has a CUDA device and CuPy is installed.

    Parameters
    ----------
    own : Backend
        Of torch's own operations.

    Returns
    -------
    Backend

    Warns
    -----
    RuntimeWarning
        If CuPy is installed but does not import.
    """
    possible = torch.version.cuda is not None and torch.cuda.is_available()
    if not possible or importlib.util.find_spec("cupy") is None:
        return own
    try:
        import cupy  # noqa: F401
    except Exception as error:  # whatever an installation for another CUDA raises
        warnings.warn(
            f"CuPy is installed but does not import ({type(error).__name__}: {error}): CUDA tensors are served by "
            f"torch's own operations, which are slower; install the CuPy of this CUDA, or none",
            RuntimeWarning,
            stacklevel=2,
        )
        return own
    from subgen_cupy.device_torch import backend_for

    return backend_for(own)


def _by_numpy(operation: Callable[..., Any], *given: Any) -> Any:
    """Call a function on NumPy arrays over the memory of tensors; its results become tensors over theirs."""
    return tree_map(_to_torch, _call(operation, *[tree_map(_to_numpy, x) for x in given]))


def _call(operation: Callable[..., Any], *given: Any) -> Any:
    """Call a function of NumPy arrays, in no more threads than torch may use."""
    allowed = torch.get_num_threads()
    if allowed >= threads():  # as a rule: both follow the same variable
        return operation(*given)
    with thread_limit(allowed):
        return operation(*given)


def _view(state: State) -> State:
    """Return NumPy arrays over the memory of a state, of all that `attend` reads."""
    clusters = state.clusters
    read = Clusters(
        keys=tree_map(_to_numpy, clusters.keys),
        values=tree_map(_to_numpy, clusters.values),
        counts=_to_numpy(clusters.counts),
        key_variance=_to_numpy(clusters.key_variance),
        importance=None,
    )
    return State(read, _exact_view(state.exact), None, state.n_seen)


def _exact_view(exact: Exact) -> Exact:
    """Return NumPy arrays over the memory of exact tokens; with an owner of their own, NumPy appends in place.

    So nothing need be converted back, which takes as long as the rest of a token: reserve the space first.
    """
    queries = Quantized(_to_numpy(exact.queries.codes), _to_numpy(exact.queries.scales))
    return Exact(_to_numpy(exact.keys), _to_numpy(exact.values), queries, exact.n, BufferOwner(exact.n))


def _appended(state: State, n: int) -> State:
    """Count n tokens more, which are written in the arrays of the state."""
    exact = state.exact
    after = Exact(exact.keys, exact.values, exact.queries, exact.n + n, exact.owner)
    return State(state.clusters, after, state.residual, state.n_seen + n)


def _to_numpy(x: Tensor) -> Any:
    """Return an array over the memory of a tensor; bfloat16 as words."""
    if x.requires_grad:  # detaching takes as long as all else here, and most tensors need none
        x = x.detach()
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


def _to_torch(x: Any) -> Tensor:
    """Return a tensor over the memory of an array."""
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == BFLOAT16 else torch.from_numpy(x)


def _loops_read(x: Tensor) -> bool:
    """Whether compiled loops read 16-bit tensors without a copy; without loops torch upcasts several times as fast."""
    return x.dtype in _HALVES and compiled("attend") is not None


def _read_only(state: State) -> bool:
    """Whether the tensors of a state belong to inference mode, which has ended."""
    return bool(example(state.exact).is_inference()) and not torch.is_inference_mode_enabled()
