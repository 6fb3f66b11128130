// [[faults]]: the kinds, what each needs, and drawing those that have a probability.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "src/config/derive.h"

namespace cambium {

// Who injects a kind. `checkpoint`: the save of one rank (src/checkpoint/save_faults.h).
enum class FaultSite : uint8_t { communicator, simulator, trainer, checkpoint };

std::span<const char* const> fault_names();
FaultSite fault_site(const std::string& kind);

// Refuses faults that the layout or the run has no place for (exit 2).
void check_faults(const Config& config, const Derived& derived);

// Steps first + 1 .. last are to be run.
struct StepRange {
  int64_t first = 0, last = 0;
};
// What strikes in these steps. An entry with a probability strikes or not, on a rank and at a step
// drawn from (run.seed, faults stream, entry, first); without one it strikes as it is written.
std::vector<FaultConfig> drawn_faults(const Config& config, StepRange steps);
// "rank_crash on rank 3 at step 7"
std::string describe_fault(const FaultConfig& fault);

}  // namespace cambium
