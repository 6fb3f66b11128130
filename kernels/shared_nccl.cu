// NCCL behind kernels/nccl_comm.h.
//
// The sums' order is NCCL's: ring and protocol are pinned through NCCL's environment before its
// first call (src/cli/launch.cc), so equal calls on equal hosts give equal bits.
#include <nccl.h>

#include <cstring>

#include "kernels/cuda_launch.cuh"
#include "kernels/nccl_comm.h"

namespace cambium::cuda {

namespace {

ncclComm_t native(void* comm) { return static_cast<ncclComm_t>(comm); }

std::string version_text(int version) {
  return format_text("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

void check_nccl(ncclResult_t status, const char* what, void* comm = nullptr) {
  if (status == ncclSuccess || status == ncclInProgress) return;
  const bool setup = status == ncclInvalidUsage || status == ncclInvalidArgument;
  const auto code = setup                       ? ExitCode::usage
                    : status == ncclRemoteError ? ExitCode::peer_lost
                    : status == ncclSystemError ? ExitCode::peer_lost
                                                : ExitCode::internal;
  const char* last = ncclGetLastError(native(comm));
  fail(code, "{}: NCCL: {}: {}", what, ncclGetErrorString(status), last == nullptr ? "" : last);
}

ncclDataType_t data_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ncclFloat32;
    case DType::bf16:
      return ncclBfloat16;
    case DType::i32:
      return ncclInt32;
    case DType::i64:
      return ncclInt64;
    case DType::u8:
      return ncclUint8;
  }
  fail(ExitCode::internal, "dtype {} does not travel by NCCL", dtype_name(dtype));
}

}  // namespace

uint64_t nccl_version() {
  int version = 0;
  check_nccl(ncclGetVersion(&version), "ncclGetVersion");
  return static_cast<uint64_t>(version);
}

void check_nccl_version() {
  const int version = static_cast<int>(nccl_version());
  if (version / 10000 == NCCL_MAJOR && version / 100 >= NCCL_VERSION_CODE / 100) return;
  fail(ExitCode::usage,
       "NCCL {} is loaded, but this build needs {}.{} or a later {}.x; next: the libnccl.so.2 of "
       "the "
       "CUDA toolkit first in LD_LIBRARY_PATH",
       version_text(version), NCCL_MAJOR, NCCL_MINOR, NCCL_MAJOR);
}

void select_device(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

bool has_finished(const Stream& stream) {
  const cudaError_t status = cudaStreamQuery(native_stream(stream));
  if (status == cudaErrorNotReady) return false;
  check_cuda(status, stream.name().c_str());
  return true;
}

StreamMark::StreamMark() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  event_ = event;
}

StreamMark::~StreamMark() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }

void StreamMark::record(Stream& stream) {
  check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(event_), native_stream(stream)),
             "cudaEventRecord");
}

// An error is the host code's to report, which meets it at its next wait.
bool StreamMark::is_reached() const {
  return cudaEventQuery(static_cast<cudaEvent_t>(event_)) != cudaErrorNotReady;
}

std::string make_nccl_id() {
  ncclUniqueId id;
  check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId");
  return {id.internal, sizeof id.internal};
}

NcclComm::NcclComm(const NcclPlace& place) : barrier_word_(sizeof(int32_t)) {
  ncclUniqueId id;
  CHECK_EQ(place.id.size(), sizeof id.internal);
  std::memcpy(id.internal, place.id.data(), sizeof id.internal);
  check_cuda(cudaMemset(barrier_word_.data(), 0, sizeof(int32_t)), "cudaMemset");
  ncclComm_t comm = nullptr;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  check_nccl(ncclCommInitRankConfig(&comm, place.ranks, id, place.rank, &config),
             "ncclCommInitRankConfig");
  comm_ = comm;
}

NcclComm::~NcclComm() {
  if (comm_ != nullptr) ncclCommDestroy(native(comm_));
}

void NcclComm::abort() {
  if (comm_ != nullptr) ncclCommAbort(native(comm_));
  comm_ = nullptr;
}

std::string NcclComm::failure() const {
  ncclResult_t status = ncclSuccess;
  if (comm_ == nullptr || ncclCommGetAsyncError(native(comm_), &status) != ncclSuccess) return "";
  if (status == ncclSuccess || status == ncclInProgress) return "";
  return format_text("NCCL: {}", ncclGetErrorString(status));
}

void NcclComm::run(const NcclCollective& call, Stream& stream) {
  const auto count = static_cast<size_t>(call.count);
  const ncclDataType_t type = data_type(call.dtype);
  const ncclRedOp_t combine = call.combine == RankCombine::sum ? ncclSum : ncclMax;
  const cudaStream_t on = native_stream(stream);
  switch (call.kind) {
    case NcclKind::all_gather:
      return check_nccl(ncclAllGather(call.send, call.recv, count, type, native(comm_), on),
                        "ncclAllGather", comm_);
    case NcclKind::reduce_scatter:
      return check_nccl(
          ncclReduceScatter(call.send, call.recv, count, type, combine, native(comm_), on),
          "ncclReduceScatter", comm_);
    case NcclKind::all_reduce:
      return check_nccl(
          ncclAllReduce(call.send, call.recv, count, type, combine, native(comm_), on),
          "ncclAllReduce", comm_);
    case NcclKind::broadcast:
      return check_nccl(
          ncclBroadcast(call.send, call.recv, count, type, call.root, native(comm_), on),
          "ncclBroadcast", comm_);
  }
}

void NcclComm::exchange(std::span<const NcclMessage> messages, DType dtype, Stream& stream) {
  const ncclDataType_t type = data_type(dtype);
  const cudaStream_t on = native_stream(stream);
  check_nccl(ncclGroupStart(), "ncclGroupStart", comm_);
  for (const NcclMessage& message : messages) {
    if (message.count == 0) continue;
    const auto count = static_cast<size_t>(message.count);
    if (message.side == NcclMessage::Side::send) {
      check_nccl(ncclSend(message.data, count, type, message.peer, native(comm_), on), "ncclSend",
                 comm_);
    } else {
      check_nccl(ncclRecv(message.data, count, type, message.peer, native(comm_), on), "ncclRecv",
                 comm_);
    }
  }
  check_nccl(ncclGroupEnd(), "ncclGroupEnd", comm_);
}

void NcclComm::barrier(Stream& stream) {
  void* word = barrier_word_.data();
  check_nccl(ncclAllReduce(word, word, 1, ncclInt32, ncclSum, native(comm_), native_stream(stream)),
             "ncclAllReduce", comm_);
}

}  // namespace cambium::cuda
