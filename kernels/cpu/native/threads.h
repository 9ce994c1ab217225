// A few threads that compute together.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace anybit {

// A number that threads wait for to change: they look at it for a while, then sleep, so that a thread that is not running
// gets their core. On a cache line of its own, as it is looked at while others compute.
class alignas(64) Signal {
  public:
    uint64_t value() const { return value_.load(std::memory_order_acquire); }
    // Adds 1 and wakes who sleeps.
    void advance();
    // Returns once the number is no longer `seen`.
    void wait_while(uint64_t seen, int64_t patience_microseconds);

  private:
    std::atomic<uint64_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// The meeting point of the threads that run the same task.
struct Meeting {
    alignas(64) std::atomic<int> arrived{0};
    Signal rounds;
};

// One thread's view of them.
class Team {
  public:
    Team(int index, int size, Meeting& meeting) : index_(index), size_(size), meeting_(meeting) {}

    int index() const { return index_; }
    int size() const { return size_; }
    // This thread's part of `count` things: first .. last-1.
    int64_t first(int64_t count) const { return count * index_ / size_; }
    int64_t last(int64_t count) const { return count * (index_ + 1) / size_; }
    // Waits until all threads have come here.
    void wait_for_all();

  private:
    int index_, size_;
    Meeting& meeting_;
};

class Workers {
  public:
    static Workers& instance();

    // Threads that take part in `run`, the caller's included.
    void resize(int count);
    int size() const { return (int)threads_.size() + 1; }

    // Calls task(context, team) once on every thread, index 0 on the caller's, and returns when all have.
    void run(void (*task)(void*, Team&), void* context);

    // The same for a callable.
    template <typename Task>
    void each(const Task& task) {
        run([](void* context, Team& team) { (*static_cast<const Task*>(context))(team); }, const_cast<Task*>(&task));
    }

    ~Workers();

  private:
    void stop();
    void loop(int index, uint64_t seen);

    std::vector<std::thread> threads_;
    void (*task_)(void*, Team&) = nullptr;  // null: the threads shall end
    void* context_ = nullptr;
    Signal tasks_;
    Meeting meeting_;
};

}  // namespace anybit
