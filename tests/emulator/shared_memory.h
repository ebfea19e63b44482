// The shared memory of a block, and the rules for touching it.
//
// Threads load and store; the copy engine and the tensor cores read and write by themselves, some time after they were
// told to. In between nobody may disturb them. They see what a thread has stored only after that thread's proxy fence.
#pragma once
#include <vector>

#include "instructions.h"
#include "report.h"

namespace emulator {

struct Block;

struct SharedMemory {
    static constexpr u32 kChunk = 16;            // bytes that engines move as one
    static constexpr u32 kEmpty = 0x7fc07fc0u;   // NaN, also as two 16-bit numbers: never written
    static constexpr u32 kComing = 0x7fd07fd0u;  // NaN: a copy is on its way

    // The last store to four bytes: by whom, and after how many of its fences.
    struct Store {
        int thread = -1;
        u32 fences = 0;
        Place by = nullptr;
    };

    std::vector<char> memory;
    std::vector<u16> readers;      // of each chunk: products that have yet to read it
    std::vector<u16> writers;      // and copies that have yet to write it
    std::vector<bool> is_barrier;  // of each 8 bytes
    std::vector<Store> stores;     // of each 4 bytes

    explicit SharedMemory(u32 bytes);
    void check_bounds(u32 address, u32 bytes, u32 alignment, char const* what) const;
    void check_store(u32 address, u32 bytes, char const* what) const;
    void store(u32 address, void const* source, u32 bytes, Place by);
    void fill(u32 address, u32 bytes, u32 word);

    // By engines, 16 bytes at a time; `by` is the instruction that ordered it.
    void read_chunk(u32 address, void* target, Place by, Block const& block) const;
    void write_chunk(u32 address, void const* source);
};

// Engines permute 16-byte chunks among 128 bytes: bits 4-6 of an address change by its bits 7-9.
inline u32 swizzled(u32 address) { return address ^ (address >> 3 & 0x70u); }

}  // namespace emulator
