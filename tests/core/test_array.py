"""The few helpers between the portable code and the array libraries."""

from __future__ import annotations

import numpy as np
import pytest
from libraries import Library, to_numpy

from subgen._array import clip


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (None, 0.5), (0.5, None), (-65504.0, 65504.0)])
def test_clip_keeps_the_dtype_and_what_is_within(
    library: Library, dtype: str, low: float | None, high: float | None
) -> None:
    if (library.name, dtype) == ("strict", "float16"):
        pytest.skip("array-api-strict has no float16")
    x = np.array([[-3.0, -0.0, 0.25], [1.0, 7.0, np.nan]], dtype=dtype)
    given = library.array(x)
    got = clip(given, low, high)
    assert got.dtype == given.dtype
    expected = np.clip(x, -np.inf if low is None else low, np.inf if high is None else high).astype(dtype)
    np.testing.assert_array_equal(to_numpy(got), expected)
    np.testing.assert_array_equal(to_numpy(given), x)
