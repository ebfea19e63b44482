// Named barriers: bar.sync waits for `threads` threads of the block, bar.arrive only counts as one of them.
// Id 0 is __syncthreads. What a thread wrote before it arrived is visible after the others' bar.sync.
// PTX ISA 9.7.13.1.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

CUFLASH_DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
