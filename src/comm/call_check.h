// What every communicator checks and says about a call, whichever transport carries it.
#pragma once

#include <string>
#include <vector>

#include "src/comm/comm.h"

namespace cambium {

// The fields in which two calls of one meeting must agree, as text: "all_reduce sum f32 count 5".
std::string describe_call(const CollectiveCall& call);
// "[0,1,2]", shortened when long.
std::string describe_ranks(const std::vector<int>& ranks);
// "file.cc:12"
std::string describe_site(const std::source_location& site);

// The first field in which two members' calls of one meeting differ, with both values; empty when
// they agree. The v-counts are compared pairwise by the caller.
std::string call_difference(const CollectiveCall& a, const CollectiveCall& b);
bool same_call_site(const CollectiveCall& a, const CollectiveCall& b);

struct JobPlace {
  int rank = 0;
  int ranks = 1;
};
// Members are distinct ranks of the job and include this one.
void check_members(const std::string& name, const std::vector<int>& members, JobPlace place);

}  // namespace cambium
