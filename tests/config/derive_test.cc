// Every rule between keys, with its values in the message; the numbers on known models.
#include <algorithm>
#include <cctype>
#include <set>

#include "gtest/gtest.h"
#include "src/base/error.h"
#include "src/config/faults.h"
#include "src/config/presets.h"
#include "tests/tree.h"

namespace cambium {
namespace {

using Sets = std::vector<std::string>;

Derived derive_from(const std::string& preset, Sets sets) {
  return derive(parse_config("[model]\npreset = \"" + preset + "\"\n", "x.toml", sets));
}

struct RuleRow {
  Sets sets;
  const char* message;
};

// On the tiny preset: 4 experts, 2 heads of 16, vocabulary 512; batch 8, sequence 128, blocks 32.
const RuleRow kRules[] = {
    {{"parallel.dp=6", "parallel.ep=3", "train.global_batch_sequences=6"},
     "parallel.ep = 3 does not divide model.experts = 4; nearest: 2 or 4"},
    {{"parallel.dp=2", "parallel.ep=4"},
     "parallel.ep = 4 does not divide parallel.dp * parallel.cp = 2; nearest: 2"},
    {{"parallel.dp=4", "parallel.shard_ranks=3"},
     "parallel.shard_ranks = 3 is no divisor of parallel.dp * parallel.cp = 4 that is a multiple "
     "of "
     "parallel.cp = 1 and parallel.ep = 1; nearest: 2 or 4"},
    {{"parallel.dp=8", "parallel.ep=4", "parallel.shard_ranks=2"},
     "parallel.shard_ranks = 2 is no divisor of parallel.dp * parallel.cp = 8 that is a multiple "
     "of "
     "parallel.cp = 1 and parallel.ep = 4; nearest: 4"},
    {{"parallel.dp=4", "parallel.shard_ranks=2", "parallel.sharding=none"},
     "parallel.shard_ranks = 2 with parallel.sharding = none, which shares out nothing; nearest "
     "supported: parallel.sharding = zero1, or no parallel.shard_ranks"},
    {{"parallel.ep=8"}, "parallel.ep = 8 does not divide model.experts = 4; nearest: 4"},
    {{"parallel.dp=3"},
     "parallel.dp = 3 does not divide train.global_batch_sequences = 8; nearest: 2 or 4"},
    {{"parallel.dp=2", "train.micro_batch_sequences=3"},
     "train.micro_batch_sequences = 3 does not divide the 4 sequences of a data rank"},
    {{"train.micro_batch_sequences=16"}, "nearest: 8"},
    {{"train.sequence_length=100"},
     "train.sequence_length = 100 is not a multiple of numerics.block_tokens = 32; nearest: 96 or"},
    {{"numerics.block_tokens=256"}, "nearest: 256"},
    {{"parallel.cp=4", "train.sequence_length=128"},
     "train.sequence_length = 128 is not a multiple of 2 * parallel.cp * numerics.block_tokens = "
     "256"},
    {{"train.sequence_length=8192"},
     "train.sequence_length = 8192 is above model.max_positions = 4096"},
    {{"model.kv_heads=3"}, "model.kv_heads = 3 does not divide model.heads = 2"},
    {{"model.heads=6", "model.kv_heads=4"},
     "model.kv_heads = 4 does not divide model.heads = 6; nearest: 3 or 6"},
    {{"model.head_dim=15"}, "model.head_dim = 15 is odd"},
    {{"model.top_k=5"}, "model.top_k = 5 is above model.experts = 4"},
    {{"model.family=olmoe"}, "model.qk_norm = per_head does not go with model.family = olmoe"},
    {{"model.qk_norm=none"}, "model.qk_norm = none does not go with model.family = qwen3_moe"},
    {{"model.hidden=16777216", "model.expert_hidden=16777216", "model.layers=10000"},
     "model.hidden = 16777216"},
    {{"data.train=a.txt", "model.vocab=200"},
     "model.vocab = 200 is too small for data.tokenizer = bytes"},
    {{"data.train=a.txt", "data.tokenizer_vocab=1000"},
     "data.tokenizer_vocab = 1000 is above model.vocab = 512"},
    {{"balance.loss=micro_batch"}, "balance.loss = micro_batch depends on the layout"},
    {{"balance.routing=replay"}, "balance.routing = replay needs balance.routing_file"},
    {{"balance.routing_file=a.h5"}, "read by balance.routing = replay alone, not by learned"},
    {{"balance.routing=even", "model.experts=5", "model.top_k=2"},
     "train.sequence_length = 128 is not a multiple of model.experts = 5; nearest: 125 or 130"},
    {{"balance.loss=global_batch"}, "use balance.loss = global_batch_lagged"},
    {{"parallel.pp=2", "parallel.schedule=dualpipev", "parallel.dp=4"},
     "parallel.schedule = dualpipev with parallel.pp = 2 needs 4 micro-batches of each data rank, "
     "at least; there are 2 (train.global_batch_sequences = 8 / parallel.dp = 4 / "
     "train.micro_batch_sequences = 1); nearest supported: train.global_batch_sequences = 16, or "
     "parallel.schedule = 1f1b"},
    {{"parallel.pp=2", "parallel.schedule=zb_v", "parallel.dp=4"}, "needs 3 micro-batches"},
    {{"parallel.pp=4", "parallel.schedule=zb_h1", "parallel.dp=4"}, "needs 4 micro-batches"},
    {{"parallel.pp=2", "parallel.schedule=interleaved_1f1b", "parallel.dp=8"},
     "needs a multiple of 2 micro-batches of each data rank; there are 1"},
    {{"parallel.pp=2", "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=1"},
     "parallel.schedule = interleaved_1f1b needs parallel.virtual_stages of at least 2, not 1"},
    {{"parallel.pp=5"},
     "model.layers = 2 is too few for the 5 stages of parallel.pp = 5 with parallel.schedule = "
     "1f1b (1 on each rank): at least 3, as all but the first and the last stage hold a layer; "
     "nearest supported: parallel.pp = 4"},
    {{"parallel.pp=3", "parallel.schedule=zb_v", "parallel.dp=1"},
     "nearest supported: parallel.pp = 2"},
    {{"run.device=cuda", "numerics.compute=fp32"}, "nearest supported: numerics.compute = bf16"},
    {{"run.device=cuda", "numerics.compute=bf16", "numerics.reduction=fast", "parallel.cp=2",
      "train.sequence_length=256", "model.max_positions=256"},
     "train.sequence_length = 256 is not a multiple of 2 * parallel.cp * (attention's tile on a "
     "GPU, 128) = 512; nearest: 512"},
    {{"run.transport=nccl"}, "run.transport = nccl with run.device = cpu"},
    {{"parallel.dp=2", "faults=[{kind='rng_rank',rank=1,probability=0.5}]"},
     "faults.probability = 0.5 of kind rng_rank draws rank and step"},
    {{"checkpoint.every_steps=4", "train.steps=10", "faults=[{kind='torn_write',step=9}]"},
     "step 9 has none: checkpoints are written every 4 steps and after step 10; nearest: "
     "faults.step = 10"},
    {{"train.steps=1", "faults=[{kind='disk_full',site='world'}]"}, "a save has no communicator"},
    {{"faults=[{kind='rank_crash',seconds=2}]"}, "faults.seconds = 2 is of pause"},
    {{"parallel.dp=2", "faults=[{kind='rng_rank',rank=2}]"},
     "faults.rank = 2 of kind rng_rank is not below the layout's 2 ranks"},
    {{"parallel.dp=65536", "parallel.cp=2"}, "more than 65536 ranks"},
    {{"train.global_batch_sequences=16777216", "train.sequence_length=16777216",
      "model.max_positions=16777216"},
     "more than 2^40 tokens"},
};

TEST(DeriveRules, EachIsRefusedWithItsValues) {
  for (const RuleRow& row : kRules) {
    try {
      derive_from("tiny", row.sets);
      ADD_FAILURE() << "accepted: " << row.message;
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), ExitCode::usage);
      EXPECT_NE(std::string(error.what()).find(row.message), std::string::npos)
          << "'" << error.what() << "' lacks '" << row.message << "'";
    }
  }
}

std::string refusal_of(const Sets& sets) {
  try {
    derive_from("tiny", sets);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// "KEY=VALUE" of a refusal's first proposal: what follows "nearest supported: ", or the first
// number after "nearest: " for the key that the refusal begins with. Empty: it has none.
std::string proposal_of(const std::string& refusal) {
  const auto after = [&](const std::string& mark) {
    const size_t at = refusal.find(mark);
    return at == std::string::npos ? "" : refusal.substr(at + mark.size());
  };
  std::string supported = after("nearest supported: ");
  if (supported.starts_with("parallel.") || supported.starts_with("numerics.") ||
      supported.starts_with("train.")) {
    supported = supported.substr(0, supported.find_first_of(",;"));
    return supported.erase(supported.find(" = "), 1).erase(supported.find("= ") + 1, 1);
  }
  const std::string nearest = after("nearest: ");
  if (nearest.empty() || !std::isdigit(static_cast<unsigned char>(nearest[0]))) return "";
  return refusal.substr(0, refusal.find(' ')) + "=" + nearest.substr(0, nearest.find(' '));
}

// A refusal without its values and its advice.
std::string rule_of(std::string refusal) {
  refusal = refusal.substr(0, refusal.find("nearest"));
  std::erase_if(refusal, [](char c) { return std::isdigit(static_cast<unsigned char>(c)); });
  return refusal;
}

// Whoever takes the advice is not refused by the same rule again.
TEST(DeriveRules, WhatIsNearestIsAccepted) {
  int64_t proposals = 0;
  for (const RuleRow& row : kRules) {
    const std::string refusal = refusal_of(row.sets), proposal = proposal_of(refusal);
    if (proposal.empty()) continue;
    ++proposals;
    Sets sets = row.sets;
    sets.push_back(proposal);
    EXPECT_NE(rule_of(refusal_of(sets)), rule_of(refusal)) << proposal;
  }
  EXPECT_GE(proposals, 15);
}

TEST(DeriveRules, WhatIsTrivialIsAccepted) {
  for (const char* sharding : {"none", "zero1", "zero2", "full"}) {
    EXPECT_EQ(derive_from("tiny", {std::string("parallel.sharding=") + sharding}).ranks, 1);
  }
  for (const char* schedule : {"gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipev"}) {
    const Sets sets = {std::string("parallel.schedule=") + schedule, "parallel.dp=2"};
    EXPECT_EQ(derive_from("tiny", sets).ranks, 2);
  }
  for (const char* schedule : {"gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipev"}) {
    const Sets sets = {std::string("parallel.schedule=") + schedule, "parallel.pp=2",
                       "parallel.cp=2", "parallel.dp=2", "parallel.sharding=full"};
    EXPECT_EQ(derive_from("tiny", sets).ranks, 8);
  }
  for (const char* loss : {"micro_batch", "global_batch"}) {
    const Sets sets = {std::string("balance.loss=") + loss, "numerics.reduction=fast"};
    EXPECT_EQ(derive_from("tiny", sets).ranks, 1);
  }
}

TEST(DeriveNumbers, QuickstartLayout) {
  const Derived derived = derive_from("quickstart", {"parallel.dp=8", "parallel.ep=4"});
  EXPECT_EQ(derived.ranks, 8);
  EXPECT_EQ(derived.edp, 2);
  EXPECT_EQ(derived.experts_per_rank, 2);
  EXPECT_EQ(derived.sequences_per_data_rank, 1);
  EXPECT_EQ(derived.micro_batches, 1);
  EXPECT_EQ(derived.tokens_per_micro_batch, 128);
  EXPECT_EQ(derived.tokens_per_step, 1024);
  EXPECT_EQ(derived.blocks_per_sequence, 4);
  EXPECT_EQ(derived.total_blocks, 32);
  EXPECT_EQ(derived.expert_parameters, 3 * 128 * 256);
  // 4 layers of 49,152 attention + 1,024 router + 320 norms + 8 experts of 98,304; 128 in the last
  // norm; two 1,024 x 128 matrices, of which the input's is a look-up.
  EXPECT_EQ(derived.parameters, 4 * (49152 + 1024 + 320 + 8 * 98304) + 128 + 2 * 131072);
  EXPECT_EQ(derived.active_parameters, 4 * (49152 + 1024 + 320 + 2 * 98304) + 128 + 131072);
  EXPECT_GE(derived.active_parameters, 1'000'000);
  EXPECT_NEAR(derived.training_flops_per_token * 1024, 7.28e9, 0.01e9);
}

TEST(DeriveNumbers, PublishedModelsHaveTheirSizes) {
  const auto billions = [](const char* preset) {
    Sets sets = {"data.tokenizer=sentencepiece"};
    return static_cast<double>(derive_from(preset, sets).parameters) / 1e9;
  };
  EXPECT_NEAR(billions("qwen3-30b-a3b"), 30.53, 0.01);
  EXPECT_NEAR(billions("mixtral-8x7b"), 46.70, 0.01);
  EXPECT_NEAR(billions("olmoe-1b-7b"), 6.92, 0.01);
}

TEST(DeriveNumbers, IntervalsAreCutToTheSteps) {
  const Derived cut =
      derive_from("tiny", {"train.steps=10", "schedule.warmup_steps=1000", "schedule.kind=wsd",
                           "schedule.decay_steps=1000", "checkpoint.every_steps=1000",
                           "train.eval_every_steps=1000"});
  EXPECT_EQ(cut.warmup_steps, 10);
  EXPECT_EQ(cut.decay_steps, 0);
  EXPECT_EQ(cut.checkpoint_every_steps, 10);
  EXPECT_EQ(cut.eval_every_steps, 10);
  const Derived given = derive_from(
      "tiny", {"train.steps=10", "schedule.warmup_steps=2", "checkpoint.every_steps=3"});
  EXPECT_EQ(given.warmup_steps, 2);
  EXPECT_EQ(given.decay_steps, 2);
  EXPECT_EQ(given.checkpoint_every_steps, 3);
  EXPECT_EQ(given.eval_every_steps, 10);
}

TEST(DeriveNumbers, LayoutsThatDivideAgreeOnBlocks) {
  int layouts = 0;
  for (int dp = 1; dp <= 8; dp *= 2) {
    for (int ep = 1; ep <= std::min(dp, 4); ep *= 2) {
      for (int micro = 1; micro <= 8 / dp; micro *= 2) {
        const Sets sets = {"parallel.dp=" + std::to_string(dp), "parallel.ep=" + std::to_string(ep),
                           "train.micro_batch_sequences=" + std::to_string(micro)};
        const Derived derived = derive_from("tiny", sets);
        EXPECT_EQ(derived.total_blocks, 32);
        EXPECT_EQ(derived.micro_batches * micro * dp, 8);
        EXPECT_EQ(derived.experts_per_rank * ep, 4);
        ++layouts;
      }
    }
  }
  EXPECT_EQ(layouts, 4 * 1 + 3 * 2 + 2 * 3 + 1 * 3);
}

std::vector<FaultConfig> draw(const std::string& faults, uint64_t seed, StepRange steps) {
  const Sets sets = {"parallel.dp=4", "train.steps=12", "checkpoint.every_steps=5",
                     "faults=[" + faults + "]"};
  Config config = parse_config("[model]\npreset = \"tiny\"\n", "x.toml", sets);
  config.run.seed = seed;
  return drawn_faults(config, steps);
}

TEST(DrawnFaults, StrikeAsOftenAsToldAtPlacesOfTheSeed) {
  int crashes = 0;
  std::set<int64_t> ranks, steps, saves;
  for (uint64_t seed = 1; seed <= 400; ++seed) {
    const auto text =
        "{kind='rank_crash',probability=0.25},{kind='torn_write',probability=1},"
        "{kind='bit_flip',rank=2,step=3}";
    const auto faults = draw(text, seed, {2, 12});
    for (const FaultConfig& fault : faults) {
      EXPECT_EQ(fault.probability, 0);
      if (fault.kind == "torn_write") saves.insert(fault.step);
      if (fault.kind != "rank_crash") continue;
      ++crashes;
      ranks.insert(fault.rank);
      steps.insert(fault.step);
    }
    EXPECT_EQ(describe_fault(faults.back()), "bit_flip on rank 2 at step 3");
    const auto again = draw(text, seed, {2, 12});
    ASSERT_EQ(again.size(), faults.size());
    for (size_t i = 0; i < faults.size(); ++i) {
      EXPECT_EQ(describe_fault(again[i]), describe_fault(faults[i]));
    }
  }
  EXPECT_NEAR(crashes, 100, 30);  // three standard deviations
  EXPECT_EQ(ranks, (std::set<int64_t>{0, 1, 2, 3}));
  EXPECT_EQ(steps, (std::set<int64_t>{3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
  EXPECT_EQ(saves, (std::set<int64_t>{5, 10, 12}));
  // Without a save there is nothing to strike.
  EXPECT_TRUE(draw("{kind='torn_write',probability=1}", 1, {5, 9}).empty());
}

TEST(ConfigFiles, TheProjectsOwnAreValid) {
  const std::string root = source_directory();
  const Config quickstart = load_config(root + "/configs/quickstart.toml", {});
  EXPECT_EQ(quickstart.name, "quickstart");
  EXPECT_EQ(quickstart.model.layers, 4);
  EXPECT_EQ(quickstart.model.experts, 8);
  EXPECT_EQ(quickstart.model.top_k, 2);
  EXPECT_EQ(quickstart.train.sequence_length, 128);
  EXPECT_EQ(quickstart.train.global_batch_sequences, 8);
  EXPECT_EQ(quickstart.train.micro_batch_sequences, 1);
  EXPECT_EQ(quickstart.numerics.block_tokens, 32);
  EXPECT_EQ(quickstart.parallel.sharding, Sharding::zero1);
  EXPECT_EQ(quickstart.parallel.dp, 8);
  EXPECT_EQ(quickstart.parallel.ep, 4);
  EXPECT_EQ(quickstart.balance.loss, BalanceLoss::sequence);
  EXPECT_GE(derive(quickstart).active_parameters, 1'000'000);
  EXPECT_EQ(derive(load_config(root + "/configs/tiny.toml", {})).ranks, 1);
}

}  // namespace
}  // namespace cambium
