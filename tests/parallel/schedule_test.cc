// Every pipeline schedule, for pp 1 to 8 and every number of micro-batches up to 4 pp.
#include "src/parallel/schedule.h"

#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <map>
#include <set>

#include "fmt/format.h"

namespace cambium::test {

namespace {

constexpr PipelineSchedule kKinds[] = {
    PipelineSchedule::gpipe, PipelineSchedule::one_f_one_b, PipelineSchedule::interleaved_1f1b,
    PipelineSchedule::zb_h1, PipelineSchedule::zb_v,        PipelineSchedule::dualpipev};

std::string request_name(const ScheduleRequest& r) {
  return fmt::format("{} pp {} micro-batches {} virtual stages {}", choice_name(r.kind), r.pp,
                     r.micro_batches, r.virtual_stages);
}

// Calls `visit` for every request that its schedule allows.
void for_each_request(const std::function<void(const ScheduleRequest&)>& visit) {
  for (const PipelineSchedule kind : kKinds) {
    for (int64_t pp = 1; pp <= 8; ++pp) {
      const MicroBatchNeed need = schedule_need(kind, pp);
      for (int64_t micro = need.least; micro <= 4 * pp; micro += need.multiple) {
        const int64_t most = kind == PipelineSchedule::interleaved_1f1b ? 4 : 2;
        for (int64_t chunks = 2; chunks <= most; ++chunks) visit({kind, pp, micro, chunks});
      }
    }
  }
}

// One pass of one chunk.
struct Pass {
  char letter;  // F, B or W
  int64_t chunk, micro_batch;
};
std::vector<Pass> passes(const PipelineAction& a) {
  switch (a.kind) {
    case ActionKind::forward:
      return {{'F', a.chunk, a.micro_batch}};
    case ActionKind::backward:
      return {{'B', a.chunk, a.micro_batch}, {'W', a.chunk, a.micro_batch}};
    case ActionKind::backward_input:
      return {{'B', a.chunk, a.micro_batch}};
    case ActionKind::backward_weight:
      return {{'W', a.chunk, a.micro_batch}};
    case ActionKind::forward_backward:
      return {{'F', a.chunk, a.micro_batch},
              {'B', a.backward_chunk, a.backward_micro_batch},
              {'W', a.backward_chunk, a.backward_micro_batch}};
    default:
      return {};
  }
}

TEST(Schedule, EveryChunkRunsForwardInputAndWeightOnceAndInMicroBatchOrder) {
  for_each_request([](const ScheduleRequest& request) {
    const Schedule schedule = make_schedule(request);
    for (const auto& list : schedule.ranks) {
      std::map<std::pair<char, int64_t>, int64_t> done;
      for (const PipelineAction& action : list) {
        for (const Pass& pass : passes(action)) {
          int64_t& next = done[{pass.letter, pass.chunk}];
          ASSERT_EQ(pass.micro_batch, next) << pass.letter << ", " << request_name(request);
          ++next;
          const char before = pass.letter == 'W' ? 'B' : 'F';
          ASSERT_GE((done[{before, pass.chunk}]), next) << request_name(request);
        }
      }
      ASSERT_EQ(std::ssize(done), 3 * schedule.chunks) << request_name(request);
      for (const auto& [pass, count] : done) ASSERT_EQ(count, request.micro_batches);
    }
  });
}

// Runs the lists with rendezvous and no buffer at all: a message completes only when both ends
// stand at it. Data that an action reads must have arrived. Returns the actions that never ran.
int64_t run_without_buffers(const Schedule& schedule) {
  std::set<std::array<int64_t, 3>> produced;  // payload, stage that may read it, micro-batch
  std::vector<size_t> at(schedule.ranks.size(), 0);
  const auto has = [&](Payload payload, int64_t stage, int64_t micro) {
    return produced.contains({static_cast<int64_t>(payload), stage, micro});
  };
  const auto compute = [&](int64_t rank, const PipelineAction& action) {
    for (const Pass& pass : passes(action)) {
      const int64_t stage = schedule.stage(rank, pass.chunk), last = schedule.stages() - 1;
      const auto local = [&](int64_t other) {
        for (int64_t c = 0; c < schedule.chunks; ++c) {
          if (schedule.stage(rank, c) == other) return true;
        }
        return false;
      };
      if (pass.letter == 'F') {
        EXPECT_TRUE(stage == 0 || has(Payload::activation, stage, pass.micro_batch));
        if (stage < last && local(stage + 1)) {
          produced.insert({static_cast<int64_t>(Payload::activation), stage + 1, pass.micro_batch});
        }
      }
      if (pass.letter == 'B') {
        EXPECT_TRUE(stage == last || has(Payload::gradient, stage, pass.micro_batch));
        if (stage > 0 && local(stage - 1)) {
          produced.insert({static_cast<int64_t>(Payload::gradient), stage - 1, pass.micro_batch});
        }
      }
    }
  };
  bool moved = true;
  while (moved) {
    moved = false;
    for (int64_t rank = 0; rank < schedule.pp; ++rank) {
      while (at[rank] < schedule.ranks[rank].size()) {
        const PipelineAction& action = schedule.ranks[rank][at[rank]];
        if (action.is_message()) {
          const auto& others = schedule.ranks[action.peer];
          if (at[action.peer] >= others.size()) break;
          const PipelineAction& other = others[at[action.peer]];
          const bool meets = other.is_message() && other.peer == rank &&
                             other.kind != action.kind && other.payload == action.payload &&
                             other.micro_batch == action.micro_batch;
          if (!meets) break;
          const bool sends = action.kind == ActionKind::send;
          const int64_t from =
              schedule.stage(sends ? rank : action.peer, sends ? action.chunk : other.chunk);
          const int64_t to =
              schedule.stage(sends ? action.peer : rank, sends ? other.chunk : action.chunk);
          EXPECT_EQ(to - from, action.payload == Payload::activation ? 1 : -1);
          produced.insert({static_cast<int64_t>(action.payload), to, action.micro_batch});
          ++at[action.peer];
        } else {
          compute(rank, action);
        }
        ++at[rank];
        moved = true;
      }
    }
  }
  int64_t left = 0;
  for (size_t rank = 0; rank < at.size(); ++rank) {
    left += std::ssize(schedule.ranks[rank]) - static_cast<int64_t>(at[rank]);
  }
  return left;
}

TEST(Schedule, SendsMeetReceivesAndNothingDeadlocksWithoutBuffers) {
  for_each_request([](const ScheduleRequest& request) {
    for (const SchedulePass pass : {SchedulePass::training, SchedulePass::forward_only}) {
      ScheduleRequest asked = request;
      asked.pass = pass;
      ASSERT_EQ(run_without_buffers(make_schedule(asked)), 0) << request_name(request);
    }
  });
}

TEST(Schedule, MustFailWithASwappedSend) {
  Schedule schedule = make_schedule({PipelineSchedule::one_f_one_b, 4, 8});
  auto& list = schedule.ranks[0];
  std::vector<size_t> sends;
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].kind == ActionKind::send) sends.push_back(i);
  }
  std::swap(list[sends[1]], list[sends[2]]);
  EXPECT_GT(run_without_buffers(schedule), 0);
}

// Idle ticks of the slowest rank, as the papers count them.
int64_t published_bubble(const ScheduleRequest& r) {
  switch (r.kind) {
    case PipelineSchedule::gpipe:
    case PipelineSchedule::one_f_one_b:
    case PipelineSchedule::interleaved_1f1b:
      return 3 * (r.pp - 1);  // (F + B + W) of one chunk: a v-th of a stage when interleaved
    case PipelineSchedule::zb_h1:
    case PipelineSchedule::zb_v:
      return r.pp - 1;
    case PipelineSchedule::dualpipev:
      return 2 * (r.pp - 1);  // F&B + (B + W) - 3 W = 3 + 2 - 3
  }
  return -1;
}

TEST(Schedule, BubbleIsThePublishedOne) {
  for_each_request([](const ScheduleRequest& request) {
    const Schedule schedule = make_schedule(request);
    const int64_t work = 3 * request.micro_batches * schedule.chunks;
    EXPECT_EQ(schedule.ticks - work, published_bubble(request)) << request_name(request);
  });
}

// Chunks whose forward has run and whose weight gradient has not, at most.
int64_t activation_bound(const ScheduleRequest& r, int64_t rank, int64_t chunks) {
  const int64_t m = r.micro_batches;
  switch (r.kind) {
    case PipelineSchedule::gpipe:
      return r.pp == 1 ? 1 : m;
    case PipelineSchedule::one_f_one_b:
      return std::min(m, r.pp - rank);
    case PipelineSchedule::interleaved_1f1b:
      if (r.pp == 1) return 1;
      return std::min(m * chunks, 2 * (r.pp - 1 - rank) + (chunks - 1) * r.pp + 1);
    case PipelineSchedule::zb_h1:
      return r.pp;
    case PipelineSchedule::zb_v:
      return r.pp == 1 ? 1 : 2 * r.pp;
    case PipelineSchedule::dualpipev:
      return r.pp == 1 ? 1 : 2 * r.pp + 1;
  }
  return -1;
}

TEST(Schedule, PeakLiveActivationsEqualTheBound) {
  for_each_request([](const ScheduleRequest& request) {
    const Schedule schedule = make_schedule(request);
    int64_t peak_of_all = 0, bound_of_all = 0;
    for (int64_t rank = 0; rank < request.pp; ++rank) {
      int64_t live = 0, peak = 0;
      for (const PipelineAction& action : schedule.ranks[rank]) {
        for (const Pass& pass : passes(action)) {
          live += pass.letter == 'F' ? 1 : pass.letter == 'W' ? -1 : 0;
          peak = std::max(peak, live);
        }
      }
      const int64_t bound = activation_bound(request, rank, schedule.chunks);
      EXPECT_LE(peak, bound) << request_name(request) << " rank " << rank;
      peak_of_all = std::max(peak_of_all, peak);
      bound_of_all = std::max(bound_of_all, bound);
    }
    EXPECT_EQ(peak_of_all, bound_of_all) << request_name(request);
  });
}

TEST(Schedule, LayersGoToInnerStagesFirst) {
  const auto counts = [](int64_t layers, int64_t stages) {
    std::vector<int64_t> result;
    int64_t next = 0;
    for (const LayerRange& range : split_layers(layers, stages)) {
      EXPECT_EQ(range.first, next);
      next = range.end;
      result.push_back(range.count());
    }
    EXPECT_EQ(next, layers);
    return result;
  };
  EXPECT_EQ(counts(4, 1), (std::vector<int64_t>{4}));
  EXPECT_EQ(counts(4, 2), (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(counts(5, 2), (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(counts(6, 4), (std::vector<int64_t>{1, 2, 2, 1}));
  EXPECT_EQ(counts(7, 4), (std::vector<int64_t>{1, 2, 2, 2}));
  EXPECT_EQ(counts(6, 8), (std::vector<int64_t>{0, 1, 1, 1, 1, 1, 1, 0}));
  EXPECT_EQ(counts(7, 5), (std::vector<int64_t>{1, 2, 2, 1, 1}));
}

}  // namespace

}  // namespace cambium::test
