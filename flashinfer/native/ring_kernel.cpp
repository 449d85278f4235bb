#include "ring_kernel.hpp"

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <sys/mman.h>
#include <system_error>

namespace flashinfer {
namespace {

constexpr int SUBMIT_TRIES = 1000; // a millisecond apart: the kernel is short of memory, for now

[[noreturn]] void fail(int error, const char *what) {
  throw std::system_error(error, std::generic_category(), what);
}

void *map_shared(int fd, std::size_t bytes, std::int64_t where) {
  void *found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, where);
  return found == MAP_FAILED ? nullptr : found;
}

} // namespace

// No flags: COOP_TASKRUN and DEFER_TASKRUN saved no CPU time where measured, and both tie a result to the thread
// that submitted: another one could wait for it in vain while the first computes.
KernelRing::KernelRing(unsigned entries) {
  abi::Params params{};
  fd_ = static_cast<int>(abi::setup(entries, &params));
  if (fd_ < 0)
    fail(errno, "io_uring_setup");
  if (!(params.features & abi::FEATURE_SINGLE_MMAP)) { // before Linux 5.4, which lacks OP_READ anyway
    close(fd_);
    fail(ENOSYS, "io_uring_setup");
  }
  rings_bytes_ = std::max(params.sq.array + params.sq_entries * sizeof(std::uint32_t),
                          params.cq.cqes + params.cq_entries * sizeof(abi::Cqe));
  sqes_bytes_ = params.sq_entries * sizeof(abi::Sqe);
  rings_ = map_shared(fd_, rings_bytes_, abi::MMAP_RINGS);
  sqes_ = static_cast<abi::Sqe *>(rings_ ? map_shared(fd_, sqes_bytes_, abi::MMAP_SQES) : nullptr);
  if (!sqes_) {
    const int error = errno;
    if (rings_)
      munmap(rings_, rings_bytes_);
    close(fd_);
    fail(error, "mapping the io_uring");
  }
  map(params);
}

void KernelRing::map(const abi::Params &params) {
  auto at = [this](std::uint32_t offset) {
    return reinterpret_cast<std::uint32_t *>(static_cast<char *>(rings_) + offset);
  };
  sq_tail_ = at(params.sq.tail);
  sq_array_ = at(params.sq.array);
  sq_mask_ = *at(params.sq.ring_mask);
  cq_head_ = at(params.cq.head);
  cq_tail_ = at(params.cq.tail);
  cq_mask_ = *at(params.cq.ring_mask);
  cqes_ = reinterpret_cast<abi::Cqe *>(at(params.cq.cqes));
}

KernelRing::~KernelRing() {
  munmap(sqes_, sqes_bytes_);
  munmap(rings_, rings_bytes_);
  close(fd_);
}

bool KernelRing::register_files(const std::vector<int> &fds) {
  return abi::register_(fd_, abi::REGISTER_FILES, fds.data(), static_cast<unsigned>(fds.size())) == 0;
}

void KernelRing::push(const abi::Sqe &request) {
  const std::uint32_t tail = *sq_tail_, slot = tail & sq_mask_;
  sqes_[slot] = request;
  sq_array_[slot] = slot;
  __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
  ++unsubmitted_;
}

int KernelRing::submit() {
  for (int tries = 0; unsubmitted_;) {
    const long taken = abi::enter(fd_, unsubmitted_, 0, 0);
    if (taken > 0) {
      unsubmitted_ -= static_cast<std::uint32_t>(taken);
    } else if (taken == 0 || errno == EAGAIN || errno == EBUSY || errno == ENOMEM) {
      if (++tries > SUBMIT_TRIES)
        return taken ? errno : EAGAIN;
      const timespec pause{0, 1'000'000};
      nanosleep(&pause, nullptr);
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

std::vector<std::uint64_t> KernelRing::take_back() {
  std::vector<std::uint64_t> left;
  const std::uint32_t tail = *sq_tail_;
  for (std::uint32_t i = tail - unsubmitted_; i != tail; ++i)
    left.push_back(sqes_[i & sq_mask_].user_data);
  __atomic_store_n(sq_tail_, tail - unsubmitted_, __ATOMIC_RELEASE);
  unsubmitted_ = 0;
  return left;
}

int KernelRing::wait() const {
  return abi::enter(fd_, 0, 1, abi::ENTER_GETEVENTS) < 0 ? errno : 0;
}

} // namespace flashinfer
