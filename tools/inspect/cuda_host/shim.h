// CUDA's words for a host compiler: the kernels of csrc/*/cuda/*.cuh run here, unchanged, on the CPU. Test-only.
//
// A block is a group of CUDA threads that meet at barriers; blocks run one after the other. A CUDA thread is a fibre,
// or, with SHIM_THREADS, a std::thread: slow, but ThreadSanitizer then sees a missing __syncthreads as the race it is.
// A shuffle is two barriers of the warp around an exchange. Shared memory is one heap allocation per block, of exactly
// the bytes that the launch asked for (AddressSanitizer sees an overrun), filled with NaN before each block (nobody
// reads what nobody wrote). Not modelled: warps in lockstep (there is no implicit synchronisation, as on Volta and
// later), blocks side by side (they are sequential), asynchronous copies (they arrive at once), registers, banks,
// caches.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
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
#define __launch_bounds__(...)
#define __grid_constant__
#define DSCT_SHARED(name) unsigned char* name = ::shim::block->shared

using cudaStream_t = void*;

namespace shim {

constexpr unsigned kWarpSize = 32;

// Launches are listed instead of run: the kernel's symbol (which a program linked with -rdynamic knows, and which nvcc
// gives it too), blocks, threads, bytes of shared memory.
inline bool list_only = false;

inline void list(const void* kernel, int64_t blocks, int threads, size_t shared) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) throw std::runtime_error("a kernel without a symbol");
  std::printf("\nlaunch %s %lld %d %zu\n", info.dli_sname, static_cast<long long>(blocks), threads, shared);
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

#ifdef SHIM_THREADS

inline thread_local Index thread_index;

// Two barriers in turn: with one, ThreadSanitizer would take a thread that is slow to leave it for one that had waited
// for all that faster threads do before they come to it again.
class Barrier {
 public:
  explicit Barrier(unsigned count) : turns_(count) {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, count);
  }
  ~Barrier() {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_destroy(&barrier);
  }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barriers_[turns_[thread_index.x % turns_.size()]++ % 2]); }

 private:
  pthread_barrier_t barriers_[2];
  std::vector<unsigned> turns_;  // of each thread
};

// Runs body(t) for t in [0, threads), all of them alive at once.
template <typename Body>
void together(unsigned threads, const Body& body) {
  std::vector<std::thread> group;
  for (unsigned t = 0; t < threads; ++t) {
    group.emplace_back([&body, t] {
      thread_index.x = t;
      body(t);
    });
  }
  for (std::thread& thread : group) thread.join();
}

#else

struct Fibre {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  unsigned index = 0;
  bool done = false;
};

inline Index thread_index;
inline ucontext_t scheduler;
inline Fibre* current = nullptr;
inline void (*entry)(void*, unsigned) = nullptr;
inline void* entry_body = nullptr;

inline void yield() { swapcontext(&current->context, &scheduler); }

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    const unsigned mine = generation_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++generation_;
    }
    while (generation_ == mine) yield();
  }

 private:
  unsigned count_, arrived_ = 0, generation_ = 0;
};

inline void start() {
  entry(entry_body, current->index);
  current->done = true;
  yield();
}

template <typename Body>
void together(unsigned threads, const Body& body) {
  constexpr size_t kStack = 256 * 1024;
  entry = [](void* b, unsigned t) { (*static_cast<const Body*>(b))(t); };
  entry_body = const_cast<Body*>(&body);
  std::vector<Fibre> fibres(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    fibre.index = t;
    fibre.stack.reset(new unsigned char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    makecontext(&fibre.context, start, 0);
  }
  // Last thread first: whoever relies on thread 0 having gone ahead without a barrier is wrong here.
  for (unsigned left = threads; left > 0;) {
    for (unsigned t = threads; t-- > 0;) {
      if (fibres[t].done) continue;
      current = &fibres[t];
      thread_index.x = t;
      swapcontext(&scheduler, &fibres[t].context);
      left -= fibres[t].done;
    }
  }
}

#endif

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

inline Block* block = nullptr;
inline Index block_index, block_size, grid_size;

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

// Every CUDA thread walks through all the blocks.
template <typename Body>
void run(unsigned blocks, unsigned threads, size_t shared_bytes, const Body& body) {
  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  Block state(threads);
  block = &state;
  together(threads, [&](unsigned t) {
    for (unsigned b = 0; b < blocks; ++b) {
      if (t == 0) {
        block_index = {b, 0, 0};
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, std::max<size_t>(shared_bytes, 1)) != 0) std::abort();
        const float nan = std::numeric_limits<float>::quiet_NaN();
        for (size_t i = 0; i + 4 <= shared_bytes; i += 4) std::memcpy(static_cast<char*>(memory) + i, &nan, 4);
        state.shared = static_cast<unsigned char*>(memory);
      }
      state.barrier.wait();
      body();
      state.barrier.wait();
      if (t == 0) std::free(state.shared);
    }
  });
}

}  // namespace shim

#define threadIdx ::shim::thread_index
#define blockIdx ::shim::block_index
#define blockDim ::shim::block_size
#define gridDim ::shim::grid_size

inline void __syncthreads() { ::shim::block->barrier.wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::shim::exchange(value, (threadIdx.x % ::shim::kWarpSize) ^ static_cast<unsigned>(mask));
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return std::atomic_ref<unsigned>(*address).fetch_add(value);
}

namespace dsct::cuda {

// shared_limit: the most shared memory that a block of this launch may ask for.
template <typename... Params, typename... Args>
void launch_within(size_t shared_limit, const char* name, void (*kernel)(Params...), int64_t blocks, int threads,
                   size_t shared, Args... args) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max() || threads > 1024 || threads < 1 ||
      shared > shared_limit) {
    throw std::invalid_argument(std::string(name) + ": a launch of " + std::to_string(blocks) + " x " +
                                std::to_string(threads) + " with " + std::to_string(shared) + " bytes");
  }
  if (::shim::list_only) return ::shim::list(reinterpret_cast<const void*>(kernel), blocks, threads, shared);
  ::shim::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, [&] { kernel(args...); });
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t,
            Args... args) {
  launch_within(48 * 1024, name, kernel, blocks, threads, shared, args...);  // as Device() has it
}

template <typename Device, typename... Params, typename... Args>
void launch_early(const char* name, const Device& device, void (*kernel)(Params...), int64_t blocks, int threads,
                  size_t shared, cudaStream_t, Args... args) {
  launch_within(device.shared_bytes, name, kernel, blocks, threads, shared, args...);
}

}  // namespace dsct::cuda
