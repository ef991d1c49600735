// CAFD on the GPU. Features are read twice forward (row statistics, then the map) and once backward, where each
// channel's gradient needs only its own row and two numbers per sample.
//
//   row_stats / column_stats    per channel: max, sum of exponentials, sum of magnitudes
//   channel_weights             per sample: r_c and w_c
//   row_maps / column_maps      A and B over a share of the channels;  add_maps  joins the shares in order
//   compare_maps                per sample: KL, and D = d loss / d A
//   map_products                per sample: sum A D, sum B D, sum w r
//   row_backward                rho_c from a row held in registers, then its gradient: one read, one write
//   column_rho, column_backward the same for channels_last, where a channel's row is spread over the whole image
//
// row_*: a channel's positions lie side by side (NCHW), or anywhere at all (Anywhere). column_*: a position's channels
// lie side by side (channels_last, and tokens (N, L, C) viewed as images). These sources also compile for the host.
#pragma once

#include <type_traits>

#include "backward.cuh"
#include "compare.cuh"
#include "maps.cuh"
#include "plan.cuh"
#include "stats.cuh"

namespace dsct::cuda {

// Statistics and maps of `count` networks, 1 or 2, that share dtype and layout: four launches, and one more where the
// temperatures are on the device.
template <typename A>
void maps_run(const Network<A>* each, int count, Layout layout, const Temperatures& temperatures, unsigned* ticket,
              const Device& device, cudaStream_t stream) {
  Networks<A> nets{};
  nets.ticket = ticket;
  const Scales<A> scales = scales_of<A>(temperatures.channel, temperatures.spatial);
  nets.scale2 = scales.spatial2, nets.channel_scale2 = scales.channel2;
  int64_t stats_blocks = 0, map_blocks = 0, samples = 0, add = 0;
  for (int i = 0; i < count; ++i) {
    nets.each[i] = each[i];
    stats_blocks += each[i].stats_blocks, map_blocks += each[i].map_blocks;
    samples += each[i].f.samples, add += add_blocks(each[i]);
  }
  if (samples == 0) return;
  if (temperatures.values != nullptr) {
    launch("cafd", read_temperatures<A>, 1, 1, 0, stream, temperatures.values, each[0].scales);
    nets.on_device = each[0].scales;
  }
  auto go = [&](auto stats_kernel, auto maps_kernel, size_t shared) {
    launch("cafd", stats_kernel, stats_blocks, kCafdThreads, shared, stream, nets);
    launch_early("cafd", device, channel_weights<A>, samples, kCafdThreads, kWarp * sizeof(A), stream, nets);
    launch_early("cafd", device, maps_kernel, map_blocks, kCafdThreads, 0, stream, nets);
    launch_early("cafd", device, add_maps<A>, add, kCafdThreads, 0, stream, nets);
  };
  const size_t row_shared = kCafdWarps * sizeof(RowSums<A>);
  if (layout == Layout::kAny) return go(row_stats<Anywhere<A>>, row_maps<Anywhere<A>>, row_shared);
  if constexpr (std::is_same_v<A, float>) {
    auto by_dtype = [&](auto type) {
      using T = decltype(type);
      if (layout == Layout::kRows) return go(row_stats<SideBySide<T>>, row_maps<SideBySide<T>>, row_shared);
      go(column_stats<T>, column_maps<T>, kCafdThreads * sizeof(RowSums<float>));
    };
    switch (each[0].f.type) {
      case FloatType::kF32:
        return by_dtype(float());
      case FloatType::kF16:
        return by_dtype(Half());
      default:
        return by_dtype(BFloat16());
    }
  }
}

template <typename A>
__global__ void no_samples(A* loss) {
  *loss = 0;
}

// The whole forward: both networks' maps, in the same launches where they share dtype and layout, then the loss.
template <typename A, typename SA, typename TA>
void cafd_run(const Comparison<A>& comparison, const Network<SA>& student, const CafdPlan& student_plan,
              const Network<TA>& teacher, const CafdPlan& teacher_plan, const Temperatures& temperatures, SA* grad_map,
              const Device& device, cudaStream_t stream) {
  if (comparison.samples == 0) {
    if (comparison.loss != nullptr) launch("cafd", no_samples<A>, 1, 1, 0, stream, comparison.loss);
    return;
  }
  bool together = student_plan.layout == teacher_plan.layout &&
                  (student_plan.layout == Layout::kAny || student.f.type == teacher.f.type);
  if constexpr (std::is_same_v<SA, TA>) {
    if (together) {
      const Network<SA> both[2] = {student, teacher};
      maps_run(both, 2, student_plan.layout, temperatures, comparison.ticket, device, stream);
    }
  } else {
    together = false;
  }
  if (!together) {
    maps_run(&student, 1, student_plan.layout, temperatures, comparison.ticket, device, stream);
    maps_run(&teacher, 1, teacher_plan.layout, temperatures, comparison.ticket, device, stream);
  }
  launch_early("cafd", device, compare_maps<A, SA, TA>, comparison.samples, sample_threads(student.f.positions()),
               2 * kWarp * sizeof(A), stream, comparison, student.stats, teacher.stats, grad_map);
}

template <typename A>
void backward_run(const Features& f, const Features& out, const CafdPlan& plan, const Temperatures& temperatures,
                  A* stats_base, const A* grad_map, A* workspace, const Device& device, cudaStream_t stream) {
  if (f.samples == 0) return;
  const Scales<A> scales = scales_of<A>(temperatures.channel, temperatures.spatial);
  const A scale = scales.spatial, channel_scale = scales.channel;
  Scales<A>* on_device = nullptr;
  if (temperatures.values != nullptr) {
    on_device = reinterpret_cast<Scales<A>*>(workspace);
    launch("cafd backward", read_temperatures<A>, 1, 1, 0, stream, temperatures.values, on_device);
  }
  const Stats<A> stats = {stats_base, f.channels, f.positions()};
  A* products = workspace + 4;
  launch("cafd backward", map_products<A>, f.samples, sample_threads(f.positions()), 3 * kWarp * sizeof(A), stream,
         stats, grad_map, products);
  auto rows = [&](auto kernel) {
    launch_early("cafd backward", device, kernel, plan.row_blocks, kCafdThreads, kCafdWarps * sizeof(A), stream, f, out,
                 plan.row_warps, channel_scale, scale, on_device, stats, grad_map, products);
  };
  if (plan.layout == Layout::kAny) return rows(row_backward<Anywhere<A>, 0>);
  if constexpr (std::is_same_v<A, float>) {
    auto by_dtype = [&](auto type) {
      using T = decltype(type);
      if (plan.layout == Layout::kRows) {
        switch (plan.held) {
          case 4:
            return rows(row_backward<SideBySide<T>, 4>);
          case 8:
            return rows(row_backward<SideBySide<T>, 8>);
          case 16:
            return rows(row_backward<SideBySide<T>, 16>);
          default:
            return rows(row_backward<SideBySide<T>, 0>);
        }
      }
      float* partial = products + 3 * f.samples;
      launch_early("cafd backward", device, column_rho<T>, plan.column_blocks, kCafdThreads,
                   kCafdThreads * sizeof(float), stream, f, plan.columns, scale, on_device, stats, grad_map, partial);
      launch_early("cafd backward", device, column_backward<T>, plan.column_blocks, kCafdThreads, 0, stream, f, out,
                   plan.columns, channel_scale, scale, on_device, stats, grad_map, products, partial);
    };
    switch (f.type) {
      case FloatType::kF32:
        return by_dtype(float());
      case FloatType::kF16:
        return by_dtype(Half());
      default:
        return by_dtype(BFloat16());
    }
  }
}

}  // namespace dsct::cuda
