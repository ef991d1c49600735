// CAFD's loops over the features, compiled once per instruction set (common/vec.h). Spec:
//
//     P_{c,i} = softmax_i(F_{c,i} / T)
//     w = softmax_c(r / channel_temperature),  r_c = g_c / mean(g),  g_c = mean_i |F|
//     A_i = sum_c w_c P_{c,i},  B_i = sum_c w_c r_c P_{c,i}
//
// The forward reads a sample twice, the second time from cache. By rows the first read only takes max and |F|, for then
// the weights are known and the second read needs each exp once. By positions a channel's sum of exp is known only
// after a whole read, so both reads take the exp.
#pragma once

#include "divergence.h"
#include "positions.h"
#include "rows.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

template <class A, class T>
constexpr CafdLoops table() {
  using C = Channels<A, T>;
  using R = Rows<A, T>;
  using P = Positions<A, T>;
  return {sizeof(typename A::S), C::pitch,        C::moments_bytes, C::scratch,       R::moments_rows,
          P::moments_positions,  P::join_moments, C::weights,       R::attend_rows,   P::attend_positions,
          R::join_maps,          C::centre,       R::backward_rows, P::rho_positions, P::join_rho,
          P::backward_positions};
}

constexpr CafdKernels kernels = {{table<F32, f16>(), table<F32, bf16>(), table<F32, float>(), table<F64, double>()},
                                 divergence};

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
