// Put before every other file: the types that keys are stored in, and sums over a warp. Includes no header of the CUDA
// toolkit, so the driver's compiler alone is enough.

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

__device__ __forceinline__ double upcast(double x) { return x; }
__device__ __forceinline__ float upcast(float x) { return x; }
__device__ __forceinline__ float upcast(signed char x) { return (float)x; }
__device__ __forceinline__ float upcast(bfloat16 x) { return __int_as_float((int)((unsigned)x.bits << 16)); }
__device__ __forceinline__ float upcast(float16 x) {
#ifdef CUDA_EMULATION
  return emulation::half_to_float(x.bits);
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#endif
}

// Rounds to nearest, ties to even; numbers that are too large become infinite.
__device__ __forceinline__ void cast(float x, float& to) { to = x; }
__device__ __forceinline__ void cast(float x, float16& to) {
#ifdef CUDA_EMULATION
  to.bits = emulation::float_to_half(x);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#endif
}
__device__ __forceinline__ void cast(float x, bfloat16& to) {
  const unsigned bits = (unsigned)__float_as_int(x);
  to.bits = x == x ? (unsigned short)(bits + 0x7fffu + (bits >> 16 & 1u) >> 16) : (unsigned short)0x7fffu;
}

// The same, but with the largest number of the type instead of infinity; NaN stays NaN.
__device__ __forceinline__ float largest(const float16*) { return 65504.0f; }
__device__ __forceinline__ float largest(const bfloat16*) { return 3.3895313892515355e38f; }
__device__ __forceinline__ void saturating_cast(float x, float& to) { to = x; }
template <class T>
__device__ __forceinline__ void saturating_cast(float x, T& to) {
  const float high = largest((const T*)nullptr);
  cast(x < -high ? -high : x > high ? high : x, to);
}

// 16 bits store the roots of numbers that grow as squares, and scales of codes in another unit; see
// `subgen.default.quantization`.
__device__ __forceinline__ float upcast_root(float x) { return x; }
template <class T>
__device__ __forceinline__ float upcast_root(T x) {
  const float root = upcast(x), high = 9.223372036854775808e18f;
  return root > high ? high * high : root * root;
}
__device__ __forceinline__ float root_for(float x, const float*) { return x; }
template <class T>
__device__ __forceinline__ float root_for(float x, const T*) { return sqrtf(x); }
__device__ __forceinline__ float scale_unit(const float*) { return 1.0f; }
template <class T>
__device__ __forceinline__ float scale_unit(const T*) { return 0.015625f; }
template <class T>
__device__ __forceinline__ float upcast_scale(T x) { return upcast(x) * scale_unit((const T*)nullptr); }

constexpr unsigned EVERY_LANE = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(EVERY_LANE, x, step);
  return x;
}

// The smallest number of a warp and the first index that has it, in every lane.
template <class T>
__device__ __forceinline__ void warp_argmin(T& least, int& index) {
  for (int step = 16; step; step /= 2) {
    const T other = __shfl_xor_sync(EVERY_LANE, least, step);
    const int other_index = __shfl_xor_sync(EVERY_LANE, index, step);
    if (other < least || (other == least && other_index < index)) {
      least = other;
      index = other_index;
    }
  }
}

// The least cost of a warp, as bits, and the first index that has it.
__device__ __forceinline__ void warp_first(unsigned& bits, unsigned& index) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned least = __reduce_min_sync(EVERY_LANE, bits);
  index = __reduce_min_sync(EVERY_LANE, bits == least ? index : ~0u);
  bits = least;
#else
  int signed_index = (int)index;
  warp_argmin(bits, signed_index);
  index = (unsigned)signed_index;
#endif
}

// Quantizes a vector to int8 with one scale, to nearest, by a warp; see `subgen.default.quantization.quantize`.
// `read(d)` returns its numbers.
template <class Read>
__device__ __forceinline__ void to_int8(Read read, int dim, signed char* codes, float* scale) {
  const int lane = threadIdx.x % 32;
  float peak = 0.0f;
  for (int d = lane; d < dim; d += 32) peak = fmaxf(peak, fabsf(read(d)));
  for (int step = 16; step; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(EVERY_LANE, peak, step));
  const float unit = peak / 127.0f;
  for (int d = lane; d < dim; d += 32) {
    // The largest element keeps its code, and so the scale of the next rounding.
    const float x = read(d), code = fabsf(x) == peak ? copysignf(127.0f, x) : rintf(x / unit);
    codes[d] = unit > 0.0f ? (signed char)(int)fminf(fmaxf(code, -127.0f), 127.0f) : (signed char)0;
  }
  if (lane == 0) *scale = unit;
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Neighbouring numbers of a row, read and written at once: four where the length of rows is a multiple of four.
template <class T, int N> struct alignas(N * sizeof(T)) Part { T of[N]; };
template <int N, class T>
__device__ __forceinline__ Part<T, N> read_part(const T* from) {
  return *reinterpret_cast<const Part<T, N>*>(from);
}
template <class T, int N>
__device__ __forceinline__ void write_part(T* to, const Part<T, N>& part) {
  *reinterpret_cast<Part<T, N>*>(to) = part;
}
