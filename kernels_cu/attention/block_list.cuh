// The tiles that a tile goes with, by their positions in a list: those of a range, each at its own number or turned round, or
// those that mask_blocks.cuh has found.
#pragma once
#include "params.cuh"

// A range of tiles, of which the one of `pivot` stands last, those before it lead up to it, and those behind it come first.
struct TurnedRange {
    int first = 0, last = 0, shift = 0;

    TurnedRange() = default;
    CUFLASH_DEVICE TurnedRange(int first, int last, int pivot)
        : first(first), last(last), shift(last - 1 - max(min(pivot, last - 1), first)) {}
    CUFLASH_DEVICE int operator[](int position) const {
        int const tile = position - shift;
        return tile < first ? tile + last - first : tile;
    }
};

template <bool kListed, bool kTurned = false>
struct BlockList {
    i32 const* list;
    TurnedRange turned;

    // Of a tile of queries (or keys).
    CUFLASH_DEVICE BlockList(ScoreParams const& score, int batch, int head, int tile, TurnedRange turned = {})
        : list(kListed ? reinterpret_cast<i32 const*>(score.mask_blocks.at(batch, head) +
                                                      tile * score.mask_blocks.query_stride)
                       : nullptr),
          turned(turned) {}
    CUFLASH_DEVICE int length() const { return __ldg(list); }
    CUFLASH_DEVICE int first(int first_of_range) const { return kListed ? 0 : first_of_range; }
    CUFLASH_DEVICE int last(int last_of_range) const { return kListed ? length() : last_of_range; }

    // What stands at a position: which tile, and whether the mask hides some of it.
    struct Entry {
        int tile;
        bool is_partial;
    };
    CUFLASH_DEVICE Entry operator[](int position) const {
        if constexpr (kTurned) return Entry{turned[position], false};
        if constexpr (!kListed) return Entry{position, false};
        int const word = __ldg(list + 1 + position);
        return Entry{word >> 1, (word & 1) != 0};
    }
};
