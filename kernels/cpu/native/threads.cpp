#include "threads.h"

#include <chrono>

namespace anybit {
namespace {

// How long a thread looks for its next task before it sleeps: longer than the gaps between the operations of a step.
constexpr int64_t kTaskPatience = 300;
// How long it looks for the others: longer than the parts of a step differ, far shorter than the turn of another process.
constexpr int64_t kMeetingPatience = 2000;
constexpr int kLooksPerClock = 64;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

template <typename Condition>
bool spin_until(Condition condition, int64_t microseconds) {
    const auto look = [&] {
        for (int count = 0; count < kLooksPerClock; ++count) {
            if (condition()) return true;
            pause();
        }
        return false;
    };
    if (look()) return true;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    while (std::chrono::steady_clock::now() < deadline)
        if (look()) return true;
    return condition();
}

}  // namespace

void Signal::advance() {
    value_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }  // who is about to sleep sleeps now
    wake_.notify_all();
}

void Signal::wait_while(uint64_t seen, int64_t patience_microseconds) {
    if (spin_until([&] { return value() != seen; }, patience_microseconds)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return value_.load() != seen; });
    sleepers_.fetch_sub(1);
}

void Team::wait_for_all() {
    if (size_ == 1) return;
    const uint64_t round = meeting_.rounds.value();
    if (meeting_.arrived.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        meeting_.arrived.store(0, std::memory_order_relaxed);
        meeting_.rounds.advance();
    } else {
        meeting_.rounds.wait_while(round, kMeetingPatience);
    }
}

Workers& Workers::instance() {
    // Never destroyed: threads may outlive the interpreter's own shutdown.
    static Workers* workers = new Workers;
    return *workers;
}

Workers::~Workers() { stop(); }

void Workers::resize(int count) {
    if (count == size()) return;
    stop();
    for (int index = 1; index < count; ++index) threads_.emplace_back(&Workers::loop, this, index, tasks_.value());
}

void Workers::stop() {
    task_ = nullptr;
    tasks_.advance();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void Workers::run(void (*task)(void*, Team&), void* context) {
    Team team(0, size(), meeting_);
    if (team.size() > 1) {
        task_ = task;
        context_ = context;
        tasks_.advance();
    }
    task(context, team);
    team.wait_for_all();
}

// `seen` is the last task before the thread was made: one given before it runs for the first time is still its task.
void Workers::loop(int index, uint64_t seen) {
    for (;;) {
        tasks_.wait_while(seen, kTaskPatience);
        seen = tasks_.value();
        if (task_ == nullptr) return;
        Team team(index, size(), meeting_);
        task_(context_, team);
        team.wait_for_all();
    }
}

}  // namespace anybit
