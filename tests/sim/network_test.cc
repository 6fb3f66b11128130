// Transfers in virtual time by hand: messages and collectives on one tier and two, alone and beside
// each other.
#include <algorithm>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "sim/cluster.h"
#include "sim/machine.h"
#include "sim/virtual_time.h"
#include "tests/sim/plain_machine.h"

namespace cambium::sim {
namespace {

std::byte* fake_data() { return reinterpret_cast<std::byte*>(uintptr_t{1} << 44); }

TEST(VirtualTime, MessagesThatMeetOnALinkShareIt) {
  const Machine machine = parse_machine(plain_machine("1"), "plain");
  const Config config = plan_config("[parallel]\ndp = 2\n");
  VirtualTime time(machine, config, nullptr);
  run_cluster({.ranks = 2, .time = &time}, [&](RankEnvironment& environment) {
    std::byte* const data = reinterpret_cast<std::byte*>(uintptr_t{1} << 44);
    std::unique_ptr<Communicator> communicators[2];
    Ticket tickets[2];
    for (int i = 0; i < 2; ++i) {
      const std::string name = i == 0 ? "long" : "short";
      communicators[i] = environment.make_communicator(name, {0, 1});
      const Message message{1 - environment.rank(), data, i == 0 ? 1000 : 500};
      const std::span<const Message> one(&message, 1), none;
      const bool sends = environment.rank() == 0;
      tickets[i] = exchange({.communicator = *communicators[i],
                             .stream = environment.make_stream(name),
                             .sends = sends ? one : none,
                             .recvs = sends ? none : one,
                             .dtype = DType::u8});
    }
    // Alone 2000 and 1000 ns at half a byte a nanosecond; together the short one takes 2000.
    environment.host().wait(tickets[1]);
    EXPECT_EQ(environment.host().now_ns(), 2000);
    environment.host().wait(tickets[0]);
    EXPECT_EQ(environment.host().now_ns(), 3000);
  });
}

struct PlannedMessage {
  int from, to;
  int64_t bytes, end_ns;
};

// Half a byte a nanosecond and link, one link a rank. Three messages share rank 0's, a third each;
// what the third leaves of rank 2's link the fourth has, and all of it when they are over.
TEST(VirtualTime, LinksAreSharedMaxMin) {
  const PlannedMessage messages[] = {
      {0, 1, 500, 3000}, {0, 3, 500, 3000}, {0, 2, 500, 3000}, {2, 4, 1200, 3400}};
  const Machine machine = parse_machine(plain_machine("1"), "plain");
  const Config config = plan_config("[parallel]\ndp = 4\n");
  VirtualTime time(machine, config, nullptr);
  int64_t seen = 0;
  run_cluster({.ranks = 5, .time = &time}, [&](RankEnvironment& environment) {
    const int rank = environment.rank();
    std::vector<std::unique_ptr<Communicator>> communicators;
    std::vector<std::pair<Ticket, int64_t>> tickets;
    for (const PlannedMessage& planned : messages) {
      if (rank != planned.from && rank != planned.to) continue;
      const std::string name = fmt::format("{}-{}", planned.from, planned.to);
      communicators.push_back(environment.make_communicator(
          name, {std::min(planned.from, planned.to), std::max(planned.from, planned.to)}));
      const bool sends = rank == planned.from;
      const int peer = sends == (planned.from < planned.to) ? 1 : 0;
      const Message message{peer, fake_data(), planned.bytes};
      const std::span<const Message> one(&message, 1), none;
      tickets.emplace_back(exchange({.communicator = *communicators.back(),
                                     .stream = environment.make_stream(name),
                                     .sends = sends ? one : none,
                                     .recvs = sends ? none : one,
                                     .dtype = DType::u8}),
                           planned.end_ns);
    }
    for (const auto& [ticket, end_ns] : tickets) {  // in the order of their ends
      environment.host().wait(ticket);
      EXPECT_EQ(environment.host().now_ns(), end_ns) << rank;
      ++seen;
    }
  });
  EXPECT_EQ(seen, 8);
}

// When a collective of `members`, and `beside` it another, end.
int64_t gather_end_ns(const std::string& machine_text, const std::vector<int>& members,
                      int beside = 0) {
  const Machine machine = parse_machine(machine_text, "plain");
  const Config config = plan_config("[parallel]\ndp = 4\n");
  VirtualTime time(machine, config, nullptr);
  int64_t end_ns = 0;
  run_cluster({.ranks = 4, .time = &time}, [&](RankEnvironment& environment) {
    if (std::ranges::find(members, environment.rank()) == members.end()) return;
    std::vector<std::unique_ptr<Communicator>> groups;
    std::vector<Ticket> tickets;
    for (int i = 0; i <= beside; ++i) {
      const std::string name = fmt::format("group {}", i);
      groups.push_back(environment.make_communicator(name, members));
      tickets.push_back(all_gather({.communicator = *groups.back(),
                                    .stream = environment.make_stream(name),
                                    .send = fake_data(),
                                    .recv = fake_data() + 4096,
                                    .count = 300,
                                    .dtype = DType::u8}));
    }
    for (const Ticket& ticket : tickets) environment.host().wait(ticket);
    end_ns = environment.host().now_ns();
  });
  return end_ns;
}

// A gather of n ranks moves (n - 1) * 300 bytes a rank: 100 ns and a byte a nanosecond within a
// node; between nodes half a byte a nanosecond, on the NICs of all ranks of a node that take part.
TEST(VirtualTime, CollectivesTakeTheSlowerOfTwoTiers) {
  EXPECT_EQ(gather_end_ns(plain_machine("4"), {0, 1, 2, 3}), 100 + 900);
  EXPECT_EQ(gather_end_ns(plain_machine("2"), {0, 1, 2, 3}), 100 + 900);  // far: 450 bytes in 900
  EXPECT_EQ(gather_end_ns(plain_machine("1"), {0, 1, 2, 3}), 2 * 900);
  EXPECT_EQ(gather_end_ns(plain_machine("2"), {0, 1}), 100 + 300);
  EXPECT_EQ(gather_end_ns(plain_machine("2"), {0, 2}), 2 * 300);
  std::string one_nic = plain_machine("2");
  one_nic.replace(one_nic.find("nics = { value = 2"), 18, "nics = { value = 1");
  EXPECT_EQ(gather_end_ns(one_nic, {0, 1, 2, 3}), 2 * 900);
  EXPECT_EQ(gather_end_ns(plain_machine("2"), {0, 2}, 1), 2 * 2 * 300);  // two share the NICs
}

// Each of two takes a quarter of the device from an op that computes beside them.
TEST(VirtualTime, TransfersAtOnceTakeTheirMultiprocessorsEach) {
  const Machine machine = parse_machine(plain_machine("8"), "plain");
  const Config config = plan_config("[parallel]\ndp = 2\n");
  VirtualTime time(machine, config, nullptr);
  run_cluster({.ranks = 2, .time = &time}, [&](RankEnvironment& environment) {
    Stream& compute = environment.make_stream("compute");
    std::vector<std::unique_ptr<Communicator>> groups;
    for (const std::string name : {"one", "other"}) {
      groups.push_back(environment.make_communicator(name, {0, 1}));
      all_gather({.communicator = *groups.back(),
                  .stream = environment.make_stream(name),
                  .send = fake_data(),
                  .recv = fake_data() + 4096,
                  .count = 500,
                  .dtype = DType::u8});
    }
    environment.shape_only()->charge({"linear", {64, 64, 64}, 2000, 1, 0}, compute);
    environment.host().wait(compute.record());
    EXPECT_EQ(environment.host().now_ns(), 2600);  // at half its rate for their 1200 ns
  });
}

// The slowest rank's counts decide, near and far at once.
TEST(VirtualTime, AnAllToAllTakesItsSlowestRanksTime) {
  const auto end_ns = [](const std::vector<int64_t>& sent_by_0) {
    const Machine machine = parse_machine(plain_machine("2"), "plain");
    const Config config = plan_config("[parallel]\ndp = 4\n");
    VirtualTime time(machine, config, nullptr);
    int64_t end = 0;
    run_cluster({.ranks = 4, .time = &time}, [&](RankEnvironment& environment) {
      const auto rank = static_cast<size_t>(environment.rank());
      std::vector<int64_t> sent(4, 0), received(4, 0);
      if (rank == 0) sent = sent_by_0;
      received[0] = sent_by_0[rank];
      const auto world = environment.make_communicator("world", {0, 1, 2, 3});
      environment.host().wait(all_to_all_v({.communicator = *world,
                                            .stream = environment.make_stream("comm"),
                                            .send = fake_data(),
                                            .recv = fake_data() + 4096,
                                            .send_counts = sent,
                                            .recv_counts = received,
                                            .dtype = DType::u8}));
      end = environment.host().now_ns();
    });
    return end;
  };
  EXPECT_EQ(end_ns({0, 700, 0, 0}), 100 + 700);
  EXPECT_EQ(end_ns({0, 700, 300, 0}), 100 + 700);
  EXPECT_EQ(end_ns({0, 700, 300, 200}), 2 * 500);
  EXPECT_EQ(end_ns({900, 0, 0, 0}), 100);  // what stays at home takes no link
}

}  // namespace
}  // namespace cambium::sim
