// What the wrappers in ptx/ are made of: one function per family of instructions. All act for the thread that runs.
#pragma once
#include <array>
#include <initializer_list>

#include "types.h"

namespace emulator {

constexpr u32 kSharedBase = 1024;  // where a kernel's own shared memory begins

int lane_id();
void pause(u32 odds = 16);  // once in `odds` times others go first
[[noreturn, gnu::format(printf, 1, 2)]] void error(char const* format, ...);

// ---- warps and blocks ----
void meet_warp();
void meet_block();
void named_barrier(int id, int threads, bool waits);
void exchange_bytes(void const* mine, void* all, int bytes);

// What each lane of the warp shows; zeros for those that have ended.
template <class T>
std::array<T, 32> exchange(T const& mine) {
    std::array<T, 32> all;
    exchange_bytes(&mine, all.data(), sizeof(T));
    return all;
}

// ---- shared memory ----
void load_shared(u32 address, void* target, int bytes);
void store_shared(u32 address, void const* source, int bytes);
void* plain_shared(u32 address);
void proxy_fence();

template <class T>
T load_shared(u32 address) {
    T value;
    load_shared(address, &value, sizeof(T));
    return value;
}

// ---- barriers in shared memory ----
void mbarrier_init(u32 address, int count);
void mbarrier_arrive(u32 address, int bytes);
void mbarrier_wait(u32 address, u32 parity);
bool mbarrier_test(u32 address, u32 parity);

// ---- semaphores in global memory, between blocks ----
int load_acquire(int const* semaphore);
void store_release(int* semaphore, int value);
void add_release(int* semaphore, int x);

// ---- copies between global and shared memory ----
void copy_box(u32 target, void const* map, u32 barrier, std::initializer_list<int> corner);
void copy_bytes(u32 target, char const* source, int bytes, u32 barrier);
void cp_async(u32 target, void const* source, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);
void bulk_store(char* target, u32 source, int bytes);
void bulk_finish();

// ---- products ----
enum class Element { kF16, kBF16, kTF32 };

// D (64 x 8 tiles) = A B, or D += A B: what all threads of a warpgroup have to say alike.
struct ProductKind {
    int tiles;
    Element element;
    bool adds, transposes_a, transposes_b, a_in_registers;
    u64 a, b;  // descriptors

    bool operator==(ProductKind const&) const = default;
};
void wgmma(ProductKind const& kind, float* d, u32 const* a_registers);
void wgmma_arrive();
void wgmma_commit();
void wgmma_wait(int pending);
void set_registers(int number, bool takes);

// C (16 x 8) += A B, of a warp; the reduction has 16 steps, or 8 of tf32.
void mma(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1, Element element);

// ---- the way in: memory file, its address, parameter file, grid and seed are the arguments ----
struct Launch {
    int threads;
    int shared_bytes;
    void (*kernel)();
};
int main(char** arguments, void* parameters, int size, Launch const& launch);

}  // namespace emulator
