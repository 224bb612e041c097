"""The emulation of CUDA on the CPU: what it gives to kernels, and which mistakes it finds."""

from __future__ import annotations

import os
import subprocess
import sys

import cuda_emulation
import ml_dtypes
import numpy as np
import pytest
from cuda_emulation import EmulatedDevice, EmulationError
from cuda_emulation.examples import REVERSE, Text
from subgen_cupy.launch import Launch, address, i32

pytestmark = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="g++ is not installed")


def run(
    kernel: str, text: Text, threads: int, *arguments: object, shared: int = 0, blocks: int = 1, **options: int
) -> None:
    device = EmulatedDevice(**options)
    # By another name: the arrays must live until the kernel has run, and there may be no other reference.
    given = tuple(address(device, a) if isinstance(a, np.ndarray) else a for a in arguments)
    device.run(Launch(text, kernel, blocks, threads, given, shared))  # type: ignore[arg-type]


WARP = Text("""
extern "C" __global__ void shuffles(int* out) {
  const int t = threadIdx.x;
  int* row = out + t * 10;
  row[0] = __shfl_sync(0xffffffffu, t, 3);
  row[1] = __shfl_sync(0xffffffffu, t, 3, 8);
  row[2] = __shfl_up_sync(0xffffffffu, t, 2, 8);
  row[3] = __shfl_down_sync(0xffffffffu, t, 2, 8);
  row[4] = __shfl_xor_sync(0xffffffffu, t, 5);
  row[5] = __shfl_xor_sync(0xffffffffu, t, 8, 8);
  row[6] = (int)__ballot_sync(0xffffffffu, t % 32 == 1 || t % 32 == 31);
  row[7] = __any_sync(0xffffffffu, t == 40) * 2 + __all_sync(0xffffffffu, t < 32);
  row[8] = -1;
  if (t % 32 < 4) row[8] = __shfl_xor_sync(0xfu, t, 1);
  __syncwarp();
  double wide = t + 0.5;
  row[9] = (int)(2 * __shfl_down_sync(0xffffffffu, wide, 1));
}
""")


def test_shuffles_and_votes() -> None:
    out = np.zeros((64, 10), dtype=np.int32)
    run("shuffles", WARP, 64, out, seed=3)
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    eighth = lane % 8
    expected = [
        warp + 3,
        warp + lane // 8 * 8 + 3,
        np.where(eighth >= 2, t - 2, t),
        np.where(eighth + 2 < 8, t + 2, t),
        t ^ 5,
        np.where(lane & 8, t ^ 8, t),  # from an earlier group of 8, but not from a later one
        np.full(64, (1 << 31 | 2) - (1 << 32)),
        np.where(t < 32, 1, 2),
        np.where(lane < 4, t ^ 1, -1),
        np.where(lane < 31, 2 * t + 3, 2 * t + 1),
    ]
    np.testing.assert_array_equal(out, np.stack(expected, axis=1))


ATOMICS = Text("""
extern "C" __global__ void atomics(int* out, float* sum, unsigned long long* wide) {
  const int t = threadIdx.x;
  atomicAdd(&out[0], 1);
  atomicMin(&out[1], 100 - t);
  atomicMax(&out[2], t);
  if (atomicCAS(&out[3], 0, t + 1) == 0) atomicExch(&out[4], t + 1);
  atomicAdd(sum, 0.5f);
  atomicAdd(wide, 1ull << 40);
  __threadfence();
}
""")


def test_atomics() -> None:
    out, total, wide = np.zeros(5, dtype=np.int32), np.zeros(1, dtype=np.float32), np.zeros(1, dtype=np.uint64)
    out[1] = 1000
    run("atomics", ATOMICS, 96, out, total, wide)
    assert out[:3].tolist() == [96, 5, 95]
    assert out[3] == out[4] > 0
    assert total[0] == 48.0
    assert wide[0] == 96 << 40


HALVES = Text("""
extern "C" __global__ void upcast(const __half* a, const __nv_bfloat16* b, float* x, float* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) { x[i] = __half2float(a[i]); y[i] = __bfloat162float(b[i]); }
}
""")


def test_every_16_bit_number_widens() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    x, y = np.zeros((2, 1 << 16), dtype=np.float32)
    run("upcast", HALVES, 256, bits, bits, x, y, i32(1 << 16))
    np.testing.assert_array_equal(x, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(y, bits.view(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("threads", [1, 31, 64, 100])
def test_shared_memory_with_its_barrier_is_right_in_every_order(threads: int) -> None:
    x, out = np.arange(threads, dtype=np.int32), np.zeros(threads, dtype=np.int32)
    for seed in range(5):
        run("reverse", REVERSE, threads, x, out, i32(threads), shared=4 * threads, seed=seed)
        np.testing.assert_array_equal(out, x[::-1] + 7)


def test_a_missing_barrier_is_found() -> None:
    x, out = np.arange(64, dtype=np.int32), np.zeros(64, dtype=np.int32)
    (line,) = cuda_emulation.barriers(REVERSE)  # type: ignore[arg-type]
    for seed in range(5):
        run("reverse", REVERSE, 64, x, out, i32(64), shared=256, seed=seed, removed=line)
        assert not np.array_equal(out, x[::-1] + 7)


PEERS = Text(
    """
extern "C" __global__ void __cluster_dims__(4) pass_on(int* out) {
  extern __shared__ int mine[];
  __shared__ int fixed[40];
  const int rank = blockIdx.x % 4, t = threadIdx.x;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();  // all are there
  ((int*)__cluster_map_shared_rank(mine, (rank + 1) % 4))[t] = 100 * blockIdx.x + t;
  ((int*)__cluster_map_shared_rank(fixed, (rank + 3) % 4))[t] = -(int)blockIdx.x;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  out[blockIdx.x * 80 + t] = mine[39 - t];
  out[blockIdx.x * 80 + 40 + t] = fixed[t];
}
extern "C" __global__ void __cluster_dims__(4) one_leaves(int* out) {
  if (blockIdx.x == 2) return;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
extern "C" __global__ void __cluster_dims__(4) no_such_peer(int* out) {
  *(int*)__cluster_map_shared_rank(out, 4) = 0;
}
""",
    (("PEERS", 4),),
)


def test_blocks_of_a_cluster_write_into_each_others_shared_memory() -> None:
    block, t = np.divmod(np.arange(8 * 40), 40)
    before, after = (block // 4 * 4 + (block + step) % 4 for step in (3, 1))
    expected = np.stack([100 * before + 39 - t, -after]).reshape(2, 8, 40).swapaxes(0, 1).reshape(8, 80)
    line = cuda_emulation.barriers(PEERS)[-2]  # type: ignore[arg-type]
    for seed in range(5):
        out = np.zeros((8, 80), dtype=np.int32)
        run("pass_on", PEERS, 40, out, shared=160, blocks=8, seed=seed)
        np.testing.assert_array_equal(out, expected)
        run("pass_on", PEERS, 40, out, shared=160, blocks=8, seed=seed, removed=line)
        assert not np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("kernel", "blocks", "message"),
    [("one_leaves", 8, "left out"), ("no_such_peer", 4, "does not have"), ("pass_on", 6, "whole clusters")],
)
def test_undefined_behaviour_of_clusters_is_an_error(kernel: str, blocks: int, message: str) -> None:
    with pytest.raises(EmulationError, match=f"{kernel}: .*{message}"):
        run(kernel, PEERS, 40, np.zeros(640, dtype=np.int32), shared=160, blocks=blocks)


MISTAKES = Text("""
extern "C" __global__ void some_leave_it_out(int* out) { if (threadIdx.x < 7) __syncthreads(); }
extern "C" __global__ void two_places(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
}
extern "C" __global__ void half_a_warp(int* out) { if (threadIdx.x < 7) __syncwarp(); else __syncthreads(); }
extern "C" __global__ void absent_lane(int* out) { if (threadIdx.x < 4) out[0] = __shfl_sync(0xfu, 1, 9); }
extern "C" __global__ void not_in_its_mask(int* out) { out[0] = __shfl_sync(0xfu, 1, 0); }
extern "C" __global__ void unset(float* out) { __shared__ float x[2]; out[threadIdx.x] = x[threadIdx.x]; }
""")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("some_leave_it_out", "some threads left out"),
        ("two_places", "two places at once"),
        ("half_a_warp", "deadlock"),
        ("absent_lane", "takes no part"),
        ("not_in_its_mask", "leaves out"),
    ],
)
def test_undefined_behaviour_is_an_error(kernel: str, message: str) -> None:
    with pytest.raises(EmulationError, match=f"{kernel}: .*{message}"):
        run(kernel, MISTAKES, 64, np.zeros(1, dtype=np.int32))


def test_unset_shared_memory_is_not_a_number() -> None:
    out = np.zeros(2, dtype=np.float32)
    run("unset", MISTAKES, 2, out)
    assert np.isnan(out).all()


def test_arguments_of_the_wrong_size_or_number_are_refused() -> None:
    x = np.zeros(4, dtype=np.int32)
    with pytest.raises(EmulationError, match="wrong size"):
        run("reverse", REVERSE, 4, x, x, np.int64(4), shared=16)
    with pytest.raises(EmulationError, match="wrong number"):
        run("reverse", REVERSE, 4, x, x, shared=16)


def test_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(EmulationError, match="no_such_name"):
        run("broken", Text('extern "C" __global__ void broken() { no_such_name(); }'), 1)


OUT_OF_BOUNDS = """
import numpy as np
from cuda_emulation import EmulatedDevice
from subgen_cupy.launch import Launch, address, i32
from cuda_emulation.examples import PAIRS, REVERSE
print("started", flush=True)
device = EmulatedDevice(sanitize=True)
x, out = np.arange(8, dtype=np.int32), np.zeros(8, dtype=np.int32)
device.run(Launch(PAIRS, "pairs", 1, 2, [address(device, x), address(device, out)]))
device.run(Launch({}, 1, 8, [address(device, x), address(device, out){}], 32))
print("ended")
"""


@pytest.mark.parametrize(
    ("kernel", "arguments", "error", "line"),
    [
        ('REVERSE, "reverse"', ", i32(20)", "heap-buffer-overflow", "kernels.cu:8"),
        ('PAIRS, "odd"', "", "misaligned address", "kernels.cu:6"),
    ],
)
def test_sanitizers_find_what_is_out_of_bounds_or_misaligned(
    kernel: str, arguments: str, error: str, line: str
) -> None:
    asan = cuda_emulation.sanitizer()
    if asan is None:
        pytest.skip("the address sanitizer is not installed")
    environment = {**os.environ, **cuda_emulation.sanitizing(asan)}
    program = OUT_OF_BOUNDS.format(kernel, arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert error in done.stderr
    assert line in done.stderr
    assert done.stdout == "started\n"
