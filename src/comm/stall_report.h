// What each rank of a job has posted, and the verdict on a job that does not move.
//
// A communicator between processes cannot see what its peers have posted. When a collective makes
// no progress, every rank describes its own view (RankReport), rank 0 lays the views side by side,
// and `diagnose` says which collective is the first missing one, who posted it and who did not. It
// is a pure function of the views.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/base/error.h"

namespace cambium {

// Of a call that its rank has posted: its stream has not reached it, it waits or moves data, or it
// is complete.
enum class CallState : uint8_t { queued, running, done };

// One side of a message: the number that it has among those between two ranks, from 1.
struct AwaitedMessage {
  int peer = 0;  // rank of the job
  uint64_t number = 0;
  enum class Side : uint8_t { peer_sends, peer_receives } side = Side::peer_sends;
};

// An outstanding call. Collectives are numbered from 1 in their communicator; 0 is the making of
// the communicator itself. An exchange has the messages that it waits for instead of a number.
struct CallReport {
  uint64_t number = 0;
  std::string text;  // "all_reduce sum f32 count 5"
  std::string site;  // "src/train/train_step.cc:88"
  CallState state = CallState::queued;
  int64_t running_ms = 0;
  std::vector<AwaitedMessage> messages;
};

// Messages that this rank has posted to and from one peer.
struct ChannelCounts {
  uint64_t sent = 0;
  uint64_t received = 0;
};

struct GroupReport {
  std::string name;
  std::vector<int> members;
  uint64_t posted = 0;            // collectives
  std::string last;               // the last one posted, with its site
  std::vector<CallReport> calls;  // outstanding, oldest first
  std::map<int, ChannelCounts> channels;
};

struct RankReport {
  int64_t step = 0;
  std::vector<GroupReport> groups;
};

std::string encode_report(const RankReport& report);
// False when `body` is not a report.
bool decode_report(const std::string& body, RankReport* report);

// What ends a job: an exit code and the text that every rank shows.
struct Verdict {
  ExitCode code = ExitCode::done;
  std::string text;
};

// Whether every rank was asked for its view, or rank 0, which asks them, is silent itself.
enum class ViewsAsked { of_all, of_this_rank };

struct StallInquiry {
  ViewsAsked asked = ViewsAsked::of_all;
  std::map<int, RankReport> reports;  // by rank; a stopped rank has none
  int ranks = 1;
  int64_t limit_ms = 0;  // run.watchdog_s
};

// Exit 22 when two ranks' calls of one number differ, else 21; code `done` when no rank has a call
// that ran for longer than the limit.
Verdict diagnose(const StallInquiry& inquiry);

}  // namespace cambium
