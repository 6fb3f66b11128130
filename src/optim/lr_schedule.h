// Learning-rate schedules: pure functions of the step, through src/base/fmath.h (contract D1).
//
//   warm-up   lr * step / warmup_steps                          for step <= warmup_steps
//   constant  lr
//   cosine    from lr to lr * min_lr_ratio over the steps after warm-up
//   wsd       lr, then a linear fall to lr * min_lr_ratio over the last decay_steps
#pragma once

#include <cstdint>

#include "src/config/config.h"
#include "src/config/derive.h"

namespace cambium {

// The rate of 1-based `step`.
double learning_rate(const Config& config, const Derived& derived, int64_t step);

}  // namespace cambium
