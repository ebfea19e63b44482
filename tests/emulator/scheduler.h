// Who goes on next: the order of events is drawn at random, from a seed.
//
// Warps, the copy engine and the tensor cores of a block are agents, and whoever is ready may take the next step.
// Weights that change all the time make some of them fast and others slow; a weight of 0 is as late as can be.
#pragma once
#include <vector>

#include "instructions.h"

namespace emulator {

struct Block;
struct Thread;
using Waiters = std::vector<Thread*>;

u32 random();

struct Agent {
    u32 weight = 16;
    bool is_fixed = false;  // whether the weight stays as it is

    virtual ~Agent() = default;
    virtual bool ready() const = 0;
    virtual void step() = 0;
};

// The current thread waits for `wake`, and then looks again whether it may go on; `what` and `which` are for the report
// if that never comes.
void wait(Waiters& waiters, char const* what, u64 which = 0);
void wake(Waiters& waiters);

// Makes a stack on which a thread begins with its kernel; runs it from there, or where it stopped, to where it waits.
void prepare(Thread& thread, char* stack);
void resume(Thread& thread);
constexpr int kStackBytes = 128 << 10;

// Blocks in ascending order, a few of them at the same time.
void run(Launch const& launch, int grid, u64 seed);

}  // namespace emulator
