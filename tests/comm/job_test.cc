// Jobs of several processes on the CPU: who finds whom, and what a silent or missing peer leads to.
//
// The communicator here is a fake: a collective is done when every process has raised a counter in
// shared memory. The job's log and watch do not know the difference.
#include "src/comm/job.h"

#include <atomic>

#include "gtest/gtest.h"
#include "tests/comm/process_group.h"

namespace cambium {
namespace {

using process_group::Ending;
using process_group::run_processes;
using process_group::Shared;
using process_group::sleep_ms;

constexpr double kLimitS = 60;  // of a test; the machine may be busy

// A listener that is made before the processes, so that no other test takes its port.
struct Meeting {
  Socket listener = listen_on(0);
  int port = listening_port(listener);
  JobOptions options(int rank, int ranks) {
    if (rank != 0) listener.close();
    JobOptions options;
    options.rank = rank;
    options.ranks = ranks;
    options.endpoint = {"127.0.0.1", port};
    options.token = "token";
    options.arrival_limit_s = 30;
    options.watchdog_s = 30;
    return options;
  }
  Socket take(int rank) { return rank == 0 ? std::move(listener) : Socket(); }
};

struct Counters {
  std::atomic<int> arrived[64];
};

class CounterProbe final : public CallProbe {
 public:
  CounterProbe(const std::atomic<int>& arrived, int ranks) : arrived_(arrived), ranks_(ranks) {}
  CallState state() const override {
    return arrived_.load() >= ranks_ ? CallState::done : CallState::running;
  }

 private:
  const std::atomic<int>& arrived_;
  int ranks_;
};

class NoTransport final : public TransportProbe {
 public:
  std::string failure() const override { return ""; }
};

// One rank's fake communicator of all ranks.
class FakeCommunicator {
 public:
  FakeCommunicator(Job& job, Counters& counters) : job_(job), counters_(counters) {
    std::vector<int> members;
    for (int rank = 0; rank < job.ranks(); ++rank) members.push_back(rank);
    group_ = job.log().add_group({"world", members});
    job.log().joined(group_, transport_);
  }
  ~FakeCommunicator() { job_.log().remove_group(group_); }

  enum class Arrival { yes, no };
  void post(CollectiveKind kind, Arrival arrival = Arrival::yes,
            std::source_location site = std::source_location::current()) {
    CollectiveCall call;
    call.kind = kind;
    call.dtype = DType::f32;
    call.count = 5;
    call.site = site;
    std::atomic<int>& arrived = counters_.arrived[posted_++];
    if (arrival == Arrival::yes) ++arrived;
    probe_ = std::make_shared<CounterProbe>(arrived, job_.ranks());
    job_.log().post(group_, call, probe_);
  }
  void wait() const {
    while (probe_->state() != CallState::done) {
      job_.check();
      sleep_ms(1);
    }
    job_.check();
  }
  void all_reduce(std::source_location site = std::source_location::current()) {
    post(CollectiveKind::all_reduce, Arrival::yes, site);
    wait();
  }

 private:
  Job& job_;
  Counters& counters_;
  NoTransport transport_;
  std::shared_ptr<CounterProbe> probe_;
  int posted_ = 0;
  int group_ = 0;
};

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in: " << text;
}

TEST(JobMeeting, EveryRankSeesWhatOthersPublish) {
  Meeting meeting;
  const auto endings = run_processes(3, kLimitS, [&](int rank) {
    const JobOptions options = meeting.options(rank, 3);
    Job job(options, meeting.take(rank));
    const std::string binary("\0\xff id", 5);
    if (rank == 1) job.publish("id", binary);
    if (rank == 0) job.publish("directory", "runs/x");
    if (job.await("id") != binary || job.await("directory") != "runs/x") {
      fail(ExitCode::verification_mismatch, "wrong value");
    }
    job.check();
  });
  for (const Ending& ending : endings) EXPECT_EQ(ending.code, 0) << ending.message;
}

TEST(JobMeeting, ARankThatDoesNotComeIsNamed) {
  Meeting meeting;
  const auto endings = run_processes(4, kLimitS, [&](int rank) {
    if (rank == 2) return;
    JobOptions options = meeting.options(rank, 4);
    if (rank == 0) options.arrival_limit_s = 2;
    Job job(options, meeting.take(rank));
  });
  for (const int rank : {0, 1, 3}) {
    EXPECT_EQ(endings[static_cast<size_t>(rank)].code, 20);
    expect_contains(endings[static_cast<size_t>(rank)].message, "ranks [2] did not come");
  }
}

TEST(JobMeeting, AnotherRunsTokenIsRefused) {
  Meeting meeting;
  const auto endings = run_processes(2, kLimitS, [&](int rank) {
    JobOptions options = meeting.options(rank, 2);
    if (rank == 1) options.token = "another";
    if (rank == 0) options.arrival_limit_s = 2;
    Job job(options, meeting.take(rank));
  });
  EXPECT_EQ(endings[0].code, 20);
  EXPECT_EQ(endings[1].code, 2);
  expect_contains(endings[1].message, "belongs to another run");
}

TEST(JobMeeting, LibrariesAndNumbersMustAgree) {
  Meeting meeting;
  const auto endings = run_processes(4, kLimitS, [&](int rank) {
    JobOptions options = meeting.options(rank, 4);
    if (rank == 0) options.arrival_limit_s = 3;
    if (rank == 1) options.library_version = 22809;
    if (rank == 2) options.ranks = 8;
    Job job(options, meeting.take(rank));
  });
  EXPECT_EQ(endings[1].code, 2);
  expect_contains(endings[1].message, "rank 1 has NCCL 22809, rank 0 has NCCL 0");
  EXPECT_EQ(endings[2].code, 2);
  expect_contains(endings[2].message, "rank 2 of 8 comes to a job of 4 ranks");
  expect_contains(endings[3].message, "ranks [1,2] did not come");
}

TEST(JobMeeting, TwoProcessesOfOneRankAreRefused) {
  Meeting meeting;
  const auto endings = run_processes(3, kLimitS, [&](int process) {
    JobOptions options = meeting.options(process, 3);
    if (process == 0) options.arrival_limit_s = 2;
    options.rank = process == 0 ? 0 : 1;
    Job job(options, meeting.take(process));
  });
  EXPECT_EQ(endings[0].code, 20);
  const bool first_refused = endings[1].code == 2;
  EXPECT_EQ(endings[first_refused ? 1 : 2].code, 2);
  EXPECT_EQ(endings[first_refused ? 2 : 1].code, 20);
}

TEST(JobMeeting, APortInUseIsRefused) {
  const Socket taken = listen_on(0);
  JobOptions options;
  options.ranks = 2;
  options.endpoint = {"127.0.0.1", listening_port(taken)};
  try {
    Job job(options);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::usage);
    expect_contains(error.what(), "another MASTER_PORT");
  }
}

TEST(JobMeeting, NobodyAtTheAddressIsALostPeer) {
  int port = 0;
  {
    const Socket free = listen_on(0);
    port = listening_port(free);
  }
  JobOptions options;
  options.rank = 1;
  options.ranks = 2;
  options.endpoint = {"127.0.0.1", port};
  options.arrival_limit_s = 0.3;
  try {
    Job job(options);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::peer_lost);
    expect_contains(error.what(), "rank 0 cannot be reached at 127.0.0.1");
  }
}

// A scanner that says something else, one that says nothing, and a frame that claims a gigabyte.
TEST(JobMeeting, StrangersDoNotDisturb) {
  Meeting meeting;
  const int port = meeting.port;
  std::string reason;
  const int64_t soon_ns = steady_now_ns() + kNsPerS;
  std::vector<Socket> strangers;
  for (int i = 0; i < 4; ++i) {
    strangers.push_back(connect_to({"127.0.0.1", port}, soon_ns, &reason));
    ASSERT_TRUE(strangers.back().is_open()) << reason;
  }
  const std::string words = "GET / HTTP/1.1\r\n\r\n";
  const uint32_t huge[3] = {0x314d4243, 0, 1u << 30};
  const uint32_t unknown[3] = {0x314d4243, 77, 0};
  ASSERT_GT(write(strangers[0].descriptor(), words.data(), words.size()), 0);
  ASSERT_GT(write(strangers[1].descriptor(), huge, sizeof huge), 0);
  ASSERT_GT(write(strangers[2].descriptor(), unknown, sizeof unknown), 0);
  const auto endings = run_processes(2, kLimitS, [&](int rank) {
    const JobOptions options = meeting.options(rank, 2);
    Job job(options, meeting.take(rank));
    if (rank == 0) job.publish("x", "y");
    if (job.await("x") != "y") fail(ExitCode::verification_mismatch, "wrong value");
  });
  EXPECT_EQ(endings[0].code, 0) << endings[0].message;
  EXPECT_EQ(endings[1].code, 0) << endings[1].message;
}

// Runs `body(job, communicator, rank)` on three ranks.
template <class Body>
std::vector<Ending> run_job(double watchdog_s, const Body& body) {
  Meeting meeting;
  const Shared<Counters> counters;
  return run_processes(3, kLimitS, [&](int rank) {
    JobOptions options = meeting.options(rank, 3);
    options.watchdog_s = watchdog_s;
    options.exit_grace_s = 1;
    Job job(options, meeting.take(rank));
    try {
      FakeCommunicator world(job, *counters);
      job.log().set_step(4);
      body(job, world, rank);
    } catch (const Error& error) {
      job.announce_failure(error.exit_code(), error.what());
      throw;
    }
  });
}

TEST(JobWatch, SlowProgressIsProgress) {
  const auto endings = run_job(1.5, [](Job&, FakeCommunicator& world, int rank) {
    for (int call = 0; call < 5; ++call) {
      if (rank == 1) sleep_ms(500);
      world.all_reduce();
    }
  });
  for (const Ending& ending : endings) EXPECT_EQ(ending.code, 0) << ending.message;
}

TEST(JobWatch, AKilledRankIsLost) {
  for (const int victim : {0, 2}) {
    const auto endings = run_job(30, [&](Job&, FakeCommunicator& world, int rank) {
      world.all_reduce();
      if (rank == victim) kill(getpid(), SIGKILL);
      world.all_reduce();
    });
    for (int rank = 0; rank < 3; ++rank) {
      const Ending& ending = endings[static_cast<size_t>(rank)];
      EXPECT_EQ(ending.code, rank == victim ? -SIGKILL : 20) << ending.message;
      if (rank == victim) continue;
      expect_contains(ending.message, victim == 0 ? "rank 0 is lost" : "rank 2 is lost");
      EXPECT_LT(ending.seconds, 20);
    }
  }
}

TEST(JobWatch, AStoppedRankTripsTheWatchdog) {
  for (const int victim : {0, 1}) {
    const auto endings = run_job(1, [&](Job&, FakeCommunicator& world, int rank) {
      world.all_reduce();
      if (rank == victim) kill(getpid(), SIGSTOP);
      world.all_reduce();
    });
    for (int rank = 0; rank < 3; ++rank) {
      const Ending& ending = endings[static_cast<size_t>(rank)];
      if (rank == victim) continue;
      EXPECT_EQ(ending.code, 21) << ending.message;
      expect_contains(ending.message, "communicator 'world' [0,1,2], call #2: all_reduce sum f32");
      expect_contains(ending.message, "tests/comm/job_test.cc:");
      expect_contains(ending.message, victim == 0 ? "rank 0, which asks the ranks, is stopped"
                                                  : "no answer from [1]");
      expect_contains(ending.message, "in step 4");
    }
  }
}

TEST(JobWatch, ASkippedCollectiveIsNamed) {
  const auto endings = run_job(1, [&](Job& job, FakeCommunicator& world, int rank) {
    world.all_reduce();
    if (rank != 1) world.all_reduce();
    while (true) {
      job.check();
      sleep_ms(1);
    }
  });
  for (const Ending& ending : endings) {
    EXPECT_EQ(ending.code, 21) << ending.message;
    expect_contains(ending.message, "call #2");
    expect_contains(ending.message,
                    "posted by [0,2], not posted by [1]: rank 1's last there is #1");
  }
}

TEST(JobWatch, DifferentCollectivesAreAMismatch) {
  const auto endings = run_job(1, [&](Job&, FakeCommunicator& world, int rank) {
    world.all_reduce();
    if (rank == 2) {
      world.post(CollectiveKind::broadcast, FakeCommunicator::Arrival::no);
      world.wait();
    }
    world.all_reduce();
  });
  for (const Ending& ending : endings) {
    EXPECT_EQ(ending.code, 22) << ending.message;
    expect_contains(ending.message, "call #2");
    expect_contains(ending.message, "all_reduce sum f32 count 5");
    expect_contains(ending.message, "broadcast f32 count 5 root 0");
  }
}

TEST(JobWatch, ARanksOwnErrorEndsTheOthers) {
  for (const int culprit : {0, 1}) {
    const auto endings = run_job(30, [&](Job&, FakeCommunicator& world, int rank) {
      world.all_reduce();
      if (rank == culprit) fail(ExitCode::non_finite, "loss is NaN in layer 3");
      world.all_reduce();
    });
    for (int rank = 0; rank < 3; ++rank) {
      const Ending& ending = endings[static_cast<size_t>(rank)];
      EXPECT_EQ(ending.code, rank == culprit ? 50 : 20) << ending.message;
      expect_contains(ending.message, "loss is NaN in layer 3");
    }
  }
}

TEST(JobWatch, HostCodeThatDoesNotListenIsEnded) {
  const auto endings = run_job(30, [&](Job&, FakeCommunicator& world, int rank) {
    world.all_reduce();
    sleep_ms(300);  // the others are past their last check
    if (rank == 2) kill(getpid(), SIGKILL);
    sleep_ms(40'000);
  });
  for (const int rank : {0, 1}) {
    const Ending& ending = endings[static_cast<size_t>(rank)];
    EXPECT_EQ(ending.code, 20) << ending.message;
    expect_contains(ending.message, "rank 2 is lost");
    EXPECT_GT(ending.seconds, 1.3);  // the time of grace
    EXPECT_LT(ending.seconds, 30);
  }
}

// A rank that hangs before it has made the communicator: the others wait in its making.
TEST(JobWatch, ACommunicatorThatIsNotMadeIsNamed) {
  Meeting meeting;
  const auto endings = run_processes(2, kLimitS, [&](int rank) {
    JobOptions options = meeting.options(rank, 2);
    options.watchdog_s = 1;
    Job job(options, meeting.take(rank));
    if (rank == 0) job.log().add_group({"expert", {0, 1}});
    job.await("never published");
  });
  for (const Ending& ending : endings) {
    EXPECT_EQ(ending.code, 21) << ending.message;
    expect_contains(ending.message, "the making of communicator 'expert' [0,1]");
    expect_contains(ending.message, "not posted by [1]: rank 1 has not made it");
  }
}

TEST(StallReport, KeepsItsFieldsAndRefusesTornOnes) {
  RankReport report;
  report.step = 7;
  GroupReport group;
  group.name = "expert";
  group.members = {4, 5};
  group.posted = 9;
  group.last = "barrier (x.cc:1)";
  group.calls.push_back({0,
                         "exchange f32",
                         "y.cc:2",
                         CallState::running,
                         1234,
                         {{5, 3, AwaitedMessage::Side::peer_sends}}});
  group.channels[5] = {2, 3};
  report.groups.push_back(group);
  const std::string body = encode_report(report);
  RankReport back;
  ASSERT_TRUE(decode_report(body, &back));
  EXPECT_EQ(encode_report(back), body);
  EXPECT_EQ(back.groups[0].calls[0].messages[0].number, 3u);
  for (size_t bytes = 0; bytes < body.size(); ++bytes) {
    RankReport torn;
    EXPECT_FALSE(decode_report(body.substr(0, bytes), &torn)) << bytes;
  }
}

// Rank 4 waits for rank 5's third message; rank 5 has sent two.
TEST(StallReport, AMissingMessageNamesItsSender) {
  StallInquiry inquiry;
  inquiry.ranks = 6;
  inquiry.limit_ms = 1000;
  GroupReport receiver{"expert", {4, 5}, 0, "", {}, {{5, {0, 3}}}};
  receiver.calls.push_back({0,
                            "exchange f32",
                            "y.cc:2",
                            CallState::running,
                            1500,
                            {{5, 3, AwaitedMessage::Side::peer_sends}}});
  inquiry.reports[4].groups = {receiver};
  inquiry.reports[5].groups = {{"expert", {4, 5}, 0, "", {}, {{4, {2, 0}}}}};
  const Verdict verdict = diagnose(inquiry);
  EXPECT_EQ(verdict.code, ExitCode::watchdog);
  expect_contains(verdict.text, "exchange f32 (y.cc:2); posted by [4], not posted by [5]");
  // With the third one sent, the transfer itself is what does not move.
  inquiry.reports[5].groups[0].channels[4].sent = 3;
  expect_contains(diagnose(inquiry).text, "every member posted it");
  // And with a call that has not run for long, there is nothing to say.
  inquiry.reports[4].groups[0].calls[0].running_ms = 999;
  EXPECT_EQ(diagnose(inquiry).code, ExitCode::done);
}

}  // namespace
}  // namespace cambium
