#include "sim/cluster.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <map>
#include <new>
#include <utility>

#include "fmt/format.h"
#include "kernels/cuda_stream.h"
#include "sim/comm_faults.h"
#include "sim/deadlock.h"
#include "sim/order_hazards.h"
#include "sim/race_detector.h"
#include "sim/routing.h"
#include "sim/scheduler.h"
#include "sim/sim_communicator.h"
#include "sim/virtual_time.h"
#include "src/comm/call_check.h"

namespace cambium::sim {

namespace {

class SimEnvironment;

// All groups of a run by (name, members), in order of making.
class Groups {
 public:
  Groups(const ClusterOptions& options, Workers& workers, RaceDetector* races)
      : options_(options), workers_(workers), races_(races) {
    if (races != nullptr || options.matching != nullptr) {
      order_hazards_ = std::make_unique<OrderHazards>(options.ranks);
    }
    if (options.transfer_slots == 0) return;
    slots_.resize(static_cast<size_t>(options.ranks), DeviceSlots{options.transfer_slots, {}});
  }
  Group& nth(const std::string& name, const std::vector<int>& members, size_t number) {
    auto& made = groups_[{name, members}];
    while (made.size() <= number) {
      made.push_back(std::make_unique<Group>(name, members, options_, workers_, races_,
                                             order_hazards_.get(), slots_));
    }
    return *made[number];
  }
  int64_t launches_compared() const {
    return order_hazards_ == nullptr ? 0 : order_hazards_->compared();
  }
  std::vector<const Group*> all() const {
    std::vector<const Group*> groups;
    for (const auto& [key, made] : groups_) {
      for (const auto& group : made) groups.push_back(group.get());
    }
    return groups;
  }

 private:
  const ClusterOptions& options_;
  Workers& workers_;
  RaceDetector* races_;
  std::unique_ptr<OrderHazards> order_hazards_;
  std::vector<DeviceSlots> slots_;  // by rank; empty when unlimited
  std::map<std::pair<std::string, std::vector<int>>, std::vector<std::unique_ptr<Group>>> groups_;
};

// A rank's host code waits by giving its thread to other fibers.
class SimHost final : public Host {
 public:
  SimHost(Scheduler& scheduler, int rank, FaultInjector* injector, RaceDetector* races,
          VirtualRank* virtual_rank)
      : scheduler_(scheduler),
        rank_(rank),
        injector_(injector),
        races_(races),
        virtual_rank_(virtual_rank) {}
  void wait(const Event& event, std::source_location site) override {
    if (injector_ != nullptr) injector_->flush();
    if (races_ != nullptr && !races_->keeps_host_wait(rank_, event, site)) return;
    scheduler_.wait(rank_, event, site);
    if (std::uncaught_exceptions() > 0) return;
    event.synchronize_device();
    if (races_ != nullptr) races_->host_waited(rank_, event, site);
    if (virtual_rank_ != nullptr) virtual_rank_->host_waited(event);
  }
  void touches(const MemoryAccess& access, std::source_location site) override {
    if (races_ != nullptr) races_->host_touches(rank_, access, site);
  }
  void yield(const char*) override {
    if (injector_ != nullptr) injector_->flush();
    scheduler_.yield(rank_);
  }
  int64_t now_ns() const override {
    if (virtual_rank_ != nullptr) return virtual_rank_->host_now_ns();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

 private:
  Scheduler& scheduler_;
  int rank_;
  FaultInjector* injector_;
  RaceDetector* races_;        // null when races are not looked for
  VirtualRank* virtual_rank_;  // null when values are computed
};

// Ops do nothing; the counts of a dispatch come from its step's routing.
class MatchingRank final : public ShapeOnlyRun {
 public:
  MatchingRank(std::vector<RoutingModel>& routing, const RankEnvironment& environment)
      : routing_(routing), environment_(environment) {}
  void charge(const Cost&, Stream&) override {}
  DispatchCounts dispatch_counts(const WorkPlace& place) override {
    const auto steps_done = static_cast<size_t>(environment_.step() - 1);
    return routing_[steps_done % routing_.size()].dispatch_counts(environment_.rank(), place);
  }

 private:
  std::vector<RoutingModel>& routing_;
  const RankEnvironment& environment_;
};

class SimEnvironment final : public RankEnvironment {
 public:
  SimEnvironment(int rank, const ClusterOptions& options, Workers& workers, Scheduler& scheduler,
                 Groups& groups, RaceDetector* races)
      : rank_(rank),
        options_(options),
        workers_(workers),
        scheduler_(scheduler),
        groups_(groups),
        races_(races),
        injector_(make_injector(rank, options, scheduler)),
        virtual_rank_(options.time == nullptr
                          ? nullptr
                          : std::make_unique<VirtualRank>(*options.time, rank, place)),
        host_(scheduler, rank, injector_.get(), races, virtual_rank_.get()) {
    if (options.matching != nullptr) {
      matching_rank_ = std::make_unique<MatchingRank>(*options.matching, *this);
    }
  }

  int rank() const override { return rank_; }
  int ranks() const override { return options_.ranks; }
  Host& host() override { return host_; }
  Workers& workers() override { return workers_; }
  Poison poison() const override { return options_.poison; }

  Stream& make_stream(const std::string& name) override {
    streams_.push_back(std::make_unique<Stream>(fmt::format("rank {} {}", rank_, name),
                                                &scheduler_.ready_streams()));
    scheduler_.add_stream(*streams_.back(), rank_);
    if (races_ != nullptr) {
      races_->add_stream(*streams_.back(), rank_, place);
      streams_.back()->set_observer(races_);
    }
    if (virtual_rank_ != nullptr) virtual_rank_->add_stream(*streams_.back());
    if constexpr (kHasCuda) {
      if (options_.device == Device::cuda) {
        const bool in_turn = options_.schedule_seed != 0;
        const bool joins = options_.cuda_graphs && options_.ranks == 1 && !in_turn;
        native_streams_.push_back(std::make_unique<cuda::NativeStream>(
            *streams_.back(), in_turn ? LaunchOrder::in_turn : LaunchOrder::at_once,
            joins ? cuda::JoinLaunches::to_graphs : cuda::JoinLaunches::no));
      }
    }
    return *streams_.back();
  }

  std::unique_ptr<Communicator> make_communicator(const std::string& name,
                                                  const std::vector<int>& members) override {
    check_members(name, members, {rank_, ranks()});
    Group& group = groups_.nth(name, members, made_[{name, members}]++);
    const auto member =
        static_cast<int>(std::find(members.begin(), members.end(), rank_) - members.begin());
    group.join(member);
    const bool is_explored = options_.schedule_seed != 0 || options_.replay != nullptr;
    const SimCommunicator::Hooks hooks{
        .injector = injector_.get(),
        .explored = is_explored && options_.device == Device::cpu ? &scheduler_ : nullptr};
    return std::make_unique<SimCommunicator>(group, member, hooks);
  }

  void set_step(int64_t step) override {
    step_ = step;
    if (injector_ != nullptr) injector_->set_step(step);
  }
  int64_t step() const override { return step_; }
  ShapeOnlyRun* shape_only() override {
    if (matching_rank_ != nullptr) return matching_rank_.get();
    return virtual_rank_.get();
  }

  // After the rank's main returned: its buffers are gone, so nothing may be queued.
  void check_idle() const {
    if (races_ != nullptr) races_->check_tickets(rank_);
    for (const auto& stream : streams_) {
      if (stream->is_idle()) continue;
      fail(
          ExitCode::internal,
          "the rank's program returned with {} tasks queued on stream '{}' ({}); wait for its last "
          "event before returning",
          stream->enqueued() - stream->completed(), stream->name(), stream->blocked_on());
    }
  }
  void flush_faults() {
    if (injector_ != nullptr) injector_->flush();
  }
  const FaultInjector* injector() const { return injector_.get(); }

  Error annotate(std::exception_ptr error) const {
    const std::string where = fmt::format(
        "rank {}, step {}{}: ", rank_, step_,
        options_.schedule_seed == 0 ? ""
                                    : fmt::format(", schedule seed {}", options_.schedule_seed));
    try {
      std::rethrow_exception(std::move(error));
    } catch (const Error& cause) {
      return Error(cause.exit_code(), where + cause.what());
    } catch (const std::bad_alloc& cause) {
      return Error(ExitCode::out_of_memory, where + "out of memory: " + cause.what());
    } catch (const std::exception& cause) {
      return Error(ExitCode::internal, where + cause.what());
    } catch (...) {
      return Error(ExitCode::internal, where + "an exception of unknown type");
    }
  }

 private:
  static std::unique_ptr<FaultInjector> make_injector(int rank, const ClusterOptions& options,
                                                      Scheduler& scheduler) {
    std::vector<CommFault> faults;
    for (const CommFault& fault : options.faults) {
      if (fault.rank == rank) faults.push_back(fault);
    }
    return faults.empty() ? nullptr
                          : std::make_unique<FaultInjector>(std::move(faults), scheduler, rank);
  }

  int rank_;
  const ClusterOptions& options_;
  Workers& workers_;
  Scheduler& scheduler_;
  Groups& groups_;
  RaceDetector* races_;
  std::unique_ptr<FaultInjector> injector_;
  std::unique_ptr<VirtualRank> virtual_rank_;
  std::unique_ptr<MatchingRank> matching_rank_;
  SimHost host_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::unique_ptr<DeviceStream>> native_streams_;  // of streams_, on a GPU
  std::map<std::pair<std::string, std::vector<int>>, size_t> made_;
  int64_t step_ = 0;
};

// What a fiber runs.
struct RankProgram {
  cluster_detail::RankMain main = nullptr;
  void* body = nullptr;
  SimEnvironment* environment = nullptr;
  RankTask* task = nullptr;

  static void enter(void* argument) {
    auto& program = *static_cast<RankProgram*>(argument);
    try {
      program.main(program.body, *program.environment);
      program.environment->flush_faults();
      program.environment->check_idle();
    } catch (const Scheduler::Cancelled&) {
      // The run ended elsewhere; this stack is unwound.
    } catch (...) {
      program.task->error = std::current_exception();
    }
  }
};

using Environments = std::vector<std::unique_ptr<SimEnvironment>>;

Error failure(const Scheduler& scheduler, const Groups& groups, const Environments& environments,
              const ClusterOptions& options) {
  if (scheduler.failed_rank() >= 0) {
    const int rank = scheduler.failed_rank();
    return environments[static_cast<size_t>(rank)]->annotate(scheduler.task(rank).error);
  }
  std::vector<int64_t> steps;
  for (const auto& environment : environments) {
    steps.push_back(environment == nullptr ? 0 : environment->step());
  }
  for (int rank = 0; rank < scheduler.ranks(); ++rank) {
    const RankTask& stuck = scheduler.task(rank);
    if (stuck.state != RankState::stuck) continue;
    return Error(ExitCode::watchdog,
                 fmt::format("watchdog: rank {} is alive but stuck at {} in step {}, and no other "
                             "rank can go on without it; next: look at that rank, then train "
                             "--resume",
                             rank, describe_site(stuck.site), steps[static_cast<size_t>(rank)]));
  }
  if (const int rank = scheduler.overdue_rank(); rank >= 0) {
    return Error(
        ExitCode::watchdog,
        fmt::format("watchdog: rank {} waits at {} in step {} for longer than {:.6g} s of "
                    "virtual time: {}; next: look at that rank and its links, raise "
                    "run.watchdog_s if that is to be borne, then train --resume",
                    rank, describe_site(scheduler.task(rank).site),
                    steps[static_cast<size_t>(rank)],
                    1e-9 * static_cast<double>(options.watchdog_ns), scheduler.overdue_cause()));
  }
  std::string message = describe_deadlock(scheduler, groups.all(), steps);
  if (options.schedule_seed != 0) {
    message += fmt::format("\n  schedule seed {}", options.schedule_seed);
  }
  return Error(ExitCode::deadlock, message);
}

void check_faults_struck(const Environments& environments) {
  for (const auto& environment : environments) {
    if (environment == nullptr || environment->injector() == nullptr) continue;
    const CommFault* unstruck = environment->injector()->unstruck();
    if (unstruck == nullptr) continue;
    const CommFault& fault = *unstruck;
    fail(
        ExitCode::usage,
        "fault {} on rank {} at step {} found no call to strike{}: the layout makes none that fits",
        comm_fault_name(fault.kind), fault.rank, fault.step,
        fault.communicator.empty() ? "" : " in communicator '" + fault.communicator + "'");
  }
}

}  // namespace

std::string tape_text(const ScheduleTape& tape) {
  std::string text;
  for (const Deviation& deviation : tape) {
    text += fmt::format("{}{}:{}", text.empty() ? "" : ",", deviation.decision, deviation.choice);
  }
  return text.empty() ? "fifo" : text;
}

ScheduleTape parse_tape(const std::string& text) {
  ScheduleTape tape;
  if (text == "fifo") return tape;
  const char* at = text.c_str();
  const char* const end = at + text.size();
  while (true) {
    Deviation next;
    const auto [colon, first_error] = std::from_chars(at, end, next.decision);
    if (first_error != std::errc{} || colon == end || *colon != ':') break;
    const auto [comma, second_error] = std::from_chars(colon + 1, end, next.choice);
    const bool ascends = tape.empty() || tape.back().decision < next.decision;
    if (second_error != std::errc{} || !ascends) break;
    tape.push_back(next);
    if (comma == end) return tape;
    if (*comma != ',') break;
    at = comma + 1;
  }
  fail(
      ExitCode::usage,
      "'{}' is no schedule: write 'fifo', or decision:choice pairs as in '12:3,57:1', in ascending "
      "order",
      text);
}

bool is_simulated(const ClusterOptions& options, int rank) {
  return options.only_ranks.empty() ||
         std::ranges::find(options.only_ranks, rank) != options.only_ranks.end();
}

namespace cluster_detail {

ClusterReport run(const ClusterOptions& options, RankMain main, void* body) {
  CHECK_GE(options.ranks, 1);
  std::unique_ptr<Workers> own_workers;
  if (options.workers == nullptr) own_workers = std::make_unique<Workers>(options.worker_threads);
  Workers& workers = options.workers != nullptr ? *options.workers : *own_workers;
  Scheduler scheduler(options.ranks, workers, options.schedule_seed, options.time);
  if (options.schedule_seed != 0 || options.replay != nullptr) scheduler.explore(options);
  scheduler.set_watchdog(options.watchdog_ns);
  if (options.transfer_slots > 0) scheduler.run_streams_in_turn();
  std::unique_ptr<RaceDetector> races;
  if (options.races == Races::detected) {
    CHECK(options.device == Device::cpu);
    races = std::make_unique<RaceDetector>(options.ranks, options.left_out_wait);
    scheduler.run_streams_in_turn();
  }
  Groups groups(options, workers, races.get());
  Environments environments;
  std::vector<RankProgram> programs(static_cast<size_t>(options.ranks));
  for (int rank = 0; rank < options.ranks; ++rank) {
    if (!is_simulated(options, rank)) {
      environments.push_back(nullptr);
      scheduler.leave_out(rank);
      continue;
    }
    environments.push_back(
        std::make_unique<SimEnvironment>(rank, options, workers, scheduler, groups, races.get()));
    RankProgram& program = programs[static_cast<size_t>(rank)];
    program = {main, body, environments.back().get(), &scheduler.task(rank)};
    scheduler.task(rank).fiber =
        std::make_unique<Fiber>(options.stack_bytes, &RankProgram::enter, &program);
  }
  if (!scheduler.run()) {
    const Error error = failure(scheduler, groups, environments, options);
    scheduler.cancel();
    throw error;
  }
  if (options.matching == nullptr) check_faults_struck(environments);
  ClusterReport report = scheduler.report();
  if (races != nullptr) report.races = races->report();
  report.races.launches = groups.launches_compared();
  return report;
}

}  // namespace cluster_detail

}  // namespace cambium::sim
