// Launch helpers for the CUDA kernels.
//
// Kernels and their launch plans (tnkd_kernels.cuh, cafd_kernels.cuh) use only what this file and CUDA's built-ins
// give them, so the very same source also compiles for the host: tests/cuda_host defines DSCT_HOST_SHIM, supplies
// CUDA's words and its own `launch`, and runs every block as a group of threads.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#ifdef DSCT_HOST_SHIM
#include "shim.h"
#else
#include <cuda_runtime.h>
#define DSCT_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define DSCT_DEVICE __device__ __forceinline__
#define DSCT_HOST_DEVICE __host__ __device__ __forceinline__

namespace dsct::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// What a plan needs to know of the device.
struct Device {
  int multiprocessors = 1;
  int shared_bytes = 48 * 1024;  // the most dynamic shared memory one block may ask for
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifndef DSCT_HOST_SHIM

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("dsct_kernels: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline Device device_of(int index) {
  Device device;
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index), "device query");
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device query");
  return device;
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
            cudaStream_t stream, Args... args) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(name) + ": the tensor needs " + std::to_string(blocks) +
                                " blocks, more than one launch can have");
  }
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          name);
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, stream>>>(args...);
  check(cudaGetLastError(), name);
}

#endif

}  // namespace dsct::cuda
