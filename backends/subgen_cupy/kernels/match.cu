// Rounds of mutual nearest neighbours: which clusters merge. Costs: merge.cu.
//
// Clusters stand in an order, by importance. A *proposer* is the lighter cluster of a pair, which comes first in the
// order. A *proposal* is the neighbour that a proposer names as its nearest, among the open clusters behind it. A
// *blocker* of a cluster is an open cluster before it that is nearer than all open ones behind it, so that it cannot be
// in a pair as proposer while that one is open.
//
// A proposal can have blockers too: open clusters that are nearer to the proposed cluster than the proposer is. Without
// any, proposer and proposed cluster are mutual nearest neighbours, and a pair.
//
// In many data few clusters, light ones, are nearest to nearly all others. Whenever one of them merges, hundreds lose
// their nearest neighbour, but few of these can be proposers. Costs do not change, so a blocker holds while it is open.
// Each lane of a warp that reads a row of costs finds a blocker or none. The most distant BLOCKERS of these are kept,
// which merge last. A row is read again only when its blockers have all merged, or the cluster that it proposed to.
//
// A block of threads matches a stream; from compute capability 9.0 on PEERS blocks do, which write into each other's
// shared memory. Each searches the rows of a share of the clusters, and all take the same decisions.
//
// Set by the launcher: PEERS, BLOCKERS (kept of each cluster).

constexpr int CHUNK = 128;    // columns that a warp reads at once, four a lane: rows are whole chunks
constexpr int AT_ONCE = 3;    // chunks in flight
constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
// The bits of an infinite cost. Those of a pair that is not compared are above.
constexpr unsigned NO_NEIGHBOUR = 0x7f800000u;
// In `order`, instead of a position: the first and the second cluster of a pair, and a free place.
constexpr int FIRST = -1, SECOND = -2, FREE = -3;
// In `proposals`: the index of the proposed cluster, with PENDING if the proposal has blockers; without it they are a
// pair, with ROUND if it was found in an odd round. Or BLOCKED: the cluster has blockers. Or NO_PROPOSAL: no cluster is
// left.
constexpr int INDEX = 0x1fff, ROUND = 0x4000, PENDING = 0x8000, BLOCKED = 0xffff, NO_PROPOSAL = 0xfffe;
constexpr unsigned short NONE = 0xffff;

typedef unsigned short Place;

#if PEERS > 1
#define BLOCK_CLUSTER __cluster_dims__(PEERS)
#define ALL_PEERS(barrier) \
  __cluster_barrier_arrive(); \
  __cluster_barrier_wait()
#else
#define BLOCK_CLUSTER
#define ALL_PEERS(barrier) barrier
#endif

// Writes a word into the shared memory of a peer.
__device__ __forceinline__ void write_to_peer(Place* place, int peer, int word) {
#if PEERS > 1
  place = (Place*)__cluster_map_shared_rank(place, peer);
#endif
  *place = (Place)word;
}

// Passes AT_ONCE chunks of a row to a function: the bits of each cost, the cluster's position and index; per lane in
// order.
template <class Take>
__device__ __forceinline__ void read_costs(const float* row, const int* order, int start, int line, unsigned mask,
                                           Take take) {
  const int own = threadIdx.x % 32 * 4;
  row += own;
  order += own;
  float4 costs[AT_ONCE];
#pragma unroll
  for (int q = 0; q < AT_ONCE; q++)
    if (start + q * CHUNK < line) costs[q] = *reinterpret_cast<const float4*>(row + start + q * CHUNK);
#pragma unroll
  for (int q = 0; q < AT_ONCE; q++) {
    const int chunk = start + q * CHUNK, column = chunk + own;
    if (chunk >= line) break;
    const int4 position = *reinterpret_cast<const int4*>(order + chunk);
    take((unsigned)__float_as_int(costs[q].x) & mask, position.x, column);
    take((unsigned)__float_as_int(costs[q].y) & mask, position.y, column + 1);
    take((unsigned)__float_as_int(costs[q].z) & mask, position.z, column + 2);
    take((unsigned)__float_as_int(costs[q].w) & mask, position.w, column + 3);
  }
}

// Finds the nearest open cluster behind a position in the order, by a warp; of equal ones the first. And for each lane
// the nearest open cluster before the position, of those that the lane reads.
__device__ __forceinline__ void find_nearest(const float* row, const int* order, int own, int line, unsigned mask,
                                             unsigned& bits, unsigned& index, unsigned& nearer, unsigned& blocker) {
  bits = nearer = NO_NEIGHBOUR;
  index = blocker = 0;
#pragma unroll 1
  for (int start = 0; start < line; start += AT_ONCE * CHUNK)
    read_costs(row, order, start, line, mask, [&](unsigned cost, int position, int column) {
      if (position > own && cost < bits) {
        bits = cost;
        index = (unsigned)column;
      }
      if ((unsigned)position < (unsigned)own && cost < nearer) {
        nearer = cost;
        blocker = (unsigned)column;
      }
    });
  warp_first(bits, index);
}

// Finds for each lane an open cluster that is nearer in a row than a cost and an index, the most distant that the lane
// reads, or NO_NEIGHBOUR. Starts at the end of the row, where new clusters are, which are light; stops when there are
// enough.
__device__ __forceinline__ void find_blockers(const float* row, const int* order, unsigned bits, int index, int line,
                                              unsigned mask, unsigned& nearer, unsigned& blocker) {
  nearer = NO_NEIGHBOUR;
  blocker = 0;
  unsigned have = 0;
#pragma unroll 1
  for (int start = (line - 1) / (AT_ONCE * CHUNK) * AT_ONCE * CHUNK; start >= 0 && __popc(have) < BLOCKERS;
       start -= AT_ONCE * CHUNK) {
    read_costs(row, order, start, line, mask, [&](unsigned cost, int position, int column) {
      if (position >= 0 && cost < bits + (column < index) && (nearer == NO_NEIGHBOUR || cost >= nearer)) {
        nearer = cost;
        blocker = (unsigned)column;
      }
    });
    have = __ballot_sync(EVERY_LANE, nearer != NO_NEIGHBOUR);
  }
}

// Keeps the most distant of the blockers that the lanes have found, by a warp; returns whether there are any.
__device__ __forceinline__ bool keep_blockers(unsigned nearer, unsigned blocker, Place* blockers) {
  const unsigned lane = threadIdx.x % 32;
  unsigned left = NO_NEIGHBOUR - 1 - nearer;  // less for a larger cost; ~0u: none
  Place mine = NONE;
  bool any = false;
#pragma unroll
  for (unsigned q = 0; q < BLOCKERS; q++) {
    unsigned first = left, which = blocker;
    warp_first(first, which);
    if (first == ~0u) break;
    any = true;
    if (lane == q) mine = (Place)which;
    if (blocker == which) left = ~0u;
  }
  if (any && lane < BLOCKERS) blockers[lane] = mine;
  return any;
}

// Whether a cluster may have become a proposer of a pair, so that its row must be read again.
__device__ __forceinline__ bool must_search(int i, const int* order, const Place* proposals, const Place* blockers) {
  const int proposal = proposals[i];
  if (proposal == NO_PROPOSAL) return false;
  if (proposal != BLOCKED && order[proposal & INDEX] < 0) return true;
#pragma unroll
  for (int q = 0; q < BLOCKERS; q++) {
    const Place blocker = blockers[i * BLOCKERS + q];
    if (blocker != NONE && order[blocker] >= 0) return false;
  }
  return true;
}

// Chooses pairs until `max_clusters` are left or there are no more pairs, and writes where every cluster goes. Place p
// of the result comes from source[p], merged with other[p]: -1 for an unpaired cluster, -2 for a free place.
// `assignment` is updated: the place of each of the `given` clusters of before the first pass. Costs are not read where
// nothing merges.
//
// With `cached`, `new_nearest` of an unpaired cluster is its nearest unpaired neighbour, or its cached one where
// nothing merges. With a surplus of s clusters, a stream of fewer than 2 s - 1 new ones compares all clusters. A
// matching can then halve the clusters whatever is cached, so the number of passes follows from the shapes.
extern "C" __global__ void BLOCK_CLUSTER __launch_bounds__(THREADS, 1)
match_pairs(const float* __restrict__ costs, const long long* __restrict__ counts,
            const float* __restrict__ importance, const int* __restrict__ cached, int n, int max_clusters, int capacity,
            int given, int first_pass, int* __restrict__ source, int* __restrict__ other, int* __restrict__ new_nearest,
            long long* __restrict__ assignment) {
  extern __shared__ int4 dynamic[];
  const int line = (n + CHUNK - 1) / CHUNK * CHUNK;
  // Shared memory: n of each, but `line` of `order`, whose columns behind the last cluster are free.
  int* order = reinterpret_cast<int*>(dynamic);
  Place* blockers = reinterpret_cast<Place*>(order + line);  // BLOCKERS each
  Place* proposals = blockers + n * BLOCKERS;
  Place* list = proposals + n;
  __shared__ int found, searching;
  __shared__ int before[WARPS];
  const long long stream = blockIdx.x / PEERS;
  const int peer = blockIdx.x % PEERS;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  costs += stream * line * line;
  counts += stream * n;
  importance += stream * n;
  cached += cached ? stream * n : 0;
  assignment += stream * given;

  if (thread == 0) found = searching = 0;
  __syncthreads();  // found, searching
  // Live clusters, and in the upper half those of them that are new.
  int live = 0;
  for (int i = thread; i < line; i += THREADS) {
    const bool lives = i < n && counts[i] > 0;
    if (lives) live += cached && cached[i] < 0 ? 0x10001 : 1;
    order[i] = lives ? (__float_as_int(importance[i]) & 0x7fffffff & ~INDEX) | i : FREE;
    if (i < n) proposals[i] = BLOCKED;
  }
  live = warp_sum(live);
  if (lane == 0) atomicAdd(&found, live);
  ALL_PEERS(__syncthreads());  // found, order, proposals; all peers are there
  live = found & 0xffff;
  int surplus = live - max_clusters;
  const bool merges = surplus > 0;
  // Whether pairs that are not compared count too: the mask removes the sign of their costs.
  const bool compare_all = merges && cached && (found >> 16) < 2 * surplus - 1;
  const unsigned mask = compare_all ? 0x7fffffffu : 0xffffffffu;

  bool first_round = true;
  int round = 0;
  while (merges) {
    // Of this block's share, the clusters whose rows must be read again.
    for (int i = thread * PEERS + peer; i < n; i += THREADS * PEERS)
      if (order[i] >= 0 && (first_round || must_search(i, order, proposals, blockers)))
        list[atomicAdd(&searching, 1)] = (Place)i;
    __syncthreads();  // list, searching
    for (int k = warp; k < searching; k += WARPS) {
      const int i = list[k];
      unsigned bits, nearest, nearer, blocker;
      find_nearest(costs + (long long)i * line, order, order[i], line, mask, bits, nearest, nearer, blocker);
      if (nearer >= bits + (blocker < nearest)) nearer = NO_NEIGHBOUR;
      int proposal = BLOCKED;
      if (!keep_blockers(nearer, blocker, blockers + i * BLOCKERS)) {
        proposal = NO_PROPOSAL;
        if (bits < NO_NEIGHBOUR) {
          find_blockers(costs + (long long)nearest * line, order, bits, i, line, mask, nearer, blocker);
          proposal = (keep_blockers(nearer, blocker, blockers + i * BLOCKERS) ? PENDING : round) | (int)nearest;
        }
      }
      if (proposal & PENDING ? lane == peer : lane < PEERS) write_to_peer(proposals + i, lane, proposal);
    }
    first_round = false;
    if (thread == 0) found = 0;
    ALL_PEERS(__syncthreads());  // proposals, blockers, found; list and searching have been read
    if (thread == 0) searching = 0;
    // A peer may be in the next round already, and write pairs of that one.
    for (int i = thread; i < n; i += THREADS)
      if (order[i] >= 0 && (proposals[i] & ~INDEX) == round) list[atomicAdd(&found, 1)] = (Place)i;
    __syncthreads();  // list, found, searching
    const int candidates = found;
    if (!candidates) break;
    float* pair_cost = reinterpret_cast<float*>(blockers);  // of the last pairs, which need no blockers
    if (candidates > surplus) {
      for (int p = thread; p < candidates; p += THREADS)
        pair_cost[p] =
            __int_as_float(__float_as_int(costs[(long long)list[p] * line + (proposals[list[p]] & INDEX)]) & (int)mask);
      __syncthreads();  // pair_cost
    }
    for (int p = thread; p < candidates; p += THREADS) {
      const int i = list[p], j = proposals[i] & INDEX;
      int rank = 0;
      // As many as the surplus, those of least cost; of equal costs the pair whose first cluster comes first.
      if (candidates > surplus)
        for (int q = 0; q < candidates; q++)
          rank += pair_cost[q] < pair_cost[p] ||
                  (pair_cost[q] == pair_cost[p] && min((int)list[q], proposals[list[q]] & INDEX) < min(i, j));
      if (rank < surplus) {
        order[min(i, j)] = FIRST;
        order[max(i, j)] = SECOND;
        proposals[j] = (Place)i;
      }
    }
    surplus -= min(candidates, surplus);
    round ^= ROUND;
    __syncthreads();  // order, proposals; found, list and pair_cost have been read
    if (surplus == 0) break;
  }

  // Cached neighbours of the result: the nearest unpaired neighbour of each unpaired cluster.
  Place* nearest = blockers;  // n, of the first peer; blockers are not needed any more
  if (merges && cached) {
    ALL_PEERS();  // the first peer has read pair_cost
    for (int i = warp * PEERS + peer; i < n; i += WARPS * PEERS) {
      if (order[i] < 0) continue;
      unsigned bits, index, nearer, blocker;
      // Every position is behind -1.
      find_nearest(costs + (long long)i * line, order, -1, line, mask, bits, index, nearer, blocker);
      if (lane == 0) write_to_peer(nearest + i, 0, bits < NO_NEIGHBOUR ? (int)index : NONE);
    }
    ALL_PEERS();  // nearest
  }
  if (peer) return;

  // Places in the result: live clusters first, by index. A cluster lives there if it is unpaired or the first of a
  // pair.
  Place* live_before = list;  // for each cluster, live ones before it
  const int share = (n + THREADS - 1) / THREADS;
  const int begin = min(n, thread * share), end = min(n, begin + share);
  int own = 0;
  for (int i = begin; i < end; i++) own += order[i] >= FIRST;
  int sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(EVERY_LANE, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) before[warp] = sum;
  __syncthreads();  // before
  int all = 0, place = sum - own;
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) place += before[w];
    all += before[w];
  }
  for (int i = begin; i < end; i++) {
    const bool lives = order[i] >= FIRST;
    const int to = lives ? place : all + i - place;
    live_before[i] = (Place)place;
    place += lives;
    if (to >= capacity) continue;
    source[stream * capacity + to] = i;
    other[stream * capacity + to] = !lives ? -2 : order[i] == FIRST ? proposals[i] & INDEX : -1;
  }
  __syncthreads();  // live_before
  for (int i = thread; i < given; i += THREADS) {
    const long long at = first_pass ? i : assignment[i];
    if (first_pass ? counts[i] > 0 : at < live) {
      assignment[i] = live_before[order[at] == SECOND ? proposals[at] & INDEX : at];
    } else {
      // Free places follow the clusters, in their old order. After a pass, this one stood behind `live` clusters and
      // i - passed free places, so `passed` clusters were before it.
      const long long passed = first_pass ? i : live + i - at;
      assignment[i] = all + i - (passed < n ? live_before[passed] : all);
    }
  }
  if (!cached) return;
  const auto place_of = [&](int i) { return order[i] >= FIRST ? live_before[i] : all + i - live_before[i]; };
  for (int i = thread; i < n; i += THREADS) {
    const int to = place_of(i);
    int neighbour = -1;
    if (order[i] >= 0) neighbour = !merges ? cached[i] : nearest[i] == NONE ? -1 : nearest[i];
    if (to < capacity) new_nearest[stream * capacity + to] = neighbour < 0 ? -1 : place_of(neighbour);
  }
}
