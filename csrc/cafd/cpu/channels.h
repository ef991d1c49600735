// What a sample's channels share: their weights, and what the gradient takes of each.
#pragma once

#include "walk.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

template <class A, class T>
struct Channels : Walk<A, T> {
  using Base = Walk<A, T>;
  using Base::inverse_sum;
  using Base::map;
  using Base::mean_strength;
  using Base::mixed_map;
  using Base::pitch;
  using Base::relative;
  using Base::weight;
  using typename Base::S;
  using typename Base::V;

  static void weights(const Side& side, int64_t n) {
    const int64_t C = side.x.C;
    double* g = side.strength + n * C;
    S *w = weight(side, n), *r = relative(side, n);
    double mean = 0;
    for (int64_t c = 0; c < C; c++) mean += g[c];
    mean /= static_cast<double>(C);
    double max = -__builtin_inf();
    for (int64_t c = 0; c < C; c++) {
      g[c] = mean == 0 ? 1 : g[c] / mean;
      r[c] = static_cast<S>(g[c]);
      if (g[c] > max) max = g[c];
    }
    // In double: a temperature of 0.01 multiplies the rounding of r by a hundred.
    const double inv = 1 / side.channel_temperature;
    double total = 0;
    for (int64_t c = 0; c < C; c += F64::N) {
      const int left = static_cast<int>(C - c < F64::N ? C - c : F64::N);
      const F64::V v = left == F64::N ? F64::load(g + c) : load_n<F64>(g + c, left);
      const F64::V y = F64::keep(F64::first(left), exp_nonpositive<F64>((v - F64::set1(max)) * F64::set1(inv)));
      store_n<F64>(g + c, y, left);
      total += sum<F64>(y);
    }
    for (int64_t c = 0; c < C; c++) w[c] = static_cast<S>(g[c] / total);
    *mean_strength(side, n) = static_cast<S>(mean / static_cast<double>(side.x.H * side.x.W));
  }

  static void centre(const Side& side, int64_t n, const void* grad_map, int64_t stride_h, int64_t stride_w,
                     void* centred, Shared* shared) {
    const int64_t H = side.x.H, W = side.x.W, C = side.x.C;
    const S* from = static_cast<const S*>(grad_map);
    const S *a = map(side, n), *b = mixed_map(side, n);
    S* d = static_cast<S*>(centred);
    double total = 0, along = 0, least = __builtin_inf(), most = -__builtin_inf();
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < W; w++) {
        const double a_i = a[h * W + w], d_i = from[h * stride_h + w * stride_w];
        total += a_i;
        along += a_i * d_i;
        least = d_i < least ? d_i : least;
        most = d_i > most ? d_i : most;
      }
    // D - rho_c does not change when D is shifted. Where D hardly varies (student and teacher nearly agree) it is
    // shifted to its mean and keeps the digits that matter: 0 where they do agree. Only where no D_i would lose any by
    // that.
    const double mean = along / total;
    const double centre = most - mean < __builtin_fabs(mean) / 2 && mean - least < __builtin_fabs(mean) / 2 ? mean : 0;
    double mean_rho = 0, mixed = 0;
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < W; w++) {
        const int64_t i = h * W + w;
        d[i] = static_cast<S>(static_cast<double>(from[h * stride_h + w * stride_w]) - centre);
        mean_rho += static_cast<double>(a[i]) * d[i];
        mixed += static_cast<double>(b[i]) * d[i];
      }
    for (int64_t i = H * W; i < pitch(H * W); i++) d[i] = 0;
    double wr = 0;
    for (int64_t c = 0; c < C; c++) wr += static_cast<double>(weight(side, n)[c]) * relative(side, n)[c];
    shared->mean_rho = mean_rho;
    shared->mean_sr = (mixed - mean_rho * wr) / (side.channel_temperature * static_cast<double>(C));
  }

  // What multiplies e (D - rho) and sign(F) in a channel.
  struct Slope {
    S k, dg;
  };
  DSCT_INLINE Slope slopes(const Side& side, int64_t n, int64_t c, double rho, const Shared& shared) {
    const double w = weight(side, n)[c];
    const double s = w / side.channel_temperature * (rho - shared.mean_rho);
    const double mean = *mean_strength(side, n);
    const double dg = mean == 0 ? 0 : (s - shared.mean_sr) / mean / static_cast<double>(side.x.H * side.x.W);
    return {static_cast<S>(w * inverse_sum(side, n)[c] / side.spatial_temperature), static_cast<S>(dg)};
  }

  // dF of one channel: k e (D - rho) + sign(F) dg. e is exp_row's, p the features (both still in L1 or L2).
  DSCT_INLINE V gradient(V v, V e, V d, V k, V rho, V dg) {
    const V along_sign = A::select(A::lt(v, V{}), -dg, dg);
    return A::fma(k * e, d - rho, A::keep(A::ne(v, V{}), along_sign));
  }
};

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
