// The machine file of a calibrated machine: what was measured, with residuals and valid ranges.
#pragma once

#include "src/train/measurements.h"

namespace cambium::sim {

std::string machine_text(const Measurements& measured);

}  // namespace cambium::sim
