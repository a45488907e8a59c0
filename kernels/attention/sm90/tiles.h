// Tile sizes of the sm90 kernel for each compiled head dimension. The host reads this table too.
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles)
//
// Shared memory holds one or two query tiles, whose places their outputs take, and two stages of
// key and value tiles: at most 227 KiB less 1 KiB for barriers. With two query tiles, the next one
// is loaded while this one is in use.
#pragma once
#define VARLEN_FA_SM90_TILES(X) \
    X(64, 3, 128, 2)            \
    X(96, 3, 112, 2)            \
    X(128, 2, 160, 2)           \
    X(192, 2, 112, 1)           \
    X(256, 2, 80, 1)
