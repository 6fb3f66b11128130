#include "src/comm/nccl_environment.h"

#include <algorithm>
#include <exception>
#include <new>

#include "fmt/format.h"
#include "kernels/nccl_comm.h"
#include "src/comm/call_check.h"

namespace cambium {

namespace {

// The marks around one call.
class MarkedCall final : public CallProbe {
 public:
  CallState state() const override {
    if (after_.is_reached()) return CallState::done;
    return before_.is_reached() ? CallState::running : CallState::queued;
  }
  void begin(Stream& stream) { before_.record(stream); }
  void end(Stream& stream) { after_.record(stream); }

 private:
  cuda::StreamMark before_, after_;
};

class NcclCommunicator final : public Communicator, public TransportProbe {
 public:
  NcclCommunicator(const LogGroup& group, int rank, const cuda::NcclPlace& place, Job& job,
                   int handle)
      : Communicator(group.name, rank, static_cast<int>(group.members.size())),
        job_(job),
        handle_(handle),
        comm_(place) {
    job_.log().joined(handle_, *this);
  }
  // NOTE: destroying a communicator with work in flight waits for peers that may be gone.
  ~NcclCommunicator() override {
    job_.log().remove_group(handle_);
    if (job_.has_failed() || std::uncaught_exceptions() > 0) comm_.abort();
  }
  std::string failure() const override { return comm_.failure(); }
  Ticket post(CollectiveCall call) override;

 private:
  struct Launch {
    NcclCommunicator* communicator;
    const CollectiveCall* call;
  };
  static void launch(const Launch& launch, Stream& stream);
  void transfer(const CollectiveCall& call, Stream& stream);
  std::shared_ptr<MarkedCall> spare_marks();

  Job& job_;
  int handle_;
  cuda::NcclComm comm_;
  std::vector<std::shared_ptr<MarkedCall>> marks_;
  size_t next_marks_ = 0;
};

// Marks that the log has let go of; new ones while all are in use.
std::shared_ptr<MarkedCall> NcclCommunicator::spare_marks() {
  if (next_marks_ >= marks_.size()) next_marks_ = 0;
  if (marks_.empty() || marks_[next_marks_].use_count() > 1) {
    marks_.insert(marks_.begin() + static_cast<ptrdiff_t>(next_marks_),
                  std::make_shared<MarkedCall>());
  }
  return marks_[next_marks_++];
}

std::vector<cuda::NcclMessage> messages_of(const CollectiveCall& call) {
  using Side = cuda::NcclMessage::Side;
  std::vector<cuda::NcclMessage> messages;
  for (const Message& message : call.sends) {
    messages.push_back({Side::send, message.peer, message.data, message.count});
  }
  for (const Message& message : call.recvs) {
    messages.push_back({Side::receive, message.peer, message.data, message.count});
  }
  const auto add = [&](Side side, std::byte* data, const std::vector<int64_t>& counts) {
    for (size_t peer = 0; peer < counts.size(); ++peer) {
      messages.push_back({side, static_cast<int>(peer), data, counts[peer]});
      data += counts[peer] * dtype_bytes(call.dtype);
    }
  };
  add(Side::send, static_cast<std::byte*>(const_cast<void*>(call.send)), call.send_counts);
  add(Side::receive, static_cast<std::byte*>(call.recv), call.recv_counts);
  return messages;
}

void NcclCommunicator::transfer(const CollectiveCall& call, Stream& stream) {
  cuda::NcclCollective collective;
  switch (call.kind) {
    case CollectiveKind::barrier:
      return comm_.barrier(stream);
    case CollectiveKind::all_to_all_v:
    case CollectiveKind::exchange:
      return comm_.exchange(messages_of(call), call.dtype, stream);
    case CollectiveKind::all_gather:
      collective.kind = cuda::NcclKind::all_gather;
      break;
    case CollectiveKind::reduce_scatter:
      collective.kind = cuda::NcclKind::reduce_scatter;
      break;
    case CollectiveKind::all_reduce:
      collective.kind = cuda::NcclKind::all_reduce;
      break;
    case CollectiveKind::broadcast:
      collective.kind = cuda::NcclKind::broadcast;
      break;
  }
  if (call.count == 0) return;
  collective.dtype = call.dtype;
  collective.combine =
      call.reduce == ReduceOp::sum ? cuda::RankCombine::sum : cuda::RankCombine::max;
  collective.send = call.send;
  collective.recv = call.recv;
  collective.count = call.count;
  collective.root = call.root;
  comm_.run(collective, stream);
}

void NcclCommunicator::launch(const Launch& launch, Stream& stream) {
  NcclCommunicator& self = *launch.communicator;
  const std::shared_ptr<MarkedCall> marks = self.spare_marks();
  marks->begin(stream);
  self.transfer(*launch.call, stream);
  marks->end(stream);
  self.job_.log().post(self.handle_, *launch.call, marks);
}

Ticket NcclCommunicator::post(CollectiveCall call) {
  check_call(call);
  job_.check();
  Stream& stream = *call.stream;
  stream.launch(collective_name(call.kind), &NcclCommunicator::launch, Launch{this, &call});
  CHECK(stream.is_idle());  // launched at once: `call` is not needed any more
  return stream.record();
}

// The host waits by asking the device, so that a verdict on the job ends the wait.
class NcclHost final : public Host {
 public:
  explicit NcclHost(Job& job) : job_(job) {}
  void wait(const Event& event, std::source_location) override {
    if (event.stream == nullptr) return;
    CHECK(event.is_complete());
    while (!cuda::has_finished(*event.stream)) job_.check();
    job_.check();
  }
  void yield(const char*) override { job_.check(); }
  int64_t now_ns() const override { return steady_now_ns(); }

 private:
  Job& job_;
};

class NcclEnvironment final : public RankEnvironment {
 public:
  explicit NcclEnvironment(const NcclOptions& options)
      : job_(*options.job),
        poison_(options.poison),
        workers_(options.worker_threads),
        host_(job_) {}
  int rank() const override { return job_.rank(); }
  int ranks() const override { return job_.ranks(); }
  Host& host() override { return host_; }
  Workers& workers() override { return workers_; }
  Poison poison() const override { return poison_; }

  Stream& make_stream(const std::string& name) override {
    streams_.push_back(std::make_unique<Stream>(fmt::format("rank {} {}", rank(), name)));
    native_streams_.push_back(std::make_unique<cuda::NativeStream>(*streams_.back()));
    return *streams_.back();
  }

  std::unique_ptr<Communicator> make_communicator(const std::string& name,
                                                  const std::vector<int>& members) override {
    check_members(name, members, {rank(), ranks()});
    const int number = made_[{name, members}]++;
    const LogGroup group{number == 0 ? name : fmt::format("{} #{}", name, number + 1), members};
    const int handle = job_.log().add_group(group);
    const auto place = std::find(members.begin(), members.end(), rank());
    cuda::NcclPlace nccl;
    nccl.rank = static_cast<int>(place - members.begin());
    nccl.ranks = static_cast<int>(members.size());
    std::string key = group.name;
    for (const int member : members) key += fmt::format(" {}", member);
    if (nccl.rank == 0) {
      nccl.id = cuda::make_nccl_id();
      if (nccl.ranks > 1) job_.publish(key, nccl.id);
    } else {
      nccl.id = job_.await(key);
    }
    return std::make_unique<NcclCommunicator>(group, nccl.rank, nccl, job_, handle);
  }

  void set_step(int64_t step) override {
    step_ = step;
    job_.log().set_step(step);
  }
  int64_t step() const override { return step_; }

 private:
  Job& job_;
  Poison poison_;
  Workers workers_;
  NcclHost host_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::unique_ptr<cuda::NativeStream>> native_streams_;
  std::map<std::pair<std::string, std::vector<int>>, int> made_;
  int64_t step_ = 0;
};

Error describe_failure(std::exception_ptr failure, const RankEnvironment& environment) {
  const std::string where =
      fmt::format("rank {}, step {}: ", environment.rank(), environment.step());
  try {
    std::rethrow_exception(std::move(failure));
  } catch (const Error& error) {
    return Error(error.exit_code(), where + error.what());
  } catch (const std::bad_alloc& error) {
    return Error(ExitCode::out_of_memory, where + "out of memory: " + error.what());
  } catch (const std::exception& error) {
    return Error(ExitCode::internal, where + error.what());
  }
}

}  // namespace

void run_nccl_rank(const NcclOptions& options,
                   void (*main)(void* body, RankEnvironment& environment), void* body) {
  NcclEnvironment environment(options);
  try {
    main(body, environment);
  } catch (...) {
    const Error error = describe_failure(std::current_exception(), environment);
    options.job->announce_failure(error.exit_code(), error.what());
    throw error;
  }
}

}  // namespace cambium
