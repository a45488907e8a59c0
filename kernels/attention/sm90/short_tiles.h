// Shorter key tiles of the sm90 kernel, for whole tensors: where queries see few keys, less of what
// their tiles load and compute lies beyond those, and where shared memory has room for one query tile
// alone beside the long ones, it has room for two. The host reads this table too, and chooses by the
// cost model (src/call/cost.rs).
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles, stages), as in tiles.h
#pragma once
#define VARLEN_FA_SM90_SHORT_TILES(X) \
    X(64, 3, 64, 2, 4)                \
    X(96, 3, 64, 2, 3)                \
    X(128, 2, 128, 2, 2)              \
    X(128, 2, 64, 2, 3)               \
    X(192, 2, 80, 2, 2)               \
    X(192, 2, 64, 2, 2)               \
    X(256, 2, 48, 2, 2)
