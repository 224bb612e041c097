"""Frozen dataclasses of arrays as trees."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import numpy as np
import pytest
from libraries import Library, to_numpy
from sketches import make, stream

from subgen import AttentionSketch
from subgen._tree import example, leaves, nbytes, tree_map
from subgen.default.state import BufferOwner, Quantized


@dataclass(frozen=True)
class Pair:
    """Two arrays and something that is none."""

    first: Any
    second: Any
    n: int = 0


@dataclass(frozen=True)
class Nested:
    """Dataclasses in a dataclass, a tuple, nothing, and an object that is shared."""

    inner: Pair
    both: tuple[Any, ...]
    nothing: Any
    owner: BufferOwner
    last: Any


def nested(library: Library, start: int = 0) -> Nested:
    a, b, c, d, e = (library.array(np.arange(start + i, start + i + 4, dtype=np.float32)) for i in range(5))
    return Nested(Pair(a, b, n=7), (c, None, Pair(d, None, n=8)), None, BufferOwner(3), e)


def numbers(tree: Nested) -> list[float]:
    """The first number of each array, in the order of the fields."""
    places = (tree.inner.first, tree.inner.second, tree.both[0], tree.both[2].first, tree.last)
    return [float(to_numpy(x)[0]) for x in places]


def test_a_function_is_applied_to_every_array_and_nothing_else_changes(library: Library) -> None:
    tree = nested(library)
    result = tree_map(lambda x: x * 2, tree)
    assert numbers(result) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert numbers(tree) == [0.0, 1.0, 2.0, 3.0, 4.0]  # as it was
    assert type(result) is Nested
    assert type(result.both) is tuple
    assert type(result.both[2]) is Pair
    assert (result.inner.n, result.both[2].n) == (7, 8)
    assert result.nothing is None
    assert result.both[1] is None
    assert result.both[2].second is None
    assert result.owner is tree.owner
    with pytest.raises(FrozenInstanceError):
        result.inner = tree.inner  # type: ignore[misc]


def test_arrays_at_the_same_place_of_several_trees_go_together(library: Library) -> None:
    first, second, third = (nested(library, start) for start in (0, 10, 100))
    result = tree_map(lambda x, y, z: x + y + z, first, second, third)
    assert numbers(result) == [110.0 + 3 * i for i in range(5)]
    # Numbers and objects are those of the first.
    other = Nested(Pair(first.inner.first, first.inner.second, n=1), second.both, None, BufferOwner(9), first.last)
    assert tree_map(lambda x, y: y, first, other).inner.n == 7
    assert tree_map(lambda x, y: y, first, other).owner is first.owner


def test_an_array_alone_is_a_tree_and_so_is_nothing() -> None:
    x = np.arange(3)
    np.testing.assert_array_equal(tree_map(lambda a: a + 1, x), [1, 2, 3])
    np.testing.assert_array_equal(tree_map(lambda a, b: a + b, x, x), [0, 2, 4])
    assert tree_map(lambda a: a + 1, None) is None
    assert tree_map(lambda a: a + 1, 5) == 5


def test_trees_of_other_structures_are_refused() -> None:
    one, two = Pair(np.zeros(1), None), Pair((np.zeros(1), np.zeros(1)), None)
    with pytest.raises(ValueError, match="zip"):
        tree_map(lambda x, y: x, two, Pair((np.zeros(1),), None))
    with pytest.raises(AttributeError, match="first"):
        tree_map(lambda x, y: x, one, np.zeros(1))


def test_leaves_are_named_by_their_way_in_the_order_of_the_fields() -> None:
    a, b, c = np.zeros(1), np.ones(2), np.full(3, 2.0)
    tree = Nested(Pair(a, Pair(b, None)), (), None, BufferOwner(None), c)
    found = list(leaves(tree))
    assert [name for name, _ in found] == ["inner.first", "inner.second.first", "last"]
    for (_, got), expected in zip(found, (a, b, c), strict=True):
        assert got is expected
    assert list(leaves(Pair(None, None))) == []
    assert list(leaves(None)) == []
    assert [name for name, _ in leaves(Pair(a, b), "old")] == ["old.first", "old.second"]
    assert [name for name, _ in leaves(Pair((a, None, Pair(b, c)), None))] == [
        "first.0",
        "first.2.first",
        "first.2.second",
    ]
    assert list(leaves(a)) == [("", a)]


# The names under which sketches are saved: others cannot be read.
EXACT = ["exact.keys", "exact.values", "exact.queries.codes", "exact.queries.scales"]
RESIDUAL = ["residual.keys", "residual.values", "residual.cluster", "residual.due"]
CLUSTERS = ["clusters.counts", "clusters.key_variance", "clusters.importance"]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("default", ["clusters.keys", "clusters.values", *CLUSTERS, *EXACT]),
        (
            "int8",
            [
                *(f"clusters.{name}.{part}" for name in ("keys", "values") for part in ("codes", "scales")),
                *CLUSTERS,
                *EXACT,
            ],
        ),
        ("threshold", ["clusters.keys", "clusters.values", *CLUSTERS, "clusters.leaders", *EXACT]),
        ("corrected", ["clusters.keys", "clusters.values", *CLUSTERS, *EXACT, *RESIDUAL]),
        (
            "paper",
            [
                *(f"clusters.{name}" for name in ("centres", "counts", "samples", "due")),
                *(f"reservoir.{name}" for name in ("keys", "values", "due", "weight")),
            ],
        ),
    ],
)
def test_names_of_the_arrays_of_a_state(variant: str, expected: list[str]) -> None:
    q, k, v = stream(0, (2,), 40)
    sketch = make(variant)
    sketch.update(k, v, queries=q)
    assert [name for name, _ in leaves(sketch.state)] == expected


def test_bytes_are_those_of_every_array(library: Library) -> None:
    tree = nested(library)
    assert nbytes(tree) == 5 * 4 * 4
    assert nbytes(tree.last) == 4 * 4
    codes = Quantized(library.array(np.zeros((2, 3, 5), np.int8)), library.array(np.zeros((2, 3), np.float64)))
    assert nbytes(codes) == 2 * 3 * 5 + 2 * 3 * 8
    assert nbytes(Pair(codes, library.array(np.zeros((4, 0), np.int64)))) == nbytes(codes)
    assert nbytes(Pair(library.array(np.zeros(7, np.bool_)), None)) == 7
    assert nbytes(None) == 0


def test_bytes_of_a_sketch_count_free_space() -> None:
    q, k, v = stream(0, (2,), 40)
    sketch = AttentionSketch(9, window=8, sink=2)
    sketch.update(k, v, queries=q)
    assert sketch.nbytes == sum(x.nbytes for _, x in leaves(sketch.state))
    assert sketch.state.exact.keys.shape[1] == 10 > sketch.state.exact.n


def test_an_example_is_the_first_array() -> None:
    x = np.zeros(2)
    assert example(x) is x
    assert example(Pair(Pair(x, np.ones(2)), np.ones(2))) is x
    for nothing in (3, None, Pair(None, x)):
        with pytest.raises(TypeError, match="expected an array or a dataclass of arrays, got"):
            example(nothing)
