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


# JAX compiles every operation for every shape, which takes ten seconds and more in these tests.
SLOW_ON_JAX = {
    "test_a_step_is_update_and_attend_token_by_token",
    "test_a_token_is_written_and_answered_alike_in_every_library",
    "test_every_library_gives_the_same",
    "test_every_library_goes_on_with_a_long_stream",
    "test_every_library_reads_what_another_wrote",
    "test_exact_attention_while_nothing_is_merged",
    "test_only_new_clusters_are_compared_with_all",
    "test_mutual_pairs_end_at_the_number_asked_whatever_the_ties",
    "test_other_libraries_do_not_depend_on_the_cut_either",
    "test_what_nothing_merged_in_remembers_what_it_did",
    "test_rows_that_were_taken_continue_as_if_they_had_been_fed_so_from_the_start",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what takes long on JAX alone, and begin with the longest test, beside which others run."""
    items.sort(key=lambda item: "test_every_barrier_is_needed" not in item.name)
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("library") == "jax" and getattr(item, "originalname", None) in SLOW_ON_JAX:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes of a run share the kernels that they compile for the emulation."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="cuda_emulation_")
        # The name is `cuda_emulation.FOLDER`; importing that takes time that most runs need not spend.
        os.environ["CUDA_EMULATION"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> Library:
    """An array library that is installed here."""
    chosen: Library = LIBRARIES[request.param]
    if importlib.util.find_spec(chosen.module.split(".")[0]) is None:
        pytest.skip(f"{chosen.module} is not installed")
    return chosen
