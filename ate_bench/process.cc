#include "ate_bench/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace ate {
namespace {

[[noreturn]] void become_child(const ChildSpec& spec, int output) {
  setpgid(0, 0);
  const int input = open("/dev/null", O_RDONLY);
  dup2(input, 0);
  dup2(output, 1);
  const int errors = open(spec.stderr_path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  dup2(spec.stderr_path == spec.stdout_path ? output : errors, 2);
  if (chdir(spec.directory.c_str()) != 0) _exit(126);
  for (const std::string& entry : spec.environment) putenv(const_cast<char*>(entry.c_str()));
  std::vector<char*> values;
  for (const std::string& value : spec.arguments)
    values.push_back(const_cast<char*>(value.c_str()));
  values.push_back(nullptr);
  execvp(values[0], values.data());
  _exit(127);
}

// Copies the pipe to the file and stamps each line's end. Ends at end of file or at the deadline.
bool copy_output(int pipe, const ChildSpec& spec, double deadline_s) {
  std::ofstream output(spec.stdout_path, std::ios::binary);
  std::ofstream times;
  if (!spec.times_path.empty()) times.open(spec.times_path);
  char buffer[65536];
  bool line_open = false;
  for (;;) {
    const double left_s = deadline_s - now_s();
    if (left_s <= 0) return false;
    pollfd waited = {pipe, POLLIN, 0};
    const int ready = poll(&waited, 1, static_cast<int>(std::min(left_s, 1.0) * 1000) + 1);
    if (ready <= 0) continue;
    const ssize_t bytes = read(pipe, buffer, sizeof buffer);
    if (bytes <= 0) break;
    output.write(buffer, bytes).flush();
    if (!times.is_open()) continue;
    for (ssize_t at = 0; at < bytes; ++at) {
      line_open = buffer[at] != '\n';
      if (!line_open) times << std::fixed << now_s() << "\n";
    }
    times.flush();
  }
  if (line_open && times.is_open()) times << std::fixed << now_s() << "\n";
  return true;
}

}  // namespace

double now_s() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

ChildResult run_child(const ChildSpec& spec) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe: no descriptors left");
  const double begin_s = now_s();
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork: no processes left");
  if (child == 0) become_child(spec, ends[1]);
  setpgid(child, child);
  close(ends[1]);
  ChildResult result;
  result.timed_out = !copy_output(ends[0], spec, begin_s + spec.limit_s);
  close(ends[0]);
  int status = 0;
  // The output may be closed before the process ends: the deadline holds for that time too.
  while (!result.timed_out && waitpid(child, &status, WNOHANG) == 0) {
    usleep(20000);
    result.timed_out = now_s() > begin_s + spec.limit_s;
  }
  kill(-child, SIGKILL);  // what the agent left running does not outlive the attempt
  if (result.timed_out) waitpid(child, &status, 0);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.wall_s = now_s() - begin_s;
  return result;
}

void run_shell(const std::string& script, const std::vector<std::string>& arguments,
               const std::string& directory) {
  char name[] = "/tmp/ate-shell-XXXXXX";
  close(mkstemp(name));
  ChildSpec spec;
  spec.arguments = {"bash", "-euo", "pipefail", "-c", script, "ate"};
  spec.arguments.insert(spec.arguments.end(), arguments.begin(), arguments.end());
  spec.directory = directory;
  spec.stdout_path = spec.stderr_path = name;
  spec.limit_s = 600;
  const ChildResult result = run_child(spec);
  const std::string output = read_file(name);
  std::filesystem::remove(name);
  if (result.exit_code != 0 || result.timed_out) {
    const bool is_short = script.find('\n') == std::string::npos;
    throw std::runtime_error((is_short ? "`" + script + "`" : "a script") + " in " + directory +
                             " ended with " + std::to_string(result.exit_code) + ":\n" + output);
  }
}

std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  if (stream) text << stream.rdbuf();
  return text.str();
}

void write_file(const std::string& path, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream stream(path, std::ios::binary);
  stream << text;
  if (!stream.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace ate
