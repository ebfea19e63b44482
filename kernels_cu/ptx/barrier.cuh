// A named barrier: `threads` threads of the block, whole warps of it, wait for each other. Id 0 is
// __syncthreads. PTX ISA 9.7.13.1.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as one of the threads that the barrier waits for, without waiting itself.
CUFLASH_DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
