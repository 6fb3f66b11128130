// What travels while ranks compute, in the virtual time of a plan: the parts of a ring under
// attention, sharded weights ahead of their use, routed rows under the shared expert.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "sim/planner.h"
#include "src/config/schema.h"

namespace cambium::test {

namespace {

constexpr int64_t kPlannedLayers = 4, kPlannedMicroBatches = 2;
constexpr int kComputeLane = 0, kCommLane = 1;

// Four layers on four ranks in fast mode, two micro-batches each.
Trace planned_trace(const std::string& model, const std::string& parallel, int64_t sequences,
                    std::vector<std::string> sets = {}, const std::string& machine = "laptop") {
  sets.push_back("numerics.reduction=fast");
  const Config config = parse_config(
      "[model]\nlayers = 4\nhidden = 256\nheads = 8\nkv_heads = 4\nhead_dim = 32\nexperts = 8\n"
      "top_k = 2\nexpert_hidden = 256\nvocab = 512\nmax_positions = 512\n" +
          model + "[parallel]\n" + parallel +
          "[train]\nmicro_batch_sequences = 1\nsequence_length = 512\nglobal_batch_sequences = " +
          std::to_string(sequences) + "\n[logging]\ndigest_every_steps = 100\n",
      "overlap_test", sets);
  Trace trace;
  sim::plan_step({.config = config, .machine = machine, .trace = &trace});
  return trace;
}

bool is_op(const TraceSpan& span, const char* name, WorkPass pass) {
  return span.lane == kComputeLane && span.place.pass == pass && std::strcmp(span.name, name) == 0;
}

// Whether a transfer of the span's rank, posted and not done (it may wait for its peers), is under
// way at a time of it.
bool travels_under(const Trace& trace, const TraceSpan& work,
                   const std::function<bool(const TraceSpan&)>& is_wanted) {
  return std::ranges::any_of(trace.spans(), [&](const TraceSpan& transfer) {
    return transfer.lane == kCommLane && transfer.rank == work.rank &&
           std::max(transfer.start_ns, work.start_ns) < std::min(transfer.end_ns, work.end_ns) &&
           is_wanted(transfer);
  });
}

// The next part is on its way before attention reads the one at hand: under all but the last of a
// layer's four calls; backward the sums of the part before are, too.
TEST(Overlap, PartsOfARingTravelUnderAttention) {
  const Trace trace = planned_trace("", "cp = 4\ncontext = \"ring\"\n", kPlannedMicroBatches);
  const int64_t layers = 4 * kPlannedMicroBatches * kPlannedLayers;  // of all ranks
  int64_t calls = 0, hidden = 0, backward = 0, backward_hidden = 0;
  for (const TraceSpan& span : trace.spans()) {
    const auto any = [](const TraceSpan&) { return true; };
    if (is_op(span, "attention", WorkPass::forward)) {
      ++calls;
      hidden += travels_under(trace, span, any) ? 1 : 0;
    } else if (is_op(span, "attention_backward", WorkPass::backward)) {
      ++backward;
      backward_hidden += travels_under(trace, span, any) ? 1 : 0;
    }
  }
  EXPECT_EQ(calls, 4 * layers);
  EXPECT_EQ(hidden, 3 * layers);
  EXPECT_EQ(backward, 4 * layers);
  EXPECT_EQ(backward_hidden, 4 * layers);
}

// Transfers of all ranks by this name, and how many of them compute works under.
struct HiddenTransfers {
  int64_t all = 0, hidden = 0;
};
HiddenTransfers hidden_transfers(const Trace& trace, const char* name) {
  HiddenTransfers count;
  for (const TraceSpan& transfer : trace.spans()) {
    if (transfer.lane != kCommLane || std::strcmp(transfer.name, name) != 0) continue;
    ++count.all;
    count.hidden += std::ranges::any_of(trace.spans(), [&](const TraceSpan& work) {
      return work.lane == kComputeLane && work.rank == transfer.rank &&
             std::max(transfer.start_ns, work.start_ns) < std::min(transfer.end_ns, work.end_ns);
    });
  }
  return count;
}

// Weights of a layer are gathered while the one before it computes, both ways; its gradients are
// reduced while the next one computes. Each layer has two groups.
TEST(Overlap, ShardedWeightsComeAheadOfTheirUseAndGradientsLeaveBehindIt) {
  const Trace trace = planned_trace(
      "", "dp = 4\nsharding = \"full\"\n", 4 * kPlannedMicroBatches,
      {"run.device=cuda", "numerics.compute=bf16", "model.hidden=2048", "model.expert_hidden=1024",
       "train.sequence_length=4096", "model.max_positions=4096"},
      "dgx-h200");
  const int64_t steps = 4 * kPlannedMicroBatches;
  const HiddenTransfers gathers = hidden_transfers(trace, "all_gather");
  const HiddenTransfers reduced = hidden_transfers(trace, "reduce_scatter");
  EXPECT_EQ(gathers.hidden, steps * 2 * 2 * (kPlannedLayers - 1));
  EXPECT_EQ(reduced.all, steps * (2 * kPlannedLayers + 2));
  EXPECT_EQ(reduced.hidden, steps * (2 * kPlannedLayers + 1));  // not the embedding's
}

// Tokens travel to their experts while the shared expert computes.
TEST(Overlap, TheSharedExpertComputesUnderDispatch) {
  const Trace trace =
      planned_trace("shared_expert_hidden = 256\n", "dp = 4\nep = 4\n", 4 * kPlannedMicroBatches);
  int64_t calls = 0, hidden = 0;
  for (const TraceSpan& span : trace.spans()) {
    if (!is_op(span, "linear", WorkPass::forward) || span.place.stage != WorkStage::expert) {
      continue;
    }
    ++calls;
    hidden += travels_under(trace, span,
                            [&](const TraceSpan& transfer) {
                              return transfer.place.stage == WorkStage::dispatch &&
                                     transfer.place.layer == span.place.layer;
                            })
                  ? 1
                  : 0;
  }
  EXPECT_EQ(calls, 2 * 4 * kPlannedMicroBatches * kPlannedLayers);
  EXPECT_EQ(hidden, calls);
}

}  // namespace

}  // namespace cambium::test
