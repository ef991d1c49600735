// The launch plan of TNKD in planes on a GPU, by the number of classes: dsct_kernels/tnkd/plan.py has the same for
// Triton, whose native build may be missing; hence a table that needs no build to be read.
#pragma once

namespace dsct {

struct PlanesRow {
  int most_classes, pixels_of_4, pixels_of_2, lanes, warps;  // warps: Triton's
  constexpr int pixels(int bytes) const { return bytes == 4 ? pixels_of_4 : pixels_of_2; }
};
inline constexpr PlanesRow kPlanes[] = {
#include "dsct_kernels/tnkd/planes.inc"
};

// Where so few lanes share a pixel.
constexpr int most_classes(int lanes) {
  int most = 0;
  for (const PlanesRow& row : kPlanes) most = row.lanes <= lanes ? row.most_classes : most;
  return most;
}
// That a lane holds of one pixel, if so many lanes share it.
constexpr int most_held(int lanes) {
  int most = 0;
  for (const PlanesRow& row : kPlanes) {
    const int held = (row.most_classes + row.lanes - 1) / row.lanes;
    most = row.lanes <= lanes && held > most ? held : most;
  }
  return most;
}

}  // namespace dsct
