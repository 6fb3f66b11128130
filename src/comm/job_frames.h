// The frames of a job's connections, and the meeting that opens them. For src/comm/job*.cc alone.
#pragma once

#include <map>
#include <string>

#include "src/comm/job.h"

namespace cambium {

enum JobFrame : uint32_t {
  kHello,    // token, rank, ranks, library version: the first frame of a connection
  kWelcome,  // every rank has come
  kRefuse,   // exit code, text: the connection ends
  kPublish,  // name, value: to rank 0's store
  kAsk,      // name
  kValue,    // name, value
  kStalled,  // a collective has run for too long here
  kInquire,  // asks for a report
  kReport,   // stall_report.h
  kVerdict,  // exit code, text: the job ends
  kFailed,   // exit code, text: this rank ends with an error of its own
  kGoodbye,  // this rank ends as it should
};

std::string verdict_body(const Verdict& verdict);
// What rank `rank`'s own error means for the others.
Verdict failure_verdict(int rank, const Verdict& failure);

// Connections to every other rank, and to rank 0.
std::map<int, Connection> meet_as_first(const JobOptions& options, Socket listener);
std::map<int, Connection> meet_as_other(const JobOptions& options);

}  // namespace cambium
