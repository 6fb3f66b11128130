// What ops' benchmarks share: running an op on a fixed number of workers, and its rate beside the
// FMA ceiling of the same threads, measured in the same run (the machine's speed drifts).
#pragma once

#include <benchmark/benchmark.h>
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "kernels/op.h"
#include "tests/ops/op_test.h"

namespace cambium::bench {

// GFLOP/s of independent fused multiply-adds in registers, summed over the workers' threads.
inline double fma_ceiling(Workers& workers) {
  constexpr int64_t kRounds = 400000;
  constexpr int kChains = 12;  // latency 4, two per cycle, and some to spare
  const int threads = workers.threads();
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    std::vector<float> sink(static_cast<size_t>(threads));
    const auto start = std::chrono::steady_clock::now();
    workers.parallel_for(threads, [&](int64_t chunk, Scratch&) {
      __m256 sum[kChains];
      const __m256 factor = _mm256_set1_ps(0.999f);
      for (__m256& s : sum) s = factor;
      for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sum[c] = _mm256_fmadd_ps(sum[c], factor, factor);
      }
      for (const __m256& s : sum) sink[chunk] += _mm256_cvtss_f32(s);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    benchmark::DoNotOptimize(sink.data());
    best = std::max(best, 16e-9 * kChains * kRounds * threads / elapsed.count());
  }
  return best;
}

// Times reference `op` on `threads` workers. The counters come from the fastest call, since other
// work on the machine only ever adds time: best_us, GFLOP/s, share of the FMA ceiling, GB/s.
template <class Args>
void run_op_bench(benchmark::State& state, void (*op)(const Args&, Workers&), const Args& args,
                  int threads) {
  check_args(args);
  const Cost call = cost(args);
  Workers workers(threads);
  op(args, workers);  // scratch grows, pages are touched
  const double before = fma_ceiling(workers);
  double best = INFINITY;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    op(args, workers);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    state.SetIterationTime(elapsed.count());
    best = std::min(best, elapsed.count());
  }
  const double ceiling = std::max(before, fma_ceiling(workers));
  const double calls_per_ns = 1e-9 / best;
  state.counters["best_us"] = 1e6 * best;
  state.counters["GFLOP/s"] = calls_per_ns * static_cast<double>(call.flops);
  state.counters["of_ceiling"] = calls_per_ns * static_cast<double>(call.flops) / ceiling;
  state.counters["GB/s"] = calls_per_ns * static_cast<double>(call.bytes);
}

inline test::TestTensor normal_tensor(Shape shape, uint64_t seed) {
  test::TestRandom random(seed);
  return test::make_tensor(shape, random, test::InputFamily::normals);
}

}  // namespace cambium::bench
