// Benchmarks on the GPU: contenders run interleaved (A B B A ...) on random data, each call between
// two CUDA events, medians reported, SM clock and power read while they run.
//
// The card is power-limited, so the same kernel differs by 20 % with what ran before it: a figure
// means something beside its peer's of the same call only. Zeros run faster than random data.
#pragma once

#include <benchmark/benchmark.h>

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda_stream.h"

namespace cambium::bench {

// Device memory with a shape. Contents are undefined until filled.
class DeviceTensor {
 public:
  explicit DeviceTensor(Shape shape, DType dtype = DType::bf16, int64_t row_stride = -1);
  // Normal values (f32, bf16), the same for the same seed.
  void fill_normal(uint64_t seed, double scale = 1.0);
  void fill_zero();
  void upload(const void* host);  // all bytes of a contiguous tensor
  template <class T>
  In<T> in() {
    return view<T, Access::read>();
  }
  template <class T>
  Out<T> out() {
    return view<T, Access::write>();
  }
  template <class T>
  InOut<T> inout() {
    return view<T, Access::read_write>();
  }
  void* data() const { return memory_.data(); }

 private:
  template <class T, Access kAccess>
  View<T, kAccess> view() {
    if constexpr (std::is_same_v<T, Real>) {
      return View<T, kAccess>(data(), dtype_, shape_, row_stride_);
    } else {
      CHECK(dtype_ == static_dtype<T>());
      return View<T, kAccess>(static_cast<T*>(data()), shape_, row_stride_);
    }
  }
  int64_t storage_elements() const { return shape_[0] * row_stride_; }

  Shape shape_;
  DType dtype_;
  int64_t row_stride_;
  cuda::DeviceMemory memory_;
};

// One implementation of the measured work. `launch` puts call number `call` on the context's
// stream; it may pick among buffers by `call`, so that inputs are not those of the last call.
struct GpuContender {
  std::string name;
  double flops = 0;  // of one call
  double bytes = 0;
  std::function<void(OpContext& context, int64_t call)> launch;
};

enum class L2State { warm, cold };  // cold: 256 MB are written before each call, outside its time

struct GpuBenchOptions {
  int64_t samples = 15;
  int64_t warmups = 3;
  L2State l2 = L2State::warm;
};

struct GpuTimings {
  std::vector<double> median_us;  // of each contender
  std::vector<double> low_us;     // tenth percentile
  std::string gpu;                // name, SM clock and power while running
};

GpuTimings time_on_gpu(std::span<const GpuContender> contenders, const GpuBenchOptions& options);

// The ceiling of memory-bound work: a device-to-device copy by the driver, in stream order.
void device_copy(const void* from, void* to, int64_t bytes, Stream& stream);

// A Google Benchmark body: the counters are the first contender's, with `of_<name>` its rate over
// each other contender's. Register with ->UseManualTime()->Iterations(1).
inline void run_gpu_bench(benchmark::State& state, std::span<const GpuContender> contenders,
                          const GpuBenchOptions& options = {}) {
  if constexpr (kHasCuda) {
    for (auto _ : state) {
      const GpuTimings timings = time_on_gpu(contenders, options);
      const auto rate = [&](size_t i, double amount) { return amount / timings.median_us[i]; };
      state.SetIterationTime(1e-6 * timings.median_us[0]);
      state.counters["median_us"] = timings.median_us[0];
      state.counters["low_us"] = timings.low_us[0];
      if (contenders[0].flops > 0) state.counters["TFLOP/s"] = 1e-6 * rate(0, contenders[0].flops);
      if (contenders[0].bytes > 0) state.counters["GB/s"] = 1e-3 * rate(0, contenders[0].bytes);
      for (size_t i = 1; i < contenders.size(); ++i) {
        const bool by_flops = contenders[0].flops > 0 && contenders[i].flops > 0;
        const double ours = rate(0, by_flops ? contenders[0].flops : contenders[0].bytes);
        const double theirs = rate(i, by_flops ? contenders[i].flops : contenders[i].bytes);
        state.counters["of_" + contenders[i].name] = ours / theirs;
      }
      state.SetLabel(timings.gpu);
    }
  }
}

// For the head of a GPU benchmark: false, with the benchmark skipped, where there is no GPU.
inline bool gpu_is_there(benchmark::State& state) {
  if constexpr (kHasCuda) {
    if (cuda::device_count() > 0) return true;
  }
  state.SkipWithError("skipped: no GPU");
  return false;
}

}  // namespace cambium::bench
