// CAFD on the GPU. Features are read twice forward (row statistics, then the map) and once backward, where each
// channel's gradient needs only its own row and two numbers per sample.
//
//   channel_stats     per channel: max, sum of exponentials, sum of magnitudes
//   channel_weights   per sample: r_c and w_c
//   attention_maps    A and B over a share of the channels;  add_maps  joins the shares in order
//   compare_maps      per sample: KL, and D = d loss / d A
//   map_products      per sample: sum A D, sum B D, sum w r
//   row_backward      rho_c from a row held in shared memory, then its gradient: one read, one write
//   column_rho, column_backward   the same for channels_last, where a channel's row is spread over the whole image
//
// Kernels that read features have two ways to walk over them, rows and columns (network.cuh), and take any dtype.
// These sources also compile for the host.
#pragma once

#include "backward.cuh"
#include "compare.cuh"
#include "forward.cuh"

namespace dsct::cuda {

// Statistics and maps of `count` networks, 1 or 2: four launches. head: of a workspace.
inline void maps_run(const Network* each, int count, const Temperatures& temperatures, float* head,
                     const Device& device, cudaStream_t stream) {
  Networks nets{};
  Head* shared = reinterpret_cast<Head*>(head);
  nets.ticket = &shared->ticket;
  int64_t stats_blocks = 0, map_blocks = 0, samples = 0, channels = 0, add = 0;
  for (int i = 0; i < count; ++i) {
    nets.each[i] = each[i];
    stats_blocks += each[i].plan.blocks, map_blocks += each[i].plan.map_blocks;
    samples += each[i].f.samples, channels = std::max(channels, each[i].f.channels), add += add_blocks(each[i]);
  }
  nets.scales = scales_for(temperatures, shared, stream);
  launch("cafd", channel_stats, stats_blocks, kCafdThreads, kCafdThreads * sizeof(RowSums), stream, nets);
  launch_early("cafd", device, channel_weights, samples, sample_threads(channels, kCafdThreads), kWarp * sizeof(float),
               stream, nets);
  launch_early("cafd", device, attention_maps, map_blocks, kCafdThreads, 0, stream, nets);
  launch_early("cafd", device, add_maps, add, kCafdThreads, 0, stream, nets);
}

// The whole forward of networks of one size, N > 0.
inline void cafd_run(Comparison comparison, const Network (&networks)[2], const Temperatures& temperatures, float* head,
                     const Device& device, cudaStream_t stream) {
  maps_run(networks, 2, temperatures, head, device, stream);
  comparison.samples = networks[0].f.samples;
  comparison.ticket = &reinterpret_cast<Head*>(head)->ticket;
  launch_early("cafd", device, compare_maps, comparison.samples, sample_threads(networks[0].f.positions()),
               kWarp * sizeof(float), stream, comparison, networks[0].stats, networks[1].stats);
}

inline void backward_run(const Features& f, const Features& out, const CafdPlan& plan, const Temperatures& temperatures,
                         float* stats, const float* grad_map, float* workspace, const Device& device,
                         cudaStream_t stream) {
  if (f.samples == 0) return;
  float* products = workspace + kHead;
  const Backward in{f,
                    out,
                    plan,
                    scales_for(temperatures, reinterpret_cast<Head*>(workspace), stream),
                    {stats, f.channels, f.positions()},
                    grad_map,
                    products,
                    products + 3 * f.samples};
  launch("cafd backward", map_products, f.samples, sample_threads(f.positions()), 3 * kWarp * sizeof(float), stream,
         in);
  auto go = [&](auto kernel, size_t shared) {
    launch_early("cafd backward", device, kernel, plan.blocks, kCafdThreads, shared, stream, in);
  };
  if (plan.columns) {
    go(column_rho, kCafdThreads * sizeof(float));
    go(column_backward, 0);
  } else {
    go(row_backward, kCafdThreads * sizeof(float) + plan.held * kCafdThreads * kRun * size_of(f.type));
  }
}

}  // namespace dsct::cuda
