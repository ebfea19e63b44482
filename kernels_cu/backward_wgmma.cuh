// Attention backward on Hopper (sm_90a), main step: wgmma fed by the tensor memory accelerator.
//
// What    d_k, d_v, and the sum over key blocks that becomes d_q; as in backward_mma.cuh. A thread block works on tiles
//         of block_n keys, one after the other, and for each goes through the queries that see them.
// Maths   everything transposed, a row per key:    S^T  = K Q^T                          [64, block_m] per warpgroup
//                                                  P^T  = exp2(S^T scale_log2 - lse_log2)
//                                                  dP^T = V dO^T
//                                                  dS^T = P^T o (dP^T - delta)
//         sums over queries, in registers:         dV  += P^T dO,  dK += dS^T Q           [64, head_dim(_v)]
//         sum over keys, in global memory:         dQ  += dS K                            [block_m, head_dim]
// Blocks  a tile is (block_n keys, key/value head, batch), numbered by `TileOrder`; there is a thread block per
//         multiprocessor, and each claims the next tile when it is done with the one before. The query heads that share
//         a key/value head follow one another. Where all tiles are alike, the last ones, of which not every block would
//         get one, are claimed in parts (`TileParts`), and what a block has of their d_k and d_v is left to backward_gather.cuh.
// Who     warpgroup 0 produces: one thread claims tiles and orders K and V, and Q, dO and the two numbers per row of each
//         step (attention/backward_steps.cuh); two others see to the order in which blocks add to d_q, where that is fixed,
//         and one fills with zeros what blocks are going to add to.
//         Two warpgroups consume.
//         By keys (head dims up to 128): each owns 64 keys. P^T and dS^T stay in its registers, as operands of dV and dK.
//         By role (wider heads, whose dV and dK do not fit the registers of one): both have the same 64 keys. The first
//         computes P and dV, and hands P over through shared memory; the second computes dS and dK.
//         dQ needs the keys of all, so dS goes through shared memory. Each warpgroup computes some of the rows of dQ or,
//         transposed, some of its columns, and adds them to the workspace right from its registers.
// Order   by keys: the tensor core computes dP beside P, dV beside dS, then dQ of the step before, dK, and, with
//         `overlap`, S of the next step. dQ comes a step late so that warpgroups need not be in step, and one's products
//         run beside the other's weights: each waits only for the others' dS of the step before. With `overlap` that goes
//         on across tiles: the last step of one leads S of the next one's first, which adds the last one's dQ. By role dQ
//         is late for the same reason.
//         Deterministic: blocks add to a tile of dQ in the order of their keys, the last keys first. Tiles are numbered in
//         that order, too, so a block waits only for tiles that were claimed before its own, and somebody can always go on.
// Source  Dao 2023 (FlashAttention-2), algorithm 2; Shah et al. 2024 (FlashAttention-3), section 3.
#pragma once
#include "attention/backward_steps.cuh"
#include "attention/epilogue.cuh"
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "attention/score.cuh"
#include "ptx/barrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/stmatrix.cuh"
#include "tile/gemm.cuh"
#include "tile/warpgroup.cuh"

template <BackwardWgmmaConfig cfg>
struct BackwardConsumer {
    using Steps = BackwardSteps<cfg>;
    using Position = typename Steps::Position;
    using Tiles = typename Steps::Tiles;
    using TileK = typename Tiles::K;
    using TileV = typename Tiles::V;
    using TileQ = typename Tiles::Q;
    using TileDO = typename Tiles::dO;
    using TileDS = typename Tiles::dS;
    static constexpr Mma kMma = cfg.mma;
    static constexpr int kN = cfg.block_m / 8;
    static constexpr int kSteps = cfg.block_m / 16;
    static constexpr int kNDQ = (cfg.dq_transposed() ? cfg.block_m : cfg.head_dim) / 8;
    using Scores = float[1][kN][4];
    using Weights = FragmentA<kMma>[kSteps];

    Steps const& steps;
    int const consumer;
    int const warp;
    int const lane;
    u64 const seed;
    Position at;
    typename Steps::TilePosition tile;

    CUFLASH_DEVICE typename Steps::Work work() const { return steps.work(tile); }
    // For the whole warp, no lane of which is behind: what they have read has gone into a product since, and all lanes issue
    // products together.
    CUFLASH_DEVICE void release(u32 barrier) const {
        if (lane == 0) mbarrier_arrive(barrier);
    }

    // ---- products; their groups are committed here ----
    // A row of scores per key: 64 keys from row `row` of `keys` on.
    CUFLASH_DEVICE void issue_scores(Scores& s, Position of, u32 keys, int row) const {
        warpgroup_arrive();
        warpgroup_gemm_nt<kMma, TileK, TileQ, cfg.head_dim / 16>(
            s[0], MatrixDescriptor<TileK>(keys + row * TileK::kSlabBytes), MatrixDescriptor<TileQ>(steps.q(of)));
        warpgroup_commit();
    }
    CUFLASH_DEVICE void issue_dp(Scores& dp, int row) const {
        warpgroup_arrive();
        warpgroup_gemm_nt<kMma, TileV, TileDO, cfg.head_dim_v / 16>(
            dp[0], MatrixDescriptor<TileV>(steps.v(tile) + row * TileV::kSlabBytes),
            MatrixDescriptor<TileDO>(steps.d_out(at)));
        warpgroup_commit();
    }
    // acc += weights rows, where rows are Q or dO.
    template <class Tile, int kCols>
    CUFLASH_DEVICE static void issue_sum(float (&acc)[kCols][4], Weights const& weights, u32 rows) {
        warpgroup_arrive();
        warpgroup_gemm_nn<kMma, Tile, kSteps>(acc, weights, MatrixDescriptor<Tile>(rows));
        warpgroup_commit();
    }
    // 64 rows of dQ or, transposed, 64 columns: the share of this number.
    CUFLASH_DEVICE void issue_dq(float (&dq)[kNDQ][4], Position of, u32 keys, int share) const {
        constexpr int kKeySteps = cfg.block_n / 16;
        warpgroup_arrive();
        if constexpr (cfg.dq_transposed()) {
            warpgroup_gemm_tt<kMma, TileK, TileDS, kKeySteps>(
                dq, MatrixDescriptor<TileK>(keys + share * TileK::kSlabStride),
                MatrixDescriptor<TileDS>(steps.ds(of)));
        } else {
            warpgroup_gemm_nn<kMma, TileDS, TileK, kKeySteps>(
                dq, MatrixDescriptor<TileDS>(steps.ds(of) + share * (64 * TileDS::kSlabBytes)),
                MatrixDescriptor<TileK>(keys));
        }
        warpgroup_commit();
    }

    // ---- log-sum-exps or deltas of the queries of a step ----
    // Behind additions to global memory shared memory answers late. So what is there is fetched before, if there are
    // registers for it.
    static constexpr bool kFetchAhead = !cfg.by_role() && cfg.head_dim > 64;
    struct Numbers {
        u32 place;
        uint2 fetched[kFetchAhead ? kN : 1];

        CUFLASH_DEVICE void fetch(u32 numbers, int lane) {
            place = numbers + acc_col(lane, 0) * 4;
            if constexpr (kFetchAhead) {
#pragma unroll
                for (int n = 0; n < kN; ++n) fetched[n] = ld_shared_v2(place + n * 32);
            }
        }
        // Those of accumulators [n].
        CUFLASH_DEVICE float2 operator()(int n) const {
            uint2 const words = kFetchAhead ? fetched[n] : ld_shared_v2(place + n * 32);
            return float2{__uint_as_float(words.x), __uint_as_float(words.y)};
        }
    };

    // ---- what is done to scores, by role ----
    using Changes = HeadScores<cfg.score, float, true>;
    using Fetched = typename Changes::template Fetched<true, kN>;
    CUFLASH_DEVICE Changes changes() const { return Changes(steps.params, work().batch(), steps.head(at)); }
    // What they need of arrays, which would keep them waiting.
    CUFLASH_DEVICE void fetch(Fetched& fetched) const {
        int const q_first = steps.q_begin(at);
        fetched.fetch(changes(), steps.params.shape, q_first, steps.k_begin(at) + 16 * warp, q_first / cfg.block_m,
                      steps.is_partial(at), lane);
    }
    // Scores in units of log2, and the derivative by what they were.
    CUFLASH_DEVICE void change(Scores& s, Weights& slope, Fetched const& fetched) const {
        Changes const change = changes();
        int const q_first = steps.q_begin(at);
        int const k_first = steps.k_begin(at) + 16 * warp;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            float derivative[2][4];
            float(&two)[2][4] = reinterpret_cast<float(&)[2][4]>(s[0][2 * k]);
            change.change(two, derivative, fetched, 2 * k, q_first + 16 * k, k_first, lane);
            if constexpr (cfg.score.bends()) acc_to_a(slope[k], derivative, 0);
        }
    }
    // The sign says which weights are dropped.
    CUFLASH_DEVICE void mark_dropped(Weights& p) const {
        ScoreParams const& score = steps.params.score;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            TransposedDraws const draws =
                transposed_draws(seed, score.first_batch + work().batch(), steps.head(at),
                                 steps.q_begin(at) / 16 + k, (score.first_key + steps.k_begin(at)) / 16 + warp, lane);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (draws.of(n, i) < static_cast<u32>(score.dropped)) p[k].x[2 * n + i / 2] |= 0x8000u << (16 * (i % 2));
        }
    }
    // Those become 0.
    CUFLASH_DEVICE static void drop(Weights& p) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (p[k].x[i] & 0x8000u) p[k].x[i] &= 0xffff0000u;
                if (p[k].x[i] & 0x80000000u) p[k].x[i] &= 0xffffu;
            }
    }
    // dS of marked weights, for what was done to the scores; its sums over pairs, and then the derivative.
    CUFLASH_DEVICE void to_changed_d_scores(Weights& ds, Scores& dp, Weights const& p, Weights const& slope,
                                            Numbers const& deltas, float& slope_sum) const {
        BackwardWgmmaParams const& params = steps.params;
        float const kept_scale = params.score.kept_scale_f32;
        int const head = steps.head(at), batch = work().batch();
        int const q_first = steps.q_begin(at), k_first = steps.k_begin(at) + 16 * warp;
        char* const d_bias = params.d_bias.pointer == nullptr ? nullptr : params.d_bias.at(batch, head);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float2 const delta = deltas(2 * k + n);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    u32 const word = p[k].x[2 * n + j / 2];
                    float weight = j % 2 == 0 ? unpack_low<kMma>(word) : unpack_high<kMma>(word);
                    float& x = dp[0][2 * k + n][j];
                    if constexpr (cfg.score.dropout) {
                        x = __float_as_uint(weight) >> 31 ? 0.f : x * kept_scale;
                        weight = fabsf(weight);
                    }
                    x = weight * (x - (j % 2 == 0 ? delta.x : delta.y));
                }
            }
            float(&two)[2][4] = reinterpret_cast<float(&)[2][4]>(dp[0][2 * k]);
            if constexpr (cfg.score.bias != Bias::kNone)
                if (d_bias != nullptr) add_by_pairs(params.d_bias, d_bias, two, q_first + 16 * k, k_first, lane);
            Distances<true> const distance(params.score.q_offset, q_first + 16 * k, k_first, lane);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if constexpr (cfg.score.alibi) slope_sum -= two[n][j] * distance(n, j);
                    if constexpr (cfg.score.bends()) {
                        u32 const factor = slope[k].x[2 * n + j / 2];
                        two[n][j] =
                            by_derivative<cfg.score>(two[n][j], j % 2 == 0 ? unpack_low<kMma>(factor) : unpack_high<kMma>(factor));
                    }
                }
            acc_to_a(ds[k], dp[0], k);
        }
    }
    // The last step of a head: this warp's sum for its slope, for somebody to add up in a fixed order.
    CUFLASH_DEVICE void leave_slope_sum(float& sum, int head) const {
        if (steps.params.slope_sums == nullptr) return;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        i64 const index =
            ((static_cast<i64>(work().batch()) * steps.params.shape.num_heads + head) * steps.params.order.num_blocks +
             work().k_begin() / cfg.block_n) * 4 + warp;
        if (lane == 0) reinterpret_cast<float*>(steps.params.slope_sums)[index] = sum;
        sum = 0.f;
    }

    // ---- weights; `row` is the first of this warp's keys in the tile ----
    template <class IsMasked>
    CUFLASH_DEVICE void to_weights(Weights& p, Scores& s, Numbers const& lse_log2, int row, IsMasked is_masked) const {
        float const scale_log2 = cfg.score.changes() ? 1.f : steps.params.scale_log2;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            float2 const lse = lse_log2(n);
#pragma unroll
            for (int j = 0; j < 4; ++j) s[0][n][j] = exp2_approx(s[0][n][j] * scale_log2 - (j % 2 == 0 ? lse.x : lse.y));
        }
        if (is_masked()) {
            mask_probabilities(s, steps.params.shape, steps.k_begin(at) + row, steps.q_begin(at), lane);
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) acc_to_a(p[k], s[0], k);
    }
    // dS from the rounded P: the exact one would take registers that dV has not given back yet.
    CUFLASH_DEVICE void to_d_scores(Weights& ds, Scores& dp, Weights const& p, Numbers const& deltas) const {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float2 const delta = deltas(2 * k + n);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    u32 const word = p[k].x[2 * n + j / 2];
                    float& x = dp[0][2 * k + n][j];
                    x = (j % 2 == 0 ? unpack_low<kMma>(word) : unpack_high<kMma>(word)) *
                        (x - (j % 2 == 0 ? delta.x : delta.y));
                }
            }
            acc_to_a(ds[k], dp[0], k);
        }
    }
    // dS with a row per query, for everyone.
    CUFLASH_DEVICE void store_ds(Weights const& ds, int row) const {
        u32 const place = steps.ds(at) + TileDS::offset(lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) stmatrix_x4_trans(place + k * (16 * TileDS::kSlabBytes), ds[k].x);
    }
    // To be called when this warp has stored its dS, and dQ of the step before is done.
    CUFLASH_DEVICE void publish_ds() const {
        proxy_fence();
        __syncwarp();
        release(steps.ds_full(at));
    }

    // ---- a tile of which several blocks took a part each ----
    // Whether this is one. Then all sums that this warp has are left in the workspace.
    template <class... Accs>
    CUFLASH_DEVICE bool leave(Accs&... accs) const {
        using Accum = PartAccum<cfg.block_n, cfg.head_dim, cfg.head_dim_v>;
        int const place = work().place_of_part();
        if (place == Steps::kWhole) return false;
        int thread = threadIdx.x;
        opaque(thread);  // addresses are computed here, and not before the loop over steps, which has no registers for them
        float* target = reinterpret_cast<float*>(steps.params.parts) + place * i64{Accum::kElems} +
                        Accum::offset(thread / 32 - 4, 0, thread % 32);
        (leave_sums(target, accs[0]), ...);
        return true;
    }
    template <int kCols>
    CUFLASH_DEVICE static void leave_sums(float*& target, float const (&acc)[kCols][4]) {
#pragma unroll
        for (int n = 0; n < kCols; ++n, target += 128)
            *reinterpret_cast<float4*>(target) = float4{acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
    }

    // ---- results: a row per key ----
    template <int kCols>
    CUFLASH_DEVICE void store_rows(Operand const& operand, float (&acc)[kCols][4], int row, int dim) const {
        i64 const batch = work().batch(), head = work().head_kv();
        int const first_row = work().k_begin() + row;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int const k_idx = first_row + lane / 4 + 8 * h;
            store_acc_row<kMma, true>(operand.at(batch, head, k_idx), acc, h,
                                      k_idx < steps.params.shape.seqlen_k, dim * 2, lane);
        }
    }
    CUFLASH_DEVICE void store_dv(float (&dv)[cfg.head_dim_v / 8][4], int row) const {
        if constexpr (cfg.score.dropout) {
            float const kept_scale = steps.params.score.kept_scale_f32;
#pragma unroll
            for (int n = 0; n < cfg.head_dim_v / 8; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j) dv[n][j] *= kept_scale;
        }
        store_rows(steps.params.d_v, dv, row, steps.params.shape.head_dim_v);
    }
    CUFLASH_DEVICE void store_dk(float (&dk)[cfg.head_dim / 8][4], int row) const {
        float const scale = static_cast<float>(steps.params.scale);
#pragma unroll
        for (int n = 0; n < cfg.head_dim / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) dk[n][j] *= scale;
        store_rows(steps.params.d_k, dk, row, steps.params.shape.head_dim);
    }

    // Calls `body(any)` for each tile of keys; K and V have arrived if `any` query sees some of them.
    template <class Body>
    CUFLASH_DEVICE void for_each_tile(Body body) {
        for (;; tile = tile + 1) {
            mbarrier_wait(steps.k_full(tile), tile.parity());
            mbarrier_wait(steps.v_full(tile), tile.parity());
            i32 const num_steps = work().num_steps();
            if (num_steps == Steps::kNoMore) return;
            if (num_steps == 0) release(steps.kv_empty(tile));
            body(num_steps > 0);
        }
    }

    // All of this warp's dQ of a step, `share` by share.
    CUFLASH_DEVICE void add_dq(float (&dq)[kNDQ][4], Position of, int share) const {
        steps.template add_dq<0, kNDQ>(dq, steps.dq_target(steps.dq_tile(of), 4 * share + warp, lane), 4 * share + warp);
    }

    // ---- every warpgroup has 64 keys ----
    // With `overlap` there are places for two tiles of keys, and the steps of one tile follow those of the other without a
    // pause: S of a tile's first step is computed beside dK of the last step before, whose dQ comes with that first step.
    static constexpr bool kStreams = cfg.overlap;
    static_assert(!kStreams || cfg.kv_stages == 2, "the next tile of keys has to be there before the last one is done with");
    // Accumulators [kBegin, kEnd) of dQ of a step, of which these are the first, or the last, or neither.
    template <int kBegin, int kEnd>
    CUFLASH_DEVICE void add_dq_of(Position of, float (&dq)[kNDQ][4], float* target, int dq_warp) const {
        if constexpr (kBegin == kEnd) return;
        if constexpr (kBegin == 0) steps.await_turn(of);
        steps.template add_dq<kBegin, kEnd>(dq, target, dq_warp);
        if constexpr (kEnd == kNDQ) steps.finish_turn(lane);
    }
    // Where the statements of a step stand is measured: ptxas orders products by what stands between them.
    CUFLASH_DEVICE void by_keys() {
        float dk[1][cfg.head_dim / 8][4], dv[1][cfg.head_dim_v / 8][4];
        int const first_row = 64 * consumer;
        int const row = first_row + 16 * warp;
        int const dq_warp = 4 * consumer + warp;
        // So much of dQ is added before S of the next step is issued, and the rest behind it. In a fixed order it is behind
        // S that a warp waits for its turn. And there, and for wide heads, what the next step needs is awaited later.
        constexpr int kEarly = !kStreams ? kNDQ : cfg.deterministic ? 0 : kFetchAhead ? 3 * kNDQ / 4 : kNDQ;
        constexpr bool kAwaitsLate = cfg.deterministic || kFetchAhead;

        Scores next_s;
        Numbers lse, delta;
        // What is fetched of a step's note, and of the one before.
        u32 flags;
        int dq_tile = 0, last_dq_tile;
        // Whether the step before has left S of the next one, of this tile or the next, and its own dQ.
        bool goes_on = false;
        auto fetch_note = [&](Position of) {
            last_dq_tile = dq_tile;
            if constexpr (kFetchAhead) {
                uint4 const note = ld_shared_v4(steps.note(of));
                flags = note.x;
                dq_tile = note.z;
            }
            lse.fetch(steps.lse(of), lane);
        };
        auto is_masked = [&] { return ((kFetchAhead ? flags : steps.flags(at)) & Steps::kMasked) != 0; };

        auto step = [&] {
            Scores here, dp;
            Scores& s = kStreams ? next_s : here;
            if constexpr (!kStreams) {
                steps.await_q(at);
                issue_scores(s, at, steps.k(tile), first_row);
                fetch_note(at);
            }
            steps.await_d_out(at);
            issue_dp(dp, first_row);

            // P beside dP, and dS beside dV
            if constexpr (!kStreams) {
                warpgroup_wait<1>();
                warpgroup_pin(s[0]);
            }
            Weights p, ds;
            to_weights(p, s, lse, row, is_masked);
            if constexpr (!kStreams) delta.fetch(steps.delta(at), lane);
            issue_sum<TileDO>(dv[0], p, steps.d_out(at));
            if constexpr (!kFetchAhead) flags = steps.flags(at);
            bool const first = flags & Steps::kFirst, last = flags & Steps::kLast;
            bool const joins = kStreams && first && goes_on;  // the steps of the tile before
            bool const has_before = !first || joins;
            // Q of the next step is looked for here, and waited for later.
            bool has_q = false;
            auto look_for_q = [&] { has_q = mbarrier_test(steps.q_full(at + 1), (at + 1).parity()); };
            if constexpr (kStreams && !kAwaitsLate) look_for_q();
            if (kStreams && has_before) steps.await_ds(at + -1);
            warpgroup_wait<1>();
            warpgroup_pin(dp[0]);
            if constexpr (kStreams) delta.fetch(steps.delta(at), lane);
            to_d_scores(ds, dp, p, delta);
            if (!kStreams && has_before) steps.await_ds(at + -1);
            if constexpr (kStreams && kAwaitsLate) look_for_q();

            // dQ of the step before, and dK. The first step of all has none before it. It computes something all the same:
            // with a branch around products the compiler would lose track of them.
            // dS takes the place that was read by dQ of two steps ago. Everyone had seen the end of that before dS of the
            // last step.
            store_ds(ds, row);
            float dq[kNDQ][4];
            issue_dq(dq, at + -1, steps.k(joins ? tile + -1 : tile), consumer);
            issue_sum<TileQ>(dk[0], ds, steps.q(at));
            auto await_next = [&] {
                goes_on = !last;
                // The place of the next tile is that of the one before, which a tile of one step is not done with yet.
                if (last && !first) {
                    mbarrier_wait(steps.k_full(tile + 1), (tile + 1).parity());
                    goes_on = steps.work(tile + 1).num_steps() > 0;
                }
                if (goes_on && !has_q) steps.await_q(at + 1);
            };
            if constexpr (kStreams && !kAwaitsLate) await_next();
            float* dq_target;
            auto find_target = [&] {
                dq_target = steps.dq_target(kFetchAhead ? last_dq_tile : steps.dq_tile(at + -1), dq_warp, lane);
            };
            if constexpr (!kStreams) find_target();
            warpgroup_wait<1>();
            warpgroup_pin(dq);
            if constexpr (kStreams) find_target();
            publish_ds();
            if (has_before) {
                if (joins) release(steps.kv_empty(tile + -1));
                add_dq_of<0, kEarly>(at + -1, dq, dq_target, dq_warp);
            }

            if constexpr (kStreams) {
                if constexpr (kAwaitsLate) await_next();
                // Where the stream ends it is S of this step once more, for nothing, as a branch around products would cost
                // more; then Q is not to be released before.
                Position const next = goes_on ? at + 1 : at;
                issue_scores(s, next, steps.k(last && goes_on ? tile + 1 : tile), first_row);
                if (has_before) add_dq_of<kEarly, kNDQ>(at + -1, dq, dq_target, dq_warp);
                warpgroup_wait<1>();
                if (goes_on) release(steps.empty(at));
                fetch_note(next);
                warpgroup_wait<0>();
                warpgroup_pin(s[0]);
                if (!goes_on) release(steps.empty(at));
            } else {
                warpgroup_wait<0>();
                release(steps.empty(at));
            }
            at = at + 1;
            return !last;
        };

        for_each_tile([&](bool any) {
            set_zero(dk);
            set_zero(dv);
            if (any) {
                if (kStreams && !goes_on) {
                    steps.await_q(at);
                    issue_scores(next_s, at, steps.k(tile), first_row);
                    fetch_note(at);
                    warpgroup_wait<0>();
                    warpgroup_pin(next_s[0]);
                }
#pragma unroll 1
                while (step()) {
                }
                if (!goes_on) {
                    float dq[kNDQ][4];
                    steps.await_ds(at + -1);
                    issue_dq(dq, at + -1, steps.k(tile), consumer);
                    warpgroup_wait<0>();
                    warpgroup_pin(dq);
                    release(steps.kv_empty(tile));
                    add_dq_of<0, kNDQ>(at + -1, dq, steps.dq_target(steps.dq_tile(at + -1), dq_warp, lane), dq_warp);
                }
            }
            warpgroup_pin(dk[0]);
            warpgroup_pin(dv[0]);
            if (leave(dk, dv)) return;
            store_dk(dk[0], row);
            store_dv(dv[0], row);
        });
    }

    // ---- one warpgroup computes P and dV, the other dS and dK; of dQ each has some columns, 64 at a time ----
    static constexpr int kShares = cfg.dq_warps() / 4;

    template <int kFirst, int kLast>
    CUFLASH_DEVICE void finish_dq(float (&dq)[kNDQ][4], Position of, bool ignored) const {
        // The first share is on its way, with one group of products behind it.
        warpgroup_wait<1>();
        warpgroup_pin(dq);
        if (!ignored) {
            steps.await_turn(of);
            add_dq(dq, of, kFirst);
        }
#pragma unroll
        for (int share = kFirst + 1; share < kLast; ++share) {
            issue_dq(dq, of, steps.k(tile), share);
            warpgroup_wait<0>();
            warpgroup_pin(dq);
            if (!ignored) add_dq(dq, of, share);
        }
        if (!ignored) steps.finish_turn(lane);
        warpgroup_wait<0>();
    }
    // dQ of the last step of a tile.
    template <int kFirst, int kLast>
    CUFLASH_DEVICE void last_dq() const {
        if constexpr (kFirst < kLast) {
            steps.await_ds(at + -1);
            steps.await_turn(at + -1);
            float dq[kNDQ][4];
#pragma unroll
            for (int share = kFirst; share < kLast; ++share) {
                issue_dq(dq, at + -1, steps.k(tile), share);
                warpgroup_wait<0>();
                warpgroup_pin(dq);
                add_dq(dq, at + -1, share);
            }
            steps.finish_turn(lane);
        }
        release(steps.kv_empty(tile));
    }
    // P on its way to the same lanes of the other warpgroup. The next one follows when dS of this one is there.
    static constexpr int kPBarrier = 1;
    CUFLASH_DEVICE u32 p_place(int k) const { return steps.p() + ((warp * kSteps + k) * 32 + lane) * 16; }
    static constexpr u32 kSlopes = cfg.block_n * cfg.block_m * 2;  // derivatives lie so far behind it
    CUFLASH_DEVICE void hand_over(Weights const& words, u32 offset) const {
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
            st_shared_v4(p_place(k) + offset, uint4{words[k].x[0], words[k].x[1], words[k].x[2], words[k].x[3]});
    }
    CUFLASH_DEVICE void take_over(Weights& words, u32 offset) const {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint4 const x = ld_shared_v4(p_place(k) + offset);
            words[k].x[0] = x.x;
            words[k].x[1] = x.y;
            words[k].x[2] = x.z;
            words[k].x[3] = x.w;
        }
    }

    CUFLASH_DEVICE void values() {
        constexpr int kMine = (kShares + 1) / 2;
        float dv[1][cfg.head_dim_v / 8][4];
        auto step = [&] {
            Scores s;
            steps.await_q(at);
            issue_scores(s, at, steps.k(tile), 0);
            Fetched fetched;
            if constexpr (cfg.score.changes()) fetch(fetched);
            u32 const flags = steps.flags(at);
            bool const first = flags & Steps::kFirst, last = flags & Steps::kLast;
            if (!first) steps.await_ds(at + -1);
            float dq[kNDQ][4];
            issue_dq(dq, at + -1, steps.k(tile), 0);
            warpgroup_wait<1>();
            warpgroup_pin(s[0]);
            Weights p, slope;
            Numbers lse;
            lse.fetch(steps.lse(at), lane);
            if constexpr (cfg.score.changes()) change(s, slope, fetched);
            to_weights(p, s, lse, 16 * warp, [&] { return steps.is_masked(at); });
            if constexpr (cfg.score.dropout) mark_dropped(p);
            // Whoever has stored dS of the last step has read the P that was here. And dQ of two steps ago is done, so that
            // dS of this step may take its place.
            hand_over(p, 0);
            if constexpr (cfg.score.bends()) hand_over(slope, kSlopes);
            barrier_arrive(kPBarrier, 256);
            if constexpr (cfg.score.dropout) drop(p);
            steps.await_d_out(at);
            issue_sum<TileDO>(dv[0], p, steps.d_out(at));
            finish_dq<0, kMine>(dq, at + -1, first);
            release(steps.empty(at));
            at = at + 1;
            return !last;
        };
        for_each_tile([&](bool any) {
            set_zero(dv);
            if (any) {
#pragma unroll 1
                while (step()) {
                }
                last_dq<0, kMine>();
            }
            warpgroup_pin(dv[0]);
            if (!leave(dv)) store_dv(dv[0], 16 * warp);
        });
    }

    CUFLASH_DEVICE void keys() {
        constexpr int kOthers = (kShares + 1) / 2;
        float dk[1][cfg.head_dim / 8][4];
        float slope_sum = 0.f;  // of the gradient by the slope of the head
        auto step = [&] {
            Scores dp;
            steps.await_d_out(at);
            issue_dp(dp, 0);
            u32 const flags = steps.flags(at);
            bool const first = flags & Steps::kFirst, last = flags & Steps::kLast;
            if (!first) steps.await_ds(at + -1);
            float dq[kNDQ][4];
            if constexpr (kOthers < kShares) {
                issue_dq(dq, at + -1, steps.k(tile), kOthers);
                warpgroup_wait<1>();
            } else {
                warpgroup_wait<0>();
            }
            warpgroup_pin(dp[0]);
            Weights p, slope, ds;
            barrier_sync(kPBarrier, 256);
            take_over(p, 0);
            if constexpr (cfg.score.bends()) take_over(slope, kSlopes);
            Numbers delta;
            delta.fetch(steps.delta(at), lane);
            if constexpr (cfg.score.any()) {
                to_changed_d_scores(ds, dp, p, slope, delta, slope_sum);
            } else {
                to_d_scores(ds, dp, p, delta);
            }
            store_ds(ds, 16 * warp);
            publish_ds();
            steps.await_q(at);
            issue_sum<TileQ>(dk[0], ds, steps.q(at));
            if constexpr (kOthers < kShares) {
                finish_dq<kOthers, kShares>(dq, at + -1, first);
            } else {
                warpgroup_wait<0>();
            }
            if constexpr (cfg.score.alibi)
                if (flags & Steps::kLastOfHead) leave_slope_sum(slope_sum, steps.head(at));
            release(steps.empty(at));
            at = at + 1;
            return !last;
        };
        for_each_tile([&](bool any) {
            set_zero(dk);
            if (any) {
#pragma unroll 1
                while (step()) {
                }
                last_dq<kOthers, kShares>();
            }
            warpgroup_pin(dk[0]);
            if (!leave(dk)) store_dk(dk[0], 16 * warp);
        });
    }

    CUFLASH_DEVICE void by_role() {
        if (consumer == 0) {
            values();
        } else {
            keys();
        }
    }
};

template <BackwardWgmmaConfig cfg>
CUFLASH_DEVICE void backward_wgmma(ParamsOf<cfg.score, BackwardWgmmaParams> const& params, u32 smem) {
    static_assert(cfg.mma == Mma::kF16 || cfg.mma == Mma::kBF16, "wgmma here multiplies 16-bit elements");
    static_assert(cfg.consumers() == 2, "the producer leaves its registers to two warpgroups");
    static_assert(cfg.block_n % 64 == 0, "a warpgroup multiplies 64 keys");
    static_assert(cfg.block_m % 16 == 0 && cfg.block_m <= 256, "queries are consumed 16 at a time");
    static_assert(cfg.head_dim % 32 == 0 && cfg.head_dim_v % 32 == 0, "head dims are padded before");
    static_assert(cfg.by_role() || !cfg.dq_transposed() || cfg.dq_warps() == 4 * cfg.consumers(),
                  "warpgroups share dQ by 64 rows or by 64 columns");
    static_assert(cfg.by_role() || !cfg.score.any(), "registers for what is done to scores are there by role only");
    static_assert(cfg.num_stages >= 2, "one step is computed while the next one arrives");
    BackwardSteps<cfg> const steps{params, smem};
    int const warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for all lanes, and known to be
    int const thread = threadIdx.x % 128;

    if (threadIdx.x == 0) {
        steps.init();
        tma_prefetch(params.q_map);
        tma_prefetch(params.k_map);
        tma_prefetch(params.v_map);
        tma_prefetch(params.d_out_map);
    }
    __syncthreads();
    // Of 168 registers per thread.
    if (warpgroup == 0) {
        warpgroup_release_registers<24>();
        if (thread == 0) steps.produce();
        if (thread == 96) steps.look_after_zeros();
        if constexpr (cfg.deterministic) {
            if (thread == 32) steps.take_turns();
            if (thread == 64) steps.pass_turns();
        }
    } else {
        warpgroup_take_registers<240>();
        u64 const seed = cfg.score.dropout ? params.score.current_seed() : 0;
        BackwardConsumer<cfg> consumer{steps, warpgroup - 1, thread / 32, thread % 32, seed, {}, {}};
        if constexpr (cfg.by_role()) {
            consumer.by_role();
        } else {
            consumer.by_keys();
        }
    }
}
