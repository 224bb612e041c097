"""The CUDA kernels compile for every architecture, without spills and within the registers stated here."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cuda_variants import ARCHITECTURES, REGISTERS, SHARED, VARIANTS
from subgen_cupy.merging import matching_module

slow = pytest.mark.slow


def in_one_unit() -> str:
    """All variants, each in a namespace: one run of the compiler for all of them."""
    parts = []
    for name, (module, _) in VARIANTS.items():
        constants = "".join(f"#undef {constant}\n" for constant, _ in module.constants)
        parts.append(f"{constants}namespace variant_{name} {{\n{module.source()}\n}}\n".replace('extern "C"', ""))
    return "".join(parts)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the report of ptxas on every kernel for every architecture."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    unit = folder / "kernels.cu"
    unit.write_text(in_one_unit())
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [
        nvcc,
        "-std=c++17",
        "-fatbin",
        "-Xptxas",
        "-v",
        "--threads",
        "2",
        *targets,
        "-o",
        str(folder / "out.fatbin"),
    ]
    # Not every kernel of common.cuh is used in every variant.
    done = subprocess.run([*command, "-diag-suppress=177", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)


def entries(report: str) -> Iterator[tuple[str, int, dict[str, int]]]:
    """Yield name, architecture and numbers of each kernel from a report of ptxas, by nvcc or NVRTC."""
    for entry in re.split(r"(?=ptxas info\s+: Compiling entry)", report):
        match = ENTRY.search(entry.split("ptxas info    : Compile time")[0])
        if match is not None:
            numbers = {name: int(match[name] or 0) for name in ("stack", "stores", "loads", "registers", "shared")}
            yield match["name"], int(match["arch"]), numbers


def kernels(report: str) -> dict[tuple[str, str, int], dict[str, int]]:
    """Return the numbers by variant, kernel and architecture."""
    found = {}
    for name, architecture, numbers in entries(report):
        mangled = re.fullmatch(r"_ZN\d+variant_(\w+?)E\w*", name)
        assert mangled is not None, name
        variant, kernel = next((v, k) for v, (_, ks) in VARIANTS.items() for k in ks if mangled[1] == f"{v}{len(k)}{k}")
        found[variant, kernel, architecture] = numbers
    return found


@slow
def test_every_kernel_compiles_for_every_architecture(report: str) -> None:
    expected = {(v, k, a) for v, (_, ks) in VARIANTS.items() for k in ks for a in ARCHITECTURES}
    assert set(kernels(report)) == expected


@slow
def test_no_spills_and_no_local_memory(report: str) -> None:
    wasteful = {
        key: numbers
        for key, numbers in kernels(report).items()
        if numbers["stack"] + numbers["stores"] + numbers["loads"]
    }
    assert wasteful == {}


@slow
def test_registers_and_shared_memory_are_as_stated(report: str) -> None:
    for (variant, kernel, architecture), numbers in kernels(report).items():
        where = (variant, kernel, architecture, numbers)
        assert numbers["registers"] <= VARIANTS[variant][1][kernel], where
        assert numbers["shared"] <= SHARED.get(kernel, 2 << 10), where


def test_blocks_fit_a_multiprocessor() -> None:
    assert VARIANTS["match_many"][1]["match_pairs"] * 1024 <= REGISTERS
    assert VARIANTS["merge"][1]["pair_costs"] * 256 * 2 <= REGISTERS


@cache
def runtime_compiler() -> Any:
    """Return the compiler that CuPy calls, as a library; it needs no driver."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    found = [file for file in files if ".so." in file.name and ".alt." not in file.name]
    # Load first the library that the other one looks up by name.
    libraries = [
        ctypes.CDLL(str(file.locate())) for file in sorted(found, key=lambda file: "builtins" not in file.name)
    ]
    return libraries[-1]


def compiled_at_runtime(source: str, architecture: int) -> str:
    """Compile as CuPy does, and return the log of the compiler."""
    compiler, program, size = runtime_compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [b"--std=c++17", f"-arch=sm_{architecture}".encode(), b"--ptxas-options=-v"]
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    result = compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, log)
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    assert result == 0, log.value.decode()
    return log.value.decode()


@slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiler_of_cupy_takes_every_kernel(variant: str, architecture: int) -> None:
    """It refuses code that nvcc accepts, above all functions that are not marked as device functions."""
    module, most = VARIANTS[variant]
    check_limits(compiled_at_runtime(module.source(), architecture), most)


@slow
def test_clusters_of_blocks_are_compiled() -> None:
    check_limits(compiled_at_runtime(matching_module(8, 4).source(), 90), {"match_pairs": 64})


def check_limits(report: str, most: dict[str, int]) -> None:
    """Check that a report has no local memory, and no more registers than stated."""
    found = {name: numbers for name, _, numbers in entries(report)}
    assert set(most) <= set(found)
    for kernel, numbers in found.items():
        assert numbers["stack"] + numbers["stores"] + numbers["loads"] == 0, (kernel, numbers)
        assert numbers["registers"] <= most.get(kernel, 255), (kernel, numbers)


def test_the_driver_compiler_needs_no_header() -> None:
    for module, _ in VARIANTS.values():
        assert "#include" not in module.source()


def test_the_kernels_are_package_data() -> None:
    import subgen_cupy

    folder = Path(subgen_cupy.__file__).parent / "kernels"
    assert sorted(path.name for path in folder.iterdir()) == [
        "absorb.cu",
        "append.cu",
        "attend.cu",
        "common.cuh",
        "leaders.cu",
        "match.cu",
        "merge.cu",
    ]
