#include "src/parallel/mesh.h"

#include <algorithm>

#include "src/base/check.h"

namespace cambium {

Mesh make_mesh(const ParallelConfig& parallel) {
  Mesh mesh{parallel.pp, parallel.dp, parallel.cp, 1, parallel.ep};
  CHECK_EQ(mesh.stage_ranks() % mesh.ep, 0);
  mesh.edp = mesh.stage_ranks() / mesh.ep;
  if (parallel.shard_ranks > 0) mesh.copies = mesh.stage_ranks() / parallel.shard_ranks;
  CHECK_EQ(mesh.dp % mesh.copies, 0);
  CHECK_EQ(mesh.edp % mesh.copies, 0);
  return mesh;
}

MeshCoordinates mesh_coordinates(const Mesh& mesh, int64_t rank) {
  CHECK(rank >= 0 && rank < mesh.ranks());
  MeshCoordinates at;
  at.rank = rank;
  at.pp_index = rank / mesh.stage_ranks();
  const int64_t within = rank % mesh.stage_ranks();
  at.dp_index = within / mesh.cp;
  at.cp_index = within % mesh.cp;
  at.edp_index = within / mesh.ep;
  at.ep_index = within % mesh.ep;
  return at;
}

namespace {

std::vector<int> strided(int64_t first, int64_t count, int64_t stride) {
  std::vector<int> ranks;
  for (int64_t i = 0; i < count; ++i) ranks.push_back(static_cast<int>(first + i * stride));
  return ranks;
}

}  // namespace

std::vector<int> all_ranks(const Mesh& mesh) { return strided(0, mesh.ranks(), 1); }

std::vector<int> pipeline_group(const Mesh& mesh, const MeshCoordinates& at) {
  return strided(at.rank % mesh.stage_ranks(), mesh.pp, mesh.stage_ranks());
}

std::vector<int> context_group(const Mesh& mesh, const MeshCoordinates& at) {
  return strided(at.rank - at.cp_index, mesh.cp, 1);
}

std::vector<int> data_group(const Mesh& mesh, const MeshCoordinates& at) {
  return strided(at.pp_index * mesh.stage_ranks(), mesh.stage_ranks(), 1);
}

std::vector<int> expert_group(const Mesh& mesh, const MeshCoordinates& at) {
  return strided(at.pp_index * mesh.stage_ranks() + at.edp_index * mesh.ep, mesh.ep, 1);
}

std::vector<int> expert_data_group(const Mesh& mesh, const MeshCoordinates& at) {
  return strided(at.pp_index * mesh.stage_ranks() + at.ep_index, mesh.edp, mesh.ep);
}

std::vector<int> shard_group(const Mesh& mesh, const std::vector<int>& replicas, int64_t rank) {
  const int64_t shards = std::ssize(replicas) / mesh.copies;
  const auto own = std::ranges::find(replicas, rank) - replicas.begin();
  const auto first = replicas.begin() + own / shards * shards;
  return {first, first + shards};
}

std::vector<int> copy_group(const Mesh& mesh, const std::vector<int>& replicas, int64_t rank) {
  const int64_t shards = std::ssize(replicas) / mesh.copies;
  const auto own = std::ranges::find(replicas, rank) - replicas.begin();
  std::vector<int> ranks;
  for (int64_t copy = 0; copy < mesh.copies; ++copy) {
    ranks.push_back(replicas[copy * shards + own % shards]);
  }
  return ranks;
}

}  // namespace cambium
