// Contract D3: every layout of 1, 2, 4 and 8 ranks has the bits of one rank, with 1, 2 and 4
// workers; and no rank gets there by computing what another did, holding more than its share, or
// moving more than the design says.
#include <gtest/gtest.h>

#include "src/base/philox.h"
#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

constexpr int64_t kSteps = 3;

std::vector<TestLayout> layouts() {
  std::vector<TestLayout> all;
  for (const int64_t dp : {1, 2, 4, 8}) {
    for (const int64_t ep : {1, 2, 4, 8}) {
      if (ep > dp) continue;
      for (const int64_t micro : {1, 2, 4, 8}) {
        if (8 % (dp * micro) != 0) continue;
        for (const Sharding sharding : {Sharding::none, Sharding::zero1}) {
          for (const int64_t workers : {1, 2, 4}) all.push_back({dp, ep, micro, sharding, workers});
        }
        for (const Sharding sharding : {Sharding::zero2, Sharding::full}) {
          all.push_back({dp, ep, micro, sharding, 1 + (dp + ep + micro) % 4});
        }
      }
    }
  }
  return all;
}

TEST(Layouts, AtLeast24LayoutsHaveTheBitsOfOneRank) {
  const Config config = tiny_config();
  const RunTrace one = run_trace(with_layout(config, {1, 1, 8, Sharding::none, 1}), kSteps);
  ASSERT_GE(layouts().size(), 24u * 3);
  for (const TestLayout& layout : layouts()) {
    const RunTrace run = run_trace(with_layout(config, layout), kSteps, layout.workers);
    expect_same_bits(run, one, layout_name(layout));
  }
}

TEST(Layouts, OtherModelsAndBatchesToo) {
  std::vector<Config> configs;
  Config odd = tiny_config();  // a batch whose tree is not a power of two, one expert a token
  odd.train.global_batch_sequences = 6;
  odd.model.top_k = 1;
  odd.train.sequence_length = 48;
  configs.push_back(odd);
  Config mixtral = tiny_config();
  mixtral.model.family = ModelFamily::mixtral;
  mixtral.model.qk_norm = QkNorm::none;
  mixtral.balance.loss = BalanceLoss::global_batch_lagged;
  configs.push_back(mixtral);
  Config olmoe = tiny_config();
  olmoe.model.family = ModelFamily::olmoe;
  olmoe.model.qk_norm = QkNorm::full_width;
  olmoe.model.normalize_top_k = false;
  olmoe.balance.bias_update_rate = 0.01;
  configs.push_back(olmoe);
  Config bf16 = tiny_config();
  bf16.numerics.compute = ComputeType::bf16;
  configs.push_back(bf16);
  Config tied = tiny_config();  // the embedding's gradient has two trees
  tied.model.tie_embeddings = true;
  configs.push_back(tied);
  for (const Config& config : configs) {
    const RunTrace one = run_trace(with_layout(config, {1, 1, 2, Sharding::none, 1}), kSteps);
    for (const TestLayout& layout :
         {TestLayout{2, 1, 1, Sharding::zero1, 2}, TestLayout{2, 2, 3, Sharding::none, 4}}) {
      TestLayout fitted = layout;
      if (config.train.global_batch_sequences % (fitted.dp * fitted.micro_batch) != 0) {
        fitted.micro_batch = 1;
      }
      expect_same_bits(run_trace(with_layout(config, fitted), kSteps, fitted.workers), one,
                       layout_name(fitted));
    }
  }
}

// Backward computes parts of a layer, or all of it, again: the same bits with less memory, and the
// declared operations alone happen twice.
TEST(Layouts, RecomputationKeepsTheBits) {
  Config config = tiny_config();
  config.balance.z_loss_weight = 1e-3;
  config.model.layers = 4;
  config.model.max_positions = config.train.sequence_length =
      256;  // whose activations outweigh what a step's end needs
  struct Row {
    RecomputeConfig recompute;
    std::vector<const char*> twice;
  };
  const Row rows[] = {
      {{.norms = true}, {"rms_norm"}},
      {{.attention = true}, {"attention", "qk_norm_rope"}},
      {{.norms = true, .attention = true}, {"rms_norm", "attention", "qk_norm_rope"}},
      {{.mode = RecomputeMode::full_layer},
       {"rms_norm", "attention", "qk_norm_rope", "z_loss", "grouped_up"}},
  };
  for (const TestLayout& layout :
       {TestLayout{1, 1, 8, Sharding::none, 1}, TestLayout{4, 2, 1, Sharding::zero1, 2},
        TestLayout{2, 2, 1, Sharding::full, 1, 2, 1, PipelineSchedule::dualpipev},
        TestLayout{1, 1, 1, Sharding::none, 1, 2, 2, PipelineSchedule::zb_v}}) {
    const Config kept = with_layout(config, layout);
    const RunTrace want = run_trace(kept, kSteps);
    for (const Row& row : rows) {
      Config again = kept;
      again.recompute = row.recompute;
      const RunTrace run = run_trace(again, kSteps);
      expect_same_bits(run, want, layout_name(layout));
      if (layout.pp == 1) {
        EXPECT_LT(run.ranks[0].peak_bytes, want.ranks[0].peak_bytes);
      }
      for (const auto& [op, use] : want.ranks[0].ops) {
        const bool is_twice =
            std::ranges::any_of(row.twice, [&](const char* name) { return op == name; });
        const int64_t flops = run.ranks[0].ops.at(op).flops;
        if (op == "rms_norm" && is_twice) {  // all but the final norm
          EXPECT_GT(flops, use.flops) << op;
          EXPECT_LE(flops, 2 * use.flops) << op;
        } else if (is_twice) {
          EXPECT_EQ(flops, 2 * use.flops) << op;
        } else if (row.recompute.mode == RecomputeMode::none &&
                   (op != "linear" || !row.recompute.attention)) {
          EXPECT_EQ(flops, use.flops) << op;
        }
      }
    }
  }
}

// In a pipeline later forwards have counted their tokens when a layer is computed again.
TEST(Layouts, RecomputationKeepsTheLossOfGrowingLoads) {
  Config config = with_layout(tiny_config(), {2, 2, 1, Sharding::none, 1, 2});
  config.balance.loss = BalanceLoss::global_batch;
  config.numerics.reduction = ReductionMode::fast;
  const RunTrace want = run_trace(config, kSteps);
  config.recompute.mode = RecomputeMode::full_layer;
  expect_same_bits(run_trace(config, kSteps), want, "global_batch");
}

// body(rank, model, batch) on every rank, with its first micro-batch and nothing run yet.
template <class Body>
void with_micro_batch(const Config& config, Body&& body) {
  const SyntheticSequences source(config);
  launch_ranks({.ranks = derive(config).ranks, .workers = 1}, [&](RankEnvironment& environment) {
    Rank rank(config, environment);
    TrainStep step(rank, config.model);
    step.model().initialize(1);
    step.begin(0, source);
    const MicroBatch batch = step.upload_micro_batch(source, 0, 0);
    body(rank, step.model(), batch);
    rank.finish_step();
  });
}

// The router's weights change between a forward pass and its repetition: the experts do not.
TEST(Layouts, ARecomputedLayerNeverChoosesAgain) {
  const Config config = with_layout(tiny_config(), {1, 1, 8, Sharding::none, 1});
  with_micro_batch(config, [&](Rank& rank, Model& model, const MicroBatch& batch) {
    const auto choice_of = [&](LayerState& state, Keep keep) {
      model.layer_forward(batch, 0, model.embed(batch), state, keep);
      const int64_t count = batch.tokens * config.model.top_k;
      const auto* choice = rank.download<int32_t>(state.expert_index_TK);
      rank.host.wait(rank.compute.record());
      return std::vector<int32_t>(choice, choice + count);
    };
    LayerState first, other;
    const std::vector<int32_t> chosen = choice_of(first, Keep::for_backward);
    const ParamGroup& group = *model.groups()[0];
    for (const ParamPiece& piece : group.stored_pieces()) {
      if (piece.tensor->canonical.role != TensorRole::router) continue;
      std::vector<float> values(static_cast<size_t>(piece.elements));
      fill_normal(values.data(), 0, piece.elements, 1.0f, 99, 1);
      model.groups()[0]->set_weights(piece, values);
    }
    model.groups()[0]->refresh_compute_copy();
    EXPECT_NE(choice_of(other, Keep::for_backward), chosen);
    LayerState again;
    again.expert_index_TK = std::move(first.expert_index_TK);
    EXPECT_EQ(choice_of(again, Keep::recomputing), chosen);
  });
}

// Calls by op of one micro-batch: of its backward pass, and of the weight gradients that it left.
struct BackwardWork {
  std::map<std::string, int64_t> input, weights;
};
BackwardWork backward_work(const Config& config, WeightGradients when) {
  BackwardWork work;
  with_micro_batch(config, [&](Rank& rank, Model& model, const MicroBatch& batch) {
    for (const auto& group : model.groups()) group->begin_step();
    ChunkState state;
    model.forward({batch, 0, {}, &state});
    const auto since_now = [&](auto&& body) {
      rank.totals.clear();
      body();
      std::map<std::string, int64_t> calls;
      for (const auto& [op, use] : rank.totals) calls[op] = use.calls;
      return calls;
    };
    work.input = since_now([&] { model.backward({batch, 0, {}, state, when}); });
    if (when == WeightGradients::later) {
      work.weights = since_now([&] { model.backward_weight(batch, 0, state); });
    }
  });
  return work;
}

// All of them wait, of every linear layer, gain, bias and the embedding; none is done twice. (The
// head's are done in the forward pass, with its logits.)
TEST(Layouts, DeferredWeightGradientsAreThoseOfAllLayers) {
  Config config = with_layout(tiny_config(), {1, 1, 8, Sharding::none, 1});
  config.model.dense_layers = {1};
  config.model.dense_hidden = 24;
  config.model.shared_expert_hidden = 24;
  config.model.shared_expert_gate = true;
  config.model.attention_bias = true;
  const BackwardWork now = backward_work(config, WeightGradients::now);
  const BackwardWork later = backward_work(config, WeightGradients::later);
  for (const char* op : {"linear_wgrad", "grouped_wgrad", "embedding_wgrad", "leaf_fold"}) {
    EXPECT_FALSE(later.input.contains(op)) << op;
    EXPECT_TRUE(later.weights.contains(op)) << op;
  }
  std::map<std::string, int64_t> both = later.input;
  for (const auto& [op, calls] : later.weights) both[op] += calls;
  EXPECT_EQ(both, now.input);
}

// Activation bytes that one layer's forward keeps for its backward, on the last rank.
int64_t kept_bytes(const Config& config) {
  int64_t bytes = 0;
  with_micro_batch(config, [&](Rank& rank, Model& model, const MicroBatch& batch) {
    const Buffer x_TD = model.embed(batch);
    const int64_t before = rank.arena.used_bytes(MemoryClass::activations);
    LayerState state;
    const Buffer out_TD =
        model.layer_forward(batch, 0, model.embed(batch), state, Keep::for_backward);
    const int64_t kept = rank.arena.used_bytes(MemoryClass::activations) - before;
    if (rank.at.rank + 1 == rank.mesh.ranks()) bytes = kept - out_TD.size_bytes();
  });
  return bytes;
}

// Between up and down projection the gate and up rows alone stay, whatever `recompute` says: its
// mode `swiglu` is what `none` does. A wider MLP keeps 2 floats a row more, not 3.
TEST(Layouts, TheSwigluResultIsNeverKept) {
  const Config experts = with_layout(tiny_config(), {1, 1, 8, Sharding::none, 1});
  Config shared = experts, dense = experts;
  shared.model.shared_expert_hidden = 24;
  dense.model.dense_layers = {0};
  dense.model.dense_hidden = 24;
  const int64_t tokens = 8 * experts.train.sequence_length;
  struct Row {
    Config config;
    int64_t ModelConfig::*width;
    int64_t rows;
  };
  for (const Row& row : {Row{experts, &ModelConfig::expert_hidden, tokens * experts.model.top_k},
                         Row{shared, &ModelConfig::shared_expert_hidden, tokens},
                         Row{dense, &ModelConfig::dense_hidden, tokens}}) {
    Config wide = row.config;
    wide.model.*row.width += 16;
    const int64_t more = kept_bytes(wide) - kept_bytes(row.config);
    EXPECT_EQ(more, 4 * 2 * 16 * row.rows);
  }
  Config swiglu = with_layout(tiny_config(), {2, 2, 1, Sharding::full, 1, 2});
  const RunTrace none = run_trace(swiglu, 1);
  swiglu.recompute.mode = RecomputeMode::swiglu;
  const RunTrace run = run_trace(swiglu, 1);
  expect_same_bits(run, none, "swiglu");
  for (size_t i = 0; i < run.ranks.size(); ++i) {
    EXPECT_EQ(run.ranks[i].peak_bytes, none.ranks[i].peak_bytes);
    for (const auto& [op, use] : none.ranks[i].ops) {
      EXPECT_EQ(run.ranks[i].ops.at(op).flops, use.flops) << op;
    }
  }
}

// An exact ring keeps the keys and values of whole sequences, as the plan of an all-gather has it;
// a fast one its own.
TEST(Layouts, AnExactRingKeepsWhatAnAllGatherKeeps) {
  Config gather = with_layout(tiny_config(), {1, 1, 8, Sharding::none, 1, 1, 2});
  gather.numerics.block_tokens = 8;
  Config ring = gather;
  ring.parallel.context = ContextExchange::ring;
  EXPECT_EQ(kept_bytes(ring), kept_bytes(gather));
  gather.numerics.reduction = ring.numerics.reduction = ReductionMode::fast;
  const ModelConfig& model = gather.model;
  const int64_t tokens = 8 * gather.train.sequence_length;
  EXPECT_EQ(kept_bytes(gather) - kept_bytes(ring),
            4 * 2 * tokens * model.kv_heads * model.head_dim);
}

TEST(Layouts, AnotherSeedGivesOtherBits) {
  Config config = with_layout(tiny_config(), {1, 1, 8, Sharding::none, 1});
  const RunTrace one = run_trace(config, 1);
  config.run.seed = 77;
  EXPECT_NE(total_hex(run_trace(config, 1).steps[0]), total_hex(one.steps[0]));
}

// Ops whose FLOPs are spent where tokens or owned shards are; `clip_scale` folds a small table on
// every rank.
TEST(Layouts, NoRankComputesWhatAnotherDid) {
  const Config config = tiny_config();
  const RunTrace one = run_trace(with_layout(config, {1, 1, 1, Sharding::zero1, 1}), kSteps);
  for (const TestLayout& layout : layouts()) {
    if (layout.sharding != Sharding::zero1 || layout.workers != 2) continue;
    const RunTrace run = run_trace(with_layout(config, layout), kSteps, 2);
    for (const auto& [op, want] : one.ranks[0].ops) {
      if (op == "clip_scale") continue;
      int64_t flops = 0;
      for (const RankUse& rank : run.ranks) {
        const auto found = rank.ops.find(op);
        if (found != rank.ops.end()) flops += found->second.flops;
      }
      EXPECT_EQ(flops, want.flops) << op << ", " << layout_name(layout);
    }
  }
}

TEST(Layouts, OptimizerStateIsShared) {
  const Config config = tiny_config();
  const RunTrace one = run_trace(with_layout(config, {1, 1, 1, Sharding::zero1, 1}), 1);
  const RunTrace eight = run_trace(with_layout(config, {8, 4, 1, Sharding::zero1, 1}), 1);
  // Shards are whole blocks of 4,096 elements: at most one block of padding per group and state.
  constexpr int64_t kPadding = 2 * 2 * 4096 * 4;
  for (const RankUse& rank : eight.ranks) {
    EXPECT_LE(rank.optimizer_bytes, one.ranks[0].optimizer_bytes / 8 + kPadding);
    EXPECT_LT(rank.weight_bytes, one.ranks[0].weight_bytes);
    EXPECT_LT(rank.peak_bytes, one.ranks[0].peak_bytes / 2);
  }
}

// Experts' weights are gathered over their own data ranks, all others over all replicas: wider
// experts change the one, a wider vocabulary the other.
TEST(Layouts, ExpertsAreShardedOverTheirOwnAxisAlone) {
  const auto gathered = [](int64_t expert_hidden, int64_t vocab, int64_t ep) {
    Config config = with_layout(tiny_config(), {4, ep, 2, Sharding::full, 1});
    config.model.expert_hidden = expert_hidden;
    config.model.vocab = vocab;
    config.numerics.reduction = ReductionMode::fast;  // no presence flags travel
    const RankUse use = run_trace(config, 1).ranks[0];
    return std::pair(use.data_gather.sent_bytes, use.expert_data_gather.sent_bytes);
  };
  // Shards are whole blocks of 4,096 elements, and so are these tensors.
  const auto [dense, expert] = gathered(128, 512, 2);
  const auto [dense_of_wide, expert_of_wide] = gathered(256, 512, 2);
  EXPECT_EQ(dense_of_wide, dense);
  EXPECT_EQ(expert_of_wide, 2 * expert);
  const auto [dense_of_words, expert_of_words] = gathered(128, 1024, 2);
  EXPECT_GT(dense_of_words, dense);
  EXPECT_EQ(expert_of_words, expert);
  EXPECT_EQ(gathered(128, 512, 4).second, 0);  // each expert is on one rank
}

// Each token goes once to each other rank that holds one of its experts: the bytes of a layer's
// dispatch follow from the routing, and are far below sending every row.
TEST(Layouts, BytesPerCollectiveAreTheDesigns) {
  const Config config = with_layout(tiny_config(), {2, 2, 4, Sharding::zero1, 1});
  const RunTrace run = run_trace(config, 1);
  const int64_t tokens = 4 * config.train.sequence_length;
  const int64_t K = config.model.top_k, D = config.model.hidden;
  for (const RankUse& rank : run.ranks) {
    // At most all tokens to the one other rank: hidden row, experts, weights, block; rows home (K
    // of them, exact mode); backward the same with gradients of the weights; and the counts.
    const int64_t most = config.model.layers * (tokens * (4 * D + 8 * K + 4) + tokens * K * 4 * D +
                                                tokens * 4 * D + tokens * K * (4 * D + 4) + 8);
    EXPECT_LE(rank.expert_all_to_all.sent_bytes, most);
    EXPECT_GT(rank.expert_all_to_all.sent_bytes, most / 8);
    // The gradient's forest has one node per rank here: a reduce-scatter's volume.
    EXPECT_EQ(rank.expert_data_all_to_all.sent_bytes, 0);
    EXPECT_LE(rank.data_all_to_all.sent_bytes, rank.weight_bytes);
  }
}

TEST(Layouts, FastModeRepeatsItselfAndStaysClose) {
  Config config = tiny_config();
  const RunTrace exact = run_trace(with_layout(config, {4, 2, 1, Sharding::zero1, 1}), kSteps);
  config.numerics.reduction = ReductionMode::fast;
  for (const Sharding sharding : {Sharding::none, Sharding::zero1}) {
    const Config fast = with_layout(config, {4, 2, 1, sharding, 1});
    const RunTrace run = run_trace(fast, kSteps, 1);
    expect_same_bits(run_trace(fast, kSteps, 4, 9), run, "fast, 4 workers, schedule seed 9");
    for (int64_t i = 0; i < kSteps; ++i) {
      // fp32 sums of a few hundred terms in another order: c eps sqrt(terms), c = 4 per step, and
      // AdamW's normalisation passes relative errors on.
      const double bound = 4 * 1.2e-7 * 16 * static_cast<double>(i + 1);
      EXPECT_NEAR(run.steps[i].loss / exact.steps[i].loss, 1.0, bound);
      EXPECT_NEAR(run.steps[i].grad_norm / exact.steps[i].grad_norm, 1.0, 8 * bound);
    }
  }
}

TEST(Layouts, MustFailWithAWrongGradientScale) {
  Config config = with_layout(tiny_config(), {4, 2, 1, Sharding::zero1, 1});
  const RunTrace right = run_trace(config, 1);
  config.faults.push_back({"expert_gradient_scale", 1, 1});
  EXPECT_NE(total_hex(run_trace(config, 1).steps[0]), total_hex(right.steps[0]));
}

}  // namespace

}  // namespace cambium::test
