// Threefry-2x32-20, one counter per thread. Words travel in 64-bit integers, as in the portable version.

__device__ __forceinline__ unsigned rotate(unsigned x, int by) { return x << by | x >> (32 - by); }

extern "C" __global__ void __launch_bounds__(256)
threefry2x32(const long long* __restrict__ key0, const long long* __restrict__ key1,
             const long long* __restrict__ counter0, const long long* __restrict__ counter1, long long count,
             long long* __restrict__ word0, long long* __restrict__ word1) {
  constexpr int ROTATIONS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const unsigned k0 = (unsigned)key0[i], k1 = (unsigned)key1[i];
  const unsigned keys[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  unsigned x0 = (unsigned)counter0[i] + k0, x1 = (unsigned)counter1[i] + k1;
#pragma unroll
  for (int group = 0; group < 5; group++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x0 += x1;
      x1 = rotate(x1, ROTATIONS[group % 2][j]) ^ x0;
    }
    x0 += keys[(group + 1) % 3];
    x1 += keys[(group + 2) % 3] + group + 1;
  }
  word0[i] = x0;
  word1[i] = x1;
}
