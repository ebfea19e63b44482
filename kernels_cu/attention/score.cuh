// What becomes of a score between q.k and the softmax, pair by pair (cuflash/scores.py: Score).
//
// Maths   s -> softcap tanh(s / softcap);  + bias;  - slope |i + q_offset - j|;  -inf where the mask hides the pair.
//         Scores come in natural units and leave in units of log2, as the exponentials want them.
#pragma once
#include "../ptx/math.cuh"
#include "../tile/element.cuh"
#include "config.cuh"
#include "params.cuh"

CUFLASH_DEVICE double tanh_acc(double x) { return tanh(x); }
CUFLASH_DEVICE float tanh_acc(float x) { return tanhf(x); }
// With an error of 2^-23 of 1, not of x.
CUFLASH_DEVICE float tanh_of_1(float x) { return 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(x * (2.f * kLog2E))); }

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
    CUFLASH_DEVICE Acc distance(int q_idx, int k_idx) const { return distance(params, q_idx, k_idx); }
    CUFLASH_DEVICE static Acc distance(ScoreParams const& params, int q_idx, int k_idx) {
        int const x = q_idx + params.q_offset - k_idx;
        return static_cast<Acc>(x < 0 ? -x : x);
    }
};
