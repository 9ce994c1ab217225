#include "threads.h"

#include <chrono>

namespace anybit {
namespace {

// How long a thread looks for its next task before it sleeps: longer than the gaps within one step of a model, and
// far shorter than anybody would notice on a machine that does something else.
constexpr auto kPatience = std::chrono::microseconds(100);
constexpr int kLooksPerClock = 64;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

template <typename Condition>
bool spin_until(Condition condition) {
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

void Workers::run(void (*task)(void*, int, int), void* context) {
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
    task(context, 0, count);
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
        task_(context_, index, size());
        pending_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace anybit
