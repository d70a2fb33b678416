// Sequences of a packed batch, cut into pieces: from this a block knows its tokens, however long the others are.
#pragma once

#include <cstdint>

// As `device/pieces.rs` writes it.
struct __align__(16) Piece {
    int32_t row, start;        // of the batch, and the first token of the sequence within it
    int32_t length, sequence;  // of the whole sequence; its place among the states
    int32_t piece, place;      // which of the sequence it is; its place among all pieces
    int32_t padding[2];
};
static_assert(sizeof(Piece) == 32, "as in pieces.rs");

// A piece of those in memory; without any, each row is a sequence, cut into `pieces_of_row`. Not PACKED: never any.
template <bool PACKED = true>
__device__ __forceinline__ Piece piece_of(const Piece* pieces, int index, int pieces_of_row, int seqlen) {
    if (PACKED && pieces) return pieces[index];
    const int row = index / pieces_of_row;
    return {row, 0, seqlen, row, index % pieces_of_row, index, {}};
}
