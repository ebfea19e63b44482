// Online softmax (Milakov and Gimelshein 2018; Dao 2023, algorithm 1) over the accumulators of one warp.
//
// p = exp2(s * scale_log2 - shift * scale_log2). Any shift gives the same result, so the running maximum
// need not be followed closely: O and the sums are rescaled only when a row's maximum has grown by more
// than kSlackLog2, for a whole warp at a time. p then stays below 2^kSlackLog2, which every dtype holds.
//
// scale_log2 is positive: a negative scale is moved into the scores' sign, and scale 0 becomes a scale
// so small that every product vanishes, because 0 * (-inf) of a hidden score would be NaN.
#pragma once
#include "../ptx/math.cuh"
#include "../ptx/warp.cuh"

template <int kM>
struct OnlineSoftmax {
    static constexpr float kSlackLog2 = 8.f;

    float shift[kM][2];    // per row (g and g + 8 of each m): the maximum that p refers to
    float row_sum[kM][2];  // this lane's part only, until `finish`

    CUFLASH_DEVICE void init() {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                shift[m][h] = -infinity();
                row_sum[m][h] = 0.f;
            }
    }

    // Looks at a new tile of scores; returns whether `o` must be rescaled, and by what.
    template <int kN>
    CUFLASH_DEVICE bool update(float const (&s)[kM][kN][4], float (&alpha)[kM][2], float scale_log2) {
        bool grew = false;
        float row_max[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float x = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < kN; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                row_max[m][h] = quad_max(x);
                grew |= (row_max[m][h] - shift[m][h]) * scale_log2 > kSlackLog2;  // -inf - -inf: NaN, false
            }
        if (!__any_sync(0xffffffffu, grew)) return false;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float const next = fmaxf(shift[m][h], row_max[m][h]);
                // A row that has seen nothing keeps alpha = 1: its sums are 0.
                alpha[m][h] = next == shift[m][h] ? 1.f : exp2_approx((shift[m][h] - next) * scale_log2);
                shift[m][h] = next;
                row_sum[m][h] *= alpha[m][h];
            }
        return true;
    }

    CUFLASH_DEVICE float shift_log2(int m, int h, float scale_log2) const {
        return shift[m][h] == -infinity() ? 0.f : shift[m][h] * scale_log2;
    }

    // Row sums of the whole quad.
    CUFLASH_DEVICE void finish() {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) row_sum[m][h] = quad_sum(row_sum[m][h]);
    }
};

template <int kM, int kN>
CUFLASH_DEVICE void scale_rows(float (&o)[kM][kN][4], float const (&factor)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][n][i] *= factor[m][i / 2];
}
