// copy_bytes: the copy bandwidth that memory-bound kernels are compared with.
#include <benchmark/benchmark.h>

#include "kernels/copy.h"

namespace cambium {

namespace {

void copy_bytes_bench(benchmark::State& state) {
  const int64_t bytes = state.range(0);
  std::vector<uint8_t> from(static_cast<size_t>(bytes), 1), to(static_cast<size_t>(bytes));
  Workers workers(2);
  const CopyBytesArgs args{.from_N = {from.data(), Shape(bytes)},
                           .to_N = {to.data(), Shape(bytes)}};
  for (auto _ : state) reference::copy_bytes(args, workers);
  state.SetBytesProcessed(2 * bytes * state.iterations());
}
BENCHMARK(copy_bytes_bench)->Arg(1 << 20)->Arg(1 << 28)->UseRealTime();

}  // namespace

}  // namespace cambium
