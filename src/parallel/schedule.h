// Pipeline schedules as data: what every pipeline rank computes and exchanges, in order.
//
// make_schedule() is a pure function; the executor, tests and reports read the same list. Model
// layers are cut into stages; a rank holds one stage, or several chunks of the model: interleaved
// places stage c * pp + r as chunk c of rank r, the V shapes (zb_v, dualpipev) stages r and
// 2 pp - 1 - r, so that a rank holds the first and the last stage.
//
//   gpipe             Huang et al., arXiv 1811.06965       bubble (pp-1)(F+B+W)
//   1f1b              Narayanan et al., arXiv 2104.04473   bubble (pp-1)(F+B+W)
//   interleaved_1f1b  the same, v chunks                   bubble (pp-1)(F+B+W) / v
//   zb_h1, zb_v       Qi et al., arXiv 2401.10241          bubble (pp-1)(F+B-W), and pp-1 (fill)
//   dualpipev         DeepSeek-V3, arXiv 2412.19437        bubble (pp-1)((F&B)+(B+W)-3W)
// F forward, B input gradient, W weight gradient: one tick each for one chunk; a full backward
// (B+W) is two and an overlapped pair F&B three. Every chunk's W come in micro-batch order: the
// gradient forests rely on it (src/parallel/param_group.h).
//
// Messages: with all of them free, the ticks give one global order of computations and messages.
// Each rank posts its messages in that order, so the list cannot deadlock even without any
// buffering: the earliest unfinished event can always run.
#pragma once

#include <cstdint>
#include <vector>

#include "src/config/config.h"

namespace cambium {

enum class ActionKind {
  forward,
  backward,  // input and weight gradients
  backward_input,
  backward_weight,
  forward_backward,  // two chunks' passes that may overlap
  send,
  receive,
};
enum class Payload { activation, gradient };

struct PipelineAction {
  ActionKind kind = ActionKind::forward;
  int64_t chunk = 0;                                     // of this rank: 0 .. chunks - 1
  int64_t micro_batch = 0;                               // of forward_backward: the forward's
  int64_t backward_chunk = 0, backward_micro_batch = 0;  // forward_backward alone
  Payload payload = Payload::activation;                 // send, receive
  int64_t peer = 0;                                      // send, receive: pipeline rank
  int64_t start = 0, end = 0;                            // ticks

  bool is_message() const { return kind == ActionKind::send || kind == ActionKind::receive; }
};

enum class SchedulePass { training, forward_only };

struct ScheduleRequest {
  PipelineSchedule kind = PipelineSchedule::one_f_one_b;
  int64_t pp = 1;
  int64_t micro_batches = 1;
  int64_t virtual_stages = 2;  // interleaved_1f1b alone
  SchedulePass pass = SchedulePass::training;
};

struct Schedule {
  int64_t pp = 1, chunks = 1, micro_batches = 1;
  PipelineSchedule kind = PipelineSchedule::one_f_one_b;
  std::vector<std::vector<PipelineAction>> ranks;
  int64_t ticks = 0;  // of the whole list, messages free

  int64_t stages() const { return pp * chunks; }
  int64_t stage(int64_t rank, int64_t chunk) const;
};

// Chunks of the model that a rank holds. With pp = 1 every schedule is one chunk.
int64_t schedule_chunks(PipelineSchedule kind, int64_t pp, int64_t virtual_stages);
int64_t schedule_stage(PipelineSchedule kind, int64_t pp, int64_t rank, int64_t chunk);
// The micro-batches a schedule needs: at least `least`, and a multiple of `multiple`.
struct MicroBatchNeed {
  int64_t least = 1;
  int64_t multiple = 1;
};
MicroBatchNeed schedule_need(PipelineSchedule kind, int64_t pp);

// The request meets schedule_need() (derive() refuses it otherwise).
Schedule make_schedule(const ScheduleRequest& request);

// Layers [first, end) of each stage. Every stage gets layers / stages; what is left goes to inner
// stages one by one from the middle outward, then to the last and the first, which also hold the
// head and the embedding and may have no layer at all.
struct LayerRange {
  int64_t first = 0, end = 0;
  int64_t count() const { return end - first; }
};
std::vector<LayerRange> split_layers(int64_t layers, int64_t stages);

}  // namespace cambium
