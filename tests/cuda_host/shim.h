// CUDA's words for a host compiler: the kernels of csrc/*/*_kernels.cuh run here, unchanged, on the CPU. Test-only.
//
// A block is a group of std::threads, one per CUDA thread; blocks run one after the other. __syncthreads is a barrier
// of the block, a shuffle is two barriers of the warp around an exchange, so ThreadSanitizer sees a missing
// __syncthreads as the race it is. Shared memory is one heap allocation per block, of exactly the bytes that the
// launch asked for (AddressSanitizer sees an overrun) and filled with NaN before each block (nobody reads what nobody
// wrote). Not modelled: warps in lockstep (there is no implicit synchronisation, as on Volta and later), the memory
// order of different blocks (they are sequential), registers, banks, caches.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define DSCT_SHARED(name) unsigned char* name = ::shim::block->shared

using cudaStream_t = void*;

namespace shim {

constexpr unsigned kWarpSize = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  Barrier barrier;
  std::array<std::array<unsigned char, 16>, kWarpSize> slots{};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned t = 0; t < threads; t += kWarpSize) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarpSize, threads - t)));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local Index thread_index, block_index;
inline Index block_size, grid_size;

template <typename T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 16);
  Warp& warp = *block->warps[thread_index.x / kWarpSize];
  std::memcpy(warp.slots[thread_index.x % kWarpSize].data(), &value, sizeof(T));
  warp.barrier.wait();
  std::memcpy(&value, warp.slots[from].data(), sizeof(T));
  warp.barrier.wait();
  return value;
}

// Every CUDA thread keeps its host thread for the whole launch and walks through the blocks.
template <typename Body>
void run(unsigned blocks, unsigned threads, size_t shared_bytes, const Body& body) {
  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  Block state(threads);
  std::vector<std::thread> group;
  for (unsigned t = 0; t < threads; ++t) {
    group.emplace_back([&, t] {
      block = &state;
      thread_index = {t, 0, 0};
      for (unsigned b = 0; b < blocks; ++b) {
        block_index = {b, 0, 0};
        if (t == 0) {
          // aligned_alloc, so that 16-byte vectors are aligned and the end is where the launch said.
          state.shared = static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
          const float nan = std::numeric_limits<float>::quiet_NaN();
          for (size_t i = 0; i + 4 <= shared_bytes; i += 4) std::memcpy(state.shared + i, &nan, 4);
        }
        state.barrier.wait();
        body();
        state.barrier.wait();
        if (t == 0) std::free(state.shared);
      }
    });
  }
  for (std::thread& thread : group) thread.join();
}

}  // namespace shim

#define threadIdx ::shim::thread_index
#define blockIdx ::shim::block_index
#define blockDim ::shim::block_size
#define gridDim ::shim::grid_size

inline void __syncthreads() { ::shim::block->barrier.wait(); }
inline void __syncwarp(unsigned = ~0u) { ::shim::block->warps[threadIdx.x / ::shim::kWarpSize]->barrier.wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::shim::exchange(value, (threadIdx.x % ::shim::kWarpSize) ^ static_cast<unsigned>(mask));
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return std::atomic_ref<unsigned>(*address).fetch_add(value);
}

using std::fabs;

namespace dsct::cuda {

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t,
            Args... args) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max() || threads > 1024 || threads < 1) {
    throw std::invalid_argument(std::string(name) + ": a launch of " + std::to_string(blocks) + " x " +
                                std::to_string(threads));
  }
  ::shim::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, [&] { kernel(args...); });
}

}  // namespace dsct::cuda
