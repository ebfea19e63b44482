// Hiding scores of a boundary tile: the only place where visibility is decided per element.
#pragma once
#include "../ptx/math.cuh"
#include "../tile/fragment.cuh"
#include "params.cuh"

// Scores of this lane's queries and of keys k_idx.. (8 per n) held as accumulators; hidden becomes `hidden`.
template <int kM, int kN>
CUFLASH_DEVICE void mask_scores(float (&s)[kM][kN][4], Shape const& shape, int const (&q_idx)[kM][2], int k_idx,
                                int lane, float hidden = -infinity()) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int const q = q_idx[m][half];
            // Relative to the lane's first column, so that columns are compared as constants.
            int const origin = k_idx + acc_col(lane, 0);
            int const begin = q + shape.lower - origin;
            int const end = min(shape.seqlen_k, q + shape.upper + 1) - origin;
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (8 * n + i < begin || 8 * n + i >= end) s[m][n][2 * half + i] = hidden;
        }
}

// The transposed tile of the backward: probabilities of keys k_idx.. (16 per m) and queries q_idx.. (8 per n);
// hidden becomes 0, whatever it was.
template <int kM, int kN>
CUFLASH_DEVICE void mask_probabilities(float (&p)[kM][kN][4], Shape const& shape, int k_idx, int q_idx, int lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int const k = k_idx + 16 * m + acc_row(lane, 2 * half);
            int const begin = k - shape.upper - q_idx;
            int const end = k < shape.seqlen_k ? min(shape.seqlen_q, k - shape.lower + 1) - q_idx : 0;
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    int const q = 8 * n + acc_col(lane, i);
                    if (q < begin || q >= end) p[m][n][i] = 0.f;
                }
        }
}

// One pair; false as well for what is past the ends.
CUFLASH_DEVICE bool is_visible(Shape const& shape, int q_idx, int k_idx) {
    return q_idx < shape.seqlen_q && k_idx < shape.seqlen_k && k_idx >= q_idx + shape.lower &&
           k_idx <= q_idx + shape.upper;
}
