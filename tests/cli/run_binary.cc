// fork, exec, poll; the child gets its own process group, so that a kill reaches all of it.
#include "tests/cli/run_binary.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "src/base/check.h"
#include "tests/tree.h"

namespace cambium {

namespace {

[[noreturn]] void run_child(int output, std::vector<std::string> arguments,
                            std::vector<std::string> environment) {
  setpgid(0, 0);
  const int input = open("/dev/null", O_RDONLY);
  dup2(input, 0);
  dup2(output, 1);
  dup2(output, 2);
  if (chdir(source_directory()) != 0) _exit(127);
  std::vector<char*> values = {const_cast<char*>(cambium_binary())};
  for (std::string& argument : arguments) values.push_back(argument.data());
  values.push_back(nullptr);
  std::vector<char*> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) variables.push_back(*entry);
  for (std::string& entry : environment) variables.push_back(entry.data());
  variables.push_back(nullptr);
  execve(cambium_binary(), values.data(), variables.data());
  _exit(127);
}

}  // namespace

BinaryRun run_binary(const std::vector<std::string>& arguments,
                     const std::vector<std::string>& environment, int limit_s) {
  int ends[2];
  CHECK_EQ(pipe2(ends, O_CLOEXEC), 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) run_child(ends[1], arguments, environment);
  close(ends[1]);
  BinaryRun run;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(limit_s);
  bool timed_out = false;
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    pollfd ready{.fd = ends[0], .events = POLLIN, .revents = 0};
    timed_out = left.count() <= 0 || poll(&ready, 1, static_cast<int>(left.count())) == 0;
    if (timed_out) break;
    char buffer[4096];
    const ssize_t count = read(ends[0], buffer, sizeof(buffer));
    if (count <= 0) break;
    run.output.append(buffer, static_cast<size_t>(count));
  }
  if (timed_out) kill(-child, SIGKILL);
  close(ends[0]);
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  if (!timed_out) {
    run.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  return run;
}

ScratchDirectory::ScratchDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "cambium-XXXXXX").string();
  CHECK(mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

ScratchDirectory::~ScratchDirectory() {
  std::error_code status;
  std::filesystem::remove_all(path_, status);
}

std::string ScratchDirectory::write(const std::string& name, const std::string& content) const {
  const std::filesystem::path path = std::filesystem::path(path_) / name;
  std::filesystem::create_directories(path.parent_path());
  std::ofstream stream(path, std::ios::binary);
  stream << content;
  CHECK(stream.good());
  return path.string();
}

}  // namespace cambium
