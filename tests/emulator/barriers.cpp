#include "barriers.h"

#include <cstdio>

#include "block.h"

namespace emulator {

void meet_block() { named_barrier(0, current->block->launch.threads, true); }

void named_barrier(int id, int threads, bool waits) {
    if (id < 0 || id > 15 || threads <= 0 || threads % 32 != 0) error("barrier %d for %d threads", id, threads);
    pause(8);
    NamedBarrier& barrier = current->block->barriers.named[id];
    if (barrier.arrived == 0) barrier.threads = threads;
    if (barrier.threads != threads) error("barrier %d for %d threads and for %d", id, barrier.threads, threads);
    trace("barrier %d: %d of %d", id, barrier.arrived + 1, threads);
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.phase;
        wake(barrier.waiters);
        return;
    }
    for (u64 const phase = barrier.phase; waits && barrier.phase == phase;) wait(barrier.waiters, "named barrier", id);
}

std::string Mbarrier::name() const {
    char text[40];
    std::snprintf(text, sizeof text, "mbarrier 0x%x of ", address);
    return text + lines_of(initialised);
}

void Mbarrier::complete_bytes(int number, Place by) {
    bytes -= number;
    if (bytes < 0)
        error("%s: %d bytes come, ordered at %s, which is %lld more than announced", name().c_str(), number,
              line_of(by).c_str(), -bytes);
    end_phase_if_complete();
}

void Mbarrier::end_phase_if_complete() {
    if (pending > 0 || bytes > 0) return;
    trace("mbarrier 0x%x ends phase %llu", address, phase);
    ++phase;
    pending = count;
    wake(waiters);
}

Mbarrier& Barriers::at(u32 address) {
    auto const found = in_memory.find(address);
    if (found == in_memory.end()) error("there is no mbarrier at 0x%x", address);
    return found->second;
}

void mbarrier_init(u32 address, int count) {
    shared().check_bounds(address, 8, 8, "mbarrier_init");
    shared().check_store(address, 8, "mbarrier_init");
    if (count < 1) error("mbarrier_init for %d arrivals", count);
    shared().is_barrier[address / 8] = true;
    current->block->barriers.in_memory[address] = Mbarrier{address, count, count, 0, 0, stack_of(*current), {}};
}

void mbarrier_arrive(u32 address, int bytes) {
    pause(4);
    current->last_look = {};
    Mbarrier& barrier = current->block->barriers.at(address);
    trace("mbarrier 0x%x: arrival %d of %d, and %d bytes announced", address, barrier.count - barrier.pending + 1,
          barrier.count, bytes);
    barrier.bytes += bytes;
    if (--barrier.pending < 0)
        error("%s: more than %d arrivals in phase %llu", barrier.name().c_str(), barrier.count, barrier.phase);
    barrier.end_phase_if_complete();
    pause(4);
}

namespace {

// Looks whether the phase of this parity has ended, or waits for it: once for all lanes that come here together.
bool poll(u32 address, u32 parity, bool is_test) {
    pause(8);
    Mbarrier& barrier = current->block->barriers.at(address);
    if (parity > 1) error("%s: parity %u", barrier.name().c_str(), parity);
    std::vector<Warp::Poll>& polls = current->warp().polls;
    u32 const number = current->polls++;
    u64 const phase = barrier.phase;
    for (;;) {
        if (number < polls.size() && polls[number].address == address && polls[number].parity == parity &&
            polls[number].is_test == is_test)
            return polls[number].result;
        bool const has_ended = barrier.phase % 2 != parity;
        if (has_ended || is_test) {
            if (number == polls.size()) polls.push_back({address, parity, is_test, has_ended});
            return has_ended;
        }
        if (barrier.phase != phase)
            error("%s: phases %llu and %llu ended before a thread that waited looked again", barrier.name().c_str(),
                  phase, phase + 1);
        trace("waits for mbarrier 0x%x, parity %u", address, parity);
        wait(barrier.waiters, "mbarrier", address);
    }
}

}  // namespace

void mbarrier_wait(u32 address, u32 parity) { poll(address, parity, false); }
bool mbarrier_test(u32 address, u32 parity) { return poll(address, parity, true); }

}  // namespace emulator
