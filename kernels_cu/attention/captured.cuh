// Sums of the gradients by what an expression captures (score_mod.cuh), pair by pair.
#pragma once
#include "score.cuh"

CUFLASH_DEVICE void add_to(float* gmem, float x) { atomicAdd(gmem, x); }
CUFLASH_DEVICE void add_to(double* gmem, double x) { atomicAdd(gmem, x); }

// What a warp adds. A lane keeps what it has for an element until some lane comes to another one; what all lanes have for the
// same is then added up first: additions to one place come one after the other.
template <class Changes, class Acc>
struct CapturedSums {
    static constexpr int kReads = Changes::UserMod::kReads;
    Changes const& scores;
    i64 element[kReads];
    Acc sum[kReads];

    CUFLASH_DEVICE explicit CapturedSums(Changes const& scores) : scores(scores) {
#pragma unroll
        for (int r = 0; r < kReads; ++r) {
            element[r] = 0;
            sum[r] = 0;
        }
    }
    // By all lanes: a score q.k times scale, and the gradient by what the expression makes of it.
    CUFLASH_DEVICE void add(Acc s, Acc d_changed, int q_idx, int k_idx) {
        scores.for_each_read(s, q_idx, k_idx, [&](auto number, char* sums, i64 index, Acc derivative) {
            constexpr int r = decltype(number)::value;
            if (sums == nullptr) return;
            if (__any_sync(0xffffffffu, index != element[r])) {
                leave<r>(sums);
                element[r] = index;
            }
            sum[r] += by_derivative<Changes::kScore>(d_changed, derivative);
        });
    }
    CUFLASH_DEVICE void finish() {
        Changes::UserMod::for_each_sum(scores.mod.params, [&](auto number, char* sums) {
            if (sums != nullptr) leave<decltype(number)::value>(sums);
        });
    }
    template <int r>
    CUFLASH_DEVICE void leave(char* sums) {
        Acc x = sum[r];
        sum[r] = 0;
        bool const is_one = __all_sync(0xffffffffu, element[r] == __shfl_sync(0xffffffffu, element[r], 0));
        if (is_one) {
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
        }
        if (x != 0 && (!is_one || threadIdx.x % 32 == 0)) add_to(reinterpret_cast<Acc*>(sums) + element[r], x);
    }
};
