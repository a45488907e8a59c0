// Tile sizes of the sm90 kernel for each compiled head dimension. The host reads this table too.
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles, stages)
//
// Shared memory holds one or two query tiles and two to four stages of key and value tiles: at most
// 227 KiB less 2 KiB for barriers. With two query tiles, whose places their outputs take, the next one
// is loaded while this one is in use; with one, whose output takes the stages of values, it is loaded
// while this one ends. More than two stages, where there is room for them, hide how long the first keys
// of a query tile take to come.
#pragma once
#define VARLEN_FA_SM90_TILES(X) \
    X(64, 3, 128, 2, 4)         \
    X(96, 3, 112, 2, 3)         \
    X(128, 2, 160, 2, 2)        \
    X(192, 2, 112, 1, 2)        \
    X(256, 2, 80, 1, 2)
