// prefetch: a line of memory on its way to the level-2 cache, for nobody to wait for. PTX ISA 9.7.9.16.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void prefetch_to_l2(char const* place) { asm volatile("prefetch.global.L2 [%0];" ::"l"(place)); }
