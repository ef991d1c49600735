// The schemas of every native op: the one list. Numbers that change from call to call are tensors: `values` (4,)
// float64 (weights of CE, TCKD, NCKD; temperature; without the first: no CE), `ignore_index` () int64, `temperatures`
// (2,) float64 (channel, spatial). Each lies on the CPU, where the host reads it, or beside the logits, where only
// kernels do. Kernels are registered beside it per device: CPU here, CUDA in ops_cuda.cpp. Arguments and results are
// explained in docs/ops.md; dsct_kernels/{tnkd,cafd,jaccard}/native.py call them, and what Triton shares of them stands
// in op.py there.
#include "cafd/cpu/ops.h"

#include <torch/csrc/stable/library.h>

#include "cafd/cpu/matched_ops.h"
#include "jaccard/cpu/ops.h"
#include "labels/cpu/ops.h"
#include "tnkd/cpu/ops.h"

STABLE_TORCH_LIBRARY(dsct_kernels, m) {
  m.def(
      "tnkd(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? class_weight, Tensor values, "
      "Tensor? ignore_index, bool coupled, int reduction, bool needs_grad) "
      "-> (Tensor loss, Tensor parts, Tensor grad, Tensor grad_scale)");
  m.def(
      "tnkd_upsampled(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? class_weight, Tensor "
      "values, "
      "Tensor? ignore_index, bool coupled, int reduction, bool align_corners, bool needs_grad) "
      "-> (Tensor loss, Tensor parts, Tensor grad, Tensor grad_scale)");
  m.def(
      "tnkd_upsampled_backward(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? class_weight, "
      "Tensor values, Tensor? ignore_index, bool coupled, bool align_corners, Tensor grad_output) -> Tensor");
  // In place: multiplies by a scalar that lives on the device, and does nothing when it is exactly 1. CUDA only.
  m.def("scale_(Tensor(a!) grad, Tensor factor) -> ()");
  m.def(
      "cafd(Tensor student_features, Tensor teacher_features, Tensor temperatures, int reduction, bool needs_grad) "
      "-> (Tensor loss, Tensor grad_map, Tensor stats)");
  m.def("attention_map(Tensor features, Tensor temperatures) -> (Tensor map, Tensor stats)");
  m.def("attention_map_backward(Tensor features, Tensor grad_map, Tensor stats, Tensor temperatures) -> Tensor");
  m.def(
      "matched_cafd(Tensor student, Tensor teacher, Tensor? mask, Tensor temperatures, bool uniform, int reduction) "
      "-> (Tensor loss, Tensor stats)");
  m.def(
      "matched_cafd_backward(Tensor student, Tensor teacher, Tensor? mask, Tensor stats, Tensor temperatures, "
      "Tensor grad_output, int reduction) -> Tensor");
  m.def(
      "jaccard(Tensor student_logits, Tensor teacher_logits, Tensor? share, Tensor temperature) "
      "-> (Tensor loss, Tensor coefficients)");
  m.def(
      "jaccard_backward(Tensor student_logits, Tensor teacher_logits, Tensor? share, Tensor temperature, "
      "Tensor coefficients) -> Tensor");
  m.def("labelled(Tensor target, int ignore_index, int height, int width, bool wide) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dsct_kernels, CPU, m) {
  m.impl("tnkd", TORCH_BOX(&dsct::tnkd_cpu));
  m.impl("tnkd_upsampled", TORCH_BOX(&dsct::tnkd_upsampled_cpu));
  m.impl("tnkd_upsampled_backward", TORCH_BOX(&dsct::tnkd_upsampled_backward_cpu));
  m.impl("cafd", TORCH_BOX(&dsct::cafd_cpu));
  m.impl("attention_map", TORCH_BOX(&dsct::attention_map_cpu));
  m.impl("attention_map_backward", TORCH_BOX(&dsct::attention_map_backward_cpu));
  m.impl("matched_cafd", TORCH_BOX(&dsct::matched_cafd_cpu));
  m.impl("matched_cafd_backward", TORCH_BOX(&dsct::matched_cafd_backward_cpu));
  m.impl("jaccard", TORCH_BOX(&dsct::jaccard_cpu));
  m.impl("jaccard_backward", TORCH_BOX(&dsct::jaccard_backward_cpu));
  m.impl("labelled", TORCH_BOX(&dsct::labelled_cpu));
}
