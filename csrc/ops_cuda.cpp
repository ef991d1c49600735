// The CUDA kernels of the ops whose schemas stand in ops.cpp. Built only where torch has CUDA and an nvcc is found.
#include <torch/csrc/stable/library.h>

#include "cafd/cuda/ops.h"
#include "tnkd/cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(dsct_kernels, CUDA, m) {
  m.impl("tnkd", TORCH_BOX(&dsct::tnkd_cuda));
  m.impl("tnkd_upsampled", TORCH_BOX(&dsct::tnkd_upsampled_cuda));
  m.impl("scale_", TORCH_BOX(&dsct::scale_cuda_));
  m.impl("cafd", TORCH_BOX(&dsct::cafd_cuda));
  m.impl("attention_map", TORCH_BOX(&dsct::attention_map_cuda));
  m.impl("attention_map_backward", TORCH_BOX(&dsct::attention_map_backward_cuda));
  m.impl("matched_cafd", TORCH_BOX(&dsct::matched_cafd_cuda));
  m.impl("matched_cafd_backward", TORCH_BOX(&dsct::matched_cafd_backward_cuda));
}
