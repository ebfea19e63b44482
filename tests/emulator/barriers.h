// Barriers that threads wait at: named ones of a block, and those in shared memory.
#pragma once
#include <map>
#include <string>

#include "report.h"
#include "scheduler.h"

namespace emulator {

struct NamedBarrier {
    int arrived = 0;
    int threads = 0;  // the first to arrive says how many there are
    u64 phase = 0;
    Waiters waiters;
};

struct Mbarrier {
    u32 address;
    int count;    // arrivals that end a phase
    int pending;  // those that this phase still lacks
    i64 bytes;    // announced, and not yet here
    u64 phase;
    Stack initialised;
    Waiters waiters;

    std::string name() const;
    void complete_bytes(int number, Place by);
    void end_phase_if_complete();
};

struct Barriers {
    NamedBarrier named[16];
    std::map<u32, Mbarrier> in_memory;

    Mbarrier& at(u32 address);
};

}  // namespace emulator
