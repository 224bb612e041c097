"""One fixture gives every array library: each contract is tested on all of them."""

from __future__ import annotations

import importlib.util
import os
import tempfile

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# JAX compiles every operation for every shape: compiling fast matters here, running fast does not.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest
from hypothesis import settings
from libraries import LIBRARIES, Library

# Deterministic examples: a red run can be repeated. More of them: HYPOTHESIS_PROFILE=long.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, print_blob=True)
settings.register_profile("long", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes of a run share the kernels that they compile for the emulation."""
    if not hasattr(config, "workerinput"):
        from cuda_emulation import FOLDER

        folder = tempfile.TemporaryDirectory(prefix="cuda_emulation_")
        os.environ[FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> Library:
    """An array library that is installed here."""
    chosen: Library = LIBRARIES[request.param]
    if importlib.util.find_spec(chosen.module.split(".")[0]) is None:
        pytest.skip(f"{chosen.module} is not installed")
    return chosen
