// A thread block: its threads, warps, memory and engines.
#pragma once
#include "barriers.h"
#include "copy_engine.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "tensor_core.h"

namespace emulator {

struct Warp;

// A thread is a fiber: it has a stack of its own and runs until it waits.
struct Thread {
    // Looks at a semaphore, with no arrival between them, that showed the same number each time.
    struct Look {
        int const* semaphore;
        int value, times;
    };

    int index;
    Block* block;
    char* stack;
    void* stack_pointer;
    bool is_done = false;
    char const* waits_for = "";
    u64 which = 0;
    u32 fences = 0;  // proxy fences so far
    u32 polls = 0;   // looks at barriers since its warp last met
    Look last_look = {};
    IssuedProducts products;
    std::vector<Copy> open_copies;  // by cp.async
    std::deque<std::vector<Copy>> copy_groups;
    std::vector<BulkStore> stores;

    int lane() const { return index % 32; }
    Warp& warp() const;
    TensorCore& tensor_core() const;
    void end();
};

struct Warp : Agent {
    // What a lane saw at a barrier. Hardware shows all lanes that look together the same, and kernels rely on it: here
    // a lane that looks later gets the answer of the first.
    struct Poll {
        u32 address, parity;
        bool is_test, result;
    };

    Block& block;
    int index;
    u32 ready_lanes = ~0u;
    int alive = 32;
    int arrived = 0;  // lanes that wait for the others
    u64 meetings = 0;
    Waiters waiters;
    bool is_preempted = false;
    std::vector<Poll> polls;
    char words[2][32][32] = {};  // what lanes show each other, of this meeting and the last

    Warp(Block& block, int index) : block(block), index(index) {}
    bool ready() const override { return ready_lanes != 0; }
    void step() override;
    void meet_if_complete();
};

struct Block {
    Launch const& launch;
    int index;
    int alive;
    SharedMemory shared;
    Barriers barriers;
    CopyEngine copy_engine{*this};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<TensorCore> tensor_cores;  // one per warpgroup

    Block(Launch const& launch, int index, char* stacks);
    std::vector<Agent*> agents();
    void check_end() const;
};

// The thread that runs.
extern Thread* current;
inline SharedMemory& shared() { return current->block->shared; }

}  // namespace emulator
