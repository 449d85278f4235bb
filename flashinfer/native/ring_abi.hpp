// The part of the kernel's io_uring interface that reading needs. Written down here, not included from
// <linux/io_uring.h>: the headers of a build machine may be older than the kernel the wheel runs on.
#pragma once

#include <cstdint>
#include <sys/syscall.h>
#include <unistd.h>

namespace flashinfer::abi {

struct SqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  std::uint64_t user_addr;
};

struct CqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
  std::uint64_t user_addr;
};

struct Params {
  std::uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
  SqOffsets sq;
  CqOffsets cq;
};

struct Sqe {
  std::uint8_t opcode, flags;
  std::uint16_t ioprio;
  std::int32_t fd;
  std::uint64_t offset, address;
  std::uint32_t length, rw_flags;
  std::uint64_t user_data, reserved[3];
};

struct Cqe {
  std::uint64_t user_data;
  std::int32_t result;
  std::uint32_t flags;
};

static_assert(sizeof(Params) == 120 && sizeof(Sqe) == 64 && sizeof(Cqe) == 16);

constexpr std::uint8_t OP_READ = 22;
constexpr std::uint8_t SQE_FIXED_FILE = 1;
constexpr std::uint32_t FEATURE_SINGLE_MMAP = 1;
constexpr unsigned ENTER_GETEVENTS = 1;
constexpr unsigned REGISTER_FILES = 2;
constexpr std::int64_t MMAP_RINGS = 0, MMAP_SQES = 0x10000000;

// the same numbers on every architecture but Alpha
inline long setup(unsigned entries, Params *params) { return syscall(425, entries, params); }
inline long enter(int fd, unsigned submit, unsigned complete, unsigned flags) {
  return syscall(426, fd, submit, complete, flags, nullptr, 0);
}
inline long register_(int fd, unsigned what, const void *values, unsigned count) {
  return syscall(427, fd, what, values, count);
}

} // namespace flashinfer::abi
