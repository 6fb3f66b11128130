#include "sim/race_detector.h"

#include <algorithm>
#include <utility>

#include "fmt/format.h"
#include "src/comm/call_check.h"

namespace cambium::sim {

namespace {

uint64_t known(const VectorClock& clock, int timeline) {
  const auto index = static_cast<size_t>(timeline);
  return index < clock.size() ? clock[index] : 0;
}

void set_known(VectorClock& clock, int timeline, uint64_t tick) {
  const auto index = static_cast<size_t>(timeline);
  if (clock.size() <= index) clock.resize(index + 1);
  clock[index] = std::max(clock[index], tick);
}

// Whether `clock` learnt something.
bool join(VectorClock& clock, const VectorClock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  bool learnt = false;
  for (size_t i = 0; i < other.size(); ++i) {
    learnt |= other[i] > clock[i];
    clock[i] = std::max(clock[i], other[i]);
  }
  return learnt;
}

// ", in dispatch of layer 2, backward, micro-batch 0"; empty outside a training step.
std::string place_text(const WorkPlace& place) {
  if (place.stage == WorkStage::none) return "";
  std::string text = fmt::format(", in {}", work_stage_name(place.stage));
  if (place.layer >= 0) text += fmt::format(" of layer {}", place.layer);
  if (place.micro_batch >= 0) {
    text += fmt::format(", {}, micro-batch {}", work_pass_name(place.pass), place.micro_batch);
  }
  return text;
}

bool writes(Access access) { return access != Access::read; }

}  // namespace

RaceDetector::RaceDetector(int ranks, LeftOutWait left_out_wait)
    : left_out_wait_(std::move(left_out_wait)) {
  for (int rank = 0; rank < ranks; ++rank) {
    ranks_.push_back(std::make_unique<RankState>());
    ranks_.back()->timeline = timelines_++;
  }
}

void RaceDetector::add_stream(const Stream& stream, int rank, const WorkPlace& place) {
  const std::lock_guard lock(mutex_);
  auto added = std::make_unique<StreamState>();
  added->stream = &stream;
  added->rank = ranks_[static_cast<size_t>(rank)].get();
  added->timeline = timelines_++;
  added->rank->streams.push_back(added.get());
  added->rank->place = &place;
  streams_[&stream] = std::move(added);
}

// The task that is enqueued next knows what the host knows.
void RaceDetector::note_host(StreamState& s) {
  if (s.seen_host_version == s.rank->version) return;
  s.seen_host_version = s.rank->version;
  s.from_host.emplace_back(s.stream->enqueued() + 1, s.rank->clock);
}

// What the task at the head knows beside what its stream did.
void RaceDetector::advance(StreamState& s) {
  const uint64_t sequence = next(s);
  bool learnt = false;
  while (!s.from_host.empty() && s.from_host.front().first <= sequence) {
    learnt |= join(s.clock, s.from_host.front().second);
    s.from_host.pop_front();
  }
  if (learnt) s.knowledge.emplace_back(sequence, s.clock);
}

VectorClock RaceDetector::clock_at(const Event& event) {
  const auto found = streams_.find(event.stream);
  if (found == streams_.end()) return {};
  const StreamState& s = *found->second;
  const auto after =
      std::upper_bound(s.knowledge.begin(), s.knowledge.end(), event.sequence,
                       [](uint64_t sequence, const auto& entry) { return sequence < entry.first; });
  VectorClock clock = after == s.knowledge.begin() ? VectorClock{} : std::prev(after)->second;
  const auto own = static_cast<size_t>(s.timeline);
  if (clock.size() <= own) clock.resize(own + 1);
  clock[own] = event.sequence;
  return clock;
}

void RaceDetector::declare(const Task& task) {
  const std::lock_guard lock(mutex_);
  const Stream& stream = task.stream;
  StreamState& s = state(stream);
  note_host(s);
  Declared declared{.sequence = stream.enqueued() + 1, .order = ++s.rank->orders, .notes = {}};
  for (const MemoryAccess& access : task.accesses) {
    if (access.bytes == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(access.data);
    declared.notes.push_back(
        std::make_shared<Note>(Note{.op_name = task.op_name,
                                    .view = access.view,
                                    .site = task.site,
                                    .place = *s.rank->place,
                                    .timeline = stream.name(),
                                    .access = access.access,
                                    .number = declared.sequence,
                                    .begin = begin,
                                    .end = begin + static_cast<uintptr_t>(access.bytes)}));
  }
  s.declared.push_back(std::move(declared));
  if (task.kind != Task::Kind::transfer) return;
  s.last_ticket = stream.enqueued() + 1;
  s.last_site = task.site;
}

WaitSite& RaceDetector::wait_site(const std::string& waiter, const Event& event,
                                  std::source_location site) {
  const auto kind = [](const std::string& stream) { return stream.substr(stream.rfind(' ') + 1); };
  const std::string key =
      fmt::format("{} {} waits for {}", describe_site(site), waiter, kind(event.stream->name()));
  return wait_sites_.try_emplace(key, WaitSite{.name = key}).first->second;
}

bool RaceDetector::leaves_out(const WaitSite& wait, const RankState& rank) const {
  if (left_out_wait_.site.empty() || wait.name.find(left_out_wait_.site) == std::string::npos) {
    return false;
  }
  return left_out_wait_.rank < 0 || ranks_[static_cast<size_t>(left_out_wait_.rank)].get() == &rank;
}

bool RaceDetector::keeps_wait(const Stream& stream, const Event& event, std::source_location site) {
  const std::lock_guard lock(mutex_);
  StreamState& s = state(stream);
  note_host(s);
  WaitSite& wait = wait_site(stream.name().substr(stream.name().rfind(' ') + 1), event, site);
  ++wait.count;
  if (leaves_out(wait, *s.rank)) return false;
  s.waits.emplace_back(stream.enqueued() + 1, &wait);
  return true;
}

void RaceDetector::waited(const Stream& stream, const Event& event) {
  const std::lock_guard lock(mutex_);
  StreamState& s = state(stream);
  advance(s);
  CHECK(!s.waits.empty() && s.waits.front().first == next(s));
  WaitSite& wait = *s.waits.front().second;
  s.waits.pop_front();
  if (join(s.clock, clock_at(event))) {
    s.knowledge.emplace_back(next(s), s.clock);
  } else {
    ++wait.implied;
  }
}

void RaceDetector::starts(const Stream& stream) {
  const std::lock_guard lock(mutex_);
  StreamState& s = state(stream);
  advance(s);
  const uint64_t sequence = next(s);
  set_known(s.clock, s.timeline, sequence);
  if (s.declared.empty() || s.declared.front().sequence != sequence) return;
  const Declared task = std::move(s.declared.front());
  s.declared.pop_front();
  for (const auto& note : task.notes) {
    check_pending(*s.rank, &s, *note, task.order);
    check_and_record(*s.rank, s.clock, {s.timeline, sequence, note});
  }
}

VectorClock RaceDetector::arrival(const Stream& stream) {
  const std::lock_guard lock(mutex_);
  const StreamState& s = state(stream);
  VectorClock clock = s.clock;
  clock[static_cast<size_t>(s.timeline)] = next(s) - 1;
  return clock;
}

void RaceDetector::learn(const Stream& stream, const VectorClock& clock) {
  const std::lock_guard lock(mutex_);
  StreamState& s = state(stream);
  if (join(s.clock, clock)) s.knowledge.emplace_back(next(s), s.clock);
}

bool RaceDetector::keeps_host_wait(int rank, const Event& event, std::source_location site) {
  if (event.stream == nullptr) return true;
  const std::lock_guard lock(mutex_);
  WaitSite& wait = wait_site("host", event, site);
  ++wait.count;
  return !leaves_out(wait, *ranks_[static_cast<size_t>(rank)]);
}

void RaceDetector::host_waited(int rank, const Event& event, std::source_location site) {
  if (event.stream == nullptr) return;
  const std::lock_guard lock(mutex_);
  RankState& host = *ranks_[static_cast<size_t>(rank)];
  if (!join(host.clock, clock_at(event))) ++wait_site("host", event, site).implied;
  ++host.version;
}

void RaceDetector::host_touches(int rank, const MemoryAccess& access, std::source_location site) {
  if (access.bytes == 0) return;
  const std::lock_guard lock(mutex_);
  RankState& host = *ranks_[static_cast<size_t>(rank)];
  const uint64_t tick = known(host.clock, host.timeline) + 1;
  set_known(host.clock, host.timeline, tick);
  ++host.version;
  const auto begin = reinterpret_cast<uintptr_t>(access.data);
  const Epoch epoch{
      host.timeline, tick,
      std::make_shared<Note>(Note{.op_name = "host",
                                  .view = access.view,
                                  .site = site,
                                  .place = host.place == nullptr ? WorkPlace{} : *host.place,
                                  .timeline = fmt::format("rank {} host", rank),
                                  .access = access.access,
                                  .number = tick,
                                  .begin = begin,
                                  .end = begin + static_cast<uintptr_t>(access.bytes)})};
  check_pending(host, nullptr, *epoch.note, ++host.orders);
  check_and_record(host, host.clock, epoch);
}

void RaceDetector::check_tickets(int rank) const {
  const std::lock_guard lock(mutex_);
  const RankState& host = *ranks_[static_cast<size_t>(rank)];
  for (const StreamState* s : host.streams) {
    if (known(host.clock, s->timeline) >= s->last_ticket) continue;
    fail(ExitCode::internal,
         "leaked ticket: nothing waits for the last transfer of stream '{}' (number {}, posted at "
         "{}); next: let the host, or a stream that it waits for, wait for its ticket",
         s->stream->name(), s->last_ticket, describe_site(s->last_site));
  }
}

// A task that was enqueued earlier and has not started is ordered by nothing: were it, it would
// have run.
void RaceDetector::check_pending(const RankState& rank, const StreamState* own, const Note& note,
                                 uint64_t order) const {
  for (const StreamState* other : rank.streams) {
    if (other == own) continue;
    for (const Declared& task : other->declared) {
      if (task.order >= order) break;
      for (const auto& pending : task.notes) {
        const bool overlap = pending->begin < note.end && note.begin < pending->end;
        if (overlap && (writes(note.access) || writes(pending->access))) {
          report_race(note, *pending);
        }
      }
    }
  }
}

// No cell goes across `at`.
void RaceDetector::split(RankState& rank, uintptr_t at) {
  auto cell = rank.cells.upper_bound(at);
  if (cell == rank.cells.begin()) return;
  --cell;
  if (cell->first == at || cell->second.end <= at) return;
  Cell upper = cell->second;
  cell->second.end = at;
  rank.cells.emplace(at, std::move(upper));
}

void RaceDetector::check_and_record(RankState& rank, const VectorClock& clock, const Epoch& epoch) {
  const Note& note = *epoch.note;
  ++accesses_;
  split(rank, note.begin);
  split(rank, note.end);
  const auto check = [&](const Epoch& earlier) {
    if (earlier.timeline < 0 || known(clock, earlier.timeline) >= earlier.tick) return;
    report_race(note, *earlier.note);
  };
  uintptr_t at = note.begin;
  auto cell = rank.cells.lower_bound(at);
  while (at < note.end) {
    if (cell == rank.cells.end() || cell->first > at) {
      const uintptr_t end = cell == rank.cells.end() ? note.end : std::min(note.end, cell->first);
      cell = rank.cells.emplace_hint(cell, at, Cell{.end = end, .write = {}, .reads = {}});
    }
    check(cell->second.write);
    if (writes(note.access)) {
      for (const Epoch& read : cell->second.reads) check(read);
    } else {
      auto& reads = cell->second.reads;
      std::erase_if(reads, [&](const Epoch& read) { return read.timeline == epoch.timeline; });
      reads.push_back(epoch);
    }
    at = cell->second.end;
    ++cell;
  }
  if (!writes(note.access)) return;
  rank.cells.erase(rank.cells.lower_bound(note.begin), rank.cells.lower_bound(note.end));
  rank.cells.emplace(note.begin, Cell{.end = note.end, .write = epoch, .reads = {}});
}

void RaceDetector::report_race(const Note& later, const Note& earlier) const {
  const uintptr_t begin = std::max(later.begin, earlier.begin);
  const uintptr_t end = std::min(later.end, earlier.end);
  const auto describe = [&](const Note& note) {
    const char* verb = note.access == Access::read    ? "reads"
                       : note.access == Access::write ? "writes"
                                                      : "reads and writes";
    return fmt::format("'{}' at {} (number {} of '{}'{}) {} bytes {} to {} of {}", note.op_name,
                       describe_site(note.site), note.number, note.timeline, place_text(note.place),
                       verb, begin - note.begin, end - note.begin, note.view);
  };
  fail(
      ExitCode::verification_mismatch,
      "race: nothing orders two accesses of {} bytes:\n  {}\n  {}\n  next: let the second wait for "
      "an event recorded after the first (Stream::wait, Host::wait), or keep the buffer longer",
      end - begin, describe(earlier), describe(later));
}

RaceReport RaceDetector::report() const {
  const std::lock_guard lock(mutex_);
  const auto is_left_out = [this](const auto& entry) {
    return entry.first.find(left_out_wait_.site) != std::string::npos;
  };
  if (!left_out_wait_.site.empty() &&
      std::none_of(wait_sites_.begin(), wait_sites_.end(), is_left_out)) {
    fail(ExitCode::usage, "no place that waits has '{}' in its name: nothing was left out",
         left_out_wait_.site);
  }
  RaceReport report{.accesses = accesses_, .waits = {}};
  for (const auto& [name, wait] : wait_sites_) report.waits.push_back(wait);
  return report;
}

}  // namespace cambium::sim
