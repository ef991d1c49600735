// What the CPU ops on feature maps share: their arguments as plain data, memory to work in, and torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "args.h"
#include "common/tensor_types.h"

namespace dsct {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements below which one more thread costs more than it does: some 25 us of work. A barrier takes 2 us on an idle
// machine and a time slice on a crowded one.
constexpr int64_t kMinWork = 128 * 1024;
constexpr int64_t kStreamBytes = int64_t(8) << 20;  // a gradient of this size has left the caches before it is used

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

inline Buffer allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<char*>(p));
}

template <class F>
void parallel(int64_t tasks, int64_t work_per_task, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kMinWork / std::max<int64_t>(1, work_per_task));
  torch::stable::parallel_for(0, tasks, grain, f);
}

inline Features features_of(const char* name, const Tensor& x) {
  if (x.dim() != 4)
    throw std::invalid_argument(std::string(name) + ": expected (N, C, H, W), got " + std::to_string(x.dim()) +
                                " dimensions");
  Features f{const_cast<void*>(x.const_data_ptr()),
             x.size(0),
             x.size(1),
             x.size(2),
             x.size(3),
             x.stride(0),
             x.stride(1),
             x.stride(2),
             x.stride(3)};
  if (f.C < 1 || f.H < 1 || f.W < 1) throw std::invalid_argument(std::string(name) + ": C, H and W must be at least 1");
  return f;
}

inline int64_t positions(const Features& x) { return x.H * x.W; }

// Channels innermost: walk position by position. With a single position both hold, and this is the longer run.
inline bool walk_positions(const Features& x) {
  const bool rows = (x.W == 1 || x.stride_w == 1) && (x.H == 1 || x.stride_h == x.W);
  return x.stride_c == 1 && x.C > 1 && (!rows || positions(x) == 1);
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }
inline ScalarType acc_type(bool is_double) { return is_double ? ScalarType::Double : ScalarType::Float; }

}  // namespace
}  // namespace dsct
