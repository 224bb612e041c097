// The closest pairs of clusters merge until a number is left: `subgen.merging`, without asking the host.
//
// `weighted_mean`, `features`: keys and values as points, so that the cost of a pair is a distance of points.
// `map_points`: the metric, applied to the keys of the points.
// `pair_costs`: Ward's cost of each pair from the product of mapped points and points, by tensor cores, and of each
//     cluster the least in every tile of others. CuPy has matrix products too, but refuses them while a graph is recorded.
// `merge_pairs`: writes the merged clusters, those that live first, in their order.
//
// Counts are integers, all else is float32; leaders are copied as they are. Free places have count zero. Points have
// `width` numbers, a multiple of 32, zeros at the end.
//
// Where clusters remember their nearest others, two are compared if one is new, that is, remembers none, or if one
// remembers the other. The cost of a pair that is not compared has its sign set: as an integer it is beyond infinity,
// and it is at hand for a stream in which so few are new that all are compared.

constexpr int TILE = 32;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int SHARE = TILE / WARPS;  // rows of a tile that a warp looks after
constexpr int PAIR_TILE = 64;
constexpr int PAIR_THREADS = 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr int PAIR_UNROLL = 4;
#else
constexpr int PAIR_UNROLL = 1;
#endif
constexpr int STRIDE = TILE + 4;  // of a row in shared memory: reads along rows and along columns share no bank

// The mean of the keys, weighted by counts. A block per TILE coordinates of a stream.
extern "C" __global__ void __launch_bounds__(THREADS)
weighted_mean(const float* __restrict__ keys, const int* __restrict__ counts, int n, int head_dim,
              float* __restrict__ mean) {
  __shared__ float sums[WARPS][TILE];
  __shared__ float totals[WARPS];
  const int tiles = (head_dim + TILE - 1) / TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = blockIdx.x % tiles * TILE + lane;
  const long long stream = blockIdx.x / tiles;
  float sum = 0.0f, total = 0.0f;
  for (int i = warp; i < n; i += WARPS) {
    const float count = (float)counts[stream * n + i];
    total += count;
    if (d < head_dim) sum += count * keys[(stream * n + i) * head_dim + d];
  }
  sums[warp][lane] = sum;
  if (lane == 0) totals[warp] = total;
  __syncthreads();  // sums, totals
  if (warp == 0 && d < head_dim) {
    sum = total = 0.0f;
    for (int w = 0; w < WARPS; w++) {
      sum += sums[w][lane];
      total += totals[w];
    }
    mean[stream * head_dim + d] = total > 0.0f ? sum / total : 0.0f;
  }
}

// Points [key - mean, value / value_scale, zeros]. A warp per cluster. The square of each point, if it is asked for.
extern "C" __global__ void __launch_bounds__(THREADS)
features(const float* __restrict__ keys, const float* __restrict__ values, const float* __restrict__ mean,
         const float* __restrict__ value_scale, long long total, int n, int head_dim, int value_dim, int width,
         float* __restrict__ points, float* __restrict__ norms) {
  const int lane = threadIdx.x % 32;
  const long long cluster = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (cluster >= total) return;
  const long long stream = cluster / n;
  float norm = 0.0f;
  for (int d = lane; d < width; d += 32) {
    float x = 0.0f;
    // Differences are all that matters: without the common offset, float32 keeps the digits.
    if (d < head_dim) x = keys[cluster * head_dim + d] - mean[stream * head_dim + d];
    else if (d < head_dim + value_dim) x = values[cluster * value_dim + d - head_dim] / value_scale[stream];
    points[cluster * width + d] = x;
    norm += x * x;
  }
  norm = warp_sum(norm);
  if (lane == 0 && norms) norms[cluster] = norm;
}

// The keys of the points times the metric, values as they are; and the product of each point with its image. A block
// per TILE clusters of a stream.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
map_points(const float* __restrict__ points, const float* __restrict__ metric, int n, int head_dim, int width,
           float* __restrict__ mapped, float* __restrict__ norms) {
  __shared__ __align__(16) float key_tile[TILE][STRIDE];
  __shared__ float metric_tile[TILE][TILE];
  const int tiles = (n + TILE - 1) / TILE;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * SHARE;
  const long long stream = blockIdx.x / tiles;
  const int first_cluster = blockIdx.x % tiles * TILE;
  points += (stream * n + first_cluster) * width;
  mapped += (stream * n + first_cluster) * width;
  norms += stream * n + first_cluster;
  metric += stream * head_dim * head_dim;
  const int live = min(TILE, n - first_cluster);
  float norm[SHARE] = {};
  for (int first = 0; first < head_dim; first += TILE) {
    float product[SHARE] = {};
    for (int start = 0; start < head_dim; start += TILE) {
      __syncthreads();  // the tiles of the turn before are done with
#pragma unroll
      for (int s = 0; s < SHARE; s++) {
        const int row = first_row + s;
        key_tile[row][lane] = row < live && start + lane < head_dim ? points[row * width + start + lane] : 0.0f;
        metric_tile[row][lane] = start + row < head_dim && first + lane < head_dim
                                     ? metric[(start + row) * head_dim + first + lane]
                                     : 0.0f;
      }
      __syncthreads();  // key_tile, metric_tile
#pragma unroll 4
      for (int d = 0; d < TILE; d += 4) {
        const float m0 = metric_tile[d][lane], m1 = metric_tile[d + 1][lane];
        const float m2 = metric_tile[d + 2][lane], m3 = metric_tile[d + 3][lane];
#pragma unroll
        for (int s = 0; s < SHARE; s++) {
          const float4 key = *reinterpret_cast<const float4*>(&key_tile[first_row + s][d]);
          product[s] += key.x * m0 + key.y * m1 + key.z * m2 + key.w * m3;
        }
      }
    }
#pragma unroll
    for (int s = 0; s < SHARE; s++) {
      const int row = first_row + s, d = first + lane;
      if (row >= live || d >= head_dim) continue;
      mapped[row * width + d] = product[s];
      norm[s] += product[s] * points[row * width + d];
    }
  }
#pragma unroll
  for (int s = 0; s < SHARE; s++) {
    const int row = first_row + s;
    for (int d = head_dim + lane; row < live && d < width; d += 32) {
      const float x = points[row * width + d];
      mapped[row * width + d] = x;
      norm[s] += x * x;
    }
    norm[s] = warp_sum(norm[s]);
    if (lane == 0 && row < live) norms[row] = norm[s];
  }
}

// c += a b for a 16 x 8 and an 8 x 8 matrix over a warp, in TF32: of a number, the first 10 bits behind the point count.
// Lane 4 g + t holds of a the rows g, g + 8 of column t and the same of column t + 4; of b, the rows t and t + 4 of
// column g; of c, the columns 2 t and 2 t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    float of_a[2], of_b[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const unsigned x = __shfl_sync(EVERY_LANE, a[k / 4 * 2 + half], g * 4 + k % 4);
      const unsigned y = __shfl_sync(EVERY_LANE, b[k / 4], (2 * t + half) * 4 + k % 4);
      of_a[half] = __int_as_float((int)(x & 0xffffe000u));
      of_b[half] = __int_as_float((int)(y & 0xffffe000u));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] += of_a[i / 2] * of_b[i % 2];
  }
#endif
}

// A number as a sum of two in TF32: 21 bits of it, with those of the rounding.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = ((unsigned)__float_as_int(x) + 0x1000u) & 0xffffe000u;
  low = (unsigned)__float_as_int(x - __int_as_float((int)high));
}

// A block takes a tile of pairs on or above the diagonal and writes its mirror image too: costs are symmetric to the
// last bit, as mutual neighbours need. Of each cluster and each tile of others the least cost, packed: its bits, then the
// index, so that the least of these integers is the first of the least costs.
extern "C" __global__ void __launch_bounds__(PAIR_THREADS, 4)
pair_costs(const float* __restrict__ mapped, const float* __restrict__ points, const float* __restrict__ norms,
           const int* __restrict__ counts, const float* __restrict__ importance,
           const int* __restrict__ remembered, int n, int width, float* __restrict__ costs,
           unsigned long long* __restrict__ least) {
  __shared__ __align__(16) float shared[2 * PAIR_TILE * STRIDE];
  float* rows = shared;                           // PAIR_TILE x STRIDE
  float* columns = shared + PAIR_TILE * STRIDE;   // PAIR_TILE x STRIDE
  const int tiles = (n + PAIR_TILE - 1) / PAIR_TILE, pairs = tiles * (tiles + 1) / 2;
  const long long stream = blockIdx.x / pairs;
  int tile_row = 0, tile_column = blockIdx.x % pairs;
  while (tile_column >= tiles - tile_row) tile_column -= tiles - tile_row++;
  tile_column += tile_row;
  const int first_row = tile_row * PAIR_TILE, first_column = tile_column * PAIR_TILE;
  mapped += stream * n * width;
  points += stream * n * width;
  norms += stream * n;
  counts += stream * n;
  importance += stream * n;
  if (remembered) remembered += stream * n;
  costs += stream * n * tiles * PAIR_TILE;
  least += stream * n * tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int own_row = warp / 2 * 32, own_column = warp % 2 * 32;  // of the tile, this warp's quarter

  float product[2][4][4] = {};
  for (int start = 0; start < width; start += TILE) {
    __syncthreads();  // the tiles of the turn before are done with
    for (int i = threadIdx.x; i < PAIR_TILE * TILE / 4; i += PAIR_THREADS) {
      const int r = i / (TILE / 4), d = i % (TILE / 4) * 4;
      float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
      if (first_row + r < n)
        a = *reinterpret_cast<const float4*>(mapped + (long long)(first_row + r) * width + start + d);
      if (first_column + r < n)
        b = *reinterpret_cast<const float4*>(points + (long long)(first_column + r) * width + start + d);
      *reinterpret_cast<float4*>(rows + r * STRIDE + d) = a;
      *reinterpret_cast<float4*>(columns + r * STRIDE + d) = b;
    }
    __syncthreads();  // rows, columns
#pragma unroll PAIR_UNROLL
    for (int k = 0; k < TILE; k += 8) {
      unsigned high[2][4], low[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          split(rows[(own_row + m * 16 + i % 2 * 8 + g) * STRIDE + k + i / 2 * 4 + t], high[m][i], low[m][i]);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        unsigned column_high[2], column_low[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
          split(columns[(own_column + c * 8 + g) * STRIDE + k + i * 4 + t], column_high[i], column_low[i]);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          multiply(product[m][c], low[m], column_high);
          multiply(product[m][c], high[m], column_low);
          multiply(product[m][c], high[m], column_high);
        }
      }
    }
  }
  __syncthreads();  // rows and columns are done with: their place is that of the costs
  constexpr int COST_STRIDE = PAIR_TILE + 1;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int c = 0; c < 4; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int r = own_row + m * 16 + e / 2 * 8 + g, s = own_column + c * 8 + 2 * t + e % 2;
        const int i = first_row + r, j = first_column + s;
        float cost = infinity();
        if (i < n && j < n && i != j && counts[i] > 0 && counts[j] > 0) {
          const float squared = norms[i] + norms[j] - 2.0f * product[m][c][e];
          const float sum = importance[i] + importance[j];
          const float factor = importance[i] * importance[j] / (sum > 0.0f ? sum : 1.0f);
          // No cost is infinite but where nothing may merge, whatever the keys.
          cost = (squared > 0.0f ? fminf(squared, 1.8446743e19f) : 0.0f) * factor;
          if (remembered) {
            const int a = remembered[i], b = remembered[j];
            if (a >= 0 && b >= 0 && a != j && b != i) cost = -cost;
          }
        }
        shared[r * COST_STRIDE + s] = cost;
      }
  __syncthreads();  // costs
  const bool diagonal = tile_row == tile_column;
  for (int mirror = 0; mirror < (diagonal ? 1 : 2); mirror++)
    for (int r = warp; r < PAIR_TILE; r += PAIR_THREADS / 32) {
      const int i = (mirror ? first_column : first_row) + r;
      if (i >= n) break;
      unsigned long long first = ~0ull;
#pragma unroll
      for (int s = lane; s < PAIR_TILE; s += 32) {
        const int j = (mirror ? first_row : first_column) + s;
        if (j >= n) continue;
        const bool turned = diagonal ? s < r : mirror;
        const float cost = shared[turned ? s * COST_STRIDE + r : r * COST_STRIDE + s];
        costs[(long long)i * tiles * PAIR_TILE + j] = cost;
        first = min(first, (unsigned long long)(unsigned)__float_as_int(cost) << 32 | (unsigned)j);
      }
      for (int step = 16; step; step /= 2) first = min(first, __shfl_xor_sync(EVERY_LANE, first, step));
      if (lane == 0) least[(long long)i * tiles + (mirror ? tile_row : tile_column)] = first;
    }
}

// A block per place of the result.
extern "C" __global__ void __launch_bounds__(128)
merge_pairs(const float* __restrict__ keys, const float* __restrict__ values, const int* __restrict__ counts,
            const float* __restrict__ spread, const float* __restrict__ importance,
            const unsigned short* __restrict__ leaders, const int* __restrict__ source, const int* __restrict__ other,
            int n, int places, int head_dim, int value_dim, int bands, int leader_halves,
            float* __restrict__ new_keys, float* __restrict__ new_values, int* __restrict__ new_counts,
            float* __restrict__ new_spread, float* __restrict__ new_importance,
            unsigned short* __restrict__ new_leaders) {
  const long long place = blockIdx.x;
  const long long base = place / places * n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, mate = other[place];
  const long long a = base + source[place], b = mate < 0 ? a : base + mate;
  const int added = mate < 0 ? 0 : counts[b], total = counts[a] + added;
  const float share = (float)added / (float)(total > 0 ? total : 1);
  const int band = head_dim / bands;
  for (int c = warp; c < bands; c += warps) {
    float apart = 0.0f;
    for (int d = c * band + lane; d < (c + 1) * band; d += 32) {
      const float key = keys[a * head_dim + d], difference = keys[b * head_dim + d] - key;
      new_keys[place * head_dim + d] = key + difference * share;
      apart += difference * difference;
    }
    apart = warp_sum(apart) / band;
    // The parallel-axis rule.
    const float s = spread[a * bands + c];
    if (lane == 0) new_spread[place * bands + c] = s + share * (spread[b * bands + c] - s + (1.0f - share) * apart);
  }
  for (int d = threadIdx.x; d < value_dim; d += blockDim.x) {
    const float value = values[a * value_dim + d];
    new_values[place * value_dim + d] = value + (values[b * value_dim + d] - value) * share;
  }
  // The leader of the first stays, bit by bit, whatever its dtype.
  for (int d = threadIdx.x; d < leader_halves; d += blockDim.x)
    new_leaders[place * leader_halves + d] = leaders[a * leader_halves + d];
  if (threadIdx.x == 0) {
    new_counts[place] = mate == -2 ? 0 : total;
    new_importance[place] = importance[a] + (mate < 0 ? 0.0f : importance[b]);
  }
}
