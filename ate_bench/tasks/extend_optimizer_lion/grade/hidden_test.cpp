#include ".ate/hidden_test.inc"
#include "kernels/lion.h"

using namespace cambium;

struct LionState {
  std::vector<float> p, m;
};
static void step(LionState& s, std::vector<float>& g, LionArgs a, int threads) {
  const auto n = static_cast<int64_t>(s.p.size());
  Workers workers(threads);
  a.param = InOut<float>(s.p.data(), Shape(n));
  a.momentum = InOut<float>(s.m.data(), Shape(n));
  a.grad = In<float>(g.data(), Shape(n));
  reference::lion(a, workers);
}

int main() {
  const size_t n = 20011;
  LionArgs a;
  a.lr = 0.01f, a.beta1 = 0.9f, a.beta2 = 0.97f, a.weight_decay = 0.3f, a.grad_scale = 0.25f;
  for (const int steps : {1, 30}) {
    LionState s = {hidden::random(n), hidden::random(n)}, other = s;
    std::vector<double> p(s.p.begin(), s.p.end()), m(s.m.begin(), s.m.end());
    for (int k = 0; k < steps; ++k) {
      std::vector<float> g = hidden::random(n, 4.0);
      if (k == 0) g[5] = 0, s.m[5] = other.m[5] = 0, m[5] = 0;  // sign(0) = 0
      step(s, g, a, 1);
      step(other, g, a, 3);
      for (size_t i = 0; i < n; ++i) {
        const double gi = double(g[i]) * a.grad_scale;
        const double c = double(a.beta1) * m[i] + (1 - double(a.beta1)) * gi;
        p[i] -= double(a.lr) * ((c > 0) - (c < 0) + double(a.weight_decay) * p[i]);
        m[i] = double(a.beta2) * m[i] + (1 - double(a.beta2)) * gi;
      }
    }
    // A sign may flip where c is rounding error of zero: an element in a thousand at most.
    size_t far = 0;
    for (size_t i = 0; i < n; ++i) far += std::abs(s.p[i] - p[i]) > 1e-4 || !(s.p[i] == s.p[i]);
    const bool good = far <= n / 1000 && hidden::error(s.m, m) < 1e-5 &&
                      std::abs(double(s.p[5]) - p[5]) < 1e-4;
    hidden::verdict(steps == 1 ? "one_step" : "thirty_steps", good, double(far));
    if (steps == 30) hidden::verdict("threads", s.p == other.p && s.m == other.m, 0);
  }
  LionState s = {hidden::random(n), std::vector<float>(n, 0.0f)};
  const std::vector<float> target = hidden::random(n);
  double first = 0, last = 0;
  a.weight_decay = 0;
  for (int k = 0; k <= 30; ++k) {
    std::vector<float> g(n);
    last = 0;
    for (size_t i = 0; i < n; ++i) g[i] = s.p[i] - target[i], last += 0.5 * g[i] * g[i];
    if (k == 0) first = last;
    step(s, g, a, 2);
  }
  hidden::verdict("descent", last < 0.6 * first, last / first);
}
