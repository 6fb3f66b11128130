// The seam between plain C++ and NCCL, beside cuda_stream.h: one communicator of one process.
//
// Everything is queued on a stream's CUDA stream and returns at once. Like cuda_stream.h, for
// builds with CUDA only. An NCCL call that fails is an Error: exit 2 for a job that is set up
// wrong (two ranks on one GPU), 20 when a peer is gone, else 70.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "kernels/cuda_stream.h"

namespace cambium::cuda {

// The NCCL that this process runs with, as NCCL counts: 22809 = 2.28.9.
uint64_t nccl_version();
// Exit 2 when it is of another major version than the one compiled against, or of an older minor.
void check_nccl_version();

// All later CUDA calls of this thread use GPU `device` < device_count().
void select_device(int device);

// Whether everything launched on `stream` so far is done; reports a failed kernel.
bool has_finished(const Stream& stream);

// A point in a stream that any thread may ask about.
class StreamMark {
 public:
  StreamMark();
  ~StreamMark();
  StreamMark(const StreamMark&) = delete;
  StreamMark& operator=(const StreamMark&) = delete;
  void record(Stream& stream);
  bool is_reached() const;

 private:
  void* event_ = nullptr;  // a cudaEvent_t
};

enum class NcclKind { all_gather, reduce_scatter, all_reduce, broadcast };

// `count`: elements per rank of the smaller side.
struct NcclCollective {
  NcclKind kind = NcclKind::all_reduce;
  DType dtype = DType::f32;
  RankCombine combine = RankCombine::sum;
  const void* send = nullptr;
  void* recv = nullptr;
  int64_t count = 0;
  int root = 0;
};

// One side of a message; `peer` is an index in the communicator.
struct NcclMessage {
  enum class Side { send, receive } side = Side::send;
  int peer = 0;
  void* data = nullptr;
  int64_t count = 0;
};

// What member 0 makes and every member needs.
std::string make_nccl_id();

struct NcclPlace {
  std::string id;
  int rank = 0;
  int ranks = 1;
};

class NcclComm {
 public:
  // Returns when every member has come.
  explicit NcclComm(const NcclPlace& place);
  // Everything launched must be done, or the communicator aborted.
  ~NcclComm();
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;
  // Ends what runs, here; peers see a failure.
  void abort();
  // Why it has broken down; empty while it works. From any thread.
  std::string failure() const;

  void run(const NcclCollective& call, Stream& stream);
  // As one group: none waits for another. Messages of no element do not travel.
  void exchange(std::span<const NcclMessage> messages, DType dtype, Stream& stream);
  void barrier(Stream& stream);

 private:
  void* comm_ = nullptr;  // an ncclComm_t
  DeviceMemory barrier_word_;
};

}  // namespace cambium::cuda
