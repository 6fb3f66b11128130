#include "src/optim/lr_schedule.h"

#include <algorithm>

#include "src/base/fmath.h"

namespace cambium {

double learning_rate(const Config& config, const Derived& derived, int64_t step) {
  const double peak = config.optimizer.lr, floor = peak * config.schedule.min_lr_ratio;
  const int64_t warmup = derived.warmup_steps, total = config.train.steps;
  if (step <= warmup) return peak * static_cast<double>(step) / static_cast<double>(warmup);
  switch (config.schedule.kind) {
    case ScheduleKind::constant:
      return peak;
    case ScheduleKind::cosine: {
      const double span = static_cast<double>(std::max<int64_t>(1, total - warmup));
      const double done = std::min(1.0, static_cast<double>(step - warmup) / span);
      constexpr double kPi = 3.14159265358979323846;
      return floor + (peak - floor) * 0.5 * (1.0 + fmath::cos(kPi * done));
    }
    case ScheduleKind::wsd: {
      const int64_t decay = derived.decay_steps, first = total - decay;
      if (step <= first || decay == 0) return peak;
      const double done =
          std::min(1.0, static_cast<double>(step - first) / static_cast<double>(decay));
      return peak + (floor - peak) * done;
    }
  }
  return peak;
}

}  // namespace cambium
