#include "pool.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <system_error>
#include <thread>
#include <vector>

namespace flashinfer {
namespace {

constexpr auto SPIN = std::chrono::microseconds(50);  // a decode step has its next job within this time

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Looks at `done` for a short while. The clock is read seldom: it costs more than a look.
template <class F> bool spin_until(const F& done) {
    auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < 16; i++) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

}  // namespace

// `state` holds a job's number (from bit 17 up), whether it is open (bit 16) and how many workers are inside. A worker
// enters with one compare-and-swap, so it can only enter an open job; the caller closes the job when no task is left and
// waits for those inside. Who did not wake up in time is not waited for.
struct Pool::Crew {
    static constexpr std::uint64_t OPEN = 1 << 16, JOB = 1 << 17;

    std::atomic<std::uint64_t> state{0};
    std::atomic<int> next{0}, sleepers{0};
    std::atomic<bool> ended{false}, caller_sleeps{false};
    int tasks = 0;
    Call call = nullptr;
    const void* context = nullptr;
    std::mutex mutex;
    std::condition_variable wake, idle;
    std::vector<std::thread> threads;

    bool news(std::uint64_t last) const {
        std::uint64_t now = state.load();
        return ended.load() || ((now & OPEN) && now / JOB != last);
    }

    void take_tasks(int worker) {
        for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) call(context, task, worker);
    }

    void work(int worker) {
        std::uint64_t last = 0;
        while (true) {
            if (!spin_until([&] { return news(last); })) {
                std::unique_lock lock(mutex);
                sleepers.fetch_add(1);
                wake.wait(lock, [&] { return news(last); });
                sleepers.fetch_sub(1);
            }
            if (ended.load()) return;
            std::uint64_t seen = state.load();
            while ((seen & OPEN) && seen / JOB != last && !state.compare_exchange_weak(seen, seen + 1)) {}
            if (!(seen & OPEN) || seen / JOB == last) continue;
            last = seen / JOB;
            take_tasks(worker);
            if ((state.fetch_sub(1) - 1) % JOB == 0 && caller_sleeps.load()) {
                std::lock_guard lock(mutex);
                idle.notify_one();
            }
        }
    }

    void run(int count, Call function, const void* argument) {
        tasks = count, call = function, context = argument;
        next.store(0, std::memory_order_relaxed);
        state.store((state.load() / JOB + 1) * JOB | OPEN);
        if (sleepers.load()) {
            std::lock_guard lock(mutex);
            wake.notify_all();
        }
        take_tasks(0);
        state.fetch_and(~OPEN);
        auto empty = [this] { return state.load() % JOB == 0; };
        if (spin_until(empty)) return;
        std::unique_lock lock(mutex);
        caller_sleeps.store(true);
        idle.wait(lock, empty);
        caller_sleeps.store(false);
    }

    void end() {
        {
            std::lock_guard lock(mutex);
            ended.store(true);
        }
        wake.notify_all();
        for (auto& thread : threads) thread.join();
    }
};

Pool::Crew* Pool::crew() {
    long process = getpid();
    if (crew_ && owner_ == process) return crew_;
    crew_ = new Crew;  // after a fork the parent's threads are not here; what they left is not touched
    owner_ = process;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    try {
        for (int i = 1; i < threads_; i++) crew_->threads.emplace_back([crew = crew_, i] { crew->work(i); });
    } catch (const std::system_error&) {
        // fewer threads than asked for: the same results, later
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return crew_;
}

void Pool::start(int tasks, Call call, const void* context) {
    if (threads_ == 1 || tasks < 2) {
        for (int task = 0; task < tasks; task++) call(context, task, 0);
        return;
    }
    crew()->run(tasks, call, context);
}

void Pool::close() {
    if (crew_ && owner_ == getpid()) {
        crew_->end();
        delete crew_;
    }
    crew_ = nullptr;
}

}  // namespace flashinfer
