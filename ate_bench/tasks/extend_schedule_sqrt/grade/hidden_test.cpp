#include ".ate/hidden_test.inc"
#include "src/optim/sqrt_cooldown.h"

using namespace cambium;

static double worst(const SqrtCooldown& s, int64_t first, int64_t last) {
  double most = 0;
  for (int64_t step = first; step <= last; ++step) {
    double want = s.peak;
    if (step <= s.warmup) {
      want = s.peak * double(step) / double(s.warmup);
    } else if (step > s.total - s.cooldown && s.cooldown > 0) {
      const double x = std::fmin(1.0, double(step - s.total + s.cooldown) / double(s.cooldown));
      want = s.floor + (s.peak - s.floor) * (1 - std::sqrt(x));
    }
    const double e = std::abs(sqrt_cooldown_rate(s, step) - want) / s.peak;
    most = e <= most ? most : (e == e ? e : INFINITY);
  }
  return most;
}

int main() {
  const SqrtCooldown s = {3e-3, 1e-4, 10, 40, 200};
  hidden::within("warmup", worst(s, 1, 10), 1e-6);
  hidden::within("stable", worst(s, 11, 160), 1e-6);
  hidden::within("cooldown", worst(s, 161, 220), 1e-6);
  double edges = worst({1e-3, 0, 0, 0, 30}, 1, 40);
  edges = std::fmax(edges, worst({1e-3, 1e-5, 0, 30, 30}, 1, 35));
  edges = std::fmax(edges, worst({1e-3, 1e-5, 20, 20, 30}, 1, 35));
  hidden::within("edges", edges, 1e-6);
}
