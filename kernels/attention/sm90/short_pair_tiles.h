// The same for shorter key tiles: those of short_tiles.h that have pairs of blocks, as in pair_tiles.h. The host
// reads this table too.
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles, stages), as in tiles.h
#pragma once
#define VARLEN_FA_SM90_SHORT_PAIR_TILES(X) X(128, 2, 128, 2, 2)
