// Tile sizes of the sm100 kernel for each compiled head dimension. The host reads this table too.
//
//   X(head_dim, stages of keys and of values)
//
// A block works on two tiles of 128 query rows, and on 128 keys at a time. Shared memory holds both
// query tiles, the stages of key and value tiles and one output tile: at most 227 KiB less 3 KiB
// for barriers, factors and what the warps tell one another.
#pragma once
#define VARLEN_FA_SM100_TILES(X) \
    X(64, 4)                     \
    X(96, 3)                     \
    X(128, 2)
