// WorkPlace: where in a training step a rank is, for traces, memory reports and routing draws.
#pragma once

#include <cstdint>

namespace cambium {

// The five stages of a decoder layer (AGENTS.md), and what lies around the layers.
enum class WorkStage : uint8_t {
  none,
  attend,
  dispatch,
  expert,
  combine,
  aggregate,
  embed,
  head,
  reduce,
  update
};
constexpr const char* work_stage_name(WorkStage stage) {
  constexpr const char* kNames[] = {"other",     "attend", "dispatch", "expert", "combine",
                                    "aggregate", "embed",  "head",     "reduce", "update"};
  return kNames[static_cast<int>(stage)];
}

enum class WorkPass : uint8_t { forward, backward, weights };
constexpr const char* work_pass_name(WorkPass pass) {
  constexpr const char* kNames[] = {"forward", "backward", "weights"};
  return kNames[static_cast<int>(pass)];
}

struct WorkPlace {
  WorkStage stage = WorkStage::none;
  WorkPass pass = WorkPass::forward;
  int16_t layer = -1;
  int32_t micro_batch = -1;
};

}  // namespace cambium
