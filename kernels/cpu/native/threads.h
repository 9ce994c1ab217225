// A few threads that compute together.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace anybit {

// One thread's view of the threads that run the same task.
class Team {
  public:
    Team(int index, int size, std::atomic<int>& arrived, std::atomic<int>& phase)
        : index_(index), size_(size), arrived_(arrived), phase_(phase) {}

    int index() const { return index_; }
    int size() const { return size_; }
    // This thread's part of `count` things: first .. last-1.
    int64_t first(int64_t count) const { return count * index_ / size_; }
    int64_t last(int64_t count) const { return count * (index_ + 1) / size_; }
    // Waits until all threads have come here.
    void wait_for_all();

  private:
    int index_, size_;
    std::atomic<int>&arrived_, &phase_;
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
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
    void (*task_)(void*, Team&) = nullptr;
    void* context_ = nullptr;
    // On cache lines of their own: threads look at them while others compute.
    alignas(64) std::atomic<uint64_t> round_{0};
    alignas(64) std::atomic<int> pending_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
};

}  // namespace anybit
