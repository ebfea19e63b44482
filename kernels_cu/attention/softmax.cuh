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

    // As if every row had seen a key of this score already, whose value is 0.
    CUFLASH_DEVICE void init_sink(float score, int lane) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                shift[m][h] = score;
                row_sum[m][h] = lane % 4 == 0 && score != -infinity() ? 1.f : 0.f;
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

// Online softmax that looks for maxima only when it must, for a warp with 16 rows (g and g + 8).
//
// Any shift gives the same result as long as no weight overflows, and an overflow shows in the sum of the weights, which
// is needed anyway. So weights are computed with the shift that is there, and maxima are looked for when a row
// sees its first keys (`settle`), or when the sum says that the shift has become too small: then the scores, which
// the weights have replaced, are computed again, and `raise` finds a new shift. The first is once per row, the
// second rare: the weights of a lane have to sum to more than kLimit.
//
// scale_log2 has the sign of the scale, and is never 0: hidden scores are infinite, with the sign that makes their weights
// vanish.
struct EagerSoftmax {
    static constexpr float kLimit = 16384.f;  // of the weights of one lane and tile; float16 holds each of them
    static constexpr float kSlackLog2 = 7.f;  // of one weight, so that not even all of them together are too large

    float shift[2];    // log2 units; +inf for a row that has seen no key, whose weights therefore are 0
    float row_sum[2];  // this lane's part only, until `finish`
    bool unseen;       // whether a row of the warp has seen no key

    CUFLASH_DEVICE void init() {
        shift[0] = shift[1] = infinity();
        row_sum[0] = row_sum[1] = 0.f;
        unseen = true;
    }

    template <int kN>
    CUFLASH_DEVICE static float row_max(float const (&s)[kN][4], int h, float scale_log2) {
        float part[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i] = s[i / 2][2 * h + i % 2] * scale_log2;
#pragma unroll
        for (int i = 4; i < 2 * kN; ++i) part[i % 4] = fmaxf(part[i % 4], s[i / 2][2 * h + i % 2] * scale_log2);
        return quad_max(fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3])));
    }

    // Rows that see their first keys take the maximum as shift.
    template <int kN>
    CUFLASH_DEVICE void settle(float const (&s)[kN][4], float scale_log2) {
        bool none = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float const top = row_max(s, h, scale_log2);
            if (shift[h] == infinity() && top > -infinity()) shift[h] = top;
            none |= shift[h] == infinity();
        }
        unseen = __any_sync(0xffffffffu, none);
    }

    // One more key, of this score and value 0; before any other has been added.
    CUFLASH_DEVICE void add_sink(float score_log2, int lane) {
        if (score_log2 == -infinity()) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            shift[h] = shift[h] == infinity() ? score_log2 : fmaxf(shift[h], score_log2);
            row_sum[h] = lane % 4 == 0 ? exp2_approx(score_log2 - shift[h]) : 0.f;
        }
        unseen = false;
    }

    // Whether scores of a row of the warp are far above its shift.
    template <int kN>
    CUFLASH_DEVICE bool has_outgrown(float const (&s)[kN][4], float scale_log2) const {
        bool grew = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = -infinity();
#pragma unroll
            for (int i = 0; i < 2 * kN; ++i) top = fmaxf(top, s[i / 2][2 * h + i % 2] * scale_log2);
            grew |= top - shift[h] > kSlackLog2;
        }
        return __any_sync(0xffffffffu, grew);
    }

    // Moves the shift up to the maximum; alpha is what sums so far have to be multiplied by.
    template <int kN>
    CUFLASH_DEVICE void raise(float const (&s)[kN][4], float (&alpha)[2], float scale_log2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float const next = fmaxf(shift[h], row_max(s, h, scale_log2));
            alpha[h] = next == shift[h] ? 1.f : exp2_approx(shift[h] - next);
            shift[h] = next;
            row_sum[h] *= alpha[h];
        }
    }

    // From scores to weights, in place; `sum` is that of this tile, not yet added.
    template <int kN>
    CUFLASH_DEVICE void weigh(float (&s)[kN][4], float (&sum)[2], float scale_log2) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            sum[h] = 0.f;
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    s[n][i] = exp2_approx(s[n][i] * scale_log2 - shift[h]);
                    sum[h] += s[n][i];
                }
        }
    }

    // Whether the weights of all rows of the warp are good; adds their sums if so.
    CUFLASH_DEVICE bool accept(float const (&sum)[2]) {
        bool const good = sum[0] <= kLimit && sum[1] <= kLimit;  // not if it is NaN
        if (!__all_sync(0xffffffffu, good)) return false;
        add(sum);
        return true;
    }
    CUFLASH_DEVICE void add(float const (&sum)[2]) {
        row_sum[0] += sum[0];
        row_sum[1] += sum[1];
    }

    CUFLASH_DEVICE void finish() {
        row_sum[0] = quad_sum(row_sum[0]);
        row_sum[1] = quad_sum(row_sum[1]);
    }

    // Natural logarithm of the sum of exp(score), once finished.
    CUFLASH_DEVICE float lse(int h) const {
        return row_sum[h] == 0.f ? -infinity() : (shift[h] + log2_approx(row_sum[h])) * kLn2;
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
