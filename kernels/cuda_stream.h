// The seam between plain C++ and the CUDA runtime: no CUDA type appears in a plain header.
//
// A cambium::Stream that runs on a GPU carries its cudaStream_t as `native()`; a kernel's launcher
// (kernels/*.cu) takes it from there. These functions exist in builds with CUDA only: call them
// under `if constexpr (kHasCuda)`. A failing CUDA call is an Error with exit code 70, or 40 where
// memory is missing.
#pragma once

#include <cstdint>

#include "kernels/op.h"

namespace cambium::cuda {

// GPUs that the driver offers; 0 without a driver.
int device_count();

// Gives `stream` a CUDA stream of its own for as long as this object lives.
class NativeStream {
 public:
  explicit NativeStream(Stream& stream);
  ~NativeStream();
  NativeStream(const NativeStream&) = delete;
  NativeStream& operator=(const NativeStream&) = delete;
  // Returns when everything launched so far is done; reports a failed kernel.
  void synchronize();

 private:
  Stream& stream_;
};

// Device memory, uninitialised, 256-byte aligned.
class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  DeviceMemory& operator=(DeviceMemory&&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// `bytes` between host and device, in either direction; returns when done.
void copy_bytes(const void* from, void* to, int64_t bytes);

}  // namespace cambium::cuda
