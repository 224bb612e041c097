"""The tests of the kernels notice mistakes: missing barriers, wrong statements, accesses out of bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import cuda_targets
import pytest
from cuda_emulation.mutants import case_name, cases

TESTS = Path(cuda_emulation.__file__).parents[1]

pytestmark = pytest.mark.slow


CASES = ["absorb.cu", "append.cu", "attend.cu", "leaders.cu", "match.cu", "match.cu by 2", "merge.cu"]


def test_every_kernel_is_a_case() -> None:
    assert sorted(case_name(module) for module, _ in cases()) == CASES


@pytest.mark.parametrize("case", CASES)
def test_every_barrier_is_needed_and_every_mistake_noticed(case: str) -> None:
    cuda_targets.emulation()
    program = [sys.executable, "-m", "cuda_emulation.mutants", case]
    path = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [*report] == [case]
    assert report[case]
    assert [what for what, seen in report[case].items() if not seen] == []


def test_no_access_is_out_of_bounds() -> None:
    asan = cuda_emulation.sanitizer()
    if asan is None:
        pytest.skip("the address sanitizer is not installed")
    environment = {**os.environ, **cuda_emulation.sanitizing(asan)}
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulation.sanitized"], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "done\n", done.stderr
