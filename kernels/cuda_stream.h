// The seam between plain C++ and the CUDA runtime: no CUDA type appears in a plain header.
//
// A cambium::Stream that runs on a GPU has a NativeStream; a kernel's launcher (kernels/*.cu) takes
// its cudaStream_t from there. These functions exist in builds with CUDA only: call them under
// `if constexpr (kHasCuda)`. A failing CUDA call is an Error with exit code 70, or 40 where memory
// is missing.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "kernels/op.h"
#include "src/base/arena.h"
#include "src/base/digest.h"

namespace cambium::cuda {

// GPUs that the driver offers; 0 without a driver.
int device_count();

// The GPU that this process uses.
struct DeviceInfo {
  std::string name;
  int compute_capability = 0;  // 90 = 9.0
  int multiprocessors = 0;
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;
};
DeviceInfo device_info();

// Launches that come again in the same bytes, joined to CUDA graphs: a graph's kernels start
// without the host, which takes 3 us for one. Nobody says where a segment begins: a launch seen
// before waits for its successors; a new one, and whatever else asks for the stream, ends the
// segment. A segment met for the second time is captured, and launched as a graph from then
// on: what a graph holds is the launches that it stands for, so nothing can be out of date.
class LaunchGraphs {
 public:
  explicit LaunchGraphs(void* native);  // a cudaStream_t
  ~LaunchGraphs();
  LaunchGraphs(const LaunchGraphs&) = delete;
  LaunchGraphs& operator=(const LaunchGraphs&) = delete;
  bool take_over(const DeviceLaunch& launch);
  void end_segment();

  struct Counts {
    int64_t joined = 0;  // launches that were part of a graph
    int64_t graphs = 0, captures = 0;
  };
  const Counts& counts() const { return counts_; }

 private:
  struct Running;
  struct Launch {
    void (*call)(const void* object, Workers&);
    size_t first;  // byte of objects_
  };
  void run_all() const;
  void* capture() const;  // a cudaGraphExec_t
  void forget_graphs();
  void make_room();

  void* native_;
  // A stream that waits for this one ends its segment, from another thread perhaps.
  std::recursive_mutex mutex_;
  bool runs_ = false;
  std::vector<Launch> launches_;  // of the segment so far
  std::vector<std::byte> objects_;
  std::set<Digest128> seen_;
  std::map<Digest128, void*> graphs_;  // of segments; null after the first meeting
  Counts counts_;
};

enum class JoinLaunches : uint8_t { no, to_graphs };

// Gives `stream` a CUDA stream of its own for as long as this object lives.
class NativeStream final : public DeviceStream {
 public:
  explicit NativeStream(Stream& stream, LaunchOrder order = LaunchOrder::at_once,
                        JoinLaunches join = JoinLaunches::no);
  ~NativeStream() override;
  NativeStream(const NativeStream&) = delete;
  NativeStream& operator=(const NativeStream&) = delete;
  void* native() const override {
    if (graphs_ != nullptr) graphs_->end_segment();
    return native_;
  }
  bool take_over(const DeviceLaunch& launch) override {
    return graphs_ != nullptr && graphs_->take_over(launch);
  }
  const LaunchGraphs* graphs() const { return graphs_.get(); }
  void wait_for(const DeviceStream& other) override;
  void synchronize() override;
  // What libraries keep per stream (handle, workspace); made by the first launcher that needs it.
  std::shared_ptr<void> blas_state, cudnn_state;

 private:
  Stream& stream_;
  std::unique_ptr<LaunchGraphs> graphs_;
  void* native_ = nullptr;
  void* event_ = nullptr;  // a cudaEvent_t: the other side of wait_for
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

// An arena's address space on the GPU: as much as the GPU has, backed in steps of 32 MiB.
std::unique_ptr<AddressSpace> device_address_space();

// Host memory that the GPU copies from and to without stopping the host.
void* allocate_pinned(int64_t bytes);
void free_pinned(void* data);

// `bytes` between host and device, in either direction; returns when done.
void copy_bytes(const void* from, void* to, int64_t bytes);

// Milliseconds on the device of every call of an op, between CUDA events around its launch.
class EventTimer final : public OpTimer {
 public:
  ~EventTimer() override;
  void before(const Cost& cost, Stream& stream) override;
  void after(Stream& stream) override;
  // Of all calls since the last take; waits for them.
  std::vector<std::pair<Cost, double>> take_ms();

 private:
  struct Interval {
    Cost cost;
    void* events[2];  // cudaEvent_t
  };
  std::vector<Interval> intervals_;
};

// Brackets what a profiler records (nsys --capture-range=cudaProfilerApi), with NVTX ranges named
// after stages and ops.
class StepProfile final : public OpTimer {
 public:
  StepProfile();
  ~StepProfile() override;
  void before(const Cost& cost, Stream& stream) override;
  void after(Stream& stream) override;
  void begin_stage(const char* name) override;

 private:
  uint64_t stage_ = 0;  // an nvtxRangeId_t; 0 = none
};

// In stream order: a copy between any memories, and a fill.
struct CopyAsync {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t bytes = 0;
};
void copy_async(const CopyAsync& copy, Stream& stream);
void fill_async(void* data, int byte, int64_t bytes, Stream& stream);

// `out` = reduction over all `sources` of elements [first, first + count), in the order and with
// the roundings of sim/reduce.h, bit for bit.
enum class RankCombine { sum, max };
enum class RankRounding { once, every_rank };
struct RankReduction {
  DType dtype = DType::f32;
  RankCombine combine = RankCombine::sum;
  RankRounding rounding = RankRounding::once;
  int start = 0;
  std::span<const void* const> sources;
  int64_t first = 0;
  int64_t count = 0;
  void* out = nullptr;
};
constexpr int kMostReducedRanks = 256;  // their addresses travel as kernel arguments
void reduce_ranks(const RankReduction& reduction, Stream& stream);

}  // namespace cambium::cuda
