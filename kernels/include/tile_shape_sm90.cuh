// Tile sizes of the sm90 kernel for each compiled head dimension.
//
//   X(head_dim, warpgroups of 64 query rows, keys, output tile in the place of the query tile, overlapped)
//
// Shared memory holds the query tile, two stages of key and value tiles and, where there is room, an output tile of its own, so that
// the next query tile is loaded while the output of the last is stored: at most 227 KiB less 1 KiB for barriers.
//
// Head dimension 128 has two: the larger is faster where its items fill the multiprocessors evenly, the smaller where a few waves of
// short sequences would leave a last one half empty.
#pragma once
#ifndef VARLEN_FA_SM90_TILES
#define VARLEN_FA_SM90_TILES(X)  \
    X(64, 3, 128, false, false)  \
    X(96, 3, 160, false, false)  \
    X(128, 3, 128, false, false) \
    X(128, 2, 160, false, true)  \
    X(192, 2, 112, true, true)   \
    X(256, 2, 80, true, true)
#endif
