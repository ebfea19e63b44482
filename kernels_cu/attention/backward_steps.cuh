// What the warpgroups of backward_wgmma.cuh have between them: tiles in shared memory, barriers, and the notes by which the
// producer tells the others where they are.
//
// A thread block works on tiles of keys one after the other. For each it takes steps, one per tile of queries that sees some
// of the keys, of all query heads that share them.
#pragma once
#include "../ptx/mbarrier.cuh"
#include "../ptx/reduction.cuh"
#include "../ptx/shared.cuh"
#include "../ptx/tma.cuh"
#include "../tile/ring.cuh"
#include "../tile/swizzle.cuh"
#include "block_list.cuh"
#include "block_range.cuh"
#include "config.cuh"
#include "dq_accum.cuh"
#include "score_mod.cuh"
#include "tile_order.cuh"
#include "tile_parts.cuh"

template <BackwardWgmmaConfig cfg>
struct BackwardWgmmaTiles {
    // Whole slabs of 64 columns; the engine fills what head_dim does not reach with zeros.
    static constexpr int kCols = (cfg.head_dim + 63) / 64 * 64;
    static constexpr int kColsV = (cfg.head_dim_v + 63) / 64 * 64;
    using K = SmemTile<cfg.block_n, kCols, 2>;
    using V = SmemTile<cfg.block_n, kColsV, 2>;
    using Q = SmemTile<cfg.block_m, kCols, 2>;
    using dO = SmemTile<cfg.block_m, kColsV, 2>;
    using dS = SmemTile<cfg.block_m, cfg.block_n, 2>;  // [query][key]
    // P, and behind it the derivative of what was done to the scores, where there is one.
    static constexpr int kPBytes = cfg.by_role() ? cfg.block_n * cfg.block_m * (cfg.score.bends() ? 4 : 2) : 0;
    static constexpr int kStatBytes = (cfg.block_m * 4 + 127) / 128 * 128;
    static constexpr int kV = cfg.kv_stages * K::kBytes;
    static constexpr int kQ = kV + cfg.kv_stages * V::kBytes;
    static constexpr int kDO = kQ + cfg.num_stages * Q::kBytes;
    static constexpr int kDS = kDO + cfg.num_stages * dO::kBytes;
    static constexpr int kP = kDS + 2 * dS::kBytes;
    static constexpr int kLse = kP + kPBytes;
    static constexpr int kDelta = kLse + cfg.num_stages * kStatBytes;
    static constexpr int kZeros = kDelta + cfg.num_stages * kStatBytes;  // to be copied
    static constexpr int kZerosBytes = 1024;
    // 16 bytes per step: twice as many as there are stages, as the step before is still of interest.
    static constexpr int kNotes = kZeros + kZerosBytes;
    static constexpr int kWork = kNotes + 2 * 16 * cfg.num_stages;
    // Of a tile that is claimed, of those that have a place, and of one that is stored.
    static constexpr int kNumWork = 4;
    static_assert(cfg.kv_stages + 2 <= kNumWork, "there is work for every tile that is claimed and not stored");
    static constexpr int kRest = kWork + 48 * kNumWork;
    static constexpr int kBarriers = kRest + 16;
    static constexpr int kBytes = kBarriers + 8 * (5 + 4 * cfg.kv_stages + 3 * cfg.num_stages);
};

template <BackwardWgmmaConfig cfg>
struct BackwardSteps {
    using Tiles = BackwardWgmmaTiles<cfg>;
    using Position = Ring<cfg.num_stages>;     // of a step
    using TilePosition = Ring<cfg.kv_stages>;  // of a tile of keys
    static constexpr int kConsumerWarps = 4 * cfg.consumers();
    // By role, a single share of d_q is that of one warpgroup.
    static constexpr int kAddingWarps = cfg.by_role() && cfg.dq_warps() == 4 ? 4 : kConsumerWarps;
    // Warps hold a tile of dQ as 16 rows each, or, transposed, as 16 columns.
    using Accum = DqAccum<cfg.dq_transposed() ? cfg.dq_columns() : cfg.block_m,
                          cfg.dq_transposed() ? cfg.block_m : cfg.head_dim, cfg.dq_warps(), cfg.dq_warps(), 4>;

    ParamsOf<cfg.score, BackwardWgmmaParams> const& params;
    u32 const smem;

    // ---- places ----
    CUFLASH_DEVICE u32 k(TilePosition tile) const { return smem + tile.stage() * Tiles::K::kBytes; }
    CUFLASH_DEVICE u32 v(TilePosition tile) const { return smem + Tiles::kV + tile.stage() * Tiles::V::kBytes; }
    CUFLASH_DEVICE u32 q(Position at) const { return smem + Tiles::kQ + at.stage() * Tiles::Q::kBytes; }
    CUFLASH_DEVICE u32 d_out(Position at) const { return smem + Tiles::kDO + at.stage() * Tiles::dO::kBytes; }
    CUFLASH_DEVICE u32 lse(Position at) const { return smem + Tiles::kLse + at.stage() * Tiles::kStatBytes; }
    CUFLASH_DEVICE u32 delta(Position at) const { return smem + Tiles::kDelta + at.stage() * Tiles::kStatBytes; }
    // There are two, by turns.
    CUFLASH_DEVICE u32 ds(Position at) const { return smem + Tiles::kDS + at.count % 2 * Tiles::dS::kBytes; }
    CUFLASH_DEVICE u32 p() const { return smem + Tiles::kP; }

    // ---- barriers ----
    CUFLASH_DEVICE u32 barrier(u32 index) const { return smem + Tiles::kBarriers + 8 * index; }
    CUFLASH_DEVICE u32 turn() const { return barrier(0); }
    CUFLASH_DEVICE u32 added() const { return barrier(1); }
    CUFLASH_DEVICE u32 seen() const { return barrier(2); }  // by who passes turns on
    CUFLASH_DEVICE u32 ds_full(Position at) const { return barrier(3 + at.count % 2); }
    CUFLASH_DEVICE u32 k_full(TilePosition tile) const { return barrier(5 + tile.stage()); }
    CUFLASH_DEVICE u32 v_full(TilePosition tile) const { return barrier(5 + cfg.kv_stages + tile.stage()); }
    CUFLASH_DEVICE u32 kv_empty(TilePosition tile) const { return barrier(5 + 2 * cfg.kv_stages + tile.stage()); }
    CUFLASH_DEVICE u32 claimed(TilePosition tile) const { return barrier(5 + 3 * cfg.kv_stages + tile.stage()); }
    static constexpr u32 kOfSteps = 5 + 4 * cfg.kv_stages;
    CUFLASH_DEVICE u32 q_full(Position at) const { return barrier(kOfSteps + at.stage()); }
    CUFLASH_DEVICE u32 d_out_full(Position at) const { return barrier(kOfSteps + cfg.num_stages + at.stage()); }
    CUFLASH_DEVICE u32 empty(Position at) const { return barrier(kOfSteps + 2 * cfg.num_stages + at.stage()); }

    CUFLASH_DEVICE void init() const {
        st_shared_v2(rest(), 0, 0);
        for (u32 i = 0; i < Tiles::kZerosBytes; i += 16) st_shared_v4(smem + Tiles::kZeros + i, uint4{0, 0, 0, 0});
        proxy_fence();
        for (u32 i = 0; i < cfg.kv_stages; ++i) {
            mbarrier_init(claimed(TilePosition{i}), 1);
            mbarrier_init(k_full(TilePosition{i}), 2);  // the load, and zeros
            mbarrier_init(v_full(TilePosition{i}), 1);
            mbarrier_init(kv_empty(TilePosition{i}), kConsumerWarps + 1 + (cfg.deterministic ? 2 : 0));
        }
        mbarrier_init(turn(), 1);
        mbarrier_init(added(), kAddingWarps);
        mbarrier_init(seen(), 1);
        for (u32 i = 0; i < 2; ++i) mbarrier_init(ds_full(Position{i}), cfg.by_role() ? 4 : kConsumerWarps);
        for (u32 i = 0; i < cfg.num_stages; ++i) {
            mbarrier_init(q_full(Position{i}), 1);
            mbarrier_init(d_out_full(Position{i}), 1);
            mbarrier_init(empty(Position{i}), kConsumerWarps);
        }
        mbarrier_init_fence();
    }
    CUFLASH_DEVICE void await_q(Position at) const { mbarrier_wait(q_full(at), at.parity()); }
    CUFLASH_DEVICE void await_d_out(Position at) const { mbarrier_wait(d_out_full(at), at.parity()); }
    CUFLASH_DEVICE void await_ds(Position at) const { mbarrier_wait(ds_full(at), at.count / 2 & 1); }

    // ---- notes: flags and, above them, which tile of queries; first key; tile of the workspace; query head ----
    // By the band, or by the mask; the first and last step of a tile of keys; the last of a query head.
    static constexpr u32 kMasked = 1, kFirst = 2, kLast = 4, kPartial = 8, kLastOfHead = 16;
    static constexpr u32 kNumFlags = cfg.score.any() ? 5 : 3;
    CUFLASH_DEVICE u32 note(Position at) const { return smem + Tiles::kNotes + 16 * (at.count % (2 * cfg.num_stages)); }
    CUFLASH_DEVICE u32 flags(Position at) const { return ld_shared(note(at)); }
    CUFLASH_DEVICE int dq_tile(Position at) const { return ld_shared(note(at) + 8); }
    CUFLASH_DEVICE bool is_masked(Position at) const { return flags(at) & kMasked; }
    CUFLASH_DEVICE bool is_partial(Position at) const { return !cfg.listed() || flags(at) & kPartial; }
    CUFLASH_DEVICE int q_begin(Position at) const { return (ld_shared(note(at)) >> kNumFlags) * cfg.block_m; }
    CUFLASH_DEVICE int k_begin(Position at) const { return ld_shared(note(at) + 4); }
    CUFLASH_DEVICE int head(Position at) const { return ld_shared(note(at) + 12); }

    // ---- work: a tile of keys. One is claimed while another is computed, and the one before may still be stored ----
    // The producer's registers are few, and it looks up here what it needs, too.
    static constexpr i32 kNoMore = -1, kWhole = -1;
    struct Work {
        u32 place;

        CUFLASH_DEVICE int k_begin() const { return ld_shared(place); }
        CUFLASH_DEVICE int head_kv() const { return ld_shared(place + 4); }
        CUFLASH_DEVICE int batch() const { return ld_shared(place + 8); }
        CUFLASH_DEVICE i32 num_steps() const { return ld_shared(place + 12); }  // of all query heads, or kNoMore
        // Tiles of queries that see some of the keys, and those that see all of them.
        CUFLASH_DEVICE int first() const { return ld_shared(place + 16); }
        CUFLASH_DEVICE int last() const { return ld_shared(place + 20); }
        CUFLASH_DEVICE bool needs_mask(int m_block) const {
            uint2 const full = ld_shared_v2(place + 24);
            return m_block < static_cast<int>(full.x) || m_block >= static_cast<int>(full.y);
        }
        // Steps of the tile that other blocks take before these, and where to leave the sums over these; kWhole if there
        // are no others.
        CUFLASH_DEVICE int steps_before() const { return ld_shared(place + 32); }
        CUFLASH_DEVICE int place_of_part() const { return ld_shared(place + 36); }
        // Where tiles of queries are listed: how many are left in the list, this one included, and its entry.
        CUFLASH_DEVICE int left_in_list() const { return ld_shared(place + 40); }
        CUFLASH_DEVICE u32 entry() const { return ld_shared(place + 44); }
        CUFLASH_DEVICE void set_entry(int left, u32 entry) const { st_shared_v2(place + 40, left, entry); }
        // Where these steps begin: with a tile of queries of a head of those that share the keys.
        CUFLASH_DEVICE int first_head(int group_size) const {
            return head_kv() * group_size + steps_before() / (last() - first());
        }
        CUFLASH_DEVICE int first_m_block() const { return first() + steps_before() % (last() - first()); }
    };
    CUFLASH_DEVICE Work work(TilePosition tile) const {
        return Work{smem + Tiles::kWork + tile.count % Tiles::kNumWork * 48};
    }

    CUFLASH_DEVICE int tile_of_dq(int batch, int head, int m_block) const {
        return (batch * params.shape.num_heads + head) * (params.rows / cfg.block_m) + m_block;
    }

    // What is still to do of a part of the tail that reaches into several tiles: [begin, end), in steps of the tail.
    CUFLASH_DEVICE u32 rest() const { return smem + Tiles::kRest; }
    // How many tiles and parts have been claimed.
    CUFLASH_DEVICE int* num_claimed() const { return reinterpret_cast<int*>(params.counters); }

    // The next tile, or what belongs to one tile of the next part of the tail, that no block has taken.
    CUFLASH_DEVICE void claim(Work work) const {
        TileParts const& tail = params.tail;
        uint2 const left = ld_shared_v2(rest());
        i32 begin = left.x, end = left.y;
        int tile = tail.first_tile;
        if (begin == end) {
            tile = fetch_add(num_claimed(), 1);
            if (tile >= tail.first_tile) {
                begin = min((tile - tail.first_tile) * tail.part_steps, tail.num_steps);
                end = min(begin + tail.part_steps, tail.num_steps);
                if (begin == end) return st_shared(work.place + 12, static_cast<u32>(kNoMore));
            }
        }
        if (tile < tail.first_tile) {
            st_shared_v2(work.place + 32, 0, static_cast<u32>(kWhole));
        } else {
            int const n = begin / tail.tile_steps;  // of the tiles of the tail
            tile = tail.first_tile + n;
            st_shared_v2(work.place + 32, begin - n * tail.tile_steps, Places::at_step(tail, begin, n));
            st_shared_v2(rest(), begin, end);
        }
        TileCoordinates const at = tile_of_keys(params.order, tile, cfg.deterministic);
        int const k_begin = at.block * cfg.block_n;
        int const k_end = min(params.shape.seqlen_k, k_begin + cfg.block_n);
        BlockRange range = query_blocks(params.shape, k_begin, k_end, cfg.block_m);
        if (k_begin + cfg.block_n > params.shape.seqlen_k) range.full_last = 0;
        int num_steps = (range.last - range.first) * params.shape.group_size;
        uint2 const part = ld_shared_v2(rest());
        if (part.x != part.y) {
            num_steps = min(num_steps - work.steps_before(), static_cast<i32>(part.y - part.x));
            st_shared_v2(rest(), part.x + num_steps, part.y);
        }
        if constexpr (cfg.listed()) {
            num_steps = 0;
#pragma unroll 1
            for (int i = 0; i < params.shape.group_size; ++i)
                num_steps += BlockList<true>(params.score, at.batch, at.head * params.shape.group_size + i, at.block).length();
            work.set_entry(0, 0);
        }
        st_shared_v4(work.place, uint4{static_cast<u32>(k_begin), static_cast<u32>(at.head), static_cast<u32>(at.batch),
                                       static_cast<u32>(num_steps)});
        st_shared_v4(work.place + 16, uint4{static_cast<u32>(range.first), static_cast<u32>(range.last),
                                            static_cast<u32>(range.full_first), static_cast<u32>(range.full_last)});
    }

    // One thread orders all that the others need, as soon as there is a place for it.
    CUFLASH_DEVICE void produce() const {
        Shape const& shape = params.shape;
        // The maps cover what somebody sees. What lies outside becomes zero, whatever is there.
        // Computed anew for each tile, as a register is short.
        auto const k_origin = [&] { return key_blocks(shape, 0, shape.seqlen_q, cfg.block_n).k_begin; };
        int const q_origin = query_blocks(shape, 0, shape.seqlen_k, cfg.block_m).k_begin;
        Position at;
#pragma unroll 1
        for (TilePosition tile;; tile = tile + 1) {
            Work const now = work(tile);
            claim(now);  // takes a while, in which the tile before is computed
            mbarrier_wait(kv_empty(tile), ~tile.parity() & 1);
            mbarrier_arrive(claimed(tile));
            i32 steps_left = now.num_steps();
            if (steps_left <= 0) {
                mbarrier_arrive(k_full(tile));
                mbarrier_arrive(v_full(tile));
                if (steps_left == kNoMore) return;
                continue;
            }
            int head = cfg.listed() ? now.head_kv() * shape.group_size - 1 : now.first_head(shape.group_size);
            int m_block = cfg.listed() ? 0 : now.first_m_block();
            if constexpr (cfg.listed()) head = next_entry(now, head);
            bool first = true;
            mbarrier_arrive_expect(k_full(tile), Tiles::K::kBytes);
            load<typename Tiles::K>(k(tile), params.k_map, k_full(tile), now.k_begin() - k_origin(), now.head_kv(),
                                    now.batch());
#pragma unroll 1
            do {
                int const batch = now.batch(), k_begin = now.k_begin();
                if constexpr (cfg.listed()) m_block = now.entry() >> 1;
                int const row = m_block * cfg.block_m - q_origin;
                int const dq_tile = tile_of_dq(batch, head, m_block);
                i64 const stats = static_cast<i64>(dq_tile) * (cfg.block_m * 4);
                u32 flags = (now.needs_mask(m_block) ? kMasked : 0) | (first ? kFirst : 0) | (steps_left == 1 ? kLast : 0);
                if constexpr (cfg.score.any()) {
                    bool const is_last = cfg.listed() ? now.left_in_list() == 1 : m_block + 1 == now.last();
                    flags |= (is_last ? kLastOfHead : 0) | (cfg.listed() && now.entry() % 2 != 0 ? kPartial : 0);
                }
                mbarrier_wait(empty(at), ~at.parity() & 1);
                st_shared_v4(note(at), uint4{flags | static_cast<u32>(m_block) << kNumFlags,
                                             static_cast<u32>(k_begin), static_cast<u32>(dq_tile),
                                             static_cast<u32>(cfg.score.any() ? head : 0)});
                mbarrier_arrive_expect(q_full(at), Tiles::Q::kBytes + cfg.block_m * 4);
                load<typename Tiles::Q>(q(at), params.q_map, q_full(at), row, head, batch);
                bulk_load(lse(at), params.lse_log2 + stats, cfg.block_m * 4, q_full(at));
                if (first) {
                    mbarrier_arrive_expect(v_full(tile), Tiles::V::kBytes);
                    load<typename Tiles::V>(v(tile), params.v_map, v_full(tile), k_begin - k_origin(), now.head_kv(),
                                            batch);
                }
                mbarrier_arrive_expect(d_out_full(at), Tiles::dO::kBytes + cfg.block_m * 4);
                load<typename Tiles::dO>(d_out(at), params.d_out_map, d_out_full(at), row, head, batch);
                bulk_load(delta(at), params.delta + stats, cfg.block_m * 4, d_out_full(at));
                first = false;
                at = at + 1;
                if constexpr (cfg.listed()) {
                    if (steps_left > 1) head = next_entry(now, head);
                } else if (++m_block == now.last()) {
                    m_block = now.first();
                    ++head;
                }
            } while (--steps_left > 0);
        }
    }

    // The next entry of the list of `head`, or of the next head that has one, which is returned.
    CUFLASH_DEVICE int next_entry(Work now, int head) const {
        int const block = now.k_begin() / cfg.block_n;
        int left = now.left_in_list() - 1;
#pragma unroll 1
        while (left <= 0) left = BlockList<true>(params.score, now.batch(), ++head, block).length();
        BlockList<true> const tiles(params.score, now.batch(), head, block);
        auto const found = tiles[tiles.length() - left];
        now.set_entry(left, 2 * found.tile + found.is_partial);
        return head;
    }

    template <class Tile>
    CUFLASH_DEVICE static void load(u32 target, TensorMap const& map, u32 barrier, int row, int head, int batch) {
#pragma unroll
        for (int c = 0; c < Tile::kCols; c += 64)
            tma_load_4d(target + c / 64 * Tile::kSlabStride, map, barrier, c, row, head, batch);
    }

    // ---- zeros, to which tiles of keys add their dQ ----
    // The tiles of dQ of a section's heads are neighbours. Those of the first sections hold zeros from the start; those of
    // another are filled by the tiles of keys that come `sections_ahead` sections before, each its share: while they
    // compute, memory has time for it, and the zeros are still in the cache when sums take their place. One thread looks after
    // that, and counts as a load of K: who finds K there finds zeros for its dQ, too.
    CUFLASH_DEVICE int tiles_per_section() const { return params.order.section * params.order.num_blocks; }
    // How many shares of a section hold zeros.
    CUFLASH_DEVICE int* num_shares(int section) const { return num_claimed() + 1 + section; }

    CUFLASH_DEVICE void look_after_zeros() const {
#pragma unroll 1
        for (TilePosition tile;; tile = tile + 1) {
            mbarrier_wait(claimed(tile), tile.parity());
            Work const now = work(tile);
            i32 const num_steps = now.num_steps();
            int const head = now.batch() * params.order.num_heads + now.head_kv();
            int const share = head % params.order.section * params.order.num_blocks + now.k_begin() / cfg.block_n;
            mbarrier_arrive(kv_empty(tile));
            int const section = head / params.order.section;
            if (num_steps > 0 && section >= params.sections_ahead) {
                while (load_acquire(num_shares(section)) < tiles_per_section()) {
                }
            }
            mbarrier_arrive(k_full(tile));
            if (num_steps == kNoMore) return;
            fill_with_zeros(section + params.sections_ahead, share);
        }
    }
    CUFLASH_DEVICE void fill_with_zeros(int section, int share) const {
        constexpr int kPiece = Tiles::kZerosBytes;
        static_assert(Accum::kElems * 4 % kPiece == 0, "a tile of dQ consists of whole pieces");
        TileOrder const& order = params.order;
        int const first_head = section * order.section;
        int const num_heads = min(order.section, order.num_tiles / order.num_blocks - first_head);
        if (num_heads <= 0) return;  // that was the last section
        int const per_head = params.shape.group_size * (params.rows / cfg.block_m) * (Accum::kElems * 4 / kPiece);
        char* const target = params.dq_accum + static_cast<i64>(first_head) * per_head * kPiece;
#pragma unroll 1
        for (int piece = share; piece < num_heads * per_head; piece += tiles_per_section()) {
            bulk_store(target + static_cast<i64>(piece) * kPiece, smem + Tiles::kZeros, kPiece);
        }
        bulk_finish();
        add_release(num_shares(section), 1);
    }

    // ---- dQ: what warp `warp` of `Accum` holds of a step ----
    CUFLASH_DEVICE float* dq_target(i64 dq_tile, int warp, int lane) const {
        return reinterpret_cast<float*>(params.dq_accum) + dq_tile * Accum::kElems + Accum::lane_offset(warp, lane);
    }
    // Accumulators [kBegin, kEnd).
    template <int kBegin, int kEnd, int kN>
    CUFLASH_DEVICE void add_dq(float (&dq)[kN][4], float* target, int warp) const {
        static_assert(Accum::kM == 1 && Accum::kN == kN, "a warp holds 16 rows of accumulators");
        if (cfg.dq_transposed() && Accum::row(warp) >= cfg.head_dim) return;
#pragma unroll
        for (int n = kBegin; n < kEnd; ++n) reduce_add<4>(target + Accum::offset(0, n, 0), dq[n]);
    }

    // ---- a fixed order in which blocks add to a tile of dQ ----
    // What a consumer warp does before and after it adds its part of a step.
    CUFLASH_DEVICE void await_turn(Position at) const {
        if constexpr (cfg.deterministic) mbarrier_wait(turn(), at.count & 1);
    }
    CUFLASH_DEVICE void finish_turn(int lane) const {
        if constexpr (cfg.deterministic) {
            __syncwarp();
            if (lane == 0) mbarrier_arrive(added());
        }
    }
    // One thread looks for turns and another passes them on, as either waits for global memory, which consumers should not.
    CUFLASH_DEVICE void take_turns() const {
        for_each_turn([&](int* semaphore, int turn_here, u32 parity) {
            while (load_acquire(semaphore) != turn_here) {
            }
            mbarrier_wait(seen(), ~parity & 1);
            mbarrier_arrive(turn());
        });
    }
    CUFLASH_DEVICE void pass_turns() const {
        for_each_turn([&](int* semaphore, int turn_here, u32 parity) {
            mbarrier_wait(added(), parity);
            mbarrier_arrive(seen());
            store_release(semaphore, turn_here + 1);
        });
    }
    // For each step: where turns at its tile of d_q are counted, the turn that is this block's, and the parity of the step.
    template <class Body>
    CUFLASH_DEVICE void for_each_turn(Body body) const {
        Shape const& shape = params.shape;
        u32 parity = 0;
        for (TilePosition tile;; tile = tile + 1) {
            mbarrier_wait(k_full(tile), tile.parity());
            Work const now = work(tile);
            i32 const num_steps = now.num_steps();
            mbarrier_arrive(kv_empty(tile));
            if (num_steps == kNoMore) return;
            if (num_steps == 0) continue;
            int m_block = now.first_m_block();
            int dq_tile = tile_of_dq(now.batch(), now.first_head(shape.group_size), m_block);
            for (i32 i = num_steps; i > 0; --i, parity ^= 1) {
                // How many tiles of keys come before, from the last one that these queries see.
                int const q_begin = m_block * cfg.block_m;
                int const q_end = min(shape.seqlen_q, q_begin + cfg.block_m);
                int const turn_here =
                    key_blocks(shape, q_begin, q_end, cfg.block_n).last - 1 - now.k_begin() / cfg.block_n;
                body(reinterpret_cast<int*>(params.semaphore) + dq_tile, turn_here, parity);
                ++dq_tile;
                if (++m_block == now.last()) {
                    m_block = now.first();
                    dq_tile += params.rows / cfg.block_m - (now.last() - now.first());
                }
            }
        }
    }
};
