#include "block.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace emulator {

Warp& Thread::warp() const { return block->warps[index / 32]; }
TensorCore& Thread::tensor_core() const { return block->tensor_cores[index / 128]; }

void Thread::end() {
    if (products.issued != products.settled) error("a thread ends before wgmma that it has issued");
    for (auto const& group : copy_groups)
        if (!group.empty()) error("a thread ends before cp.async that it has ordered");
    if (!stores.empty()) error("a thread ends before copies that it has ordered");
    is_done = true;
    warp().ready_lanes &= ~(1u << lane());
    --warp().alive;
    warp().meet_if_complete();
    --block->alive;
}

// Lanes in any order, until none can go on or one lets others go first.
void Warp::step() {
    is_preempted = false;
    while (ready_lanes != 0 && !is_preempted) {
        int const first = random() % 32;
        int const lane = (first + std::countr_zero(std::rotr(ready_lanes, first))) % 32;
        resume(block.threads[32 * index + lane]);
    }
}

void Warp::meet_if_complete() {
    if (arrived == 0 || arrived < alive) return;
    arrived = 0;
    ++meetings;
    std::memset(words[meetings % 2], 0, sizeof words[0]);  // whoever ends before the next meeting shows zeros there
    polls.clear();
    for (int lane = 0; lane < 32; ++lane) block.threads[32 * index + lane].polls = 0;
    wake(waiters);
}

Block::Block(Launch const& launch, int index, char* stacks)
    : launch(launch), index(index), alive(launch.threads), shared(kSharedBase + launch.shared_bytes) {
    threads.resize(launch.threads);
    for (int i = 0; i < launch.threads; ++i) {
        threads[i].index = i;
        threads[i].block = this;
        prepare(threads[i], stacks + i * kStackBytes);
    }
    for (int i = 0; i < launch.threads / 32; ++i) warps.emplace_back(*this, i);
    int const registers = std::min(65536 / launch.threads / 8 * 8, 255);
    for (int i = 0; i < launch.threads / 128; ++i) tensor_cores.emplace_back(*this, i, registers);
    // In half of the blocks an engine works only when nobody else can go on, or whenever it has something to do.
    auto fix = [](Agent& agent, u32 choice) {
        agent.is_fixed = choice < 2;
        if (agent.is_fixed) agent.weight = choice == 0 ? 0 : 1 << 20;
    };
    fix(copy_engine, random() % 4);
    u32 const choice = random() % 4;
    for (TensorCore& tensor_core : tensor_cores) fix(tensor_core, choice);
}

std::vector<Agent*> Block::agents() {
    std::vector<Agent*> all{&copy_engine};
    for (Warp& warp : warps) all.push_back(&warp);
    for (TensorCore& tensor_core : tensor_cores) all.push_back(&tensor_core);
    return all;
}

void Block::check_end() const {
    if (copy_engine.ready())
        error("block %d ends before a copy of %s", index, line_of(copy_engine.copies[0].by).c_str());
    for (auto const& [address, barrier] : barriers.in_memory)
        if (barrier.bytes != 0)
            error("block %d ends, and %s lacks %lld bytes", index, barrier.name().c_str(), barrier.bytes);
    int registers = 0;
    for (TensorCore const& tensor_core : tensor_cores) registers += tensor_core.registers;
    if (registers * 128 > 65536) error("warpgroups take more registers than there are");
}

int lane_id() { return current->lane(); }

void meet_warp() {
    Warp& warp = current->warp();
    u64 const meeting = warp.meetings;
    ++warp.arrived;
    warp.meet_if_complete();
    if (warp.meetings == meeting) wait(warp.waiters, "its warp");
    pause(8);
}

void exchange_bytes(void const* mine, void* all, int bytes) {
    Warp& warp = current->warp();
    auto& words = warp.words[warp.meetings % 2];
    std::memcpy(words[current->lane()], mine, bytes);
    meet_warp();
    for (int lane = 0; lane < 32; ++lane) std::memcpy(static_cast<char*>(all) + lane * bytes, words[lane], bytes);
}

namespace {

Waiters semaphore_waiters;

}  // namespace

// A thread that keeps finding the same number waits until some semaphore changes: in a loop it could always go on, so
// that nothing else would be late, and a deadlock would not show.
int load_acquire(int const* semaphore) {
    pause(2);
    Thread::Look& last = current->last_look;
    bool const is_same = semaphore == last.semaphore && *semaphore == last.value;
    last = {semaphore, *semaphore, is_same ? last.times + 1 : 1};
    if (last.times > 4) wait(semaphore_waiters, "semaphore other than", last.value);
    return *semaphore;
}

void store_release(int* semaphore, int value) {
    pause(4);
    *semaphore = value;
    wake(semaphore_waiters);
}

void add_release(int* semaphore, int x) {
    pause(4);
    *semaphore += x;
    wake(semaphore_waiters);
}

}  // namespace emulator
