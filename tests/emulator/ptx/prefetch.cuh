// prefetch: nobody can see it.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void prefetch_to_l2(char const*) {}
