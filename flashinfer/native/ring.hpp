// Batches of reads on one io_uring: as many in flight as allowed, the rest waits here. Knows nothing of Python.
#pragma once

#include "ring_kernel.hpp"

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace flashinfer {

struct Batch;

// One extent on its way: `done` of its `length` bytes are there.
struct Read {
  Batch *batch;
  std::int64_t offset, length, done;
  std::uint8_t *target;
  int tries;
  double started; // where the ring is timed: when it was first pushed, in seconds of a steady clock
};

// What one submit asked for. Belongs to the ring until it has ended, then to whoever holds it.
struct Batch {
  std::size_t file = 0;
  std::vector<Read> reads;
  std::size_t next = 0;                // the first read that was never pushed
  std::size_t left = 0;                // reads that have not ended
  void *keep = nullptr;                // what must live as long as the reads do
  std::ptrdiff_t failed = -1;          // the read that failed first, in time
  int error = 0;                       // its errno; 0 when the file ended too early
};

struct File {
  int fd;
  std::int64_t alignment; // a partial read goes on from a multiple of it
  bool forget;            // drop its pages from the page cache once read
};

// Thread safe. No thread of its own: results are fetched, and reads that waited are pushed, by whoever calls
// `submit` or `wait`. One thread at a time (the leader) sleeps in the kernel, without the lock; only it fetches
// results meanwhile, so that nobody takes away the one it sleeps for. Others that wait are told by it.
class Ring {
public:
  // Throws std::system_error where the kernel refuses, std::invalid_argument for a depth out of range.
  Ring(std::vector<File> files, unsigned depth, bool timed);
  ~Ring(); // waits for what is in flight

  // Throws std::invalid_argument when closed, or in a child of the process that made the ring.
  void submit(std::shared_ptr<Batch> batch);

  // True: the batch has ended. False: a signal came, or might have; look and call again.
  bool wait(const Batch &batch);

  // Waits for every batch. True: all have ended and the ring is gone. False: as for `wait`. Idempotent.
  bool close();

  // The `keep` of batches that ended since the last call.
  std::vector<void *> take_ended();

  // Of each read that went well since the last call, in a ring that is timed: seconds from when it was handed to the
  // kernel until its end was seen here.
  std::vector<double> take_seconds();

  // For tests: reads of `file` that start at `offset` (or anywhere: -1) end so, the next `times` times
  // (or always: -1): a negative errno, or at most so many bytes.
  void fault(std::size_t file, std::int64_t offset, std::int64_t result, int times);

  const std::size_t n_files;
  std::int64_t alignment = 1; // of reads of any of the files
  bool registered = false;

private:
  struct Fault {
    std::int64_t result;
    int times;
  };

  void check_process() const;
  bool wait_step(std::unique_lock<std::mutex> &lock);
  void progress();
  void push_waiting();
  void push(Read &read);
  void complete(Read &read, std::int64_t result);
  void again(Read &read);
  void fail(Read &read, int error);
  void end(Batch &batch, std::size_t count);
  std::int64_t injected(const Read &read, std::int64_t result);

  std::vector<File> files_;
  const unsigned depth_;
  const bool timed_;
  const int pid_;
  std::optional<KernelRing> kernel_;
  std::mutex mutex_;
  std::condition_variable told_;
  bool leader_ = false, closed_ = false;
  unsigned in_flight_ = 0;
  std::unordered_map<Batch *, std::shared_ptr<Batch>> active_;
  std::deque<Batch *> waiting_; // those with reads that were never pushed
  std::deque<Read *> again_;    // to be continued, or tried again
  std::vector<void *> ended_;
  std::vector<double> seconds_;
  std::map<std::pair<std::size_t, std::int64_t>, Fault> faults_;
};

} // namespace flashinfer
