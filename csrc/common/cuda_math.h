// Device-side numbers: 16-byte packs of elements, conversions to the accumulation dtype, fast exponentials and
// reductions in a fixed order.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <type_traits>

#include "cuda_launch.h"
#include "types.h"

namespace dsct::cuda {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// ------------------------------------------------------------------------------------------ launches that overlap
// (programmatic dependent launch, cuda_launch.h)

// From here on the launch before this one is over, and all that it wrote is there; in a launch in order it always is.
DSCT_DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The launch after this one may start its blocks as soon as all of this one's have come here.
DSCT_DEVICE void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------- packs: numbers that are loaded and stored
// together
template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  static constexpr int kSize = kCount;
  T lane[kCount];
};

#ifdef __CUDACC__
template <int kBytes>
using WordOf = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;
#endif

// One load, of 2 to 16 bytes, that does not stay in L1: every element is used once.
template <typename T, int kCount = 16 / sizeof(T)>
DSCT_DEVICE Pack<T, kCount> load_pack(const T* pointer) {
#ifdef __CUDA_ARCH__
  return std::bit_cast<Pack<T, kCount>>(__ldcs(reinterpret_cast<const WordOf<sizeof(T) * kCount>*>(pointer)));
#else
  return *reinterpret_cast<const Pack<T, kCount>*>(pointer);
#endif
}

// One load through L1, for data that neighbours read too.
template <typename T, int kCount = 16 / sizeof(T)>
DSCT_DEVICE Pack<T, kCount> load_pack_cached(const T* pointer) {
#ifdef __CUDA_ARCH__
  return std::bit_cast<Pack<T, kCount>>(__ldg(reinterpret_cast<const WordOf<sizeof(T) * kCount>*>(pointer)));
#else
  return *reinterpret_cast<const Pack<T, kCount>*>(pointer);
#endif
}

template <typename T, int kCount>
DSCT_DEVICE void store_pack(T* pointer, const Pack<T, kCount>& pack) {
#ifdef __CUDA_ARCH__
  using Word = WordOf<sizeof(T) * kCount>;
  __stcs(reinterpret_cast<Word*>(pointer), std::bit_cast<Word>(pack));
#else
  *reinterpret_cast<Pack<T, kCount>*>(pointer) = pack;
#endif
}

// kCount numbers side by side, 16 bytes at a time where they come in such runs (which then start on 16 bytes).
template <int kCount, typename A>
DSCT_DEVICE void store_run(A* to, const A (&from)[kCount]) {
  constexpr int kSize = Pack<A>::kSize, kStep = kCount % kSize == 0 ? kSize : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    if constexpr (kStep == 1) {
      to[i] = from[i];
    } else {
      Pack<A> pack;
#pragma unroll
      for (int v = 0; v < kSize; ++v) pack.lane[v] = from[i + v];
      *reinterpret_cast<Pack<A>*>(to + i) = pack;
    }
  }
}

// 16 bytes from device memory to shared memory, past the registers; there after wait_for_copies() and a barrier.
template <typename T>
DSCT_DEVICE void copy_pack_async(T* to, const T* from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *reinterpret_cast<Pack<T>*>(to) = *reinterpret_cast<const Pack<T>*>(from);
#endif
}
DSCT_DEVICE void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// ------------------------------------------------------------------------------------------ one element, 16 or 32 bits
DSCT_DEVICE float load_number(const void* base, FloatType type, int64_t offset) {
  if (type == FloatType::kF32) return static_cast<const float*>(base)[offset];
  if (type == FloatType::kF16) return static_cast<const Half*>(base)[offset];
  return static_cast<const BFloat16*>(base)[offset];
}

DSCT_DEVICE void store_number(void* base, FloatType type, int64_t offset, float value) {
  if (type == FloatType::kF32) {
    static_cast<float*>(base)[offset] = value;
  } else if (type == FloatType::kF16) {
    static_cast<Half*>(base)[offset] = static_cast<Half>(value);
  } else {
    static_cast<BFloat16*>(base)[offset] = static_cast<BFloat16>(value);
  }
}

// ------------------------------------------------------------------------------------------------------- arithmetic
template <typename A>
DSCT_DEVICE A infinity() {
  return std::numeric_limits<A>::infinity();
}

// 2^x. ex2.approx is one instruction, within 2^-22 of the truth; results below 2^-126 become 0.
DSCT_DEVICE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
DSCT_DEVICE double exp2_fast(double x) { return ::exp2(x); }

// 1 / x within one unit in the last place, for x > 0 of no more than 2^126: one instruction. The host errs by as much
// as the hardware may, so that tests there hold for it.
DSCT_DEVICE float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = 1 / x;
  if (!(y > 0 && y < infinity<float>())) return y;
  return std::nextafter(y, std::bit_cast<uint32_t>(x) % 3 == 0 ? 0.0f : 2 * y);
#endif
}

// log(x) for x positive and normal, or NaN, which stays NaN: a polynomial, without the zeros, infinities and subnormal
// numbers that log() looks for.
DSCT_DEVICE float log_normal(float x) {
  const int bits = std::bit_cast<int>(x);
  const int exponent = (bits - 0x3F3504F3) & ~0x7FFFFF;  // of the power of two that leaves [0.707, 1.414)
  const float f = std::bit_cast<float>(bits - exponent) - 1;
  constexpr float kCoefficients[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                     -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                     2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  float p = kCoefficients[0];
#pragma unroll
  for (int i = 1; i < 9; ++i) p = fmaf(p, f, kCoefficients[i]);
  const float log_mantissa = fmaf(f * f, fmaf(f, p, -0.5f), f);
  return fmaf(static_cast<float>(exponent), 8.262958405176314e-8f, log_mantissa) + (x - x);  // ln2 / 2^23; NaN - NaN
}

// The larger of two, where NaN loses: one instruction. Sums of exponentials show a NaN instead.
DSCT_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }
DSCT_DEVICE double larger(double a, double b) { return ::fmax(a, b); }

// A number that another block has written: from L2, past this multiprocessor's own cache.
DSCT_DEVICE double load_from_l2(const double* from) {
#ifdef __CUDA_ARCH__
  return __ldcg(from);
#else
  return *from;
#endif
}

// ------------------------------------------------------------------------------------------------------- reductions
template <typename A>
DSCT_DEVICE A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

template <typename A>
DSCT_DEVICE A warp_max(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = larger(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// Sums kCount values over the block; every thread gets the sums. `scratch` holds kCount * 32 values and may be reused
// after the next barrier. blockDim.x is a multiple of 32.
template <int kCount, typename A>
DSCT_DEVICE void block_sum(A (&value)[kCount], A* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = warp_sum(value[i]);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[i * kWarp + warp] = value[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = warp_sum(lane < warps ? scratch[i * kWarp + lane] : A(0));
}

}  // namespace dsct::cuda
