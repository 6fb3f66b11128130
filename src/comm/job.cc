// The watch over a job: the thread that serves the connections and passes verdicts.
#include "src/comm/job.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "fmt/format.h"
#include "src/comm/call_check.h"
#include "src/comm/job_frames.h"

namespace cambium {

namespace {

constexpr int64_t kInquiryNs = 2 * kNsPerS;  // how long rank 0 waits for the ranks' views
constexpr int64_t kLongestTickNs = kNsPerS / 4;
constexpr int64_t kPauseNs =
    2 * kNsPerS;  // a thread that slept this long beyond its tick was stopped
constexpr int64_t kFarewellNs = kNsPerS / 2;

int64_t nanoseconds(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

}  // namespace

Job::Job(const JobOptions& options, Socket listener) : options_(options) {
  CHECK(options.rank >= 0 && options.rank < options.ranks);
  if (options.ranks > 1) {
    peers_ =
        options.rank == 0 ? meet_as_first(options, std::move(listener)) : meet_as_other(options);
  }
  CHECK(pipe(wake_pipe_) == 0);
  thread_ = std::thread([this] { run_thread(); });
}

// Rank 0 serves the others until they are done with it.
Job::~Job() {
  {
    std::unique_lock lock(mutex_);
    if (options_.rank == 0) {
      changed_.wait_for(lock, std::chrono::nanoseconds(nanoseconds(options_.watchdog_s)),
                        [&] { return has_failed() || departed_.size() == peers_.size(); });
    }
    if (!has_failed()) send_to_all(kGoodbye, "");
    stopping_ = true;
  }
  CHECK(write(wake_pipe_[1], "x", 1) == 1);
  thread_.join();
  for (auto& [rank, peer] : peers_) peer.finish_sending();
  const int64_t deadline_ns = steady_now_ns() + kFarewellNs;
  for (auto& [rank, peer] : peers_) peer.drain(deadline_ns);
  ::close(wake_pipe_[0]);
  ::close(wake_pipe_[1]);
}

void Job::publish(const std::string& name, const std::string& value) {
  const std::lock_guard lock(mutex_);
  if (options_.rank == 0) {
    store_value(name, value);
  } else if (!has_failed()) {
    peers_[0].send(kPublish, MessageWriter().text(name).text(value).body());
  }
}

std::string Job::await(const std::string& name) {
  std::unique_lock lock(mutex_);
  if (options_.rank != 0) peers_[0].send(kAsk, MessageWriter().text(name).body());
  changed_.wait(lock, [&] {
    return has_failed() || store_.contains(name) || (options_.rank != 0 && departed_.contains(0));
  });
  if (store_.contains(name)) return store_.at(name);
  if (has_failed()) throw Error(verdict_.code, verdict_.text);
  fail(ExitCode::peer_lost, "rank 0 ended before it had '{}'; next: its output", name);
}

void Job::check() const {
  if (!has_failed()) return;
  const std::lock_guard lock(mutex_);
  throw Error(verdict_.code, verdict_.text);
}

void Job::announce_failure(ExitCode code, const std::string& message) {
  const std::lock_guard lock(mutex_);
  if (has_failed()) return;
  if (options_.rank == 0) {
    send_to_all(kVerdict, verdict_body(failure_verdict(0, {code, message})));
  } else {
    peers_[0].send(kFailed, verdict_body({code, message}));
  }
  settle({code, message});
}

void Job::send_to_all(uint32_t kind, const std::string& body) {
  for (auto& [rank, peer] : peers_) peer.send(kind, body);
}

void Job::store_value(const std::string& name, const std::string& value) {
  store_[name] = value;
  for (const int rank : waiting_[name]) {
    peers_[rank].send(kValue, MessageWriter().text(name).text(value).body());
  }
  waiting_.erase(name);
  changed_.notify_all();
}

void Job::conclude(const Verdict& verdict) {
  if (has_failed()) return;
  send_to_all(options_.rank == 0 ? kVerdict : kFailed, verdict_body(verdict));
  settle(verdict);
}

void Job::settle(const Verdict& verdict) {
  if (has_failed()) return;
  verdict_ = verdict;
  verdict_ns_ = steady_now_ns();
  failed_.store(true, std::memory_order_release);
  changed_.notify_all();
}

void Job::peer_lost(int rank) {
  peers_[rank].close();
  if (departed_.contains(rank)) return;
  conclude({ExitCode::peer_lost,
            fmt::format("rank {} is lost: its process was killed or crashed, or its host is gone; "
                        "next: its output, then --resume",
                        rank)});
}

void Job::handle(int from, const Frame& frame) {
  MessageReader reader(frame.body);
  switch (frame.kind) {
    case kPublish: {
      const std::string name = reader.text();
      store_value(name, reader.text());
      return;
    }
    case kAsk: {
      const std::string name = reader.text();
      const auto found = store_.find(name);
      if (found == store_.end()) {
        waiting_[name].push_back(from);
      } else {
        peers_[from].send(kValue, MessageWriter().text(name).text(found->second).body());
      }
      return;
    }
    case kValue: {
      const std::string name = reader.text();
      store_[name] = reader.text();
      changed_.notify_all();
      return;
    }
    case kStalled:
      begin_inquiry();
      return;
    case kInquire:
      peers_[from].send(kReport, encode_report(log_.report()));
      return;
    case kReport: {
      RankReport report;
      if (inquiry_ && decode_report(frame.body, &report)) inquiry_->reports[from] = report;
      return;
    }
    case kVerdict: {
      const auto code = static_cast<ExitCode>(reader.number());
      settle({code, reader.text()});
      return;
    }
    case kFailed: {
      const auto code = static_cast<ExitCode>(reader.number());
      conclude(failure_verdict(from, {code, reader.text()}));
      return;
    }
    case kGoodbye:
      departed_.insert(from);
      changed_.notify_all();
      return;
  }
}

void Job::begin_inquiry() {
  if (inquiry_ || has_failed()) return;
  inquiry_.emplace();
  inquiry_->ranks = options_.ranks;
  inquiry_->limit_ms = nanoseconds(options_.watchdog_s) / 1'000'000;
  inquiry_->reports[0] = log_.report();
  inquiry_began_ns_ = steady_now_ns();
  send_to_all(kInquire, "");
}

void Job::finish_inquiry() {
  const Verdict verdict = diagnose(*inquiry_);
  inquiry_.reset();
  if (verdict.code != ExitCode::done) conclude(verdict);
}

void Job::watch() {
  const int64_t now_ns = steady_now_ns();
  const std::string failure = log_.transport_failure();
  if (!failure.empty()) {
    conclude({ExitCode::peer_lost, fmt::format("{}; next: --resume", failure)});
    return;
  }
  if (inquiry_ && (std::ssize(inquiry_->reports) == options_.ranks ||
                   now_ns - inquiry_began_ns_ > kInquiryNs)) {
    finish_inquiry();
  }
  if (log_.longest_running_ns() < nanoseconds(options_.watchdog_s)) {
    stalled_since_ns_ = 0;
    return;
  }
  if (options_.rank == 0) {
    begin_inquiry();
    return;
  }
  if (stalled_since_ns_ == 0) {
    stalled_since_ns_ = now_ns;
    peers_[0].send(kStalled, "");
  } else if (now_ns - stalled_since_ns_ > 2 * kInquiryNs) {
    // Rank 0 is silent: this rank's own view is all there is.
    StallInquiry own;
    own.ranks = options_.ranks;
    own.limit_ms = nanoseconds(options_.watchdog_s) / 1'000'000;
    own.reports[options_.rank] = log_.report();
    own.asked = ViewsAsked::of_this_rank;
    conclude(diagnose(own));
  }
}

void Job::end_process_when_due() const {
  if (steady_now_ns() - verdict_ns_ < nanoseconds(options_.exit_grace_s)) return;
  fmt::print(stderr, "rank {}: {}\n", options_.rank, verdict_.text);
  std::fflush(nullptr);
  _exit(static_cast<int>(verdict_.code));
}

int64_t Job::tick_ns() const {
  return std::min(kLongestTickNs, nanoseconds(options_.watchdog_s / 8));
}

void Job::serve(const std::vector<int>& ranks, const std::vector<bool>& readable) {
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (!readable[i]) continue;
    Connection& peer = peers_[ranks[i]];
    const bool open = peer.receive();
    Frame frame;
    while (peer.next(&frame)) handle(ranks[i], frame);
    if (!open) peer_lost(ranks[i]);
  }
}

void Job::run_thread() {
  int64_t last_ns = steady_now_ns();
  while (!stopping_) {
    std::vector<int> ranks, descriptors;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& [rank, peer] : peers_) {
        if (!peer.is_open()) continue;
        ranks.push_back(rank);
        descriptors.push_back(peer.descriptor());
      }
    }
    descriptors.push_back(wake_pipe_[0]);
    const std::vector<bool> readable = wait_readable(descriptors, steady_now_ns() + tick_ns());
    const std::lock_guard lock(mutex_);
    const int64_t now_ns = steady_now_ns();
    if (now_ns - last_ns > tick_ns() + kPauseNs) log_.postpone(now_ns - last_ns);
    last_ns = now_ns;
    serve(ranks, readable);
    if (!has_failed()) {
      watch();
    } else {
      end_process_when_due();
    }
  }
}

}  // namespace cambium
