// Executes CUDA C++ kernels on the CPU, for tests (g++ -std=c++17).
//
// One fiber per CUDA thread; blocks, or clusters of them, run one after the other on one core. A fiber runs until it waits
// for its warp, its block or its cluster, then another one is drawn at random: where a barrier is missing, some seed gives
// a wrong result. Shared memory is filled with NaN before every block. Barriers and shuffles that not all of their threads
// reach are errors, not undefined. Not emulated: timing, memory order between blocks, and rounding of fast intrinsics.
#pragma once
#define CUDA_EMULATION 1

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define EMULATION_FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
// Static shared memory lives in a section of its own, so that it can be found and filled before every block.
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
// The builder rewrites `extern __shared__ T name[];` to this.
#define EMULATION_DYNAMIC_SHARED(T, name) T* name = (T*)emulation::block->dynamic

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(4) char4 { signed char x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

#ifdef EMULATION_FAST_SWITCH  // Saves the registers a callee must keep and swaps stacks: no system call.
struct Context { void* stack; };
extern "C" void emulation_switch(void** from, void* to);
asm(".text\n.globl emulation_switch\n.hidden emulation_switch\nemulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
inline void swap_to(Context& from, Context& to) { emulation_switch(&from.stack, to.stack); }
inline void make(Context& c, char* stack, size_t size, void (*entry)()) {
  void** top = (void**)(((uintptr_t)stack + size) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  c.stack = top;
}
#else
struct Context { ucontext_t u; };
inline void swap_to(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
inline void make(Context& c, char* stack, size_t size, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = size;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
}
#endif

enum State { RUNS, WAITS_FOR_BLOCK, WAITS_FOR_WARP, WAITS_FOR_CLUSTER, DONE };
constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 << 10;

struct Fiber { Context context; uint3 thread; unsigned index; State state; int line; unsigned mask; uint64_t slot; };
struct Block {
  std::vector<Fiber> fibers;
  uint3 index;
  dim3 size, grid;
  char* dynamic;
  Fiber* current;
  std::vector<char> statics;  // its static shared memory, while another block of the cluster runs
  std::unique_ptr<char, decltype(&free)> memory{nullptr, &free};
};
inline Block* block;
inline std::vector<Block>* cluster;
inline Context scheduler;
inline void (*body)(void*);
inline void* body_arguments;
inline const char* error;
// Line of a barrier to leave out: how tests check that a missing barrier is found.
inline int removed_barrier = -1;
inline uint64_t generator;

inline unsigned draw(unsigned below) {
  generator = generator * 6364136223846793005ull + 1442695040888963407ull;
  return (unsigned)((generator >> 33) % below);
}

[[gnu::noinline]] inline void wait(State state, int line, unsigned mask) {
  Fiber* me = block->current;
  me->state = state;
  me->line = line;
  me->mask = mask;
  swap_to(me->context, scheduler);
}
inline void entry() {
  body(body_arguments);
  wait(DONE, 0, 0);
  abort();
}
inline void fail(const char* what) {
  if (!error) error = what;
}
inline void block_barrier(int line) {
  if (line != removed_barrier) wait(WAITS_FOR_BLOCK, line, 0);
}
inline void cluster_barrier(int line) {
  if (line != removed_barrier) wait(WAITS_FOR_CLUSTER, line, 0);
}
inline void warp_barrier(int line, unsigned mask = 0xffffffffu) {
  if (line != removed_barrier) wait(WAITS_FOR_WARP, line, mask);
}

// Resumes lanes of a warp if all lanes of their mask wait at the same place.
inline void release(Fiber* lanes, unsigned count) {
  for (unsigned i = 0; i < count; i++) {
    if (lanes[i].state != WAITS_FOR_WARP) continue;
    // A block of fewer than 32 threads does not have all lanes.
    unsigned mask = lanes[i].mask & (count == 32 ? 0xffffffffu : (1u << count) - 1);
    bool all = true;
    for (unsigned j = 0; j < count && all; j++)
      if (mask >> j & 1)
        all = lanes[j].state == WAITS_FOR_WARP && lanes[j].mask == lanes[i].mask && lanes[j].line == lanes[i].line;
    if (all)
      for (unsigned j = 0; j < count; j++)
        if (mask >> j & 1) lanes[j].state = RUNS;
  }
}

// The address of a variable of shared memory in a peer.
inline void* of_peer(const void* p, unsigned rank) {
  if (rank >= cluster->size()) { fail("a block that the cluster does not have"); return (void*)p; }
  Block& peer = (*cluster)[rank];
  if (&peer == block) return (void*)p;
  const char* place = (const char*)p;
  if (__start_cuda_shared && place >= __start_cuda_shared && place < __stop_cuda_shared)
    return peer.statics.data() + (place - __start_cuda_shared);
  return peer.dynamic + (place - block->dynamic);
}
// Makes a block the one that runs; static shared memory is that of one block at a time.
inline void enter(Block& b) {
  if (block == &b) return;
  const size_t size = __start_cuda_shared ? __stop_cuda_shared - __start_cuda_shared : 0;
  if (block) block->statics.assign(__start_cuda_shared, __start_cuda_shared + size);
  if (size) memcpy(__start_cuda_shared, b.statics.data(), size);
  block = &b;
}

// Resumes the fibers of a block or a cluster if all of them wait. Returns the error if they never will.
inline const char* meet(Block* blocks, size_t count, State state, const char* apart, const char* alone, bool& met) {
  int line = -1;
  size_t waiting = 0, done = 0, all = 0;
  for (size_t k = 0; k < count; k++)
    for (auto& f : blocks[k].fibers) {
      all++;
      if (f.state == DONE) done++;
      if (f.state != state) continue;
      if (line >= 0 && line != f.line) return apart;
      line = f.line;
      waiting++;
    }
  met = waiting == all;
  if (met)
    for (size_t k = 0; k < count; k++)
      for (auto& f : blocks[k].fibers) f.state = RUNS;
  return waiting && !met && waiting + done == all ? alone : nullptr;
}

inline const char* run(std::vector<Block>& peers, bool shuffled) {
  const unsigned n = peers[0].fibers.size(), warps = (n + WARP - 1) / WARP;
  std::vector<unsigned> ready;
  unsigned chosen = 0, ahead = draw(peers.size());
  unsigned order[WARP];
  for (;;) {
    ready.clear();
    bool done = true;
    for (unsigned k = 0; k < peers.size(); k++) {
      auto& fibers = peers[k].fibers;
      const size_t before = ready.size();
      const auto find_ready = [&] {
        for (unsigned w = 0; w < warps; w++)
          for (unsigned i = w * WARP; i < std::min(n, (w + 1) * WARP); i++)
            if (fibers[i].state == RUNS) { ready.push_back(k * warps + w); break; }
      };
      find_ready();
      if (ready.size() == before) {
        bool met = false;
        const char* wrong = meet(&peers[k], 1, WAITS_FOR_BLOCK, "__syncthreads() reached at two places at once",
                                 "__syncthreads() that some threads left out", met);
        if (wrong) return wrong;
        if (met) find_ready();
      }
      for (auto& f : fibers) done = done && f.state == DONE;
    }
    if (done) return nullptr;
    if (ready.empty()) {
      bool met = false;
      const char* wrong = meet(peers.data(), peers.size(), WAITS_FOR_CLUSTER, "a cluster's barrier reached at two places at once",
                               "a cluster's barrier that some threads left out", met);
      if (wrong) return wrong;
      if (met) continue;
      return "deadlock: a warp or block barrier that not all of its threads reach";
    }
    // Mostly stay with one warp until it waits for the block, so that warps are far apart; sometimes draw another.
    if (!shuffled) chosen = ready[0];
    else if (draw(8) == 0 || std::find(ready.begin(), ready.end(), chosen) == ready.end()) {
      chosen = ready[draw(ready.size())];
      // And with one block, so that it is far ahead of its peers.
      if (peers.size() > 1) {
        if (draw(1000) == 0) ahead = draw(peers.size());
        const auto first = std::lower_bound(ready.begin(), ready.end(), ahead * warps);
        const auto last = std::lower_bound(first, ready.end(), (ahead + 1) * warps);
        if (first != last && draw(1000)) chosen = *(first + draw(last - first));
      }
    }
    Block& b = peers[chosen / warps];
    enter(b);
    const unsigned warp = chosen % warps;
    Fiber* lanes = &b.fibers[warp * WARP];
    const unsigned count = std::min(WARP, n - warp * WARP);
    for (unsigned i = 0; i < count; i++) order[i] = i;
    if (shuffled)
      for (unsigned i = count; i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
    for (unsigned i = 0; i < count; i++) {
      Fiber& f = lanes[order[i]];
      if (f.state != RUNS) continue;
      b.current = &f;
      swap_to(scheduler, f.context);
      if (error) return error;
    }
    release(lanes, count);
  }
}

template <class Body>
const char* launch(dim3 grid, dim3 size, unsigned peers, size_t shared, uint64_t seed, Body call) {
  const unsigned n = size.x * size.y * size.z, blocks = grid.x * grid.y * grid.z;
  if (!n || n > 1024) return "a block has 1 to 1024 threads";
  if (!blocks || grid.y > 65535 || grid.z > 65535) return "a grid has at least one block, and at most 65535 along y and z";
  if (!peers || peers > 8 || blocks % peers) return "a cluster has 1 to 8 blocks, and the grid is whole clusters";
  if (shared > (48 << 10))
    return "more than 48 KiB of shared memory";
  body_arguments = &call;
  body = [](void* p) { (*(Body*)p)(); };
  error = nullptr;
  block = nullptr;
  std::unique_ptr<char[]> stacks(new char[STACK * n * peers]);
  const size_t statics = __start_cuda_shared ? __stop_cuda_shared - __start_cuda_shared : 0;
  std::vector<Block> together(peers);
  cluster = &together;
  for (Block& b : together) {
    b.fibers.resize(n);
    b.size = size;
    b.grid = grid;
    // Exactly the requested size, so that the address sanitizer finds accesses beyond it.
    b.memory.reset((char*)aligned_alloc(16, std::max<size_t>(16, (shared + 15) / 16 * 16)));
    b.dynamic = b.memory.get();
  }
  generator = seed * 0x9e3779b97f4a7c15ull + 1;
  std::vector<unsigned> order_of_blocks(blocks / peers);
  for (unsigned i = 0; i < order_of_blocks.size(); i++) order_of_blocks[i] = i;
  if (seed)
    for (unsigned i = order_of_blocks.size(); i > 1; i--) std::swap(order_of_blocks[i - 1], order_of_blocks[draw(i)]);
  const char* wrong = nullptr;
  for (unsigned k = 0; k < order_of_blocks.size() && !wrong; k++) {
    block = nullptr;
    for (unsigned rank = 0; rank < peers; rank++) {
      Block& b = together[rank];
      const unsigned i = order_of_blocks[k] * peers + rank;
      b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      memset(b.dynamic, 0xff, shared);
      b.statics.assign(statics, (char)0xff);
      for (unsigned t = 0; t < n; t++) {
        Fiber& f = b.fibers[t];
        f.index = t;
        f.state = RUNS;
        f.thread = {t % size.x, t / size.x % size.y, t / size.x / size.y};
        make(f.context, &stacks[STACK * (rank * n + t)], STACK, entry);
      }
    }
    wrong = run(together, seed != 0);
  }
  return wrong;
}

template <class... A, size_t... I>
const char* call(void (*kernel)(A...), void** a, std::index_sequence<I...>, const unsigned* d, size_t shared, uint64_t seed) {
  auto arguments = std::make_tuple(*(std::decay_t<A>*)a[I]...);
  return launch(dim3(d[0], d[1], d[2]), dim3(d[3], d[4], d[5]), d[6], shared, seed,
                [&] { std::apply(kernel, arguments); });
}
template <class... A>
const char* call(void (*kernel)(A...), const unsigned* d, size_t shared, void** a, const unsigned* sizes, unsigned count,
                 uint64_t seed) {
  // A wrong argument has a wrong size as a rule; a device would not report it.
  const size_t expected[] = {sizeof(A)..., 0};
  if (count != sizeof...(A)) return "wrong number of arguments";
  for (unsigned i = 0; i < count; i++)
    if (sizes[i] != expected[i]) return "an argument has the wrong size";
  return call(kernel, a, std::index_sequence_for<A...>{}, d, shared, seed);
}

inline unsigned lane() { return block->current->index % WARP; }
inline Fiber* lanes() { return block->current - lane(); }

// Every lane of the mask writes a value, then reads that of another lane.
template <class T>
T exchange(unsigned mask, T value, int line, unsigned source, bool inside) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  Fiber* me = block->current;
  if (!(mask >> lane() & 1)) fail("a shuffle by a lane that its mask leaves out");
  memcpy(&me->slot, &value, sizeof(T));
  wait(WAITS_FOR_WARP, line, mask);
  T result = value;
  if (inside) {
    if (!(mask >> source & 1) || lane() + (block->fibers.size() - me->index) <= source)
      fail("a shuffle reads a lane that takes no part");
    else memcpy(&result, &lanes()[source].slot, sizeof(T));
  }
  wait(WAITS_FOR_WARP, -line, mask);
  return result;
}
template <class T> T shfl(int line, unsigned mask, T v, int source, int width = 32) {
  return exchange(mask, v, line, (lane() & ~(width - 1)) + (source & (width - 1)), true);
}
template <class T> T shfl_up(int line, unsigned mask, T v, unsigned d, int width = 32) {
  return exchange(mask, v, line, lane() - d, (lane() & (width - 1)) >= d);
}
template <class T> T shfl_down(int line, unsigned mask, T v, unsigned d, int width = 32) {
  return exchange(mask, v, line, lane() + d, (lane() & (width - 1)) + d < (unsigned)width);
}
template <class T> T shfl_xor(int line, unsigned mask, T v, unsigned x, int width = 32) {
  const unsigned source = lane() ^ x;
  return exchange(mask, v, line, source, source <= (lane() | (width - 1)));
}
inline unsigned ballot(int line, unsigned mask, int predicate) {
  Fiber* me = block->current;
  if (!(mask >> lane() & 1)) fail("a vote by a lane that its mask leaves out");
  me->slot = predicate != 0;
  wait(WAITS_FOR_WARP, line, mask);
  unsigned votes = 0;
  for (unsigned j = 0; j < WARP && me->index - lane() + j < block->fibers.size(); j++)
    if (mask >> j & 1) votes |= (unsigned)(lanes()[j].slot & 1) << j;
  wait(WAITS_FOR_WARP, -line, mask);
  return votes;
}
// Fibers change at barriers only, so a plain read and write is atomic.
template <class T, class Change> T atomic(T* p, Change change) {
  const T old = *p;
  *p = change(old);
  return old;
}
inline float half_to_float(unsigned short bits) {
  const unsigned sign = (unsigned)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                    : exponent     ? ldexpf((float)(fraction + 1024), (int)exponent - 25)
                                   : ldexpf((float)fraction, -24);
  return sign ? -magnitude : magnitude;
}
// To the nearest, ties to even.
inline unsigned short float_to_half(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  const unsigned sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;
  if (magnitude < 0x38800000) return sign | (unsigned)rintf(ldexpf(fabsf(x), 24));
  return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}
}  // namespace emulation

#define threadIdx (emulation::block->current->thread)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->size)
#define gridDim (emulation::block->grid)
#define warpSize 32
#define __syncthreads() emulation::block_barrier(__LINE__)
#define __cluster_barrier_arrive() ((void)0)
#define __cluster_barrier_wait() emulation::cluster_barrier(__LINE__)
#define __cluster_map_shared_rank(p, rank) emulation::of_peer(p, rank)
#define __syncwarp(...) emulation::warp_barrier(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) emulation::shfl(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulation::shfl_up(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulation::shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulation::shfl_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, p) emulation::ballot(__LINE__, mask, p)
#define __any_sync(mask, p) (emulation::ballot(__LINE__, mask, p) != 0)
#define __all_sync(mask, p) (emulation::ballot(__LINE__, mask, !(p)) == 0)

template <class T> T atomicAdd(T* p, T v) { return emulation::atomic(p, [&](T o) -> T { return o + v; }); }
template <class T> T atomicMin(T* p, T v) { return emulation::atomic(p, [&](T o) { return std::min(o, v); }); }
template <class T> T atomicMax(T* p, T v) { return emulation::atomic(p, [&](T o) { return std::max(o, v); }); }
template <class T> T atomicExch(T* p, T v) { return emulation::atomic(p, [&](T) { return v; }); }
template <class T> T atomicCAS(T* p, T expected, T v) {
  return emulation::atomic(p, [&](T o) { return o == expected ? v : o; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __longlong_as_double(long long x) { double y; memcpy(&y, &x, 8); return y; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned places) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned x = 0;
  for (int k = 0; k < 4; k++) x |= (unsigned)(bytes >> 8 * (places >> 4 * k & 7) & 255) << 8 * k;
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> T __ldg(const T* p) { return *p; }

struct __half { unsigned short bits; };
struct __nv_bfloat16 { unsigned short bits; };
inline float __half2float(__half x) { return emulation::half_to_float(x.bits); }
inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float((int)((unsigned)x.bits << 16)); }

// One symbol per kernel for ctypes.
#define EMULATION_EXPORT(kernel)                                                                                  \
  extern "C" const char* emulated_##kernel(const unsigned* dims, size_t shared, void** arguments,                 \
                                           const unsigned* sizes, unsigned count, uint64_t seed, int removed) {   \
    emulation::removed_barrier = removed;                                                                         \
    return emulation::call(kernel, dims, shared, arguments, sizes, count, seed);                                  \
  }
