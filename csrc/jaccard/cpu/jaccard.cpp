// The ops of the soft Jaccard loss on CPU: checks, outputs, and the kernels over chunks of pixels.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "args.h"
#include "common/cpu_isa.h"
#include "common/cpu_logits.h"
#include "common/cpu_numbers.h"
#include "ops.h"

namespace dsct {
namespace {

const JaccardKernels& kernels(bool is_double) {
#ifdef DSCT_X86_ISAS
  if (cpu_isa() == CpuIsa::kAvx512) return is_double ? avx512::jaccard_kernels_f64 : avx512::jaccard_kernels_f32;
  if (cpu_isa() == CpuIsa::kAvx2) return is_double ? avx2::jaccard_kernels_f64 : avx2::jaccard_kernels_f32;
#endif
  return is_double ? baseline::jaccard_kernels_f64 : baseline::jaccard_kernels_f32;
}

struct Problem {
  JaccardArgs args;
  ScalarType acc;
  const JaccardKernels* kernel;
  size_t scratch_bytes;
  int64_t chunk;
  bool serial;
};

Problem problem(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& share,
                const Tensor& temperature, const Tensor* grad) {
  const FloatType student_type = float_type("student_logits", student);
  const FloatType teacher_type = float_type("teacher_logits", teacher);
  check_logits(student, teacher);
  const bool is_double = student_type == FloatType::kF64 || teacher_type == FloatType::kF64;
  Problem p = {};
  p.acc = is_double ? ScalarType::Double : ScalarType::Float;
  p.args.temperature = *numbers_of<double>("temperature", temperature, 1);
  if (!(p.args.temperature > 0 && std::isfinite(p.args.temperature)))
    fail("temperature: expected a finite number > 0, got " + std::to_string(p.args.temperature));
  if (share.has_value()) {
    const std::vector<int64_t> expected = pixel_sizes(student);
    const auto sizes = share->sizes();
    if (!std::equal(expected.begin(), expected.end(), sizes.begin(), sizes.end()) || share->scalar_type() != p.acc ||
        !share->is_contiguous() || !share->is_cpu())
      fail("share: expected a contiguous " + shape(expected) + " tensor on cpu in the accumulation dtype, got shape " +
           shape(sizes));
    p.args.share = share->const_data_ptr();
  }
  p.args.student = view(student, student_type);
  p.args.teacher = view(teacher, teacher_type);
  if (grad != nullptr) ask_for_gradient(p.args, *grad, student_type);
  set_walk(p.args, student, pixel_dims(student, teacher, std::nullopt, grad));
  p.kernel = &kernels(is_double);
  p.scratch_bytes = p.kernel->scratch_bytes(p.args);
  p.chunk = chunk_pixels(p.args.classes);
  p.serial = p.args.pixels * p.args.classes < kSerialLogits;
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor> jaccard_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                       const std::optional<Tensor>& share, const Tensor& temperature) {
  const Problem p = problem(student_logits, teacher_logits, share, temperature, nullptr);
  const int64_t classes = p.args.classes;
  const Tensor loss = fresh({}, p.acc);
  const Tensor coefficients = fresh({2, classes}, ScalarType::Double);

  // Each chunk's sums are kept and joined in order: the same bits for any number of threads.
  const size_t each = size_t(3 * classes);
  std::vector<double> of_chunks(size_t((p.args.pixels + p.chunk - 1) / p.chunk) * each);
  for_chunks(p.args.pixels, p.chunk, p.serial, [&](int64_t i, int64_t begin, int64_t end) {
    p.kernel->sums(p.args, begin, end, scratch(p.scratch_bytes), &of_chunks[size_t(i) * each]);
  });
  std::vector<double> sums(each, 0);
  for (size_t i = 0; i < of_chunks.size(); i += each)
    for (size_t k = 0; k < each; k++) sums[k] += of_chunks[i + k];

  const double *sum_p = sums.data(), *sum_q = sum_p + classes, *apart = sum_q + classes;
  int64_t there = 0;
  bool bad = false;  // a NaN in any class: a class that the teacher does not see must not hide it
  for (int64_t c = 0; c < classes; c++) {
    there += sum_q[c] > 0.5;
    bad |= std::isnan(sum_p[c] + sum_q[c] + apart[c]);
  }
  double total = 0;
  double* a = static_cast<double*>(coefficients.mutable_data_ptr());
  double* b = a + classes;
  for (int64_t c = 0; c < classes; c++) {
    a[c] = b[c] = bad ? std::numeric_limits<double>::quiet_NaN() : 0;
    if (bad || !(sum_q[c] > 0.5)) continue;
    const double both = sum_p[c] + sum_q[c], all = both + apart[c];
    total += 2 * apart[c] / all;  // 1 - IoU, with its digits where it is small
    a[c] = -2 * apart[c] / (double(there) * all * all);
    b[c] = 2 * both / (double(there) * all * all);
  }
  store(loss, 0, bad ? std::numeric_limits<double>::quiet_NaN() : there > 0 ? total / double(there) : 0);
  return {loss, coefficients};
}

Tensor jaccard_backward_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                            const std::optional<Tensor>& share, const Tensor& temperature, const Tensor& coefficients) {
  const Tensor grad = fresh_like(student_logits);
  Problem p = problem(student_logits, teacher_logits, share, temperature, &grad);
  if (coefficients.dim() != 2 || coefficients.size(0) != 2 || coefficients.size(1) != p.args.classes ||
      coefficients.scalar_type() != ScalarType::Double || !coefficients.is_contiguous() || !coefficients.is_cpu())
    fail("coefficients: expected a contiguous (2, " + std::to_string(p.args.classes) +
         ") tensor of float64 on cpu, got shape " + shape(coefficients.sizes()));
  p.args.coefficients = static_cast<const double*>(coefficients.const_data_ptr());
  for_chunks(p.args.pixels, p.chunk, p.serial, [&](int64_t, int64_t begin, int64_t end) {
    p.kernel->backward(p.args, begin, end, scratch(p.scratch_bytes));
  });
  return grad;
}

}  // namespace dsct
