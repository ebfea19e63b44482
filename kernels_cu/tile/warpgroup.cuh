// Products of one warpgroup on tiles in shared memory.
//
// A tile of 128-byte slabs (swizzle.cuh) is what wgmma calls 128-byte swizzled, so one tile serves both ways: read
// along its rows where they are the reduction axis (Q and K of Q K^T), or across them (V of P V). A step of the
// reduction, 16 elements, then moves 32 bytes within a slab, or 16 rows. The hardware finds the swizzle key in
// the address itself, which is why tiles start on 1024 bytes and steps are plain additions.
#pragma once
#include "../ptx/wgmma.cuh"
#include "fragment.cuh"
#include "swizzle.cuh"

// A matrix descriptor; PTX ISA 9.7.15.5.1.2. All distances in units of 16 bytes.
//   bits 0-13 address, 16-29 from one slab to the next (read across rows only), 32-45 from eight rows to the next
//   eight, 62-63 the swizzle: 1 for 128 bytes.
// Steps change the address alone, so the two halves are kept apart: no carries, and half of it is a constant.
template <class Tile>
struct MatrixDescriptor {
    static_assert(Tile::kSlabBytes == 128, "rows of a tile for wgmma are multiples of 128 bytes");
    static constexpr u32 kHigh = (1u << 30) | (8 * 128 / 16);
    u32 low;

    CUFLASH_DEVICE explicit MatrixDescriptor(u32 smem)
        : low(((smem & 0x3ffffu) >> 4) + (u32{Tile::kSlabStride / 16} << 16)) {}

    // Step k of the reduction, along rows or across them.
    CUFLASH_DEVICE u64 along_rows(int k) const { return at((k % 4) * 2 + (k / 4) * (Tile::kSlabStride / 16)); }
    CUFLASH_DEVICE u64 across_rows(int k) const { return at(k * (16 * 128 / 16)); }

    CUFLASH_DEVICE u64 at(u32 offset) const { return join_words<kHigh>(low + offset); }
};

// acc = A B^T for 64 rows of A from `a` on, and all rows of B.
template <Mma kMma, class TileA, class TileB, int kSteps, int kN>
CUFLASH_DEVICE void warpgroup_gemm_nt(float (&acc)[kN][4], MatrixDescriptor<TileA> a, MatrixDescriptor<TileB> b) {
    constexpr bool kBF16 = kMma == Mma::kBF16;
    wgmma_ss<kBF16, false, false, false>(acc, a.along_rows(0), b.along_rows(0));
#pragma unroll
    for (int k = 1; k < kSteps; ++k)
        wgmma_ss<kBF16, true, false, false>(acc, a.along_rows(k), b.along_rows(k));
}

// acc += A B for 64 rows of A in registers.
template <Mma kMma, class TileB, int kSteps, int kN>
CUFLASH_DEVICE void warpgroup_gemm_nn(float (&acc)[kN][4], FragmentA<kMma> const (&a)[kSteps], MatrixDescriptor<TileB> b) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
        wgmma_rs<kMma == Mma::kBF16, true, true>(acc, a[k].x, b.across_rows(k));
}

// acc = A B for 64 rows of A from `a` on.
template <Mma kMma, class TileA, class TileB, int kSteps, int kN>
CUFLASH_DEVICE void warpgroup_gemm_nn(float (&acc)[kN][4], MatrixDescriptor<TileA> a, MatrixDescriptor<TileB> b) {
    constexpr bool kBF16 = kMma == Mma::kBF16;
    wgmma_ss<kBF16, false, false, true>(acc, a.along_rows(0), b.across_rows(0));
#pragma unroll
    for (int k = 1; k < kSteps; ++k) wgmma_ss<kBF16, true, false, true>(acc, a.along_rows(k), b.across_rows(k));
}

// acc = A^T B^T for 64 columns of A, a slab from `a` on, and all rows of B.
template <Mma kMma, class TileA, class TileB, int kSteps, int kN>
CUFLASH_DEVICE void warpgroup_gemm_tt(float (&acc)[kN][4], MatrixDescriptor<TileA> a, MatrixDescriptor<TileB> b) {
    constexpr bool kBF16 = kMma == Mma::kBF16;
    wgmma_ss<kBF16, false, true, false>(acc, a.across_rows(0), b.along_rows(0));
#pragma unroll
    for (int k = 1; k < kSteps; ++k) wgmma_ss<kBF16, true, true, false>(acc, a.across_rows(k), b.along_rows(k));
}
