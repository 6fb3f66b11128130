#include "src/comm/collective_log.h"

#include <algorithm>

#include "fmt/format.h"
#include "src/comm/call_check.h"
#include "src/comm/tcp.h"

namespace cambium {

namespace {

constexpr size_t kMostReported = 8;  // outstanding calls of one communicator

}  // namespace

int CollectiveLog::add_group(LogGroup group) {
  const std::lock_guard lock(mutex_);
  groups_.push_back(std::make_unique<Group>());
  Group& made = *groups_.back();
  made.of = std::move(group);
  made.outstanding.emplace_back();
  made.outstanding.back().running_since_ns = steady_now_ns();
  return static_cast<int>(groups_.size()) - 1;
}

void CollectiveLog::joined(int group, const TransportProbe& transport) {
  const std::lock_guard lock(mutex_);
  Group& made = *groups_[static_cast<size_t>(group)];
  made.transport = &transport;
  made.outstanding.clear();
}

void CollectiveLog::remove_group(int group) {
  const std::lock_guard lock(mutex_);
  Group& gone = *groups_[static_cast<size_t>(group)];
  gone.transport = nullptr;
  gone.removed = true;
  gone.outstanding.clear();
}

void CollectiveLog::number_messages(Group& group, const CollectiveCall& call, Posted* posted) {
  for (const Message& message : call.sends) {
    const int peer = group.of.members[static_cast<size_t>(message.peer)];
    posted->messages.push_back(
        {peer, ++group.channels[peer].sent, AwaitedMessage::Side::peer_receives});
  }
  for (const Message& message : call.recvs) {
    const int peer = group.of.members[static_cast<size_t>(message.peer)];
    posted->messages.push_back(
        {peer, ++group.channels[peer].received, AwaitedMessage::Side::peer_sends});
  }
}

void CollectiveLog::post(int group, const CollectiveCall& call,
                         std::shared_ptr<const CallProbe> probe) {
  const std::lock_guard lock(mutex_);
  Group& of = *groups_[static_cast<size_t>(group)];
  auto& outstanding = of.outstanding;
  while (!outstanding.empty() && state_of(outstanding.front()) == CallState::done) {
    outstanding.pop_front();
  }
  Posted posted;
  posted.call = call;
  posted.probe = std::move(probe);
  if (call.kind == CollectiveKind::exchange) {
    number_messages(of, call, &posted);
  } else {
    posted.number = ++of.posted;
    of.last = call;
  }
  outstanding.push_back(std::move(posted));
}

void CollectiveLog::set_step(int64_t step) {
  const std::lock_guard lock(mutex_);
  step_ = step;
}

CallState CollectiveLog::state_of(const Posted& posted) {
  return posted.probe == nullptr ? CallState::running : posted.probe->state();
}

int64_t CollectiveLog::longest_running_ns() {
  const std::lock_guard lock(mutex_);
  const int64_t now_ns = steady_now_ns();
  int64_t longest = 0;
  for (const auto& group : groups_) {
    std::erase_if(group->outstanding, [&](Posted& posted) {
      const CallState state = state_of(posted);
      if (state == CallState::running && posted.running_since_ns == 0) {
        posted.running_since_ns = now_ns;
      }
      if (state == CallState::running) {
        longest = std::max(longest, now_ns - posted.running_since_ns);
      }
      return state == CallState::done;
    });
  }
  return longest;
}

void CollectiveLog::postpone(int64_t pause_ns) {
  const std::lock_guard lock(mutex_);
  for (const auto& group : groups_) {
    for (Posted& posted : group->outstanding) {
      if (posted.running_since_ns != 0) posted.running_since_ns += pause_ns;
    }
  }
}

std::string CollectiveLog::transport_failure() const {
  const std::lock_guard lock(mutex_);
  for (const auto& group : groups_) {
    if (group->transport == nullptr) continue;
    const std::string failure = group->transport->failure();
    if (!failure.empty()) {
      return fmt::format("communicator '{}' {}: {}", group->of.name,
                         describe_ranks(group->of.members), failure);
    }
  }
  return "";
}

RankReport CollectiveLog::report() const {
  const std::lock_guard lock(mutex_);
  const int64_t now_ns = steady_now_ns();
  RankReport report;
  report.step = step_;
  for (const auto& group : groups_) {
    if (group->removed) continue;
    GroupReport view;
    view.name = group->of.name;
    view.members = group->of.members;
    view.posted = group->posted;
    if (group->posted > 0) {
      view.last =
          fmt::format("{} ({})", describe_call(group->last), describe_site(group->last.site));
    }
    for (const Posted& posted : group->outstanding) {
      const CallState state = state_of(posted);
      if (state == CallState::done) continue;
      CallReport call;
      call.number = posted.number;
      if (posted.probe != nullptr) {
        call.text = describe_call(posted.call);
        call.site = describe_site(posted.call.site);
      }
      call.state = state;
      if (posted.running_since_ns != 0) {
        call.running_ms = (now_ns - posted.running_since_ns) / 1'000'000;
      }
      call.messages = posted.messages;
      view.calls.push_back(std::move(call));
      if (view.calls.size() == kMostReported) break;
    }
    view.channels = group->channels;
    report.groups.push_back(std::move(view));
  }
  return report;
}

}  // namespace cambium
