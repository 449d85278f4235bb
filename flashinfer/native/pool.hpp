// A few threads that share out tasks; the caller is one of them.
#pragma once

#include <cstdint>
#include <mutex>

namespace flashinfer {

// Tasks are handed out one by one, so a thread that is held up by other programs holds up nothing else. Which thread
// runs a task must therefore not matter. Threads start with the first task that is worth it, and again after a fork.
class Pool {
   public:
    explicit Pool(int threads) : threads_(threads) {}
    ~Pool() { close(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Who computes holds this: one job at a time.
    std::unique_lock<std::mutex> exclusive() { return std::unique_lock(busy_); }

    // f(task, worker) for every task in [0, tasks); worker < threads() is one thread's own. f must not throw.
    template <class F> void run(int tasks, const F& f) {
        start(tasks, [](const void* context, int task, int worker) { (*static_cast<const F*>(context))(task, worker); },
              &f);
    }

    // Ends the threads. Idempotent; a later job starts them again.
    void close();

   private:
    struct Crew;
    using Call = void (*)(const void* context, int task, int worker);

    void start(int tasks, Call call, const void* context);
    Crew* crew();

    int threads_;
    std::mutex busy_;
    Crew* crew_ = nullptr;
    long owner_ = 0;
};

}  // namespace flashinfer
