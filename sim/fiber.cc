#include "sim/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include "boost/context/detail/fcontext.hpp"
#include "src/base/check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace cambium::sim {

namespace context = boost::context::detail;

// What a sanitizer must hear around a switch; empty functions in other builds.
// NOTE: inlined always: a function entered on one side of TSan's switch and left on the other would
// take its frame off the wrong stack of calls.
struct Fiber::Announcements {
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kStackFactor = 4;  // instrumented frames are larger
  static void create(Fiber&) {}
  static void destroy(Fiber& fiber) {
    __asan_unpoison_memory_region(fiber.mapping_, static_cast<size_t>(fiber.mapping_bytes_));
  }
  [[gnu::always_inline]] static void leave_scheduler(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fiber.scheduler_fake_stack_, fiber.mapping_,
                                   static_cast<size_t>(fiber.mapping_bytes_));
  }
  [[gnu::always_inline]] static void back_in_scheduler(Fiber& fiber) {
    __sanitizer_finish_switch_fiber(fiber.scheduler_fake_stack_, nullptr, nullptr);
  }
  [[gnu::always_inline]] static void arrive(Fiber& fiber) {
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fiber.own_fake_stack_, &fiber.scheduler_stack_, &bytes);
    fiber.scheduler_stack_bytes_ = bytes;
  }
  [[gnu::always_inline]] static void leave(Fiber& fiber) {
    __sanitizer_start_switch_fiber(fiber.finished_ ? nullptr : &fiber.own_fake_stack_,
                                   fiber.scheduler_stack_, fiber.scheduler_stack_bytes_);
  }
#elif defined(__SANITIZE_THREAD__)
  static constexpr int64_t kStackFactor = 4;
  static void create(Fiber& fiber) { fiber.own_thread_ = __tsan_create_fiber(0); }
  static void destroy(Fiber& fiber) { __tsan_destroy_fiber(fiber.own_thread_); }
  [[gnu::always_inline]] static void leave_scheduler(Fiber& fiber) {
    fiber.scheduler_thread_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber.own_thread_, 0);
  }
  [[gnu::always_inline]] static void back_in_scheduler(Fiber&) {}
  [[gnu::always_inline]] static void arrive(Fiber&) {}
  [[gnu::always_inline]] static void leave(Fiber& fiber) {
    __tsan_switch_to_fiber(fiber.scheduler_thread_, 0);
  }
#else
  static constexpr int64_t kStackFactor = 1;
  static void create(Fiber&) {}
  static void destroy(Fiber&) {}
  [[gnu::always_inline]] static void leave_scheduler(Fiber&) {}
  [[gnu::always_inline]] static void back_in_scheduler(Fiber&) {}
  [[gnu::always_inline]] static void arrive(Fiber&) {}
  [[gnu::always_inline]] static void leave(Fiber&) {}
#endif
};

// NOTE: never returns: a finished fiber jumps back and is not resumed.
template <class Transfer>
void Fiber::enter(Transfer transfer) {
  auto& fiber = *static_cast<Fiber*>(transfer.data);
  fiber.scheduler_context_ = transfer.fctx;
  Announcements::arrive(fiber);
  fiber.entry_(fiber.argument_);
  fiber.finished_ = true;
  Announcements::leave(fiber);
  context::jump_fcontext(fiber.scheduler_context_, nullptr);
  __builtin_trap();
}

Fiber::Fiber(int64_t stack_bytes, Entry entry, void* argument)
    : entry_(entry), argument_(argument) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  mapping_bytes_ = (stack_bytes * Announcements::kStackFactor + page - 1) / page * page + page;
  mapping_ = mmap(nullptr, static_cast<size_t>(mapping_bytes_), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    fail(ExitCode::out_of_memory, "cannot map a stack of {} bytes for a simulated rank",
         mapping_bytes_);
  }
  CHECK_EQ(mprotect(mapping_, static_cast<size_t>(page), PROT_NONE), 0);
  void* top = static_cast<std::byte*>(mapping_) + mapping_bytes_;
  own_context_ = context::make_fcontext(top, static_cast<size_t>(mapping_bytes_ - page),
                                        &Fiber::enter<context::transfer_t>);
  Announcements::create(*this);
}

Fiber::~Fiber() {
  Announcements::destroy(*this);
  munmap(mapping_, static_cast<size_t>(mapping_bytes_));
}

void Fiber::resume() {
  CHECK(!finished_);
  started_ = true;
  Announcements::leave_scheduler(*this);
  own_context_ = context::jump_fcontext(own_context_, this).fctx;
  Announcements::back_in_scheduler(*this);
}

void Fiber::suspend() {
  Announcements::leave(*this);
  scheduler_context_ = context::jump_fcontext(scheduler_context_, nullptr).fctx;
  Announcements::arrive(*this);
}

}  // namespace cambium::sim
