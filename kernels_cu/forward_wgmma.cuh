// Attention forward on Hopper (sm_90a): wgmma fed by the tensor memory accelerator.
//
// What    out = softmax(scale * q k^T over visible keys) v and lse, as in forward_mma.cuh; a thread block works on
//         tiles of block_m query rows, one after the other.
// Maths   for each block of keys:  S = Q K^T                          [64, block_n] per warpgroup
//                                  P = exp2(S scale_log2 - shift)     (the shift moves when P grows too large)
//                                  l = l + rowsum P,  O = O + P V     [64, head_dim_v]
//         and at the end           out = O / l,  lse = shift ln 2 + ln l.
// Blocks  a tile is (64 * consumers rows, head, batch), numbered by `TileOrder`; a thread block per multiprocessor
//         takes them in turn.
// Who     warpgroup 0 produces: one thread orders boxes of Q, K and V into shared memory (or, where rows are not aligned,
//         all 128 threads copy elements). Each other warpgroup consumes: it owns 64 query rows and keeps S, P and O
//         in registers, of which the producer gives it most of its own.
// Pipes   Q, K and V each have a ring of places, and so have tiles of a bias that is loaded by boxes, with two barriers per
//         place: `full` (the bytes have arrived) and `empty` (every consumer warp is done with them). With each tile of Q
//         comes a note that says which one it is.
// Order   keys run from the last block to the first. The tensor core gets S of a block together with P V of the block
//         before, and while P V runs the warpgroup computes the softmax of S; the first S of a tile goes with the
//         last P V of the tile before (with two places for Q). With ping_pong warpgroups take turns to issue products,
//         so that one's softmax falls beside the other's products. ALiBi's slopes favour the nearest keys: then it begins
//         with these, for what comes later to be small beside them (`HeadScores::pivot`).
// Source  Shah et al. 2024 (FlashAttention-3), algorithms 1 and 2; Dao 2023 (FlashAttention-2), algorithm 1.
#pragma once
#include "attention/block_list.cuh"
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/epilogue.cuh"
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "attention/tile_order.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/prefetch.cuh"
#include "tile/gemm.cuh"
#include "tile/ring.cuh"
#include "tile/warpgroup.cuh"

template <ForwardWgmmaConfig cfg>
struct ForwardWgmmaTiles {
    // Whole slabs of 64 columns; the engine fills what head_dim does not reach with zeros.
    static constexpr int kCols = (cfg.head_dim + 63) / 64 * 64;
    static constexpr int kColsV = (cfg.head_dim_v + 63) / 64 * 64;
    using Q = SmemTile<cfg.block_m, kCols, 2>;
    using K = SmemTile<cfg.block_n, kCols, 2>;
    using V = SmemTile<cfg.block_n, kColsV, 2>;
    using Bias = SmemTile<cfg.block_m, (cfg.block_n + 63) / 64 * 64, 2>;
    static constexpr int kK = cfg.q_stages * Q::kBytes;
    static constexpr int kV = kK + cfg.num_stages * K::kBytes;
    static constexpr int kBias = kV + cfg.num_stages * V::kBytes;
    static constexpr int kNotes = kBias + cfg.bias_stages * Bias::kBytes;  // what the producer says of a tile: 16 bytes each
    static constexpr int kBarriers = kNotes + 16 * cfg.q_stages;  // 8 bytes each: full and empty of Q, K, V and the bias
    static constexpr int kBytes = kBarriers + 16 * (cfg.q_stages + 2 * cfg.num_stages + cfg.bias_stages);
};

template <ForwardWgmmaConfig cfg>
CUFLASH_DEVICE void forward_wgmma(ParamsOf<cfg.score, ForwardWgmmaParams> const& params, u32 smem) {
    static_assert(cfg.mma == Mma::kF16 || cfg.mma == Mma::kBF16, "wgmma here multiplies 16-bit elements");
    static_assert(cfg.block_m % 64 == 0 && cfg.consumers() >= 1 && cfg.consumers() <= 3,
                  "every consumer warpgroup owns 64 query rows");
    static_assert(cfg.block_n % 16 == 0 && cfg.block_n <= 256, "a product has 16 to 256 columns");
    static_assert(cfg.head_dim % 16 == 0 && cfg.head_dim_v % 32 == 0 && cfg.head_dim_v <= 256,
                  "head dims are padded before");
    static_assert(cfg.num_stages >= 2, "one step is computed while the next one arrives");
    static_assert(!cfg.ping_pong || cfg.consumers() > 1, "it takes two to take turns");
    static_assert(cfg.bias_stages == 0 || (cfg.copy == Copy::kTma && (cfg.score.bias == Bias::kF16 || cfg.score.bias == Bias::kBF16)),
                  "tiles of the bias are copied by the engine, and hold 16-bit elements");
    using Tiles = ForwardWgmmaTiles<cfg>;
    using TileQ = typename Tiles::Q;
    using TileK = typename Tiles::K;
    using TileV = typename Tiles::V;
    using TileBias = typename Tiles::Bias;
    constexpr Mma kMma = cfg.mma;
    constexpr bool kTma = cfg.copy == Copy::kTma;
    constexpr int kConsumers = cfg.consumers();
    constexpr int kStages = cfg.num_stages;
    constexpr int kN = cfg.block_n / 8;
    constexpr int kNV = cfg.head_dim_v / 8;
    constexpr int kStepsQK = cfg.head_dim / 16;
    constexpr int kStepsPV = cfg.block_n / 16;
    // Of 168 registers per thread with two consumers, 128 with three; with one, each thread has the most there is.
    using Changes = HeadScores<cfg.score, float, true>;
    constexpr bool kBiasTiles = cfg.bias_stages > 0;
    using FromMemory = PairsFragment<false, typename Element<bias_dtype(cfg.score.bias)>::Stored, kN>;
    using Fetched = typename Changes::template Fetched<
        false, kN, typename Either<kBiasTiles, PairsTile<TileBias>, FromMemory>::Type>;
    using BiasRing = Ring<kBiasTiles ? cfg.bias_stages : 1>;
    using Order = BlockList<cfg.score.mask, Changes::kTurns>;
    constexpr int kProducerRegisters = kConsumers == 3 ? (cfg.score.any() ? 56 : 32) : kTma ? 40 : 56;
    constexpr int kConsumerRegisters = kConsumers == 3 ? (cfg.score.any() ? 152 : 160) : kTma ? 232 : 224;

    Shape const& shape = params.shape;
    TileOrder const& order = params.order;
    u32 const k_smem = smem + Tiles::kK;
    u32 const v_smem = smem + Tiles::kV;
    u32 const q_full = smem + Tiles::kBarriers;
    u32 const q_empty = q_full + 8 * cfg.q_stages;
    u32 const k_full = q_empty + 8 * cfg.q_stages;
    u32 const k_empty = k_full + 8 * kStages;
    u32 const v_full = k_empty + 8 * kStages;
    u32 const v_empty = v_full + 8 * kStages;
    u32 const bias_full = v_empty + 8 * kStages;
    u32 const bias_empty = bias_full + 8 * cfg.bias_stages;
    int const warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for all lanes, and known to be
    int const thread = threadIdx.x % 128;
    int const rows_per_tile = cfg.block_m / order.pack;  // queries of a tile
    auto query_in_tile = [&](int row) { return order.pack == 1 ? row : row / order.pack; };

    if (threadIdx.x == 0) {
        constexpr int kArrivals = kTma ? 1 : 128;
        for (int i = 0; i < cfg.q_stages; ++i) {
            mbarrier_init(q_full + 8 * i, kArrivals);
            mbarrier_init(q_empty + 8 * i, 4 * kConsumers);
        }
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(k_full + 8 * i, kArrivals);
            mbarrier_init(v_full + 8 * i, kArrivals);
            mbarrier_init(k_empty + 8 * i, 4 * kConsumers);
            mbarrier_init(v_empty + 8 * i, 4 * kConsumers);
        }
        for (int i = 0; i < cfg.bias_stages; ++i) {
            mbarrier_init(bias_full + 8 * i, 1);
            mbarrier_init(bias_empty + 8 * i, 4 * kConsumers);
        }
        mbarrier_init_fence();
        if constexpr (kTma) {
            tma_prefetch(params.q_map);
            tma_prefetch(params.k_map);
            tma_prefetch(params.v_map);
            if constexpr (kBiasTiles) tma_prefetch(params.bias_map);
        }
    }
    // Rows that no query of a tile takes, which a pack that does not divide block_m leaves, are never loaded either.
    int const rows = rows_per_tile * order.pack;
    int const spare = (cfg.block_m - rows) * TileQ::kRowChunks;
    for (int i = threadIdx.x; i < cfg.q_stages * spare; i += cfg.threads())
        st_shared_v4(smem + i / spare * TileQ::kBytes +
                         TileQ::offset(rows + i % spare / TileQ::kRowChunks, i % TileQ::kRowChunks),
                     uint4{0, 0, 0, 0});
    if (spare > 0) proxy_fence();
    __syncthreads();

    Ring<kStages> ring;       // blocks of keys: K(n), and one place before it V(n + 1), which is used at the same time
    Ring<cfg.q_stages> tile;  // tiles of queries

    if (warpgroup == 0) {
        // ---- producer ----
        if constexpr (kConsumers > 1) warpgroup_release_registers<kProducerRegisters>();
        if (kTma && thread >= 32) return;
        bool const leader = thread == 0;

        // K or V of keys n * block_n.. once its place is free.
        auto load = [&](auto type, TensorMap const& map, Operand const& operand, u32 stages, u32 full, u32 empty,
                        Ring<kStages> at, int n, int head, int batch, int row_bytes) {
            using Tile = decltype(type);
            u32 const target = stages + at.stage() * Tile::kBytes;
            u32 const barrier = full + 8 * at.stage();
            mbarrier_wait(empty + 8 * at.stage(), ~at.parity() & 1);
            if constexpr (kTma) {
                if (!leader) return;
                mbarrier_arrive_expect(barrier, Tile::kBytes);
#pragma unroll
                for (int c = 0; c < Tile::kCols; c += 64)
                    tma_load_4d(target + c / 64 * Tile::kSlabStride, map, barrier, c, n * cfg.block_n, head, batch);
            } else {
                load_tile<Tile, 128, Copy::kElement>(target, operand.at(batch, head, n * cfg.block_n),
                                                     operand.row_stride, 0, shape.seqlen_k - n * cfg.block_n,
                                                     row_bytes, thread);
                proxy_fence();
                mbarrier_arrive(barrier);
            }
        };
        // The bias of a block of keys for a tile of queries.
        auto load_bias = [&](int n, int q_begin, TileCoordinates const& at) {
            BiasRing const place{ring.count};
            u32 const target = smem + Tiles::kBias + place.stage() * TileBias::kBytes;
            u32 const barrier = bias_full + 8 * place.stage();
            mbarrier_wait(bias_empty + 8 * place.stage(), ~place.parity() & 1);
            if (!leader) return;
            mbarrier_arrive_expect(barrier, TileBias::kBytes);
            int const head = params.score.bias.head_stride == 0 ? 0 : at.head;
            int const batch = params.score.bias.batch_stride == 0 ? 0 : at.batch;
#pragma unroll
            for (int c = 0; c < TileBias::kCols; c += 64)
                tma_load_4d(target + c / 64 * TileBias::kSlabStride, params.bias_map, barrier, n * cfg.block_n + c, q_begin,
                            head, batch);
        };
        // K and the bias of a block, unless it is negative, and V of the block before, likewise.
        int v_block = -1, v_head = 0, v_batch = 0;
        auto step = [&](int k_block, int head, int batch, int q_begin, TileCoordinates const& at) {
            if (k_block >= 0) {
                load(TileK{}, params.k_map, params.k, k_smem, k_full, k_empty, ring, k_block, head, batch,
                     shape.head_dim * 2);
                if constexpr (kBiasTiles) load_bias(k_block, q_begin, at);
            }
            if (v_block >= 0)
                load(TileV{}, params.v_map, params.v, v_smem, v_full, v_empty, ring + -1, v_block, v_head, v_batch,
                     shape.head_dim_v * 2);
            if (k_block >= 0) ring = ring + 1;
            v_block = k_block;
            v_head = head;
            v_batch = batch;
        };

        for (int round = 0;; ++round) {
            int const index = tile_of_round(order, round);
            bool const end = index >= order.num_tiles;
            TileCoordinates const at = tile_coordinates(order, end ? 0 : index);
            int const q_begin = at.block * rows_per_tile;
            int const q_end = min(shape.seqlen_q, q_begin + rows_per_tile);
            BlockRange range = key_blocks(shape, q_begin, q_end, cfg.block_n);
            Order const tiles(params.score, at.batch, at.head, at.block,
                              TurnedRange(range.first, range.last, Changes::pivot(params.score, q_begin, cfg.block_n)));
            if constexpr (cfg.score.mask) {  // positions in the list
                range.first = 0;
                range.last = tiles.length();
            }

            int const head_kv = at.head / (shape.group_size / order.pack);
            int const first = end ? range.last : range.first;
            bool const any = first < range.last;
#pragma unroll 1
            for (int n = range.last - 1; n >= first || n == range.last - 1; --n) {
                // Without keys here, the values that are due come alone.
                if (any || v_block >= 0) step(any ? tiles[n].tile : -1, head_kv, at.batch, q_begin, at);
                if (n != range.last - 1) continue;
                // Queries come after the first keys: their place may not be free before the step that these belong to.
                int const slot = tile.stage();
                mbarrier_wait(q_empty + 8 * slot, ~tile.parity() & 1);
                if (leader)
                    st_shared_v4(smem + Tiles::kNotes + 16 * slot,
                                 uint4{end ? ~0u : static_cast<u32>(index), static_cast<u32>(q_begin),
                                       static_cast<u32>(first), static_cast<u32>(range.last)});
                u32 const q_smem = smem + slot * TileQ::kBytes;
                if constexpr (kTma) {
                    if (leader) {
                        mbarrier_arrive_expect(q_full + 8 * slot, any ? rows * TileQ::kRowBytes : 0);
                        if (any) {
#pragma unroll
                            for (int c = 0; c < TileQ::kCols; c += 64)
                                tma_load_5d(q_smem + c / 64 * TileQ::kSlabStride, params.q_map, q_full + 8 * slot, c, 0,
                                            q_begin, at.head, at.batch);
                        }
                    }
                } else {
                    if (!end)
                        load_tile<TileQ, 128, Copy::kElement>(q_smem, params.q.at(at.batch, at.head, q_begin),
                                                              params.q.row_stride, 0, q_end - q_begin, shape.head_dim * 2,
                                                              thread);
                    proxy_fence();
                    mbarrier_arrive(q_full + 8 * slot);
                }
            }
            if (end) break;
            tile = tile + 1;
        }
        return;
    }

    // ---- consumers ----
    if constexpr (kConsumers > 1) warpgroup_take_registers<kConsumerRegisters>();
    int const consumer = warpgroup - 1;
    int const lane = thread % 32;
    int const first_row = consumer * 64;
    int const warp_row = first_row + thread / 32 * 16;
    // Turns go round by named barriers, one per consumer: the one before me, and I, make up its 256 threads.
    auto await_turn = [&] {
        if constexpr (cfg.ping_pong) barrier_sync(1 + consumer, 256);
    };
    auto pass_turn = [&] {
        if constexpr (cfg.ping_pong) barrier_arrive(1 + (consumer + 1 == kConsumers ? 0 : consumer + 1), 256);
    };
    if (consumer == kConsumers - 1) pass_turn();
    auto release = [&](u32 barrier) {
        if (lane == 0) mbarrier_arrive(barrier);
    };
    auto await_k = [&](Ring<kStages> at) { mbarrier_wait(k_full + 8 * at.stage(), at.parity()); };
    auto await_v = [&](Ring<kStages> at) { mbarrier_wait(v_full + 8 * at.stage(), at.parity()); };
    auto release_k = [&](Ring<kStages> at) { release(k_empty + 8 * at.stage()); };
    auto release_v = [&](Ring<kStages> at) { release(v_empty + 8 * at.stage()); };
    // The bias of the block whose scores these are, until they have become weights.
    auto await_bias = [&](Ring<kStages> at) {
        BiasRing const place{at.count};
        if constexpr (kBiasTiles) mbarrier_wait(bias_full + 8 * place.stage(), place.parity());
    };
    auto release_bias = [&](Ring<kStages> at) {
        if constexpr (kBiasTiles) release(bias_empty + 8 * BiasRing{at.count}.stage());
    };
    // Blocks of keys that this warpgroup does not see.
    auto skip = [&](int blocks) {
#pragma unroll 1
        for (; blocks > 0; --blocks) {
            await_k(ring);
            release_k(ring);
            await_bias(ring);
            release_bias(ring);
            await_turn();
            pass_turn();
            await_v(ring);
            release_v(ring);
            ring = ring + 1;
        }
    };

    // Scores that are changed come out in units of log2.
    constexpr bool kChanged = cfg.score.changes();
    u64 const seed = cfg.score.dropout ? params.score.current_seed() : 0;
    auto scale_log2 = [&] { return kChanged ? 1.f : params.scale_log2; };
    float o[1][kNV][4];
    FragmentA<kMma> p[kStepsPV];
    EagerSoftmax softmax;
    bool open = false;     // a tile waits to be stored
    bool pending = false;  // its last P still has to meet V
    int open_index = 0;

    auto issue_scores = [&](float (&s)[1][kN][4]) {
        warpgroup_arrive();
        warpgroup_gemm_nt<kMma, TileQ, TileK, kStepsQK>(
            s[0], MatrixDescriptor<TileQ>(smem + tile.stage() * TileQ::kBytes + first_row * TileQ::kSlabBytes),
            MatrixDescriptor<TileK>(k_smem + ring.stage() * TileK::kBytes));
        warpgroup_commit();
    };
    auto issue_values = [&] {
        warpgroup_arrive();
        warpgroup_gemm_nn<kMma, TileV, kStepsPV>(
            o[0], p, MatrixDescriptor<TileV>(v_smem + (ring + -1).stage() * TileV::kBytes));
        warpgroup_commit();
    };
    // Exponentials belong beside P V, but the compiler likes to put them behind its end. It cannot where a branch before
    // depends on their sum, as this does in its eyes: sums of weights are never negative.
    auto must_wait = [](bool ready, float const (&sum)[2]) { return !ready || sum[0] + sum[1] < 0.f; };

    for (;;) {
        // ---- the next tile ----
        mbarrier_wait(q_full + 8 * tile.stage(), tile.parity());
        // Read by the lane that will also release it.
        uint4 note{};
        if (lane == 0) note = ld_shared_v4(smem + Tiles::kNotes + 16 * tile.stage());
        int const index = __shfl_sync(0xffffffffu, note.x, 0), q_begin = __shfl_sync(0xffffffffu, note.y, 0);
        int const first = __shfl_sync(0xffffffffu, note.z, 0), last = __shfl_sync(0xffffffffu, note.w, 0);
        bool const end = index < 0;
        int const q_end = min(shape.seqlen_q, q_begin + rows_per_tile);
        auto query_of_row = [&](int row) { return q_begin + query_in_tile(row); };
        // This warpgroup's own rows may see fewer keys than the tile.
        int const own_begin = query_of_row(first_row);
        int const own_end = min(q_end, query_of_row(first_row + 63) + 1);
        BlockRange const own = key_blocks(shape, own_begin, own_end, cfg.block_n);
        int own_first = min(max(own.first, first), last);
        int own_last = own_begin < own_end && !end ? min(max(own.last, own_first), last) : own_first;
        TileCoordinates const here = tile_coordinates(order, end ? 0 : index);
        int const pivot = Changes::pivot(params.score, q_begin, cfg.block_n);
        Order const tiles(params.score, here.batch, here.head, here.block, TurnedRange(first, last, pivot));
        if (cfg.score.mask || (Changes::kTurns && tiles.turned.shift > 0)) {  // of a list it takes all
            own_first = first;
            own_last = own_begin < own_end && !end ? last : first;
        }
        bool const any = own_first < own_last;
        bool const chain = cfg.q_stages > 1 && pending && any && own_last == last;

        // What is done to scores, pair by pair; without packs, as a tile then is of one head.
        Changes const head_scores(params, here.batch, here.head);
        float const sink_log2 =
            cfg.score.sinks ? *reinterpret_cast<float const*>(params.score.sinks.at(0, here.head)) * kLog2E : 0.f;
        auto change = [&](float (&s)[1][kN][4], int n, bool is_partial) {
            if constexpr (!kChanged) return;
            int row = warp_row;
            opaque(row);
            Fetched fetched;
            if constexpr (kBiasTiles) {
                await_bias(ring);
                u32 const tile_smem = smem + Tiles::kBias + BiasRing{ring.count}.stage() * TileBias::kBytes;
                fetched.bias.place = lane_address_a<TileBias>(tile_smem + row * TileBias::kSlabBytes, lane);
            }
            fetched.fetch(head_scores, shape, q_begin + row, n * cfg.block_n, n, is_partial, lane);
            float derivative[kN][4];
            head_scores.change(s[0], derivative, fetched, 0, q_begin + row, n * cfg.block_n, lane);
        };
        // The bias of a block on its way from memory: a line of one of the warp's rows per lane.
        auto prefetch = [&](int position) {
            if constexpr (cfg.score.bias == Bias::kNone || kBiasTiles) return;
            constexpr int kSize = sizeof(typename Element<bias_dtype(cfg.score.bias)>::Stored), kLine = 128 / kSize;
            if (position < own_first || params.score.bias.key_stride != kSize) return;
            int const k_idx = tiles[position].tile * cfg.block_n + lane / 16 * kLine;
            int const q_idx = min(q_begin + warp_row + lane % 16, shape.seqlen_q - 1);
            if (k_idx < shape.seqlen_k) prefetch_to_l2(params.score.bias.of_pair(head_scores.bias, q_idx, k_idx));
        };
        // Dropped weights become 0, when their sums have been taken.
        auto drop = [&](float (&s)[1][kN][4], int position) {
            if constexpr (!cfg.score.dropout) return;
            int const n = tiles[position].tile;
            int row = warp_row;
            opaque(row);
#pragma unroll
            for (int t = 0; t < kN; t += 2) {
                DropoutDraws const draws =
                    dropout_draws(seed, params.score.first_batch + here.batch, here.head,
                                  (q_begin + row) / 16, (params.score.first_key + n * cfg.block_n) / 16 + t / 2, lane);
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (draws.of(j, i) < static_cast<u32>(params.score.dropped)) s[0][t + j][i] = 0.f;
            }
        };
        auto mask = [&](float (&s)[1][kN][4], int position) {
            int n = position;
            if constexpr (cfg.score.mask || Changes::kTurns) n = tiles[position].tile;
            change(s, n, cfg.score.mask && tiles[position].is_partial);
            prefetch(position - 2);
            if (!own.needs_mask(n)) return;
            int row = warp_row;
            opaque(row);
            row += lane / 4;
            int const q_idx[1][2] = {{min(query_of_row(row), q_end - 1), min(query_of_row(row + 8), q_end - 1)}};
            mask_scores(s, shape, q_idx, n * cfg.block_n, lane, scale_log2() < 0.f ? infinity() : -infinity());
        };

        // ---- its first scores, beside the last P V of the tile before if that can be ----
        int n = own_last - 1;
        prefetch(n);
        prefetch(n - 1);
        float s[1][kN][4];
        float sum[2];
        EagerSoftmax fresh;
        fresh.init();
        auto first_weights = [&] {
            mask(s, n);
            fresh.settle(s[0], scale_log2());
            if constexpr (cfg.score.sinks) fresh.add_sink(sink_log2, lane);
            fresh.weigh(s[0], sum, scale_log2());
            fresh.add(sum);
        };
        auto last_values = [&] {
            await_v(ring + -1);
            issue_values();
            warpgroup_wait<0>();
            warpgroup_pin(o[0]);
            release_v(ring + -1);
        };
        if (chain) {
            await_k(ring);
            await_v(ring + -1);
            await_turn();
            issue_scores(s);
            issue_values();
            pass_turn();
            bool const ready = mbarrier_test(v_full + 8 * ring.stage(), ring.parity());
            warpgroup_wait<1>();
            warpgroup_pin(s[0]);
            release_k(ring);
            first_weights();
            if (must_wait(ready, sum)) await_v(ring);
            warpgroup_wait<0>();
            warpgroup_pin(o[0]);
            release_v(ring + -1);
        } else if (pending) {
            last_values();
        }

        // ---- epilogue of the tile before ----
        if (open) {
            TileCoordinates const at = tile_coordinates(order, open_index);
            softmax.finish();
            float inverse[1][2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float const total = softmax.row_sum[h];
                float const kept_scale = cfg.score.dropout ? params.score.kept_scale_f32 : 1.f;
                inverse[0][h] = total == 0.f ? 0.f : kept_scale / total;
            }
            scale_rows(o, inverse);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int const row = warp_row + lane / 4 + 8 * h;
                int const q_idx = at.block * rows_per_tile + query_in_tile(row);
                int const head = at.head * order.pack + (order.pack == 1 ? 0 : row % order.pack);
                bool const valid = q_idx < min(shape.seqlen_q, (at.block + 1) * rows_per_tile);
                if (params.lse != nullptr && lane % 4 == 0 && valid) {
                    i64 const place = (static_cast<i64>(at.batch) * shape.num_heads + head) * shape.seqlen_q + q_idx;
                    reinterpret_cast<float*>(params.lse)[place] = softmax.lse(h);
                }
                store_acc_row<kMma, kTma>(params.out.at(at.batch, head, q_idx), o[0], h, valid, shape.head_dim_v * 2,
                                          lane);
            }
        }
        if (end) break;
        open = true;
        open_index = index;
        set_zero(o);

        if (!any) {
            softmax.init();
            if constexpr (cfg.score.sinks) softmax.add_sink(sink_log2, lane);
            release(q_empty + 8 * tile.stage());
            tile = tile + 1;
            pending = false;
            skip(last - first);
            continue;
        }
        if (!chain) {
            skip(last - own_last);
            await_k(ring);
            await_turn();
            issue_scores(s);
            pass_turn();
            warpgroup_wait<0>();
            warpgroup_pin(s[0]);
            release_k(ring);
            first_weights();
            await_v(ring);
        }
        softmax = fresh;
        auto to_operand = [&] {
            drop(s, n);
#pragma unroll
            for (int k = 0; k < kStepsPV; ++k) acc_to_a(p[k], s[0], k);
        };
        to_operand();
        release_bias(ring);
        ring = ring + 1;
        if (n > own_first) await_k(ring);

        // ---- mainloop ----
#pragma unroll 1
        for (--n; n >= own_first; --n) {
            await_turn();
            issue_scores(s);
            issue_values();
            pass_turn();
            // Look for what the next block needs now, and wait for it later.
            Ring<kStages> const next = ring + 1;
            bool ready = mbarrier_test(v_full + 8 * ring.stage(), ring.parity());
            if (n > own_first) ready &= mbarrier_test(k_full + 8 * next.stage(), next.parity());
            warpgroup_wait<1>();
            warpgroup_pin(s[0]);
            release_k(ring);
            mask(s, n);
            if (softmax.unseen) softmax.settle(s[0], scale_log2());
            // Biases that depend on the distance grow from block to block, and weights that are too large cost a product.
            if constexpr (cfg.score.bias != Bias::kNone || cfg.score.alibi) {
                int const block = tiles[n].tile;
                if (head_scores.may_grow(q_begin + warp_row, block * cfg.block_n, cfg.block_n, pivot) &&
                    softmax.has_outgrown(s[0], scale_log2())) {
                    float alpha[1][2];
                    softmax.raise(s[0], alpha[0], scale_log2());
                    warpgroup_wait<0>();
                    warpgroup_pin(o[0]);
                    scale_rows(o, alpha);
                }
            }
            softmax.weigh(s[0], sum, scale_log2());
            bool const accepted = softmax.accept(sum);
            if (must_wait(ready, sum)) {
                await_v(ring);
                if (n > own_first) await_k(next);
            }
            warpgroup_wait<0>();
            warpgroup_pin(o[0]);
            release_v(ring + -1);
            if (!accepted) {
                float alpha[1][2];
                int row = warp_row;
                opaque(row);
                set_zero(s);
                TileCoordinates const at = tile_coordinates(order, open_index);
                gemm_nt_gmem<kMma, TileQ, kTma, kStepsQK>(
                    s, lane_address_a<TileQ>(smem + tile.stage() * TileQ::kBytes + row * TileQ::kSlabBytes, lane),
                    params.k.at(at.batch, at.head / (shape.group_size / order.pack), 0), params.k.row_stride,
                    tiles[n].tile * cfg.block_n, shape.seqlen_k, shape.head_dim, lane);
                mask(s, n);
                softmax.raise(s[0], alpha[0], scale_log2());
                softmax.weigh(s[0], sum, scale_log2());
                softmax.add(sum);
                scale_rows(o, alpha);
            }
            to_operand();
            release_bias(ring);
            ring = next;
        }
        release(q_empty + 8 * tile.stage());
        tile = tile + 1;
        pending = own_first == first;
        if (!pending) {
            last_values();
            skip(own_first - first);
        }
    }
}
