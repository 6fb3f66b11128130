#include "src/comm/comm.h"

namespace cambium {

const char* collective_name(CollectiveKind kind) {
  constexpr const char* kNames[kCollectiveKinds] = {"all_gather",   "reduce_scatter", "all_reduce",
                                                    "all_to_all_v", "broadcast",      "barrier",
                                                    "exchange"};
  return kNames[static_cast<int>(kind)];
}

namespace {

// The fields that the three equal-count calls share.
template <class Args>
CollectiveCall even_call(CollectiveKind kind, const Args& args) {
  CollectiveCall call;
  call.kind = kind;
  call.dtype = args.dtype;
  call.count = args.count;
  call.send = args.send;
  call.recv = args.recv;
  call.stream = &args.stream;
  call.site = args.site;
  return call;
}

}  // namespace

Ticket all_gather(const AllGatherArgs& args) {
  return args.communicator.post(even_call(CollectiveKind::all_gather, args));
}

Ticket reduce_scatter(const ReduceScatterArgs& args) {
  CollectiveCall call = even_call(CollectiveKind::reduce_scatter, args);
  call.reduce = args.reduce;
  return args.communicator.post(std::move(call));
}

Ticket all_reduce(const AllReduceArgs& args) {
  CollectiveCall call = even_call(CollectiveKind::all_reduce, args);
  call.reduce = args.reduce;
  return args.communicator.post(std::move(call));
}

Ticket all_to_all_v(const AllToAllVArgs& args) {
  CHECK_EQ(std::ssize(args.send_counts), args.communicator.ranks());
  CHECK_EQ(std::ssize(args.recv_counts), args.communicator.ranks());
  CollectiveCall call;
  call.kind = CollectiveKind::all_to_all_v;
  call.dtype = args.dtype;
  call.send = args.send;
  call.recv = args.recv;
  call.send_counts.assign(args.send_counts.begin(), args.send_counts.end());
  call.recv_counts.assign(args.recv_counts.begin(), args.recv_counts.end());
  call.stream = &args.stream;
  call.site = args.site;
  return args.communicator.post(std::move(call));
}

Ticket broadcast(const BroadcastArgs& args) {
  CHECK(args.root >= 0 && args.root < args.communicator.ranks());
  CollectiveCall call;
  call.kind = CollectiveKind::broadcast;
  call.dtype = args.dtype;
  call.count = args.count;
  call.root = args.root;
  call.send = args.data;
  call.recv = args.data;
  call.stream = &args.stream;
  call.site = args.site;
  return args.communicator.post(std::move(call));
}

Ticket barrier(const BarrierArgs& args) {
  CollectiveCall call;
  call.kind = CollectiveKind::barrier;
  call.stream = &args.stream;
  call.site = args.site;
  return args.communicator.post(std::move(call));
}

Ticket exchange(const ExchangeArgs& args) {
  CollectiveCall call;
  call.kind = CollectiveKind::exchange;
  call.dtype = args.dtype;
  call.sends.assign(args.sends.begin(), args.sends.end());
  call.recvs.assign(args.recvs.begin(), args.recvs.end());
  call.stream = &args.stream;
  call.site = args.site;
  return args.communicator.post(std::move(call));
}

}  // namespace cambium
