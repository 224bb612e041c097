// Absorb half a window, `subgen.default.absorb`: the kernels before clusters merge (gather) and after (store).
//
// `gather`: upcasts clusters and, behind them, the evicted tokens; adds up the directions of keys.
// `angles`: the dissimilarity of each key, 1 - cos of its angle to the mean direction.
// `weigh`: the importance of the evicted tokens, and the unit of values.
// `query_moment`: the metric of the merging.
// `store`: rounds clusters to what they are stored in, and copies the exact tokens that stay.
//
// Tokens are stored as ELEMENT, and so are key variance and importance; means as MEAN: ELEMENT, or int8 with a scale
// each. A row is a cluster or, behind the clusters, a token of the window. A warp takes a row, and a block BLOCK_ROWS
// of them.

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_ROWS = 32;
constexpr int MOMENT_TILE = 32;
constexpr int MOMENT_DEPTH = 64;  // tokens that the tiles hold at once

// A table in memory has a row for each step of `absorb_blocks`: the factor of importance, the dithers of keys, values,
// key variance and importance, and whether all clusters are compared with all others. `step` points to the number of
// the row.
constexpr int STEP = 6;
enum { WEIGHT, DITHER_KEYS, DITHER_VALUES, DITHER_VARIANCE, DITHER_IMPORTANCE, REFRESH };

__device__ __forceinline__ float or_one(float length) { return length > 0.0f ? length : 1.0f; }

// Upcasts a row times its scale, to `to` unless that is null, by a warp; returns its length.
template <int N, class T>
__device__ __forceinline__ float upcast_parts(const T* from, float scale, float* to, int n) {
  float squared = 0.0f;
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < n; d += 32 * N) {
    const Part<T, N> part = read_part<N>(from + d);
    Part<float, N> x;
#pragma unroll
    for (int e = 0; e < N; e++) {
      x.of[e] = upcast(part.of[e]) * scale;
      squared += x.of[e] * x.of[e];
    }
    if (to) write_part(to + d, x);
  }
  return sqrtf(warp_sum(squared));
}
template <class T>
__device__ __forceinline__ float upcast_row(const T* from, float scale, float* to, int n) {
  return n % 4 ? upcast_parts<1>(from, scale, to, n) : upcast_parts<4>(from, scale, to, n);
}

// Adds the direction of a key, times a count, by a warp.
template <int N, class T>
__device__ __forceinline__ void add_parts(const T* key, float scale, float length, float count, int head_dim,
                                          float* sum) {
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < head_dim; d += 32 * N) {
    const Part<T, N> part = read_part<N>(key + d);
    Part<float, N> x = read_part<N>(sum + d);
#pragma unroll
    for (int e = 0; e < N; e++) x.of[e] += upcast(part.of[e]) * scale / length * count;
    write_part(sum + d, x);
  }
}
template <class T>
__device__ __forceinline__ void add_direction(const T* key, float scale, float length, float count, int head_dim,
                                              float* sum) {
  if (head_dim % 4) add_parts<1>(key, scale, length, count, head_dim, sum);
  else add_parts<4>(key, scale, length, count, head_dim, sum);
}

// `*_key_step` and `*_value_step`: elements from stream to stream. `sums` has shape (streams, chunks, head_dim);
// `lengths` of keys (streams, clusters + window); `norms` of the values of the window (streams, window). The pool has
// `clusters + n_evicted` places.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
gather(const MEAN* __restrict__ cluster_keys, const MEAN* __restrict__ cluster_values,
       const ELEMENT* __restrict__ key_scales, const ELEMENT* __restrict__ value_scales,
       const long long* __restrict__ cluster_counts,
       const ELEMENT* __restrict__ cluster_variance, const ELEMENT* __restrict__ cluster_importance,
       const ELEMENT* __restrict__ cluster_leaders, const int* __restrict__ cluster_nearest,
       const ELEMENT* __restrict__ window_keys, const ELEMENT* __restrict__ window_values,
       long long cluster_key_step, long long cluster_value_step, long long key_step, long long value_step, int clusters,
       int window, int n_evicted, int head_dim, int value_dim, int bands, float* __restrict__ keys,
       float* __restrict__ values, long long* __restrict__ counts, float* __restrict__ variance,
       float* __restrict__ importance, ELEMENT* __restrict__ leaders, int* __restrict__ nearest,
       float* __restrict__ sums, float* __restrict__ lengths, float* __restrict__ norms,
       int refresh, const double* __restrict__ steps, const long long* __restrict__ step,
       long long* __restrict__ next_step) {
  extern __shared__ float directions[];  // WARPS x head_dim
  const bool compare_all = steps ? steps[*step * STEP + REFRESH] != 0.0 : refresh;
  if (steps && blockIdx.x == 0 && threadIdx.x == 0) *next_step = *step + 1;
  const int rows = clusters + window, chunks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, places = clusters + n_evicted;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long stream = blockIdx.x / chunks;
  const int first = blockIdx.x % chunks * BLOCK_ROWS;
  float* sum = directions + warp * head_dim;
  for (int d = lane; d < head_dim; d += 32) sum[d] = 0.0f;
  for (int row = first + warp; row < min(rows, first + BLOCK_ROWS); row += WARPS) {
    const long long place = stream * places + row;
    const bool merges = row < places;
    float* to_key = merges ? keys + place * head_dim : nullptr;
    float* to_value = merges ? values + place * value_dim : nullptr;
    float length;
    if (row < clusters) {
      const long long cluster = stream * clusters + row;
      const MEAN* key = cluster_keys + stream * cluster_key_step + (long long)row * head_dim;
      const long long count = cluster_counts[cluster];
      const float scale = key_scales ? upcast_scale(key_scales[cluster]) : 1.0f;
      length = or_one(upcast_row(key, scale, to_key, head_dim));
      add_direction(key, scale, length, (float)count, head_dim, sum);
      upcast_row(cluster_values + stream * cluster_value_step + (long long)row * value_dim,
                value_scales ? upcast_scale(value_scales[cluster]) : 1.0f, to_value, value_dim);
      for (int d = lane; leaders && d < head_dim; d += 32)
        leaders[place * head_dim + d] = cluster_leaders[cluster * head_dim + d];
      for (int b = lane; b < bands; b += 32)
        variance[place * bands + b] = upcast_root(cluster_variance[cluster * bands + b]);
      if (lane == 0) {
        counts[place] = count;
        importance[place] = upcast_root(cluster_importance[cluster]);
        if (nearest) nearest[place] = compare_all ? -1 : cluster_nearest[cluster];
      }
    } else {
      const int token = row - clusters;
      const ELEMENT* key = window_keys + stream * key_step + (long long)token * head_dim;
      length = or_one(upcast_row(key, 1.0f, to_key, head_dim));
      add_direction(key, 1.0f, length, 1.0f, head_dim, sum);
      const float norm =
          upcast_row(window_values + stream * value_step + (long long)token * value_dim, 1.0f, to_value, value_dim);
      if (lane == 0) norms[stream * window + token] = norm;
      if (merges) {
        for (int d = lane; leaders && d < head_dim; d += 32) leaders[place * head_dim + d] = key[d];
        for (int b = lane; b < bands; b += 32) variance[place * bands + b] = 0.0f;
        if (lane == 0) {
          counts[place] = 1;
          if (nearest) nearest[place] = -1;
        }
      }
    }
    if (lane == 0) lengths[stream * rows + row] = length;
  }
  __syncthreads();  // directions
  for (int d = threadIdx.x; d < head_dim; d += THREADS) {
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += directions[w * head_dim + d];
    sums[(long long)blockIdx.x * head_dim + d] = total;
  }
}

template <int N, class T>
__device__ __forceinline__ float dissimilarity_by_parts(const float* anchor, const T* key, float scale, float length,
                                               int head_dim) {
  float cosine = 0.0f;
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < head_dim; d += 32 * N) {
    const Part<T, N> part = read_part<N>(key + d);
    const Part<float, N> of_anchor = read_part<N>(anchor + d);
#pragma unroll
    for (int e = 0; e < N; e++) cosine += upcast(part.of[e]) * scale / length * of_anchor.of[e];
  }
  return 1.0f - warp_sum(cosine);
}
template <class T>
__device__ __forceinline__ float dissimilarity_of(const float* anchor, const T* key, float scale, float length,
                                                  int head_dim) {
  return head_dim % 4 ? dissimilarity_by_parts<1>(anchor, key, scale, length, head_dim)
                      : dissimilarity_by_parts<4>(anchor, key, scale, length, head_dim);
}

// `dissimilarity` has shape (streams, clusters + window).
extern "C" __global__ void __launch_bounds__(THREADS, 4)
angles(const MEAN* __restrict__ cluster_keys, const ELEMENT* __restrict__ key_scales,
       const ELEMENT* __restrict__ window_keys, const float* __restrict__ sums, const float* __restrict__ lengths,
       long long cluster_key_step, long long key_step, int clusters, int window, int head_dim,
       float* __restrict__ dissimilarity) {
  extern __shared__ float anchor[];  // head_dim
  __shared__ float squares[WARPS];
  const int rows = clusters + window, chunks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long stream = blockIdx.x / chunks;
  const int first = blockIdx.x % chunks * BLOCK_ROWS;
  float squared = 0.0f;
  for (int d = threadIdx.x; d < head_dim; d += THREADS) {
    float total = 0.0f;
#pragma unroll 16
    for (int c = 0; c < chunks; c++) total += sums[(stream * chunks + c) * head_dim + d];
    anchor[d] = total;
    squared += total * total;
  }
  squared = warp_sum(squared);
  if (lane == 0) squares[warp] = squared;
  __syncthreads();  // anchor, squares
  squared = 0.0f;
  for (int w = 0; w < WARPS; w++) squared += squares[w];
  const float length = or_one(sqrtf(squared));
  for (int row = first + warp; row < min(rows, first + BLOCK_ROWS); row += WARPS) {
    const float own = lengths[stream * rows + row] * length;
    float apart;
    if (row < clusters) {
      const float scale = key_scales ? upcast_scale(key_scales[stream * clusters + row]) : 1.0f;
      const MEAN* key = cluster_keys + stream * cluster_key_step + (long long)row * head_dim;
      apart = dissimilarity_of(anchor, key, scale, own, head_dim);
    } else {
      const int token = row - clusters;
      const ELEMENT* key = window_keys + stream * key_step + (long long)token * head_dim;
      apart = dissimilarity_of(anchor, key, 1.0f, own, head_dim);
    }
    if (lane == 0) dissimilarity[stream * rows + row] = apart;
  }
}

// A sum over the block, in every thread. Each call needs an array of its own.
template <int N>
__device__ __forceinline__ float block_sum(float x, float (&sums)[N]) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();  // sums
  x = 0.0f;
  for (int w = 0; w < N; w++) x += sums[w];
  return x;
}

// A block per stream.
extern "C" __global__ void __launch_bounds__(THREADS)
weigh(const float* __restrict__ dissimilarity, const long long* __restrict__ cluster_counts,
      const float* __restrict__ norms, int clusters, int window, int n_evicted, double weight, double value_weight,
      double least_angle, double least_ratio, double most_ratio, float* __restrict__ importance,
      float* __restrict__ value_scale, const double* __restrict__ steps, const long long* __restrict__ step) {
  __shared__ float of_angles[WARPS], of_counts[WARPS], of_norms[WARPS];
  const int rows = clusters + window;
  const long long stream = blockIdx.x;
  dissimilarity += stream * rows;
  if (steps) weight = steps[*step * STEP + WEIGHT];
  float angles = 0.0f, total = 0.0f, lengths = 0.0f;
#pragma unroll 2  // more takes more registers than a thread has for counts of 64 bits
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    const float count = row < clusters ? (float)cluster_counts[stream * clusters + row] : 1.0f;
    angles += dissimilarity[row] * count;
    total += count;
    if (row >= clusters) lengths += norms[stream * window + row - clusters];
  }
  angles = block_sum(angles, of_angles);
  total = block_sum(total, of_counts);
  lengths = block_sum(lengths, of_norms);
  const float mean = angles / total;
  const bool differs = mean > (float)least_angle;
  const float low = (float)least_ratio, high = (float)most_ratio;
  for (int token = threadIdx.x; token < n_evicted; token += THREADS) {
    float ratio = differs ? dissimilarity[clusters + token] / mean : 1.0f;
    ratio = ratio < low ? low : ratio > high ? high : ratio;  // NaN stays NaN
    ratio *= ratio;
    importance[stream * (clusters + n_evicted) + clusters + token] = ratio * ratio * (float)weight;
  }
  if (threadIdx.x == 0) {
    const float scale = lengths / (float)window / (float)sqrt(value_weight);
    value_scale[stream] = scale > 0.0f ? scale : 1.0f;
  }
}

// Four codes of a row from one on; zeros beyond its end.
__device__ __forceinline__ char4 read_codes(const signed char* row, int first, int head_dim) {
  char4 code = {0, 0, 0, 0};
  if (head_dim % 4 == 0) return first < head_dim ? *reinterpret_cast<const char4*>(row + first) : code;
  if (first < head_dim) code.x = row[first];
  if (first + 1 < head_dim) code.y = row[first + 1];
  if (first + 2 < head_dim) code.z = row[first + 2];
  if (first + 3 < head_dim) code.w = row[first + 3];
  return code;
}

__device__ __forceinline__ float4 scaled(char4 code, float scale) {
  return make_float4(code.x * scale, code.y * scale, code.z * scale, code.w * scale);
}

// The second moment of the queries of a window, over their number, with `ridge` times its mean eigenvalue on the
// diagonal. In a stream without queries, the mean square of its keys times `factor` on the diagonal. A scale of zero
// marks a token without a query. Codes and scales have `places` rows, the window from `sink` on. A block per tile of
// the moment; those on the diagonal add up the trace. Four numbers a thread.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
query_moment(const signed char* __restrict__ codes, const float* __restrict__ scales, const ELEMENT* __restrict__ keys,
             long long key_step, int places, int sink, int head_dim, double ridge, double factor,
             float* __restrict__ moment) {
  __shared__ __align__(16) float left[MOMENT_DEPTH][MOMENT_TILE], right[MOMENT_DEPTH][MOMENT_TILE];
  __shared__ float squares[WARPS], of_counts[WARPS], of_keys[WARPS];
  const int tiles = (head_dim + MOMENT_TILE - 1) / MOMENT_TILE, window = places - sink;
  const long long stream = blockIdx.x / (tiles * tiles);
  const int first_row = blockIdx.x / tiles % tiles * MOMENT_TILE, first_column = blockIdx.x % tiles * MOMENT_TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = threadIdx.x / 16 * 2, column = threadIdx.x % 16 * 2;
  codes += (stream * places + sink) * head_dim;
  scales += stream * places + sink;
  float n_queries = 0.0f, trace = 0.0f;
  for (int token = threadIdx.x; token < window; token += THREADS) n_queries += scales[token] > 0.0f ? 1.0f : 0.0f;
  n_queries = block_sum(n_queries, of_counts);
  if (n_queries == 0.0f) {
    const int numbers = window * head_dim;
    keys += stream * key_step;
    for (int i = threadIdx.x; i < numbers; i += THREADS) {
      const float x = upcast(keys[i]);
      trace += x * x;
    }
    trace = block_sum(trace, of_keys) / (float)numbers;
    trace = (float)factor * (trace > 0.0f ? trace : 1.0f);
    for (int i = threadIdx.x; i < MOMENT_TILE * MOMENT_TILE; i += THREADS) {
      const int r = first_row + i / MOMENT_TILE, c = first_column + i % MOMENT_TILE;
      if (r < head_dim && c < head_dim) moment[(stream * head_dim + r) * head_dim + c] = r == c ? trace : 0.0f;
    }
    return;
  }
  if (first_row == first_column) {
#pragma unroll 8
    for (int token = warp; token < window; token += WARPS)
      for (int d = 4 * lane; d < head_dim; d += 128) {
        const float4 x = scaled(read_codes(codes + (long long)token * head_dim, d, head_dim), scales[token]);
        trace += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
      }
  }
  // A thread reads four codes of either side, of two tokens, while the products of those before are added.
  constexpr int OF_TILE = MOMENT_TILE / 4, STEP = THREADS / OF_TILE, TOKENS = MOMENT_DEPTH / STEP;
  const int own = threadIdx.x / OF_TILE, four = threadIdx.x % OF_TILE * 4;
  char4 of_left[TOKENS] = {}, of_right[TOKENS] = {};
  float scale[TOKENS];
  const auto read = [&](int start) {
#pragma unroll
    for (int h = 0; h < TOKENS; h++) {
      const int token = min(start + h * STEP + own, window - 1);
      const signed char* code = codes + (long long)token * head_dim;
      scale[h] = start + h * STEP + own < window ? scales[token] : 0.0f;
      of_left[h] = read_codes(code, first_row + four, head_dim);
      of_right[h] = read_codes(code, first_column + four, head_dim);
    }
  };
  float product[2][2] = {};
  read(0);
  for (int start = 0; start < window; start += MOMENT_DEPTH) {
    __syncthreads();  // the tiles of the step before have been read
#pragma unroll
    for (int h = 0; h < TOKENS; h++) {
      *reinterpret_cast<float4*>(&left[h * STEP + own][four]) = scaled(of_left[h], scale[h]);
      *reinterpret_cast<float4*>(&right[h * STEP + own][four]) = scaled(of_right[h], scale[h]);
    }
    __syncthreads();  // left, right
    if (start + MOMENT_DEPTH < window) read(start + MOMENT_DEPTH);
#pragma unroll 8
    for (int k = 0; k < MOMENT_DEPTH; k++) {
      const float2 a = *reinterpret_cast<const float2*>(&left[k][row]);
      const float2 b = *reinterpret_cast<const float2*>(&right[k][column]);
      product[0][0] += a.x * b.x;
      product[0][1] += a.x * b.y;
      product[1][0] += a.y * b.x;
      product[1][1] += a.y * b.y;
    }
  }
  const float added = (float)ridge * (block_sum(trace, squares) / n_queries / (float)head_dim);
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int r = first_row + row + i, c = first_column + column + j;
      if (r < head_dim && c < head_dim)
        moment[(stream * head_dim + r) * head_dim + c] = product[i][j] / n_queries + (r == c ? added : 0.0f);
    }
}

// Limits of a 16-bit dtype for `subgen.default.quantization.round_to`: the unit of the last place of 1, and the
// exponent of the smallest normal number, as the bits of a float32.
template <class T> struct Limits;
template <> struct Limits<float16> {
  static constexpr float eps = 0.0009765625f;
  static constexpr int smallest = 127 - 14;
};
template <> struct Limits<bfloat16> {
  static constexpr float eps = 0.0078125f;
  static constexpr int smallest = 1;
};

// The dither of an element, see `subgen.default.quantization.Dither`: products and sums round separately, as there.
__device__ __forceinline__ float dither(int element, double golden, double drawn) {
  const double u = __dadd_rn(__dmul_rn((double)element, golden), drawn);
  return (float)(u - floor(u));
}

__device__ __forceinline__ float round_to(float x, float, const float*) { return x; }
template <class T>
__device__ __forceinline__ T round_to(float x, float u, const T*) {
  using L = Limits<T>;
  T nearest, dithered;
  saturating_cast(x, nearest);
  if (upcast(nearest) == x) return nearest;
  // A power of two, times eps: products of it are exact.
  const int exponent = max(__float_as_int(x) >> 23 & 255, L::smallest);
  saturating_cast(x + (u - 0.5f) * (__int_as_float(exponent << 23) * L::eps), dithered);
  return dithered;
}

template <int N, bool ROOTS>
__device__ __forceinline__ void round_parts(const float* from, ELEMENT* to, int n, int first, double golden,
                                            double drawn) {
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < n; d += 32 * N) {
    const Part<float, N> part = read_part<N>(from + d);
    Part<ELEMENT, N> rounded;
#pragma unroll
    for (int e = 0; e < N; e++) {
      const float x = ROOTS ? root_for(part.of[e], (const ELEMENT*)nullptr) : part.of[e];
      rounded.of[e] = round_to(x, dither(first + d + e, golden, drawn), (const ELEMENT*)nullptr);
    }
    write_part(to + d, rounded);
  }
}
template <bool ROOTS = false>
__device__ __forceinline__ void round_row(const float* from, ELEMENT* to, int n, int first, double golden,
                                          double drawn) {
  if (n % 4) round_parts<1, ROOTS>(from, to, n, first, golden, drawn);
  else round_parts<4, ROOTS>(from, to, n, first, golden, drawn);
}

// See `subgen.default.quantization.quantize`.
__device__ __forceinline__ void quantize_row(const float* from, signed char* codes, ELEMENT* scales, int n, int first,
                                             double golden, double drawn) {
  const int lane = threadIdx.x % 32;
  float peak = 0.0f;
  for (int d = lane; d < n; d += 32) peak = fmaxf(peak, fabsf(from[d]));
  for (int step = 16; step; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(EVERY_LANE, peak, step));
  ELEMENT scale;
  cast(peak / (127.0f * scale_unit((const ELEMENT*)nullptr)), scale);
  const float step = upcast_scale(scale);
  for (int d = lane; d < n; d += 32) {
    const float x = from[d], code = x / (step > 0.0f ? step : 1.0f), nearest = rintf(code);
    float rounded = fabsf(code - nearest) < 0.0009765625f ? nearest : floorf(code + dither(first + d, golden, drawn));
    if (fabsf(x) == peak) rounded = copysignf(127.0f, x);
    codes[d] = step > 0.0f ? (signed char)(int)fminf(fmaxf(rounded, -127.0f), 127.0f) : (signed char)0;
  }
  if (lane == 0) *scales = scale;
}

// Copies a row, or writes zeros.
template <int N, class T>
__device__ __forceinline__ void move_parts(const T* from, bool zeros, T* to, int n) {
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < n; d += 32 * N) {
    Part<T, N> part = {};
    if (!zeros) part = read_part<N>(from + d);
    write_part(to + d, part);
  }
}
template <class T>
__device__ __forceinline__ void move_row(const T* from, bool zeros, T* to, int n) {
  if (n % 4) move_parts<1>(from, zeros, to, n);
  else move_parts<4>(from, zeros, to, n);
}

// A warp per cluster or exact token. With `key_codes`, means are written in int8, and not to `mean_keys` and
// `mean_values`. With `block_keys`, tokens of a block are copied to the free places; without, the free places are
// zeroed.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
store(const float* __restrict__ keys, const float* __restrict__ values, const float* __restrict__ variance,
      const float* __restrict__ importance, const ELEMENT* __restrict__ exact_keys,
      const ELEMENT* __restrict__ exact_values, const signed char* __restrict__ codes,
      const float* __restrict__ scales, long long key_step, long long value_step, long long total, int clusters,
      int sink, int exact, int n_evicted, int head_dim, int value_dim, int bands, double golden, double dither_keys,
      double dither_values, double dither_variance, double dither_importance, ELEMENT* __restrict__ mean_keys,
      ELEMENT* __restrict__ mean_values, signed char* __restrict__ key_codes, ELEMENT* __restrict__ key_scales,
      signed char* __restrict__ value_codes, ELEMENT* __restrict__ value_scales, ELEMENT* __restrict__ new_variance,
      ELEMENT* __restrict__ new_importance, ELEMENT* __restrict__ new_keys, ELEMENT* __restrict__ new_values,
      signed char* __restrict__ new_codes, float* __restrict__ new_scales, const long long* __restrict__ counts,
      const int* __restrict__ nearest, long long* __restrict__ new_counts, int* __restrict__ new_nearest,
      const double* __restrict__ steps, const long long* __restrict__ step, const ELEMENT* __restrict__ block_keys,
      const ELEMENT* __restrict__ block_values, const signed char* __restrict__ block_codes,
      const float* __restrict__ block_scales, long long block_key_step, long long block_value_step,
      long long block_tokens) {
  const int lane = threadIdx.x % 32;
  const long long index = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (index >= total) return;
  const long long stream = index / (clusters + exact);
  const int row = index % (clusters + exact);
  long long first = 0;  // token of the block
  if (steps) {
    first = *step * n_evicted;
    const double* now = steps + *step * STEP;
    dither_keys = now[DITHER_KEYS];
    dither_values = now[DITHER_VALUES];
    dither_variance = now[DITHER_VARIANCE];
    dither_importance = now[DITHER_IMPORTANCE];
  }
  if (row < clusters) {
    const long long cluster = stream * clusters + row;
    if (new_counts && lane == 0) new_counts[cluster] = counts[cluster];
    if (new_nearest && lane == 0) new_nearest[cluster] = nearest[cluster];
    const float *key = keys + cluster * head_dim, *value = values + cluster * value_dim;
    if (key_codes) {
      quantize_row(key, key_codes + cluster * head_dim, key_scales + cluster, head_dim, row * head_dim, golden,
                   dither_keys);
      quantize_row(value, value_codes + cluster * value_dim, value_scales + cluster, value_dim, row * value_dim, golden,
                   dither_values);
    } else {
      round_row(key, mean_keys + cluster * head_dim, head_dim, row * head_dim, golden, dither_keys);
      round_row(value, mean_values + cluster * value_dim, value_dim, row * value_dim, golden, dither_values);
    }
    round_row<true>(variance + cluster * bands, new_variance + cluster * bands, bands, row * bands, golden,
                    dither_variance);
    round_row<true>(importance + cluster, new_importance + cluster, 1, row, golden, dither_importance);
    return;
  }
  const int token = row - clusters, from = token < sink ? token : token + n_evicted;
  const bool behind = from >= exact, from_block = behind && block_keys;
  const bool has_query = !behind || (from_block && block_codes);
  const long long to = stream * exact + token, old = stream * exact + from, place = first + from - exact;
  const long long query = stream * block_tokens + place;
  const ELEMENT* key = exact_keys + stream * key_step + (long long)from * head_dim;
  const ELEMENT* value = exact_values + stream * value_step + (long long)from * value_dim;
  if (from_block) {
    key = block_keys + stream * block_key_step + place * head_dim;
    value = block_values + stream * block_value_step + place * value_dim;
  }
  move_row(key, behind && !from_block, new_keys + to * head_dim, head_dim);
  move_row(value, behind && !from_block, new_values + to * value_dim, value_dim);
  move_row(behind ? block_codes + query * head_dim : codes + old * head_dim, !has_query, new_codes + to * head_dim,
           head_dim);
  if (lane == 0) new_scales[to] = !has_query ? 0.0f : behind ? block_scales[query] : scales[old];
}
