// Varlen metadata of a mask that is already on the device: what src/mask/meta.rs builds on the
// host. Three launches, none of which waits for the host, so that they can be captured in a graph.
//
//   metadata_count   mask [B, S] ─▶ bits, kept tokens of each chunk      a block for each chunk of a row
//   metadata_scan    counts ─▶ packed row of each chunk's first token,   one block
//                    cu_seqlens, batch_order
//   metadata_index   bits ─▶ indices, inv_indices                        a block for each chunk of a row
//
// And for a call with key ranges, which the host counts in padded keys:
//
//   metadata_ranges  ranges of padded queries ─▶ of listed ones, counted in listed keys     a thread for each query
#include "../common/params.cuh"

namespace metadata {

constexpr int THREADS = METADATA_THREADS;
constexpr int SCAN_THREADS = METADATA_SCAN_THREADS;
constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffff;
// The most batch rows whose order a block finds in a few microseconds. More of them keep their own
// order.
constexpr int MAX_ORDERED = 1024;

static_assert(METADATA_CHUNK % THREADS == 0);
constexpr int CHUNK_WORDS = METADATA_CHUNK / WARP;

__device__ inline bool keeps(const MetadataParams& params, int64_t element) {
    switch (params.mask_bytes) {
        case 1: return static_cast<const uint8_t*>(params.mask)[element] != 0;
        case 2: return static_cast<const uint16_t*>(params.mask)[element] != 0;
        case 4: return static_cast<const uint32_t*>(params.mask)[element] != 0;
        default: return static_cast<const uint64_t*>(params.mask)[element] != 0;
    }
}

// The sum of a value over the lanes up to this one, included.
__device__ inline int inclusive_sum(int value) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, value, distance);
        if (lane >= distance) value += other;
    }
    return value;
}

// Grid: one block for each chunk, in row-major order of [B, chunks].
extern "C" __global__ void __launch_bounds__(THREADS) metadata_count(const __grid_constant__ MetadataParams params) {
    const int row = blockIdx.x / params.chunks;
    const int chunk = blockIdx.x % params.chunks;
    uint32_t* bits = params.bits + static_cast<int64_t>(row) * params.row_words;
    int kept = 0;
#pragma unroll
    for (int step = 0; step < METADATA_CHUNK / THREADS; ++step) {
        const int token = chunk * METADATA_CHUNK + step * THREADS + threadIdx.x;
        const int64_t element = row * params.mask_batch_stride + token * params.mask_token_stride;
        const bool keep = token < params.seq && keeps(params, element);
        const uint32_t word = __ballot_sync(ALL_LANES, keep);
        const int word_index = token / WARP;
        if (threadIdx.x % WARP == 0 && word_index < params.row_words) bits[word_index] = word;
        kept += keep;
    }
    __shared__ int total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    kept = __reduce_add_sync(ALL_LANES, kept);
    // Integers: the order of the additions does not matter.
    if (threadIdx.x % WARP == 0) atomicAdd(&total, kept);
    __syncthreads();
    if (threadIdx.x == 0) params.chunk_starts[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) metadata_scan(const __grid_constant__ MetadataParams params) {
    __shared__ int warp_sums[SCAN_THREADS / WARP];
    __shared__ int lengths[MAX_ORDERED];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int counts = params.batch * params.chunks;
    int before = 0;
    for (int first = 0; first < counts; first += SCAN_THREADS) {
        const int index = first + threadIdx.x;
        const int count = index < counts ? params.chunk_starts[index] : 0;
        const int in_warp = inclusive_sum(count);
        if (lane == WARP - 1) warp_sums[warp] = in_warp;
        __syncthreads();
        if (warp == 0) warp_sums[lane] = inclusive_sum(warp_sums[lane]);
        __syncthreads();
        const int start = before + (warp > 0 ? warp_sums[warp - 1] : 0) + in_warp - count;
        if (index < counts) {
            params.chunk_starts[index] = start;
            if (index % params.chunks == 0) params.cu_seqlens[index / params.chunks] = start;
        }
        before += warp_sums[SCAN_THREADS / WARP - 1];
        __syncthreads();
    }
    if (threadIdx.x == 0) params.cu_seqlens[params.batch] = before;
    // Other threads of the block read what was written.
    __syncthreads();
    if (params.batch > MAX_ORDERED) {
        for (int row = threadIdx.x; row < params.batch; row += SCAN_THREADS) params.batch_order[row] = row;
        return;
    }
    const int row = threadIdx.x;
    if (row < params.batch) lengths[row] = params.cu_seqlens[row + 1] - params.cu_seqlens[row];
    __syncthreads();
    if (row < params.batch) {
        int rank = 0;
        for (int other = 0; other < params.batch; ++other) {
            rank += lengths[other] > lengths[row] || (lengths[other] == lengths[row] && other < row);
        }
        params.batch_order[rank] = row;
    }
}

// Grid: the same as metadata_count.
extern "C" __global__ void __launch_bounds__(THREADS) metadata_index(const __grid_constant__ MetadataParams params) {
    const int row = blockIdx.x / params.chunks;
    const int chunk = blockIdx.x % params.chunks;
    const uint32_t* bits = params.bits + static_cast<int64_t>(row) * params.row_words;
    // For each word of the chunk, the kept tokens before it.
    __shared__ int word_starts[CHUNK_WORDS];
    if (threadIdx.x < WARP) {
        int before = 0;
        for (int first = 0; first < CHUNK_WORDS; first += WARP) {
            const int word_index = chunk * CHUNK_WORDS + first + threadIdx.x;
            const int count = word_index < params.row_words ? __popc(bits[word_index]) : 0;
            const int sum = inclusive_sum(count);
            word_starts[first + threadIdx.x] = before + sum - count;
            before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
    }
    __syncthreads();
    const int chunk_start = params.chunk_starts[blockIdx.x];
#pragma unroll
    for (int step = 0; step < METADATA_CHUNK / THREADS; ++step) {
        const int in_chunk = step * THREADS + threadIdx.x;
        const int token = chunk * METADATA_CHUNK + in_chunk;
        if (token >= params.seq) return;
        const uint32_t word = bits[token / WARP];
        const uint32_t lower = word & ((1u << (token % WARP)) - 1);
        const int packed = chunk_start + word_starts[in_chunk / WARP] + __popc(lower);
        const bool keep = word >> (token % WARP) & 1;
        // Fits: batch · seq does.
        const int flat = row * params.seq + token;
        params.inv_indices[flat] = keep ? packed : -1;
        if (keep) params.indices[packed] = flat;
    }
}

// How many of the listed keys, from `keys` on, are before a flat position.
__device__ inline int keys_before(const uint32_t* keys, int count, uint32_t position) {
    int first = 0;
    while (count > 0) {
        const int half = count / 2;
        const bool is_before = keys[first + half] < position;
        first = is_before ? first + half + 1 : first;
        count = is_before ? count - half - 1 : half;
    }
    return first;
}

// Grid: a thread for each padded query, of which the first ones take the listed queries.
extern "C" __global__ void __launch_bounds__(THREADS) metadata_ranges(const __grid_constant__ MetadataRangesParams params) {
    const int query = blockIdx.x * THREADS + threadIdx.x;
    if (query >= params.cu_seqlens_q[params.batch]) return;
    const int flat = static_cast<int>(params.indices_q[query]);
    const int row = flat / params.seq_q;
    const int64_t padded = row * params.ranges.row_stride + flat % params.seq_q;
    const int first_key = params.cu_seqlens_k[row];
    const int keys = params.cu_seqlens_k[row + 1] - first_key;
    // Fits: batch · seq does.
    const uint32_t start = row * params.seq_k;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        params.listed[2 * query + side] = keys_before(params.indices_k + first_key, keys, start + params.ranges.ranges[2 * padded + side]);
    }
}

}  // namespace metadata
