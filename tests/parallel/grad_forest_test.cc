// GradForest against a plain recursive sum with floating-point values: any split of the blocks over
// ranks and micro-batches ends in the same bits.
#include "src/parallel/grad_forest.h"

#include <gtest/gtest.h>

#include <map>

#include "kernels/grad_target.h"
#include "src/base/philox.h"
#include "src/parallel/batch_layout.h"

namespace cambium {

namespace {

float block_value(int64_t block) {
  return static_cast<float>(random_uniform({7, RandomStream::data, 1}, block) - 0.5);
}

float canonical_sum(BlockRange range) {
  if (range.count() == 1) return block_value(range.first);
  const int64_t middle = range.first + canonical_split(range.count());
  return canonical_sum({range.first, middle}) + canonical_sum({middle, range.end});
}

// One rank's slots after adding `calls`, as a weight-gradient kernel would fill them.
std::map<int32_t, float> fill_slots(GradForest& forest,
                                    const std::vector<std::vector<BlockRange>>& calls) {
  std::map<int32_t, float> slots;
  for (const auto& ranges : calls) {
    for (const NodePlan& plan : forest.add(ranges)) {
      float value = canonical_sum(plan.range);
      for (const int32_t fold : plan.folds) value = slots.at(fold) + value;
      slots[plan.destination] = value;
    }
  }
  return slots;
}

TEST(GradForest, AnyLayoutGivesTheSameBits) {
  for (const int64_t sequences : {1, 6, 8, 12}) {
    for (const int64_t blocks_per_sequence : {1, 3, 4}) {
      const int64_t total = sequences * blocks_per_sequence;
      for (const int64_t dp : {1, 2, 3, 4, 6}) {
        for (const int64_t micro : {1, 2, 3}) {
          if (sequences % (dp * micro) != 0) continue;
          std::vector<ForestNode> held;
          std::vector<float> values;
          for (int64_t rank = 0; rank < dp; ++rank) {
            GradForest forest(total);
            std::vector<std::vector<BlockRange>> calls;
            const int64_t per_rank = sequences / dp;
            for (int64_t s = 0; s < per_rank; s += micro) {
              const int64_t first = (rank * per_rank + s) * blocks_per_sequence;
              calls.push_back({{first, first + micro * blocks_per_sequence}});
            }
            const auto slots = fill_slots(forest, calls);
            for (const ForestNode& node : forest.nodes()) {
              held.push_back({node.range, static_cast<int32_t>(values.size())});
              values.push_back(slots.at(node.slot));
            }
            // A forest stays logarithmic: two nodes a level at most.
            EXPECT_LE(forest.slots(), 14);
          }
          const MergePlan plan = plan_merges(total, held);
          for (const MergeStep& step : plan.steps) values[step.left] += values[step.right];
          EXPECT_EQ(values[plan.root(total)], canonical_sum({0, total}));
        }
      }
    }
  }
}

TEST(GradForest, CoverJoinsNeighboursAndIsMinimal) {
  EXPECT_EQ(canonical_cover(8, {{0, 2}, {2, 4}}), (std::vector<BlockRange>{{0, 4}}));
  EXPECT_EQ(canonical_cover(8, {{1, 4}}), (std::vector<BlockRange>{{1, 2}, {2, 4}}));
  EXPECT_EQ(canonical_cover(6, {{4, 6}}), (std::vector<BlockRange>{{4, 6}}));
  EXPECT_EQ(canonical_cover(8, {{0, 2}, {4, 6}}), (std::vector<BlockRange>{{0, 2}, {4, 6}}));
}

TEST(GradForest, RowsThatArriveOutOfOrderKeepTheirPlaces) {
  // Two zigzag halves of one sequence, then those of another rank: [0,2) [6,8) [2,4) [4,6).
  GradForest forest(8);
  const auto plans = forest.add({{0, 2}, {6, 8}, {2, 4}, {4, 6}});
  std::vector<int64_t> places;
  for (const NodePlan& plan : plans) places.push_back(plan.first_arrival);
  EXPECT_EQ(places, (std::vector<int64_t>{0, 2, 4, 6}));  // [2,4) and [4,6) are no siblings
  ASSERT_EQ(forest.nodes().size(), 1u);
  EXPECT_EQ(forest.nodes()[0].range, (BlockRange{0, 8}));
}

TEST(GradForest, MissingBlocksAreNoticed) {
  const MergePlan plan = plan_merges(4, {{{0, 2}, 0}, {{3, 4}, 1}});
  EXPECT_EQ(plan.held.size(), 2u);
  EXPECT_THROW(plan.root(4), Error);
  EXPECT_THROW(plan_merges(4, {{{0, 2}, 0}, {{0, 2}, 1}, {{2, 4}, 2}}), Error);
}

TEST(Mesh, EveryRankHasOnePlaceInBothMeshes) {
  ParallelConfig parallel;
  parallel.pp = 2;
  parallel.dp = 4;
  parallel.cp = 2;
  parallel.ep = 4;
  const Mesh mesh = make_mesh(parallel);
  EXPECT_EQ(mesh.edp, 2);
  for (int64_t rank = 0; rank < mesh.ranks(); ++rank) {
    const MeshCoordinates at = mesh_coordinates(mesh, rank);
    EXPECT_EQ((at.pp_index * mesh.dp + at.dp_index) * mesh.cp + at.cp_index, rank);
    EXPECT_EQ((at.pp_index * mesh.edp + at.edp_index) * mesh.ep + at.ep_index, rank);
    EXPECT_EQ(expert_group(mesh, at)[at.ep_index], rank);
    EXPECT_EQ(expert_data_group(mesh, at)[at.edp_index], rank);
    EXPECT_EQ(data_group(mesh, at)[rank % mesh.stage_ranks()], rank);
  }
}

}  // namespace

}  // namespace cambium
