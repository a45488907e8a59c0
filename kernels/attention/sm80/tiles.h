// Tile sizes of the sm80 kernel for each compiled head dimension. The host reads this table too
// (src/backends/cuda/kernels/tiles.rs), for its grids and its sizes of shared memory.
//
//   X(head_dim, query rows, keys, keys of the masked kernel, warps)
//
// Shared memory holds the query tile and two stages of key and value tiles: at most 96 KiB, which
// every chip from SM80 on has.
//
// Wide rows have two forms alone, which do what all of them do.
#pragma once
#define VARLEN_FA_SM80_TILES(X) \
    X(32, 128, 128, 64, 4)      \
    X(64, 128, 64, 64, 4)       \
    X(96, 128, 64, 32, 4)       \
    X(128, 128, 64, 32, 4)      \
    X(192, 128, 32, 32, 8)      \
    X(256, 64, 32, 32, 4)
#define VARLEN_FA_SM80_WIDE_TILES(X) X(512, 32, 16, 16, 4)
