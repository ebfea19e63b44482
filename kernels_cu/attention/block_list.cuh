// The tiles that a tile goes with, by their positions in a list: those of a range, each at its own number, or those that
// mask_blocks.cuh has found.
#pragma once
#include "params.cuh"

template <bool kListed>
struct BlockList {
    i32 const* list;

    // Of a tile of queries (or keys); `range` is that which the band leaves.
    CUFLASH_DEVICE BlockList(ScoreParams const& score, int batch, int head, int tile)
        : list(kListed ? reinterpret_cast<i32 const*>(score.mask_blocks.at(batch, head) +
                                                      tile * score.mask_blocks.query_stride)
                       : nullptr) {}
    CUFLASH_DEVICE int length() const { return __ldg(list); }
    CUFLASH_DEVICE int first(int first_of_range) const { return kListed ? 0 : first_of_range; }
    CUFLASH_DEVICE int last(int last_of_range) const { return kListed ? length() : last_of_range; }

    // What stands at a position: which tile, and whether the mask hides some of it.
    struct Entry {
        int tile;
        bool is_partial;
    };
    CUFLASH_DEVICE Entry operator[](int position) const {
        if constexpr (!kListed) return Entry{position, false};
        int const word = __ldg(list + 1 + position);
        return Entry{word >> 1, (word & 1) != 0};
    }
};
