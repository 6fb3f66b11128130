#include "src/comm/stall_report.h"

#include <algorithm>

#include "fmt/format.h"
#include "src/comm/call_check.h"
#include "src/comm/tcp.h"

namespace cambium {

namespace {

constexpr uint64_t kMostListed = 1 << 16;  // entries of any list of a message

uint64_t list_length(MessageReader& reader) {
  const uint64_t count = reader.number();
  return reader.good() ? std::min(count, kMostListed) : 0;
}

// A call that has run for too long, and where it stands.
struct Candidate {
  int rank = 0;
  const GroupReport* group = nullptr;
  const CallReport* call = nullptr;
  std::vector<int> posted, missing, silent;
};

const GroupReport* same_group(const RankReport& report, const GroupReport& group) {
  for (const GroupReport& each : report.groups) {
    if (each.name == group.name && each.members == group.members) return &each;
  }
  return nullptr;
}

const CallReport* call_number(const GroupReport& group, uint64_t number) {
  for (const CallReport& call : group.calls) {
    if (call.messages.empty() && call.number == number) return &call;
  }
  return nullptr;
}

// Whether the member of `peer`'s view has posted what `call` of rank `rank` waits for.
bool has_posted(const GroupReport* peer_view, const CallReport& call, int rank, int peer) {
  if (peer_view == nullptr) return false;
  if (call.messages.empty()) return peer_view->posted >= call.number;
  const auto found = peer_view->channels.find(rank);
  const ChannelCounts counts = found == peer_view->channels.end() ? ChannelCounts{} : found->second;
  for (const AwaitedMessage& message : call.messages) {
    if (message.peer != peer) continue;
    const bool sends = message.side == AwaitedMessage::Side::peer_sends;
    if ((sends ? counts.sent : counts.received) < message.number) return false;
  }
  return true;
}

Candidate examine(const StallInquiry& inquiry, int rank, const GroupReport& group,
                  const CallReport& call) {
  Candidate candidate{rank, &group, &call, {}, {}, {}};
  std::vector<int> peers = group.members;
  if (!call.messages.empty()) {
    peers = {rank};
    for (const AwaitedMessage& message : call.messages) peers.push_back(message.peer);
    std::sort(peers.begin(), peers.end());
    peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
  }
  for (const int peer : peers) {
    const auto found = inquiry.reports.find(peer);
    if (found == inquiry.reports.end()) {
      candidate.silent.push_back(peer);
    } else if (peer == rank || has_posted(same_group(found->second, group), call, rank, peer)) {
      candidate.posted.push_back(peer);
    } else {
      candidate.missing.push_back(peer);
    }
  }
  return candidate;
}

// The better explanation of a stall first: a rank that says nothing, then one that lags behind;
// among equals, what has waited longest, then the lower rank.
bool explains_more(const Candidate& a, const Candidate& b) {
  const auto rate = [](const Candidate& candidate) {
    return candidate.silent.empty() ? (candidate.missing.empty() ? 0 : 1) : 2;
  };
  if (rate(a) != rate(b)) return rate(a) > rate(b);
  if (a.call->running_ms != b.call->running_ms) return a.call->running_ms > b.call->running_ms;
  return a.rank < b.rank;
}

std::string describe(const GroupReport& group, const CallReport& call) {
  const std::string place =
      fmt::format("communicator '{}' {}", group.name, describe_ranks(group.members));
  if (call.messages.empty() && call.number == 0) {
    return fmt::format("the making of {}", place);
  }
  const std::string number =
      call.messages.empty() ? fmt::format("call #{}: ", call.number) : std::string();
  return fmt::format("{}, {}{} ({})", place, number, call.text, call.site);
}

std::string standing(const StallInquiry& inquiry, const Candidate& candidate, int rank) {
  const GroupReport* view = same_group(inquiry.reports.at(rank), *candidate.group);
  if (view == nullptr) return fmt::format("rank {} has not made it", rank);
  if (view->last.empty()) return fmt::format("rank {} has posted nothing there", rank);
  return fmt::format("rank {}'s last there is #{} {}", rank, view->posted, view->last);
}

std::string explain(const StallInquiry& inquiry, const Candidate& candidate) {
  std::string text =
      fmt::format("first missing: {}; posted by {}", describe(*candidate.group, *candidate.call),
                  describe_ranks(candidate.posted));
  if (!candidate.missing.empty()) {
    text += fmt::format(", not posted by {}: ", describe_ranks(candidate.missing));
    text += standing(inquiry, candidate, candidate.missing.front());
  }
  if (!candidate.silent.empty()) {
    const std::string silent = describe_ranks(candidate.silent);
    text += inquiry.asked == ViewsAsked::of_all
                ? fmt::format(", no answer from {}: stopped, or its host is overloaded", silent)
                : fmt::format(
                      ", unknown of {}: rank 0, which asks the ranks, is stopped, or its "
                      "host is overloaded",
                      silent);
  }
  if (candidate.missing.empty() && candidate.silent.empty()) {
    text += ": every member posted it and the transfer does not move";
    for (const int rank : candidate.posted) {
      const GroupReport* view = same_group(inquiry.reports.at(rank), *candidate.group);
      const CallReport* call =
          view == nullptr ? nullptr : call_number(*view, candidate.call->number);
      if (call == nullptr || call->state != CallState::queued) continue;
      text += fmt::format("; the stream of rank {} has not reached it", rank);
    }
  }
  return text;
}

// The first number at which two members' calls differ, or an empty text.
std::string mismatch(const StallInquiry& inquiry, const Candidate& candidate) {
  if (!candidate.call->messages.empty()) return "";
  const CallReport& own = *candidate.call;
  for (const auto& [rank, report] : inquiry.reports) {
    const GroupReport* view = same_group(report, *candidate.group);
    const CallReport* call = view == nullptr ? nullptr : call_number(*view, own.number);
    if (call == nullptr || call->text == own.text) continue;
    return fmt::format(
        "collective mismatch in communicator '{}' {}, call #{}: rank {} posted {} ({}), rank {} "
        "posted {} ({}). All ranks of a communicator must make the same calls in the same order",
        candidate.group->name, describe_ranks(candidate.group->members), own.number, candidate.rank,
        own.text, own.site, rank, call->text, call->site);
  }
  return "";
}

}  // namespace

std::string encode_report(const RankReport& report) {
  MessageWriter writer;
  writer.number(static_cast<uint64_t>(report.step)).number(report.groups.size());
  for (const GroupReport& group : report.groups) {
    writer.text(group.name).number(group.members.size());
    for (const int member : group.members) writer.number(static_cast<uint64_t>(member));
    writer.number(group.posted).text(group.last).number(group.calls.size());
    for (const CallReport& call : group.calls) {
      writer.number(call.number).text(call.text).text(call.site);
      writer.number(static_cast<uint64_t>(call.state));
      writer.number(static_cast<uint64_t>(call.running_ms)).number(call.messages.size());
      for (const AwaitedMessage& message : call.messages) {
        writer.number(static_cast<uint64_t>(message.peer)).number(message.number);
        writer.number(static_cast<uint64_t>(message.side));
      }
    }
    writer.number(group.channels.size());
    for (const auto& [peer, counts] : group.channels) {
      writer.number(static_cast<uint64_t>(peer)).number(counts.sent).number(counts.received);
    }
  }
  return writer.body();
}

bool decode_report(const std::string& body, RankReport* report) {
  MessageReader reader(body);
  report->step = static_cast<int64_t>(reader.number());
  for (uint64_t groups = list_length(reader); groups > 0 && reader.good(); --groups) {
    GroupReport group;
    group.name = reader.text();
    for (uint64_t left = list_length(reader); left > 0 && reader.good(); --left) {
      group.members.push_back(static_cast<int>(reader.number()));
    }
    group.posted = reader.number();
    group.last = reader.text();
    for (uint64_t calls = list_length(reader); calls > 0 && reader.good(); --calls) {
      CallReport call;
      call.number = reader.number();
      call.text = reader.text();
      call.site = reader.text();
      call.state = reader.number() == 0 ? CallState::queued : CallState::running;
      call.running_ms = static_cast<int64_t>(reader.number());
      for (uint64_t left = list_length(reader); left > 0 && reader.good(); --left) {
        AwaitedMessage message;
        message.peer = static_cast<int>(reader.number());
        message.number = reader.number();
        if (reader.number() != 0) message.side = AwaitedMessage::Side::peer_receives;
        call.messages.push_back(message);
      }
      group.calls.push_back(std::move(call));
    }
    for (uint64_t left = list_length(reader); left > 0 && reader.good(); --left) {
      const int peer = static_cast<int>(reader.number());
      group.channels[peer].sent = reader.number();
      group.channels[peer].received = reader.number();
    }
    report->groups.push_back(std::move(group));
  }
  return reader.good();
}

Verdict diagnose(const StallInquiry& inquiry) {
  std::vector<Candidate> candidates;
  for (const auto& [rank, report] : inquiry.reports) {
    for (const GroupReport& group : report.groups) {
      for (const CallReport& call : group.calls) {
        if (call.state != CallState::running || call.running_ms < inquiry.limit_ms) continue;
        candidates.push_back(examine(inquiry, rank, group, call));
      }
    }
  }
  if (candidates.empty()) return {};
  for (const Candidate& candidate : candidates) {
    const std::string text = mismatch(inquiry, candidate);
    if (!text.empty()) return {ExitCode::collective_mismatch, text};
  }
  std::sort(candidates.begin(), candidates.end(), explains_more);
  const Candidate& first = candidates.front();
  return {ExitCode::watchdog,
          fmt::format("watchdog: no progress for {:.1f} s (run.watchdog_s = {}) in step {}: {}",
                      1e-3 * static_cast<double>(first.call->running_ms), inquiry.limit_ms / 1000,
                      inquiry.reports.at(first.rank).step, explain(inquiry, first))};
}

}  // namespace cambium
