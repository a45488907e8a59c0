// Attention forward for SM90 (Hopper): wgmma, the copy engine (TMA), warp specialisation. Persistent blocks of one producer
// warpgroup and two or three consumer warpgroups, 64 query rows each, as in FlashAttention-3 (Shah et al., 2024).
//
//                   work list                             shared memory
//   producer  warp 0 ────────▶ copy engine ──▶  Q Q │ K K │ V V    two stages of K and V; full and empty barriers for each.
//             warp 1 zeroes dropped rows of V ────────────────┘    The output of a query tile takes its place; where there is
//                                                                  room for two, the next one is loaded early
//             warps 2, 3 write the rows without a query tile as zeros
//
//   consumers, taking turns, S the scores of the next key tile, O the product of this one
//     0   S₁ O₀  softmax₁  S₂ O₁  softmax₂  S₃ O₂ ...
//     1          S₁ O₀  softmax₁  S₂ O₁  softmax₂ ...
//
// The tensor cores have to be fed while a softmax runs, which takes about as long as two products. A consumer issues the scores of the
// next tile together with the product of this one, and another's softmax runs under both. The loop has no branch but its barriers, and
// what the consumers count by is uniform to the compiler, so that descriptors stay in uniform registers: masked tiles come first and
// have a loop of their own, and scores beyond the range of the fast softmax are found out at the end, when the block starts again with
// the exact one. Query tiles of a last wave that would leave multiprocessors idle are shared out by keys. What was measured about all
// of this is in docs/PERFORMANCE.md.
//
// One kernel serves padded tensors, packed ones and padded ones under a mask, in place. Only the producer knows which: it passes on what
// a consumer has to know of a query tile (`TileRows`) and of a key tile (`TileKeys`) in shared memory, along with the data. Scores
// are masked in tiles that need it, and nowhere else. Rows of V that are not kept hold anything, NaN included, and P·V multiplies
// them by zero: where the copy engine does not leave zeros itself, warp 1 of the producer does, before consumers see the tile.
#include "include/listed_rows.cuh"
#include "include/params_sm90.cuh"
#include "include/ptx/mbarrier.cuh"
#include "include/ptx/tma.cuh"
#include "include/ptx/warpgroup.cuh"
#include "include/ptx/wgmma.cuh"
#include "include/schedule_sm90.cuh"
#include "include/shared_tile.cuh"
#include "include/tile_shape_sm90.cuh"
#include "include/warpgroup_softmax.cuh"

namespace sm90 {

constexpr float LN_2 = 0.6931471805599453f;
constexpr int WARPGROUP = 128;
constexpr int STAGES = 2;

// Named barriers. Those of a warpgroup are as many as there are warpgroups at most.
constexpr int BARRIER_TURN = 1;
constexpr int BARRIER_WARPGROUP = 4;
constexpr int BARRIER_END = 7;

// What consumers know of a query tile.
struct TileRows {
    // Negative where nothing is left to do. The first are masked; one at least, if there is one.
    int32_t key_tiles;
    int32_t masked_tiles;
    int32_t batch;
    int32_t head;
    // Padded tensors: rows past the end are clipped by the copy engine.
    int32_t clips;
    // Of the parts of query tiles, all in a row, the one that this is; negative for a query tile with all its keys.
    int32_t part;
    // Of each 16 rows, one warp's: the first, how many are the tile's, and which of them are kept.
    struct Group {
        int32_t first_row;
        int32_t rows;
        uint32_t kept;
    } groups[12];
};

// What consumers know of a key tile.
struct TileKeys {
    // Rows of V that are not kept have to be zeroed.
    uint32_t mended;
    // For the masked tiles.
    uint32_t kept[6];
};

template <typename T_, int D_, int WARPGROUPS_, int TILE_N_, int QUERY_TILES_>
struct Shape {
    using T = T_;
    static constexpr int D = D_;
    static constexpr int WARPGROUPS = WARPGROUPS_;
    static constexpr int TILE_M = WARPGROUPS * 64;
    static constexpr int TILE_N = TILE_N_;
    static constexpr int THREADS = (WARPGROUPS + 1) * WARPGROUP;
    static constexpr int CONSUMER_WARPS = WARPGROUPS * 4;
    static constexpr int QUERY_TILES = QUERY_TILES_;
    // For the product, before exponentials are computed; they would run beside it, but registers are too few.
    static constexpr bool WAITS_EARLY = D == 256;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : 160;

    using TileQ = SharedTile<TILE_M, D>;
    using TileKV = SharedTile<TILE_N, D>;
    static constexpr int PANEL = TileQ::PANEL;
    static constexpr int PANELS = D / PANEL;
    static constexpr int ROW_BYTES = PANEL * 2;
    static constexpr int Q = 0;
    static constexpr int K = Q + QUERY_TILES * TileQ::BYTES;
    static constexpr int V = K + STAGES * TileKV::BYTES;
    static constexpr int ROWS_INFO = V + STAGES * TileKV::BYTES;
    static constexpr int KEYS_INFO = ROWS_INFO + 2 * sizeof(TileRows);
    static constexpr int BARRIERS = KEYS_INFO + STAGES * sizeof(TileKeys);
    static constexpr int FULL_Q = BARRIERS;
    static constexpr int EMPTY_Q = FULL_Q + 8 * QUERY_TILES * WARPGROUPS;
    static constexpr int FULL_K = EMPTY_Q + 8 * QUERY_TILES * WARPGROUPS;
    static constexpr int EMPTY_K = FULL_K + 8 * STAGES;
    static constexpr int FULL_V = EMPTY_K + 8 * STAGES;
    static constexpr int EMPTY_V = FULL_V + 8 * STAGES;
    // Copied but not yet zeroed where it has to be.
    static constexpr int RAW_V = EMPTY_V + 8 * STAGES;
    // Whether the block has to start again, and for each warpgroup, how many parts of its query tile were done before.
    static constexpr int LEFT_RANGE = RAW_V + 8 * STAGES;
    static constexpr int PARTS_DONE = LEFT_RANGE + 4;
    static constexpr int BYTES = PARTS_DONE + 4 * WARPGROUPS;
    // What the host asks for: the tiles and 1 KiB.
    static_assert(BYTES <= ROWS_INFO + 1024 && ROWS_INFO + 1024 <= 227 * 1024);
    static_assert(TILE_N % 16 == 0 && TILE_N <= 192 && TILE_M <= 192);

    // Where the query tile of a work lies, and what belongs to it for each warpgroup.
    __device__ static int query_tile(int works) { return Q + works % QUERY_TILES * TileQ::BYTES; }
    __device__ static int full_q(int works, int warpgroup) { return FULL_Q + 8 * (works % QUERY_TILES * WARPGROUPS + warpgroup); }
    __device__ static int empty_q(int works, int warpgroup) { return EMPTY_Q + 8 * (works % QUERY_TILES * WARPGROUPS + warpgroup); }
    // Of the phase in which that work's queries are there; those before have been given back at the end of the other one.
    __device__ static uint32_t parity_q(int works) { return works / QUERY_TILES % 2; }
};

// The position of a tile in the ring of stages.
struct Turn {
    uint32_t count = 0;
    __device__ int stage() const { return count % STAGES; }
    __device__ uint32_t parity() const { return count / STAGES % 2; }
};

// Called at the end of all query tiles by the consumers and by the producer's warps that follow them: whether scores left the range of
// `WarpgroupSoftmax`, so that every tile is computed again.
template <typename S>
__device__ inline bool starts_again(const AttentionParamsSm90& params, unsigned char* shared) {
    ptx::barrier_sync(BARRIER_END, S::WARPGROUPS * WARPGROUP + (params.form == FORM_DENSE ? 32 : 64));
    return ptx::uniform(*reinterpret_cast<volatile uint32_t*>(shared + S::LEFT_RANGE)) != 0;
}

template <typename S>
struct Producer {
    const AttentionParamsSm90& params;
    unsigned char* shared;
    uint32_t base;
    int lane;
    // Which keys the tiles of this query tile come from.
    int batch;
    int kv_head;
    int first_key;
    int keys;
    int key_tiles;
    const int32_t* tile_list;
    // The work's key tiles.
    int first_tile;
    int end_tile;
    // Those before this one need their scores changed: for keys that are not kept, or for a negative scale.
    int masked_end;

    __device__ Producer(const AttentionParamsSm90& params, unsigned char* shared, uint32_t base)
        : params(params), shared(shared), base(base), lane(threadIdx.x % 32) {}

    __device__ void run() {
        Turn turn;
        int works = 0;
        for (bool is_exact = false;; is_exact = true) {
            Schedule<S::TILE_M> schedule(params);
            Work work;
            for (; schedule.next(work) && !(is_exact && work.part >= 0); ++works) {
                const TileRows::Group group = find(work);
                int tile = first_tile < end_tile ? tile_at(first_tile) : 0;
                if (first_tile < end_tile) load_keys(first_tile, tile, turn);
                load_queries(work, works, group);
                for (int i = first_tile; i < end_tile; ++i) {
                    int next = 0;
                    if (i + 1 < end_tile) {
                        next = tile_at(i + 1);
                        load_keys(i + 1, next, {turn.count + 1});
                    }
                    load_values(i, tile, turn);
                    tile = next;
                    ++turn.count;
                }
            }
            for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) wait_for_room(works, warpgroup);
            if (lane == 0) {
                rows_info(works).key_tiles = -1;
                for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) ptx::mbarrier_arrive(base + S::full_q(works, warpgroup));
            }
            ++works;
            if (is_exact || !starts_again<S>(params, shared)) return;
        }
    }

private:
    // Two, since one warpgroup may be at the next query tile already.
    __device__ TileRows& rows_info(int works) const { return reinterpret_cast<TileRows*>(shared + S::ROWS_INFO)[works % 2]; }

    // Until a warpgroup has given back the queries whose place the work's take.
    __device__ void wait_for_room(int works, int warpgroup) const {
        ptx::mbarrier_wait(base + S::empty_q(works, warpgroup), S::parity_q(works) ^ 1);
    }

    // Where the work's keys are, and this lane's 16 query rows.
    __device__ TileRows::Group find(const Work& work) {
        batch = work.group;
        first_key = 0;
        keys = params.seq_k;
        kv_head = work.head / params.group_size;
        int first_row = work.tile * S::TILE_M + lane * GROUP_ROWS;
        int queries = params.seq_q;
        uint32_t kept = 0xffff;
        if (params.form == FORM_FUSED) {
            const BatchTiles tiles = params.batches[work.group];
            batch = tiles.batch;
            key_tiles = tiles.key_tiles;
            masked_end = tiles.masked_key_tiles;
            tile_list = params.key_tiles + tiles.first_key_tile;
            const int tile = tiles.first_query_tile + work.tile;
            if (lane < S::TILE_M / GROUP_ROWS) {
                first_row = params.query_groups[tile * (S::TILE_M / GROUP_ROWS) + lane];
                kept = group_bits(params.row_bits, params.row_words, batch, first_row);
            }
        } else {
            if (params.form == FORM_PACKED) {
                first_row += params.cu_seqlens_q[work.group];
                queries = params.cu_seqlens_q[work.group + 1];
                first_key = params.cu_seqlens_k[work.group];
                keys = max(params.cu_seqlens_k[work.group + 1] - first_key, 0);
                batch = 0;
            }
            key_tiles = (keys + S::TILE_N - 1) / S::TILE_N;
            masked_end = keys % S::TILE_N == 0 ? 0 : 1;
        }
        if (params.score_scale < 0.0f) masked_end = key_tiles;
        first_tile = 0;
        end_tile = key_tiles;
        if (work.part >= 0) {
            const int part = work.part % params.parts;
            first_tile = key_tiles * part / params.parts;
            end_tile = key_tiles * (part + 1) / params.parts;
        }
        return {first_row, min(max(queries - first_row, 0), GROUP_ROWS), kept};
    }

    // Describes the query tile, and loads each warpgroup's rows. With two places all warpgroups have long left the one before the
    // last; with one, each one's rows are loaded as soon as it has finished with those before.
    __device__ void load_queries(const Work& work, int works, const TileRows::Group& group) const {
        if (S::QUERY_TILES == 2) {
            for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) wait_for_room(works, warpgroup);
        }
#pragma unroll 1
        for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) {
            const uint32_t full = base + S::full_q(works, warpgroup);
            if (S::QUERY_TILES == 1) wait_for_room(works, warpgroup);
            if (warpgroup == 0) {
                TileRows& rows = rows_info(works);
                if (lane < S::TILE_M / GROUP_ROWS) rows.groups[lane] = group;
                if (lane == 0) {
                    rows.key_tiles = end_tile - first_tile;
                    rows.masked_tiles = min(max(masked_end - first_tile, 1), end_tile - first_tile);
                    rows.part = work.part;
                    rows.batch = batch;
                    rows.head = work.head;
                    rows.clips = params.form != FORM_PACKED;
                }
                __syncwarp();
            }
            if (lane == 0) ptx::mbarrier_arrive_expect(full, S::TileQ::BYTES / S::WARPGROUPS);
            __syncwarp();
            if (lane / 4 == warpgroup) {
                load_group<S::TILE_M>(params.q_map, base + S::query_tile(works), full, ptx::policy_evict_first(), group.first_row, work.head);
            }
        }
    }

    // A key tile's first key in the tensor, or, negative, ~ its number among the masked ones of the lists.
    // Without lists the last tile comes first, since it may be masked.
    __device__ int tile_at(int i) const {
        return params.form == FORM_FUSED ? tile_list[i] : first_key + (key_tiles - 1 - i) * S::TILE_N;
    }

    template <int ROWS>
    __device__ void load_group(const ptx::TensorMap& map, uint32_t to, uint32_t barrier, uint64_t policy, int row, int head) const {
#pragma unroll
        for (int panel = 0; panel < S::PANELS; ++panel) {
            ptx::tma_load(to + (panel * ROWS + lane * GROUP_ROWS) * S::ROW_BYTES, &map, barrier, policy, panel * S::PANEL, row, head, batch);
        }
    }

    __device__ void load_tile(const ptx::TensorMap& map, const ptx::TensorMap& group_map, uint32_t to, uint32_t barrier, int tile) const {
        const uint64_t policy = ptx::policy_evict_last();
        if (tile >= 0) {
            if (lane < S::PANELS) {
                ptx::tma_load(to + lane * S::TILE_N * S::ROW_BYTES, &map, barrier, policy, lane * S::PANEL, tile, kv_head, batch);
            }
        } else if (lane < S::TILE_N / GROUP_ROWS) {
            load_group<S::TILE_N>(group_map, to, barrier, policy, params.key_groups[~tile * (S::TILE_N / GROUP_ROWS) + lane], kv_head);
        }
    }

    __device__ bool is_mended(int i, int tile) const {
        return params.form == FORM_FUSED ? tile < 0 : params.form == FORM_PACKED && i == 0 && keys % S::TILE_N != 0;
    }

    __device__ void load_keys(int i, int tile, Turn turn) const {
        const uint32_t full = base + S::FULL_K + 8 * turn.stage();
        ptx::mbarrier_wait(base + S::EMPTY_K + 8 * turn.stage(), turn.parity() ^ 1);
        auto& info = reinterpret_cast<TileKeys*>(shared + S::KEYS_INFO)[turn.stage()];
        if (i < masked_end || i == first_tile) describe(tile, info);
        if (lane == 0) info.mended = is_mended(i, tile);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive_expect(full, S::TileKV::BYTES);
        __syncwarp();
        load_tile(params.k_map, params.k_group_map, base + S::K + turn.stage() * S::TileKV::BYTES, full, tile);
    }

    // Which keys of a masked tile are kept.
    __device__ void describe(int tile, TileKeys& info) const {
        uint32_t kept = 0xffffffff;
        if (params.form == FORM_FUSED && tile < 0) {
            kept = 0;
            if (lane < S::TILE_N / GROUP_ROWS) {
                const int first = params.key_groups[~tile * (S::TILE_N / GROUP_ROWS) + lane];
                kept = group_bits(params.key_bits, params.key_words, batch, first);
            }
            const uint32_t even = __shfl_sync(0xffffffff, kept, 2 * lane % 32);
            const uint32_t odd = __shfl_sync(0xffffffff, kept, (2 * lane + 1) % 32);
            kept = even | odd << 16;
        } else if (params.form != FORM_FUSED) {
            const int left = keys - (tile - first_key) - lane * 32;
            kept = left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
        }
        if (lane < (S::TILE_N + 31) / 32) info.kept[lane] = kept;
    }

    __device__ void load_values(int i, int tile, Turn turn) const {
        const uint32_t full = base + (is_mended(i, tile) ? S::RAW_V : S::FULL_V) + 8 * turn.stage();
        ptx::mbarrier_wait(base + S::EMPTY_V + 8 * turn.stage(), turn.parity() ^ 1);
        if (lane == 0) ptx::mbarrier_arrive_expect(full, S::TileKV::BYTES);
        __syncwarp();
        load_tile(params.v_map, params.v_group_map, base + S::V + turn.stage() * S::TileKV::BYTES, full, tile);
    }
};

// The warp that zeroes rows of V which are not kept: it follows the consumers' barriers, and opens theirs for such a tile.
template <typename S>
__device__ inline void mend_values(const AttentionParamsSm90& params, unsigned char* shared, uint32_t base) {
    const int lane = threadIdx.x % 32;
    Turn turn;
    // One bit a stage.
    uint32_t raw_parities = 0;
    bool is_exact = false;
    for (int works = 0;; ++works) {
        ptx::mbarrier_wait(base + S::full_q(works, 0), S::parity_q(works));
        const int key_tiles = reinterpret_cast<const TileRows*>(shared + S::ROWS_INFO)[works % 2].key_tiles;
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(base + S::empty_q(works, 0));
        if (key_tiles < 0) {
            if (is_exact || !starts_again<S>(params, shared)) return;
            is_exact = true;
        }
        for (int i = 0; i < key_tiles; ++i, ++turn.count) {
            ptx::mbarrier_wait(base + S::FULL_K + 8 * turn.stage(), turn.parity());
            const auto& info = reinterpret_cast<const TileKeys*>(shared + S::KEYS_INFO)[turn.stage()];
            const bool is_mended = info.mended;
            uint32_t kept = lane < (S::TILE_N + 31) / 32 && is_mended ? info.kept[lane] : 0;
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(base + S::EMPTY_K + 8 * turn.stage());
            if (!is_mended) continue;
            ptx::mbarrier_wait(base + S::RAW_V + 8 * turn.stage(), raw_parities >> turn.stage() & 1);
            raw_parities ^= 1u << turn.stage();
            unsigned char* const tile = shared + S::V + turn.stage() * S::TileKV::BYTES;
            // A panel's row is as many chunks of 16 bytes; the warp zeroes them for several rows at a time.
            constexpr int CHUNKS = S::ROW_BYTES / 16;
            for (int first = 0; first < S::TILE_N; first += 32 / CHUNKS) {
                const int row = first + lane / CHUNKS;
                const uint32_t word = __shfl_sync(0xffffffff, kept, first / 32);
                if ((word >> (row % 32) & 1) == 0) {
#pragma unroll
                    for (int panel = 0; panel < S::PANELS; ++panel) {
                        *reinterpret_cast<uint4*>(tile + (panel * S::TILE_N + row) * S::ROW_BYTES + lane % CHUNKS * 16) = uint4{0, 0, 0, 0};
                    }
                }
            }
            ptx::fence_async_proxy();
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(base + S::FULL_V + 8 * turn.stage());
        }
    }
}

// `write_zero_spans` for the padded output of packed rows: the rows that no packed one goes to, a warp's at a time.
template <typename T>
__device__ inline void write_masked_zeros(const AttentionParamsSm90& params, int warp, int warps) {
    const int lane = threadIdx.x % 32;
    const int chunks = params.head_dim / 8;
    const int step = gridDim.x * warps * 32;
    for (int first = (blockIdx.x * warps + warp) * 32; first < params.padded_rows; first += step) {
        const bool is_masked = first + lane < params.padded_rows && params.inv_indices[first + lane] < 0;
        for (uint32_t left = __ballot_sync(0xffffffff, is_masked); left != 0; left &= left - 1) {
            const int flat = first + __ffs(left) - 1;
            T* const out = static_cast<T*>(params.out) + static_cast<int64_t>(flat / params.seq_q) * params.out_strides.batch +
                           static_cast<int64_t>(flat % params.seq_q) * params.out_strides.token;
            for (int index = lane; index < params.heads * chunks; index += 32) {
                *reinterpret_cast<uint4*>(out + index / chunks * params.out_strides.head + index % chunks * 8) = uint4{0, 0, 0, 0};
            }
        }
    }
}

template <typename S>
struct Consumer {
    using T = typename S::T;
    static constexpr int N = S::TILE_N;
    static constexpr int D = S::D;
    static constexpr int ROW_BYTES = S::ROW_BYTES;

    const AttentionParamsSm90& params;
    unsigned char* shared;
    uint32_t base;
    int warpgroup;

    __device__ Consumer(const AttentionParamsSm90& params, unsigned char* shared, uint32_t base, int warpgroup)
        : params(params), shared(shared), base(base), warpgroup(warpgroup) {}

    using Matrix = ptx::SharedMatrix<ROW_BYTES>;

    __device__ Matrix queries(int works) const { return {base + S::query_tile(works) + warpgroup * 64 * ROW_BYTES, 16}; }
    __device__ Matrix keys(int stage) const { return {base + S::K + stage * S::TileKV::BYTES, 16}; }
    __device__ Matrix values(int stage) const { return {base + S::V + stage * S::TileKV::BYTES, N * ROW_BYTES}; }

    // What a softmax leaves of this lane's two rows: zeros for a query tile without keys.
    struct RowSums {
        float sum[2] = {0.0f, 0.0f};
        float log2_sum[2];
        bool left_range[2] = {false, false};
        // Over all keys: not a part of a query tile whose other parts are not done.
        bool is_whole = true;

        template <typename Softmax>
        __device__ void take(const Softmax& softmax) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[half] = softmax.row_sum[half];
                log2_sum[half] = softmax.log2_sum(half);
                left_range[half] = softmax.left_range(half);
            }
        }
    };

    // What this warp has to know of its 16 rows to write them.
    struct WarpRows {
        int batch;
        int head;
        int first_row;
        int rows;
        uint32_t kept;
        bool clips;

        __device__ void read(const TileRows& tile) {
            const auto& group = tile.groups[threadIdx.x / 32 - 4];
            batch = tile.batch;
            head = tile.head;
            first_row = group.first_row;
            rows = group.rows;
            kept = group.kept;
            clips = tile.clips;
        }
    };

    // S = Q·Kᵀ of this warpgroup's rows and a tile of keys.
    __device__ static void issue_scores(float (&scores)[N / 8][4], Matrix q, Matrix k) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            const int panel = step * 16 / S::PANEL;
            const int column = step * 16 % S::PANEL * 2;
            ptx::Wgmma<N, T>::ss(scores, q.at(panel * S::TILE_M * ROW_BYTES + column), k.at(panel * N * ROW_BYTES + column), step > 0);
        }
        ptx::wgmma_commit();
    }

    // O += P·V
    __device__ static void issue_output(float (&acc)[D / 8][4], uint32_t (&probs)[N / 16][4], Matrix v) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < N / 16; ++step) ptx::Wgmma<D, T>::rs(acc, probs[step], v.at(step * 16 * ROW_BYTES), 1);
        ptx::wgmma_commit();
    }

    __device__ static void pack(uint32_t (&probs)[N / 16][4], const float (&scores)[N / 8][4]) {
#pragma unroll
        for (int step = 0; step < N / 16; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = scores[2 * step + i / 2];
                probs[step][i] = ptx::pack_pair<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
        }
    }

    __device__ static void rescale(float (&acc)[D / 8][4], const float (&factor)[2]) {
#pragma unroll
        for (int tile = 0; tile < D / 8; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[tile][i] *= factor[i / 2];
        }
    }

    __device__ const TileKeys& keys_info(int stage) const {
        return reinterpret_cast<const TileKeys*>(shared + S::KEYS_INFO)[stage];
    }

    __device__ void mask(float (&scores)[N / 8][4], int stage) const {
        // The maximum is taken before scaling, so the sign of the scale goes to the scores.
        if (params.score_scale < 0.0f) {
#pragma unroll
            for (int tile = 0; tile < N / 8; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[tile][i] = -scores[tile][i];
            }
        }
#pragma unroll
        for (int word = 0; word < (N + 31) / 32; ++word) {
            const uint32_t kept = keys_info(stage).kept[word] >> (threadIdx.x % 4 * 2);
#pragma unroll
            for (int tile = word * 4; tile < word * 4 + 4 && tile < N / 8; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if ((kept >> (tile % 4 * 8 + i % 2) & 1) == 0) scores[tile][i] = -INFINITY;
                }
            }
        }
    }

    __device__ void arrive(int barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(base + barrier);
    }

    // Consumers issue their products in turn.
    __device__ void wait_turn() const {
        ptx::barrier_sync(BARRIER_TURN + warpgroup, 2 * WARPGROUP);
    }
    __device__ void give_turn() const {
        const int next = warpgroup + 1 == S::WARPGROUPS ? 0 : warpgroup + 1;
        ptx::barrier_arrive(BARRIER_TURN + next, 2 * WARPGROUP);
    }

    __device__ void run() {
        for (bool is_exact = false;; is_exact = true) {
            if (warpgroup + 1 == S::WARPGROUPS) give_turn();
            for (; open(); ++works) {
                float acc[D / 8][4] = {};
                RowSums sums;
                const bool is_part = part() >= 0;
                if (!has_rows || (key_tiles == 0 && !is_part)) {
                    pass(is_exact || is_part);
                    sums.is_whole = has_rows;
                } else if (is_exact || is_part) {
                    attend_exactly(acc, sums);
                } else {
                    attend(acc, sums);
                }
                turn.count += key_tiles;
                if (sums.is_whole) {
                    write_output(acc, sums);
                } else {
                    arrive(S::empty_q(works, warpgroup));
                }
            }
            give_back_stored();
            arrive(S::empty_q(works, warpgroup));
            ++works;
            if (warpgroup == 0) wait_turn();
            // Before they are written again, or the block ends.
            ptx::tma_store_wait();
            if (is_exact || !starts_again<S>(params, shared)) return;
        }
    }

private:
    __device__ const TileRows& rows_info(int works) const {
        return reinterpret_cast<const TileRows*>(shared + S::ROWS_INFO)[works % 2];
    }

    // As in TileRows: read where it is needed, since registers are few.
    __device__ int part() const { return ptx::uniform(rows_info(works).part); }

    // Waits for the query tile of `works`. False if there is none.
    __device__ bool open() {
        ptx::mbarrier_wait(base + S::full_q(works, warpgroup), S::parity_q(works));
        works = ptx::uniform(works);
        turn.count = ptx::uniform(turn.count);
        const auto& rows = rows_info(works);
        key_tiles = ptx::uniform(rows.key_tiles);
        masked_tiles = ptx::uniform(rows.masked_tiles);
        // The tile's groups are filled from the first on.
        has_rows = ptx::uniform(rows.groups[warpgroup * 4].rows) > 0;
        return key_tiles >= 0;
    }

    // The output of the query tile before lies in that one's place, which is given back when it has left.
    __device__ void give_back_stored() {
        if (!is_stored) return;
        if (threadIdx.x % 32 == 0) ptx::tma_store_wait_read();
        arrive(S::empty_q(works - 1, warpgroup));
        is_stored = false;
    }

    // Keeps pace with the other warpgroups where there is nothing to compute.
    __device__ void pass(bool is_in_order) {
        give_back_stored();
        Turn turn = this->turn;
        for (int i = 0; i < key_tiles; ++i, ++turn.count) {
            ptx::mbarrier_wait(base + S::FULL_K + 8 * turn.stage(), turn.parity());
            if (i > 0 && !is_in_order) {
                wait_turn();
                give_turn();
            }
            arrive(S::EMPTY_K + 8 * turn.stage());
            ptx::mbarrier_wait(base + S::FULL_V + 8 * turn.stage(), turn.parity());
            arrive(S::EMPTY_V + 8 * turn.stage());
        }
    }

    // The scores of a tile are issued before the product of the tile before.
    __device__ void attend(float (&acc)[D / 8][4], RowSums& sums) {
        WarpgroupSoftmax softmax(fabsf(params.score_scale));
        const Matrix q = queries(works);
        Turn turn = this->turn;
        const uint32_t last_masked = turn.count + masked_tiles - 1;
        const uint32_t last = turn.count + key_tiles - 1;
        uint32_t probs[N / 16][4];
        float scores[N / 8][4];
        ptx::mbarrier_wait(base + S::FULL_K + 8 * turn.stage(), turn.parity());
        issue_scores(scores, q, keys(turn.stage()));
        give_back_stored();
        ptx::wgmma_wait<0>();
        ptx::pin_registers(scores);
        mask(scores, turn.stage());
        arrive(S::EMPTY_K + 8 * turn.stage());
        softmax.raise_max(scores);
        softmax.exponentiate(scores);
        pack(probs, scores);
        for (; turn.count != last_masked; ++turn.count) step<true>(acc, probs, softmax, q, turn);
        for (; turn.count != last; ++turn.count) step<false>(acc, probs, softmax, q, turn);
        const Matrix v = values(turn.stage());
        ptx::mbarrier_wait(base + S::FULL_V + 8 * turn.stage(), turn.parity());
        issue_output(acc, probs, v);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(acc);
        arrive(S::EMPTY_V + 8 * turn.stage());
        softmax.finish();
        sums.take(softmax);
    }

    // The product of a turn's tile, and the probabilities of the next.
    template <bool IS_MASKED>
    __device__ void step(float (&acc)[D / 8][4], uint32_t (&probs)[N / 16][4], WarpgroupSoftmax& softmax, Matrix q, Turn turn) {
        const Turn next = {turn.count + 1};
        const Matrix k = keys(next.stage());
        const Matrix v = values(turn.stage());
        float scores[N / 8][4];
        ptx::mbarrier_wait(base + S::FULL_K + 8 * next.stage(), next.parity());
        wait_turn();
        issue_scores(scores, q, k);
        // Under the scores' product.
        ptx::mbarrier_wait(base + S::FULL_V + 8 * turn.stage(), turn.parity());
        issue_output(acc, probs, v);
        give_turn();
        ptx::wgmma_wait<1>();
        ptx::pin_registers(scores);
        if constexpr (IS_MASKED) mask(scores, next.stage());
        arrive(S::EMPTY_K + 8 * next.stage());
        softmax.raise_max(scores);
        if constexpr (!S::WAITS_EARLY) softmax.exponentiate(scores);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(acc);
        ptx::pin_registers(probs);
        arrive(S::EMPTY_V + 8 * turn.stage());
        if constexpr (S::WAITS_EARLY) softmax.exponentiate(scores);
        rescale(acc, softmax.factor);
        pack(probs, scores);
    }

    // Scores, softmax and product one after the other, with the exact softmax.
    __device__ void attend_exactly(float (&acc)[D / 8][4], RowSums& sums) {
        ExactSoftmax softmax(fabsf(params.score_scale));
        const Matrix q = queries(works);
        Turn turn = this->turn;
        const uint32_t masked_end = turn.count + masked_tiles;
        const uint32_t end = turn.count + key_tiles;
        give_back_stored();
        for (; turn.count != masked_end; ++turn.count) step_exactly<true>(acc, softmax, q, turn);
        for (; turn.count != end; ++turn.count) step_exactly<false>(acc, softmax, q, turn);
        softmax.finish();
        if (part() >= 0) sums.is_whole = merge_parts(acc, softmax);
        sums.take(softmax);
    }

    template <bool IS_MASKED>
    __device__ void step_exactly(float (&acc)[D / 8][4], ExactSoftmax& softmax, Matrix q, Turn turn) {
        const int stage = turn.stage();
        const Matrix k = keys(stage);
        const Matrix v = values(stage);
        float scores[N / 8][4];
        uint32_t probs[N / 16][4];
        ptx::mbarrier_wait(base + S::FULL_K + 8 * stage, turn.parity());
        issue_scores(scores, q, k);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(scores);
        if constexpr (IS_MASKED) mask(scores, stage);
        arrive(S::EMPTY_K + 8 * stage);
        softmax.raise_max(scores);
        softmax.exponentiate(scores);
        rescale(acc, softmax.factor);
        pack(probs, scores);
        ptx::mbarrier_wait(base + S::FULL_V + 8 * stage, turn.parity());
        issue_output(acc, probs, v);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(acc);
        ptx::pin_registers(probs);
        arrive(S::EMPTY_V + 8 * stage);
    }

    // This warpgroup's share of a part goes to global memory. The last one of a query tile adds all of them up; the others return false.
    // Always in the same order, so that sums are the same whichever is last.
    __device__ bool merge_parts(float (&acc)[D / 8][4], ExactSoftmax& softmax) const {
        constexpr int CHUNKS = D / 8 + 1;
        const int thread = threadIdx.x % WARPGROUP;
        const int part = this->part();
        const int query_tile = part / params.parts;
        const auto chunks_of = [&](int part) {
            return params.part_chunks + (static_cast<int64_t>(part) * S::WARPGROUPS + warpgroup) * CHUNKS * WARPGROUP + thread;
        };
        float4* const mine = chunks_of(part);
        __stcg(mine, float4{softmax.row_max[0], softmax.row_max[1], softmax.row_sum[0], softmax.row_sum[1]});
#pragma unroll
        for (int tile = 0; tile < D / 8; ++tile) {
            __stcg(mine + (tile + 1) * WARPGROUP, float4{acc[tile][0], acc[tile][1], acc[tile][2], acc[tile][3]});
        }
        __threadfence();
        ptx::barrier_sync(BARRIER_WARPGROUP + warpgroup, WARPGROUP);
        auto* const done = reinterpret_cast<volatile uint32_t*>(shared + S::PARTS_DONE) + warpgroup;
        if (thread == 0) *done = atomicAdd(params.parts_done + query_tile * S::WARPGROUPS + warpgroup, 1u);
        ptx::barrier_sync(BARRIER_WARPGROUP + warpgroup, WARPGROUP);
        if (*done + 1 != params.parts) return false;
        __threadfence();
        const int first = query_tile * params.parts;
        for (int other = first; other < first + params.parts; ++other) {
            const float4 ends = __ldcg(chunks_of(other));
            softmax.row_max[0] = fmaxf(softmax.row_max[0], ends.x);
            softmax.row_max[1] = fmaxf(softmax.row_max[1], ends.y);
        }
        softmax.row_sum[0] = softmax.row_sum[1] = 0.0f;
#pragma unroll
        for (int tile = 0; tile < D / 8; ++tile) acc[tile][0] = acc[tile][1] = acc[tile][2] = acc[tile][3] = 0.0f;
#pragma unroll 1
        for (int other = first; other < first + params.parts; ++other) {
            const float4* const theirs = chunks_of(other);
            const float4 ends = __ldcg(theirs);
            const float weights[2] = {softmax.weight(ends.x, softmax.row_max[0]), softmax.weight(ends.y, softmax.row_max[1])};
            softmax.row_sum[0] += ends.z * weights[0];
            softmax.row_sum[1] += ends.w * weights[1];
#pragma unroll
            for (int tile = 0; tile < D / 8; ++tile) {
                const float4 sums = __ldcg(theirs + (tile + 1) * WARPGROUP);
                acc[tile][0] += sums.x * weights[0];
                acc[tile][1] += sums.y * weights[0];
                acc[tile][2] += sums.z * weights[1];
                acc[tile][3] += sums.w * weights[1];
            }
        }
        return true;
    }

    // Through the query tile's place in shared memory to the copy engine; or to 16-byte stores, where it would write rows of the next
    // sequence, or where the rows go to places of their own.
    __device__ void write_output(const float (&acc)[D / 8][4], const RowSums& sums) {
        const int lane = threadIdx.x % 32;
        const int warp = threadIdx.x / 32 - 4;
        const int tile_start = S::query_tile(works);
        WarpRows mine;
        mine.read(rows_info(works));
        // Every warp is done with the query rows.
        ptx::barrier_sync(BARRIER_WARPGROUP + warpgroup, WARPGROUP);
        bool zero[2];
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + lane / 4;
            const float sum = sums.sum[half];
            const bool is_kept = mine.kept >> row & 1;
            if (sums.left_range[half] && is_kept && row < mine.rows) *reinterpret_cast<volatile uint32_t*>(shared + S::LEFT_RANGE) = 1;
            zero[half] = sum == 0.0f || !is_kept;
            inverse[half] = zero[half] ? 0.0f : __fdividef(1.0f, sum);
            if (params.lse != nullptr && lane % 4 == 0 && row < mine.rows) {
                const float lse = zero[half] ? -INFINITY : sums.log2_sum[half] * LN_2;
                params.lse[mine.head * params.lse_head_stride + static_cast<int64_t>(mine.batch) * params.seq_q + mine.first_row + row] = lse;
            }
        }
        // Four matrices of 8 rows x 8 columns at a time: upper and lower rows of two chunks.
        const int row = warp * GROUP_ROWS + lane % 16;
#pragma unroll
        for (int tile = 0; tile < D / 8; tile += 2) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i % 2;
                const float(&pair)[4] = acc[tile + i / 2];
                // Selected, not multiplied: a dropped row may hold NaN.
                const float low = zero[half] ? 0.0f : pair[2 * half] * inverse[half];
                const float high = zero[half] ? 0.0f : pair[2 * half + 1] * inverse[half];
                words[i] = ptx::pack_pair<T>(low, high);
            }
            ptx::stmatrix_x4(base + tile_start + S::TileQ::offset(row, tile + lane / 16), words);
        }
        if (params.out_rows == nullptr && (mine.clips || mine.rows == GROUP_ROWS)) {
            ptx::fence_async_proxy();
            __syncwarp();
            if (lane == 0) {
#pragma unroll
                for (int panel = 0; panel < S::PANELS; ++panel) {
                    const uint32_t from = base + tile_start + (panel * S::TILE_M + warp * GROUP_ROWS) * ROW_BYTES;
                    ptx::tma_store(&params.out_map, from, panel * S::PANEL, mine.first_row, mine.head, mine.batch);
                }
                ptx::tma_store_commit();
            }
        } else {
            __syncwarp();
            store_rows(mine, shared + tile_start, warp * GROUP_ROWS);
            ptx::fence_async_proxy();
        }
        is_stored = true;
        if constexpr (S::QUERY_TILES == 1) {
            ++works;
            give_back_stored();
            --works;
        }
    }

    // Rows of packed tensors one by one, to where they lie or, with a list, to their places in the padded output.
    __device__ void store_rows(const WarpRows& mine, const unsigned char* tile, int first) const {
        constexpr int CHUNKS = D / 8;
        const int lane = threadIdx.x % 32;
        const Strides& strides = params.out_strides;
        // This lane's row, of 16.
        const int own = min(lane % GROUP_ROWS, max(mine.rows - 1, 0));
        int64_t row_start = static_cast<int64_t>(mine.first_row + own) * strides.token;
        if (params.out_rows != nullptr && mine.rows > 0) {
            const uint32_t flat = params.out_rows[mine.first_row + own];
            row_start = static_cast<int64_t>(flat / params.seq_q) * strides.batch + static_cast<int64_t>(flat % params.seq_q) * strides.token;
        }
        T* const out = static_cast<T*>(params.out) + mine.head * strides.head;
        const int chunks = mine.rows * CHUNKS;
        for (int before = 0; before < chunks; before += 32) {
            const int row = min((before + lane) / CHUNKS, GROUP_ROWS - 1);
            const int chunk = (before + lane) % CHUNKS;
            const int64_t start = __shfl_sync(0xffffffff, row_start, row);
            if (before + lane < chunks && chunk * 8 < params.head_dim) {
                *reinterpret_cast<uint4*>(out + start + chunk * 8) =
                    *reinterpret_cast<const uint4*>(tile + S::TileQ::offset(first + row, chunk));
            }
        }
    }

    // Of the first key tile of the query tile in hand.
    Turn turn;
    // Query tiles before this one, and what is known of the latest one that was opened.
    int works = 0;
    int key_tiles = 0;
    int masked_tiles = 0;
    bool has_rows = false;
    bool is_stored = false;
};

template <typename S>
__device__ inline void attention(const AttentionParamsSm90& params) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = ptx::uniform(ptx::shared_address(shared));
    const int warp = ptx::uniform(threadIdx.x / 32);
    if (threadIdx.x == 0) {
        // The swizzle of the tensor cores and the copy engine follows the address.
        if (base % 1024 != 0) __trap();
        const int helpers = params.form == FORM_DENSE ? 0 : 1;
        for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) {
            for (int works = 0; works < S::QUERY_TILES; ++works) {
                ptx::mbarrier_init(base + S::full_q(works, warpgroup), 1);
                ptx::mbarrier_init(base + S::empty_q(works, warpgroup), warpgroup == 0 ? 4 + helpers : 4);
            }
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(base + S::FULL_K + 8 * stage, 1);
            ptx::mbarrier_init(base + S::EMPTY_K + 8 * stage, S::CONSUMER_WARPS + helpers);
            ptx::mbarrier_init(base + S::FULL_V + 8 * stage, 1);
            ptx::mbarrier_init(base + S::EMPTY_V + 8 * stage, S::CONSUMER_WARPS);
            ptx::mbarrier_init(base + S::RAW_V + 8 * stage, 1);
        }
        ptx::mbarrier_init_fence();
        *reinterpret_cast<uint32_t*>(shared + S::LEFT_RANGE) = 0;
    }
    __syncthreads();
    if (warp < 4) {
        ptx::release_registers<S::PRODUCER_REGISTERS>();
        if (warp == 0) {
            Producer<S>(params, shared, base).run();
        } else if (warp == 1 && params.form != FORM_DENSE) {
            mend_values<S>(params, shared, base);
        } else if (warp >= 2) {
            write_zero_spans<typename S::T>(params, threadIdx.x - 64, 64);
            if (params.inv_indices != nullptr) write_masked_zeros<typename S::T>(params, warp - 2, 2);
        }
    } else {
        ptx::take_registers<S::CONSUMER_REGISTERS>();
        Consumer<S>(params, shared, base, warp / 4 - 1).run();
    }
}

// attention_sm90_{f16, bf16}_d{head_dim}_w{warpgroups}
#define VARLEN_FA_ENTRY(NAME, THREADS, ...)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ AttentionParamsSm90 params) { \
        attention<Shape<__VA_ARGS__>>(params);                                                                           \
    }
#define VARLEN_FA_ENTRIES(D, WARPGROUPS, ...)                                                                                        \
    VARLEN_FA_ENTRY(attention_sm90_f16_d##D##_w##WARPGROUPS, (WARPGROUPS + 1) * 128, __half, D, WARPGROUPS, __VA_ARGS__)             \
    VARLEN_FA_ENTRY(attention_sm90_bf16_d##D##_w##WARPGROUPS, (WARPGROUPS + 1) * 128, __nv_bfloat16, D, WARPGROUPS, __VA_ARGS__)
VARLEN_FA_SM90_TILES(VARLEN_FA_ENTRIES)

}  // namespace sm90
