"""Frozen dataclasses of arrays as trees: what JAX calls a pytree, without a registry.

A leaf is anything with a ``shape``. A node is a dataclass or a tuple. Everything else, a number, ``None`` or a
`BufferOwner`, belongs to the node and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from ._array import Array, array_namespace, itemsize

__all__ = ["concat", "example", "leaves", "nbytes", "tree_map"]

Tree = TypeVar("Tree")


_known: dict[Any, tuple[str, ...]] = {}


def _names(kind: Any) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass; none for any other type."""
    names = _known.get(kind)
    if names is None:
        names = _known[kind] = tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()
    return names


def _map(function: Callable[..., Any], tree: Any) -> Any:
    """Do what `tree_map` does for one tree, in half the time: a single token takes several."""
    if hasattr(tree, "shape"):
        return function(tree)
    names = _names(type(tree))
    if names:
        return type(tree)(*[_map(function, getattr(tree, name)) for name in names])
    return tuple(_map(function, part) for part in tree) if isinstance(tree, tuple) else tree


def tree_map(function: Callable[..., Any], tree: Tree, *others: Any) -> Tree:
    """Apply a function to every array, and to the arrays at the same place in other trees.

    Parameters
    ----------
    function : callable
        Takes one array of each tree.
    tree : dataclass, array or None
    *others : dataclass, array or None
        Trees of the same structure.

    Returns
    -------
    dataclass, array or None
        The structure of the first tree, with the results as arrays.
    """
    if not others:
        return _map(function, tree)  # type: ignore[no-any-return]
    if hasattr(tree, "shape"):
        return function(tree, *others)  # type: ignore[no-any-return]
    if isinstance(tree, tuple):
        return tuple(tree_map(function, *parts) for parts in zip(tree, *others, strict=True))  # type: ignore[return-value]
    names = _names(type(tree))
    if not names:
        return tree
    return type(tree)(
        *[tree_map(function, getattr(tree, name), *[getattr(other, name) for other in others]) for name in names]
    )


def concat(trees: Sequence[Tree], axis: int) -> Tree:
    """Concatenate arrays, or the arrays of trees, along an axis; a single one is returned without a copy."""
    if len(trees) == 1:
        return trees[0]
    return tree_map(lambda *x: array_namespace(x[0]).concat(list(x), axis=axis), *trees)


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Array]]:
    """Iterate over the arrays of a tree with their dotted names, in the order of the fields; in a tuple, numbers."""
    if hasattr(tree, "shape"):
        yield name, tree
        return
    parts = enumerate(tree) if isinstance(tree, tuple) else ((part, getattr(tree, part)) for part in _names(type(tree)))
    for part, value in parts:
        yield from leaves(value, f"{name}.{part}" if name else str(part))


def example(tree: Any) -> Array:
    """Return an array of the tree, or the array itself: it carries library, dtype and device.

    Raises
    ------
    TypeError
        If the tree holds no array.
    """
    while not hasattr(tree, "shape"):
        names = _names(type(tree))
        if not names:
            raise TypeError(f"expected an array or a dataclass of arrays, got {type(tree).__name__}")
        tree = getattr(tree, names[0])
    return tree


def nbytes(tree: Any) -> int:
    """Count the bytes of every array of a tree; padding counts."""
    total = 0
    for _, array in leaves(tree):
        size = itemsize(array.dtype, array_namespace(array))
        for length in array.shape:
            size *= int(length)
        total += size
    return total
