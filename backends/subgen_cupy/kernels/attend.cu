// Weighted attention of a few query rows over clusters and exact tokens, split over the keys.
//
// `attend_split`: a block takes a piece of the keys of one stream and up to ROWS of its query rows, which share every
// load. LANES neighbouring lanes hold one key, 16 bytes each, so a warp reads 32 / LANES keys at once and AHEAD of
// those before it needs the first. Each group of lanes runs its own softmax; groups merge at the end of the piece.
// `attend_join`: merges the pieces of a row by logsumexp.
//
// Logits are in units of log 2, because the hardware has exp2. The scales of int8 means are applied to logits and
// weights.
//
// Set by the launcher: ELEMENT, MEAN, VARIANCE, QUERY and OUTPUT (types), HEAD_DIM, VALUE_DIM, BANDS, ROWS, VECTOR
// (elements per load), LANES, AHEAD, BLOCKS (that fit a multiprocessor: a bound on registers), QUANTIZED (whether means
// are int8).

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int MAX_PIECES = 128;  // 64 of exact tokens, 64 of clusters
constexpr int KEYS = 32 / LANES;
constexpr int KEY_CHUNKS = (HEAD_DIM + VECTOR * LANES - 1) / (VECTOR * LANES);
constexpr int VALUE_CHUNKS = (VALUE_DIM + VECTOR * LANES - 1) / (VECTOR * LANES);
constexpr int BAND = HEAD_DIM / BANDS;
constexpr int OF_CLUSTER = BANDS + 1 + 2 * QUANTIZED;
constexpr int EXTRA = ROWS > OF_CLUSTER ? ROWS : OF_CLUSTER;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };
typedef Word<sizeof(ELEMENT) * VECTOR>::type Packed;

// Upcasts VECTOR elements. Int8 codes fill the front of the space for as many elements.
__device__ __forceinline__ void unpack(const Packed& packed, bool quantized, float (&wide)[VECTOR]) {
  if (QUANTIZED && quantized) {
    if constexpr (VECTOR % 4 == 0) {
      // The last bits of 2^23 + 128 + code: conversions are four times as slow.
      unsigned words[sizeof(packed) / 4];
      memcpy(words, &packed, sizeof(packed));
#pragma unroll
      for (int e = 0; e < VECTOR; e++)
        wide[e] =
            __int_as_float((int)__byte_perm(words[e / 4] ^ 0x80808080u, 0x4b000000u, 0x7440 | e % 4)) - 8388736.0f;
    } else {
      signed char stored[VECTOR];
      memcpy(stored, &packed, sizeof(stored));
#pragma unroll
      for (int e = 0; e < VECTOR; e++) wide[e] = upcast(stored[e]);
    }
    return;
  }
  ELEMENT stored[VECTOR];
  memcpy(stored, &packed, sizeof(packed));
#pragma unroll
  for (int e = 0; e < VECTOR; e++) wide[e] = upcast(stored[e]);
}

// The part of a row that a lane holds: chunks of VECTOR elements, LANES * VECTOR apart. Zero beyond the row's end.
template <int DIM, int CHUNKS, class T>
__device__ __forceinline__ void load(const T* __restrict__ row, int place, Packed (&packed)[CHUNKS]) {
  typedef typename Word<sizeof(T) * VECTOR>::type Loaded;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int start = (c * LANES + place) * VECTOR;
    packed[c] = Packed();
    if (start < DIM) {
      const Loaded loaded = *reinterpret_cast<const Loaded*>(row + start);
      memcpy(&packed[c], &loaded, sizeof(loaded));
    }
  }
}

// exp2(x - peak), where both may be -inf.
__device__ __forceinline__ float weight(float x, float peak) { return x == -infinity() ? 0.0f : exp2f(x - peak); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attend_split(const QUERY* __restrict__ queries, float scale, int rows,
             const ELEMENT* __restrict__ keys, const ELEMENT* __restrict__ values,
             long long keys_per_stream, long long values_per_stream,
             const MEAN* __restrict__ mean_keys, const MEAN* __restrict__ mean_values,
             const ELEMENT* __restrict__ key_scales, const ELEMENT* __restrict__ value_scales,
             const long long* __restrict__ counts, const VARIANCE* __restrict__ variance, int mean_count,
             int mean_pieces,
             const float* __restrict__ weights, long long weights_per_stream, long long weights_per_row,
             int exact_count, const long long* __restrict__ counters, int exact_pieces,
             float* __restrict__ partial, float2* __restrict__ totals) {
  __shared__ __align__(16) float half_energy[ROWS][BANDS];
  __shared__ float warp_sums[WARPS][ROWS][VALUE_DIM];
  __shared__ float warp_peaks[WARPS][ROWS];
  __shared__ float warp_totals[WARPS][ROWS];

  const int tiles = (rows + ROWS - 1) / ROWS, pieces = exact_pieces + mean_pieces;
  const int tile = blockIdx.x % tiles;
  const int piece = blockIdx.x / tiles % pieces;
  const long long stream = blockIdx.x / tiles / pieces;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = lane % LANES, group = lane / LANES;

  const bool merged = piece >= exact_pieces;
  const int count = merged ? mean_count : exact_count;
  const int share = (count + (merged ? mean_pieces : exact_pieces) - 1) / (merged ? mean_pieces : exact_pieces);
  const int begin = share * (merged ? piece - exact_pieces : piece);
  // Where the number of exact tokens is in memory, some pieces may be empty.
  const int end = min(counters && !merged ? (int)counters[0] + 1 : count, begin + share);
  keys += stream * keys_per_stream;
  values += stream * values_per_stream;
  mean_keys += stream * mean_count * HEAD_DIM;
  mean_values += stream * mean_count * VALUE_DIM;
  const bool quantized = QUANTIZED && merged;

  float query[ROWS][KEY_CHUNKS][VECTOR];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int row = tile * ROWS + r;
    const QUERY* source = queries + (stream * rows + row) * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; c++)
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const int i = (c * LANES + place) * VECTOR + e;
        query[r][c][e] = row < rows && i < HEAD_DIM ? upcast(source[i]) * scale * LOG2E : 0.0f;
      }
  }
  if (merged) {
    // 0.5 |q_band|^2, in units of log 2: times the key variance of a cluster, half the variance of its logits.
    for (int r = warp; r < ROWS; r += WARPS) {
      const int row = min(tile * ROWS + r, rows - 1);
      const QUERY* source = queries + (stream * rows + row) * HEAD_DIM;
      for (int b = 0; b < BANDS; b++) {
        float energy = 0.0f;
        for (int i = lane; i < BAND; i += 32) {
          const float q = upcast(source[b * BAND + i]) * scale;
          energy += q * q;
        }
        energy = warp_sum(energy);
        if (lane == 0) half_energy[r][b] = 0.5f * LOG2E * energy;
      }
    }
  }
  __syncthreads();  // half_energy

  float peak[ROWS], total[ROWS], sum[ROWS][VALUE_CHUNKS][VECTOR];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    peak[r] = -infinity();
    total[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
      for (int e = 0; e < VECTOR; e++) sum[r][c][e] = 0.0f;
  }

  for (int first = begin + warp * KEYS * AHEAD; first < end; first += WARPS * KEYS * AHEAD) {
    Packed key[AHEAD][KEY_CHUNKS], value[AHEAD][VALUE_CHUNKS];
    // Beyond the end the last token is read again, with weight zero: all lanes take part in shuffles.
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      const long long near = min(first + a * KEYS + group, end - 1);
      if (merged) load<HEAD_DIM, KEY_CHUNKS>(mean_keys + near * HEAD_DIM, place, key[a]);
      else load<HEAD_DIM, KEY_CHUNKS>(keys + near * HEAD_DIM, place, key[a]);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      const long long near = min(first + a * KEYS + group, end - 1);
      if (merged) load<VALUE_DIM, VALUE_CHUNKS>(mean_values + near * VALUE_DIM, place, value[a]);
      else load<VALUE_DIM, VALUE_CHUNKS>(values + near * VALUE_DIM, place, value[a]);
    }

    // All loads are issued before any result is used.
    // Of a cluster, its count and its key variance; of an exact token, its log-weight for each row.
    float extra[AHEAD][EXTRA];
    if (merged) {
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const long long near = stream * mean_count + min(first + a * KEYS + group, end - 1);
        extra[a][0] = (float)counts[near];
#pragma unroll
        for (int b = 0; b < BANDS; b++) extra[a][1 + b] = upcast_root(variance[near * BANDS + b]);
        if (QUANTIZED) {
          extra[a][OF_CLUSTER - 2] = upcast_scale(key_scales[near]);
          extra[a][OF_CLUSTER - 1] = upcast_scale(value_scales[near]);
        }
      }
    } else {
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const long long near = stream * weights_per_stream + min(first + a * KEYS + group, end - 1);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
          extra[a][r] = weights ? weights[near + min(tile * ROWS + r, rows - 1) * weights_per_row] : 0.0f;
      }
    }

    float logit[AHEAD][ROWS];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) logit[a][r] = 0.0f;
#pragma unroll
      for (int c = 0; c < KEY_CHUNKS; c++) {
        float wide[VECTOR];
        unpack(key[a][c], quantized, wide);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int e = 0; e < VECTOR; e++) logit[a][r] += query[r][c][e] * wide[e];
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int step = LANES / 2; step; step /= 2) logit[a][r] += __shfl_xor_sync(EVERY_LANE, logit[a][r], step);
    }

#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      const bool inside = first + a * KEYS + group < end;
      const float log_count = merged ? log2f(extra[a][0]) : 0.0f;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (merged) {
          float half = 0.0f;
#pragma unroll
          for (int b = 0; b < BANDS; b++) half += half_energy[r][b] * extra[a][1 + b];
          const float w = log_count + (half < log_count ? half : log_count);
          if (QUANTIZED) logit[a][r] *= extra[a][OF_CLUSTER - 2];
          logit[a][r] = inside && extra[a][0] > 0.0f ? logit[a][r] + w : -infinity();
        } else {
          // Where the weight is -inf the logit is not used: its key may be anything.
          const float w = extra[a][r];
          logit[a][r] = inside && w != -infinity() ? logit[a][r] + w * LOG2E : -infinity();
        }
      }
    }

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float next = peak[r];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) next = fmaxf(next, logit[a][r]);
      const float shrink = weight(peak[r], next);
      peak[r] = next;
      total[r] *= shrink;
#pragma unroll
      for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
        for (int e = 0; e < VECTOR; e++) sum[r][c][e] *= shrink;
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        logit[a][r] = weight(logit[a][r], next);
        total[r] += logit[a][r];
        if (quantized) logit[a][r] *= extra[a][OF_CLUSTER - 1];
      }
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
      for (int c = 0; c < VALUE_CHUNKS; c++) {
        float wide[VECTOR];
        unpack(value[a][c], quantized, wide);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int e = 0; e < VECTOR; e++) sum[r][c][e] += logit[a][r] * wide[e];
      }
  }

  // Merge the groups of lanes of a warp, then the warps.
#pragma unroll
  for (int step = LANES; step < 32; step *= 2)
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float other = __shfl_xor_sync(EVERY_LANE, peak[r], step);
      const float next = fmaxf(peak[r], other);
      const float shrink = weight(peak[r], next);
      peak[r] = next;
      total[r] *= shrink;
      total[r] += __shfl_xor_sync(EVERY_LANE, total[r], step);
#pragma unroll
      for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
          sum[r][c][e] *= shrink;
          sum[r][c][e] += __shfl_xor_sync(EVERY_LANE, sum[r][c][e], step);
        }
    }
  if (group == 0)
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (place == 0) {
        warp_peaks[warp][r] = peak[r];
        warp_totals[warp][r] = total[r];
      }
#pragma unroll
      for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
          const int i = (c * LANES + place) * VECTOR + e;
          if (i < VALUE_DIM) warp_sums[warp][r][i] = sum[r][c][e];
        }
    }
  __syncthreads();  // warp_peaks, warp_totals, warp_sums
  for (int i = threadIdx.x; i < ROWS * VALUE_DIM; i += THREADS) {
    const int r = i / VALUE_DIM, column = i % VALUE_DIM, row = tile * ROWS + r;
    if (row >= rows) break;
    float top = warp_peaks[0][r], all = 0.0f, output = 0.0f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, warp_peaks[w][r]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = weight(warp_peaks[w][r], top);
      all += factor * warp_totals[w][r];
      output += factor * warp_sums[w][r][column];
    }
    const long long slot = (stream * rows + row) * pieces + piece;
    partial[slot * VALUE_DIM + column] = output;
    if (column == 0) totals[slot] = make_float2(top, all);
  }
}

// A block per query row. Zero and -inf where every weight is zero.
extern "C" __global__ void __launch_bounds__(THREADS)
attend_join(const float* __restrict__ partial, const float2* __restrict__ totals, int pieces,
            OUTPUT* __restrict__ outputs, float* __restrict__ logsumexp) {
  __shared__ float factors[MAX_PIECES];
  const long long row = blockIdx.x;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    float top = -infinity(), all = 0.0f;
    for (int p = lane; p < pieces; p += 32) top = fmaxf(top, totals[row * pieces + p].x);
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(EVERY_LANE, top, step));
    for (int p = lane; p < pieces; p += 32) {
      factors[p] = weight(totals[row * pieces + p].x, top);
      all += factors[p] * totals[row * pieces + p].y;
    }
    all = warp_sum(all);
    for (int p = lane; p < pieces; p += 32) factors[p] = all > 0.0f ? factors[p] / all : 0.0f;
    if (lane == 0) logsumexp[row] = all > 0.0f ? (log2f(all) + top) * LN2 : -infinity();
  }
  __syncthreads();  // factors
  for (int i = threadIdx.x; i < VALUE_DIM; i += THREADS) {
    float output = 0.0f;
#pragma unroll 8
    for (int p = 0; p < pieces; p++) output += factors[p] * partial[(row * pieces + p) * VALUE_DIM + i];
    saturating_cast(output, outputs[row * VALUE_DIM + i]);
  }
}
