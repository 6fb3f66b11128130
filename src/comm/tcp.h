// TCP connections of a job's control messages: framed, length-checked, with deadlines.
//
// A frame is {magic, kind, bytes} as three little-endian u32 and `bytes` of body, at most 1 MiB. A
// peer that sends anything else (a port scanner, another program) is cut off. Nothing is ever
// interpreted beyond the fields that MessageReader hands out, each of which is checked against the
// body's end. The peer is not authenticated: the port belongs on a cluster's own network.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cambium {

// Nanoseconds of the steady clock: what deadlines are measured in.
int64_t steady_now_ns();
constexpr int64_t kNsPerS = 1'000'000'000;

// A file descriptor that closes itself.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int descriptor) : descriptor_(descriptor) {}
  Socket(Socket&& other) noexcept { *this = static_cast<Socket&&>(other); }
  Socket& operator=(Socket&& other) noexcept;
  ~Socket() { close(); }
  void close();
  int descriptor() const { return descriptor_; }
  bool is_open() const { return descriptor_ >= 0; }

 private:
  int descriptor_ = -1;
};

struct Endpoint {
  std::string address;  // host name or number
  int port = 0;
  std::string text() const;  // "node1:29500"
};

// Listens on every interface. A port that something else uses exits 2; 0 lets the system choose.
Socket listen_on(int port);
Socket accept_from(const Socket& listener);
// The port that a listening socket has.
int listening_port(const Socket& listener);
// Connects, trying again until `deadline_ns`. Returns a closed socket and the reason when it
// cannot.
Socket connect_to(const Endpoint& endpoint, int64_t deadline_ns, std::string* reason);

struct Frame {
  uint32_t kind = 0;
  std::string body;
};

// One peer. Sending blocks for at most a second; a peer that does not read is as good as gone.
class Connection {
 public:
  Connection() = default;
  // Keeps the connection alive by probes: a peer's host that is gone shows within half a minute,
  // while a stopped process stays connected.
  explicit Connection(Socket socket);
  int descriptor() const { return socket_.descriptor(); }
  bool is_open() const { return socket_.is_open(); }
  void close() { socket_.close(); }
  // No more frames follow. `drain` then reads the peer's last words, so that the kernel does not
  // cut ours off by a reset.
  void finish_sending();
  void drain(int64_t deadline_ns);
  // False when the peer is gone.
  bool send(uint32_t kind, const std::string& body);
  // Reads what has arrived, without waiting; false when the peer closed or sent no frame.
  bool receive();
  // Takes the oldest complete frame.
  bool next(Frame* frame);
  // Waits for one until `deadline_ns`; false when none comes.
  bool wait(Frame* frame, int64_t deadline_ns);

 private:
  Socket socket_;
  std::string incoming_;
};

// Waits until one of the descriptors is readable; negative ones are passed over.
std::vector<bool> wait_readable(const std::vector<int>& descriptors, int64_t deadline_ns);

class MessageWriter {
 public:
  MessageWriter& number(uint64_t value);
  MessageWriter& text(const std::string& value);
  const std::string& body() const { return body_; }

 private:
  std::string body_;
};

// The fields in order; a body that ends early makes `good` false and the rest zero and empty.
class MessageReader {
 public:
  explicit MessageReader(const std::string& body) : body_(body) {}
  uint64_t number();
  std::string text();
  bool good() const { return good_; }

 private:
  const std::string& body_;
  size_t at_ = 0;
  bool good_ = true;
};

}  // namespace cambium
