// Virtual time of a shape-only run: integer nanoseconds, a host timeline per rank, a FIFO per
// stream, and a network whose transfers share what they meet on.
//
// The trainer's host code charges ops and posts transfers as ever. An op starts when its stream is
// free and the host has issued it; a transfer when all its ranks have reached it. While a rank's
// transfer runs or waits for its peers it holds multiprocessors, so that the rank's ops run slower;
// transfers that share a rank's link share it max-min. What such sharing can still change is an
// event: when nothing can go on, the scheduler asks for the earliest one (`advance`), so that
// everything before it is known. All else is known at once, and costs no event.
#pragma once

#include <map>
#include <memory>
#include <queue>
#include <unordered_map>

#include "sim/machine.h"
#include "sim/routing.h"
#include "sim/sim_communicator.h"
#include "src/base/trace.h"
#include "src/comm/rank_environment.h"

namespace cambium::sim {

class VirtualTime;
class VirtualRank;

// What one rank did since `restart`.
struct RankTimes {
  int64_t step_ns = 0;
  int64_t busy_ns = 0;                   // compute stream
  int64_t exposed_ns = 0;                // compute waits for a transfer that moves
  int64_t peers_ns = 0;                  // ... for a transfer whose other ranks are not there yet
  int64_t pipeline_ns = 0;               // ... for a message between pipeline ranks
  int64_t host_ns = 0;                   // ... for the host
  int64_t transfer_ns = 0;               // transfers moving, overlapped or not
  std::map<std::string, int64_t> op_ns;  // by op, overlapped or not
  int64_t extrapolated_ns = 0;
};

class VirtualStream final : public StreamClock {
 public:
  VirtualStream(VirtualRank& rank, Stream& stream, int lane)
      : rank_(rank), stream_(stream), lane_(lane) {}
  bool run(const TimedOp& op) override;
  void wait_for(const StreamClock& other, uint64_t sequence) override;
  Stream& stream() const { return stream_; }
  VirtualRank& rank() const { return rank_; }
  int lane() const { return lane_; }
  // The transfer at the head has moved from `start` to `end`.
  void complete_transfer(int64_t start, int64_t end);
  // Ops take another share of the device from `now` on.
  void settle(int64_t now);
  void op_ended(int64_t now, uint32_t version);

 private:
  void finish_op(const TimedOp& op, int64_t start);
  void schedule_end();

  VirtualRank& rank_;
  Stream& stream_;
  int lane_ = 0;
  // The op under way, whose end may still change.
  bool in_progress_ = false, ended_ = false;
  TimedOp op_;
  int64_t start_ns_ = 0, settled_ns_ = 0;
  double remaining_ns_ = 0, rate_ = 1;
  uint32_t version_ = 0;
  // Of transfers: task number, and when it began to move.
  std::vector<std::pair<uint64_t, int64_t>> moved_from_;
};

// One rank: its host's time, its streams, and what holds its device.
class VirtualRank final : public ShapeOnlyRun {
 public:
  VirtualRank(VirtualTime& time, int rank, const WorkPlace& place)
      : time_(time), rank_(rank), place_(place) {}
  void charge(const Cost& cost, Stream& stream) override;
  DispatchCounts dispatch_counts(const WorkPlace& place) override;
  void add_stream(Stream& stream);
  // The host posts a call: it takes the time of a launch.
  int64_t post();
  void host_waited(const Event& event);
  int64_t host_now_ns() const { return host_ns_; }
  int rank() const { return rank_; }
  const WorkPlace& place() const { return place_; }
  // Counting begins here; all streams are idle.
  void restart();
  RankTimes times() const;

 private:
  friend class VirtualTime;
  friend class VirtualStream;
  struct Kernel {  // a transfer that holds multiprocessors
    const Transfer* transfer = nullptr;
    int64_t ready_ns = 0;
  };
  double rate(TimedOp::Bound bound, int64_t at) const;
  std::span<const int64_t> expert_rows(const WorkPlace& place);

  VirtualTime& time_;
  int rank_ = 0;
  const WorkPlace& place_;  // where the trainer is
  int64_t host_ns_ = 0, started_ns_ = 0;
  std::vector<std::unique_ptr<VirtualStream>> streams_;
  std::vector<Kernel> kernels_;
  RankTimes times_;
  std::unordered_map<int64_t, std::vector<int64_t>> expert_rows_;
};

class VirtualTime {
 public:
  // `trace` may be null. `config` is that of all ranks.
  VirtualTime(const Machine& machine, const Config& config, Trace* trace);
  ~VirtualTime();

  // A transfer at its stream's head; true when it is done.
  bool advance_transfer(Transfer& transfer);
  // Runs the earliest event; false when there is none.
  bool advance();
  RoutingModel& routing() { return routing_; }
  bool links_extrapolated() const { return link_extrapolated_; }

 private:
  friend class VirtualRank;
  friend class VirtualStream;
  struct Flow;
  struct Event {
    int64_t time_ns = 0;
    uint64_t number = 0;
    enum class Kind : uint8_t { op_end, kernel_start, flow_start, flow_end } kind = Kind::op_end;
    uint32_t version = 0;
    void* subject = nullptr;  // VirtualStream, VirtualRank or Flow
    bool operator>(const Event& other) const {
      return std::pair(time_ns, number) > std::pair(other.time_ns, other.number);
    }
  };
  void push(int64_t time_ns, Event::Kind kind, void* subject, uint32_t version);
  void begin(Transfer& transfer);
  void begin_flow(std::vector<Transfer*> members, Mail* mail);
  Flow* new_flow();
  void start_flow(Flow& flow);
  void end_flow(Flow& flow);
  void finish(Transfer& transfer, int64_t start, int64_t end);
  void rebalance(Flow& changed, int64_t now);
  void settle(Flow& flow, int64_t now);
  enum class Tier : int { near, far };
  int64_t link_of(int rank, Tier tier) const;
  void price_collective(Flow& flow);
  void price_message(Flow& flow, const Mail& mail);
  int64_t alone_ns(const CollectiveCall& call) const;  // of a group of one rank
  double link_ns(const LinkModel& link, double bytes, double ranks);
  OpTime price_op(const Cost& cost, std::span<const int64_t> expert_rows);

  const Machine& machine_;
  const Config& config_;
  Trace* trace_;
  RoutingModel routing_;
  int64_t tokens_ = 0;
  int64_t device_free_ns_ = 0;  // of a shared device
  uint64_t events_pushed_ = 0;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::vector<std::unique_ptr<Flow>> flows_;
  std::vector<Flow*> spare_flows_;
  std::unordered_map<int64_t, std::vector<Flow*>> link_flows_;
  struct CostKey {
    const char* op;
    std::array<int64_t, 6> shape;
    int64_t flops, bytes;
    bool operator==(const CostKey&) const = default;
  };
  struct CostHash {
    size_t operator()(const CostKey& key) const;
  };
  std::unordered_map<CostKey, OpTime, CostHash> priced_;
  bool link_extrapolated_ = false;
};

}  // namespace cambium::sim
