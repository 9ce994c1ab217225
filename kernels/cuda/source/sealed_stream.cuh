// Sealed pages of many sequences of one token: who attends to which, and their records on the way to shared memory.
//
// Each warp has a ring of slots of its own. A record, a page's keys or its values, is copied as a whole, a slot ahead of its
// turn or several, so that no warp waits for memory with nothing under way.
#pragma once
#include "copies.cuh"
#include "sealed_problem.cuh"

#ifndef STREAM_WARPS  // of a block
#define STREAM_WARPS 8
#endif
#ifndef STREAM_SLOTS  // of a warp's ring
#define STREAM_SLOTS 2
#endif

namespace nested {

constexpr int kSlotBytes = KeyRecord::kBytes > ValueRecord::kBytes ? KeyRecord::kBytes : ValueRecord::kBytes;
constexpr int kRingBytes = STREAM_SLOTS * kSlotBytes;

// A warp's slots, which are read in the order in which they were filled.
struct RecordRing {
    const u8* slots;
    u32 barriers;
    int slot = 0, turn = 0;

    // Before all else, by all lanes.
    __device__ void init() const {
#if __CUDA_ARCH__ >= 900
        if ((threadIdx.x & 31) == 0) {
            for (int i = 0; i < STREAM_SLOTS; ++i) init_barrier(barriers + 8 * i, 1);
            asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
        }
        __syncwarp();
#endif
    }
    // Into the slot that was read last, or nothing.
    __device__ void request(const u8* record, int bytes) const {
#if __CUDA_ARCH__ >= 900
        if (record != nullptr && (threadIdx.x & 31) == 0) {
            expect_bytes(barriers + 8 * slot, bytes);
            copy_bytes_once(shared_address(slots) + slot * kSlotBytes, record, bytes, barriers + 8 * slot);
        }
#else
        if (record != nullptr)
            for (int at = (threadIdx.x & 31) * 16; at < bytes; at += 512) copy_16(shared_address(slots) + slot * kSlotBytes + at, record + at);
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    __device__ void advance() {
        if (++slot == STREAM_SLOTS) slot = 0, turn ^= 1;
    }
    // The record whose turn it is.
    __device__ const u8* wait_for_record() const {
#if __CUDA_ARCH__ >= 900
        wait(barriers + 8 * slot, turn);
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(STREAM_SLOTS - 1) : "memory");
        __syncwarp();
#endif
        return slots + slot * kSlotBytes;
    }
};

// What a warp does: a split of a sequence for a tile of query heads, then one that is as many items further on as there are warps.
// Own pages come first, for nothing of them is under way before their turn.
struct StreamItem {
    int sequence, number, tile;
    TokenSplit split;

    __device__ StreamItem(const SealedProblem& problem, int item, int sequences, int splits, int tiles)
        : sequence(item / tiles % sequences),
          number(splits - 1 - item / tiles / sequences),
          tile(item % tiles),
          split(problem, sequence, number, splits) {}
};

// A warp's items, and the records of their sealed pages: keys, then values of each page.
struct RecordStream {
    const SealedProblem& problem;
    RecordRing ring;
    int sequences, splits, tiles, next_item, next_page = 0, end = 0;
    bool values_next = false;
    const long long* ids = nullptr;
    long long id = 0;  // of the page that is requested next
    int kv_head = 0;

    __device__ RecordStream(const SealedProblem& problem, RecordRing ring, int sequences, int splits, int tiles)
        : problem(problem), ring(ring), sequences(sequences), splits(splits), tiles(tiles), next_item(first_item() - num_warps()) {
        find_item();
        for (int i = 0; i < STREAM_SLOTS; ++i) {
            request_next();
            this->ring.advance();
        }
        this->ring.turn = 0;
    }
    static __device__ int first_item() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }
    static __device__ int num_warps() { return STREAM_WARPS * gridDim.x; }
    __device__ int num_items() const { return sequences * splits * tiles; }
    __device__ StreamItem item(int index) const { return StreamItem(problem, index, sequences, splits, tiles); }

    // The record whose turn it is; `done` with it, the next one takes its slot.
    __device__ const u8* wait_for_record() const { return ring.wait_for_record(); }
    __device__ void done() {
        __syncwarp();
        request_next();
        ring.advance();
    }

    // The next item with sealed pages, if there is one.
    __device__ void find_item() {
        for (next_item += num_warps(); next_item < num_items(); next_item += num_warps()) {
            const StreamItem found = item(next_item);
            if (found.split.is_own || found.split.is_empty()) continue;
            next_page = found.split.begin, end = found.split.end;
            kv_head = found.tile % problem.kv_heads;
            ids = problem.sealed + (size_t)found.sequence * problem.sealed_stride;
            id = ids[next_page];
            return;
        }
    }
    __device__ void request_next() {
        const size_t place = (size_t)id * problem.kv_heads + kv_head;
        const bool exists = next_page < end;
        if (!values_next) {
            ring.request(exists ? problem.keys + place * KeyRecord::kBytes : nullptr, KeyRecord::kBytes);
        } else {
            ring.request(exists ? problem.values + place * ValueRecord::kBytes : nullptr, ValueRecord::kBytes);
            if (++next_page < end) {
                id = ids[next_page];
            } else if (next_item < num_items()) {
                find_item();
            }
        }
        values_next = !values_next;
    }
};

}  // namespace nested
