#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

#include "block.h"
#include "cuda.h"

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr int kResidentBlocks = 4;
constexpr int kPoisonedBytes = 16 << 10;  // of each stack: variables that nobody has written are NaN
constexpr u32 kPoison = 0x7fe07fe0u;

u64 random_state;
void* scheduler_stack;
std::vector<std::unique_ptr<Block>> blocks;

// Goes on where `to` was left, and leaves the present place in `from`.
[[gnu::naked, gnu::noinline]] void switch_stacks(void** /*from*/, void* /*to*/) {
    asm("pushq %rbp\n"
        "pushq %rbx\n"
        "pushq %r12\n"
        "pushq %r13\n"
        "pushq %r14\n"
        "pushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq %rsi, %rsp\n"
        "popq %r15\n"
        "popq %r14\n"
        "popq %r13\n"
        "popq %r12\n"
        "popq %rbx\n"
        "popq %rbp\n"
        "ret\n");
}

void leave() { switch_stacks(&current->stack_pointer, scheduler_stack); }

void live() {
    current->block->launch.kernel();
    current->end();
    leave();
}

// Each stack ends at a page that nobody may touch.
char* new_stacks(int threads) {
    int const flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const memory = mmap(nullptr, std::size_t(threads) * kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) error("no memory for stacks");
    for (int i = 0; i < threads; ++i) mprotect(static_cast<char*>(memory) + i * kStackBytes, 4096, PROT_NONE);
    return static_cast<char*>(memory);
}

Agent* choose(std::vector<Agent*> const& agents) {
    static std::vector<Agent*> ready;
    ready.clear();
    u32 total = 0;
    for (Agent* agent : agents)
        if (agent->ready()) {
            ready.push_back(agent);
            total += agent->weight;
        }
    if (ready.empty()) return nullptr;
    if (total == 0) return ready[random() % ready.size()];
    auto chosen = ready.begin();
    for (u32 place = random() % total; place >= (*chosen)->weight; ++chosen) place -= (*chosen)->weight;
    return *chosen;
}

void change_a_weight(std::vector<Agent*> const& agents) {
    static constexpr u32 kWeights[] = {0, 1, 1, 16, 16, 16, 256, 4096};
    Agent& agent = *agents[random() % agents.size()];
    if (!agent.is_fixed) agent.weight = kWeights[random() % 8];
}

[[noreturn]] void report_deadlock() {
    std::fprintf(stderr, "deadlock: nobody can go on\n");
    for (auto const& block : blocks) {
        for (Warp const& warp : block->warps) {
            std::map<std::string, std::vector<Thread const*>> waiting;
            for (int lane = 0; lane < 32; ++lane) {
                Thread const& thread = block->threads[32 * warp.index + lane];
                char text[64];
                std::snprintf(text, sizeof text, "%s 0x%llx", thread.waits_for, thread.which);
                if (!thread.is_done) waiting[text].push_back(&thread);
            }
            for (auto const& [text, threads] : waiting)
                std::fprintf(stderr, "  block %d warp %d, %zu lanes from %d: wait for %s\n    at %s\n", block->index,
                             warp.index, threads.size(), threads[0]->lane(), text.c_str(),
                             lines_of(stack_of(*threads[0])).c_str());
        }
        for (auto const& [address, barrier] : block->barriers.in_memory)
            std::fprintf(stderr, "  block %d %s: phase %llu, lacks %d of %d arrivals and %lld bytes\n", block->index,
                         barrier.name().c_str(), barrier.phase, barrier.pending, barrier.count, barrier.bytes);
    }
    std::_Exit(3);
}

}  // namespace

u32 random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<u32>(random_state * 0x2545f4914f6cdd1du >> 32);
}

void wait(Waiters& waiters, char const* what, u64 which) {
    waiters.push_back(current);
    current->waits_for = what;
    current->which = which;
    current->warp().ready_lanes &= ~(1u << current->lane());
    if (random() % 1024 == 0) current->warp().is_preempted = true;
    leave();
}

void wake(Waiters& waiters) {
    for (Thread* thread : waiters) thread->warp().ready_lanes |= 1u << thread->lane();
    waiters.clear();
}

void pause(u32 odds) {
    if (random() % odds != 0) return;
    current->warp().is_preempted = true;
    leave();
}

void prepare(Thread& thread, char* stack) {
    thread.stack = stack;
    char* const end = stack + kStackBytes;
    std::fill_n(reinterpret_cast<u32*>(end - kPoisonedBytes), kPoisonedBytes / 4, kPoison);
    void** const top = reinterpret_cast<void**>(end);
    std::fill(top - 8, top, nullptr);  // six registers, where to go, and where that would return to
    top[-2] = reinterpret_cast<void*>(&live);
    thread.stack_pointer = top - 8;
}

void resume(Thread& thread) {
    current = &thread;
    threadIdx.x = thread.index;
    blockIdx.x = thread.block->index;
    switch_stacks(&scheduler_stack, thread.stack_pointer);
    current = nullptr;
}

void run(Launch const& launch, int grid, u64 seed) {
    random_state = (seed + 1) * 0x9e3779b97f4a7c15u | 1;
    for (int i = 0; i < 8; ++i) random();
    gridDim.x = grid;
    std::vector<char*> free_stacks;
    for (int i = 0; i < std::min(grid, kResidentBlocks); ++i) free_stacks.push_back(new_stacks(launch.threads));
    for (int next = 0; next < grid || !blocks.empty();) {
        for (; next < grid && !free_stacks.empty(); free_stacks.pop_back())
            blocks.push_back(std::make_unique<Block>(launch, next++, free_stacks.back()));
        std::vector<Agent*> agents;
        for (auto const& block : blocks)
            for (Agent* agent : block->agents()) agents.push_back(agent);
        auto const has_ended = [](std::unique_ptr<Block> const& block) { return block->alive == 0; };
        auto ended = blocks.end();
        for (int steps = 0; ended == blocks.end(); ended = std::ranges::find_if(blocks, has_ended)) {
            if (steps++ % 48 == 0) change_a_weight(agents);
            Agent* const agent = choose(agents);
            if (agent == nullptr) report_deadlock();
            agent->step();
        }
        (*ended)->check_end();
        free_stacks.push_back((*ended)->threads[0].stack);
        blocks.erase(ended);
    }
}

}  // namespace emulator
