#include "src/parallel/rank.h"

#include <cstring>

#include "kernels/copy.h"

namespace cambium {

Rank::Rank(const Config& run_config, RankEnvironment& rank_environment)
    : config(run_config),
      environment(rank_environment),
      host(rank_environment.host()),
      mesh(make_mesh(run_config.parallel)),
      at(mesh_coordinates(mesh, rank_environment.rank())),
      arena(INT64_MAX / 2, rank_environment.poison(), rank_environment.ranks()),
      compute(rank_environment.make_stream("compute")),
      comm(rank_environment.make_stream("comm")) {
  CHECK_EQ(mesh.ranks(), static_cast<int64_t>(rank_environment.ranks()));
  data = environment.make_communicator("data", data_group(mesh, at));
  expert = environment.make_communicator("expert", expert_group(mesh, at));
  expert_data = environment.make_communicator("expert_data", expert_data_group(mesh, at));
  ops.stream = &compute;
  ops.totals = &totals;
}

bool Rank::has_fault(const char* kind) const {
  for (const FaultConfig& fault : config.faults) {
    if (fault.kind == kind && fault.rank == at.rank && fault.step == step) return true;
  }
  return false;
}

bool Rank::has_init_fault(const char* kind) const {
  for (const FaultConfig& fault : config.faults) {
    if (fault.kind == kind && fault.rank == at.rank) return true;
  }
  return false;
}

Buffer Rank::upload(const void* source, int64_t bytes, MemoryClass memory_class, const char* what) {
  auto& staged = staging_.emplace_back(std::make_unique<std::byte[]>(static_cast<size_t>(bytes)));
  std::memcpy(staged.get(), source, static_cast<size_t>(bytes));
  Buffer buffer = arena.allocate(bytes, memory_class, what);
  copy_bytes({.from_N = {reinterpret_cast<const uint8_t*>(staged.get()), Shape(bytes)},
              .to_N = {buffer.as<uint8_t>(), Shape(bytes)}},
             ops);
  return buffer;
}

void Rank::zero(const Buffer& buffer) {
  const int64_t bytes = buffer.size_bytes();
  zero_bytes({.to_N = {buffer.as<uint8_t>(), Shape(bytes)}}, ops);
}

void Rank::finish_step() {
  host.wait(compute.record());
  host.wait(comm.record());
  staging_.clear();
  arena.reclaim();
}

}  // namespace cambium
