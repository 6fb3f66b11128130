// Merging and finishing the experts' gradients of one quickstart layer: 8 groups of 65,536.
#include "bench/ops/op_bench.h"
#include "kernels/grad_merge.h"

namespace cambium::bench {
namespace {

struct MergeTensors {
  static constexpr int64_t kGroups = 8, kElements = 65536;
  test::TestTensor slots{normal_tensor(Shape(3, kGroups, kElements), 1)};
  test::TestTensor present{Shape(3, kGroups), DType::u8};
  test::TestTensor gradient{Shape(kGroups, kElements)};
  MergeTensors() { present.fill(1); }
};

void gradient_merge(benchmark::State& state) {
  MergeTensors t;
  run_op_bench(state, reference::grad_merge,
               GradMergeArgs{t.slots.inout<float>(), t.present.inout<uint8_t>(),
                             MergeTensors::kElements, 0, 1, 2},
               static_cast<int>(state.range(0)));
}

void gradient_finish(benchmark::State& state) {
  MergeTensors t;
  run_op_bench(state, reference::grad_finish,
               GradFinishArgs{t.slots.in<float>(), t.present.in<uint8_t>(), t.gradient.out<float>(),
                              MergeTensors::kElements, 1},
               static_cast<int>(state.range(0)));
}

BENCHMARK(gradient_merge)->ArgName("threads")->Arg(1)->Arg(2)->UseManualTime();
BENCHMARK(gradient_finish)->ArgName("threads")->Arg(1)->Arg(2)->UseManualTime();

}  // namespace
}  // namespace cambium::bench
