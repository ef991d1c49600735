// Between the CPU ops (cafd.cpp) and their loops (loops.h): plain data, and one table of functions per
// instruction set. No standard library and no external inline function in here (common/vec.h says why).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/types.h"

namespace dsct {

// (N, C, H, W) in memory; strides in elements. Position i is (i / W, i % W).
struct Features {
  void* data;
  int64_t N, C, H, W;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// One network's features and what is known of them. acc: float, or double for double features.
struct Side {
  Features x;
  double channel_temperature, spatial_temperature;
  void* stats;       // acc (N, 4 C + 2 H W + 1), rows as in ops.h
  double* strength;  // (N, C), forward only: sum_i |F_{c,i}|
};

// Bytes that are read next, to be fetched from memory while something else is computed.
struct Ahead {
  const char *next, *end;
};

// What a sample's channels share in the backward.
struct Shared {
  double mean_rho;  // sum_k w_k rho_k
  double mean_sr;   // 1/C sum_k s_k r_k
};

// The loops over one dtype of features. n is the sample; begin and end are channels in the *_rows functions, which want
// a channel's positions side by side (contiguous), and positions in the *_positions ones, which want a position's
// channels side by side (channels_last). Arrays handed in are acc and padded to pitch() elements a row.
struct CafdLoops {
  size_t acc_size;
  int64_t (*pitch)(int64_t count);            // count, rounded up to whole vectors
  int64_t (*moments_bytes)(const Features&);  // of one part of moments_positions
  size_t (*scratch)(const Features&);         // bytes that any function here may ask for

  // Forward, first read. Rows: each channel's maximum and strength, into side. Positions: every channel's maximum, sum
  // of exp (acc) and strength (double) over this block, into part.
  void (*moments_rows)(const Side&, int64_t n, int64_t begin, int64_t end, void* scratch);
  void (*moments_positions)(const Side&, int64_t n, int64_t begin, int64_t end, void* part, void* scratch);
  void (*join_moments)(const Side&, int64_t n, const void* parts, int64_t blocks);  // of positions
  void (*weights)(const Side&, int64_t n);
  // Forward, second read: A and, if mixed, B. Rows: these channels' share, into part (2, H W). Positions: final.
  void (*attend_rows)(const Side&, int64_t n, int64_t begin, int64_t end, bool mixed, Ahead, void* part, void* scratch);
  void (*attend_positions)(const Side&, int64_t n, int64_t begin, int64_t end, bool mixed, Ahead, void* scratch);
  void (*join_maps)(const Side&, int64_t n, int64_t begin, int64_t end, bool mixed, const void* parts, int64_t blocks);

  // Backward. stream: write past the caches. grad_map: D (H, W) of the sample. centred (H W): D less a constant.
  void (*centre)(const Side&, int64_t n, const void* grad_map, int64_t stride_h, int64_t stride_w, void* centred,
                 Shared* shared);
  void (*backward_rows)(const Side&, int64_t n, int64_t begin, int64_t end, const void* centred, const Shared&,
                        const Features& out, bool stream, void* scratch);
  // Positions: rho takes a read of its own. part: double (2, C), not padded.
  void (*rho_positions)(const Side&, int64_t n, int64_t begin, int64_t end, const void* centred, void* part,
                        void* scratch);
  void (*join_rho)(const Side&, const void* parts, int64_t blocks, double* rho);
  void (*backward_positions)(const Side&, int64_t n, int64_t begin, int64_t end, const void* centred, const double* rho,
                             const Shared&, const Features& out, bool stream, void* scratch);
};

struct CafdKernels {
  CafdLoops loops[4];  // by FloatType
  // sum_i a~ log(a~ / b~) over `count` of `positions` positions, a the teacher's map and b the student's; with grad,
  // scale * its derivative by b_i as well. The flags say which arrays are double.
  double (*divergence)(const void* student, bool student_double, const void* teacher, bool teacher_double,
                       int64_t count, int64_t positions, double scale, void* grad, bool grad_double);
};

const CafdKernels& cafd_kernels_default();
const CafdKernels& cafd_kernels_avx2();
const CafdKernels& cafd_kernels_avx512();

}  // namespace dsct
