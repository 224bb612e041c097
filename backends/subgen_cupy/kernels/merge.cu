// Merge the closest pairs of clusters until a number is left: `subgen.default.merging`, without the host.
//
// `weighted_mean`, `make_points`: keys and values as points, so that the cost of a pair is a distance of points; and
//     the keys of the points times the metric.
// `pair_costs`: Ward's cost of each pair from the product of mapped points and points. CuPy has matrix products too,
//     but refuses them while a graph is recorded.
// `merge_pairs`: writes the merged clusters, live ones first, in their order. The pairs come from match.cu.
//
// Counts are integers of 64 bits, all else is float32; leaders are copied as they are. Free places have count zero.
//
// Products are those of tensor cores, in bfloat16: a number is the sum of a high and a low part, 16 bits in all, and of
// the four products of parts all but that of the low ones are added up, in float32. The parts of CHUNK numbers of a row
// lie together, the high ones first. The key of a point has `key_width` numbers, its value `value_width`: multiples of
// CHUNK, zeros at the end. The metric changes keys alone, so of mapped points only those are stored.
//
// Clusters may have cached nearest neighbours. Then two are compared if one is new, that is, has none cached, or if one
// is the cached neighbour of the other. The cost of a pair that is not compared has its sign bit set, so that as an
// integer it is above infinity. Where so few clusters are new that all pairs are compared, the sign is ignored.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1
#else
#define TENSOR_CORES 0
#endif

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int MEAN_TILE = 32;
constexpr int MEAN_WARPS = 32;
constexpr int CHUNK = 16;
constexpr int SIDE = 128;       // clusters of a tile of pairs, and columns of a step of `make_points`; rows: whole tiles
constexpr int POINTS = 64;      // clusters of a block of `make_points`
// Halves of a row in shared memory: high and low parts, and padding, so that eight rows share no bank.
constexpr int STRIDE = 2 * CHUNK + 8;

typedef unsigned short Half;  // the bits of a bfloat16

// The mean of the keys, weighted by counts. A block per MEAN_TILE coordinates of a stream.
extern "C" __global__ void __launch_bounds__(32 * MEAN_WARPS)
weighted_mean(const float* __restrict__ keys, const long long* __restrict__ counts, int n, int head_dim,
              float* __restrict__ mean) {
  __shared__ float sums[MEAN_WARPS][MEAN_TILE];
  __shared__ float totals[MEAN_WARPS];
  const int tiles = (head_dim + MEAN_TILE - 1) / MEAN_TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = blockIdx.x % tiles * MEAN_TILE + lane;
  const long long stream = blockIdx.x / tiles;
  float sum = 0.0f, total = 0.0f;
#pragma unroll 8
  for (int i = warp; i < n; i += MEAN_WARPS) {
    const float count = (float)counts[stream * n + i];
    total += count;
    if (d < head_dim) sum += count * keys[(stream * n + i) * head_dim + d];
  }
  sums[warp][lane] = sum;
  if (lane == 0) totals[warp] = total;
  __syncthreads();  // sums, totals
  if (warp == 0 && d < head_dim) {
    sum = total = 0.0f;
    for (int w = 0; w < MEAN_WARPS; w++) {
      sum += sums[w][lane];
      total += totals[w];
    }
    mean[stream * head_dim + d] = total > 0.0f ? sum / total : 0.0f;
  }
}

// Two numbers as sums of two in bfloat16: the high parts, then the low ones, the first number in the lower half.
__device__ __forceinline__ void split(float x, float y, unsigned& high, unsigned& low) {
#if TENSOR_CORES
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(y), "f"(x));
  x -= __int_as_float((int)(high << 16));
  y -= __int_as_float((int)(high & 0xffff0000u));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(y), "f"(x));
#else
  bfloat16 part[2], rest[2];
  cast(x, part[0]);
  cast(y, part[1]);
  cast(x - upcast(part[0]), rest[0]);
  cast(y - upcast(part[1]), rest[1]);
  high = part[0].bits | (unsigned)part[1].bits << 16;
  low = rest[0].bits | (unsigned)rest[1].bits << 16;
#endif
}

// Four numbers of a row from one on; zeros beyond its end.
__device__ __forceinline__ void read_four(const float* row, int first, int dim, float (&x)[4]) {
  if (dim % 4 == 0) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first < dim) four = *reinterpret_cast<const float4*>(row + first);
    x[0] = four.x;
    x[1] = four.y;
    x[2] = four.z;
    x[3] = four.w;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) x[e] = first + e < dim ? row[first + e] : 0.0f;
}

// Writes four numbers, split, into the row of a chunk in shared memory, and in global memory if `kept` is not null.
__device__ __forceinline__ void put_four(const float (&x)[4], Half* row, Half* kept) {
  uint2 high, low;
  split(x[0], x[1], high.x, low.x);
  split(x[2], x[3], high.y, low.y);
  if (row) {
    *reinterpret_cast<uint2*>(row) = high;
    *reinterpret_cast<uint2*>(row + CHUNK) = low;
  }
  if (kept) {
    *reinterpret_cast<uint2*>(kept) = high;
    *reinterpret_cast<uint2*>(kept + CHUNK) = low;
  }
}

#if TENSOR_CORES
__device__ __forceinline__ void load_matrices(unsigned (&m)[4], const Half* row) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// c += a b for a 16 x 16 and a 16 x 8 matrix over a warp.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
__device__ __forceinline__ float part(const Half* row, int k) {
  bfloat16 x;
  x.bits = row[k];
  return upcast(x);
}
#endif

// Adds the products of a chunk to 16 M x 64 numbers of a warp: rows and columns of shared memory. Lane 4 g + t holds of
// each 16 x 8 of them the columns 2 t and 2 t + 1 of row g, then of row g + 8.
template <int M>
__device__ __forceinline__ void add_products(const Half* rows, const Half* columns, float (&product)[M][8][4]) {
  const int lane = threadIdx.x % 32;
#if TENSOR_CORES
  unsigned high[M][4], low[M][4];
#pragma unroll
  for (int m = 0; m < M; m++) {
    const Half* row = rows + (m * 16 + lane % 16) * STRIDE + lane / 16 * 8;
    load_matrices(high[m], row);
    load_matrices(low[m], row + CHUNK);
  }
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {
    unsigned column_high[4], column_low[4];
    const Half* column = columns + (pair * 16 + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
    load_matrices(column_high, column);
    load_matrices(column_low, column + CHUNK);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        multiply(product[m][2 * pair + c], low[m], column_high[2 * c], column_high[2 * c + 1]);
        multiply(product[m][2 * pair + c], high[m], column_low[2 * c], column_low[2 * c + 1]);
        multiply(product[m][2 * pair + c], high[m], column_high[2 * c], column_high[2 * c + 1]);
      }
  }
#else
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Half* row = rows + (m * 16 + r * 8 + g) * STRIDE;
#pragma unroll 1
      for (int k = 0; k < CHUNK; k++) {
        const float high = part(row, k), low = part(row, k + CHUNK);
#pragma unroll
        for (int c = 0; c < 16; c++) {
          const Half* column = columns + (c / 2 * 8 + 2 * t + c % 2) * STRIDE;
          const float column_high = part(column, k);
          product[m][c / 2][2 * r + c % 2] += low * column_high + high * part(column, k + CHUNK) + high * column_high;
        }
      }
    }
#endif
}

// Points [key - mean, value / value_scale] in parts, their keys times the metric in parts if there is one, and the
// product of each point with its image. The metric is symmetric: its rows are its columns. A block per POINTS clusters.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
make_points(const float* __restrict__ keys, const float* __restrict__ values, const float* __restrict__ mean,
            const float* __restrict__ value_scale, const float* __restrict__ metric, int n, int head_dim, int value_dim,
            int key_width, int value_width, Half* __restrict__ points, Half* __restrict__ mapped,
            float* __restrict__ norms) {
  __shared__ __align__(16) Half rows[POINTS * STRIDE];
  __shared__ __align__(16) Half columns[SIDE * STRIDE];
  __shared__ float squares[POINTS][4], products[POINTS][2];
  const int blocks = (n + POINTS - 1) / POINTS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const long long stream = blockIdx.x / blocks;
  const int first = blockIdx.x % blocks * POINTS, live = min(POINTS, n - first);
  keys += (stream * n + first) * head_dim;
  values += (stream * n + first) * value_dim;
  mean += stream * head_dim;
  metric += metric ? stream * head_dim * head_dim : 0;
  points += (stream * n + first) * 2 * (key_width + value_width);
  mapped += (stream * n + first) * 2 * key_width;
  norms += stream * n + first;

  // A thread takes four numbers of a row of a chunk; beyond the last cluster, of the last one again.
  const int own = threadIdx.x / 4, four = threadIdx.x % 4 * 4, row = min(own, live - 1);
  Half* kept = points + own * 2 * (key_width + value_width) + four;
  float square = 0.0f;
  const float unit = value_scale[stream];
#pragma unroll 2
  for (int start = 0; start < value_width; start += CHUNK) {
    float x[4];
    read_four(values + row * value_dim, start + four, value_dim, x);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      x[e] /= unit;
      square += x[e] * x[e];
    }
    if (own < live) put_four(x, nullptr, kept + 2 * (key_width + start));
  }
  float product_sum[2] = {};  // of the rows g and g + 8 of this warp
  for (int column = 0; column < key_width; column += SIDE) {
    float product[1][8][4] = {};
    // A chunk is read while the products of the one before are added.
    float key[4], offset[4], of_metric[2][4] = {};
    const auto read_chunk = [&](int start) {
      read_four(keys + row * head_dim, start + four, head_dim, key);
      read_four(mean, start + four, head_dim, offset);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int c = column + half * POINTS + own;
        if (metric && c < head_dim) read_four(metric + (long long)c * head_dim, start + four, head_dim, of_metric[half]);
      }
    };
    read_chunk(0);
    for (int start = 0; start < key_width; start += CHUNK) {
      __syncthreads();  // the chunk before has been read
#pragma unroll
      for (int e = 0; e < 4; e++) {
        key[e] -= offset[e];
        if (!metric) square += key[e] * key[e];
      }
      put_four(key, rows + own * STRIDE + four, column == 0 && own < live ? kept + 2 * start : nullptr);
#pragma unroll
      for (int half = 0; half < 2; half++)
        put_four(of_metric[half], columns + (half * POINTS + own) * STRIDE + four, nullptr);
      __syncthreads();  // rows, columns
      if (start + CHUNK < key_width) read_chunk(start + CHUNK);
      if (metric) add_products<1>(rows + warp / 2 * 16 * STRIDE, columns + warp % 2 * 64 * STRIDE, product);
    }
    if (!metric) break;  // the first step writes all points
#pragma unroll
    for (int c = 0; c < 8; c++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int cluster = warp / 2 * 16 + r * 8 + g, d = column + warp % 2 * 64 + c * 8 + 2 * t;
        if (cluster >= live || d >= key_width) continue;
        const float x = product[0][c][2 * r], y = product[0][c][2 * r + 1];
        unsigned high, low;
        split(x, y, high, low);
        if (d < head_dim) product_sum[r] += x * (keys[cluster * head_dim + d] - mean[d]);
        if (d + 1 < head_dim) product_sum[r] += y * (keys[cluster * head_dim + d + 1] - mean[d + 1]);
        Half* chunk = mapped + cluster * 2 * key_width + d / CHUNK * 2 * CHUNK + d % CHUNK;
        *reinterpret_cast<unsigned*>(chunk) = high;
        *reinterpret_cast<unsigned*>(chunk + CHUNK) = low;
      }
  }
  squares[own][four / 4] = square;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    for (int step = 1; step < 4; step *= 2) product_sum[r] += __shfl_xor_sync(EVERY_LANE, product_sum[r], step);
    if (t == 0) products[warp / 2 * 16 + r * 8 + g][warp % 2] = product_sum[r];
  }
  __syncthreads();  // squares, products
  if (threadIdx.x < live) {
    const float* of_row = squares[threadIdx.x];
    norms[threadIdx.x] =
        of_row[0] + of_row[1] + of_row[2] + of_row[3] + products[threadIdx.x][0] + products[threadIdx.x][1];
  }
}

// 16 bytes into shared memory, without waiting for them.
__device__ __forceinline__ void fetch(Half* to, const Half* from) {
#if TENSOR_CORES
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
}

// Waits for what this thread has fetched.
__device__ __forceinline__ void wait() {
#if TENSOR_CORES
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// a b / (a + b) of numbers up to 2^126; zero of zeros. As by a division that rounds to nearest, but without its slow
// path for numbers so small that their product is zero, or infinite.
__device__ __forceinline__ float share(float a, float b) {
  const float product = a * b, sum = fmaxf(a + b, 7.888609e-31f);
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(sum));
  inverse = fmaf(fmaf(-sum, inverse, 1.0f), inverse, inverse);
  float quotient = product * inverse;
  quotient = fmaf(fmaf(-sum, quotient, product), inverse, quotient);
  return fmaf(fmaf(-sum, quotient, product), inverse, quotient);
#else
  return product / sum;
#endif
}

// A block takes a tile of pairs on or above the diagonal and writes its mirror image too: costs are symmetric to the
// last bit, as mutual neighbours need.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
pair_costs(const Half* __restrict__ mapped, const Half* __restrict__ points, const float* __restrict__ norms,
           const long long* __restrict__ counts, const float* __restrict__ importance,
           const int* __restrict__ cached, int n, int key_width, int value_width, int mapped_width,
           float* __restrict__ costs) {
  constexpr int BATCH = 2 * SIDE * STRIDE;
  __shared__ __align__(16) Half shared[2 * BATCH];  // two batches of rows and columns
  const int squares = (n + SIDE - 1) / SIDE, pairs = squares * (squares + 1) / 2;
  const int line = squares * SIDE;
  const long long stream = blockIdx.x / pairs;
  int tile_row = 0, tile_column = blockIdx.x % pairs;
  while (tile_column >= squares - tile_row) tile_column -= squares - tile_row++;
  tile_column += tile_row;
  const int first_row = tile_row * SIDE, first_column = tile_column * SIDE;
  const int width = key_width + value_width;
  mapped += stream * n * 2 * mapped_width;
  points += stream * n * 2 * width;
  norms += stream * n;
  counts += stream * n;
  importance += stream * n;
  if (cached) cached += stream * n;
  costs += stream * line * line;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int own_row = warp / 2 * 32, own_column = warp % 2 * 64;  // of the tile, this warp's eighth

  // A thread takes 16 bytes of two rows and of two columns of each chunk; beyond the last cluster, that one again.
  const auto fetch_chunk = [&](int start) {
    Half* to = shared + start / CHUNK % 2 * BATCH;
    const int part = threadIdx.x % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = half * 64 + threadIdx.x / 4;
      const long long row = min(first_row + r, n - 1), column = min(first_column + r, n - 1);
      fetch(to + r * STRIDE + part, start < key_width ? mapped + row * 2 * mapped_width + 2 * start + part
                                                      : points + row * 2 * width + 2 * start + part);
      fetch(to + (SIDE + r) * STRIDE + part, points + column * 2 * width + 2 * start + part);
    }
  };
  // Of each row and each column: norm, importance, infinity where a place is free and else zero, cached neighbour.
  __shared__ float4 of_rows[SIDE], of_columns[SIDE];
  {
    const int k = threadIdx.x % SIDE, side = threadIdx.x / SIDE, i = (side ? first_column : first_row) + k;
    const bool lives = i < n && counts[i] > 0;
    const int nearest = lives && cached ? cached[i] : -1;
    (side ? of_columns : of_rows)[k] = make_float4(lives ? norms[i] : 0.0f, lives ? importance[i] : 0.0f,
                                                   lives ? 0.0f : infinity(), __int_as_float(nearest));
  }
  float product[2][8][4] = {};
  fetch_chunk(0);
  for (int start = 0; start < width; start += CHUNK) {
    wait();
    __syncthreads();  // a batch; the batch before has been read
    if (start + CHUNK < width) fetch_chunk(start + CHUNK);
    const Half* batch = shared + start / CHUNK % 2 * BATCH;
    add_products<2>(batch + own_row * STRIDE, batch + (SIDE + own_column) * STRIDE, product);
  }
  const bool diagonal = tile_row == tile_column;
  // A column less its row, of the first pair of this thread; beyond any where there is no diagonal.
  const int apart = diagonal ? own_column + 2 * t - own_row - g : SIDE;
  float4 row[4];
#pragma unroll
  for (int r = 0; r < 4; r++) row[r] = of_rows[own_row + r * 8 + g];
#pragma unroll
  for (int c = 0; c < 16; c++) {
    const int place = own_column + c / 2 * 8 + 2 * t + c % 2;
    const float4 column = of_columns[place];
    const int nearest = __float_as_int(column.w), j = first_column + place;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      float& cost = product[r / 2][c / 2][2 * (r % 2) + c % 2];
      // A cost is infinite only where clusters cannot merge, whatever the keys.
      const float squared = fminf(fmaxf(row[r].x + column.x - 2.0f * cost, 0.0f), 1.8446743e19f);
      cost = squared * share(row[r].y, column.y) + (row[r].z + column.z);
      const int own_nearest = __float_as_int(row[r].w), i = first_row + own_row + r * 8 + g;
      if (own_nearest >= 0 && nearest >= 0 && own_nearest != j && nearest != i) cost = -cost;
      if (apart + (c / 2 - r) * 8 + c % 2 == 0) cost = infinity();
    }
  }
  float* const rows = costs + (long long)(first_row + own_row + g) * line + first_column + own_column + 2 * t;
  float* const columns = costs + (long long)(first_column + own_column + 2 * t) * line + first_row + own_row + g;
#pragma unroll
  for (int c = 0; c < 16; c++)
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float* cost = &product[r / 2][c / 2][2 * (r % 2) + c % 2];
      float* const across = rows + (long long)(r * 8) * line + c / 2 * 8 + c % 2;
      float* const down = columns + (long long)(c / 2 * 8 + c % 2) * line + r * 8;
      if (!diagonal) {
        if (c % 2 == 0) *reinterpret_cast<float2*>(across) = make_float2(cost[0], cost[1]);
        *down = *cost;
      } else if (apart + (c / 2 - r) * 8 + c % 2 >= 0) {
        *across = *cost;
        *down = *cost;
      }
    }
}

template <int N>
__device__ __forceinline__ void merge_parts(const float* value, const float* mate, float share, float* to, int n) {
#pragma unroll 1
  for (int d = N * (threadIdx.x % 32); d < n; d += 32 * N) {
    Part<float, N> x = read_part<N>(value + d);
    const Part<float, N> y = read_part<N>(mate + d);
#pragma unroll
    for (int e = 0; e < N; e++) x.of[e] += (y.of[e] - x.of[e]) * share;
    write_part(to + d, x);
  }
}

// A warp per place of the result.
extern "C" __global__ void __launch_bounds__(THREADS)
merge_pairs(const float* __restrict__ keys, const float* __restrict__ values, const long long* __restrict__ counts,
            const float* __restrict__ variance, const float* __restrict__ importance,
            const unsigned short* __restrict__ leaders, const int* __restrict__ source, const int* __restrict__ other,
            long long total, int n, int capacity, int head_dim, int value_dim, int bands, int leader_halves,
            float* __restrict__ new_keys, float* __restrict__ new_values, long long* __restrict__ new_counts,
            float* __restrict__ new_variance, float* __restrict__ new_importance,
            unsigned short* __restrict__ new_leaders) {
  const int lane = threadIdx.x % 32;
  const long long place = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (place >= total) return;
  const long long base = place / capacity * n;
  const int mate = other[place];
  const long long a = base + source[place], b = mate < 0 ? a : base + mate;
  const long long added = mate < 0 ? 0 : counts[b], all = counts[a] + added;
  const float share = (float)added / (float)(all > 0 ? all : 1);
  const int band = head_dim / bands;
  // The parallel-axis rule.
  const auto merge_variance = [&](int c, float apart) {
    const float s = variance[a * bands + c];
    new_variance[place * bands + c] = s + share * (variance[b * bands + c] - s + (1.0f - share) * (apart / band));
  };
  if (band % 4 == 0 && 128 % band == 0) {
    // Four numbers a lane, and the lanes of a band side by side.
#pragma unroll 1
    for (int start = 0; start < head_dim; start += 128) {
      const int d = start + 4 * lane;
      float apart = 0.0f;
      if (d < head_dim) {
        Part<float, 4> key = read_part<4>(keys + a * head_dim + d);
        const Part<float, 4> mate_key = read_part<4>(keys + b * head_dim + d);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float difference = mate_key.of[e] - key.of[e];
          key.of[e] += difference * share;
          apart += difference * difference;
        }
        write_part(new_keys + place * head_dim + d, key);
      }
      for (int step = 1; step < band / 4; step *= 2) apart += __shfl_xor_sync(EVERY_LANE, apart, step);
      if (d < head_dim && d % band == 0) merge_variance(d / band, apart);
    }
  } else {
    for (int c = 0; c < bands; c++) {
      float apart = 0.0f;
      for (int d = c * band + lane; d < (c + 1) * band; d += 32) {
        const float key = keys[a * head_dim + d], difference = keys[b * head_dim + d] - key;
        new_keys[place * head_dim + d] = key + difference * share;
        apart += difference * difference;
      }
      apart = warp_sum(apart);
      if (lane == 0) merge_variance(c, apart);
    }
  }
  const float *value = values + a * value_dim, *mate_value = values + b * value_dim;
  if (value_dim % 4) merge_parts<1>(value, mate_value, share, new_values + place * value_dim, value_dim);
  else merge_parts<4>(value, mate_value, share, new_values + place * value_dim, value_dim);
  // The leader of the first is copied bit by bit, whatever its dtype.
  for (int d = lane; d < leader_halves; d += 32)
    new_leaders[place * leader_halves + d] = leaders[a * leader_halves + d];
  if (lane == 0) {
    new_counts[place] = mate == -2 ? 0 : all;
    new_importance[place] = importance[a] + (mate < 0 ? 0.0f : importance[b]);
  }
}
