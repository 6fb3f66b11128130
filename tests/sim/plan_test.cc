// Shape-only runs: virtual time by hand, the same work as a run that computes, folding.
#include <algorithm>
#include <fstream>

#include "gtest/gtest.h"
#include "sim/cluster.h"
#include "sim/machine_writer.h"
#include "sim/planner.h"
#include "sim/routing.h"
#include "sim/virtual_time.h"
#include "src/cli/launch.h"
#include "src/train/routing_trace.h"
#include "src/train/synthetic.h"
#include "tests/sim/plain_machine.h"

namespace cambium::sim {
namespace {

Cost work(int64_t flops) { return {"linear", {64, 64, 64}, flops, 1, 0}; }

TEST(VirtualTime, IsTheTimelineByHand) {
  const Machine machine = parse_machine(plain_machine("8"), "plain");
  const Config config = plan_config("[parallel]\ndp = 2\n");
  Trace trace;
  VirtualTime time(machine, config, &trace);
  run_cluster({.ranks = 2, .time = &time}, [&](RankEnvironment& environment) {
    Stream& compute = environment.make_stream("compute");
    Stream& comm = environment.make_stream("comm");
    const auto both = environment.make_communicator("both", {0, 1});
    OpCharge& clock = *environment.shape_only();
    std::byte* const data = reinterpret_cast<std::byte*>(uintptr_t{1} << 44);
    clock.charge(work(environment.rank() == 0 ? 1000 : 3000), compute);
    comm.wait(compute.record());
    const Ticket ticket = all_gather({.communicator = *both,
                                      .stream = comm,
                                      .send = data,
                                      .recv = data + 4096,
                                      .count = 500,
                                      .dtype = DType::u8});
    clock.charge(work(2000), compute);
    compute.wait(ticket);
    clock.charge(work(500), compute);
    environment.host().wait(compute.record());
    // Rank 0 works at 3/4 from 1000 to 3600, rank 1 from 3000 to 3600.
    EXPECT_EQ(environment.host().now_ns(), environment.rank() == 0 ? 4150 : 5650);
  });
  const auto span = [&](int rank, const std::string& name, int64_t start, int64_t end) {
    const auto is_it = [&](const TraceSpan& s) {
      return s.rank == rank && s.name == name && s.start_ns == start && s.end_ns == end;
    };
    EXPECT_TRUE(std::ranges::any_of(trace.spans(), is_it)) << rank << name << start << ".." << end;
  };
  span(0, "linear", 0, 1000);
  span(0, "linear", 1000, 3650);
  span(0, "linear", 3650, 4150);
  span(0, "waits for peers", 1000, 3000);
  span(0, "all_gather", 3000, 3600);
  span(1, "linear", 0, 3000);
  span(1, "linear", 3000, 5150);
  span(1, "all_gather", 3000, 3600);
  EXPECT_EQ(trace.spans().size(), 9u);
}

// A running transfer takes its share of the memory's rate from an op that memory limits.
TEST(VirtualTime, TransfersTakeOfTheMemorysRate) {
  std::string text = plain_machine("8");
  const std::string none = "memory_percent = { value = 0";
  text.replace(text.find(none), none.size(), "memory_percent = { value = 50");
  const Machine machine = parse_machine(text, "plain");
  const Config config = plan_config("[parallel]\ndp = 2\n");
  VirtualTime time(machine, config, nullptr);
  run_cluster({.ranks = 2, .time = &time}, [&](RankEnvironment& environment) {
    Stream& compute = environment.make_stream("compute");
    Stream& comm = environment.make_stream("comm");
    const auto both = environment.make_communicator("both", {0, 1});
    std::byte* const data = reinterpret_cast<std::byte*>(uintptr_t{1} << 44);
    all_gather({.communicator = *both,
                .stream = comm,
                .send = data,
                .recv = data + 4096,
                .count = 500,
                .dtype = DType::u8});
    environment.shape_only()->charge({"scale_values", {2000}, 0, 2000, 0}, compute);
    environment.host().wait(compute.record());
    EXPECT_EQ(environment.host().now_ns(), 2300);  // 300 of 2000 bytes in the transfer's 600 ns
    environment.host().wait(comm.record());
  });
}

// Where a collective was measured, its curve is its time; others keep the link's model.
TEST(VirtualTime, AMeasuredCollectiveTakesItsCurvesTime) {
  const std::string curve =
      "[[collective]]\nkind = \"all_gather\"\nranks = 2\nsource = \"t\"\n"
      "points = [[\"250 B\", \"1 us\"], [\"1000 B\", \"4 us\"]]\n";
  const Machine machine = parse_machine(plain_machine("8") + curve, "plain");
  const auto ns = [&](CollectiveKind kind, int64_t bytes) {
    const Config config = plan_config("[parallel]\ndp = 2\n");
    VirtualTime time(machine, config, nullptr);
    int64_t end = 0;
    run_cluster({.ranks = 2, .time = &time}, [&](RankEnvironment& environment) {
      Stream& comm = environment.make_stream("comm");
      const auto both = environment.make_communicator("both", {0, 1});
      std::byte* const data = reinterpret_cast<std::byte*>(uintptr_t{1} << 44);
      const auto post = [&] {
        if (kind == CollectiveKind::all_gather) {
          return all_gather({.communicator = *both,
                             .stream = comm,
                             .send = data,
                             .recv = data + 4096,
                             .count = bytes,
                             .dtype = DType::u8});
        }
        return reduce_scatter({.communicator = *both,
                               .stream = comm,
                               .send = data,
                               .recv = data + 8192,
                               .count = bytes,
                               .dtype = DType::u8});
      };
      environment.host().wait(post());
      end = environment.host().now_ns();
    });
    return std::pair(end, time.links_extrapolated());
  };
  EXPECT_EQ(ns(CollectiveKind::all_gather, 250), std::pair(int64_t{1000}, false));
  EXPECT_EQ(ns(CollectiveKind::all_gather, 500), std::pair(int64_t{2000}, false));
  EXPECT_EQ(ns(CollectiveKind::all_gather, 1000), std::pair(int64_t{4000}, false));
  EXPECT_EQ(ns(CollectiveKind::all_gather, 3000), std::pair(int64_t{12000}, true));
  EXPECT_EQ(ns(CollectiveKind::reduce_scatter, 500), std::pair(int64_t{600}, false));
}

TEST(VirtualTime, AMissingCallIsADeadlockAndAWrongOneAMismatch) {
  const Machine machine = parse_machine(plain_machine("8"), "plain");
  const Config config = plan_config("[parallel]\ndp = 2\n");
  const auto run = [&](int64_t count_of_rank_1) {
    VirtualTime time(machine, config, nullptr);
    try {
      run_cluster({.ranks = 2, .time = &time}, [&](RankEnvironment& environment) {
        Stream& comm = environment.make_stream("comm");
        const auto both = environment.make_communicator("both", {0, 1});
        std::byte* const data = reinterpret_cast<std::byte*>(uintptr_t{1} << 44);
        const int64_t count = environment.rank() == 0 ? 8 : count_of_rank_1;
        if (count == 0) return;
        environment.host().wait(all_reduce(
            {.communicator = *both, .stream = comm, .send = data, .recv = data, .count = count}));
      });
    } catch (const Error& error) {
      return error.exit_code();
    }
    return ExitCode::done;
  };
  EXPECT_EQ(run(8), ExitCode::done);
  EXPECT_EQ(run(0), ExitCode::deadlock);
  EXPECT_EQ(run(9), ExitCode::collective_mismatch);
}

// What a run that computes leaves in its counters.
std::vector<RankPlan> numeric_run(const Config& config) {
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  std::vector<RankPlan> plans(static_cast<size_t>(derived.ranks));
  launch_ranks({.ranks = derived.ranks, .workers = 1}, [&](RankEnvironment& environment) {
    Rank rank(config, environment);
    TrainStep step(rank, config.model);
    for (const auto& group : step.model().groups()) group->begin_step();  // slots: made once
    rank.finish_step();
    rank.host.wait(barrier({.communicator = *rank.world, .stream = rank.comm}));
    rank.totals.clear();
    rank.arena.reset_peak();
    rank.step = 1;
    step.accumulate(source, 0);
    step.update(1, 1e-3, WithDigests::no);
    count_calls(rank, plans[static_cast<size_t>(environment.rank())]);
  });
  return plans;
}

void expect_equal_work(const Config& config, bool routes) {
  const std::vector<RankPlan> numeric = numeric_run(config);
  const PlanReport plan = plan_step({.config = config, .machine = "laptop"});
  ASSERT_EQ(plan.by_rank.size(), numeric.size());
  for (size_t r = 0; r < numeric.size(); ++r) {
    SCOPED_TRACE(fmt::format("rank {}", r));
    const RankPlan &want = numeric[r], &got = plan.by_rank[r];
    ASSERT_EQ(got.ops.size(), want.ops.size());
    for (const auto& [op, totals] : want.ops) {
      EXPECT_EQ(got.ops.at(op).calls, totals.calls) << op;
      if (routes) continue;
      EXPECT_EQ(got.ops.at(op).flops, totals.flops) << op;
      EXPECT_EQ(got.ops.at(op).bytes, totals.bytes) << op;
    }
    ASSERT_EQ(got.calls.size(), want.calls.size());
    for (const auto& [call, totals] : want.calls) {
      EXPECT_EQ(got.calls.at(call).calls, totals.calls) << call;
      if (routes && call == "expert all_to_all_v") continue;
      EXPECT_EQ(got.calls.at(call).sent_bytes, totals.sent_bytes) << call;
      EXPECT_EQ(got.calls.at(call).received_bytes, totals.received_bytes) << call;
    }
    if (routes) continue;
    EXPECT_EQ(got.peak_bytes, want.peak_bytes);
    EXPECT_EQ(got.reserved_bytes, want.reserved_bytes);
    EXPECT_EQ(got.peak_by_class, want.peak_by_class);
    EXPECT_STREQ(got.peak_what.c_str(), want.peak_what.c_str());
  }
}

TEST(Plan, DoesTheOpsCallsAndAllocationsOfARunThatComputes) {
  for (const std::string layout :
       {"dp = 1", "dp = 4\nsharding = \"none\"", "dp = 4\nsharding = \"zero1\"",
        "dp = 2\nsharding = \"zero2\"", "dp = 2\nsharding = \"full\"", "dp = 2\ncp = 2",
        "cp = 2\ncontext = \"ring\"", "pp = 2\ndp = 2", "pp = 2\nschedule = \"zb_h1\"",
        "pp = 2\nschedule = \"dualpipev\""}) {
    SCOPED_TRACE(layout);
    expect_equal_work(plan_config("[parallel]\n" + layout + "\n"), false);
    Config fast = plan_config("[parallel]\n" + layout + "\n");
    fast.numerics.reduction = ReductionMode::fast;
    expect_equal_work(fast, false);
  }
}

TEST(Plan, MakesTheSameCallsWhereTokensTravel) {
  for (const std::string layout :
       {"dp = 4\nep = 4", "dp = 4\nep = 2\nsharding = \"full\"", "pp = 2\ndp = 2\nep = 2"}) {
    SCOPED_TRACE(layout);
    expect_equal_work(plan_config("[parallel]\n" + layout + "\n"), true);
  }
}

TEST(Plan, RowsOfAllRanksAreThoseThatTokensChose) {
  for (const std::string routing : {"uniform", "zipf", "concentrated"}) {
    const Config config =
        plan_config("[parallel]\ndp = 4\nep = 4\n[plan]\nrouting = \"" + routing + "\"\n");
    const PlanReport plan = plan_step({.config = config, .machine = "laptop"});
    int64_t flops = 0;
    for (const RankPlan& rank : plan.by_rank) flops += rank.ops.at("grouped_up_dgrad").flops;
    const ModelConfig& model = config.model;
    EXPECT_EQ(flops, 8 * 64 * model.top_k * model.layers * 4 * model.hidden * model.expert_hidden);
  }
}

TEST(Plan, ATraceOfARunIsARouting) {
  Config config = plan_config("[parallel]\ndp = 2\nep = 2\n");
  const ModelConfig& model = config.model;
  const std::string path = testing::TempDir() + "/planned_routing.h5";
  FileSystem files;
  RoutingTraceWriter writer(files, path, config, {1, 1});
  TracedRouting traced;
  const int64_t choices = model.layers * 8 * 64 * model.top_k;
  traced.gate_weights.assign(static_cast<size_t>(choices), 0.5f);
  for (int64_t i = 0; i < choices; ++i) {  // layer l's tokens go to experts l, l + 1, ...
    const int64_t layer = i / (8 * 64 * model.top_k);
    traced.expert_ids.push_back(static_cast<int32_t>((layer + i % model.top_k) % model.experts));
  }
  writer.write_step(1, traced);
  config.plan.routing = path;
  RoutingModel routing(config, 64);
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    for (const int64_t source : {0, 1}) {
      const std::vector<int32_t>& rows = routing.expert_rows(layer, 0, source);
      int32_t chosen = 0, all = 0;
      for (int64_t e = 0; e < model.experts; ++e) {
        const int32_t count = rows[static_cast<size_t>(e)];
        all += count;
        if ((e - layer + model.experts) % model.experts < model.top_k) chosen += count;
      }
      EXPECT_EQ(all, 64 * model.top_k);
      EXPECT_GT(chosen, all * 9 / 10) << layer;
    }
  }
}

TEST(Plan, FoldedRanksAgreeExactlyWithAllOfThem) {
  const std::string path = testing::TempDir() + "/plain_machine.toml";
  std::ofstream(path) << plain_machine("4");
  for (const std::string layout :
       {"dp = 4\nep = 2\nsharding = \"none\"", "pp = 2\ndp = 4\nep = 4",
        "dp = 4\ncp = 2\nsharding = \"zero2\"", "pp = 2\ndp = 4\nep = 2\nsharding = \"full\"",
        "dp = 4\nep = 2\nsharding = \"full\"\nshard_ranks = 2"}) {
    SCOPED_TRACE(layout);
    PlanRun run{
        .config = plan_config("[parallel]\n" + layout + "\n[numerics]\nreduction = \"fast\"\n"),
        .machine = path};
    const PlanReport all = plan_step(run);
    run.folding = Folding::on;
    const PlanReport folded = plan_step(run);
    EXPECT_EQ(folded.step_ns, all.step_ns);
    ASSERT_LT(folded.by_rank.size(), all.by_rank.size());
    const size_t each = all.by_rank.size() / folded.by_rank.size();
    for (size_t r = 0; r < all.by_rank.size(); ++r) {
      const RankPlan &one = folded.by_rank[r / each], &other = all.by_rank[r];
      EXPECT_EQ(one.step_ns, other.step_ns);
      EXPECT_EQ(one.busy_ns, other.busy_ns);
      EXPECT_EQ(one.exposed_ns, other.exposed_ns);
      EXPECT_EQ(one.pipeline_ns, other.pipeline_ns);
      EXPECT_EQ(one.peak_bytes, other.peak_bytes);
    }
    run.config.plan.routing = "zipf";
    EXPECT_THROW(plan_step(run), Error);
    run.config.plan.routing = "uniform";
    run.config.numerics.reduction = ReductionMode::exact;
    EXPECT_THROW(plan_step(run), Error);
  }
}

TEST(Plan, FoldingIsRefusedWhereRanksDiffer) {
  const std::string path = testing::TempDir() + "/folded_machine.toml";
  const std::string dp = "[parallel]\ndp = 4\n", fast = "[numerics]\nreduction = \"fast\"\n";
  const auto refusal = [&](const std::string& machine, const Config& config) -> std::string {
    std::ofstream(path) << machine;
    try {
      plan_step({.config = config, .machine = path, .folding = Folding::on});
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), ExitCode::usage);
      return error.what();
    }
    return "";
  };
  const Config plain = plan_config(dp + fast);
  EXPECT_EQ(refusal(plain_machine("4"), plain), "");
  Config zipf = plain, tied = plain, digests = plain;
  zipf.plan.routing = "zipf";
  tied.model.tie_embeddings = true;
  digests.logging.digest_every_steps = 1;
  std::string few_nics = plain_machine("2");
  few_nics.replace(few_nics.find("nics = { value = 2"), 18, "nics = { value = 1");
  const struct {
    std::string machine;
    Config config;
    const char* why;
  } cases[] = {
      {plain_machine("4"), zipf, "plan.routing = zipf differs between ranks"},
      {plain_machine("4"), plan_config("[parallel]\ndp = 2\ncp = 2\ncontext = \"ring\"\n" + fast),
       "each hop of parallel.context = ring"},
      {plain_machine("4"), tied, "a tied embedding's gradient"},
      {plain_machine("4"), plan_config(dp), "numerics.reduction = exact"},
      {plain_machine("4"), digests, "digests of every step"},
      {machine_source("laptop"), plain, "the ranks share one device"},
      {few_nics, plain, "2 ranks of a node share 1 NICs"},
      {plain_machine("3"), plain, "groups of 4 ranks lie across nodes of 3 differently"},
  };
  for (const auto& row : cases) {
    const std::string text = refusal(row.machine, row.config);
    EXPECT_NE(text.find(row.why), std::string::npos) << row.why << ": " << text;
  }
}

TEST(Plan, RepeatsItselfToTheNanosecond) {
  const std::string path = testing::TempDir() + "/repeated_machine.toml";
  std::ofstream(path) << plain_machine("2");
  const PlanRun run{.config = plan_config("[parallel]\npp = 2\ndp = 4\nep = 4\nsharding = "
                                          "\"full\"\n[plan]\nrouting = \"zipf\"\n"),
                    .machine = path};
  const PlanReport one = plan_step(run), again = plan_step(run);
  EXPECT_EQ(one.step_ns, again.step_ns);
  for (size_t r = 0; r < one.by_rank.size(); ++r) {
    EXPECT_EQ(one.by_rank[r].busy_ns, again.by_rank[r].busy_ns);
  }
}

TEST(Machines, AMeasuredShapeTakesItsMeasuredTimeAndTilesCount) {
  const Machine machine = load_machine("dgx-h200");
  const Cost cost{"attention", {16384, 32, 128, 4, 4096}, 0, 0, 0};
  Cost whole = cost;
  whole.flops = 16384LL * 4097 / 2 * 32 * (4 * 128 + 5);
  whole.bytes = 2LL * 16384 * 2 * 36 * 128 + 4LL * 16384 * 32;
  EXPECT_NEAR(static_cast<double>(op_time(machine, whole, {}).ns), 892e3, 892e3 * 0.001);
  EXPECT_FALSE(op_time(machine, whole, {}).is_extrapolated);
  // The same rows on one expert, or a row more than a tile on each: whole tiles are multiplied.
  Cost rows{"grouped_up_dgrad", {4096, 32, 1536, 2048}, 2LL * 4096 * 1536 * 2048, 1, 0};
  const std::vector<int64_t> full(32, 128);
  std::vector<int64_t> ragged(32, 129);
  ragged[0] = 128 - 31;
  const double want = static_cast<double>(op_time(machine, rows, full).ns);
  EXPECT_NEAR(static_cast<double>(op_time(machine, rows, ragged).ns), want * 63 / 32, want * 0.01);
  EXPECT_TRUE(op_time(load_machine("dgx-b200"), whole, {}).is_extrapolated);
}

// Curves of collectives: written, read, interpolated between their sizes, flagged outside.
TEST(Machines, MeasuredCollectivesTakeTheirMeasuredTime) {
  MeasuredLinks links{"dgx-h200", "here", "a test", {}};
  for (double bytes = 4096; bytes <= 1 << 30; bytes *= 2) {
    links.collectives.push_back({CollectiveKind::all_reduce, 2, bytes, 9000 + bytes / 300});
    links.collectives.push_back({CollectiveKind::all_reduce, 8, bytes, 30000 + bytes / 300});
    links.collectives.push_back({CollectiveKind::all_to_all_v, 8, bytes, 20000 + bytes / 250});
  }
  const std::string text = machine_text(links);
  const Machine machine = parse_machine(text, "here");
  EXPECT_EQ(machine.name, "here");
  EXPECT_EQ(machine.ops.size(), load_machine("dgx-h200").ops.size());
  for (const MeasuredCollective& call : links.collectives) {
    const CollectiveTime time = collective_time(machine, {call.kind, call.ranks, call.bytes});
    EXPECT_TRUE(time.is_measured && !time.is_extrapolated);
    EXPECT_NEAR(time.ns, call.ns, 1e-4 * call.ns);
  }
  const auto time = [&](CollectiveKind kind, int64_t ranks, double bytes) {
    return collective_time(machine, {kind, ranks, bytes});
  };
  const CollectiveTime between = time(CollectiveKind::all_reduce, 2, 1.5e6);
  EXPECT_NEAR(between.ns, 9000 + 1.5e6 / 300, 0.02 * 14000);
  EXPECT_FALSE(between.is_extrapolated);
  EXPECT_FALSE(time(CollectiveKind::all_reduce, 2, 2048).is_extrapolated);  // half the least
  EXPECT_TRUE(time(CollectiveKind::all_reduce, 2, 1000).is_extrapolated);
  EXPECT_NEAR(time(CollectiveKind::all_reduce, 2, 1000).ns, 9000 + 4096 / 300, 1);
  EXPECT_NEAR(time(CollectiveKind::all_reduce, 2, 4.0 * (1 << 30)).ns, 4 * (9000 + (1 << 30) / 300),
              1e3);  // the last one's rate
  EXPECT_TRUE(time(CollectiveKind::all_reduce, 2, 4.0 * (1 << 30)).is_extrapolated);
  EXPECT_TRUE(time(CollectiveKind::all_reduce, 4, 8192).is_extrapolated);  // of other ranks
  EXPECT_FALSE(time(CollectiveKind::all_gather, 8, 8192).is_measured);
  // A second measurement replaces the first.
  std::ofstream(testing::TempDir() + "/links.toml") << text;
  const Machine again =
      parse_machine(machine_text(MeasuredLinks{testing::TempDir() + "/links.toml",
                                               "again",
                                               "b",
                                               {{CollectiveKind::all_gather, 2, 4096, 5000}}}),
                    "again");
  ASSERT_EQ(again.collectives.size(), 1u);
  EXPECT_EQ(again.ops.size(), machine.ops.size());
}

// A constant of a machine file without its source, or in a unit of another kind, is refused.
TEST(Machines, ConstantsHaveSourcesAndUnits) {
  for (const char* name : {"dgx-h100", "dgx-h200", "dgx-b200", "laptop", "h100", "h200"}) {
    const std::string text = machine_source(name);
    const auto refuses = [&](const std::string& changed) {
      try {
        parse_machine(changed, name);
      } catch (const Error& error) {
        return error.exit_code() == ExitCode::usage;
      }
      return false;
    };
    EXPECT_FALSE(refuses(text)) << name;
    int64_t constants = 0;
    for (size_t at = text.find("{ value = "); at != std::string::npos;
         at = text.find("{ value = ", at + 1)) {
      const std::string line = text.substr(at, text.find('\n', at) - at);
      std::string without = text;
      without.replace(text.find("source", at), 6, "origin");
      EXPECT_TRUE(refuses(without)) << name << ": " << line;
      const size_t unit = text[at + 10] == '"' ? text.find(' ', at + 10) : std::string::npos;
      if (unit < at + line.size()) {
        std::string other = text;
        other.replace(unit, text.find('"', unit) - unit, " parsec");
        EXPECT_TRUE(refuses(other)) << name << ": " << line;
      }
      ++constants;
    }
    EXPECT_GE(constants, 15) << name;
  }
}

TEST(Machines, AWrongCurveIsRefusedWithItsKey) {
  const std::string base = machine_source("dgx-h200");
  const auto refusal = [&](const std::string& curve) -> std::string {
    try {
      parse_machine(base + "\n[[collective]]\n" + curve, "x.toml");
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), ExitCode::usage);
      return error.what();
    }
    return "";
  };
  const std::string head = "kind = \"all_gather\"\nsource = \"s\"\nranks = 2\n";
  EXPECT_EQ(refusal(head + "points = [[\"4 KiB\", \"9 us\"]]"), "");
  const std::pair<std::string, const char*> rows[] = {
      {"kind = \"broadcast\"\nsource = \"s\"\nranks = 2\npoints = []", "kind is all_to_all_v"},
      {"kind = \"all_gather\"\nranks = 2\npoints = []", "source"},
      {"kind = \"all_gather\"\nsource = \"s\"\nranks = 1\npoints = []", "ranks is at least 2"},
      {head + "points = []", "no points"},
      {head + "points = [[\"4 KiB\", 9.0]]", "a time such as"},
      {head + "points = [[\"4 us\", \"9 us\"]]", "a size such as"},
      {head + "points = [[\"4 KiB\", \"0 us\"]]", "above 0"},
      {head + "points = [[\"4 KiB\", \"9 us\"], [\"1 KiB\", \"9 us\"]]", "ascend"},
  };
  for (const auto& [curve, message] : rows) {
    EXPECT_NE(refusal(curve).find(message), std::string::npos) << curve << ": " << refusal(curve);
  }
}

TEST(Machines, ACalibratedFileGivesBackWhatWasMeasured) {
  Measurements measured;
  measured.name = "here";
  measured.command = "a test";
  measured.memory_bytes = 8e9;
  measured.call_ns = 500;
  measured.call_rank_ns = 20;
  measured.copy_bytes_per_s = 4e9;
  for (int64_t n = 128; n <= 1024; n *= 2) {
    measured.ops.push_back({{"linear", {n, n, n}, 2 * n * n * n, 12 * n * n, 0}, 100.0 * n * n});
    measured.ops.push_back({{"copy_bytes", {n * n}, 0, 2 * n * n, 0}, 3.0 * n});
  }
  const Machine machine = parse_machine(machine_text(measured), "here");
  EXPECT_TRUE(machine.is_shared);
  for (const MeasuredOp& op : measured.ops) {
    const OpTime time = op_time(machine, op.cost, {});
    EXPECT_NEAR(static_cast<double>(time.ns), op.ns, 0.002 * op.ns + 1) << op.cost.op;
    EXPECT_FALSE(time.is_extrapolated);
  }
  // Time of n^2 between measured ones; residuals are those of the steps of a factor of two.
  const OpTime between = op_time(machine, {"linear", {181, 181, 181}, 2 * 5929741, 393132, 0}, {});
  EXPECT_NEAR(static_cast<double>(between.ns), 3276100, 0.35 * 3276100);
  EXPECT_GT(machine.ops.at("linear").residual, 0.05);
  EXPECT_TRUE(op_time(machine, {"linear", {8192, 64, 64}, 1, 1, 0}, {}).is_extrapolated);
  EXPECT_TRUE(op_time(machine, {"attention", {64}, 1, 1, 0}, {}).is_extrapolated);
}

}  // namespace
}  // namespace cambium::sim
