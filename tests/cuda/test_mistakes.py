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

TESTS = Path(cuda_emulation.__file__).parents[1]

pytestmark = pytest.mark.slow


def test_every_barrier_is_needed_and_every_mistake_noticed() -> None:
    cuda_targets.emulation()
    program = [sys.executable, "-m", "cuda_emulation.mutants"]
    path = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    files = ("absorb", "append", "attend", "leaders", "match", "merge")
    assert sorted(report) == sorted([*(f"{file}.cu" for file in files), "match.cu by 2"])
    assert [(file, what) for file, mistakes in report.items() for what, seen in mistakes.items() if not seen] == []


def test_no_access_is_out_of_bounds() -> None:
    asan = cuda_emulation.sanitizer()
    if asan is None:
        pytest.skip("the address sanitizer is not installed")
    environment = {**os.environ, **cuda_emulation.sanitizing(asan)}
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulation.sanitized"], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "done\n", done.stderr
