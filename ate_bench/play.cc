// The scripted agent: replays a recorded session, so that tests go the whole way of a real one.
//
// Each line of the session is a record of the generic format (ate_bench/README.md), printed as it
// is; {"type":"exec","command":C} runs C with bash in the scratch copy, {"type":"sleep","s":N}
// waits, {"type":"exit","code":N} ends at once, as a crash does. ATE_SESSION names its directory.
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "ate_bench/attempt.h"
#include "nlohmann/json.hpp"

namespace ate {

int play_session(const std::string& path) {
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error("no session " + path);
  const std::string directory = std::filesystem::absolute(path).parent_path();
  setenv("ATE_SESSION", directory.c_str(), 1);
  for (std::string line; std::getline(stream, line);) {
    const nlohmann::json record = nlohmann::json::parse(line, nullptr, false);
    const std::string type = record.is_object() ? record.value("type", "") : "";
    if (type == "exec") {
      // Its output is not a transcript's line: to stderr.
      const std::string command = "{ " + record.at("command").get<std::string>() + "\n} 1>&2";
      if (system(command.c_str()) != 0) return 1;
    } else if (type == "sleep") {
      usleep(static_cast<useconds_t>(record.at("s").get<double>() * 1e6));
    } else if (type == "exit") {
      return record.at("code");
    } else {
      std::printf("%s\n", line.c_str());
      std::fflush(stdout);
    }
  }
  return 0;
}

}  // namespace ate
