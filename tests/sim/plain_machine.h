// A machine whose times can be told by hand, and a small model for it.
#pragma once

#include <string>
#include <vector>

#include "src/config/config.h"

namespace cambium::sim {

// 1 FLOP and 1 byte a nanosecond; a transfer takes a quarter of the device and 100 ns of latency.
inline std::string plain_machine(const std::string& node_ranks) {
  return "name = \"plain\"\n[device]\nkind = \"cpu\"\ncompute = \"fp32\"\n"
         "memory = { value = \"1 GB\", source = \"t\" }\n"
         "reserved = { value = \"0 B\", source = \"t\" }\n"
         "peak = { value = \"1 GFLOP/s\", source = \"t\" }\n"
         "memory_bandwidth = { value = \"1 GB/s\", source = \"t\" }\n"
         "launch = { value = \"0 ns\", source = \"t\" }\n"
         "shortest_op = { value = \"0 ns\", source = \"t\" }\n"
         "host_wait = { value = \"0 ns\", source = \"t\" }\n"
         "copy_bandwidth = { value = \"1 GB/s\", source = \"t\" }\n"
         "multiprocessors = { value = 100, source = \"t\" }\n"
         "[overlap]\nmultiprocessors = { value = 25, source = \"t\" }\n"
         "memory_percent = { value = 0, source = \"t\" }\n"
         "[node]\ndevices = { value = " +
         node_ranks + ", source = \"t\" }\nnics = { value = " + node_ranks +
         ", source = \"t\" }\n"
         "[near]\nlatency = { value = \"100 ns\", source = \"t\" }\n"
         "rank_latency = { value = \"0 ns\", source = \"t\" }\n"
         "bandwidth = { value = \"1 GB/s\", source = \"t\" }\n"
         "efficiency = { points = [[\"1 B\", 1.0], [\"1 GB\", 1.0]], source = \"t\" }\n"
         "[far]\nlatency = { value = \"0 ns\", source = \"t\" }\n"
         "rank_latency = { value = \"0 ns\", source = \"t\" }\n"
         "bandwidth = { value = \"500 MB/s\", source = \"t\" }\n"
         "efficiency = { points = [[\"1 B\", 1.0], [\"1 GB\", 1.0]], source = \"t\" }\n"
         "[[op]]\nname = \"linear\"\nbound = \"compute\"\nsource = \"t\"\n"
         "points = [{ shape = [64, 64, 64], flops = 1000, bytes = 1, us = 1 }]\n";
}

inline Config plan_config(const std::string& layout) {
  const std::vector<std::string> sets{"numerics.block_tokens=16"};
  return parse_config(
      "[model]\npreset = \"tiny\"\nlayers = 4\n[train]\nglobal_batch_sequences = 8\n"
      "micro_batch_sequences = 1\nsequence_length = 64\n[balance]\n"
      "loss = \"sequence\"\n[logging]\ndigest_every_steps = 2\n" +
          layout,
      "plan_test", sets);
}

}  // namespace cambium::sim
