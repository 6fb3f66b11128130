// Timing, random fills and clock readings behind bench/ops/cuda_bench.h.
#include "bench/ops/cuda_bench.h"

#include <cuda_bf16.h>
#include <dlfcn.h>

#include <algorithm>
#include <memory>

#include "kernels/cuda_launch.cuh"

namespace cambium::bench {

namespace {

constexpr int64_t kFlushBytes = 256 << 20;  // several times the L2

__device__ __forceinline__ uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

template <class Element>
__global__ void fill_normal_kernel(Element* to, int64_t count, uint64_t seed, float scale) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint64_t bits =
        mix_bits((static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15ull ^ seed << 40);
    const float a = (static_cast<uint32_t>(bits >> 40) + 1) * 0x1p-24f;
    const float b = static_cast<uint32_t>(bits & 0xffffff) * 0x1p-24f;
    to[i] = Element(scale * sqrtf(-2.0f * logf(a)) * cospif(2.0f * b));
  }
}

// The driver's management library: no header and no link dependency for two readings.
class GpuReadings {
 public:
  GpuReadings() : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW)) {
    if (library_ == nullptr) return;
    auto* init = symbol<int()>("nvmlInit_v2");
    auto* by_index = symbol<int(unsigned, void**)>("nvmlDeviceGetHandleByIndex_v2");
    clock_ = symbol<int(void*, int, unsigned*)>("nvmlDeviceGetClockInfo");
    power_ = symbol<int(void*, unsigned*)>("nvmlDeviceGetPowerUsage");
    is_ready_ = init != nullptr && by_index != nullptr && clock_ != nullptr && power_ != nullptr &&
                init() == 0 && by_index(0, &device_) == 0;
  }
  void take() {
    constexpr int kSmClock = 1;
    unsigned mhz = 0, milliwatts = 0;
    if (!is_ready_ || clock_(device_, kSmClock, &mhz) != 0) return;
    power_(device_, &milliwatts);
    mhz_.push_back(mhz);
    watts_.push_back(milliwatts / 1000);
  }
  std::string summary() {
    cudaDeviceProp device{};
    cuda::check_cuda(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    if (mhz_.empty()) return format_text("{}, SM clock unknown", device.name);
    return format_text("{}, {} MHz, {} W", device.name, middle(mhz_), middle(watts_));
  }

 private:
  template <class Function>
  Function* symbol(const char* name) {
    return reinterpret_cast<Function*>(dlsym(library_, name));
  }
  static unsigned middle(std::vector<unsigned>& values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  }

  void* library_;
  void* device_ = nullptr;
  bool is_ready_ = false;
  int (*clock_)(void*, int, unsigned*) = nullptr;
  int (*power_)(void*, unsigned*) = nullptr;
  std::vector<unsigned> mhz_, watts_;
};

struct EventPair {
  cudaEvent_t begin = nullptr, end = nullptr;
  EventPair() {
    cuda::check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
    cuda::check_cuda(cudaEventCreate(&end), "cudaEventCreate");
  }
  EventPair(const EventPair&) = delete;
  EventPair& operator=(const EventPair&) = delete;
  ~EventPair() {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
  double elapsed_us() const {
    float milliseconds = 0;
    cuda::check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    return 1e3 * milliseconds;
  }
};

}  // namespace

DeviceTensor::DeviceTensor(Shape shape, DType dtype, int64_t row_stride)
    : shape_(shape),
      dtype_(dtype),
      row_stride_(row_stride < 0 ? shape.row_elements() : row_stride),
      memory_(storage_elements() * dtype_bytes(dtype)) {}

void DeviceTensor::fill_normal(uint64_t seed, double scale) {
  constexpr int kBlocks = 1024, kThreads = 256;
  const auto factor = static_cast<float>(scale);
  if (dtype_ == DType::bf16) {
    fill_normal_kernel<<<kBlocks, kThreads>>>(static_cast<__nv_bfloat16*>(data()),
                                              storage_elements(), seed, factor);
  } else {
    CHECK(dtype_ == DType::f32);
    fill_normal_kernel<<<kBlocks, kThreads>>>(static_cast<float*>(data()), storage_elements(), seed,
                                              factor);
  }
  cuda::check_cuda(cudaDeviceSynchronize(), "fill_normal");
}

void DeviceTensor::fill_zero() {
  const auto bytes = static_cast<size_t>(storage_elements() * dtype_bytes(dtype_));
  cuda::check_cuda(cudaMemset(data(), 0, bytes), "fill_zero");
}

void DeviceTensor::upload(const void* host) {
  CHECK_EQ(row_stride_, shape_.row_elements());
  cuda::copy_bytes(host, data(), shape_.elements() * dtype_bytes(dtype_));
}

void device_copy(const void* from, void* to, int64_t bytes, Stream& stream) {
  cuda::check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                                   cuda::native_stream(stream)),
                   "device_copy");
}

GpuTimings time_on_gpu(std::span<const GpuContender> contenders, const GpuBenchOptions& options) {
  Stream stream("bench GPU");
  cuda::NativeStream native(stream);
  OpContext context;
  context.backend = Backend::cuda;
  context.stream = &stream;
  const cudaStream_t queue = cuda::native_stream(stream);
  const cuda::DeviceMemory flush(options.l2 == L2State::cold ? kFlushBytes : 0);
  const size_t count = contenders.size();
  std::vector<EventPair> events(count * static_cast<size_t>(options.samples));
  int64_t call = 0;
  for (int64_t sample = -options.warmups; sample < options.samples; ++sample) {
    for (size_t turn = 0; turn < count; ++turn, ++call) {
      const size_t who = sample % 2 == 0 ? turn : count - 1 - turn;
      if (flush.data() != nullptr) {
        cuda::check_cuda(cudaMemsetAsync(flush.data(), static_cast<int>(call), kFlushBytes, queue),
                         "flush of the L2");
      }
      const EventPair* pair =
          sample < 0 ? nullptr : &events[static_cast<size_t>(sample) * count + who];
      if (pair != nullptr) cuda::check_cuda(cudaEventRecord(pair->begin, queue), "begin");
      contenders[who].launch(context, call);
      if (pair != nullptr) cuda::check_cuda(cudaEventRecord(pair->end, queue), "end");
    }
  }
  GpuReadings readings;
  while (cudaStreamQuery(queue) == cudaErrorNotReady) readings.take();
  native.synchronize();
  GpuTimings timings;
  for (size_t who = 0; who < count; ++who) {
    std::vector<double> us;
    for (int64_t sample = 0; sample < options.samples; ++sample) {
      us.push_back(events[static_cast<size_t>(sample) * count + who].elapsed_us());
    }
    std::sort(us.begin(), us.end());
    timings.median_us.push_back(us[us.size() / 2]);
    timings.low_us.push_back(us[us.size() / 10]);
  }
  timings.gpu = readings.summary();
  return timings;
}

}  // namespace cambium::bench
