// What is known of a call: tnkd.cu fills it in, a plan completes it, and every kernel gets it as it is.
#pragma once

#include "common/cuda_math.h"

namespace dsct::cuda {

// Where the workspace keeps what.
struct Workspace {
  unsigned* ticket;
  double* largest_weight;    // of a class, 1 without class weights
  double *counts, *weights;  // count_blocks each
  double* partials;          // 3 sums a block of the main kernel
  void* codes;               // of the labels, up to a multiple of 8
  int count_blocks;
};

// All but the logits.
struct Call {
  const void* target;  // (N, *spatial), contiguous; nullptr, of logits smaller than the labels: the teacher's argmax
  LabelType target_type;
  const float* class_weight;  // (K,) or nullptr
  double ce_weight, tckd_weight, nckd_weight, temperature;
  bool has_ignore;
  int64_t ignore_index;
  // On the device, (4,) in the order above, or without cross-entropy (3,), and (); nullptr: the numbers above. Read by
  // the kernels, never by the host.
  const double* values;
  const int64_t* ignore_index_value;
  bool with_ce, mean;
  bool coupled;  // NCKD counts (1 - b^T) times: plain KD
  int classes;
  int64_t labels;  // in all
  float* loss;     // (), unused with a loss_map
  float* loss_map;
  float* parts;         // (3,)
  float* grad_scale;    // ()
  bool float16;         // the gradient
  double gathered = 1;  // the most that the weights of the pixels that share a number of it add up to
  Workspace work;
};

}  // namespace dsct::cuda
