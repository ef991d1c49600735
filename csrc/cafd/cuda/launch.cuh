// Condensed CAFD on the GPU. Features are read twice forward (row statistics, then the map) and once backward, where
// each channel's gradient needs only its own row and two numbers per sample; or twice, where no block has a whole row.
//
//   channel_stats     per channel: max, sum of exponentials, sum of magnitudes
//   channel_weights   per sample: r_c and w_c
//   attention_maps    A and B
//   compare_maps      per sample: KL, and D = d loss / d A
//   map_products      per sample: sum A D, sum B D, sum w r
//   channel_rho       rho_c, if a channel's row is spread over the whole image (channels_last), or is long
//   channel_gradient  its gradient, and otherwise first rho_c, from a row that it holds in shared memory
//
// These sources also compile for the host.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace dsct::cuda {

// Statistics and maps of `count` networks, 1 or 2.
inline void maps_run(const Networks& nets, int count, const Device& device, cudaStream_t stream) {
  int64_t stats_blocks = 0, map_blocks = 0, samples = 0, channels = 0;
  int threads = 0;
  for (int i = 0; i < count; ++i) {
    const Network& net = nets.each[i];
    stats_blocks += net.plan.blocks, map_blocks += net.map_blocks(), samples += net.f.samples;
    channels = std::max(channels, net.f.channels), threads = std::max(threads, net.plan.threads);
  }
  launch("cafd", channel_stats, stats_blocks, threads, threads * sizeof(RowSums), stream, nets);
  launch_early("cafd", device, channel_weights, samples, sample_threads(channels, kCafdThreads), kWarp * sizeof(float),
               stream, nets);
  launch_early("cafd", device, attention_maps, map_blocks, kCafdThreads, 2 * kRun * kSums * sizeof(float), stream,
               nets);
}

// The whole forward of networks of one size, N > 0.
inline void cafd_run(const Networks& nets, float* grad_map, const Device& device, cudaStream_t stream) {
  maps_run(nets, 2, device, stream);
  const Features& f = nets.each[0].f;
  launch_early("cafd", device, compare_maps, f.samples, sample_threads(f.positions), kWarp * sizeof(float), stream,
               nets.losses, nets.each[0].stats, nets.each[1].stats, grad_map);
}

inline void backward_run(Backward in, float* workspace, const Device& device, cudaStream_t stream) {
  in.products = workspace, in.partial = workspace + 3 * in.f.samples;
  launch("cafd backward", map_products, in.f.samples, sample_threads(in.f.positions), 3 * kWarp * sizeof(float), stream,
         in);
  auto go = [&](auto kernel, size_t shared) {
    launch_early("cafd backward", device, kernel, in.plan.blocks, in.plan.threads, shared, stream, in);
  };
  if (in.held == 0) go(channel_rho, kSumsBytes);
  go(channel_gradient, kSumsBytes + in.held);
}

}  // namespace dsct::cuda
