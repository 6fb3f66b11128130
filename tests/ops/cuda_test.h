// Runs an op on the GPU from host tensors, for parity tests that skip where there is none.
#pragma once

#include <cstring>
#include <map>
#include <vector>

#include "kernels/cuda_stream.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

inline constexpr const char* kNoGpu = "skipped: no GPU";

inline bool has_gpu() {
  if constexpr (kHasCuda) return cuda::device_count() > 0;
  return false;
}

// A view's tensor in host memory, guards included (TestTensor).
struct GuardedBytes {
  std::byte* begin;
  int64_t bytes, guard;
};
inline GuardedBytes guarded_bytes(const RawView& view) {
  const int64_t width = dtype_bytes(view.dtype), guard = TestTensor::kGuardElements * width;
  return {static_cast<std::byte*>(view.data) - guard,
          view.shape[0] * view.row_stride * width + 2 * guard, guard};
}

// Copies every view's tensor (a TestTensor, guards included) to the GPU, runs `op` there through
// execute(), and copies what it may have written back. Views of the same memory stay so.
template <class Args>
void run_cuda_op(void (*op)(const Args&, OpCall), Args args) {
  if constexpr (kHasCuda) {
    struct Mirror {
      GuardedBytes host;
      cuda::DeviceMemory device;
      Access access;
    };
    std::vector<Mirror> mirrors;
    visit_views(args, [&](const char*, const RawView& view) {
      if (view.empty()) return;
      const GuardedBytes host = guarded_bytes(view);
      auto found = std::find_if(mirrors.begin(), mirrors.end(), [&](const Mirror& mirror) {
        return mirror.host.begin == host.begin && mirror.host.bytes == host.bytes;
      });
      if (found == mirrors.end()) {
        mirrors.push_back({host, cuda::DeviceMemory(host.bytes), view.access});
        found = mirrors.end() - 1;
        cuda::copy_bytes(host.begin, found->device.data(), host.bytes);
      }
      if (view.access != Access::read) found->access = view.access;
      // `args` is this function's own copy.
      const_cast<RawView&>(view).data = static_cast<std::byte*>(found->device.data()) + host.guard;
    });
    Stream stream("test GPU");
    cuda::NativeStream native(stream);
    OpContext context;
    context.backend = Backend::cuda;
    context.stream = &stream;
    op(args, context);
    native.synchronize();
    for (const Mirror& mirror : mirrors) {
      if (mirror.access == Access::read) continue;
      cuda::copy_bytes(mirror.device.data(), mirror.host.begin, mirror.host.bytes);
    }
  } else {
    FAIL() << "this build has no CUDA; ask has_gpu() first";
  }
}

// Args over copies of the tensors that `args` points to.
template <class Args>
class ArgsCopy {
 public:
  explicit ArgsCopy(const Args& original) : args(original) {
    visit_views(args, [&](const char*, const RawView& view) {
      if (view.empty()) return;
      const GuardedBytes host = guarded_bytes(view);
      auto& copy = copies_[host.begin];
      if (copy.empty()) copy.assign(host.begin, host.begin + host.bytes);
      const_cast<RawView&>(view).data = copy.data() + host.guard;
    });
  }
  ArgsCopy(const ArgsCopy&) = delete;
  Args args;

 private:
  std::map<std::byte*, std::vector<std::byte>> copies_;
};

// The views of both args, pairwise.
template <class Args, class Body>
void for_each_pair(const Args& a, const Args& b, Body&& body) {
  std::vector<RawView> of_b;
  visit_views(b, [&](const char*, const RawView& view) { of_b.push_back(view); });
  size_t i = 0;
  visit_views(a, [&](const char* name, const RawView& view) { body(name, view, of_b[i++]); });
}

// A view's rows as a TestTensor of their own.
inline TestTensor tensor_of(const RawView& view) {
  TestTensor tensor(view.shape, view.dtype, view.row_stride);
  const GuardedBytes host = guarded_bytes(view);
  std::memcpy(static_cast<std::byte*>(tensor.data()) - host.guard, host.begin,
              static_cast<size_t>(host.bytes));
  return tensor;
}

// Integers bit for bit, floats within the bound. Elements that neither wrote (poison in both) do
// not count.
inline testing::AssertionResult agrees(const TestTensor& actual, const TestTensor& expected,
                                       double bound) {
  const bool is_float = actual.dtype() == DType::f32 || actual.dtype() == DType::bf16;
  const auto same_bits = bits_equal(actual.bits(), expected.bits());
  if (same_bits || !is_float) return same_bits;
  std::vector<double> left, right;
  for (int64_t i = 0; i < actual.elements(); ++i) {
    if (std::isnan(actual.at(i)) && std::isnan(expected.at(i))) continue;
    left.push_back(actual.at(i)), right.push_back(expected.at(i));
  }
  const OpError error = compare(left, right);
  if (error.relative_l2 <= bound && error.max_scaled <= 4 * bound) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "relative L2 " << error.relative_l2 << ", max scaled "
                                     << error.max_scaled << ", bound " << bound;
}

// Runs `op` on the CPU and twice on the GPU from the same tensors: the GPU's two runs give the same
// bytes (D1), it writes nothing outside its outputs' elements, and these agree with the reference:
// bit for bit where `bound` is 0.
template <class Args>
void expect_cuda_agrees(void (*op)(const Args&, OpCall), const std::type_identity_t<Args>& args,
                        double bound = 0) {
  ArgsCopy<Args> reference(args), gpu(args), again(args);
  run_op(op, reference.args);
  run_cuda_op(op, gpu.args);
  run_cuda_op(op, again.args);
  for_each_pair(gpu.args, again.args, [&](const char* name, const RawView& a, const RawView& b) {
    if (a.empty()) return;
    const GuardedBytes left = guarded_bytes(a), right = guarded_bytes(b);
    EXPECT_EQ(std::memcmp(left.begin, right.begin, static_cast<size_t>(left.bytes)), 0)
        << name << ": two runs differ";
  });
  for_each_pair(gpu.args, reference.args,
                [&](const char* name, const RawView& a, const RawView& b) {
                  if (a.empty() || a.access == Access::read) return;
                  TestTensor actual = tensor_of(a), expected = tensor_of(b);
                  if (bound == 0) {
                    EXPECT_TRUE(actual.same_bytes(expected)) << name << ": other bytes";
                    return;
                  }
                  EXPECT_TRUE(agrees(actual, expected, bound)) << name;
                  for (int64_t i = 0; i < actual.elements(); ++i) {
                    actual.set(i, 0), expected.set(i, 0);
                  }
                  EXPECT_TRUE(actual.same_bytes(expected)) << name << ": outside its elements";
                });
}

// D2 on the GPU: rows of a batch of `row_count` have the same bits in smaller batches. Views whose
// first extent is `row_count` are cut; the others stay whole and are not compared.
template <class Args>
void expect_cuda_rows_independent(void (*op)(const Args&, OpCall),
                                  const std::type_identity_t<Args>& args, int64_t row_count) {
  ArgsCopy<Args> whole(args);
  run_cuda_op(op, whole.args);
  for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 1},
                                     {0, row_count - 1},
                                     {row_count / 3, 5},
                                     {row_count - 3, 3}}) {
    ArgsCopy<Args> copy(args);
    Args part = copy.args, expected = whole.args;
    for (Args* cut : {&part, &expected}) {
      visit_views(*cut, [&, first = first, count = count](const char*, const RawView& view) {
        if (view.empty() || view.shape[0] != row_count) return;
        auto& rows = const_cast<RawView&>(view);
        rows.data =
            static_cast<std::byte*>(view.data) + first * view.row_stride * dtype_bytes(view.dtype);
        rows.shape.extent[0] = count;
      });
    }
    run_cuda_op(op, part);
    std::vector<bool> is_cut;
    visit_views(args, [&](const char*, const RawView& view) {
      is_cut.push_back(!view.empty() && view.shape[0] == row_count);
    });
    size_t i = 0;
    for_each_pair(part, expected, [&](const char* name, const RawView& a, const RawView& b) {
      if (!is_cut[i++] || a.access == Access::read) return;
      EXPECT_TRUE(bits_equal(tensor_of(a).bits(), tensor_of(b).bits()))
          << name << ": rows " << first << " and " << count << " more";
    });
  }
}

}  // namespace cambium::test
