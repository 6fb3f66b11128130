// derive(): every number that follows from a configuration, and every rule between its keys.
//
// It allocates nothing and touches no file or device (it loads cuDNN where numerics.attention names
// it). A broken rule is an Error with exit code 2
// whose message holds the key and both values: "parallel.ep = 3 does not divide model.experts = 8;
// nearest: 2 or 4". What this build cannot run is refused with the nearest that it can.
#pragma once

#include <cstdint>

#include "src/config/config.h"

namespace cambium {

struct Derived {
  // Layout. Attention mesh (pp, dp, cp), expert mesh (pp, edp, ep); edp * ep = dp * cp.
  int64_t ranks = 1;       // pp * dp * cp
  int64_t data_ranks = 1;  // dp * cp: parallel.sharding shares out over them, or their groups
  int64_t copies = 1;      // those groups: data_ranks / parallel.shard_ranks
  int64_t edp = 1;         // replicas of an expert
  int64_t experts_per_rank = 0;

  // One step.
  int64_t sequences_per_data_rank = 0;  // of the global batch, consecutive ones
  int64_t micro_batches = 0;            // of one data rank
  int64_t tokens_per_micro_batch = 0;   // of one rank: T
  int64_t tokens_per_step = 0;          // global batch, ignored tokens included
  int64_t blocks_per_sequence = 0;
  int64_t blocks_per_micro_batch = 0;  // of one data rank
  int64_t total_blocks = 0;            // of the global batch

  // Schedule and intervals, cut to train.steps.
  int64_t warmup_steps = 0;
  int64_t decay_steps = 0;             // wsd: the last steps of the run
  int64_t checkpoint_every_steps = 0;  // at least 1; train.steps when only the last one is saved
  int64_t eval_every_steps = 0;        // likewise

  // Model. Active: all but the experts that a token does not go to, and the input embedding,
  // which is a look-up. FLOPs count a multiply-add as two; causal attention as half a square.
  int64_t parameters = 0;
  int64_t active_parameters = 0;
  int64_t expert_parameters = 0;        // of one expert of one layer
  int64_t state_bytes = 0;              // weights, gradients, optimizer of all ranks, at least
  double forward_flops_per_token = 0;   // mean over the positions of a sequence
  double training_flops_per_token = 0;  // forward and both halves of backward
};

// Positions of the texts that YaRN's angles were trained on.
int64_t rope_original_positions(const ModelConfig& model);

// `planned`: by `plan` and `check`; a GPU need not be there, nor kernels for it.
enum class ConfigUse { trained, planned };
Derived derive(const Config& config, ConfigUse use = ConfigUse::trained);

// Refuses what a GPU does not compute, and a GPU in a build without kernels (exit 2). Of derive().
void check_device(const Config& config, ConfigUse use = ConfigUse::trained);

}  // namespace cambium
