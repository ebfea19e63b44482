// Products of one warp: kM x 16 rows, kN x 8 columns. kUnroll is how many steps of the reduction are written out.
#pragma once
#include "../ptx/opaque.cuh"
#include "fragment.cuh"

template <int kM, int kN>
CUFLASH_DEVICE void set_zero(float (&acc)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
}

template <int kM, int kN>
CUFLASH_DEVICE void add_tiles(float (&acc)[kM][kN][4], float const (&tile)[kM][2][4], int n) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n + j][i] += tile[m][j][i];
}

// acc += A B^T with A stored [rows][k] and B stored [n][k], both in shared memory.
template <Mma kMma, class TileA, class TileB, int kSteps, int kUnroll = kSteps, int kM, int kN>
CUFLASH_DEVICE void gemm_nt(float (&acc)[kM][kN][4], u32 a_lane, u32 b_lane) {
    static_assert(kN % 2 == 0, "B is loaded 16 columns at a time");
    if constexpr (kMma == Mma::kTF32x3) {
        // The small terms are summed apart: every addition of the tensor core cuts off, relative to what it
        // adds to, so a third as many additions to the large sum leave a third of the error.
        constexpr int kSlabSteps = TileA::kSlabBytes / 32;
        constexpr int kUnrollSlabs = kUnroll < kSlabSteps ? 1 : kUnroll / kSlabSteps;
        static_assert(TileA::kSlabBytes == TileB::kSlabBytes, "both operands have the same reduction axis");
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            float small[kM][2][4];
            set_zero(small);
#pragma unroll kUnrollSlabs
            for (int slab = 0; slab < kSteps / kSlabSteps; ++slab)
#pragma unroll
                for (int k = 0; k < kSlabSteps; ++k) {
                    FragmentB<kMma> b[2];
                    load_b<kMma, TileB>(b, b_lane + slab * TileB::kSlabStride, 8 * n, k);
#pragma unroll
                    for (int m = 0; m < kM; ++m) {
                        FragmentA<kMma> a;
                        load_a<kMma, TileA>(a, a_lane + slab * TileA::kSlabStride, 16 * m, k);
#pragma unroll
                        for (int j = 0; j < 2; ++j) mma_step_split(acc[m][n + j], small[m][j], a, b[j]);
                    }
                }
            add_tiles(acc, small, n);
        }
    } else {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            FragmentA<kMma> a[kM];
#pragma unroll
            for (int m = 0; m < kM; ++m) load_a<kMma, TileA>(a[m], a_lane, 16 * m, k);
#pragma unroll
            for (int n = 0; n < kN; n += 2) {
                FragmentB<kMma> b[2];
                load_b<kMma, TileB>(b, b_lane, 8 * n, k);
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    mma_step<kMma>(acc[m][n], a[m], b[0]);
                    mma_step<kMma>(acc[m][n + 1], a[m], b[1]);
                }
            }
        }
    }
}

// The same for one warp's 16 rows with B in global memory, rows first_row.. of it, for when B has left shared memory; it
// need not be fast. Elements past the ends count as zero, and kPairs says that they come in aligned pairs.
template <Mma kMma, class TileA, bool kPairs, int kSteps, int kN>
CUFLASH_DEVICE void gemm_nt_gmem(float (&acc)[1][kN][4], u32 a_lane, char const* b, i64 row_stride, int first_row,
                                 int num_rows, int num_cols, int lane) {
    static_assert(is_16bit(kMma), "a register of B holds two elements");
#pragma unroll 1
    for (int k = 0; k < kSteps; ++k) {
        FragmentA<kMma> a;
        load_a<kMma, TileA>(a, a_lane, 0, k);
        int const col = 16 * k + 2 * (lane % 4);
        int rows_left = num_rows - first_row - lane / 4;
        char const* source = b + (first_row + lane / 4) * row_stride + col * 2;
#pragma unroll
        for (int n = 0; n < kN; ++n, rows_left -= 8, source += 8 * row_stride) {
            FragmentB<kMma> fragment;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u16 const* const pair = reinterpret_cast<u16 const*>(source) + 8 * j;
                int const cols_left = rows_left > 0 ? num_cols - col - 8 * j : 0;
                u32 value = 0;
                if constexpr (kPairs) {
                    if (cols_left > 0) value = __ldg(reinterpret_cast<u32 const*>(pair));
                } else {
                    if (cols_left > 0) value = __ldg(pair);
                    if (cols_left > 1) value |= static_cast<u32>(__ldg(pair + 1)) << 16;
                }
                fragment.x[j] = value;
            }
            mma_step<kMma>(acc[0][n], a, fragment);
            // One load after the other: together they would take more registers than there are.
            __syncwarp();
            opaque(rows_left);
        }
    }
}

// One k-step of acc += A B with A in registers and B stored [k][n]; columns of acc beyond B's stay as they are.
template <Mma kMma, class TileB, int kM, int kN>
CUFLASH_DEVICE void gemm_nn_step(float (&acc)[kM][kN][4], FragmentA<kMma> const (&a)[kM], u32 b_lane, int k_step) {
    static_assert(TileB::kCols <= 8 * kN, "acc has a column for each of B");
#pragma unroll
    for (int n = 0; n < TileB::kCols / 8; n += 2) {
        FragmentB<kMma> b[2];
        load_b_trans<kMma, TileB>(b, b_lane, k_step, 8 * n);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            mma_step<kMma>(acc[m][n], a[m], b[0]);
            mma_step<kMma>(acc[m][n + 1], a[m], b[1]);
        }
    }
}

// acc += A B with A in registers and B stored [k][n], for 32-bit elements and sums over many tiles: the
// tensor core cuts sums off instead of rounding them, which over thousands of keys would become a bias. So
// the tile is summed from zero and added by a rounding addition.
template <Mma kMma, class TileB, int kM, int kN, int kSteps>
CUFLASH_DEVICE void gemm_nn_rounded(float (&acc)[kM][kN][4], FragmentA<kMma> const (&a)[kM][kSteps], u32 b_lane) {
    static_assert(TileB::kCols <= 8 * kN, "acc has a column for each of B");
#pragma unroll
    for (int n = 0; n < TileB::kCols / 8; n += 2) {
        float tile[kM][2][4];
        set_zero(tile);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            FragmentB<kMma> b[2];
            load_b_trans<kMma, TileB>(b, b_lane, k, 8 * n);
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int j = 0; j < 2; ++j) mma_step<kMma>(tile[m][j], a[m][k], b[j]);
        }
        add_tiles(acc, tile, n);
    }
}

// acc += X B with X the accumulators of an earlier product and B stored [k][n].
template <Mma kMma, class TileB, int kM, int kN, int kX>
CUFLASH_DEVICE void gemm_acc_nn(float (&acc)[kM][kN][4], float const (&x)[kM][kX][4], u32 b_lane) {
    constexpr int kSteps = kX * 8 / step_elems(kMma);
    if constexpr (is_16bit(kMma)) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            FragmentA<kMma> a[kM];
#pragma unroll
            for (int m = 0; m < kM; ++m) acc_to_a(a[m], x[m], k);
            gemm_nn_step<kMma, TileB>(acc, a, b_lane, k);
        }
    } else {
        FragmentA<kMma> a[kM][kSteps];
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int m = 0; m < kM; ++m) acc_to_a(a[m][k], x[m], k);
        gemm_nn_rounded<kMma, TileB>(acc, a, b_lane);
    }
}

// acc += A^T B with A stored [k][rows] and B stored [k][n], both in shared memory. The warp's rows and columns
// come 16 at a time, kEveryM and kEveryN times 16 apart: warps that share a tile take them in turn.
template <Mma kMma, class TileA, class TileB, int kSteps, int kUnroll, int kEveryM, int kEveryN, int kM, int kN>
CUFLASH_DEVICE void gemm_tn(float (&acc)[kM][kN][4], u32 a_lane, u32 b_lane) {
    static_assert(kN % 2 == 0, "B is loaded 16 columns at a time");
#pragma unroll kUnroll
    for (int k = 0; k < kSteps; ++k) {
        FragmentA<kMma> a[kM];
#pragma unroll
        for (int m = 0; m < kM; ++m) load_a_trans<kMma, TileA>(a[m], a_lane, k, 16 * kEveryM * m);
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            FragmentB<kMma> b[2];
            load_b_trans<kMma, TileB>(b, b_lane, k, 8 * kEveryN * n);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma_step<kMma>(acc[m][n], a[m], b[0]);
                mma_step<kMma>(acc[m][n + 1], a[m], b[1]);
            }
        }
    }
}
