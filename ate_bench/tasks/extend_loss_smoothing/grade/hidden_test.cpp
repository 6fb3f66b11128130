#include ".ate/hidden_test.inc"
#include "kernels/smoothed_cross_entropy.h"

using namespace cambium;
using Floats = std::vector<float>;

struct Result {
  Floats loss, gradient;
};
static Result call(const Floats& logits, const std::vector<int32_t>& target, int64_t V, float eps) {
  const auto T = static_cast<int64_t>(target.size());
  Result r = {Floats(target.size(), NAN), Floats(logits.size(), NAN)};
  SmoothedCrossEntropyArgs a;
  a.logits_TV = In<float>(logits.data(), Shape(T, V));
  a.target_T = In<int32_t>(target.data(), Shape(T));
  a.loss_T = Out<float>(r.loss.data(), Shape(T));
  a.d_logits_TV = Out<float>(r.gradient.data(), Shape(T, V));
  a.epsilon = eps;
  Workers workers(2);
  reference::smoothed_cross_entropy(a, workers);
  return r;
}
static double plain(const float* z, int32_t target, int64_t V, double eps, double* gradient) {
  double most = -INFINITY, total = 0, loss = 0;
  for (int64_t v = 0; v < V; ++v) most = std::fmax(most, z[v]);
  for (int64_t v = 0; v < V; ++v) total += std::exp(z[v] - most);
  for (int64_t v = 0; v < V; ++v) {
    const double q = eps / double(V) + (v == target ? 1 - eps : 0);
    const double log_p = z[v] - most - std::log(total);
    loss -= q * log_p;
    if (gradient) gradient[v] = std::exp(log_p) - q;
  }
  return loss;
}
static void compare(const char* loss_name, const char* gradient_name, double scale) {
  const int64_t T = 37, V = 203;
  const Floats z = hidden::random(T * V, scale);
  std::vector<int32_t> target(T);
  for (int64_t t = 0; t < T; ++t) target[t] = int32_t((t * 31) % V);
  const Result r = call(z, target, V, 0.125f);
  std::vector<double> loss(T), gradient(T * V);
  for (int64_t t = 0; t < T; ++t)
    loss[t] = plain(&z[t * V], target[t], V, 0.125, &gradient[t * V]);
  const double e = hidden::error(r.loss, loss), d = hidden::error(r.gradient, gradient);
  hidden::within(loss_name, gradient_name ? e : std::fmax(e, d), 1e-5);
  if (gradient_name) hidden::within(gradient_name, d, 1e-5);
}

int main() {
  compare("loss", "gradient", 3.0);
  const int64_t V = 19;
  Floats z = hidden::random(V, 2.0);
  const Result r = call(z, {4}, V, 0.3f);
  Floats numeric(V);
  for (int64_t v = 0; v < V; ++v) {  // differences of the op's own loss
    Floats up = z, down = z;
    up[v] += 0.01f, down[v] -= 0.01f;
    numeric[v] = (call(up, {4}, V, 0.3f).loss[0] - call(down, {4}, V, 0.3f).loss[0]) /
                 (up[v] - down[v]);
  }
  hidden::within("finite_differences", hidden::error(r.gradient, numeric), 1e-3);
  const Result ignored = call(hidden::random(3 * V), {1, -1, 2}, V, 0.2f);
  bool zero = ignored.loss[1] == 0 && ignored.loss[0] > 0;
  for (int64_t v = 0; v < V; ++v) zero = zero && ignored.gradient[V + v] == 0;
  hidden::verdict("ignored", zero, ignored.loss[1]);
  compare("large_logits", nullptr, 300.0);
  const Floats batch = hidden::random(33 * 203);
  std::vector<int32_t> target(33, 7);
  const Result whole = call(batch, target, 203, 0.1f);
  bool same = true;
  for (int64_t t = 0; t < 33; ++t) {
    const Result one = call(Floats(&batch[t * 203], &batch[t * 203] + 203), {7}, 203, 0.1f);
    same = same && one.loss[0] == whole.loss[t];
    for (int64_t v = 0; v < 203; ++v) same = same && one.gradient[v] == whole.gradient[t * 203 + v];
  }
  hidden::verdict("rows", same, 0);
}
