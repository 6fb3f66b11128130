// Streams with a device behind them, without a GPU: what is launched at once, what waits its turn,
// and which device waits between streams stand where the trainer asked for them.
#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "src/base/stream.h"

namespace cambium {
namespace {

using Log = std::vector<std::string>;

class FakeDevice final : public DeviceStream {
 public:
  FakeDevice(std::string name, Log& log) : name_(std::move(name)), log_(log) {}
  void* native() const override { return const_cast<FakeDevice*>(this); }
  void wait_for(const DeviceStream& other) override {
    log_.push_back(name_ + " after " + static_cast<const FakeDevice&>(other).name_);
  }
  void synchronize() override { log_.push_back("host after " + name_); }
  void launched(const char* what) { log_.push_back(name_ + ": " + what); }

 private:
  std::string name_;
  Log& log_;
};

struct KernelArgs {
  FakeDevice* device;
  const char* name;
};

void launch_kernel(const KernelArgs& args, Stream&) { args.device->launched(args.name); }

// Done when told so, as a collective whose peers have arrived.
class Gate final : public GatedTask {
 public:
  bool advance(Workers&) override { return open; }
  bool open = false;
};

struct DeviceStreams {
  Log log;
  FakeDevice a{"a", log}, b{"b", log};
  Stream compute{"compute"}, comm{"comm"};
  Workers workers{1};
  explicit DeviceStreams(LaunchOrder order = LaunchOrder::at_once) {
    compute.set_device(&a, order);
    comm.set_device(&b, order);
  }
};

TEST(DeviceStream, LaunchesAtOnceAndOrdersStreamsOnTheDevice) {
  DeviceStreams s;
  s.compute.launch("x", launch_kernel, KernelArgs{&s.a, "x"});
  s.comm.wait(s.compute.record());
  s.comm.launch("y", launch_kernel, KernelArgs{&s.b, "y"});
  EXPECT_TRUE(s.compute.is_idle() && s.comm.is_idle());
  EXPECT_EQ(s.log, (Log{"a: x", "b after a", "b: y"}));
  ImmediateHost host(s.workers);
  host.wait(s.comm.record(), std::source_location::current());
  EXPECT_EQ(s.log.back(), "host after b");
}

TEST(DeviceStream, WhatFollowsAGateWaitsItsTurn) {
  DeviceStreams s;
  Gate gate;
  s.comm.enqueue_gated("gate", gate);
  s.compute.wait(s.comm.record());
  s.compute.launch("x", launch_kernel, KernelArgs{&s.a, "x"});
  s.compute.drain(s.workers);
  EXPECT_TRUE(s.log.empty()) << s.log.front();
  gate.open = true;
  s.comm.drain(s.workers);
  s.compute.drain(s.workers);
  EXPECT_EQ(s.log, (Log{"a after b", "a: x"}));
  s.compute.launch("y", launch_kernel, KernelArgs{&s.a, "y"});
  EXPECT_EQ(s.log.back(), "a: y");
}

TEST(DeviceStream, InTurnLaunchesNothingBeforeTheDriver) {
  DeviceStreams s(LaunchOrder::in_turn);
  s.compute.launch("x", launch_kernel, KernelArgs{&s.a, "x"});
  s.comm.wait(s.compute.record());
  EXPECT_TRUE(s.log.empty());
  s.comm.drain(s.workers);
  EXPECT_TRUE(s.log.empty());
  s.compute.drain(s.workers);
  s.comm.drain(s.workers);
  EXPECT_EQ(s.log, (Log{"a: x", "b after a"}));
}

// Takes launches over, and does them when asked for the stream.
class JoiningDevice final : public DeviceStream {
 public:
  void* native() const override { return nullptr; }
  void wait_for(const DeviceStream&) override {}
  void synchronize() override {}
  bool take_over(const DeviceLaunch& launch) override {
    const auto* bytes = static_cast<const char*>(launch.object);
    taken.emplace_back(bytes, bytes + launch.bytes);
    calls.push_back(launch.call);
    return takes;
  }
  bool takes = true;
  std::vector<std::string> taken;
  std::vector<void (*)(const void*, Workers&)> calls;
};

struct PaddedArgs {
  std::vector<int>* log;
  char small;
  double large;
};
void log_small(const PaddedArgs& args, Stream&) { args.log->push_back(args.small); }

TEST(DeviceStream, SameLaunchesHaveTheSameBytes) {
  JoiningDevice device;
  Stream stream("joining");
  stream.set_device(&device);
  std::vector<int> log;
  const auto launch = [&](int garbage, char small) {
    alignas(PaddedArgs) unsigned char memory[sizeof(PaddedArgs)];
    std::memset(memory, garbage, sizeof memory);
    auto& args = *reinterpret_cast<PaddedArgs*>(memory);
    args.log = &log, args.small = small, args.large = 2;
    stream.launch("x", log_small, args);
  };
  launch(0x11, 1), launch(0xee, 1), launch(0x11, 3);
  EXPECT_TRUE(log.empty() && stream.is_idle());
  EXPECT_EQ(device.taken[0], device.taken[1]) << "what lies between the members is none of it";
  EXPECT_NE(device.taken[0], device.taken[2]);
  Workers workers(1);
  device.calls[2](device.taken[2].data(), workers);
  device.takes = false;
  launch(0, 5);
  EXPECT_EQ(log, (std::vector<int>{3, 5})) << "what was not taken over is done at once";
  stream.set_device(nullptr);
}

}  // namespace
}  // namespace cambium
