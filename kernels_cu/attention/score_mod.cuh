// Scores that the user programs. For every expression compile.py writes a specialisation of `ScoreMod`, into the entry of the
// kernel, of what is here (cuflash/expression.py says what expressions are).
#pragma once
#include "../ptx/math.cuh"
#include "../tile/element.cuh"
#include "config.cuh"

CUFLASH_DEVICE double tanh_acc(double x) { return tanh(x); }
CUFLASH_DEVICE float tanh_acc(float x) { return tanhf(x); }
// A rational function of least relative error, 3.6e-7 with that of its arithmetic: scores may be small beside the cap, and
// their exponentials take most of what approximates functions already.
CUFLASH_DEVICE float tanh_approx(float x) {
    float const clamped = fminf(fabsf(x), 8.f), t = clamped * clamped;
    float const above = ((1.1428361e-5f * t + 2.9510178e-3f) * t + 0.12925658f) * t + 0.99999988f;
    float const below = (((2.4591912e-7f * t + 2.3866835e-4f) * t + 2.3815529e-2f) * t + 0.46258873f) * t + 1.f;
    return copysignf(clamped * above * reciprocal_approx(below), x);
}

// The pair whose score it is, as the user counts, and the lengths of the call. As real numbers, query and key come from where
// conversions are few: they are slow.
template <class Acc>
struct PairIndices {
    int b, h, h_kv, q_idx, k_idx, seqlen_q, seqlen_k;
    Acc q_real, k_real;
};

// An array that an expression reads elements of; strides in bytes. Indices out of bounds are brought to the nearest that are not.
template <int kAxes>
struct CapturedArray {
    char* pointer;
    i64 strides[kAxes > 0 ? kAxes : 1];
    i32 sizes[kAxes > 0 ? kAxes : 1];

    template <class... Index>
    CUFLASH_DEVICE char const* at(Index... index) const {
        static_assert(sizeof...(Index) == kAxes, "an index per axis");
        char const* place = pointer;
        int axis = 0;
        ((place += min(max(index, 0), sizes[axis] - 1) * strides[axis], ++axis), ...);
        return place;
    }
    // Number of an element in C order.
    template <class... Index>
    CUFLASH_DEVICE i64 number(Index... index) const {
        i64 sum = 0;
        int axis = 0;
        ((sum = sum * sizes[axis] + min(max(index, 0), sizes[axis] - 1), ++axis), ...);
        return sum;
    }
    template <Dtype kDtype, class Acc, class... Index>
    CUFLASH_DEVICE Acc real(Index... index) const {
        using E = Element<kDtype>;
        return static_cast<Acc>(E::widen(__ldg(reinterpret_cast<typename E::Stored const*>(at(index...)))));
    }
    template <class Stored, class... Index>
    CUFLASH_DEVICE int integer(Index... index) const {
        return static_cast<int>(__ldg(reinterpret_cast<Stored const*>(at(index...))));
    }
};

// The functions that expressions know. `kIs16Bit`: of scores that come from 16-bit operands.
template <class Number, bool kIs16Bit>
struct ScoreMath {
    using Acc = Number;

    CUFLASH_DEVICE static Acc exp(Acc x) {
        if constexpr (kIs16Bit) {
            return exp2_approx(x * kLog2E);
        } else {
            return ::exp(x);
        }
    }
    CUFLASH_DEVICE static Acc log(Acc x) {
        if constexpr (kIs16Bit) {
            return log2_approx(x) * kLn2;
        } else {
            return ::log(x);
        }
    }
    CUFLASH_DEVICE static Acc tanh(Acc x) {
        if constexpr (kIs16Bit) {
            return tanh_approx(x);
        } else {
            return tanh_acc(x);
        }
    }
    CUFLASH_DEVICE static Acc divide(Acc a, Acc b) {
        if constexpr (kIs16Bit) {
            return a * reciprocal_approx(b);
        } else {
            return a / b;
        }
    }
    CUFLASH_DEVICE static Acc sqrt(Acc x) { return ::sqrt(x); }
    CUFLASH_DEVICE static Acc sin(Acc x) { return ::sin(x); }
    CUFLASH_DEVICE static Acc cos(Acc x) { return ::cos(x); }
    CUFLASH_DEVICE static Acc power(Acc x, Acc y) { return ::pow(x, y); }
    CUFLASH_DEVICE static Acc abs(Acc x) { return x < 0 ? -x : x; }
    CUFLASH_DEVICE static int abs(int x) { return x < 0 ? -x : x; }
    CUFLASH_DEVICE static Acc floor(Acc x) { return ::floor(x); }
    CUFLASH_DEVICE static Acc floor_divide(Acc a, Acc b) { return ::floor(divide(a, b)); }
    CUFLASH_DEVICE static int floor_divide(int a, int b) {
        int const quotient = a / b;
        return quotient - (quotient * b != a && (a < 0) != (b < 0));
    }
};

// Of an expression:
//     Params                                                  what it reads at run time
//     evaluate<Math>(params, score, pair, changed, by_score)  the changed score and its derivative by the one that came
//     kReads, and for_each_read<Math>(params, score, pair, add): for each element of real numbers that the expression reads
//         add(number of the read, gradient by the array or null, number of the element, derivative of the changed score)
//     for_each_sum(params, use): the first two of these for each read
template <ScoreConfig cfg>
struct ScoreMod;

// What a kernel's launch passes, with that of the expression behind it, if there is one.
template <ScoreConfig cfg, class Base>
struct ModParams : Base {
    alignas(64) typename ScoreMod<cfg>::Params mod;
};
template <bool kIf, class Yes, class No>
struct Either {
    using Type = Yes;
};
template <class Yes, class No>
struct Either<false, Yes, No> {
    using Type = No;
};
template <ScoreConfig cfg, class Base>
using ParamsOf = typename Either<cfg.mod, ModParams<cfg, Base>, Base>::Type;
