// Shorter key tiles of the sm90 kernel for calls with key ranges whose queries see few keys: less of
// their tiles lies beyond what is seen. The host reads this table too.
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles, stages), as in tiles.h
#pragma once
#define VARLEN_FA_SM90_SHORT_RANGED_TILES(X) X(128, 2, 128, 2, 2)
