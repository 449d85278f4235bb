#include "ring.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <stdexcept>
#include <system_error>

namespace flashinfer {
namespace {

constexpr unsigned MAX_DEPTH = 4096;
constexpr int MAX_TRIES = 1000;               // of one read that brings nothing; then its errno is reported
constexpr std::int64_t MAX_LENGTH = 1 << 30;  // the kernel cuts reads below 2 GiB
constexpr auto LOOK_FOR_SIGNALS = std::chrono::milliseconds(50);

// ECANCELED: the thread that submitted it has exited while the read was with a worker of the kernel.
bool worth_another_try(std::int64_t result) {
  return result == -EINTR || result == -EAGAIN || result == -ECANCELED;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace

Ring::Ring(std::vector<File> files, unsigned depth, bool timed)
    : n_files(files.size()), files_(std::move(files)), depth_(depth), timed_(timed), pid_(getpid()) {
  if (depth < 1 || depth > MAX_DEPTH)
    throw std::invalid_argument("the number of reads in flight must be from 1 to " + std::to_string(MAX_DEPTH));
  kernel_.emplace(depth);
  std::vector<int> fds;
  for (const File &file : files_) {
    fds.push_back(file.fd);
    alignment = std::max(alignment, file.alignment);
  }
  registered = !fds.empty() && kernel_->register_files(fds);
}

Ring::~Ring() {
  try {
    while (!close())
      continue;
  } catch (const std::system_error &) { // the kernel does not answer; its descriptor and memory go all the same
  }
}

void Ring::check_process() const {
  if (getpid() != pid_)
    throw std::invalid_argument("an io_uring does not survive fork(); open the store again in the child");
}

void Ring::submit(std::shared_ptr<Batch> batch) {
  check_process();
  const std::lock_guard lock(mutex_);
  if (closed_)
    throw std::invalid_argument("the reader is closed");
  if (batch->left) {
    waiting_.push_back(batch.get());
    active_.emplace(batch.get(), batch);
  } else {
    ended_.push_back(batch->keep);
  }
  if (!leader_)
    progress(); // fetch results first: they make room
  else
    push_waiting();
}

bool Ring::wait(const Batch &batch) {
  check_process();
  std::unique_lock lock(mutex_);
  while (batch.left)
    if (!wait_step(lock))
      return batch.left == 0;
  return true;
}

bool Ring::close() {
  if (getpid() != pid_) { // the reads are the parent's, and so is the lock, whatever its state
    kernel_.reset();
    return true;
  }
  std::unique_lock lock(mutex_);
  closed_ = true;
  while (!active_.empty() || leader_)
    if (!wait_step(lock))
      return false;
  kernel_.reset();
  return true;
}

// Lets something happen. False: look for signals.
bool Ring::wait_step(std::unique_lock<std::mutex> &lock) {
  if (leader_)
    return told_.wait_for(lock, LOOK_FOR_SIGNALS) == std::cv_status::no_timeout;
  const std::size_t before = ended_.size();
  progress();
  if (ended_.size() != before) // perhaps what the caller waits for: then nothing else may ever come
    return true;
  leader_ = true;
  lock.unlock();
  const int error = kernel_->wait(); // for one: asking for more costs no less, and others may want that one
  lock.lock();
  leader_ = false;
  progress();
  told_.notify_all(); // some have ended, or somebody else has to lead
  if (error && error != EINTR && error != EAGAIN && error != EBUSY)
    throw std::system_error(error, std::generic_category(), "io_uring_enter");
  return error != EINTR;
}

std::vector<void *> Ring::take_ended() {
  if (getpid() != pid_)
    return {};
  const std::lock_guard lock(mutex_);
  return std::exchange(ended_, {});
}

std::vector<double> Ring::take_seconds() {
  const std::lock_guard lock(mutex_);
  return std::exchange(seconds_, {});
}

void Ring::fault(std::size_t file, std::int64_t offset, std::int64_t result, int times) {
  const std::lock_guard lock(mutex_);
  faults_[{file, offset}] = {result, times};
}

void Ring::progress() {
  kernel_->reap([this](std::uint64_t data, std::int32_t result) {
    --in_flight_;
    complete(*reinterpret_cast<Read *>(data), result);
  });
  push_waiting();
}

void Ring::push_waiting() {
  for (;;) {
    while (in_flight_ < depth_ && !(again_.empty() && waiting_.empty())) {
      if (!again_.empty()) {
        push(*again_.front());
        again_.pop_front();
        continue;
      }
      Batch &batch = *waiting_.front();
      push(batch.reads[batch.next++]);
      if (batch.next == batch.reads.size())
        waiting_.pop_front();
    }
    const int error = kernel_->submit();
    if (!error)
      return;
    for (const std::uint64_t data : kernel_->take_back()) { // what is refused for good fails; and then the next
      --in_flight_;
      fail(*reinterpret_cast<Read *>(data), error);
    }
  }
}

void Ring::push(Read &read) {
  if (timed_ && !read.started)
    read.started = now();
  const std::size_t file = read.batch->file;
  abi::Sqe request{};
  request.opcode = abi::OP_READ;
  request.flags = registered ? abi::SQE_FIXED_FILE : 0;
  request.fd = registered ? static_cast<std::int32_t>(file) : files_[file].fd;
  request.offset = static_cast<std::uint64_t>(read.offset + read.done);
  request.address = reinterpret_cast<std::uint64_t>(read.target + read.done);
  request.length = static_cast<std::uint32_t>(std::min(read.length - read.done, MAX_LENGTH));
  request.user_data = reinterpret_cast<std::uint64_t>(&read);
  kernel_->push(request);
  ++in_flight_;
}

void Ring::complete(Read &read, std::int64_t result) {
  const File &file = files_[read.batch->file];
  if (!faults_.empty())
    result = injected(read, result);
  if (worth_another_try(result) && ++read.tries < MAX_TRIES)
    return again(read);
  if (result < 0)
    return fail(read, static_cast<int>(-result));
  const std::int64_t done = read.done + result;
  const std::int64_t resume = done == read.length ? done : done - done % file.alignment;
  if (resume <= read.done)
    return fail(read, 0);
  read.done = resume;
  read.tries = 0;
  if (resume < read.length)
    return again(read);
  if (timed_)
    seconds_.push_back(now() - read.started);
  if (file.forget)
    posix_fadvise(file.fd, read.offset, read.length, POSIX_FADV_DONTNEED);
  end(*read.batch, 1);
}

void Ring::again(Read &read) {
  if (read.batch->failed < 0)
    again_.push_back(&read);
  else
    end(*read.batch, 1);
}

void Ring::fail(Read &read, int error) {
  Batch &batch = *read.batch;
  std::size_t count = 1;
  if (batch.failed < 0) {
    batch.failed = &read - batch.reads.data();
    batch.error = error;
    count += batch.reads.size() - batch.next; // nobody wants the rest any more
    batch.next = batch.reads.size();
    waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &batch), waiting_.end());
  }
  end(batch, count);
}

void Ring::end(Batch &batch, std::size_t count) {
  batch.left -= count;
  if (batch.left)
    return;
  ended_.push_back(batch.keep);
  active_.erase(&batch); // the last use of the batch: it may be gone now
}

// What the tests want this read to have ended with.
std::int64_t Ring::injected(const Read &read, std::int64_t result) {
  for (const std::int64_t offset : {read.offset + read.done, std::int64_t{-1}}) {
    const auto found = faults_.find({read.batch->file, offset});
    if (found == faults_.end() || !found->second.times)
      continue;
    Fault &fault = found->second;
    fault.times -= fault.times > 0;
    return fault.result < 0 ? fault.result : std::min(result, fault.result);
  }
  return result;
}

} // namespace flashinfer
