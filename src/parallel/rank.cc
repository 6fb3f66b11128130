#include "src/parallel/rank.h"

#include <algorithm>
#include <cstring>

#include "kernels/copy.h"
#include "kernels/cuda_stream.h"

namespace cambium {

namespace {

constexpr int64_t kStagingBlockBytes = int64_t{1} << 20;  // a step's uploads of a small model
constexpr int64_t kStagingAlignment = 256;
constexpr uintptr_t kShapeOnlyStaging = uintptr_t{1} << 43;  // an address that nothing reads

std::unique_ptr<AddressSpace> address_space(const Config& config, RankEnvironment& environment) {
  if (environment.shape_only() != nullptr) return shape_only_address_space();
  const DeviceKind device = config.run.device;
  if constexpr (kHasCuda) {
    if (device == DeviceKind::cuda) return cuda::device_address_space();
  }
  CHECK(device == DeviceKind::cpu);
  return host_address_space(environment.ranks());
}

}  // namespace

HostBuffer::HostBuffer(DeviceKind device, int64_t bytes) : device_(device), bytes_(bytes) {
  if constexpr (kHasCuda) {
    if (device == DeviceKind::cuda) {
      data_ = static_cast<std::byte*>(cuda::allocate_pinned(bytes));
      return;
    }
  }
  data_ = new std::byte[static_cast<size_t>(bytes)];
}

HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

HostBuffer::~HostBuffer() {
  if constexpr (kHasCuda) {
    if (device_ == DeviceKind::cuda) {
      cuda::free_pinned(data_);
      return;
    }
  }
  delete[] data_;
}

Rank::Rank(const Config& run_config, RankEnvironment& rank_environment)
    : config(run_config),
      environment(rank_environment),
      host(rank_environment.host()),
      mesh(make_mesh(run_config.parallel)),
      at(mesh_coordinates(mesh, rank_environment.rank())),
      arena(INT64_MAX / 2, rank_environment.poison(), address_space(run_config, rank_environment)),
      compute(rank_environment.make_stream("compute")),
      comm(rank_environment.make_stream("comm")),
      pipe(rank_environment.make_stream("pipe")) {
  CHECK_EQ(mesh.ranks(), static_cast<int64_t>(rank_environment.ranks()));
  world = environment.make_communicator("world", all_ranks(mesh));
  pipeline = environment.make_communicator("pipeline", pipeline_group(mesh, at));
  context = environment.make_communicator("context", context_group(mesh, at));
  data = environment.make_communicator("data", data_group(mesh, at));
  expert = environment.make_communicator("expert", expert_group(mesh, at));
  const std::vector<int> data_ranks = data_group(mesh, at);
  const std::vector<int> expert_ranks = expert_data_group(mesh, at);
  expert_data = environment.make_communicator("expert_data", expert_ranks);
  if (mesh.copies > 1) {
    const auto make = [&](const char* name, const std::vector<int>& ranks) {
      return environment.make_communicator(name, ranks);
    };
    data_shard = make("data_shard", shard_group(mesh, data_ranks, at.rank));
    data_copies = make("data_copies", copy_group(mesh, data_ranks, at.rank));
    expert_shard = make("expert_shard", shard_group(mesh, expert_ranks, at.rank));
    expert_copies = make("expert_copies", copy_group(mesh, expert_ranks, at.rank));
  }
  ops.backend = run_config.run.device == DeviceKind::cuda ? Backend::cuda : Backend::reference;
  ops.charge = environment.shape_only();
  if (ops.charge != nullptr) ops.backend = Backend::shape_only;
  ops.stream = &compute;
  ops.totals = &totals;
  arena.watch(&environment.place);
}

bool Rank::has_fault(const char* kind) const { return fault_number(kind, -1) >= 0; }

int64_t Rank::fault_number(const char* kind, int64_t fallback) const {
  for (const FaultConfig& fault : config.faults) {
    if (fault.kind != kind || fault.rank != at.rank || fault.step != step) continue;
    return fault_place(fault).number;
  }
  return fallback;
}

bool Rank::has_init_fault(const char* kind) const {
  for (const FaultConfig& fault : config.faults) {
    if (fault.kind == kind && fault.rank == at.rank) return true;
  }
  return false;
}

std::byte* Rank::stage(int64_t bytes) {
  if (is_shape_only()) return reinterpret_cast<std::byte*>(kShapeOnlyStaging);
  const auto fits = [&] { return staging_used_ + bytes <= staging_[staging_block_].size_bytes(); };
  while (staging_block_ < staging_.size() && !fits()) {
    ++staging_block_;
    staging_used_ = 0;
  }
  if (staging_block_ == staging_.size()) {
    staging_.emplace_back(config.run.device, std::max(bytes, kStagingBlockBytes));
  }
  std::byte* staged = staging_[staging_block_].as<std::byte>() + staging_used_;
  staging_used_ += (bytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
  return staged;
}

Buffer Rank::upload(const void* source, int64_t bytes, MemoryClass memory_class, const char* what,
                    std::source_location site) {
  std::byte* staged = stage(bytes);
  host.touches({staged, bytes, Access::write, "staging"}, site);
  if (!is_shape_only()) std::memcpy(staged, source, static_cast<size_t>(bytes));
  Buffer buffer = arena.allocate(bytes, memory_class, what);
  copy_bytes({.from_N = {reinterpret_cast<const uint8_t*>(staged), Shape(bytes)},
              .to_N = {buffer.as<uint8_t>(), Shape(bytes)}},
             {ops, site});
  return buffer;
}

const std::byte* Rank::download(const void* from, int64_t bytes, std::source_location site) {
  std::byte* staged = stage(bytes);
  copy_bytes({.from_N = {static_cast<const uint8_t*>(from), Shape(bytes)},
              .to_N = {reinterpret_cast<uint8_t*>(staged), Shape(bytes)}},
             {ops, site});
  return staged;
}

void Rank::zero(const Buffer& buffer, std::source_location site) {
  const int64_t bytes = buffer.size_bytes();
  zero_bytes({.to_N = {buffer.as<uint8_t>(), Shape(bytes)}}, {ops, site});
}

void Rank::finish_step() {
  // Every ticket of `comm` and `pipe` was waited for by `compute` (race detection finds one that
  // was not).
  host.wait(compute.record());
  // What was downloaded is read from here on, and what was staged is overwritten.
  for (const HostBuffer& block : staging_) {
    host.touches({block.as<std::byte>(), block.size_bytes(), Access::write, "staging"});
  }
  staging_block_ = 0;
  staging_used_ = 0;
  arena.reclaim();
}

}  // namespace cambium
