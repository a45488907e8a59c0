// Tiles of the sm90 kernel for calls with key ranges so narrow that a query tile has few key tiles: then
// it spends most of its time at its start and its end. Here several blocks share a multiprocessor, so
// that one has products while another starts or ends. The host reads this table too.
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles, stages, blocks), as in tiles.h
#pragma once
#define VARLEN_FA_SM90_NARROW_TILES(X) \
    X(64, 1, 64, 2, 3, 3)              \
    X(96, 1, 64, 2, 2, 3)
