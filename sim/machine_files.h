// The machine files of sim/machines/, which CMake writes into a source file of the build.
#pragma once

#include <span>

namespace cambium::sim {

struct MachineFile {
  const char* name = "";
  const char* text = "";
};
std::span<const MachineFile> machine_files();

}  // namespace cambium::sim
