"""Threefry-2x32-20: the known answers of Random123, on every library, and the uniformity of the draws."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from libraries import NUMPY, Library, to_numpy

from subgen import _random
from subgen._random import DRAW_BITS, draws, stream_key, threefry2x32

# Random123's kat_vectors for threefry2x32 with 20 rounds: counter, key, expected.
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(library: Library, counter: tuple, key: tuple, expected: tuple) -> None:
    words = [library.array(np.asarray([word], dtype=np.int64)) for word in (*key, *counter)]
    x0, x1 = threefry2x32(*words)
    assert (int(x0[0]), int(x1[0])) == expected
    assert reference.threefry2x32(key, counter) == expected


def test_native_words_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """uint32 of NumPy against masked int64."""
    rng = np.random.default_rng(0)
    for words in (
        tuple(rng.integers(0, 2**32, size=(4, 3, 500), dtype=np.int64)),
        # Broadcasting, and scalars among the words.
        (np.int64(3), rng.integers(0, 2**32, size=(5, 1)), np.asarray([1, 2], dtype=np.int64), np.asarray(7)),
    ):
        native = threefry2x32(*words)
        with monkeypatch.context() as patch:
            patch.setattr(_random, "_NATIVE_WORDS", ())
            masked = threefry2x32(*words)
        for a, b in zip(masked, native, strict=True):
            assert a.dtype == b.dtype == np.int64
            np.testing.assert_array_equal(a, b)


def test_draws_equal_the_plain_reference(library: Library) -> None:
    seed = 2**40 + 17
    heads, slots = np.arange(3)[:, None], np.arange(4)[None, :]
    key0, key1 = stream_key(seed, 2, library.array(np.arange(3)))
    got = draws((key0[:, None], key1[:, None]), library.array(slots), library.array(np.asarray([[99]])))
    expected = [[reference.draw(seed, 2, int(head), int(slot), 99) for slot in slots[0]] for head in heads[:, 0]]
    np.testing.assert_array_equal(to_numpy(got), expected)


def test_draws_are_uniform_and_differ_between_streams() -> None:
    key = stream_key(5, 1, NUMPY.array(np.arange(2)))
    r = draws((key[0][:, None], key[1][:, None]), np.arange(100_000)[None, :], np.asarray([[1]]))
    u = r / 2**DRAW_BITS
    assert u.min() > 0
    assert u.max() < 1
    # Chi-square over 256 bins has 255 degrees of freedom: beyond 400 with probability below 2e-8.
    for row in u:
        counts = np.histogram(row, bins=256, range=(0, 1))[0]
        assert np.sum((counts - row.size / 256) ** 2) / (row.size / 256) < 400
    # The correlation of independent rows is normal with deviation 1 / sqrt(n): 6 deviations, below 2e-9.
    assert abs(np.corrcoef(u)[0, 1]) < 6 / np.sqrt(u.shape[1])
