#include "threads.h"

#include <chrono>

namespace anybit {
namespace {

// How long a thread looks for its next task before it sleeps: longer than the gaps between the operations of a step, and
// far shorter than anybody would notice on a machine that does something else.
constexpr auto kPatience = std::chrono::microseconds(300);
constexpr int kLooksPerClock = 64;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

template <typename Condition>
bool spin_until(Condition condition) {
    for (int look = 0; look < kLooksPerClock; ++look) {
        if (condition()) return true;
        pause();
    }
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    do {
        for (int look = 0; look < kLooksPerClock; ++look) {
            if (condition()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return condition();
}

}  // namespace

Workers& Workers::instance() {
    // Never destroyed: threads may outlive the interpreter's own shutdown.
    static Workers* workers = new Workers;
    return *workers;
}

Workers::~Workers() { stop(); }

void Workers::resize(int count) {
    if (count == size()) return;
    stop();
    for (int index = 1; index < count; ++index) threads_.emplace_back(&Workers::loop, this, index, round_.load());
}

void Workers::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        round_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    stopping_ = false;
}

void Workers::run(void (*task)(void*, Team&), void* context) {
    const int count = size();
    if (count > 1) {
        pending_.store(count - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task;
            context_ = context;
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }
    Team team(0, count, arrived_, phase_);
    task(context, team);
    while (pending_.load(std::memory_order_acquire) > 0)
        if (!spin_until([this] { return pending_.load(std::memory_order_acquire) == 0; })) std::this_thread::yield();
}

// `seen` is the last round before the thread was made: a task given before it runs for the first time is still its task.
void Workers::loop(int index, uint64_t seen) {
    for (;;) {
        if (!spin_until([&] { return round_.load(std::memory_order_acquire) != seen; })) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
        }
        seen = round_.load(std::memory_order_acquire);
        if (stopping_) return;
        Team team(index, size(), arrived_, phase_);
        task_(context_, team);
        pending_.fetch_sub(1, std::memory_order_release);
    }
}

void Team::wait_for_all() {
    if (size_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    // A thread that does not come is not running: others want its core.
    while (!spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; })) std::this_thread::yield();
}

}  // namespace anybit
