// What nvcc knows without any header, as far as the kernels use it; their translation units begin with this.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdio>

#include "instructions.h"

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes)

struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

struct Dimensions {
    u32 x;
};
// Those of the thread that runs: the scheduler writes them.
inline Dimensions threadIdx, blockIdx, gridDim;

inline u32 __cvta_generic_to_shared(void const*) { return emulator::kSharedBase; }
// What is touched through it no rule watches over.
inline void* __cvta_shared_to_generic(u32 address) { return emulator::plain_shared(address); }

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
T __ldg(T const* pointer) {
    return *pointer;
}
template <class T>
T __ldcg(T const* pointer) {
    return *pointer;
}
template <class T>
T atomicAdd(T* pointer, T x) {
    emulator::pause(64);
    T const before = *pointer;
    *pointer = before + x;
    return before;
}
inline float __uint_as_float(u32 bits) { return std::bit_cast<float>(bits); }
inline u32 __float_as_uint(float x) { return std::bit_cast<u32>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

inline void __syncwarp() { emulator::meet_warp(); }
inline void __syncthreads() { emulator::meet_block(); }

template <class T>
T __shfl_sync(u32, T x, int lane) {
    return emulator::exchange(x)[lane % 32];
}
template <class T>
T __shfl_xor_sync(u32, T x, int bits) {
    return emulator::exchange(x)[emulator::lane_id() ^ bits];
}
inline bool __any_sync(u32, bool x) {
    for (bool other : emulator::exchange(x))
        if (other) return true;
    return false;
}
inline bool __all_sync(u32 lanes, bool x) { return !__any_sync(lanes, !x); }
inline u32 __ballot_sync(u32, bool x) {
    u32 bits = 0, lane = 0;
    for (bool other : emulator::exchange(x)) bits |= static_cast<u32>(other) << lane++;
    return bits;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
