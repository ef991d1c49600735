// The host's side of the CPU kernels of two logit maps: outputs, the walk over pixels, chunks of work.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "huge_pages.h"
#include "logit_view.h"
#include "tensor_types.h"

namespace dsct {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSerialLogits = 1 << 15;  // below, waking threads costs more than it saves
constexpr int64_t kChunkLogits = 1 << 16;   // work of one task; fixed, so that sums do not depend on the threads
constexpr int64_t kStreamBytes = 8 << 20;   // a gradient this large leaves the caches before backward reads it
constexpr int64_t kHugePageBytes = 4 << 20;

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

template <class Sizes>
inline std::string shape(const Sizes& sizes) {
  std::ostringstream s;
  s << "(";
  for (size_t i = 0; i < sizes.size(); i++) s << (i ? ", " : "") << sizes[i];
  s << (sizes.size() == 1 ? ",)" : ")");
  return s.str();
}

inline void check_logits(const Tensor& student, const Tensor& teacher) {
  const auto sizes = student.sizes();
  if (sizes.size() < 2 || sizes[1] < 2)
    fail("student_logits: expected shape (N, K) or (N, K, *spatial) with K >= 2, got " + shape(sizes));
  if (sizes.size() > kMaxPixelDims + 1) fail("student_logits: too many dimensions: " + shape(sizes));
  if (sizes[1] > (int64_t(1) << 24)) fail("student_logits: more than 2^24 classes: " + shape(sizes));
  const auto other = teacher.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), other.begin(), other.end()))
    fail("teacher_logits: expected the shape of student_logits, " + shape(sizes) + ", got " + shape(other));
  if (!teacher.is_cpu()) fail("teacher_logits: expected the device of student_logits, cpu");
}

// (N, *spatial) of logits.
inline std::vector<int64_t> pixel_sizes(const Tensor& logits) {
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end());
  sizes.erase(sizes.begin() + 1);
  return sizes;
}

// A fresh tensor on the CPU straight from libtorch's C shim: going through the dispatcher by name, as new_empty does,
// takes several times as long, and a small problem is all overhead.
inline Tensor fresh(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor fresh(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  for (int64_t d = int64_t(sizes.size()) - 1, stride = 1; d >= 0; stride *= std::max<int64_t>(sizes[d--], 1))
    strides[size_t(d)] = stride;
  return fresh(sizes, strides, dtype);
}

// As empty_like: the strides of x where those are dense and do not overlap.
inline Tensor fresh_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); d++)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t dense = 1;
  for (size_t d : order) {
    if (strides[d] != dense || sizes[d] == 0) return torch::stable::empty_like(x);
    dense *= sizes[d];
  }
  return fresh({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, x.scalar_type());
}

// Size and strides of the pixel dimensions, (N, *spatial), of every tensor that is walked.
struct PixelDim {
  int64_t size, student, teacher, target, grad;
  bool continues(const PixelDim& inner) const {
    return student == inner.student * inner.size && teacher == inner.teacher * inner.size &&
           target == inner.target * inner.size && grad == inner.grad * inner.size;
  }
};

inline std::vector<PixelDim> pixel_dims(const Tensor& student, const Tensor& teacher,
                                        const std::optional<Tensor>& target, const Tensor* grad) {
  std::vector<PixelDim> dims;
  for (int64_t d = 0; d < student.dim(); d++) {
    if (d == 1) continue;
    const int64_t label_dim = d == 0 ? 0 : d - 1;
    const PixelDim next = {student.size(d), student.stride(d), teacher.stride(d),
                           target.has_value() ? target->stride(label_dim) : 0, grad ? grad->stride(d) : 0};
    if (next.size == 1) continue;
    PixelDim outer = dims.empty() ? PixelDim{} : dims.back();
    if (!target.has_value() && !dims.empty()) outer.target = next.target * next.size;
    if (!dims.empty() && outer.continues(next)) {
      const int64_t size = dims.back().size * next.size;
      dims.back() = next;
      dims.back().size = size;
    } else {
      dims.push_back(next);
    }
  }
  if (dims.empty()) dims.push_back({1, 0, 0, 0, 0});
  return dims;
}

inline LogitView view(const Tensor& x, FloatType type) {
  LogitView v = {};
  v.data = x.const_data_ptr();
  v.type = type;
  v.class_stride = x.stride(1);
  v.extent = 1;
  for (int64_t d = 0; d < x.dim(); d++) v.extent += (x.size(d) - 1) * x.stride(d);
  return v;
}

inline void ask_for_gradient(LogitArgs& args, const Tensor& grad, FloatType type) {
  args.grad = view(grad, type);
  const int64_t bytes = grad.numel() * int64_t(grad.element_size());
  args.stream = bytes >= kStreamBytes;
  if (bytes >= kHugePageBytes) advise_huge_pages(grad.mutable_data_ptr(), size_t(bytes));
}

inline void set_walk(LogitArgs& args, const Tensor& student, const std::vector<PixelDim>& dims) {
  args.classes = student.size(1);
  args.pixels = 1;
  args.dims = int(dims.size());
  for (size_t d = 0; d < dims.size(); d++) {
    args.pixels *= dims[d].size;
    args.sizes[d] = dims[d].size;
    args.student.pixel_strides[d] = dims[d].student;
    args.teacher.pixel_strides[d] = dims[d].teacher;
    args.grad.pixel_strides[d] = dims[d].grad;
  }
}

// Pixels of one task.
inline int64_t chunk_pixels(int64_t classes) {
  return std::max<int64_t>(64, std::min<int64_t>(8192, kChunkLogits / classes / 64 * 64));
}

// A thread's working memory, kept from call to call.
inline void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t have = 0;
  if (have < bytes) {
    memory.reset();
    have = 0;
    memory.reset(::operator new(bytes, std::align_val_t(64)));
    have = bytes;
  }
  return memory.get();
}

// f(chunk, first pixel, last pixel) over all chunks. Every thread has a range of its own, and helps with the others'
// when it is done: a thread that lost its core for a while (data loaders) does not hold up the rest. Own ranges first,
// since two threads that touch the same huge page of a fresh gradient would both have it cleared.
template <class F>
void for_chunks(int64_t pixels, int64_t chunk, bool serial, const F& f) {
  const int64_t chunks = (pixels + chunk - 1) / chunk;
  const auto one = [&](int64_t i) { f(i, i * chunk, std::min(pixels, (i + 1) * chunk)); };
  const int64_t threads = serial ? 1 : std::min<int64_t>(chunks, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < chunks; i++) one(i);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; t++) {
    ranges[size_t(t)].next = chunks * t / threads;
    ranges[size_t(t)].end = chunks * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t other = 0; other < threads; other++) {
        Range& range = ranges[size_t((t + other) % threads)];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) one(i);
      }
  });
}

inline void store(const Tensor& to, int64_t i, double value) {
  if (to.scalar_type() == ScalarType::Double)
    static_cast<double*>(to.mutable_data_ptr())[i] = value;
  else
    static_cast<float*>(to.mutable_data_ptr())[i] = float(value);
}

}  // namespace dsct
