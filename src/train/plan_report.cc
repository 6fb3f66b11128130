#include "src/train/plan_report.h"

#include <algorithm>

namespace cambium {

bool PlanReport::fits() const {
  return fullest().reserved_bytes + device_reserved_bytes <= device_bytes;
}

const RankPlan& PlanReport::fullest() const {
  return *std::ranges::max_element(by_rank, {}, &RankPlan::reserved_bytes);
}

std::vector<OpShare> PlanReport::ops() const {
  std::map<std::string, OpShare> by_op;
  for (const RankPlan& rank : by_rank) {
    for (const auto& [op, totals] : rank.ops) {
      OpShare& share = by_op[op];
      share.op = op;
      share.totals.calls += totals.calls;
      share.totals.flops += totals.flops;
      share.totals.bytes += totals.bytes;
    }
    for (const auto& [op, time_ns] : rank.op_ns) by_op.at(op).time_ns += time_ns;
  }
  std::vector<OpShare> shares;
  for (auto& [op, share] : by_op) shares.push_back(std::move(share));
  std::ranges::stable_sort(shares, std::ranges::greater(), &OpShare::time_ns);
  return shares;
}

void ShapeOnlySequences::fill(int64_t, SequenceRange range, Batch& batch) const {
  const auto tokens = static_cast<size_t>(range.sequence_count * config_.train.sequence_length);
  batch = Batch{};
  for (auto* values :
       {&batch.token_T, &batch.target_T, &batch.position_T, &batch.document_start_T}) {
    values->resize(tokens);
  }
}

int64_t ShapeOnlySequences::target_count(int64_t) const {
  return config_.train.global_batch_sequences * config_.train.sequence_length;
}

void count_calls(const Rank& rank, RankPlan& plan) {
  plan.ops = rank.totals;
  const Communicator* const communicators[] = {rank.world.get(),        rank.pipeline.get(),
                                               rank.context.get(),      rank.data.get(),
                                               rank.expert.get(),       rank.expert_data.get(),
                                               rank.data_shard.get(),   rank.data_copies.get(),
                                               rank.expert_shard.get(), rank.expert_copies.get()};
  for (const Communicator* communicator : communicators) {
    if (communicator == nullptr) continue;
    for (int kind = 0; kind < kCollectiveKinds; ++kind) {
      const auto of = static_cast<CollectiveKind>(kind);
      const CommTotals& totals = communicator->totals(of);
      if (totals.calls == 0) continue;
      plan.calls[communicator->name() + " " + collective_name(of)] = totals;
    }
  }
  plan.peak_bytes = rank.arena.peak_bytes();
  plan.reserved_bytes = rank.arena.reserved_bytes();
  plan.peak_by_class = rank.arena.peak_by_class();
  plan.peak_place = rank.arena.peak_place();
  plan.peak_what = rank.arena.peak_what();
}

}  // namespace cambium
