#include "sim/order_hazards.h"

#include "src/comm/call_check.h"

namespace cambium::sim {

namespace {

int rank_of(const Transfer& transfer) {
  return transfer.group->members()[static_cast<size_t>(transfer.member)];
}

}  // namespace

OrderHazards::OrderHazards(int ranks)
    : next_(static_cast<size_t>(ranks)),
      latest_(static_cast<size_t>(ranks) * static_cast<size_t>(ranks)) {}

void OrderHazards::launched(Transfer& transfer) {
  if (transfer.group->ranks() < 2) return;
  transfer.launch_position = ++next_[static_cast<size_t>(rank_of(transfer))];
  std::vector<const Transfer*> peers;  // that have launched it too
  if (transfer.meeting != nullptr) {
    for (const Transfer* peer : transfer.meeting->transfers) peers.push_back(peer);
  }
  for (const Mail* mail : transfer.sends) peers.push_back(mail->recv);
  for (const Mail* mail : transfer.recvs) peers.push_back(mail->send);
  std::erase_if(peers, [&](const Transfer* peer) { return peer == nullptr || peer == &transfer; });
  // What this rank launched before, and the peer after, is an inversion.
  for (const Transfer* peer : peers) {
    const Latest& before = latest(rank_of(transfer), rank_of(*peer));
    if (before.peer_position > peer->launch_position) report(transfer, *peer, before);
  }
  for (const Transfer* peer : peers) note(transfer, *peer);
}

void OrderHazards::note(const Transfer& transfer, const Transfer& peer) {
  ++compared_;
  const auto update = [](Latest& known, const Transfer& there) {
    if (there.launch_position <= known.peer_position) return;
    known = Latest{there.launch_position, there.call.kind, there.group, there.call.site};
  };
  const int rank = rank_of(transfer), other = rank_of(peer);
  update(latest(rank, other), peer);
  update(latest(other, rank), transfer);
}

void OrderHazards::report(const Transfer& transfer, const Transfer& peer,
                          const Latest& between) const {
  fail(ExitCode::deadlock,
       "ordering hazard: two ranks launch two transfers in another order, and hang where a device "
       "has room for one of them: rank {} launches {} of {} ({}) before {} of {} ({}), rank {} "
       "after; next: one order of launches on all ranks, or let the host wait between them",
       rank_of(transfer), collective_name(between.kind), between.group->describe(),
       describe_site(between.site), collective_name(transfer.call.kind), transfer.group->describe(),
       describe_site(peer.call.site), rank_of(peer));
}

}  // namespace cambium::sim
