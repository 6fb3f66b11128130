// CUDA streams behind src/base/stream.h: creation, ordering, waiting, copies; what the GPU is.
#include <cuda_profiler_api.h>
#include <nvtx3/nvToolsExt.h>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error that a later call reports
    return 0;
  }
  return count;
}

DeviceInfo device_info() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  size_t free_bytes = 0, total_bytes = 0;
  check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  return {.name = properties.name,
          .compute_capability = 10 * properties.major + properties.minor,
          .multiprocessors = properties.multiProcessorCount,
          .total_bytes = static_cast<int64_t>(total_bytes),
          .free_bytes = static_cast<int64_t>(free_bytes)};
}

NativeStream::NativeStream(Stream& stream, LaunchOrder order, JoinLaunches join) : stream_(stream) {
  CHECK(stream.device() == nullptr);
  cudaStream_t native = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), "cudaStreamCreate");
  native_ = native;
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  event_ = event;
  if (join == JoinLaunches::to_graphs) graphs_ = std::make_unique<LaunchGraphs>(native_);
  stream.set_device(this, order);
}

NativeStream::~NativeStream() {
  graphs_.reset();
  cudaEventDestroy(static_cast<cudaEvent_t>(event_));
  cudaStreamDestroy(static_cast<cudaStream_t>(native_));
  stream_.set_device(nullptr);
}

// NOTE: the event is this stream's own, so two threads that wait for one stream do not meet in it.
void NativeStream::wait_for(const DeviceStream& other) {
  if (&other == this) return;
  const auto event = static_cast<cudaEvent_t>(event_);
  check_cuda(cudaEventRecord(event, static_cast<cudaStream_t>(other.native())), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(static_cast<cudaStream_t>(native()), event),
             "cudaStreamWaitEvent");
}

void NativeStream::synchronize() {
  check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(native())), stream_.name().c_str());
}

EventTimer::~EventTimer() { take_ms(); }

void EventTimer::before(const Cost& cost, Stream& stream) {
  Interval& interval = intervals_.emplace_back(Interval{cost, {nullptr, nullptr}});
  for (void*& event : interval.events) {
    cudaEvent_t made = nullptr;
    check_cuda(cudaEventCreate(&made), "cudaEventCreate");
    event = made;
  }
  check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(interval.events[0]), native_stream(stream)),
             "cudaEventRecord");
}

void EventTimer::after(Stream& stream) {
  check_cuda(
      cudaEventRecord(static_cast<cudaEvent_t>(intervals_.back().events[1]), native_stream(stream)),
      "cudaEventRecord");
}

std::vector<std::pair<Cost, double>> EventTimer::take_ms() {
  std::vector<std::pair<Cost, double>> calls;
  for (const Interval& interval : intervals_) {
    const auto begin = static_cast<cudaEvent_t>(interval.events[0]);
    const auto end = static_cast<cudaEvent_t>(interval.events[1]);
    float milliseconds = 0;
    cudaEventSynchronize(end);
    if (cudaEventElapsedTime(&milliseconds, begin, end) == cudaSuccess) {
      calls.emplace_back(interval.cost, milliseconds);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
  intervals_.clear();
  return calls;
}

StepProfile::StepProfile() { check_cuda(cudaProfilerStart(), "cudaProfilerStart"); }

StepProfile::~StepProfile() {
  begin_stage("");
  cudaProfilerStop();
}

void StepProfile::before(const Cost& cost, Stream&) { nvtxRangePushA(cost.op); }

void StepProfile::after(Stream&) { nvtxRangePop(); }

void StepProfile::begin_stage(const char* name) {
  if (stage_ != 0) nvtxRangeEnd(stage_);
  stage_ = name[0] == 0 ? 0 : nvtxRangeStartA(name);
}

void copy_bytes(const void* from, void* to, int64_t bytes) {
  check_cuda(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault), "cudaMemcpy");
  // NOTE: from pageable memory it returns before the last bytes are on the device, and streams made
  // non-blocking do not wait for the null stream that carries them.
  check_cuda(cudaStreamSynchronize(nullptr), "cudaMemcpy");
}

void copy_async(const CopyAsync& copy, Stream& stream) {
  if (copy.bytes == 0 || copy.from == copy.to) return;
  check_cuda(cudaMemcpyAsync(copy.to, copy.from, static_cast<size_t>(copy.bytes), cudaMemcpyDefault,
                             native_stream(stream)),
             "cudaMemcpyAsync");
}

void fill_async(void* data, int byte, int64_t bytes, Stream& stream) {
  if (bytes == 0) return;
  check_cuda(cudaMemsetAsync(data, byte, static_cast<size_t>(bytes), native_stream(stream)),
             "cudaMemsetAsync");
}

}  // namespace cambium::cuda
