// Launches joined to CUDA graphs (kernels/cuda_stream.h): what is joined, that results are those of
// launches one by one, and that whatever looks at the stream sees them done.
#include <algorithm>
#include <vector>

#include "kernels/copy.h"
#include "kernels/cuda_stream.h"
#include "tests/ops/cuda_test.h"

namespace cambium {
namespace {

constexpr int64_t kGraphValues = 1000;

struct GraphStream {
  Stream stream{"test GPU"};
  cuda::NativeStream native{stream, LaunchOrder::at_once, cuda::JoinLaunches::to_graphs};
  OpContext context;
  GraphStream() {
    context.backend = Backend::cuda;
    context.stream = &stream;
  }
  void scale(const cuda::DeviceMemory& memory, float factor) {
    scale_values(
        {.value_N = {static_cast<float*>(memory.data()), Shape(kGraphValues)}, .factor = factor},
        context);
  }
  const cuda::LaunchGraphs::Counts& counts() const { return native.graphs()->counts(); }
};

void set_all(const cuda::DeviceMemory& memory, float value) {
  const std::vector<float> values(kGraphValues, value);
  cuda::copy_bytes(values.data(), memory.data(), 4 * kGraphValues);
}
std::vector<float> values_of(const cuda::DeviceMemory& memory) {
  std::vector<float> values(kGraphValues);
  cuda::copy_bytes(memory.data(), values.data(), 4 * kGraphValues);
  return values;
}
std::vector<float> all_values(float value) { return std::vector<float>(kGraphValues, value); }

TEST(LaunchGraphs, CudaJoinsWhatRepeats) {
  if (!test::has_gpu()) GTEST_SKIP() << "skipped: no GPU";
  if constexpr (kHasCuda) {
    const cuda::DeviceMemory memory(4 * kGraphValues);
    GraphStream s;
    // The launches are new, then the segment; it is captured, and launched again.
    for (int pass = 0; pass < 4; ++pass) {
      set_all(memory, 1);
      for (const float factor : {2.0f, 3.0f, 5.0f, 7.0f, 11.0f}) s.scale(memory, factor);
      s.native.synchronize();
      EXPECT_EQ(values_of(memory), all_values(2310)) << pass;
      EXPECT_EQ(s.counts().joined, 5 * std::max(0, pass - 1));
      EXPECT_EQ(s.counts().captures, pass > 1 ? 1 : 0);
    }
    EXPECT_EQ(s.counts().graphs, 2);
    // A launch that never was ends the segment before it, which then is a new one.
    set_all(memory, 1);
    for (const float factor : {2.0f, 3.0f, 5.0f, 7.0f, 13.0f, 2.0f, 3.0f}) s.scale(memory, factor);
    s.native.synchronize();
    EXPECT_EQ(values_of(memory), all_values(2 * 3 * 5 * 7 * 13 * 2 * 3));
    EXPECT_EQ(s.counts().joined, 10);
    EXPECT_EQ(s.counts().captures, 1);
  }
}

TEST(LaunchGraphs, CudaLaunchesBeforeOthersLook) {
  if (!test::has_gpu()) GTEST_SKIP() << "skipped: no GPU";
  if constexpr (kHasCuda) {
    const cuda::DeviceMemory memory(4 * kGraphValues);
    GraphStream a, b;
    for (int pass = 0; pass < 4; ++pass) {
      set_all(memory, 1);
      for (int i = 0; i < 6; ++i) a.scale(memory, 2);
      b.stream.wait(a.stream.record());
      b.scale(memory, 3);
      a.stream.wait(b.stream.record());
      for (int i = 0; i < 300; ++i) a.scale(memory, i % 2 == 0 ? 0.5f : 2.0f);
      // What takes the stream without an op comes after them.
      cuda::fill_async(memory.data(), 0, 4, a.stream);
      a.native.synchronize();
      std::vector<float> expected = all_values(64 * 3);
      expected[0] = 0;
      EXPECT_EQ(values_of(memory), expected) << pass;
    }
    EXPECT_GE(a.counts().joined, 2 * 300);
  }
}

}  // namespace
}  // namespace cambium
