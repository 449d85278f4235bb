// The two queues shared with the kernel: requests go in, results come out. Knows nothing of batches.
#pragma once

#include "ring_abi.hpp"

#include <cstddef>
#include <vector>

namespace flashinfer {

// Not thread safe, but `wait` may run beside everything except `reap` and the destructor.
class KernelRing {
public:
  // Throws std::system_error where the kernel has no such thing, forbids it, or has no room.
  explicit KernelRing(unsigned entries);
  ~KernelRing();
  KernelRing(const KernelRing &) = delete;
  KernelRing &operator=(const KernelRing &) = delete;

  // Saves the kernel a look-up per read. False where it refuses (limits); plain descriptors do as well.
  bool register_files(const std::vector<int> &fds);

  // Queues a request; at most `entries` may lie between two submits.
  void push(const abi::Sqe &request);

  // Hands over what was pushed. Returns 0, or the errno with which the kernel goes on refusing.
  int submit();

  // After a refusal: the user_data of what the kernel did not take, which it will never see.
  std::vector<std::uint64_t> take_back();

  // Blocks until a result lies ready. Returns 0 or an errno; EINTR after a signal.
  int wait() const;

  // Calls `use(user_data, result)` for every result that lies ready.
  template <typename Use> void reap(Use &&use) {
    std::uint32_t head = *cq_head_;
    const std::uint32_t tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
    for (; head != tail; ++head) {
      const abi::Cqe &cqe = cqes_[head & cq_mask_];
      use(cqe.user_data, cqe.result);
    }
    __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
  }

private:
  void map(const abi::Params &params);

  int fd_ = -1;
  void *rings_ = nullptr;
  std::size_t rings_bytes_ = 0, sqes_bytes_ = 0;
  abi::Sqe *sqes_ = nullptr;
  abi::Cqe *cqes_ = nullptr;
  std::uint32_t *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  std::uint32_t sq_mask_ = 0, cq_mask_ = 0, unsubmitted_ = 0;
};

} // namespace flashinfer
