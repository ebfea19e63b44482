// What becomes of a score between q.k and the softmax, pair by pair (cuflash/scores.py: Score).
//
// Maths   s -> softcap tanh(s / softcap);  an expression of it;  + bias;  - slope |i + q_offset - j|;  -inf where the mask hides the pair.
//         Scores come in natural units and leave in units of log2, as the exponentials want them.
#pragma once
#include "../ptx/math.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/movmatrix.cuh"
#include "../ptx/reduction.cuh"
#include "../tile/element.cuh"
#include "../tile/fragment.cuh"
#include "config.cuh"
#include "params.cuh"
#include "score_mod.cuh"

template <class Stored>
struct alignas(2 * sizeof(Stored)) Two {
    Stored x[2];
};
// What an array by pairs holds for accumulators of a warp. Their 16 rows are queries from q_first on, their 8 kN columns keys
// from k_first on; transposed it is the other way round. For pairs that do not exist it is that of a neighbour.
template <bool kTransposed, class Stored, int kN>
struct PairsFragment {
    static constexpr bool kInShared = false;
    // Elements of 16 bits are fetched by two keys of a query, and turned when they are used.
    static constexpr bool kIsTurned = kTransposed && sizeof(Stored) == 2;
    Two<Stored> x[kN][2];

    CUFLASH_DEVICE void fetch(Pairs const& array, char const* origin, Shape const& shape, int q_first, int k_first, int lane) {
        int const row = lane / 4, col = 2 * (lane % 4);
        auto load = [&](int q_idx, int k_idx) {
            return *reinterpret_cast<Stored const*>(array.of_pair(origin, min(q_idx, shape.seqlen_q - 1),
                                                                  min(k_idx, shape.seqlen_k - 1)));
        };
        auto for_each = [&](auto body) {
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) body(x[n][h], n, h);
        };
        if constexpr (kTransposed && !kIsTurned) {
            for_each([&](Two<Stored>& two, int n, int h) {
#pragma unroll
                for (int j = 0; j < 2; ++j) two.x[j] = load(q_first + 8 * n + col + j, k_first + row + 8 * h);
            });
        } else {
            auto query = [&](int n, int h) { return q_first + row + 8 * (kTransposed ? n : h); };
            auto key = [&](int n, int h) { return 8 * (kTransposed ? h : n) + col; };
            constexpr int kKeys = kTransposed ? 16 : 8 * kN;
            char const* const first = origin + k_first * array.key_stride;
            bool const are_pairs =
                array.key_stride == sizeof(Stored) && k_first + kKeys <= shape.seqlen_k &&
                (reinterpret_cast<u64>(first) | static_cast<u64>(array.query_stride)) % sizeof(Two<Stored>) == 0;
            if (are_pairs) {
                for_each([&](Two<Stored>& two, int n, int h) {
                    two = *reinterpret_cast<Two<Stored> const*>(
                        first + min(query(n, h), shape.seqlen_q - 1) * array.query_stride + key(n, h) * sizeof(Stored));
                });
            } else {
                for_each([&](Two<Stored>& two, int n, int h) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) two.x[j] = load(query(n, h), k_first + key(n, h) + j);
                });
            }
        }
    }
    // `use(j, i, x)` of the columns from 8 (n + j) on, j 0 and 1.
    template <class Use>
    CUFLASH_DEVICE void for_two_columns(int n, Use use) const {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Two<Stored> two = x[n + j][h];
                if constexpr (kIsTurned) {
                    u32 const word = movmatrix_trans(two.x[0] | static_cast<u32>(two.x[1]) << 16);
                    two = Two<Stored>{{static_cast<Stored>(word), static_cast<Stored>(word >> 16)}};
                }
                use(j, 2 * h, two.x[0]);
                use(j, 2 * h + 1, two.x[1]);
            }
    }
};

// The same of 16-bit elements whose rows are queries, in a tile in shared memory.
template <class Tile>
struct PairsTile {
    static constexpr bool kInShared = true;
    u32 place;  // lane_address_a of the warp's rows

    template <class Use>
    CUFLASH_DEVICE void for_two_columns(int n, Use use) const {
        u32 words[4];
        ldmatrix_x4(words, Tile::at(place, 0, n));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            use(i / 2, i % 2 * 2, static_cast<u16>(words[i]));
            use(i / 2, i % 2 * 2 + 1, static_cast<u16>(words[i] >> 16));
        }
    }
};

// What mask_blocks.cuh has made of a mask for two rows of accumulators, 8 kN columns: a bit per pair, the first column lowest.
template <int kN>
struct MaskFragment {
    static_assert(kN % 2 == 0, "columns come in blocks of 16");
    u32 words[2][(kN + 3) / 4];  // from the lane's first column of each eight on

    CUFLASH_DEVICE void fetch(MaskBits const& bits, char const* origin, int first_row, int num_rows, int tile, int lane) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int const index = min(first_row + lane / 4 + 8 * h, num_rows - 1);
            char const* const row = origin + index * bits.row_stride + tile * bits.tile_stride;
#pragma unroll
            for (int i = 0; i < (kN + 3) / 4; ++i) {
                u32 word;
                if constexpr (kN % 4 == 0) {
                    word = reinterpret_cast<u32 const*>(row)[i];
                } else {
                    u16 const* const halves = reinterpret_cast<u16 const*>(row) + 2 * i;
                    word = 4 * i + 2 < kN ? halves[0] | static_cast<u32>(halves[1]) << 16 : halves[0];
                }
                words[h][i] = word >> 2 * (lane % 4);
            }
        }
    }
    CUFLASH_DEVICE bool is_visible(int n, int i) const { return words[i / 2][n / 4] >> (8 * (n % 4) + i % 2) & 1; }
};

struct Nothing {
    Nothing() = default;
    CUFLASH_DEVICE Nothing(auto const&, int, int) {}
};
template <bool kIf, class T>
struct OnlyIf {
    using Type = T;
};
template <class T>
struct OnlyIf<false, T> {
    using Type = Nothing;
};

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

// A gradient times a derivative of scores. That of a user's expression may be anything where nothing is seen.
template <ScoreConfig cfg, class Acc>
CUFLASH_DEVICE Acc by_derivative(Acc x, Acc derivative) {
    if constexpr (cfg.mod) return x == 0 ? Acc(0) : x * derivative;
    return x * derivative;
}

// The scores of one query head. `kIs16Bit`: made of 16-bit operands, so that they need not be exact to the last bit.
template <ScoreConfig cfg, class Acc, bool kIs16Bit = false>
struct HeadScores {
    using UserMod = ScoreMod<cfg>;
    static constexpr ScoreConfig kScore = cfg;

    // The user's expression, for this head.
    struct Mod {
        typename UserMod::Params const& params;
        PairIndices<Acc> at;

        template <class Params>
        CUFLASH_DEVICE Mod(Params const& params, int batch, int head)
            : params(params.mod),
              at{params.score.first_batch + batch, head, head / params.shape.group_size, 0, 0, params.mod.seqlen_q,
                 params.mod.seqlen_k, 0, 0} {}
        // The pair so far behind the one from which queries and keys are counted here.
        CUFLASH_DEVICE PairIndices<Acc> pair(int q_first, int k_first, int q_step = 0, int k_step = 0) const {
            PairIndices<Acc> pair = at;
            pair.q_idx = q_first + q_step;
            pair.k_idx = params.first_key + k_first + k_step;
            pair.q_real = static_cast<Acc>(q_first) + static_cast<Acc>(q_step);
            pair.k_real = static_cast<Acc>(params.first_key + k_first) + static_cast<Acc>(k_step);
            return pair;
        }
        CUFLASH_DEVICE void operator()(Acc& s, Acc& derivative, PairIndices<Acc> const& pair) const {
            Acc changed, by_score;
            UserMod::template evaluate<ScoreMath<Acc, kIs16Bit>>(params, s, pair, changed, by_score);
            s = changed;
            derivative *= by_score;
        }
    };
    ScoreParams const& params;
    char const* bias;
    char const* mask;
    char const* bits;
    Acc slope;
    typename OnlyIf<cfg.mod, Mod>::Type mod;

    template <class Params>
    CUFLASH_DEVICE HeadScores(Params const& params, int batch, int head)
        : params(params.score),
          bias(params.score.bias.at(batch, head)),
          mask(params.score.mask.at(batch, head)),
          bits(params.score.mask_bits.at(batch, head)),
          slope(cfg.alibi ? *reinterpret_cast<Acc const*>(params.score.alibi_slopes.at(batch, head)) : Acc(0)),
          mod(params, batch, head) {}

    // Of a pair that exists; `derivative` is that by the score as it came.
    CUFLASH_DEVICE Acc operator()(Acc s, int q_idx, int k_idx) const {
        Acc derivative;
        return (*this)(s, q_idx, k_idx, derivative);
    }
    CUFLASH_DEVICE Acc operator()(Acc s, int q_idx, int k_idx, Acc& derivative) const {
        s = softened(s, derivative);
        if constexpr (cfg.mod) mod(s, derivative, mod.pair(q_idx, k_idx));
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
            if (!__ldg(reinterpret_cast<unsigned char const*>(params.in_mask(mask, q_idx, k_idx)))) s = -infinity();
        }
        return s;
    }
    CUFLASH_DEVICE Acc softened(Acc s, Acc& derivative) const {
        derivative = 1;
        if constexpr (cfg.softcap) {
            Acc const softcap = static_cast<Acc>(params.softcap);
            Acc x;
            if constexpr (kIs16Bit) {
                x = tanh_approx(s / softcap);
            } else {
                x = tanh_acc(s / softcap);
            }
            s = softcap * x;
            derivative = 1 - x * x;
        }
        return s;
    }
    // What the expression reads for a pair: see score_mod.cuh.
    template <class Add>
    CUFLASH_DEVICE void for_each_read(Acc s, int q_idx, int k_idx, Add add) const {
        Acc derivative;
        UserMod::template for_each_read<ScoreMath<Acc, kIs16Bit>>(mod.params, softened(s, derivative),
                                                                  mod.pair(q_idx, k_idx), add);
    }
    CUFLASH_DEVICE Acc distance(int q_idx, int k_idx) const {
        int const x = q_idx + params.q_offset - k_idx;
        return static_cast<Acc>(x < 0 ? -x : x);
    }

    // The order of keys: towards the first one, from the tile with those at the distance 0 on, if slopes make these the largest.
    // For all sizes of tiles of up to 384 queries the same.
    static constexpr bool kTurns = cfg.alibi && !cfg.mask;
    CUFLASH_DEVICE static int pivot(ScoreParams const& params, int q_begin, int block_n) {
        return (q_begin / 384 * 384 + 383 + params.q_offset) / block_n;
    }
    // Whether what is added to scores may be larger for the next keys than for these, a tile from k_first on.
    CUFLASH_DEVICE bool may_grow(int q_first, int k_first, int num_keys, int pivot) const {
        if (cfg.mod || cfg.bias != Bias::kNone || slope <= 0) return true;
        return (!kTurns || k_first <= pivot * num_keys) && q_first + params.q_offset - k_first < num_keys - 1;
    }

    // What accumulators of 8 kN columns need of arrays; it may be fetched some time before.
    template <bool kIsTransposed, int kN,
              class BiasSource = PairsFragment<kIsTransposed, typename Element<bias_dtype(cfg.bias)>::Stored, kN>>
    struct Fetched {
        static constexpr bool kTransposed = kIsTransposed;
        typename OnlyIf<cfg.bias != Bias::kNone, BiasSource>::Type bias;
        typename OnlyIf<cfg.mask, MaskFragment<kN>>::Type mask;
        bool is_partial;  // whether the mask hides any

        // `tile`: the number of the tile that the columns make up.
        CUFLASH_DEVICE void fetch(HeadScores const& head, Shape const& shape, int q_first, int k_first, int tile,
                                  bool is_masked, int lane) {
            if constexpr (cfg.bias != Bias::kNone && !BiasSource::kInShared)
                bias.fetch(head.params.bias, head.bias, shape, q_first, k_first, lane);
            is_partial = is_masked;
            if constexpr (cfg.mask) {
                if (is_partial)
                    mask.fetch(head.params.mask_bits, head.bits, kTransposed ? k_first : q_first,
                               kTransposed ? shape.seqlen_k : shape.seqlen_q, tile, lane);
            }
        }
    };

    // Of accumulators, which hold q.k. Their columns are those of `fetched` from 8 n_first on; q_first or k_first is the first.
    template <int kN, class Held>
    CUFLASH_DEVICE void change(float (&s)[kN][4], float (&derivative)[kN][4], Held const& fetched, int n_first,
                               int q_first, int k_first, int lane) const {
        static_assert(kN % 2 == 0, "columns come in blocks of 16");
        constexpr bool kTransposed = Held::kTransposed;
        auto for_each = [&](auto body) {
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) body(s[n][i], n, i);
        };
        // In units of log2 from the start.
        float const factor = params.factor, natural = cfg.softcap ? params.softcap_f32 : factor, unit = kLog2E * natural;
        for_each([&](float& x, int n, int i) {
            derivative[n][i] = 1.f;
            if constexpr (cfg.softcap) {
                x = kIs16Bit ? tanh_approx(x * factor) : tanh_acc(x * factor);
                derivative[n][i] = 1.f - x * x;
            }
            if constexpr (cfg.mod) {
                x *= natural;
                int const row = acc_row(lane, 0), col = acc_col(lane, 0), down = 8 * (i / 2), along = 8 * n + i % 2;
                mod(x, derivative[n][i],
                    kTransposed ? mod.pair(q_first + col, k_first + row, along, down)
                                : mod.pair(q_first + row, k_first + col, down, along));
                x *= kLog2E;
            } else {
                x *= unit;
            }
        });
        if constexpr (cfg.bias != Bias::kNone) {
            using E = Element<bias_dtype(cfg.bias)>;
#pragma unroll
            for (int n = 0; n < kN; n += 2)
                fetched.bias.for_two_columns(n_first + n, [&](int j, int i, typename E::Stored x) {
                    s[n + j][i] += static_cast<float>(E::widen(x)) * kLog2E;
                });
        }
        if constexpr (cfg.alibi) {
            Distances<kTransposed> const distance(params.q_offset, q_first, k_first, lane);
            float const slope_log2 = static_cast<float>(slope) * kLog2E;
            for_each([&](float& x, int n, int i) { x -= slope_log2 * distance(n, i); });
        }
        if constexpr (cfg.mask) {
            if (!fetched.is_partial) return;
            for_each([&](float& x, int n, int i) {
                if (!fetched.mask.is_visible(n_first + n, i)) x = -infinity();
            });
        }
    }
};
