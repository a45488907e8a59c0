// Tiles of the sm90 kernel for calls without a mask whose query tiles come in pairs: two blocks share what they
// load (`pair.cuh`). They are those of tiles.h, so that results have the same bits. The host reads this table
// too.
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles, stages), as in tiles.h
#pragma once
#define VARLEN_FA_SM90_PAIR_TILES(X) X(128, 2, 160, 2, 2)
