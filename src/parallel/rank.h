// Rank: everything one rank's trainer code uses, passed explicitly. No globals, no thread-locals.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/op.h"
#include "src/base/arena.h"
#include "src/comm/comm.h"
#include "src/comm/rank_environment.h"
#include "src/config/config.h"
#include "src/parallel/mesh.h"

namespace cambium {

// Host memory that copies in stream order read and write: pinned where ranks run on a GPU.
class HostBuffer {
 public:
  HostBuffer() = default;
  HostBuffer(DeviceKind device, int64_t bytes);
  HostBuffer(HostBuffer&& other) noexcept { *this = std::move(other); }
  HostBuffer& operator=(HostBuffer&& other) noexcept;
  ~HostBuffer();
  int64_t size_bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  DeviceKind device_ = DeviceKind::cpu;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

class Rank {
 public:
  Rank(const Config& run_config, RankEnvironment& rank_environment);
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  const Config& config;
  RankEnvironment& environment;
  Host& host;
  Mesh mesh;
  MeshCoordinates at;
  Arena arena;
  Stream& compute;                            // stages 1, 3, 5
  Stream& comm;                               // stages 2, 4, gradient and parameter collectives
  Stream& pipe;                               // messages between pipeline ranks
  std::unique_ptr<Communicator> world;        // all ranks
  std::unique_ptr<Communicator> pipeline;     // pp: the same place of every pipeline stage
  std::unique_ptr<Communicator> context;      // cp: ranks that share sequences
  std::unique_ptr<Communicator> data;         // dp x cp ranks of this pipeline stage
  std::unique_ptr<Communicator> expert;       // ep
  std::unique_ptr<Communicator> expert_data;  // edp
  // Of `data` and `expert_data`: the ranks that share out one copy of the state, and the holders of
  // the same shard. Absent where there is one copy.
  std::unique_ptr<Communicator> data_shard, data_copies, expert_shard, expert_copies;
  std::map<std::string, OpTotals> totals;  // by op, since construction
  OpContext ops;                           // on `compute`
  int64_t step = 0;                        // 1-based while a step runs

  bool is_first() const { return at.rank == 0; }
  // Nothing is computed: what was downloaded has no values.
  bool is_shape_only() const { return environment.shape_only() != nullptr; }
  bool has_fault(const char* kind) const;  // a [[faults]] entry strikes here, in this step
  // The k of its site "#k"; `fallback` when none strikes.
  int64_t fault_number(const char* kind, int64_t fallback) const;
  bool has_init_fault(const char* kind) const;  // ... strikes this rank before the first step

  Buffer activation(int64_t bytes, const char* what) {
    return arena.allocate(bytes, MemoryClass::activations, what);
  }
  Buffer workspace(int64_t bytes, const char* what) {
    return arena.allocate(bytes, MemoryClass::workspace, what);
  }
  // Host data to the device in stream order. The copy of `source` lives until `finish_step`.
  Buffer upload(const void* source, int64_t bytes, MemoryClass memory_class, const char* what,
                std::source_location site = std::source_location::current());
  template <class T>
  Buffer upload(const std::vector<T>& values, const char* what,
                std::source_location site = std::source_location::current()) {
    return upload(values.data(), static_cast<int64_t>(values.size() * sizeof(T)),
                  MemoryClass::activations, what, site);
  }
  // Device data to the host in `compute`'s order. What is returned is valid once the host has
  // waited for it, and until the first upload or download after `finish_step`.
  template <class T>
  const T* download(const Buffer& buffer,
                    std::source_location site = std::source_location::current()) {
    return reinterpret_cast<const T*>(download(buffer.data(), buffer.size_bytes(), site));
  }
  // The values at a device address, now: waits.
  template <class T>
  std::vector<T> read(const void* from, int64_t count,
                      std::source_location site = std::source_location::current()) {
    const std::byte* bytes = download(from, count * static_cast<int64_t>(sizeof(T)), site);
    host.wait(compute.record(), site);
    const T* values = landed(reinterpret_cast<const T*>(bytes), count, site);
    return {values, values + count};
  }
  // Says that the host reads what it waited for: race detection looks for a missing wait here.
  template <class T>
  const T* landed(const T* values, int64_t count,
                  std::source_location site = std::source_location::current()) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    host.touches({values, bytes, Access::read, "downloaded"}, site);
    return values;
  }
  // Fills a buffer's bytes in stream order.
  void zero(const Buffer& buffer, std::source_location site = std::source_location::current());
  // What follows belongs to this part of the step.
  void enter(const WorkPlace& place) {
    environment.place = place;
    if (ops.timer != nullptr) ops.timer->begin_stage(work_stage_name(place.stage));
  }
  // `compute` waits for `ticket`, or `comm` for everything computed so far.
  void compute_waits(const Ticket& ticket,
                     std::source_location site = std::source_location::current()) {
    compute.wait(ticket, site);
  }
  void comm_waits_for_compute(std::source_location site = std::source_location::current()) {
    comm.wait(compute.record(), site);
  }
  // Everything queued has run; staging and quarantined memory return.
  void finish_step();

 private:
  std::byte* stage(int64_t bytes);
  const std::byte* download(const void* from, int64_t bytes, std::source_location site);

  // Blocks of staged uploads and downloads, used again from the first one on after `finish_step`.
  std::vector<HostBuffer> staging_;
  size_t staging_block_ = 0;
  int64_t staging_used_ = 0;
};

}  // namespace cambium
