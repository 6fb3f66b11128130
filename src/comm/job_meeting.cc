// How the processes of a job find each other.
#include <algorithm>

#include "fmt/format.h"
#include "src/base/check.h"
#include "src/comm/call_check.h"
#include "src/comm/job_frames.h"

namespace cambium {

namespace {

constexpr int64_t kAnswerSlackNs = 5 * kNsPerS;  // rank 0 decides at its own deadline
constexpr int64_t kTickNs = kNsPerS / 10;

int64_t deadline_of(const JobOptions& options) {
  return steady_now_ns() + static_cast<int64_t>(options.arrival_limit_s * 1e9);
}

std::string hello_body(const JobOptions& options) {
  return MessageWriter()
      .text(options.token)
      .number(static_cast<uint64_t>(options.rank))
      .number(static_cast<uint64_t>(options.ranks))
      .number(options.library_version)
      .body();
}

// Who says hello; -1 with the reason of the refusal.
int admit(const JobOptions& options, const std::map<int, Connection>& present,
          const std::string& body, std::string* reason) {
  MessageReader reader(body);
  const std::string token = reader.text();
  const auto rank = static_cast<int64_t>(reader.number());
  const auto ranks = static_cast<int64_t>(reader.number());
  const uint64_t library_version = reader.number();
  if (!reader.good() || token != options.token) {
    *reason = fmt::format(
        "rank 0 at {} belongs to another run, or has another configuration; next: a MASTER_PORT of "
        "its own for each run, and the same configuration on every rank",
        options.endpoint.text());
  } else if (ranks != options.ranks || rank < 1 || rank >= ranks) {
    *reason =
        fmt::format("rank {} of {} comes to a job of {} ranks; next: the launcher's variables",
                    rank, ranks, options.ranks);
  } else if (library_version != options.library_version) {
    *reason =
        fmt::format("rank {} has NCCL {}, rank 0 has NCCL {}; next: the same NCCL on every rank",
                    rank, library_version, options.library_version);
  } else if (present.contains(static_cast<int>(rank))) {
    *reason = fmt::format("two processes say that they are rank {}; next: the launcher's variables",
                          rank);
  } else {
    return static_cast<int>(rank);
  }
  return -1;
}

// Reads what newcomers say, and moves those who are admitted to `present`.
void greet(const JobOptions& options, std::vector<Connection>& newcomers,
           std::map<int, Connection>& present) {
  for (Connection& newcomer : newcomers) {
    const bool open = newcomer.receive();
    Frame frame;
    if (!newcomer.next(&frame)) {
      if (!open) newcomer.close();
      continue;
    }
    std::string reason;
    const int rank = frame.kind == kHello ? admit(options, present, frame.body, &reason) : -1;
    if (rank > 0) {
      present[rank] = std::move(newcomer);
    } else {
      newcomer.send(kRefuse, verdict_body({ExitCode::usage, reason}));
      newcomer.finish_sending();
      newcomer.drain(steady_now_ns() + kTickNs);
    }
  }
  std::erase_if(newcomers, [](const Connection& each) { return !each.is_open(); });
}

std::vector<int> missing_ranks(const JobOptions& options,
                               const std::map<int, Connection>& present) {
  std::vector<int> missing;
  for (int rank = 1; rank < options.ranks; ++rank) {
    if (!present.contains(rank)) missing.push_back(rank);
  }
  return missing;
}

}  // namespace

std::string verdict_body(const Verdict& verdict) {
  return MessageWriter().number(static_cast<uint64_t>(verdict.code)).text(verdict.text).body();
}

Verdict failure_verdict(int rank, const Verdict& failure) {
  return {ExitCode::peer_lost, fmt::format("rank {} ended with exit code {}: {}", rank,
                                           static_cast<int>(failure.code), failure.text)};
}

std::map<int, Connection> meet_as_first(const JobOptions& options, Socket listener) {
  const int64_t deadline_ns = deadline_of(options);
  if (!listener.is_open()) listener = listen_on(options.endpoint.port);
  std::vector<Connection> newcomers;
  std::map<int, Connection> present;
  while (std::ssize(present) < options.ranks - 1) {
    if (steady_now_ns() > deadline_ns) {
      const std::string text = fmt::format(
          "ranks {} did not come to {} within {:.0f} s; next: their output, and whether they can "
          "reach that address",
          describe_ranks(missing_ranks(options, present)), options.endpoint.text(),
          options.arrival_limit_s);
      const Verdict verdict{ExitCode::peer_lost, text};
      for (auto& [rank, peer] : present) peer.send(kRefuse, verdict_body(verdict));
      throw Error(verdict.code, verdict.text);
    }
    std::vector<int> descriptors = {listener.descriptor()};
    for (const Connection& each : newcomers) descriptors.push_back(each.descriptor());
    const int64_t tick_ns = steady_now_ns() + kTickNs;
    if (wait_readable(descriptors, std::min(tick_ns, deadline_ns))[0]) {
      newcomers.emplace_back(accept_from(listener));
    }
    greet(options, newcomers, present);
  }
  for (auto& [rank, peer] : present) peer.send(kWelcome, "");
  return present;
}

std::map<int, Connection> meet_as_other(const JobOptions& options) {
  const int64_t deadline_ns = deadline_of(options);
  std::string reason = "no answer";
  Socket socket = connect_to(options.endpoint, deadline_ns, &reason);
  if (!socket.is_open()) {
    fail(ExitCode::peer_lost,
         "rank 0 cannot be reached at {} within {:.0f} s: {}; next: rank 0's output, MASTER_ADDR "
         "and "
         "MASTER_PORT",
         options.endpoint.text(), options.arrival_limit_s, reason);
  }
  std::map<int, Connection> peers;
  Connection& first = peers[0] = Connection(std::move(socket));
  first.send(kHello, hello_body(options));
  Frame frame;
  const bool answered = first.wait(&frame, deadline_of(options) + kAnswerSlackNs);
  if (answered && frame.kind == kWelcome) return peers;
  if (answered && frame.kind == kRefuse) {
    MessageReader reader(frame.body);
    const auto code = static_cast<ExitCode>(reader.number());
    throw Error(code, reader.text());
  }
  fail(ExitCode::peer_lost,
       "what listens at {} is not rank 0 of this run, or it ended; next: rank 0's output, and a "
       "MASTER_PORT that nothing else uses",
       options.endpoint.text());
}

}  // namespace cambium
