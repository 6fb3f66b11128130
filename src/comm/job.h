// One process of a job of several: rendezvous, a small store, and the watch over its peers.
//
// Rank 0 listens; every other rank keeps one connection to it for as long as the job runs. A thread
// of each process serves it and watches:
//
//   a peer that ends without a word, or whose host is gone       exit 20, the rank named
//   a peer that fails                                            exit 20, its error quoted
//   a transport that reports a failure                           exit 20
//   a collective that runs longer than run.watchdog_s            exit 21: the first missing one,
//   who
//                                                                posted it and who did not; exit 22
//                                                                when two ranks' calls differ
//
// The verdict reaches host code at its next `check()`. Host code that cannot be reached (it sits in
// a library call) is given `exit_grace_s`; then the watch thread prints the verdict and ends the
// process with its code.
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "src/comm/collective_log.h"
#include "src/comm/stall_report.h"
#include "src/comm/tcp.h"

namespace cambium {

struct JobOptions {
  int rank = 0;
  int ranks = 1;
  Endpoint endpoint;             // where rank 0 listens
  std::string token;             // the same on every rank of a run, and on no other run's
  uint64_t library_version = 0;  // of the transport; the same on every rank
  double arrival_limit_s = 60;   // how long ranks wait for each other at the start
  double watchdog_s = 300;
  double exit_grace_s = 10;
};

class Job {
 public:
  // Returns when every rank has come. Exit 20 names those that have not; exit 2: the port is taken,
  // belongs to another run, or the ranks' configurations or libraries differ. `listener`: rank 0's,
  // when it is made already.
  explicit Job(const JobOptions& options, Socket listener = Socket());
  // Says goodbye, unless the job has failed; rank 0 once the others have.
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  int rank() const { return options_.rank; }
  int ranks() const { return options_.ranks; }
  const JobOptions& options() const { return options_; }
  CollectiveLog& log() { return log_; }

  // Values that one rank publishes and others wait for, under names that are used once.
  void publish(const std::string& name, const std::string& value);
  std::string await(const std::string& name);

  // Throws the verdict when there is one.
  void check() const;
  bool has_failed() const { return failed_.load(std::memory_order_acquire); }
  // This rank ends with an error of its own: the others stop.
  void announce_failure(ExitCode code, const std::string& message);

 private:
  // All below run under `mutex_`.
  void serve(const std::vector<int>& ranks, const std::vector<bool>& readable);
  void handle(int from, const Frame& frame);
  void send_to_all(uint32_t kind, const std::string& body);
  void store_value(const std::string& name, const std::string& value);
  void peer_lost(int rank);
  void conclude(const Verdict& verdict);  // tells the others, directly or through rank 0
  void settle(const Verdict& verdict);    // here alone
  void watch();
  void begin_inquiry();
  void finish_inquiry();
  void end_process_when_due() const;
  int64_t tick_ns() const;
  void run_thread();

  JobOptions options_;
  CollectiveLog log_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int, Connection> peers_;  // rank 0: all others; others: rank 0
  std::set<int> departed_;           // peers that said goodbye
  std::map<std::string, std::string> store_;
  std::map<std::string, std::vector<int>> waiting_;  // rank 0: who asked for what is not there yet
  std::optional<StallInquiry> inquiry_;              // rank 0
  int64_t inquiry_began_ns_ = 0;
  int64_t stalled_since_ns_ = 0;  // other ranks: when they asked rank 0
  Verdict verdict_;
  int64_t verdict_ns_ = 0;
  std::atomic<bool> failed_{false};
  std::atomic<bool> stopping_{false};
  int wake_pipe_[2] = {-1, -1};
  std::thread thread_;
};

}  // namespace cambium
