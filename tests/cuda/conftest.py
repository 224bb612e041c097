"""Targets of the kernels: the emulation on the CPU, and a GPU where there is one (``-m gpu``)."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_targets
import pytest
from cuda_targets import Target, knowing_bfloat16, using_kernels

_ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("gpu", "gpu_for_torch")]


@pytest.fixture(params=["emulation", _ON_GPU[0]])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A device to launch kernels on, one by one; results are compared with those of the portable functions on NumPy."""
    chosen: Target = getattr(cuda_targets, request.param)()
    with knowing_bfloat16():
        yield chosen


@pytest.fixture(params=["emulation", "emulation_for_torch", *_ON_GPU])
def sketch_target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A target whose arrays the whole library computes on with the kernels."""
    chosen: Target = getattr(cuda_targets, request.param)()
    with using_kernels(chosen):
        yield chosen
