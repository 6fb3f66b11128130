#include "src/comm/tcp.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "fmt/format.h"
#include "src/base/error.h"

namespace cambium {

namespace {

constexpr uint32_t kMagic = 0x314d4243;  // "CBM1"
constexpr uint32_t kMostBodyBytes = 1 << 20;
constexpr size_t kHeaderBytes = 12;
constexpr auto kRetryPause = std::chrono::milliseconds(50);

int milliseconds_until(int64_t deadline_ns) {
  const int64_t left = (deadline_ns - steady_now_ns()) / 1'000'000 + 1;
  return static_cast<int>(std::clamp<int64_t>(left, 0, 1'000'000));
}

void set_option(int descriptor, int level, int option, int value) {
  setsockopt(descriptor, level, option, &value, sizeof value);
}

uint32_t word_at(const std::string& bytes, size_t at) {
  uint32_t word = 0;
  std::memcpy(&word, bytes.data() + at, sizeof word);
  return word;
}

// One try to connect; a closed socket and errno's text when it fails.
Socket try_connect(const addrinfo& address, int64_t deadline_ns, std::string* reason) {
  Socket socket(::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket.is_open()) return socket;
  int error = 0;
  if (::connect(socket.descriptor(), address.ai_addr, address.ai_addrlen) != 0) {
    error = errno;
    if (error == EINPROGRESS) {
      pollfd entry{socket.descriptor(), POLLOUT, 0};
      socklen_t bytes = sizeof error;
      error = ETIMEDOUT;
      if (poll(&entry, 1, milliseconds_until(deadline_ns)) == 1) {
        getsockopt(socket.descriptor(), SOL_SOCKET, SO_ERROR, &error, &bytes);
      }
    }
  }
  if (error != 0) {
    *reason = std::strerror(error);
    socket.close();
  }
  return socket;
}

}  // namespace

int64_t steady_now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

void Socket::close() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
}

std::string Endpoint::text() const { return fmt::format("{}:{}", address, port); }

// NOTE: IPv6 sockets take IPv4 connections too; hosts without IPv6 get an IPv4 one.
Socket listen_on(int port) {
  sockaddr_in6 any6{};
  any6.sin6_family = AF_INET6;
  any6.sin6_addr = in6addr_any;
  any6.sin6_port = htons(static_cast<uint16_t>(port));
  sockaddr_in any4{};
  any4.sin_family = AF_INET;
  any4.sin_port = any6.sin6_port;
  Socket socket(::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const bool six = socket.is_open();
  if (!six) socket = Socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  set_option(socket.descriptor(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (six) set_option(socket.descriptor(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
  const auto* address =
      six ? reinterpret_cast<const sockaddr*>(&any6) : reinterpret_cast<const sockaddr*>(&any4);
  const socklen_t bytes = six ? sizeof any6 : sizeof any4;
  if (::bind(socket.descriptor(), address, bytes) != 0 ||
      ::listen(socket.descriptor(), SOMAXCONN) != 0) {
    fail(ExitCode::usage,
         "rank 0 cannot listen on port {}: {}; next: another MASTER_PORT, the same on every rank",
         port, std::strerror(errno));
  }
  return socket;
}

Socket accept_from(const Socket& listener) {
  return Socket(::accept4(listener.descriptor(), nullptr, nullptr, SOCK_CLOEXEC));
}

int listening_port(const Socket& listener) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  getsockname(listener.descriptor(), reinterpret_cast<sockaddr*>(&address), &bytes);
  // The port lies at the same place in both families.
  return ntohs(reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
}

Socket connect_to(const Endpoint& endpoint, int64_t deadline_ns, std::string* reason) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  const std::string port = fmt::format("{}", endpoint.port);
  while (true) {
    addrinfo* found = nullptr;
    const int status = getaddrinfo(endpoint.address.c_str(), port.c_str(), &hints, &found);
    if (status != 0) *reason = gai_strerror(status);
    Socket socket;
    for (const addrinfo* each = found; each != nullptr && !socket.is_open(); each = each->ai_next) {
      socket = try_connect(*each, deadline_ns, reason);
    }
    if (found != nullptr) freeaddrinfo(found);
    if (socket.is_open() || steady_now_ns() >= deadline_ns) return socket;
    std::this_thread::sleep_for(kRetryPause);
  }
}

Connection::Connection(Socket socket) : socket_(static_cast<Socket&&>(socket)) {
  const int descriptor = socket_.descriptor();
  fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) & ~O_NONBLOCK);
  set_option(descriptor, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(descriptor, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(descriptor, IPPROTO_TCP, TCP_KEEPIDLE, 10);
  set_option(descriptor, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set_option(descriptor, IPPROTO_TCP, TCP_KEEPCNT, 4);
  const timeval limit{1, 0};
  setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

void Connection::finish_sending() {
  if (is_open()) ::shutdown(descriptor(), SHUT_WR);
}

void Connection::drain(int64_t deadline_ns) {
  while (is_open() && wait_readable({descriptor()}, deadline_ns)[0] && receive()) incoming_.clear();
  close();
}

bool Connection::send(uint32_t kind, const std::string& body) {
  if (!is_open() || body.size() > kMostBodyBytes) return false;
  const uint32_t header[3] = {kMagic, kind, static_cast<uint32_t>(body.size())};
  std::string bytes(reinterpret_cast<const char*>(header), sizeof header);
  bytes += body;
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t count =
        ::send(descriptor(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    sent += static_cast<size_t>(count);
  }
  return true;
}

bool Connection::receive() {
  char bytes[16384];
  while (is_open()) {
    const ssize_t count = ::recv(descriptor(), bytes, sizeof bytes, MSG_DONTWAIT);
    if (count > 0) {
      incoming_.append(bytes, static_cast<size_t>(count));
      const bool framed =
          incoming_.size() < kHeaderBytes ||
          (word_at(incoming_, 0) == kMagic && word_at(incoming_, 8) <= kMostBodyBytes);
      if (!framed) return false;
      continue;
    }
    if (count < 0 && errno == EINTR) continue;
    return count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
  }
  return false;
}

bool Connection::next(Frame* frame) {
  if (incoming_.size() < kHeaderBytes || word_at(incoming_, 0) != kMagic) return false;
  const size_t bytes = word_at(incoming_, 8);
  if (bytes > kMostBodyBytes || incoming_.size() < kHeaderBytes + bytes) return false;
  frame->kind = word_at(incoming_, 4);
  frame->body = incoming_.substr(kHeaderBytes, bytes);
  incoming_.erase(0, kHeaderBytes + bytes);
  return true;
}

bool Connection::wait(Frame* frame, int64_t deadline_ns) {
  while (!next(frame)) {
    if (!wait_readable({descriptor()}, deadline_ns)[0]) return false;
    if (!receive()) return next(frame);
  }
  return true;
}

std::vector<bool> wait_readable(const std::vector<int>& descriptors, int64_t deadline_ns) {
  std::vector<pollfd> entries;
  for (const int descriptor : descriptors) entries.push_back({descriptor, POLLIN, 0});
  std::vector<bool> readable(descriptors.size());
  while (poll(entries.data(), entries.size(), milliseconds_until(deadline_ns)) < 0) {
    if (errno != EINTR) return readable;
  }
  for (size_t i = 0; i < entries.size(); ++i) readable[i] = entries[i].revents != 0;
  return readable;
}

MessageWriter& MessageWriter::number(uint64_t value) {
  body_.append(reinterpret_cast<const char*>(&value), sizeof value);
  return *this;
}

MessageWriter& MessageWriter::text(const std::string& value) {
  number(value.size());
  body_ += value;
  return *this;
}

uint64_t MessageReader::number() {
  uint64_t value = 0;
  if (!good_ || body_.size() - at_ < sizeof value) {
    good_ = false;
    return 0;
  }
  std::memcpy(&value, body_.data() + at_, sizeof value);
  at_ += sizeof value;
  return value;
}

std::string MessageReader::text() {
  const uint64_t bytes = number();
  if (!good_ || body_.size() - at_ < bytes) {
    good_ = false;
    return "";
  }
  std::string value = body_.substr(at_, bytes);
  at_ += bytes;
  return value;
}

}  // namespace cambium
