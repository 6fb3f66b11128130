// CUDA streams behind src/base/stream.h: creation, waiting and error checks of launches.
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

NativeStream::NativeStream(Stream& stream) : stream_(stream) {
  CHECK(stream.native() == nullptr);
  cudaStream_t native = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), "cudaStreamCreate");
  stream.set_native(native);
}

NativeStream::~NativeStream() {
  cudaStreamDestroy(native_stream(stream_));
  stream_.set_native(nullptr);
}

void NativeStream::synchronize() {
  check_cuda(cudaStreamSynchronize(native_stream(stream_)), stream_.name().c_str());
}

DeviceMemory::DeviceMemory(int64_t bytes) {
  if (bytes > 0) check_cuda(cudaMalloc(&data_, static_cast<size_t>(bytes)), "cudaMalloc");
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

void copy_bytes(const void* from, void* to, int64_t bytes) {
  check_cuda(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault), "cudaMemcpy");
  // NOTE: from pageable memory it returns before the last bytes have reached the device.
  check_cuda(cudaStreamSynchronize(nullptr), "cudaMemcpy");
}

}  // namespace cambium::cuda
