// Orders of computations per rank, then their ticks, then the messages (schedule.h).
#include "src/parallel/schedule.h"

#include <algorithm>
#include <deque>
#include <tuple>

#include "src/base/check.h"

namespace cambium {

namespace {

using Actions = std::vector<PipelineAction>;

bool is_v_shape(PipelineSchedule kind) {
  return kind == PipelineSchedule::zb_v || kind == PipelineSchedule::dualpipev;
}

// One rank's list under construction: the n-th call for a chunk is its micro-batch n.
class RankList {
 public:
  explicit RankList(int64_t chunks) : forwards_(chunks, 0), backwards_(chunks, 0) {}
  void forward(int64_t chunk) {
    actions_.push_back({ActionKind::forward, chunk, forwards_[chunk]++});
  }
  void backward(int64_t chunk) {
    actions_.push_back({ActionKind::backward, chunk, backwards_[chunk]++});
  }
  void pair(int64_t chunk, int64_t backward_chunk) {
    actions_.push_back({ActionKind::forward_backward, chunk, forwards_[chunk]++, backward_chunk,
                        backwards_[backward_chunk]++});
  }
  // An input gradient whose weight gradient waits in line.
  void backward_input(int64_t chunk) {
    actions_.push_back({ActionKind::backward_input, chunk, backwards_[chunk]});
    waiting_.push_back({ActionKind::backward_weight, chunk, backwards_[chunk]++});
  }
  void weight() {
    CHECK(!waiting_.empty());
    actions_.push_back(waiting_.front());
    waiting_.pop_front();
  }
  int64_t waiting() const { return std::ssize(waiting_); }
  int64_t forwards(int64_t chunk) const { return forwards_[chunk]; }
  int64_t backwards(int64_t chunk) const { return backwards_[chunk]; }
  Actions take() {
    CHECK(waiting_.empty());
    return std::move(actions_);
  }

 private:
  Actions actions_;
  std::deque<PipelineAction> waiting_;
  std::vector<int64_t> forwards_, backwards_;
};

Actions gpipe(int64_t micro_batches) {
  RankList list(1);
  for (int64_t i = 0; i < micro_batches; ++i) list.forward(0);
  for (int64_t i = 0; i < micro_batches; ++i) list.backward(0);
  return list.take();
}

Actions one_f_one_b(int64_t pp, int64_t rank, int64_t micro_batches) {
  RankList list(1);
  const int64_t warmup = std::min(micro_batches, pp - 1 - rank);
  for (int64_t i = 0; i < warmup; ++i) list.forward(0);
  for (int64_t i = 0; i < micro_batches; ++i) {
    if (list.forwards(0) < micro_batches) list.forward(0);
    list.backward(0);
  }
  return list.take();
}

// Micro-batches run in groups of pp through chunk after chunk.
Actions interleaved(int64_t pp, int64_t rank, int64_t micro_batches, int64_t chunks) {
  RankList list(chunks);
  const int64_t total = micro_batches * chunks;
  const int64_t warmup = std::min(total, 2 * (pp - 1 - rank) + (chunks - 1) * pp);
  const auto chunk_of = [&](int64_t i) { return i % (pp * chunks) / pp; };
  for (int64_t i = 0; i < total + warmup; ++i) {
    if (i < total) list.forward(chunk_of(i));
    if (i >= warmup) list.backward(chunks - 1 - chunk_of(i - warmup));
  }
  return list.take();
}

// 1f1b whose rank r lets r weight gradients wait: they fill the drain.
Actions zb_h1(int64_t pp, int64_t rank, int64_t micro_batches) {
  RankList list(1);
  for (int64_t i = 0; i < pp - 1 - rank; ++i) list.forward(0);
  for (int64_t i = 0; i < micro_batches; ++i) {
    if (list.forwards(0) < micro_batches) list.forward(0);
    list.backward_input(0);
    if (list.waiting() > rank) list.weight();
  }
  while (list.waiting() > 0) list.weight();
  return list.take();
}

Actions zb_v(int64_t pp, int64_t rank, int64_t micro_batches) {
  RankList list(2);
  const auto input_and_weight = [&](int64_t chunk) {
    list.backward_input(chunk);
    list.weight();
  };
  for (int64_t i = 0; i < 2 * (pp - rank) - 1; ++i) list.forward(0);
  for (int64_t i = 0; i < rank; ++i) {
    list.forward(1);
    list.forward(0);
  }
  for (int64_t i = 0; i < pp - rank; ++i) {
    list.forward(1);
    input_and_weight(1);
  }
  while (list.forwards(1) < micro_batches) {
    if (list.forwards(0) < micro_batches) list.forward(0);
    input_and_weight(0);
    list.forward(1);
    input_and_weight(1);
  }
  for (int64_t i = 0; i < rank; ++i) {
    list.backward_input(0);
    list.backward_input(1);
  }
  for (int64_t i = 0; i < pp - rank; ++i) {
    list.backward_input(0);
    list.weight();
  }
  while (list.waiting() > 0) list.weight();
  return list.take();
}

// Eight phases, named as in the paper's code: n is how often, F0 the forward of chunk 0.
Actions dualpipev(int64_t pp, int64_t rank, int64_t micro_batches) {
  RankList list(2);
  const bool last = rank == pp - 1;
  for (int64_t i = 0; i < 2 * (pp - 1 - rank); ++i) list.forward(0);  // 1: nF0
  for (int64_t i = 0; i < rank + 1; ++i) {                            // 2: nF0F1
    list.forward(0);
    list.forward(1);
  }
  for (int64_t i = 0; i < pp - 1 - rank; ++i) {  // 3: nB1W1F1
    list.backward_input(1);
    list.weight();
    list.forward(1);
  }
  for (int64_t i = 0; i < micro_batches - 2 * pp + rank + 1; ++i) {  // 4: nF0B1F1B0
    if (i == 0 && last) {
      list.forward(0);
      list.backward(1);
    } else {
      list.pair(0, 1);
    }
    list.pair(1, 0);
  }
  for (int64_t i = 0; i < pp - 1 - rank; ++i) {  // 5: nB1F1B0
    list.backward(1);
    list.pair(1, 0);
  }
  const int64_t tail = rank + 1;
  for (int64_t i = 0; i < tail; ++i) {  // 6: nB1B0, the second half leaves W for later
    const bool first_waits = i > tail / 2 || (i == tail / 2 && rank % 2 == 1);
    first_waits ? list.backward_input(1) : list.backward(1);
    i >= tail / 2 ? list.backward_input(0) : list.backward(0);
  }
  for (int64_t i = 0; i < pp - 1 - rank; ++i) {  // 7: nWB0
    list.weight();
    list.backward_input(0);
  }
  for (int64_t i = 0; i < rank + 1; ++i) list.weight();  // 8: nW
  return list.take();
}

Actions computations(const ScheduleRequest& request, int64_t chunks, int64_t rank) {
  const int64_t pp = request.pp, micro_batches = request.micro_batches;
  if (pp == 1) return one_f_one_b(1, 0, micro_batches);
  switch (request.kind) {
    case PipelineSchedule::gpipe:
      return gpipe(micro_batches);
    case PipelineSchedule::one_f_one_b:
      return one_f_one_b(pp, rank, micro_batches);
    case PipelineSchedule::interleaved_1f1b:
      return interleaved(pp, rank, micro_batches, chunks);
    case PipelineSchedule::zb_h1:
      return zb_h1(pp, rank, micro_batches);
    case PipelineSchedule::zb_v:
      return zb_v(pp, rank, micro_batches);
    case PipelineSchedule::dualpipev:
      return dualpipev(pp, rank, micro_batches);
  }
  return {};
}

void keep_forwards(Actions& actions) {
  Actions kept;
  for (PipelineAction action : actions) {
    const bool has_forward =
        action.kind == ActionKind::forward || action.kind == ActionKind::forward_backward;
    if (!has_forward) continue;
    action.kind = ActionKind::forward;
    kept.push_back(action);
  }
  actions = std::move(kept);
}

int64_t duration(ActionKind kind) {
  if (kind == ActionKind::forward_backward) return 3;
  return kind == ActionKind::backward ? 2 : 1;
}

// When each pass of each stage ends; -1 = not yet.
class Timeline {
 public:
  explicit Timeline(const Schedule& schedule)
      : schedule_(schedule),
        forward_end_(schedule.stages() * schedule.micro_batches, -1),
        backward_end_(forward_end_) {}

  // The tick at which the action's inputs are there; -1 = not known yet.
  int64_t inputs_ready(int64_t rank, const PipelineAction& action) const {
    int64_t ready = 0;
    if (action.kind == ActionKind::backward_weight) return ready;  // its rank's own B precedes it
    if (has_forward(action)) {
      const int64_t stage = schedule_.stage(rank, action.chunk);
      if (stage > 0) ready = end(forward_end_, stage - 1, action.micro_batch);
      if (ready < 0) return -1;
    }
    if (action.kind != ActionKind::forward) {
      const int64_t stage = schedule_.stage(rank, backward_chunk(action));
      if (stage + 1 == schedule_.stages()) return ready;
      const int64_t from = end(backward_end_, stage + 1, backward_micro(action));
      ready = from < 0 ? -1 : std::max(ready, from);
    }
    return ready;
  }
  void set(int64_t rank, const PipelineAction& action) {
    if (has_forward(action)) {
      const int64_t stage = schedule_.stage(rank, action.chunk);
      forward_end_[stage * schedule_.micro_batches + action.micro_batch] = action.end;
    }
    if (action.kind == ActionKind::forward || action.kind == ActionKind::backward_weight) return;
    const int64_t stage = schedule_.stage(rank, backward_chunk(action));
    backward_end_[stage * schedule_.micro_batches + backward_micro(action)] = action.end;
  }
  int64_t forward_end(int64_t stage, int64_t micro) const {
    return end(forward_end_, stage, micro);
  }
  int64_t backward_end(int64_t stage, int64_t micro) const {
    return end(backward_end_, stage, micro);
  }

 private:
  static bool has_forward(const PipelineAction& a) {
    return a.kind == ActionKind::forward || a.kind == ActionKind::forward_backward;
  }
  static int64_t backward_chunk(const PipelineAction& a) {
    return a.kind == ActionKind::forward_backward ? a.backward_chunk : a.chunk;
  }
  static int64_t backward_micro(const PipelineAction& a) {
    return a.kind == ActionKind::forward_backward ? a.backward_micro_batch : a.micro_batch;
  }
  int64_t end(const std::vector<int64_t>& ends, int64_t stage, int64_t micro) const {
    return ends[stage * schedule_.micro_batches + micro];
  }
  const Schedule& schedule_;
  std::vector<int64_t> forward_end_, backward_end_;
};

// Every rank starts each action as soon as its inputs are there and it is free.
void set_ticks(Schedule& schedule, Timeline& timeline) {
  std::vector<size_t> next(schedule.ranks.size(), 0);
  std::vector<int64_t> free(schedule.ranks.size(), 0);
  bool moved = true;
  while (moved) {
    moved = false;
    for (int64_t rank = 0; rank < schedule.pp; ++rank) {
      while (next[rank] < schedule.ranks[rank].size()) {
        PipelineAction& action = schedule.ranks[rank][next[rank]];
        const int64_t ready = timeline.inputs_ready(rank, action);
        if (ready < 0) break;
        action.start = std::max(ready, free[rank]);
        free[rank] = action.end = action.start + duration(action.kind);
        timeline.set(rank, action);
        ++next[rank];
        moved = true;
      }
    }
  }
  for (int64_t rank = 0; rank < schedule.pp; ++rank) {
    CHECK_EQ(next[rank], schedule.ranks[rank].size());  // otherwise the order has a cycle
    schedule.ticks = std::max(schedule.ticks, free[rank]);
  }
}

// At which rank and chunk a stage lies.
struct StagePlace {
  int64_t rank = 0, chunk = 0;
};

// One message: both ends list it at its tick, ties in the order of the other fields.
struct MessageKey {
  int64_t tick = 0;
  Payload payload = Payload::activation;
  int64_t stage = 0;  // of the receiver
  int64_t micro_batch = 0;
  auto operator<=>(const MessageKey&) const = default;
};

void add_messages(Schedule& schedule, const Timeline& timeline, SchedulePass pass) {
  std::vector<StagePlace> place(schedule.stages());
  for (int64_t rank = 0; rank < schedule.pp; ++rank) {
    for (int64_t chunk = 0; chunk < schedule.chunks; ++chunk) {
      place[schedule.stage(rank, chunk)] = {rank, chunk};
    }
  }
  std::vector<MessageKey> keys;
  for (int64_t micro = 0; micro < schedule.micro_batches; ++micro) {
    for (int64_t stage = 1; stage < schedule.stages(); ++stage) {
      if (place[stage].rank == place[stage - 1].rank) continue;
      keys.push_back({timeline.forward_end(stage - 1, micro), Payload::activation, stage, micro});
      if (pass == SchedulePass::forward_only) continue;
      keys.push_back({timeline.backward_end(stage, micro), Payload::gradient, stage - 1, micro});
    }
  }
  std::ranges::sort(keys);
  std::vector<Actions> merged(schedule.ranks.size());
  std::vector<size_t> next(schedule.ranks.size(), 0);
  for (const MessageKey& key : keys) {
    const StagePlace to = place[key.stage];
    const StagePlace from =
        place[key.payload == Payload::activation ? key.stage - 1 : key.stage + 1];
    const auto add = [&](StagePlace here, ActionKind kind, int64_t peer) {
      const Actions& computed = schedule.ranks[here.rank];
      size_t& at = next[here.rank];
      while (at < computed.size() && computed[at].start < key.tick) {
        merged[here.rank].push_back(computed[at++]);
      }
      merged[here.rank].push_back({.kind = kind,
                                   .chunk = here.chunk,
                                   .micro_batch = key.micro_batch,
                                   .payload = key.payload,
                                   .peer = peer,
                                   .start = key.tick,
                                   .end = key.tick});
    };
    add(from, ActionKind::send, to.rank);
    add(to, ActionKind::receive, from.rank);
  }
  for (size_t rank = 0; rank < merged.size(); ++rank) {
    const Actions& computed = schedule.ranks[rank];
    merged[rank].insert(merged[rank].end(), computed.begin() + static_cast<int64_t>(next[rank]),
                        computed.end());
  }
  schedule.ranks = std::move(merged);
}

}  // namespace

int64_t schedule_chunks(PipelineSchedule kind, int64_t pp, int64_t virtual_stages) {
  if (pp == 1) return 1;
  if (kind == PipelineSchedule::interleaved_1f1b) return virtual_stages;
  return is_v_shape(kind) ? 2 : 1;
}

int64_t schedule_stage(PipelineSchedule kind, int64_t pp, int64_t rank, int64_t chunk) {
  if (is_v_shape(kind) && chunk == 1) return 2 * pp - 1 - rank;
  return chunk * pp + rank;
}

int64_t Schedule::stage(int64_t rank, int64_t chunk) const {
  return schedule_stage(kind, pp, rank, chunk);
}

MicroBatchNeed schedule_need(PipelineSchedule kind, int64_t pp) {
  if (pp == 1) return {};
  switch (kind) {
    case PipelineSchedule::gpipe:
    case PipelineSchedule::one_f_one_b:
      return {};
    case PipelineSchedule::interleaved_1f1b:
      return {pp, pp};
    case PipelineSchedule::zb_h1:
      return {pp, 1};
    case PipelineSchedule::zb_v:
      return {2 * pp - 1, 1};
    case PipelineSchedule::dualpipev:
      return {2 * pp, 1};
  }
  return {};
}

Schedule make_schedule(const ScheduleRequest& request) {
  const MicroBatchNeed need = schedule_need(request.kind, request.pp);
  CHECK_GE(request.micro_batches, need.least);
  CHECK_EQ(request.micro_batches % need.multiple, 0);
  Schedule schedule;
  schedule.kind = request.kind;
  schedule.pp = request.pp;
  schedule.micro_batches = request.micro_batches;
  schedule.chunks = schedule_chunks(request.kind, request.pp, request.virtual_stages);
  for (int64_t rank = 0; rank < request.pp; ++rank) {
    schedule.ranks.push_back(computations(request, schedule.chunks, rank));
    if (request.pass == SchedulePass::forward_only) keep_forwards(schedule.ranks.back());
  }
  Timeline timeline(schedule);
  set_ticks(schedule, timeline);
  add_messages(schedule, timeline, request.pass);
  return schedule;
}

std::vector<LayerRange> split_layers(int64_t layers, int64_t stages) {
  std::vector<int64_t> counts(static_cast<size_t>(stages), layers / stages);
  std::vector<int64_t> order;  // who gets what is left
  for (int64_t i = 0; i < stages; ++i) {
    // From the middle outward: m, m - 1, m + 1, m - 2, ...
    const int64_t middle = stages / 2;
    const int64_t stage = i % 2 == 0 ? middle + i / 2 : middle - 1 - i / 2;
    if (stage > 0 && stage < stages - 1) order.push_back(stage);
  }
  if (stages > 1) order.push_back(stages - 1);
  order.push_back(0);
  for (int64_t i = 0; i < layers % stages; ++i) ++counts[order[i]];
  std::vector<LayerRange> ranges;
  int64_t first = 0;
  for (const int64_t count : counts) {
    ranges.push_back({first, first + count});
    first += count;
  }
  return ranges;
}

}  // namespace cambium
