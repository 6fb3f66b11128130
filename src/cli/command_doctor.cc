// `cambium doctor`: cores, instructions, memory, disk, libraries, GPU, corpus.
#include <filesystem>
#include <fstream>
#include <thread>

#include "fmt/format.h"
#include "kernels/attention_cudnn.h"
#include "kernels/cuda_stream.h"
#include "nlohmann/json.hpp"
#include "src/cli/commands.h"

namespace cambium {

namespace {

#ifdef CAMBIUM_HAS_SENTENCEPIECE  // NOTE: the same definition decides in src/data what is linked
constexpr bool kHasSentencePiece = true;
#else
constexpr bool kHasSentencePiece = false;
#endif
constexpr const char* kQuickstartCorpus = "data/quickstart.txt";

// A "Name: value kB" line of /proc/meminfo, in bytes; 0 when there is none.
int64_t memory_bytes(const std::string& name) {
  std::ifstream stream("/proc/meminfo");
  for (std::string line; std::getline(stream, line);) {
    if (line.starts_with(name + ":")) return std::stoll(line.substr(name.size() + 1)) * 1024;
  }
  return 0;
}

std::string cpu_model() {
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

std::vector<std::string> gpu_names() {
  std::vector<std::string> names;
  std::error_code status;
  for (const auto& entry :
       std::filesystem::directory_iterator("/proc/driver/nvidia/gpus", status)) {
    std::ifstream stream(entry.path() / "information");
    for (std::string line; std::getline(stream, line);) {
      const size_t start = line.find_first_not_of(" \t", 6);
      if (line.starts_with("Model:") && start != std::string::npos) {
        names.push_back(line.substr(start));
      }
    }
  }
  return names;
}

nlohmann::ordered_json examine() {
  nlohmann::ordered_json found;
  found["processor"] = cpu_model();
  found["cores"] = std::thread::hardware_concurrency();
  found["x86_64_v3"] = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
                       __builtin_cpu_supports("bmi2") != 0;
  found["avx512"] = __builtin_cpu_supports("avx512f") != 0;
  found["memory_bytes"] = memory_bytes("MemTotal");
  found["memory_available_bytes"] = memory_bytes("MemAvailable");
  std::error_code status;
  const auto space = std::filesystem::space(".", status);
  found["disk_available_bytes"] = status ? 0 : static_cast<int64_t>(space.available);
  found["sentencepiece"] = kHasSentencePiece;
  found["cuda_kernels"] = kHasCuda;
  found["nccl"] = kHasCuda;
  found["cudnn"] = cuda::cudnn_version();
  found["gpus"] = gpu_names();
  if constexpr (kHasCuda) {
    if (cuda::device_count() > 0) {
      const cuda::DeviceInfo gpu = cuda::device_info();
      found["gpus"] = std::vector<std::string>(static_cast<size_t>(cuda::device_count()), gpu.name);
      found["gpu_compute_capability"] = 0.1 * gpu.compute_capability;
      found["gpu_multiprocessors"] = gpu.multiprocessors;
      found["gpu_memory_bytes"] = gpu.total_bytes;
      found["gpu_memory_available_bytes"] = gpu.free_bytes;
    }
  }
  const auto corpus_bytes = std::filesystem::file_size(kQuickstartCorpus, status);
  found["quickstart_corpus_bytes"] = status ? 0 : static_cast<int64_t>(corpus_bytes);
  return found;
}

std::string advice(const nlohmann::ordered_json& found) {
  std::string text;
  if (!found["x86_64_v3"].get<bool>()) {
    text += "The processor lacks AVX2, FMA or BMI2: this build does not run here.\n";
  }
  if (found["quickstart_corpus_bytes"].get<int64_t>() == 0) {
    text += fmt::format("{} is absent: run scripts/setup.sh from the repository's root.\n",
                        kQuickstartCorpus);
  }
  if (!found["sentencepiece"].get<bool>()) {
    text += "This build has no SentencePiece: use data.tokenizer = \"bytes\".\n";
  }
  if (!found["gpus"].empty() && !kHasCuda) {
    text +=
        "A GPU is present, but this build has no CUDA kernels: `cmake --preset cuda` makes one.\n";
  }
  if (kHasCuda && found["gpus"].empty()) {
    text += "No GPU is visible: use run.device = \"cpu\".\n";
  }
  return text.empty() ? "Next: cambium train configs/quickstart.toml\n" : text;
}

}  // namespace

int command_doctor(OutputFormat format) {
  const nlohmann::ordered_json found = examine();
  if (format == OutputFormat::json) {
    fmt::print("{}\n", found.dump());
    return 0;
  }
  for (const auto& [name, value] : found.items()) {
    const bool in_bytes = name.ends_with("_bytes");
    fmt::print("{:<26}{}\n", in_bytes ? name.substr(0, name.size() - 6) : name,
               in_bytes ? fmt::format("{:.1f} MB", value.get<double>() / 1e6) : value.dump());
  }
  fmt::print("\n{}", advice(found));
  return 0;
}

}  // namespace cambium
