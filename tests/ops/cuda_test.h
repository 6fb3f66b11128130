// Runs an op on the GPU from host tensors, for parity tests that skip where there is none.
#pragma once

#include <vector>

#include "kernels/cuda_stream.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

inline constexpr const char* kNoGpu = "skipped: no GPU";

inline bool has_gpu() {
  if constexpr (kHasCuda) return cuda::device_count() > 0;
  return false;
}

// Copies every view's tensor (a TestTensor, guards included) to the GPU, runs `op` there through
// execute(), and copies what it may have written back.
template <class Args>
void run_cuda_op(void (*op)(const Args&, OpContext&), Args args) {
  if constexpr (kHasCuda) {
    struct Mirror {
      std::byte* host;
      cuda::DeviceMemory device;
      int64_t bytes;
      Access access;
    };
    std::vector<Mirror> mirrors;
    visit_views(args, [&](const char*, const RawView& view) {
      if (view.empty()) return;
      const int64_t width = dtype_bytes(view.dtype), guard = TestTensor::kGuardElements * width;
      const int64_t bytes = view.shape[0] * view.row_stride * width + 2 * guard;
      std::byte* host = static_cast<std::byte*>(view.data) - guard;
      mirrors.push_back({host, cuda::DeviceMemory(bytes), bytes, view.access});
      std::byte* device = static_cast<std::byte*>(mirrors.back().device.data());
      cuda::copy_bytes(host, device, bytes);
      const_cast<RawView&>(view).data = device + guard;  // `args` is this function's own copy
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
      cuda::copy_bytes(mirror.device.data(), mirror.host, mirror.bytes);
    }
  } else {
    FAIL() << "this build has no CUDA; ask has_gpu() first";
  }
}

}  // namespace cambium::test
