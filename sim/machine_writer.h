// The machine file of a calibrated machine: what was measured, with residuals and valid ranges.
#pragma once

#include "src/train/measurements.h"

namespace cambium::sim {

std::string machine_text(const Measurements& measured);

// Machine file `base` (a name or a path) under another name, with these times of collectives
// instead of its own. `source` says where they come from.
struct MeasuredLinks {
  std::string base, name, source;
  std::vector<MeasuredCollective> collectives;
};
std::string machine_text(const MeasuredLinks& measured);

}  // namespace cambium::sim
