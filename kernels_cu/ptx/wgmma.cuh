// wgmma (sm_90a): a warpgroup (four warps) multiplies A (64 x 16) by B (16 x N) into float32 D (64 x N), asynchronously.
// PTX ISA 9.7.15.
//
// Warp w of the four owns rows 16 w .. 16 w + 15 of D, in N / 8 tiles of 16 x 8 whose registers are those of mma.cuh;
// A from registers is laid out as there, too. What lies in shared memory is described by 64 bits (tile/warpgroup.cuh).
//
// Rules: `warpgroup_arrive` after registers were touched and before a product reads them or adds to them;
// `warpgroup_commit` closes a group of products; their registers, those of A included, are not touched until
// `warpgroup_wait` says that the group is done. `warpgroup_pin` keeps the compiler from moving such a touch up.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CUFLASH_DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the newest groups are still running.
template <int kPending>
CUFLASH_DEVICE void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kTiles>
CUFLASH_DEVICE void warpgroup_pin(float (&d)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

// 64 bits of which the upper half is a constant.
template <u32 kHigh>
CUFLASH_DEVICE u64 join_words(u32 low) {
    u64 joined;
    asm("mov.b64 %0, {%1, %2};" : "=l"(joined) : "r"(low), "n"(kHigh));
    return joined;
}

// Registers per thread of this warpgroup from here on, a multiple of 8: given back, or taken from what others gave.
template <int kRegisters>
CUFLASH_DEVICE void warpgroup_release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
CUFLASH_DEVICE void warpgroup_take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The instruction names all of its registers, so every N has a text of its own, put together from pieces of 16 columns:
// the names of 8 registers, and the operands that they stand for.
#define CUFLASH_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CUFLASH_NAMES_32 CUFLASH_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CUFLASH_NAMES_48 CUFLASH_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CUFLASH_NAMES_64 CUFLASH_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CUFLASH_NAMES_80 CUFLASH_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CUFLASH_NAMES_96 CUFLASH_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CUFLASH_NAMES_112 CUFLASH_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define CUFLASH_NAMES_128 CUFLASH_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define CUFLASH_NAMES_144 CUFLASH_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define CUFLASH_NAMES_160 CUFLASH_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define CUFLASH_NAMES_176 CUFLASH_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define CUFLASH_NAMES_192 CUFLASH_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define CUFLASH_NAMES_208 CUFLASH_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define CUFLASH_NAMES_224 CUFLASH_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define CUFLASH_NAMES_240 CUFLASH_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define CUFLASH_NAMES_256 CUFLASH_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define CUFLASH_REGISTERS(n) \
    "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), "+f"(d[n + 1][1]), \
        "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define CUFLASH_REGISTERS_16 CUFLASH_REGISTERS(0)
#define CUFLASH_REGISTERS_32 CUFLASH_REGISTERS_16, CUFLASH_REGISTERS(2)
#define CUFLASH_REGISTERS_48 CUFLASH_REGISTERS_32, CUFLASH_REGISTERS(4)
#define CUFLASH_REGISTERS_64 CUFLASH_REGISTERS_48, CUFLASH_REGISTERS(6)
#define CUFLASH_REGISTERS_80 CUFLASH_REGISTERS_64, CUFLASH_REGISTERS(8)
#define CUFLASH_REGISTERS_96 CUFLASH_REGISTERS_80, CUFLASH_REGISTERS(10)
#define CUFLASH_REGISTERS_112 CUFLASH_REGISTERS_96, CUFLASH_REGISTERS(12)
#define CUFLASH_REGISTERS_128 CUFLASH_REGISTERS_112, CUFLASH_REGISTERS(14)
#define CUFLASH_REGISTERS_144 CUFLASH_REGISTERS_128, CUFLASH_REGISTERS(16)
#define CUFLASH_REGISTERS_160 CUFLASH_REGISTERS_144, CUFLASH_REGISTERS(18)
#define CUFLASH_REGISTERS_176 CUFLASH_REGISTERS_160, CUFLASH_REGISTERS(20)
#define CUFLASH_REGISTERS_192 CUFLASH_REGISTERS_176, CUFLASH_REGISTERS(22)
#define CUFLASH_REGISTERS_208 CUFLASH_REGISTERS_192, CUFLASH_REGISTERS(24)
#define CUFLASH_REGISTERS_224 CUFLASH_REGISTERS_208, CUFLASH_REGISTERS(26)
#define CUFLASH_REGISTERS_240 CUFLASH_REGISTERS_224, CUFLASH_REGISTERS(28)
#define CUFLASH_REGISTERS_256 CUFLASH_REGISTERS_240, CUFLASH_REGISTERS(30)
// N, and the numbers of the operands that follow its registers.
#define CUFLASH_EVERY_N(X) \
    X(16, 8, 9, 10, 11, 12, 13, 14) \
    X(32, 16, 17, 18, 19, 20, 21, 22) \
    X(48, 24, 25, 26, 27, 28, 29, 30) \
    X(64, 32, 33, 34, 35, 36, 37, 38) \
    X(80, 40, 41, 42, 43, 44, 45, 46) \
    X(96, 48, 49, 50, 51, 52, 53, 54) \
    X(112, 56, 57, 58, 59, 60, 61, 62) \
    X(128, 64, 65, 66, 67, 68, 69, 70) \
    X(144, 72, 73, 74, 75, 76, 77, 78) \
    X(160, 80, 81, 82, 83, 84, 85, 86) \
    X(176, 88, 89, 90, 91, 92, 93, 94) \
    X(192, 96, 97, 98, 99, 100, 101, 102) \
    X(208, 104, 105, 106, 107, 108, 109, 110) \
    X(224, 112, 113, 114, 115, 116, 117, 118) \
    X(240, 120, 121, 122, 123, 124, 125, 126) \
    X(256, 128, 129, 130, 131, 132, 133, 134)

#define CUFLASH_WGMMA_SS(N, TYPE, P0, P1, P2, P3, P4)                                                              \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P2 ", 0;\n"                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CUFLASH_NAMES_##N "}, %" #P0 \
                 ", %" #P1 ", add, 1, 1, %" #P3 ", %" #P4 ";\n}\n"                                                 \
                 : CUFLASH_REGISTERS_##N                                                                           \
                 : "l"(a), "l"(b), "r"(static_cast<int>(kAdd)), "n"(static_cast<int>(kTransA)), "n"(static_cast<int>(kTransB)))

#define CUFLASH_WGMMA_RS(N, TYPE, P0, P1, P2, P3, P4, P5, P6)                                                         \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P5 ", 0;\n"                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CUFLASH_NAMES_##N "}, {%" #P0 \
                 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", add, 1, 1, %" #P6 ";\n}\n"                            \
                 : CUFLASH_REGISTERS_##N                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(kAdd)), "n"(static_cast<int>(kTransB)))

// D = A B or, if kAdd, D += A B, both described. An operand lies with its reduction axis (k) along memory rows unless
// it is transposed.
template <bool kBF16, bool kAdd, bool kTransA, bool kTransB, int kTiles>
CUFLASH_DEVICE void wgmma_ss(float (&d)[kTiles][4], u64 a, u64 b) {
#define CUFLASH_CASE(N, P0, P1, P2, P3, P4, P5, P6)                \
    if constexpr (8 * kTiles == N) {                               \
        if constexpr (kBF16)                                       \
            CUFLASH_WGMMA_SS(N, "bf16", P0, P1, P2, P3, P4);       \
        else                                                       \
            CUFLASH_WGMMA_SS(N, "f16", P0, P1, P2, P3, P4);        \
    }
    CUFLASH_EVERY_N(CUFLASH_CASE)
#undef CUFLASH_CASE
}

// The same with A in registers.
template <bool kBF16, bool kAdd, bool kTransB, int kTiles>
CUFLASH_DEVICE void wgmma_rs(float (&d)[kTiles][4], u32 const (&a)[4], u64 b) {
#define CUFLASH_CASE(N, P0, P1, P2, P3, P4, P5, P6)                \
    if constexpr (8 * kTiles == N) {                               \
        if constexpr (kBF16)                                       \
            CUFLASH_WGMMA_RS(N, "bf16", P0, P1, P2, P3, P4, P5, P6); \
        else                                                       \
            CUFLASH_WGMMA_RS(N, "f16", P0, P1, P2, P3, P4, P5, P6);  \
    }
    CUFLASH_EVERY_N(CUFLASH_CASE)
#undef CUFLASH_CASE
}
