// Parity of grad_merge and grad_finish: every presence combination, aliasing, padding, threads.
#include "tests/ops/cuda_test.h"
#include "tests/ops/grad_merge_cases.h"

namespace cambium::test {
namespace {

// Slots of a case: data everywhere, poison in the padding between groups.
struct MergeSlots {
  GradMergeCase c;
  TestTensor data{Shape(kGradMergeSlots * c.groups, c.elements), DType::f32, c.group_stride};
  TestTensor present{Shape(kGradMergeSlots, c.groups), DType::u8};

  MergeSlots(const GradMergeCase& merge_case, uint64_t seed) : c(merge_case) {
    TestRandom random(seed);
    data.fill_normal(random);
    present.fill_integers(random, 0, 1);
  }
  InOut<float> slots() {
    return InOut<float>(static_cast<float*>(data.data()),
                        Shape(kGradMergeSlots, c.groups, c.elements), c.groups * c.group_stride);
  }
  GradMergeArgs merge_args() {
    return {slots(), present.inout<uint8_t>(), c.group_stride, c.left, c.right, c.destination};
  }
  std::vector<float> group(int64_t slot, int64_t group) const {
    std::vector<float> values;
    if (present.at(slot * c.groups + group) == 0) return values;
    const int64_t begin = (slot * c.groups + group) * c.elements;
    for (int64_t i = 0; i < c.elements; ++i) {
      values.push_back(static_cast<float>(data.at(begin + i)));
    }
    return values;
  }
};

TEST(GradMerge, AgreesWithOracle) {
  for (const GradMergeCase& c : kGradMergeCases) {
    for (uint64_t seed = 0; seed < 8; ++seed) {
      const MergeSlots before(c, seed);
      MergeSlots after = before;
      run_op(grad_merge, after.merge_args());
      EXPECT_TRUE(after.data.guards_intact());
      TestTensor expected = before.data, expected_present = before.present;
      for (int64_t group = 0; group < c.groups; ++group) {
        const std::vector<float> sum =
            merge_oracle(before.group(c.left, group), before.group(c.right, group));
        expected_present.set(c.destination * c.groups + group, sum.empty() ? 0 : 1);
        const int64_t begin = (c.destination * c.groups + group) * c.elements;
        for (size_t i = 0; i < sum.size(); ++i) {
          expected.set(begin + static_cast<int64_t>(i), sum[i]);
        }
      }
      // Other slots, and the destination's data where nothing is present, are untouched.
      EXPECT_TRUE(bits_equal(after.data, expected));
      EXPECT_TRUE(bits_equal(after.present, expected_present));
    }
  }
}

TEST(GradMerge, FinishWritesZerosForAbsentGroups) {
  for (const GradMergeCase& c : kGradMergeCases) {
    MergeSlots slots(c, 3);
    TestTensor gradient(Shape(c.groups, c.elements), DType::f32, c.elements + 7);
    run_op(grad_finish, GradFinishArgs{slots.slots(), slots.present.in<uint8_t>(),
                                       gradient.out<float>(), c.group_stride, c.left});
    std::vector<double> expected;
    for (int64_t group = 0; group < c.groups; ++group) {
      const std::vector<float> values = slots.group(c.left, group);
      for (int64_t i = 0; i < c.elements; ++i) expected.push_back(values.empty() ? 0 : values[i]);
    }
    EXPECT_TRUE(bits_equal(gradient, expected));
  }
}

TEST(GradMerge, ThreadsDoNotChangeBits) {
  expect_thread_independent([&](int threads) {
    MergeSlots slots(kGradMergeCases.back(), 5);
    run_op(grad_merge, slots.merge_args(), threads);
    return slots.data.bits();
  });
}

TEST(GradMerge, MustFailAddingAnAbsentOperandIsDetected) {
  const GradMergeCase& c = kGradMergeCases[1];
  MergeSlots slots(c, 0);
  slots.present.fill(1);
  slots.present.set(c.left * c.groups, 0);
  MergeSlots wrong = slots;
  wrong.present.fill(1);  // as if the absent operand were added
  run_op(grad_merge, slots.merge_args());
  run_op(grad_merge, wrong.merge_args());
  EXPECT_FALSE(bits_equal(wrong.data, slots.data));
}

TEST(GradMerge, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const GradMergeCase& c : kGradMergeCases) {
    for (uint64_t seed = 0; seed < 8; ++seed) {
      MergeSlots slots(c, seed);
      expect_cuda_agrees(grad_merge, slots.merge_args());
      TestTensor gradient(Shape(c.groups, c.elements), DType::f32, c.elements + (seed % 2) * 7);
      expect_cuda_agrees(grad_finish, {slots.slots(), slots.present.in<uint8_t>(),
                                       gradient.out<float>(), c.group_stride, c.left});
    }
  }
}

}  // namespace
}  // namespace cambium::test
