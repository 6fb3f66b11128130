cat >src/optim/sqrt_cooldown.h <<'H'
// Warm-up, stable, 1-sqrt cooldown (Hägele et al., arXiv 2405.18392).
//
//   cooldown: floor + (peak - floor) * (1 - sqrt(x)), x the share of it that is done
#pragma once

#include <cstdint>

namespace cambium {

struct SqrtCooldown {
  double peak = 0, floor = 0;
  int64_t warmup = 0, cooldown = 0, total = 0;  // steps
};

// The rate of 1-based `step`.
double sqrt_cooldown_rate(const SqrtCooldown& schedule, int64_t step);

}  // namespace cambium
H
cat >src/optim/sqrt_cooldown.cc <<'H'
#include "src/optim/sqrt_cooldown.h"

#include <algorithm>
#include <cmath>

namespace cambium {

double sqrt_cooldown_rate(const SqrtCooldown& s, int64_t step) {
  if (step <= s.warmup) return s.peak * static_cast<double>(step) / static_cast<double>(s.warmup);
  const int64_t first = s.total - s.cooldown;
  if (s.cooldown == 0 || step <= first) return s.peak;
  const double x = static_cast<double>(step - first) / static_cast<double>(s.cooldown);
  return s.floor + (s.peak - s.floor) * (1.0 - std::sqrt(std::min(1.0, x)));
}

}  // namespace cambium
H
