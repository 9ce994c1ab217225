// A few threads that wait for work together with the caller.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace anybit {

class Workers {
  public:
    static Workers& instance();

    // Threads that take part in `run`, the caller's included.
    void resize(int count);
    int size() const { return (int)threads_.size() + 1; }

    // Calls task(context, index, size()) once on every thread, index 0 on the caller's, and returns when all have.
    void run(void (*task)(void*, int, int), void* context);

    // The same for a callable.
    template <typename Task>
    void each(const Task& task) {
        run([](void* context, int index, int count) { (*static_cast<const Task*>(context))(index, count); },
            const_cast<Task*>(&task));
    }

    ~Workers();

  private:
    void stop();
    void loop(int index, uint64_t seen);

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> pending_{0};
    bool stopping_ = false;
    void (*task_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
};

}  // namespace anybit
