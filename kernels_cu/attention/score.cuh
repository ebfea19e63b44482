// What becomes of a score between q.k and the softmax, pair by pair (cuflash/scores.py: Score).
//
// Maths   s -> softcap tanh(s / softcap);  + bias;  - slope |i + q_offset - j|;  -inf where the mask hides the pair.
//         Scores come in natural units and leave in units of log2, as the exponentials want them.
#pragma once
#include "../ptx/math.cuh"
#include "../ptx/reduction.cuh"
#include "../tile/element.cuh"
#include "../tile/fragment.cuh"
#include "config.cuh"
#include "params.cuh"

CUFLASH_DEVICE double tanh_acc(double x) { return tanh(x); }
CUFLASH_DEVICE float tanh_acc(float x) { return tanhf(x); }
// With an error of 2^-23 of 1, not of x.
CUFLASH_DEVICE float tanh_of_1(float x) { return 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(x * (2.f * kLog2E))); }

// What an array by pairs holds for accumulators of a warp: `use(n, i, x)`. Their 16 rows are queries from q_first on, their
// columns keys from k_first on; transposed it is the other way round. For pairs that do not exist it is that of a neighbour.
template <class Stored>
struct alignas(2 * sizeof(Stored)) Two {
    Stored x[2];
};
template <bool kTransposed, class Stored, int kN, class Use>
CUFLASH_DEVICE void for_each_pair(Pairs const& array, char const* origin, Shape const& shape, int q_first, int k_first,
                                  int lane, Use use) {
    auto load = [](char const* place) { return __ldg(reinterpret_cast<Stored const*>(place)); };
    int const row = lane / 4, col = 2 * (lane % 4);
    if constexpr (kTransposed) {
        char const* keys[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) keys[h] = origin + min(k_first + row + 8 * h, shape.seqlen_k - 1) * array.key_stride;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                i64 const offset = min(q_first + 8 * n + col + j, shape.seqlen_q - 1) * array.query_stride;
#pragma unroll
                for (int h = 0; h < 2; ++h) use(n, 2 * h + j, load(keys[h] + offset));
            }
    } else {
        char const* rows[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
            rows[h] = origin + min(q_first + row + 8 * h, shape.seqlen_q - 1) * array.query_stride;
        i64 const first = (k_first + col) * array.key_stride;
        bool const are_pairs = array.key_stride == sizeof(Stored) && k_first + 8 * kN <= shape.seqlen_k &&
                               (reinterpret_cast<u64>(rows[0] + first) | reinterpret_cast<u64>(rows[1] + first)) %
                                       sizeof(Two<Stored>) == 0;
        if (are_pairs) {
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    auto const two = *reinterpret_cast<Two<Stored> const*>(rows[h] + first + 8 * n * sizeof(Stored));
                    use(n, 2 * h, two.x[0]);
                    use(n, 2 * h + 1, two.x[1]);
                }
        } else {
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    i64 const offset = min(k_first + 8 * n + col + j, shape.seqlen_k - 1) * array.key_stride;
#pragma unroll
                    for (int h = 0; h < 2; ++h) use(n, 2 * h + j, load(rows[h] + offset));
                }
        }
    }
}

// |q_idx + q_offset - k_idx| of accumulators; a float holds it exactly up to 2^24.
template <bool kTransposed>
struct Distances {
    float first;

    CUFLASH_DEVICE Distances(int q_offset, int q_first, int k_first, int lane) {
        int const row = lane / 4, col = 2 * (lane % 4);
        first = static_cast<float>(q_first + q_offset - k_first + (kTransposed ? col - row : row - col));
    }
    CUFLASH_DEVICE float operator()(int n, int i) const {
        int const x = 8 * (i / 2) - (8 * n + i % 2);
        return fabsf(first + static_cast<float>(kTransposed ? -x : x));
    }
};

// Adds gradients by what was added to scores, in accumulators whose rows are keys, to where they are summed up. Along axes of
// stride 0 the warp's own are summed first: additions to one place come one after the other.
template <int kN>
CUFLASH_DEVICE void add_by_pairs(Pairs const& sums, char* origin, float const (&x)[kN][4], int q_first, int k_first,
                                 int lane) {
    auto add = [&](float value, int q_idx, int k_idx) {
        // Where P is 0, hidden or past the ends, there is nothing to add.
        if (value != 0.f)
            reduce_add<1>(reinterpret_cast<float*>(origin + q_idx * sums.query_stride + k_idx * sums.key_stride), &value);
    };
    int const row = lane / 4, col = 2 * (lane % 4);
    if (sums.query_stride != 0 && sums.key_stride != 0) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) add(x[n][i], q_first + 8 * n + acc_col(lane, i), k_first + acc_row(lane, i));
    } else if (sums.key_stride != 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < kN; ++n) sum += x[n][2 * h] + x[n][2 * h + 1];
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            if (lane % 4 == 0) add(sum, 0, k_first + row + 8 * h);
        }
    } else {
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float sum = x[n][j] + x[n][2 + j];
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
                if (sums.query_stride != 0) {
                    if (row == 0) add(sum, q_first + 8 * n + col + j, 0);
                } else {
                    total += sum;
                }
            }
        if (sums.query_stride == 0) {
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
            if (lane == 0) add(total, 0, 0);
        }
    }
}

// The scores of one query head. `kIs16Bit`: made of 16-bit operands, so that they need not be exact to the last bit.
template <ScoreConfig cfg, class Acc, bool kIs16Bit = false>
struct HeadScores {
    ScoreParams const& params;
    char const* bias;
    char const* mask;
    Acc slope;

    CUFLASH_DEVICE HeadScores(ScoreParams const& params, int batch, int head)
        : params(params),
          bias(params.bias.at(batch, head)),
          mask(params.mask.at(batch, head)),
          slope(cfg.alibi ? *reinterpret_cast<Acc const*>(params.alibi_slopes.at(batch, head)) : Acc(0)) {}

    // Of a pair that exists; `derivative` is that by the score as it came.
    CUFLASH_DEVICE Acc operator()(Acc s, int q_idx, int k_idx) const {
        Acc derivative;
        return (*this)(s, q_idx, k_idx, derivative);
    }
    CUFLASH_DEVICE Acc operator()(Acc s, int q_idx, int k_idx, Acc& derivative) const {
        derivative = 1;
        if constexpr (cfg.softcap) {
            Acc const softcap = static_cast<Acc>(params.softcap);
            Acc x;
            if constexpr (kIs16Bit) {
                x = tanh_of_1(s / softcap);
            } else {
                x = tanh_acc(s / softcap);
            }
            s = softcap * x;
            derivative = 1 - x * x;
        }
        if constexpr (cfg.bias != Bias::kNone) {
            using E = Element<bias_dtype(cfg.bias)>;
            s += static_cast<Acc>(
                E::widen(__ldg(reinterpret_cast<typename E::Stored const*>(params.bias.of_pair(bias, q_idx, k_idx)))));
        }
        if constexpr (cfg.alibi) {
            s -= slope * distance(q_idx, k_idx);
        }
        s *= Log2<Acc>::kE;
        if constexpr (cfg.mask) {
            if (!__ldg(reinterpret_cast<unsigned char const*>(params.mask.of_pair(mask, q_idx, k_idx)))) s = -infinity();
        }
        return s;
    }
    CUFLASH_DEVICE Acc distance(int q_idx, int k_idx) const {
        int const x = q_idx + params.q_offset - k_idx;
        return static_cast<Acc>(x < 0 ? -x : x);
    }

    // Of accumulators, which hold q.k; see `for_each_pair`.
    template <bool kTransposed, int kN>
    CUFLASH_DEVICE void change(float (&s)[kN][4], float (&derivative)[kN][4], float scale, Shape const& shape, int q_first,
                               int k_first, int lane, bool is_masked = true) const {
        auto for_each = [&](auto body) {
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) body(s[n][i], n, i);
        };
        // In units of log2 from the start.
        float const softcap = static_cast<float>(params.softcap), unit = kLog2E * (cfg.softcap ? softcap : scale);
        float const factor = scale / softcap;
        for_each([&](float& x, int n, int i) {
            derivative[n][i] = 1.f;
            if constexpr (cfg.softcap) {
                x = kIs16Bit ? tanh_of_1(x * factor) : tanh_acc(x * factor);
                derivative[n][i] = 1.f - x * x;
            }
            x *= unit;
        });
        if constexpr (cfg.bias != Bias::kNone) {
            using E = Element<bias_dtype(cfg.bias)>;
            for_each_pair<kTransposed, typename E::Stored, kN>(
                params.bias, bias, shape, q_first, k_first, lane,
                [&](int n, int i, typename E::Stored x) { s[n][i] += static_cast<float>(E::widen(x)) * kLog2E; });
        }
        if constexpr (cfg.alibi) {
            Distances<kTransposed> const distance(params.q_offset, q_first, k_first, lane);
            float const slope_log2 = static_cast<float>(slope) * kLog2E;
            for_each([&](float& x, int n, int i) { x -= slope_log2 * distance(n, i); });
        }
        if constexpr (cfg.mask) {
            if (!is_masked) return;
            for_each_pair<kTransposed, unsigned char, kN>(params.mask, mask, shape, q_first, k_first, lane,
                                                          [&](int n, int i, unsigned char is_visible) {
                                                              if (!is_visible) s[n][i] = -infinity();
                                                          });
        }
    }
    template <bool kTransposed, int kN>
    CUFLASH_DEVICE void change(float (&s)[kN][4], float scale, Shape const& shape, int q_first, int k_first, int lane,
                               bool is_masked = true) const {
        float derivative[kN][4];
        change<kTransposed>(s, derivative, scale, shape, q_first, k_first, lane, is_masked);
    }
};
