// Launch helpers for the CUDA kernels.
//
// Kernels and their launch plans (tnkd/cuda, cafd/cuda) use only what this file and CUDA's built-ins
// give them, so the very same source also compiles for the host: tools/inspect/cuda_host defines DSCT_HOST_SHIM,
// supplies CUDA's words and its own `launch`, and runs every block as a group of threads.
#pragma once

#include <cstdint>
#include <cstdlib>
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
  bool overlap = false;          // programmatic dependent launch: see launch_early
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifndef DSCT_HOST_SHIM

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // reported here: the next to ask should not get it again
    throw std::runtime_error(std::string("dsct_kernels: ") + what + ": " + cudaGetErrorString(error));
  }
}

#ifdef __CUDACC__

// Whether this build has machine code, not only PTX of an older architecture, for a device of this compute capability.
constexpr bool built_for(int major, int minor) {
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
  for (int arch : kArchs) {
    if (arch / 100 == major && arch / 10 % 10 <= minor) return true;
  }
  return false;
}

inline Device device_of(int index) {
  auto attribute = [&](cudaDeviceAttr what) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, what, index), "device query");
    return value;
  };
  Device device;
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
  // Off unless asked for: no GPU has run it yet in its present form.
  const char* asked = std::getenv("DSCT_KERNELS_OVERLAP");
  device.overlap = asked != nullptr && std::string(asked) == "1" && major >= 9 && built_for(major, minor);
  return device;
}

template <typename... Params, typename... Args>
void launch_kernel(const char* name, const Device& device, bool early, void (*kernel)(Params...), int64_t blocks,
                   int threads, size_t shared, cudaStream_t stream, const Args&... args) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(name) + ": the tensor needs " + std::to_string(blocks) +
                                " blocks, more than one launch can have");
  }
  // Always the most that the device has. The limit is the kernel's, not the launch's: one of this launch's size would
  // fail another thread, or a captured graph, that runs the same kernel with more classes.
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               device.shared_bytes),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
  check(cudaGetLastError(), name);
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
            cudaStream_t stream, const Args&... args) {
  launch_kernel(name, Device(), false, kernel, blocks, threads, shared, stream, args...);
}

// For a kernel that follows one of ours that calls release_next(): its blocks start while that one ends, which hides
// the gap between two launches. Every one of its threads calls wait_for_previous() before it touches what the launch
// before wrote, before it writes to device memory, and before it exits: then its own end says that all before it ended.
template <typename... Params, typename... Args>
void launch_early(const char* name, const Device& device, void (*kernel)(Params...), int64_t blocks, int threads,
                  size_t shared, cudaStream_t stream, const Args&... args) {
  launch_kernel(name, device, device.overlap, kernel, blocks, threads, shared, stream, args...);
}

#endif

#endif

}  // namespace dsct::cuda
