// Deadlock: found at once, and the message names who waits where, for what, and who is missing.
#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

template <class Body>
RunError deadlock(int ranks, Body&& body, std::vector<std::string> texts) {
  RunError last;
  for (const uint64_t seed : {0, 1, 2, 3, 4, 5, 6, 7}) {
    last = run_error({.ranks = ranks, .schedule_seed = seed}, body);
    EXPECT_EQ(last.exit_code, ExitCode::deadlock) << last.message;
    EXPECT_TRUE(last.says("deadlock_test.cc:")) << last.message;
    for (const std::string& text : texts) EXPECT_TRUE(last.says(text)) << text << last.message;
  }
  return last;
}

TEST(Deadlock, ParticipantFinished) {
  deadlock(3,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             bench.wait(bench.sum());
             if (environment.rank() != 2) bench.wait(bench.sum());
           },
           {"call #2 of communicator 'world' [0,1,2]", "rank 0 (step 0): waits at",
            "missing participant rank 2: it has posted 1 calls there", "finished its program"});
}

TEST(Deadlock, CrossedOrderOfTwoCommunicators) {
  deadlock(
      2,
      [](RankEnvironment& environment) {
        RankBench bench(environment);
        const auto other = environment.make_communicator("other", {0, 1});
        environment.set_step(3);
        Communicator& first = environment.rank() == 0 ? *bench.world : *other;
        Communicator& second = environment.rank() == 0 ? *other : *bench.world;
        bench.sum(first, bench.stream, 4);
        bench.wait(bench.sum(second, bench.stream, 4));
      },
      {"cycle of ranks 0 -> 1 -> 0", "'world' [0,1]", "'other' [0,1]", "another order", "step 3"});
}

TEST(Deadlock, CrossedHostWaits) {
  deadlock(2,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             const auto other = environment.make_communicator("other", {0, 1});
             Communicator& first = environment.rank() == 0 ? *bench.world : *other;
             Communicator& second = environment.rank() == 0 ? *other : *bench.world;
             bench.wait(bench.sum(first, bench.stream, 4));
             bench.wait(bench.sum(second, bench.stream, 4));
           },
           {"cycle of ranks 0 -> 1 -> 0", "missing participant rank 1: it has posted 0 calls"});
}

TEST(Deadlock, ExchangeWithoutPartner) {
  deadlock(3,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             if (environment.rank() != 1) return;
             const Message received{2, bench.recv.data(), 4};
             bench.wait(exchange({.communicator = *bench.world,
                                  .stream = bench.stream,
                                  .sends = {},
                                  .recvs = {&received, 1}}));
           },
           {"missing partner rank 2: it did not post the send to rank 1 and finished its program"});
}

TEST(Deadlock, SendsBeforeReceivesWithoutBuffers) {
  deadlock(2,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             const Message sent{1 - environment.rank(), bench.send.data(), 1};
             const Message received{1 - environment.rank(), bench.recv.data(), 1};
             bench.wait(exchange({.communicator = *bench.world,
                                  .stream = bench.stream,
                                  .sends = {&sent, 1},
                                  .recvs = {}}));
             bench.wait(exchange({.communicator = *bench.world,
                                  .stream = bench.stream,
                                  .sends = {},
                                  .recvs = {&received, 1}}));
           },
           {"cycle of ranks", "did not post the receive from rank"});
}

TEST(Deadlock, EventNeverRecorded) {
  deadlock(2,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             if (environment.rank() == 1) bench.wait(Event{&bench.stream, 5});
           },
           {"rank 1 waits for event 5 of stream 'rank 1 comm'", "the event was never recorded"});
}

TEST(Deadlock, StreamWaitsForEventNeverRecorded) {
  deadlock(2,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             Stream& compute = environment.make_stream("compute");
             if (environment.rank() == 0) bench.stream.wait(Event{&compute, 1});
             bench.wait(bench.sum());
           },
           {"the event was never recorded", "stream 'rank 0 compute'"});
}

TEST(Deadlock, StreamsWaitForEachOther) {
  deadlock(1,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             Stream& compute = environment.make_stream("compute");
             bench.stream.wait(Event{&compute, 1});
             compute.wait(Event{&bench.stream, 1});
             bench.wait(bench.sum());
           },
           {"a cycle of stream waits"});
}

TEST(Deadlock, CommunicatorMadeWithAnotherList) {
  deadlock(3,
           [](RankEnvironment& environment) {
             RankBench bench(environment);
             if (environment.rank() == 2) return;
             const auto group = environment.make_communicator(
                 "ep", environment.rank() == 0 ? std::vector{0, 1} : std::vector{1, 2});
             bench.wait(bench.sum(*group, bench.stream, 4));
           },
           {"it never made this communicator"});
}

// 64 ranks, one missing: the first line names it.
TEST(Deadlock, ManyRanks) {
  const RunError error = deadlock(64,
                                  [](RankEnvironment& environment) {
                                    RankBench bench(environment);
                                    if (environment.rank() != 41) bench.wait(bench.sum());
                                  },
                                  {"missing participant rank 41"});
  const std::string first = error.message.substr(0, error.message.find('\n'));
  EXPECT_NE(first.find("rank 41"), std::string::npos) << first;
}

}  // namespace
}  // namespace cambium::sim
