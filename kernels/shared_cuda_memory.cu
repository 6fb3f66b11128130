// Device memory: blocks, pinned host memory, and an arena's address space by the driver's virtual
// memory calls, which are looked up at run time so that a binary starts without a driver.
#include <cudaTypedefs.h>

#include <algorithm>
#include <vector>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

DeviceMemory::DeviceMemory(int64_t bytes) {
  if (bytes > 0) check_cuda(cudaMalloc(&data_, static_cast<size_t>(bytes)), "cudaMalloc");
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

void* allocate_pinned(int64_t bytes) {
  void* data = nullptr;
  check_cuda(cudaMallocHost(&data, static_cast<size_t>(std::max<int64_t>(bytes, 1))),
             "cudaMallocHost");
  return data;
}

void free_pinned(void* data) { cudaFreeHost(data); }

namespace {

constexpr int64_t kBackingStep = int64_t{32} << 20;  // mapping costs about 0.1 ms a step
constexpr unsigned kDriverVersion = 12000;           // of the calls below

template <class Function>
Function driver_call(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  check_cuda(
      cudaGetDriverEntryPointByVersion(name, &function, kDriverVersion, cudaEnableDefault, &result),
      name);
  if (result != cudaDriverEntryPointSuccess) {
    fail(ExitCode::internal, "the CUDA driver lacks {}; next: a driver for CUDA 12 or newer", name);
  }
  return reinterpret_cast<Function>(function);
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

class DeviceAddressSpace final : public AddressSpace {
 public:
  DeviceAddressSpace() {
    check_cuda(cudaGetDevice(&device_), "cudaGetDevice");
    check_cuda(cudaFree(nullptr), "cudaFree");  // makes the context that the driver calls need
    size_t free_bytes = 0, total_bytes = 0, granularity = 0;
    check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, device_};
    check(driver_call<PFN_cuMemGetAllocationGranularity_v10020>("cuMemGetAllocationGranularity")(
              &granularity, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
          "cuMemGetAllocationGranularity");
    granularity_ = static_cast<int64_t>(granularity);
    reserved_ = round_up(static_cast<int64_t>(total_bytes), std::max(kBackingStep, granularity_));
    check(driver_call<PFN_cuMemAddressReserve_v10020>("cuMemAddressReserve")(
              &base_, static_cast<size_t>(reserved_), 0, 0, 0),
          "cuMemAddressReserve");
  }

  ~DeviceAddressSpace() override {
    cudaDeviceSynchronize();  // a rank that failed may leave kernels running
    int64_t at = 0;
    for (const Piece& piece : pieces_) {
      unmap_(base_ + static_cast<CUdeviceptr>(at), static_cast<size_t>(piece.bytes));
      release_(piece.handle);
      at += piece.bytes;
    }
    driver_call<PFN_cuMemAddressFree_v10020>("cuMemAddressFree")(base_,
                                                                 static_cast<size_t>(reserved_));
  }

  std::byte* base() const override { return reinterpret_cast<std::byte*>(base_); }
  int64_t reserved_bytes() const override { return reserved_; }

  int64_t back(int64_t bytes) override {
    if (bytes <= backed_) return backed_;
    const int64_t missing = bytes - backed_;
    // An eighth at a time once it is large; near the end of memory, what is needed and no more.
    const int64_t generous = std::max(missing, backed_ / 8);
    for (const int64_t step : {round_up(generous, std::max(kBackingStep, granularity_)),
                               round_up(missing, granularity_)}) {
      if (backed_ + step <= reserved_ && map(step)) return backed_;
    }
    return backed_;
  }

  void fill(std::byte* data, int64_t bytes, uint32_t word) override {
    check(set_(reinterpret_cast<CUdeviceptr>(data), word, static_cast<size_t>(bytes / 4),
               CU_STREAM_PER_THREAD),
          "cuMemsetD32Async");
    check_cuda(cudaStreamSynchronize(cudaStreamPerThread), "poison");
  }

 private:
  struct Piece {
    CUmemGenericAllocationHandle handle;
    int64_t bytes;
  };

  static void check(CUresult status, const char* what) {
    if (status == CUDA_SUCCESS) return;
    fail(status == CUDA_ERROR_OUT_OF_MEMORY ? ExitCode::out_of_memory : ExitCode::internal,
         "{}: CUDA driver error {}", what, static_cast<int>(status));
  }

  // False when the GPU has no memory left.
  bool map(int64_t bytes) {
    Piece piece{0, bytes};
    const CUresult status = create_(&piece.handle, static_cast<size_t>(bytes), &properties_, 0);
    if (status == CUDA_ERROR_OUT_OF_MEMORY) return false;
    check(status, "cuMemCreate");
    const CUdeviceptr at = base_ + static_cast<CUdeviceptr>(backed_);
    check(map_(at, static_cast<size_t>(bytes), 0, piece.handle, 0), "cuMemMap");
    const CUmemAccessDesc access{properties_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check(access_(at, static_cast<size_t>(bytes), &access, 1), "cuMemSetAccess");
    pieces_.push_back(piece);
    backed_ += bytes;
    return true;
  }

  PFN_cuMemCreate_v10020 create_ = driver_call<PFN_cuMemCreate_v10020>("cuMemCreate");
  PFN_cuMemMap_v10020 map_ = driver_call<PFN_cuMemMap_v10020>("cuMemMap");
  PFN_cuMemSetAccess_v10020 access_ = driver_call<PFN_cuMemSetAccess_v10020>("cuMemSetAccess");
  PFN_cuMemUnmap_v10020 unmap_ = driver_call<PFN_cuMemUnmap_v10020>("cuMemUnmap");
  PFN_cuMemRelease_v10020 release_ = driver_call<PFN_cuMemRelease_v10020>("cuMemRelease");
  PFN_cuMemsetD32Async_v3020 set_ = driver_call<PFN_cuMemsetD32Async_v3020>("cuMemsetD32Async");
  int device_ = 0;
  CUmemAllocationProp properties_{};
  int64_t granularity_ = 0;
  CUdeviceptr base_ = 0;
  int64_t reserved_ = 0;
  int64_t backed_ = 0;
  std::vector<Piece> pieces_;
};

}  // namespace

std::unique_ptr<AddressSpace> device_address_space() {
  return std::make_unique<DeviceAddressSpace>();
}

}  // namespace cambium::cuda
