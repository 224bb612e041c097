// Half a window joins the clusters: what is done before they merge, `subgen.absorbing.collect` and
// `subgen.metric.query_moment`, and after, `subgen.absorbing.settle`.
//
// `gather`: clusters and the tokens that leave, widened, behind each other; sums of the directions of keys.
// `turn_away`: how far each key points away from the mean direction.
// `weigh`: the importance of the tokens that leave, and the unit of values.
// `query_moment`: the metric of the merging.
// `settle`: clusters rounded to what they are stored in, before the exact tokens that stay.
//
// Tokens are stored as ELEMENT, and so are spread and importance; means as MEAN, which is that, or 8 bits and a scale for
// each. A row is a cluster or, behind the clusters, a token of the window. A warp takes a row, and a block BLOCK_ROWS of them.

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_ROWS = 32;
constexpr int MOMENT_TILE = 32;
constexpr int MOMENT_DEPTH = 64;  // tokens that the tiles hold at once
constexpr int KEY_THREADS = 1024;

// What differs between turns of `subgen.blocks`, where it is in memory: of each turn the factor of importance, what was
// drawn for keys, values, spread and importance, and whether all clusters are compared anew. `turn` is which it is.
constexpr int TURN = 6;
enum { WEIGHT, DRAWN_KEYS, DRAWN_VALUES, DRAWN_SPREAD, DRAWN_IMPORTANCE, ANEW };

__device__ __forceinline__ float or_one(float length) { return length > 0.0f ? length : 1.0f; }

// Widens a row, times its scale, into a place, if there is one, by a warp; its length.
template <int N, class T>
__device__ __forceinline__ float widen_parts(const T* from, float scale, float* to, int n) {
  float squared = 0.0f;
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < n; d += 32 * N) {
    const Part<T, N> part = read_part<N>(from + d);
    Part<float, N> x;
#pragma unroll
    for (int e = 0; e < N; e++) {
      x.of[e] = widen(part.of[e]) * scale;
      squared += x.of[e] * x.of[e];
    }
    if (to) write_part(to + d, x);
  }
  return sqrtf(warp_sum(squared));
}
template <class T>
__device__ __forceinline__ float widen_row(const T* from, float scale, float* to, int n) {
  return n % 4 ? widen_parts<1>(from, scale, to, n) : widen_parts<4>(from, scale, to, n);
}

// Adds the direction of a key so many times, by a warp.
template <int N, class T>
__device__ __forceinline__ void add_parts(const T* key, float scale, float length, float count, int head_dim, float* sum) {
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < head_dim; d += 32 * N) {
    const Part<T, N> part = read_part<N>(key + d);
    Part<float, N> x = read_part<N>(sum + d);
#pragma unroll
    for (int e = 0; e < N; e++) x.of[e] += widen(part.of[e]) * scale / length * count;
    write_part(sum + d, x);
  }
}
template <class T>
__device__ __forceinline__ void add_direction(const T* key, float scale, float length, float count, int head_dim,
                                              float* sum) {
  if (head_dim % 4) add_parts<1>(key, scale, length, count, head_dim, sum);
  else add_parts<4>(key, scale, length, count, head_dim, sum);
}

// Steps are those from stream to stream. `sums` are of shape (streams, chunks, head_dim); `lengths` of keys, (streams,
// clusters + window); `norms` of the values of the window. The pool of what may merge has `clusters + leave` places.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
gather(const MEAN* __restrict__ held_keys, const MEAN* __restrict__ held_values,
       const ELEMENT* __restrict__ key_scales, const ELEMENT* __restrict__ value_scales,
       const long long* __restrict__ held_counts,
       const ELEMENT* __restrict__ held_spread, const ELEMENT* __restrict__ held_importance,
       const ELEMENT* __restrict__ held_leaders, const int* __restrict__ held_nearest,
       const ELEMENT* __restrict__ window_keys, const ELEMENT* __restrict__ window_values,
       long long held_key_step, long long held_value_step, long long key_step, long long value_step, int clusters,
       int window, int leave, int head_dim, int value_dim, int bands, float* __restrict__ keys,
       float* __restrict__ values, long long* __restrict__ counts, float* __restrict__ spread,
       float* __restrict__ importance, ELEMENT* __restrict__ leaders, int* __restrict__ nearest,
       float* __restrict__ sums, float* __restrict__ lengths, float* __restrict__ norms,
       const double* __restrict__ turns, const long long* __restrict__ turn, long long* __restrict__ next_turn) {
  extern __shared__ float directions[];  // WARPS x head_dim
  const bool anew = turns && turns[*turn * TURN + ANEW] != 0.0;
  if (turns && blockIdx.x == 0 && threadIdx.x == 0) *next_turn = *turn + 1;
  const int rows = clusters + window, chunks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, places = clusters + leave;
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
      const MEAN* key = held_keys + stream * held_key_step + (long long)row * head_dim;
      const long long count = held_counts[cluster];
      const float scale = key_scales ? widen_scale(key_scales[cluster]) : 1.0f;
      length = or_one(widen_row(key, scale, to_key, head_dim));
      add_direction(key, scale, length, (float)count, head_dim, sum);
      widen_row(held_values + stream * held_value_step + (long long)row * value_dim,
                value_scales ? widen_scale(value_scales[cluster]) : 1.0f, to_value, value_dim);
      for (int d = lane; leaders && d < head_dim; d += 32)
        leaders[place * head_dim + d] = held_leaders[cluster * head_dim + d];
      for (int b = lane; b < bands; b += 32) spread[place * bands + b] = widen_root(held_spread[cluster * bands + b]);
      if (lane == 0) {
        counts[place] = count;
        importance[place] = widen_root(held_importance[cluster]);
        if (nearest) nearest[place] = anew ? -1 : held_nearest[cluster];
      }
    } else {
      const int token = row - clusters;
      const ELEMENT* key = window_keys + stream * key_step + (long long)token * head_dim;
      length = or_one(widen_row(key, 1.0f, to_key, head_dim));
      add_direction(key, 1.0f, length, 1.0f, head_dim, sum);
      const float norm =
          widen_row(window_values + stream * value_step + (long long)token * value_dim, 1.0f, to_value, value_dim);
      if (lane == 0) norms[stream * window + token] = norm;
      if (merges) {
        for (int d = lane; leaders && d < head_dim; d += 32) leaders[place * head_dim + d] = key[d];
        for (int b = lane; b < bands; b += 32) spread[place * bands + b] = 0.0f;
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
__device__ __forceinline__ float away_by_parts(const float* anchor, const T* key, float scale, float length,
                                               int head_dim) {
  float cosine = 0.0f;
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < head_dim; d += 32 * N) {
    const Part<T, N> part = read_part<N>(key + d);
    const Part<float, N> of_anchor = read_part<N>(anchor + d);
#pragma unroll
    for (int e = 0; e < N; e++) cosine += widen(part.of[e]) * scale / length * of_anchor.of[e];
  }
  return 1.0f - warp_sum(cosine);
}
template <class T>
__device__ __forceinline__ float away_from(const float* anchor, const T* key, float scale, float length, int head_dim) {
  return head_dim % 4 ? away_by_parts<1>(anchor, key, scale, length, head_dim)
                      : away_by_parts<4>(anchor, key, scale, length, head_dim);
}

// `away` is of shape (streams, clusters + window).
extern "C" __global__ void __launch_bounds__(THREADS, 4)
turn_away(const MEAN* __restrict__ held_keys, const ELEMENT* __restrict__ key_scales,
          const ELEMENT* __restrict__ window_keys, const float* __restrict__ sums, const float* __restrict__ lengths,
          long long held_key_step, long long key_step, int clusters, int window, int head_dim,
          float* __restrict__ away) {
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
      const float scale = key_scales ? widen_scale(key_scales[stream * clusters + row]) : 1.0f;
      apart = away_from(anchor, held_keys + stream * held_key_step + (long long)row * head_dim, scale, own, head_dim);
    } else {
      const int token = row - clusters;
      apart = away_from(anchor, window_keys + stream * key_step + (long long)token * head_dim, 1.0f, own, head_dim);
    }
    if (lane == 0) away[stream * rows + row] = apart;
  }
}

// A sum over the block, known to every thread; each has memory of its own.
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
weigh(const float* __restrict__ away, const long long* __restrict__ held_counts, const float* __restrict__ norms,
      int clusters, int window, int leave, double weight, double least_angle, double value_weight,
      float* __restrict__ importance, float* __restrict__ value_scale, const double* __restrict__ turns,
      const long long* __restrict__ turn) {
  __shared__ float of_angles[WARPS], of_counts[WARPS], of_norms[WARPS];
  const int rows = clusters + window;
  const long long stream = blockIdx.x;
  away += stream * rows;
  if (turns) weight = turns[*turn * TURN + WEIGHT];
  float angles = 0.0f, total = 0.0f, lengths = 0.0f;
#pragma unroll 2
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    const float count = row < clusters ? (float)held_counts[stream * clusters + row] : 1.0f;
    angles += away[row] * count;
    total += count;
    if (row >= clusters) lengths += norms[stream * window + row - clusters];
  }
  angles = block_sum(angles, of_angles);
  total = block_sum(total, of_counts);
  lengths = block_sum(lengths, of_norms);
  const float mean = angles / total;
  const bool told = mean > (float)least_angle;
  for (int token = threadIdx.x; token < leave; token += THREADS) {
    float ratio = told ? away[clusters + token] / mean : 1.0f;
    ratio = ratio < 0.3f ? 0.3f : ratio > 5.0f ? 5.0f : ratio;  // NaN stays
    ratio *= ratio;
    importance[stream * (clusters + leave) + clusters + token] = ratio * ratio * (float)weight;
  }
  if (threadIdx.x == 0) {
    const float scale = lengths / (float)window / (float)value_weight;
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

// The second moment of `window` rows of codes and scales over their number, with `ridge` times its mean eigenvalue on
// the diagonal. A block per tile of the moment; those on the diagonal add up the trace. Four numbers a thread.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
query_moment(const signed char* __restrict__ codes, const float* __restrict__ scales, int places, int window,
             int head_dim, double ridge, float* __restrict__ moment) {
  __shared__ __align__(16) float left[MOMENT_DEPTH][MOMENT_TILE], right[MOMENT_DEPTH][MOMENT_TILE];
  __shared__ float squares[WARPS];
  const int tiles = (head_dim + MOMENT_TILE - 1) / MOMENT_TILE;
  const long long stream = blockIdx.x / (tiles * tiles);
  const int first_row = blockIdx.x / tiles % tiles * MOMENT_TILE, first_column = blockIdx.x % tiles * MOMENT_TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = threadIdx.x / 16 * 2, column = threadIdx.x % 16 * 2;
  codes += stream * places * head_dim;
  scales += stream * places;
  float trace = 0.0f;
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
    __syncthreads();  // the tiles of the turn before are done with
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
  trace = block_sum(trace, squares) / (float)window / (float)head_dim;
  const float added = (float)ridge * (trace > 0.0f ? trace : 1.0f);
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int r = first_row + row + i, c = first_column + column + j;
      if (r < head_dim && c < head_dim)
        moment[(stream * head_dim + r) * head_dim + c] = product[i][j] / (float)window + (r == c ? added : 0.0f);
    }
}

// The mean square of the keys of a window times `factor`, on the diagonal. A block per stream.
extern "C" __global__ void __launch_bounds__(KEY_THREADS)
key_moment(const ELEMENT* __restrict__ keys, long long key_step, int window, int head_dim, double factor,
           float* __restrict__ moment) {
  __shared__ float squares[KEY_THREADS / 32];
  const long long stream = blockIdx.x;
  const int numbers = window * head_dim;
  keys += stream * key_step;
  float squared = 0.0f;
#pragma unroll 8
  for (int i = threadIdx.x; i < numbers; i += KEY_THREADS) {
    const float x = widen(keys[i]);
    squared += x * x;
  }
  squared = block_sum(squared, squares) / (float)numbers;
  squared = (float)factor * (squared > 0.0f ? squared : 1.0f);
  for (int i = threadIdx.x; i < head_dim * head_dim; i += KEY_THREADS)
    moment[stream * head_dim * head_dim + i] = i % (head_dim + 1) ? 0.0f : squared;
}

// What `subgen.rounding.round_to` asks of a dtype of 16 bits: the unit of the last place of 1, and the exponent of the
// smallest normal number, as float32 writes it.
template <class T> struct Limits;
template <> struct Limits<float16> {
  static constexpr float eps = 0.0009765625f;
  static constexpr int smallest = 127 - 14;
};
template <> struct Limits<bfloat16> {
  static constexpr float eps = 0.0078125f;
  static constexpr int smallest = 1;
};

// The dither of an element, `subgen.rounding.Dither`: products and sums round separately, as they do there.
__device__ __forceinline__ float dither(int element, double golden, double drawn) {
  const double u = __dadd_rn(__dmul_rn((double)element, golden), drawn);
  return (float)(u - floor(u));
}

__device__ __forceinline__ float round_to(float x, float, const float*) { return x; }
template <class T>
__device__ __forceinline__ T round_to(float x, float u, const T*) {
  using L = Limits<T>;
  T nearest, dithered;
  narrow_within(x, nearest);
  if (widen(nearest) == x) return nearest;
  // A power of two, times eps: products of it are exact.
  const int exponent = max(__float_as_int(x) >> 23 & 255, L::smallest);
  narrow_within(x + (u - 0.5f) * (__int_as_float(exponent << 23) * L::eps), dithered);
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
__device__ __forceinline__ void round_row(const float* from, ELEMENT* to, int n, int first, double golden, double drawn) {
  if (n % 4) round_parts<1, ROOTS>(from, to, n, first, golden, drawn);
  else round_parts<4, ROOTS>(from, to, n, first, golden, drawn);
}

// See `subgen.rounding.quantize`.
__device__ __forceinline__ void quantize_row(const float* from, signed char* codes, ELEMENT* scales, int n, int first,
                                             double golden, double drawn) {
  const int lane = threadIdx.x % 32;
  float peak = 0.0f;
  for (int d = lane; d < n; d += 32) peak = fmaxf(peak, fabsf(from[d]));
  for (int step = 16; step; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(EVERY_LANE, peak, step));
  ELEMENT scale;
  narrow(peak / (127.0f * scale_unit((const ELEMENT*)nullptr)), scale);
  const float step = widen_scale(scale);
  for (int d = lane; d < n; d += 32) {
    const float x = from[d], code = x / (step > 0.0f ? step : 1.0f), nearest = rintf(code);
    float rounded = fabsf(code - nearest) < 0.0009765625f ? nearest : floorf(code + dither(first + d, golden, drawn));
    if (fabsf(x) == peak) rounded = copysignf(127.0f, x);
    codes[d] = step > 0.0f ? (signed char)(int)fminf(fmaxf(rounded, -127.0f), 127.0f) : (signed char)0;
  }
  if (lane == 0) *scales = scale;
}

// Of the places of a queue, those that leave are gone, the others move up, and room comes behind: zeros, or the tokens
// of a turn.
template <int N, class T>
__device__ __forceinline__ void move_parts(const T* from, bool room, T* to, int n) {
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < n; d += 32 * N) {
    Part<T, N> part = {};
    if (!room) part = read_part<N>(from + d);
    write_part(to + d, part);
  }
}
template <class T>
__device__ __forceinline__ void move_row(const T* from, bool room, T* to, int n) {
  if (n % 4) move_parts<1>(from, room, to, n);
  else move_parts<4>(from, room, to, n);
}

// Clusters go before the exact tokens, or where there are codes for them, there. A warp per cluster or exact token.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
settle(const float* __restrict__ keys, const float* __restrict__ values, const float* __restrict__ spread,
       const float* __restrict__ importance, const ELEMENT* __restrict__ exact_keys,
       const ELEMENT* __restrict__ exact_values, const signed char* __restrict__ codes,
       const float* __restrict__ scales, long long key_step, long long value_step, long long total, int clusters,
       int sink, int window, int leave, int head_dim, int value_dim, int bands, double golden, double drawn_keys,
       double drawn_values, double drawn_spread, double drawn_importance, ELEMENT* __restrict__ new_keys,
       ELEMENT* __restrict__ new_values, ELEMENT* __restrict__ new_spread, ELEMENT* __restrict__ new_importance,
       signed char* __restrict__ key_codes, ELEMENT* __restrict__ key_scales, signed char* __restrict__ value_codes,
       ELEMENT* __restrict__ value_scales, signed char* __restrict__ new_codes, float* __restrict__ new_scales,
       const long long* __restrict__ counts, const int* __restrict__ nearest, long long* __restrict__ new_counts,
       int* __restrict__ new_nearest, const double* __restrict__ turns, const long long* __restrict__ turn,
       const ELEMENT* __restrict__ coming_keys, const ELEMENT* __restrict__ coming_values,
       const signed char* __restrict__ coming_codes, const float* __restrict__ coming_scales, long long coming_key_step,
       long long coming_value_step, long long coming) {
  const int lane = threadIdx.x % 32, exact = sink + window;
  const long long index = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (index >= total) return;
  const long long stream = index / (clusters + exact);
  const int row = index % (clusters + exact), before = key_codes ? 0 : clusters;
  long long first = 0;  // of the tokens of this turn
  if (turns) {
    first = *turn * leave;
    const double* now = turns + *turn * TURN;
    drawn_keys = now[DRAWN_KEYS];
    drawn_values = now[DRAWN_VALUES];
    drawn_spread = now[DRAWN_SPREAD];
    drawn_importance = now[DRAWN_IMPORTANCE];
  }
  if (row < clusters) {
    const long long cluster = stream * clusters + row;
    if (new_counts && lane == 0) new_counts[cluster] = counts[cluster];
    if (new_nearest && lane == 0) new_nearest[cluster] = nearest[cluster];
    const float *key = keys + cluster * head_dim, *value = values + cluster * value_dim;
    if (key_codes) {
      quantize_row(key, key_codes + cluster * head_dim, key_scales + cluster, head_dim, row * head_dim, golden,
                   drawn_keys);
      quantize_row(value, value_codes + cluster * value_dim, value_scales + cluster, value_dim, row * value_dim, golden,
                   drawn_values);
    } else {
      round_row(key, new_keys + index * head_dim, head_dim, row * head_dim, golden, drawn_keys);
      round_row(value, new_values + index * value_dim, value_dim, row * value_dim, golden, drawn_values);
    }
    round_row<true>(spread + cluster * bands, new_spread + cluster * bands, bands, row * bands, golden, drawn_spread);
    round_row<true>(importance + cluster, new_importance + cluster, 1, row, golden, drawn_importance);
    return;
  }
  const int token = row - clusters, from = token < sink ? token : token + leave;
  const bool behind = from >= exact, room = behind && !coming_keys;
  const long long to = stream * (before + exact) + before + token, token_coming = first + from - exact;
  const ELEMENT* key = exact_keys + stream * key_step + (long long)from * head_dim;
  const ELEMENT* value = exact_values + stream * value_step + (long long)from * value_dim;
  if (behind && coming_keys) {
    key = coming_keys + stream * coming_key_step + token_coming * head_dim;
    value = coming_values + stream * coming_value_step + token_coming * value_dim;
  }
  move_row(key, room, new_keys + to * head_dim, head_dim);
  move_row(value, room, new_values + to * value_dim, value_dim);
  if (token < sink) return;
  const bool unasked = behind && !coming_codes;
  const long long old = stream * window + from - sink, query = stream * window + token - sink;
  const long long query_coming = stream * coming + token_coming;
  const bool comes = behind && coming_codes;
  move_row(comes ? coming_codes + query_coming * head_dim : codes + old * head_dim, unasked,
           new_codes + query * head_dim, head_dim);
  if (lane == 0) new_scales[query] = unasked ? 0.0f : comes ? coming_scales[query_coming] : scales[old];
}
