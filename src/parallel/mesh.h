// The two meshes over the same ranks (design.md section 2).
//
//   attention mesh (pp, dp, cp): rank = (pp_index * dp + dp_index) * cp + cp_index
//   expert mesh (pp, edp, ep):   rank = (pp_index * edp + edp_index) * ep + ep_index
//
// pp is outermost and the most frequent collectives innermost; edp * ep = dp * cp, so an expert
// group is `ep` neighbours of one pipeline stage, and its data ranks are contiguous. State is
// shared out within runs of dp * cp / copies ranks (a node, say), of which each holds a copy of all
// of it.
#pragma once

#include <cstdint>
#include <vector>

#include "src/config/config.h"

namespace cambium {

struct Mesh {
  int64_t pp = 1, dp = 1, cp = 1, edp = 1, ep = 1;
  int64_t copies = 1;  // divides dp and edp
  int64_t ranks() const { return pp * dp * cp; }
  int64_t stage_ranks() const { return dp * cp; }
};

struct MeshCoordinates {
  int64_t rank = 0;
  int64_t pp_index = 0, dp_index = 0, cp_index = 0;  // attention mesh
  int64_t edp_index = 0, ep_index = 0;               // expert mesh
};

Mesh make_mesh(const ParallelConfig& parallel);
MeshCoordinates mesh_coordinates(const Mesh& mesh, int64_t rank);

// Ranks of this rank's groups, in group order.
std::vector<int> all_ranks(const Mesh& mesh);
std::vector<int> pipeline_group(const Mesh& mesh, const MeshCoordinates& at);     // pp
std::vector<int> context_group(const Mesh& mesh, const MeshCoordinates& at);      // cp
std::vector<int> data_group(const Mesh& mesh, const MeshCoordinates& at);         // dp x cp
std::vector<int> expert_group(const Mesh& mesh, const MeshCoordinates& at);       // ep
std::vector<int> expert_data_group(const Mesh& mesh, const MeshCoordinates& at);  // edp

// Of a data or expert data group, the ranks that share out the copy of this one's, and those that
// hold the same shard as this one, by copy.
std::vector<int> shard_group(const Mesh& mesh, const std::vector<int>& replicas, int64_t rank);
std::vector<int> copy_group(const Mesh& mesh, const std::vector<int>& replicas, int64_t rank);

}  // namespace cambium
