// Runs a cluster that is expected to fail.
#pragma once

#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "sim/cluster.h"

namespace cambium::sim {

struct RunError {
  ExitCode exit_code = ExitCode::done;
  std::string message;
  bool says(const std::string& text) const { return message.find(text) != std::string::npos; }
};

// The error that ended the run; exit code `done` when none did.
template <class Body>
RunError run_error(const ClusterOptions& options, Body&& body) {
  try {
    run_cluster(options, body);
  } catch (const Error& error) {
    return {error.exit_code(), error.what()};
  }
  return {};
}

// A rank's buffers and one stream with a communicator of all ranks.
struct RankBench {
  explicit RankBench(RankEnvironment& given)
      : environment(given), stream(given.make_stream("comm")) {
    for (int rank = 0; rank < given.ranks(); ++rank) members.push_back(rank);
    world = given.make_communicator("world", members);
  }
  Ticket sum(Communicator& communicator, Stream& on, int64_t count,
             std::source_location site = std::source_location::current()) {
    return all_reduce({.communicator = communicator,
                       .stream = on,
                       .send = send.data(),
                       .recv = recv.data(),
                       .count = count,
                       .site = site});
  }
  Ticket sum(int64_t count = 4, std::source_location site = std::source_location::current()) {
    return sum(*world, stream, count, site);
  }
  void wait(const Ticket& ticket, std::source_location site = std::source_location::current()) {
    environment.host().wait(ticket, site);
  }

  RankEnvironment& environment;
  Stream& stream;
  std::vector<int> members;
  std::unique_ptr<Communicator> world;
  std::vector<float> send = std::vector<float>(64, 1.0f);
  std::vector<float> recv = std::vector<float>(64);
};

}  // namespace cambium::sim
