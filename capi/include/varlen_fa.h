// varlen-fa: attention over padded batches that computes only what is valid.
//
// Generated from the sources of capi/ by `cargo xtask header`: change those instead.
// docs/external-c.md shows how to build, link and use the library;
// capi/examples/masked_attention.c is a complete program.
//
// Errors
//   Functions that can fail return a varlen_fa_status: 0 is success. varlen_fa_last_error() then
//   has a message that names the argument, what was expected and what came. After an error, no
//   output and no result has been written, with one exception: if the device itself failed in the
//   middle of a call (VARLEN_FA_STATUS_DEVICE_LOST, _BACKEND), outputs in device memory may hold
//   anything. No wrong argument ends the process, and no panic crosses into C.
//
// External memory, contexts and streams
//   "External" is what belongs to the application. The library uses it and never frees it.
//
// Handles
//   Pointers to devices, masks, metadata, communicators and the like are handles, not addresses: they
//   are looked up. A handle that was freed, has the wrong type or was never issued is refused with
//   VARLEN_FA_STATUS_BAD_HANDLE. Free every handle once, with the function of its type. Freeing
//   ends the handle, not the object, which lives as long as it is needed: metadata outlives its
//   mask, and a call that runs in another thread finishes.
//
// Threads
//   Every function may be called from any thread at any time, also on the same handles. Calls on
//   one device are ordered as they are made. Calls that use device metadata wait for a call that
//   rebuilds it, and vice versa. A message of varlen_fa_last_error() belongs to the thread of the
//   failed call. The application keeps memory apart: while a call runs, nothing else may write
//   its inputs or use its outputs, from the first element to the last, gaps included. Work on
//   VARLEN_FA_MEMORY_CUDA goes on after the call: order other uses after it on the device's
//   stream, or call varlen_fa_device_synchronize.
//
// Forks
//   In a child made by fork, CPU devices and all masks and metadata of the parent work, with new
//   threads. GPU devices fail with VARLEN_FA_STATUS_DEVICE_LOST, and none can be opened there if
//   the parent had opened one of the kind (VARLEN_FA_STATUS_DEVICE_UNAVAILABLE). A child must not
//   rebuild device metadata, nor use metadata for the first time, that another thread of the
//   parent was just using.
//
// Pointers
//   NULL where a pointer is required, addresses in the first page, and misaligned addresses are
//   refused. Every other pointer must point to valid memory of the documented size; the library
//   cannot check that.
//
// Structs
//   Start from zeros (`varlen_fa_tensor q = {0};`) and set what you need. Reserved space must be
//   0; later versions may use it, and 0 will mean what this version does.


#ifndef VARLEN_FA_H
#define VARLEN_FA_H

#include <stdint.h>

// Version of this header. Compare with varlen_fa_version(): versions with the same major number
// and, while that is 0, the same minor number work together.
#define VARLEN_FA_VERSION_MAJOR 0

// See VARLEN_FA_VERSION_MAJOR.
#define VARLEN_FA_VERSION_MINOR 1

// See VARLEN_FA_VERSION_MAJOR.
#define VARLEN_FA_VERSION_PATCH 0

// What a call returns: 0, or why it was refused or failed. varlen_fa_last_error() has the message.
//
// Up to 99, the arguments are at fault: nothing was launched and nothing was written. From 100 on,
// the device is at fault; from 200 on, this library.
enum varlen_fa_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Success.
  VARLEN_FA_STATUS_OK = 0,
  // A pointer that must not be NULL is NULL, or points into the first page.
  VARLEN_FA_STATUS_NULL_POINTER = 1,
  // Not a live handle of the right type: freed, of another type, or never issued. Also a CUDA
  // context, stream or address that the driver does not know.
  VARLEN_FA_STATUS_BAD_HANDLE = 2,
  // A number that is not a value of its enum, a negative stride, a flag that is neither 0 nor 1,
  // or reserved space that is not 0.
  VARLEN_FA_STATUS_BAD_VALUE = 3,
  // A pointer, an offset or a stride that is not a multiple of the required alignment.
  VARLEN_FA_STATUS_MISALIGNED = 4,
  // A tensor has the wrong number of dimensions.
  VARLEN_FA_STATUS_RANK = 10,
  // A tensor's shape does not fit the other arguments.
  VARLEN_FA_STATUS_SHAPE = 11,
  // A bias dimension is neither 1 nor the full size.
  VARLEN_FA_STATUS_BROADCAST = 12,
  // The number of query heads is not a multiple of the number of key/value heads.
  VARLEN_FA_STATUS_HEADS_NOT_DIVISIBLE = 13,
  // The head dimension is not from 1 to 512.
  VARLEN_FA_STATUS_HEAD_DIM = 14,
  // The device does not compute with this element type.
  VARLEN_FA_STATUS_UNSUPPORTED_DTYPE = 15,
  // Element types differ where they must agree.
  VARLEN_FA_STATUS_DTYPE_MISMATCH = 16,
  // The last dimension of a tensor is not contiguous.
  VARLEN_FA_STATUS_INNER_STRIDE = 17,
  // Shape and strides reach past the end of the memory.
  VARLEN_FA_STATUS_BUFFER_TOO_SMALL = 18,
  // An output shares memory with an input or another output.
  VARLEN_FA_STATUS_OVERLAP = 19,
  // Two elements of an output lie at the same address.
  VARLEN_FA_STATUS_SELF_OVERLAP = 20,
  // An array has the wrong number of elements.
  VARLEN_FA_STATUS_LENGTH = 21,
  // A mask or metadata was built for another batch or sequence length.
  VARLEN_FA_STATUS_MASK_SIZE = 22,
  // A length or a run reaches outside its row.
  VARLEN_FA_STATUS_MASK_ROW = 23,
  // Cumulative sequence lengths do not start at 0, decrease, or do not end at the tensors' size.
  VARLEN_FA_STATUS_CU_SEQLENS = 24,
  // The softmax scale is not a finite number.
  VARLEN_FA_STATUS_SOFTMAX_SCALE = 25,
  // A size exceeds an integer type or a limit.
  VARLEN_FA_STATUS_TOO_LARGE = 26,
  // An environment variable has an invalid value.
  VARLEN_FA_STATUS_ENVIRONMENT = 27,
  // A tensor, memory or metadata belongs to another device.
  VARLEN_FA_STATUS_DEVICE_MISMATCH = 28,
  // The forced path or kernel cannot compute this call on this device.
  VARLEN_FA_STATUS_NOT_APPLICABLE = 29,
  // A soft cap, ALiBi slopes or attention sinks are no good numbers, or not one a query head.
  VARLEN_FA_STATUS_SCORE_MODIFIER = 30,
  // Shards, ranks or a mode of sequence parallelism do not fit one another.
  VARLEN_FA_STATUS_SHARDING = 31,
  // An argument is wrong in a way that has no number in this header.
  VARLEN_FA_STATUS_REFUSED = 99,
  // The requested device is unavailable.
  VARLEN_FA_STATUS_DEVICE_UNAVAILABLE = 100,
  // Out of memory.
  VARLEN_FA_STATUS_OUT_OF_MEMORY = 101,
  // The device is lost; no later call on it succeeds.
  VARLEN_FA_STATUS_DEVICE_LOST = 102,
  // An operation of the device or its driver failed.
  VARLEN_FA_STATUS_BACKEND = 103,
  // The device's stream is being captured into a CUDA graph, which cannot hold this operation.
  // The capture goes on.
  VARLEN_FA_STATUS_STREAM_CAPTURED = 104,
  // Ranks were given different masks, shapes or settings, or called in another order. The
  // communicator takes no more calls.
  VARLEN_FA_STATUS_RANKS_DIFFER = 105,
  // A rank ended, or gave up after an error of its own. The communicator takes no more calls.
  VARLEN_FA_STATUS_RANK_LOST = 106,
  // A rank did not answer in time. The communicator takes no more calls.
  VARLEN_FA_STATUS_RANK_TIMED_OUT = 107,
  // A defect of this library; the message says where. Please report it.
  VARLEN_FA_STATUS_PANIC = 200,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_status varlen_fa_status;
#else
typedef uint32_t varlen_fa_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Where a device computes.
enum varlen_fa_device_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The device that VARLEN_FA_DEVICE names, or the best one present: CUDA, then a hardware GPU
  // through wgpu, then the CPU.
  VARLEN_FA_DEVICE_KIND_AUTO = 0,
  // The CPU.
  VARLEN_FA_DEVICE_KIND_CPU = 1,
  // Vulkan, Metal or DirectX 12 through wgpu, including software adapters.
  VARLEN_FA_DEVICE_KIND_WGPU = 2,
  // An NVIDIA GPU.
  VARLEN_FA_DEVICE_KIND_CUDA = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_device_kind varlen_fa_device_kind;
#else
typedef uint32_t varlen_fa_device_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Element type of a mask, whose number is its size in bytes. 0 drops the token; any other value
// keeps it, for bool, signed and unsigned integers alike.
enum varlen_fa_mask_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // bool, uint8_t, int8_t.
  VARLEN_FA_MASK_DTYPE_U8 = 1,
  // uint16_t, int16_t.
  VARLEN_FA_MASK_DTYPE_U16 = 2,
  // uint32_t, int32_t.
  VARLEN_FA_MASK_DTYPE_U32 = 4,
  // uint64_t, int64_t.
  VARLEN_FA_MASK_DTYPE_U64 = 8,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_mask_dtype varlen_fa_mask_dtype;
#else
typedef uint32_t varlen_fa_mask_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Element type of a tensor. 0 is not a value, so that a forgotten field is an error.
enum varlen_fa_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // IEEE 754 binary32.
  VARLEN_FA_DTYPE_F32 = 1,
  // IEEE 754 binary16.
  VARLEN_FA_DTYPE_F16 = 2,
  // The upper 16 bits of a binary32.
  VARLEN_FA_DTYPE_BF16 = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_dtype varlen_fa_dtype;
#else
typedef uint32_t varlen_fa_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// The memory that an address points to.
enum varlen_fa_memory
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Host memory. The CPU device works on it directly. For other devices, a call copies inputs to
  // the device and outputs back, and returns when that is done.
  VARLEN_FA_MEMORY_HOST = 0,
  // Memory of the CUDA device that computes, which is used directly. The call returns before the
  // work is done.
  VARLEN_FA_MEMORY_CUDA = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_memory varlen_fa_memory;
#else
typedef uint32_t varlen_fa_memory;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How a call is computed.
enum varlen_fa_path
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // In options: the library decides.
  VARLEN_FA_PATH_AUTO = 0,
  // Every query against every key; masked keys are dropped from the softmax.
  VARLEN_FA_PATH_DENSE = 1,
  // One pass over the padded tensors that skips what is masked.
  VARLEN_FA_PATH_FUSED = 2,
  // Pack, varlen attention on the packed rows, scatter with zeros.
  VARLEN_FA_PATH_PACKED = 3,
  // Zeros only: no query or no key is valid.
  VARLEN_FA_PATH_ZERO = 4,
  // In plans: one that this header does not list; the text names it.
  VARLEN_FA_PATH_UNLISTED = 255,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_path varlen_fa_path;
#else
typedef uint32_t varlen_fa_path;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What computes a call.
enum varlen_fa_kernel
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // In options: the device's preferred one.
  VARLEN_FA_KERNEL_AUTO = 0,
  // The CPU device's kernel.
  VARLEN_FA_KERNEL_CPU_TILED = 1,
  // The WGSL kernel that needs no optional feature.
  VARLEN_FA_KERNEL_WGSL_PORTABLE = 2,
  // The WGSL kernel on cooperative matrices (tensor cores).
  VARLEN_FA_KERNEL_WGSL_COOP = 6,
  // The CUDA kernel for every chip from compute capability 8.0 on.
  VARLEN_FA_KERNEL_CUDA_SM80 = 3,
  // The CUDA kernel for compute capability 9.0.
  VARLEN_FA_KERNEL_CUDA_SM90 = 4,
  // The CUDA kernel for compute capabilities 10.0 and 10.3.
  VARLEN_FA_KERNEL_CUDA_SM100 = 5,
  // In plans: one that this header does not list; the text names it.
  VARLEN_FA_KERNEL_UNLISTED = 255,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_kernel varlen_fa_kernel;
#else
typedef uint32_t varlen_fa_kernel;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How an attention mask is given.
enum varlen_fa_mask_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Every query attends to every key.
  VARLEN_FA_MASK_KIND_NONE = 0,
  // `key_mask`: every query attends to the kept keys of its batch row. Rows of dropped queries
  // are computed like any other.
  VARLEN_FA_MASK_KIND_KEY = 1,
  // `bias`: added to the scaled scores, broadcast over [B, H, Sq, Sk]. An entry of -infinity
  // gives a key no weight, but does not hide NaN in the key or its value as a key mask does.
  VARLEN_FA_MASK_KIND_BIAS = 2,
  // `query_meta`: self-attention among the valid tokens. Other rows are exactly zero.
  VARLEN_FA_MASK_KIND_VARLEN = 3,
  // `query_meta` and `key_meta`: valid queries attend to the valid keys of their batch row.
  // Other rows are exactly zero.
  VARLEN_FA_MASK_KIND_VARLEN_CROSS = 4,
  // `query_device_meta`: as VARLEN, with metadata built by the device.
  VARLEN_FA_MASK_KIND_DEVICE_VARLEN = 5,
  // `query_device_meta` and `key_device_meta`: as VARLEN_CROSS, with metadata built by the
  // device.
  VARLEN_FA_MASK_KIND_DEVICE_VARLEN_CROSS = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_mask_kind varlen_fa_mask_kind;
#else
typedef uint32_t varlen_fa_mask_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Why a path was taken. 8 is reserved.
enum varlen_fa_reason
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // No mask was given.
  VARLEN_FA_REASON_NO_MASK = 1,
  // A key mask was given. Dropped queries are computed like any other.
  VARLEN_FA_REASON_KEY_MASK = 2,
  // The key mask keeps every key, so it is not applied.
  VARLEN_FA_REASON_KEY_MASK_KEEPS_ALL = 3,
  // An additive bias was given.
  VARLEN_FA_REASON_BIAS = 4,
  // Metadata was given in which every token is valid.
  VARLEN_FA_REASON_ALL_VALID = 5,
  // Metadata was given with no valid query or no valid key.
  VARLEN_FA_REASON_NOTHING_VALID = 6,
  // Metadata was given, and the kernel reads the padded tensors directly.
  VARLEN_FA_REASON_FUSED = 7,
  // VARLEN_FA=0.
  VARLEN_FA_REASON_DENSE_FORCED = 9,
  // The caller forced the path.
  VARLEN_FA_REASON_PATH_FORCED = 10,
  // The tensors were packed already.
  VARLEN_FA_REASON_ALREADY_PACKED = 11,
  // A mask was given whose runs are so short that packing takes less time than the fused path.
  VARLEN_FA_REASON_FRAGMENTED = 13,
  // Key ranges were given, and no mask of tokens.
  VARLEN_FA_REASON_KEY_RANGES = 14,
  // Metadata was given, but so few tokens are masked that computing every row takes less time.
  VARLEN_FA_REASON_FEW_MASKED = 15,
  // One that this header does not list; the text names it.
  VARLEN_FA_REASON_UNLISTED = 255,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_reason varlen_fa_reason;
#else
typedef uint32_t varlen_fa_reason;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Which elements of a head rotate together.
enum varlen_fa_rotary_pairing
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Elements 2i and 2i + 1, as in Qwen-Image and Flux.
  VARLEN_FA_ROTARY_PAIRING_INTERLEAVED = 1,
  // Elements i and i + R/2, as in Llama and ModernBERT.
  VARLEN_FA_ROTARY_PAIRING_HALVES = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_rotary_pairing varlen_fa_rotary_pairing;
#else
typedef uint32_t varlen_fa_rotary_pairing;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How ranks share the work of a call. docs/sequence-parallel.md describes the modes.
enum varlen_fa_parallel_mode
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // What the plan chooses.
  VARLEN_FA_PARALLEL_MODE_AUTO = 0,
  // Queries stay; every rank receives all keys and values.
  VARLEN_FA_PARALLEL_MODE_GATHER = 1,
  // Rows are exchanged for heads, and back. The ranks divide the heads.
  VARLEN_FA_PARALLEL_MODE_ULYSSES = 2,
  // Queries stay; keys and values go round. The last bits differ from one device.
  VARLEN_FA_PARALLEL_MODE_RING = 3,
  // ULYSSES in groups of `ulysses` consecutive ranks, GATHER among them.
  VARLEN_FA_PARALLEL_MODE_ULYSSES_GATHER = 4,
  // ULYSSES in groups of `ulysses` consecutive ranks, RING among them.
  VARLEN_FA_PARALLEL_MODE_ULYSSES_RING = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum varlen_fa_parallel_mode varlen_fa_parallel_mode;
#else
typedef uint32_t varlen_fa_parallel_mode;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// One member of a group of ranks that exchange rows: a thread of one process, or a process. Calls
// of one communicator run one after another.
typedef struct varlen_fa_communicator varlen_fa_communicator;

// Cumulative sequence lengths of packed rows: sequence b is rows cu_seqlens[b] to cu_seqlens[b +
// 1].
typedef struct varlen_fa_cu_seqlens varlen_fa_cu_seqlens;

// A device. Handles are numbers in the form of pointers; they do not point to memory.
typedef struct varlen_fa_device varlen_fa_device;

// The same as varlen_fa_meta, built by the device from a mask in its memory, without waiting for
// the host.
typedef struct varlen_fa_device_meta varlen_fa_device_meta;

// Which tokens of a [B, S] batch are kept.
typedef struct varlen_fa_key_mask varlen_fa_key_mask;

// Which keys each query sees: a causal mask, a window, or any range of keys for each query. Create
// it once per request for all layers and steps: it keeps a copy on each device that used it.
typedef struct varlen_fa_key_ranges varlen_fa_key_ranges;

// Which tokens of a [B, S] batch are valid, as attention needs it. Create it once per request for
// all layers and steps: it keeps a copy on each device that used it.
typedef struct varlen_fa_meta varlen_fa_meta;

// A request that ranks have agreed on, for all layers and steps.
typedef struct varlen_fa_parallel_request varlen_fa_parallel_request;

// What happens to scores: a soft cap, ALiBi, attention sinks. Create it once for each layer of a
// model: it keeps a copy on each device that used it.
typedef struct varlen_fa_score_modifiers varlen_fa_score_modifiers;

// Which tokens of a sequence that is divided among ranks are valid, as one rank needs it.
typedef struct varlen_fa_sharded_meta varlen_fa_sharded_meta;

// What a device is and can do.
typedef struct varlen_fa_device_info {
  // Where it computes; never AUTO.
  varlen_fa_device_kind kind;
  // 1 if the device is emulated on the CPU, or is the CPU.
  uint32_t is_software;
  // Bit `1 << dtype` for each supported element type.
  uint32_t dtypes;
  // Bit `1 << kernel` for each kernel of this header that runs on it.
  uint32_t kernels;
  // Largest possible size of a tensor, in bytes.
  uint64_t max_buffer_bytes;
  // Kind and hardware, for messages.
  char name[192];
  // The hardware, and its driver if it has one.
  char adapter[192];
  // 0.
  uint64_t reserved[4];
} varlen_fa_device_info;

// A range of kept tokens in one batch row. It may be empty; ranges may touch or overlap.
typedef struct varlen_fa_run {
  // Batch row.
  uint64_t row;
  // First kept token.
  uint64_t start;
  // One past the last kept token.
  uint64_t end;
} varlen_fa_run;

// Sizes of the batch that metadata describes.
typedef struct varlen_fa_meta_info {
  // Number of batch rows, B.
  uint64_t batch;
  // Tokens of each padded row, S.
  uint64_t seq;
  // Number of valid tokens, which is the number of packed rows.
  uint64_t total_valid;
  // Valid tokens of the longest row.
  uint64_t max_seqlen;
  // 0.
  uint64_t reserved[4];
} varlen_fa_meta_info;

// What key ranges are made for: padded tensors by their sizes, or packed rows by their sequences.
// Start from zeros, as with a tensor.
typedef struct varlen_fa_ranges_of {
  // B, for padded tensors. Ranges count positions of the padded keys.
  uint64_t batch;
  // Sq, for padded tensors.
  uint64_t seq_q;
  // Sk, for padded tensors.
  uint64_t seq_k;
  // Sequences of the queries, for packed rows; NULL for padded tensors. Ranges count keys from
  // the first one of the sequence.
  const struct varlen_fa_cu_seqlens *cu_seqlens_q;
  // Sequences of the keys, for packed rows; NULL for padded tensors.
  const struct varlen_fa_cu_seqlens *cu_seqlens_k;
  // 0.
  uint64_t reserved[4];
} varlen_fa_ranges_of;

// A range of keys: `first` <= key < `end`.
typedef struct varlen_fa_key_range {
  // First key.
  uint64_t first;
  // One past the last key.
  uint64_t end;
} varlen_fa_key_range;

// A [B, S] mask in external memory. Start from zeros, as with a tensor.
typedef struct varlen_fa_mask_view {
  // The first element. May be NULL if the mask has no elements.
  const void *data;
  // Size of the memory at `data`, in bytes.
  uint64_t bytes;
  // Element type.
  varlen_fa_mask_dtype dtype;
  // The memory that `data` points to.
  varlen_fa_memory memory;
  // B and S.
  uint64_t shape[2];
  // Distance between neighbours in each dimension, in elements, at least 0.
  int64_t strides[2];
  // 0.
  uint64_t reserved[2];
} varlen_fa_mask_view;

// Options of an attention call. All zeros, or a NULL struct, means the defaults.
typedef struct varlen_fa_attention_options {
  // 1 to use `softmax_scale`; 0 for 1/sqrt(D).
  uint32_t has_softmax_scale;
  // Factor on q*k before the softmax; any finite number.
  float softmax_scale;
  // Forces a path, for tests and comparisons.
  varlen_fa_path path;
  // Forces a kernel, for tests and comparisons.
  varlen_fa_kernel kernel;
  // For varlen_fa_varlen_attention: made for its sequences, each query sees the keys of its range.
  // NULL for none, and for other calls, whose mask has ranges.
  const struct varlen_fa_key_ranges *ranges;
  // For varlen_fa_varlen_attention: what else happens to the scores. NULL for nothing, and for
  // other calls, whose mask has modifiers.
  const struct varlen_fa_score_modifiers *modifiers;
  // 0.
  uint64_t reserved[2];
} varlen_fa_attention_options;

// A tensor in external memory.
//
// Element [b, s, h, d] of a [B, S, H, D] tensor lies at `data` + b*strides[0] + s*strides[1] +
// h*strides[2] + d*strides[3], in elements. The last dimension must be contiguous (stride 1),
// except in a bias. The other strides are free, so that slices of a fused projection and permuted
// tensors need no copy.
//
// Start from zeros, as in `varlen_fa_tensor q = {0};`, so that reserved space is 0.
typedef struct varlen_fa_tensor {
  // The first element. May be NULL if the tensor has no elements.
  void *data;
  // Size of the memory at `data`. Shape and strides that reach further are refused.
  uint64_t bytes;
  // Element type.
  varlen_fa_dtype dtype;
  // The memory that `data` points to.
  varlen_fa_memory memory;
  // Number of dimensions, 1 to 4.
  uint32_t rank;
  // 0.
  uint32_t reserved_word;
  // Size of each dimension; entries from `rank` on are ignored.
  uint64_t shape[4];
  // Distance between neighbours in each dimension, in elements, at least 0; entries from `rank`
  // on are ignored.
  int64_t strides[4];
  // 0.
  uint64_t reserved[2];
} varlen_fa_tensor;

// Which queries attend to which keys. All zeros, or a NULL struct, means no mask. Pointers that
// `kind` does not use must be NULL; `bias` and `ranges` go with every kind.
typedef struct varlen_fa_attention_mask {
  // Which of the fields below are used.
  varlen_fa_mask_kind kind;
  // 0.
  uint32_t reserved_word;
  // [B, Sk], for KEY.
  const struct varlen_fa_key_mask *key_mask;
  // Added to the scaled scores: 1 to 4 dimensions that broadcast to [B, H, Sq, Sk], in the
  // tensors' element type or f32. NULL for none; not NULL for BIAS.
  const struct varlen_fa_tensor *bias;
  // [B, S] for VARLEN, [B, Sq] for VARLEN_CROSS.
  const struct varlen_fa_meta *query_meta;
  // [B, Sk], for VARLEN_CROSS.
  const struct varlen_fa_meta *key_meta;
  // [B, S] for DEVICE_VARLEN, [B, Sq] for DEVICE_VARLEN_CROSS.
  const struct varlen_fa_device_meta *query_device_meta;
  // [B, Sk], for DEVICE_VARLEN_CROSS.
  const struct varlen_fa_device_meta *key_device_meta;
  // Made for [B, Sq, Sk]: each query sees the keys of its range that count. NULL for none.
  const struct varlen_fa_key_ranges *ranges;
  // What else happens to the scores; they go with every kind. NULL for nothing.
  const struct varlen_fa_score_modifiers *modifiers;
  // 0.
  uint64_t reserved[2];
} varlen_fa_attention_mask;

// What was decided for a call.
typedef struct varlen_fa_plan {
  // How the call was computed.
  varlen_fa_path path;
  // What computed it; no kernel runs on the ZERO path.
  varlen_fa_kernel kernel;
  // Why.
  varlen_fa_reason reason;
  // 0.
  uint32_t reserved_word;
  // The same in words, e.g. "fused by cpu-tiled: metadata was given and the kernel reads padded
  // tensors directly".
  char text[240];
  // 0.
  uint64_t reserved[2];
} varlen_fa_plan;

// A tensor [B, S, H, D] in segments [B, S_i, H, D] that follow one another along S, each in memory
// of its own and with strides of its own: the text and the image of a joint layer. Start from zeros,
// as with a tensor.
typedef struct varlen_fa_segments {
  // The segments, in order. Any may be empty.
  const struct varlen_fa_tensor *tensors;
  // How many there are, 1 to 8.
  uint64_t count;
  // 0.
  uint64_t reserved[2];
} varlen_fa_segments;

// Tokens whose q and k lie together: the text or the image of a joint layer. Start from zeros, as
// with a tensor.
typedef struct varlen_fa_qk_segment {
  // [B, S, H, D].
  const struct varlen_fa_tensor *q;
  // [B, S, Hkv, D].
  const struct varlen_fa_tensor *k;
  // As `q`. NULL, or `q`'s own elements, to replace `q`; then `k` is replaced too.
  const struct varlen_fa_tensor *q_out;
  // As `k`. NULL, or `k`'s own elements, to replace `k`; then `q` is replaced too.
  const struct varlen_fa_tensor *k_out;
  // Weight of q's norm: [D], f32 or of q's element type. NULL with `k_weight` for no norm.
  const struct varlen_fa_tensor *q_weight;
  // Weight of k's norm.
  const struct varlen_fa_tensor *k_weight;
  // Cosines: [S, R/2] or [B, S, R/2], f32 or of q's element type. NULL with `sin` for no rotation.
  const struct varlen_fa_tensor *cos;
  // Sines, as `cos`.
  const struct varlen_fa_tensor *sin;
  // Added to the mean of squares: finite and not negative; 0 without a norm.
  float eps;
  // Which elements are pairs; 0 without a rotation.
  varlen_fa_rotary_pairing pairing;
  // 0.
  uint64_t reserved[4];
} varlen_fa_qk_segment;

// How a sequence is divided: a prefix and a suffix that every rank has, and between them one shard
// for each rank. Start from zeros, as with a tensor.
typedef struct varlen_fa_shards {
  // Tokens of the prefix.
  uint64_t prefix;
  // Tokens of the suffix.
  uint64_t suffix;
  // Tokens of each shard; any may be 0.
  const uint64_t *lengths;
  // How many shards and ranks there are, at least 1.
  uint64_t ranks;
  // 0.
  uint64_t reserved[4];
} varlen_fa_shards;

// What a request computes, the same on every rank. Start from zeros, as with a tensor.
typedef struct varlen_fa_parallel_options {
  // H.
  uint64_t num_heads;
  // Hkv, which divides H.
  uint64_t num_kv_heads;
  // D.
  uint64_t head_dim;
  // Ranks of a group, for modes of two levels; else 0.
  uint64_t ulysses;
  // Element type of all tensors.
  varlen_fa_dtype dtype;
  // Forces a mode.
  varlen_fa_parallel_mode mode;
  // 1 to use `softmax_scale`; 0 for 1/sqrt(D).
  uint32_t has_softmax_scale;
  // Factor on q*k before the softmax; any finite number.
  float softmax_scale;
  // What calls carry that not every mode computes, so that the plan takes one that does: modifiers
  // of these kinds, whose values do not count; NULL for none.
  const struct varlen_fa_score_modifiers *modifiers;
  // 1 for a bias, else 0.
  uint32_t has_bias;
  // 1 for the log-sum-exp, else 0.
  uint32_t has_lse;
  // 0.
  uint64_t reserved[2];
} varlen_fa_parallel_options;

// What was decided for a request.
typedef struct varlen_fa_parallel_plan {
  // How ranks share the work; never AUTO.
  varlen_fa_parallel_mode mode;
  // 0.
  uint32_t reserved_word;
  // Ranks of a group, for modes of two levels; else 0.
  uint64_t ulysses;
  // The same in words, and why.
  char text[496];
  // 0.
  uint64_t reserved[2];
} varlen_fa_parallel_plan;

// What a call of sequence parallelism does to the scores, the same on every rank. Start from zeros,
// as with a tensor.
typedef struct varlen_fa_parallel_scores {
  // Is added to the scores of the whole sequence: floating-point, broadcast over [B, H, S, S], the
  // one that one device would be given. Any strides. NULL for none.
  const struct varlen_fa_tensor *bias;
  // Of all H heads; NULL for none.
  const struct varlen_fa_score_modifiers *modifiers;
  // 0.
  uint64_t reserved[4];
} varlen_fa_parallel_scores;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The library's version, as major * 1000000 + minor * 1000 + patch.
uint32_t varlen_fa_version(void);

// The library's version as text, e.g. "0.1.0"; valid for as long as the library is loaded.
const char *varlen_fa_version_string(void);

// The message of this thread's last call that did not return VARLEN_FA_STATUS_OK; "" if there was
// none. It names the argument, what was expected and what came. The text is valid until the
// thread's next call that fails, or until the thread ends.
const char *varlen_fa_last_error(void);

// Opens a device. Environment variables apply: with VARLEN_FA=0 it computes everything densely,
// with the same results; with VARLEN_FA_KERNEL (e.g. `sm80`) it uses that kernel only, and opening
// fails with NOT_APPLICABLE if the device does not have it; VARLEN_FA_CPU and VARLEN_FA_THREADS
// are the CPU device's instruction set and number of threads.
//
// `kind`: where to compute. AUTO takes the device that VARLEN_FA_DEVICE names (`cuda`, `cuda:N`,
// `wgpu` or `cpu`), or the best device present.
// `ordinal`: which CUDA device; 0 for other kinds.
// `device`: receives the handle, to be given to varlen_fa_device_free.
varlen_fa_status varlen_fa_device_open(varlen_fa_device_kind kind, uint32_t ordinal, struct varlen_fa_device **device);

// Opens the CPU device with a number of threads. They start with the first call that is worth
// them, and all devices of one number share them. Where they cannot be started there are fewer, at
// worst the calling thread alone; more than 256, or than there are processors, are never started.
//
// `threads`: how many threads a call uses, at most. With 1 no thread is ever started; 0 means
// VARLEN_FA_THREADS or, where it is unset, one for each processor.
// `device`: receives the handle, to be given to varlen_fa_device_free.
varlen_fa_status varlen_fa_device_open_cpu(uint32_t threads, struct varlen_fa_device **device);

// Opens a CUDA device over an external context and stream. All work is launched on that stream, in
// order with the application's own work. Calls do not wait for it, unless tensors are in host
// memory. While the stream is captured into a graph, varlen_fa_forward over CUDA memory is
// captured too. The library destroys neither context nor stream; both must outlive the device and
// everything used with it.
//
// `context`: a live CUcontext. NULL means the stream's context or, with the default stream, the
// context that is current in this thread.
// `stream`: a live CUstream or cudaStream_t of that context; NULL is the legacy default stream.
// CU_STREAM_PER_THREAD is refused.
// `device`: receives the handle, to be given to varlen_fa_device_free.
varlen_fa_status varlen_fa_device_open_cuda(void *context, void *stream, struct varlen_fa_device **device);

// What a device is and can do.
varlen_fa_status varlen_fa_device_describe(const struct varlen_fa_device *device, struct varlen_fa_device_info *info);

// Waits for all work launched on the device so far, and returns its first failure.
varlen_fa_status varlen_fa_device_synchronize(const struct varlen_fa_device *device);

// Closes a device; NULL is ignored. Work that was launched goes on.
varlen_fa_status varlen_fa_device_free(struct varlen_fa_device *device);

// Creates a key mask from [batch, seq] integers in host memory, row-major. 0 drops the token; any
// other value keeps it.
//
// `mask`: the integers, which are copied.
// `dtype`: their size.
// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
varlen_fa_status varlen_fa_key_mask_from_integers(const void *mask,
                                                  varlen_fa_mask_dtype dtype,
                                                  uint64_t batch,
                                                  uint64_t seq,
                                                  struct varlen_fa_key_mask **key_mask);

// Creates a key mask that keeps the first lengths[b] tokens of batch row b.
//
// `lengths`: `batch` numbers in host memory, each at most `seq`.
// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
varlen_fa_status varlen_fa_key_mask_from_lengths(const uint64_t *lengths,
                                                 uint64_t batch,
                                                 uint64_t seq,
                                                 struct varlen_fa_key_mask **key_mask);

// Creates a key mask that keeps the given ranges of tokens.
//
// `runs`: `count` ranges in host memory, in any order; a row without a range keeps nothing.
// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
varlen_fa_status varlen_fa_key_mask_from_runs(const struct varlen_fa_run *runs,
                                              uint64_t count,
                                              uint64_t batch,
                                              uint64_t seq,
                                              struct varlen_fa_key_mask **key_mask);

// Frees a key mask; NULL is ignored. Metadata made from it stays valid.
varlen_fa_status varlen_fa_key_mask_free(struct varlen_fa_key_mask *key_mask);

// Creates the metadata of a key mask. Attention with metadata drops masked rows: their output is
// exactly zero.
//
// `meta`: receives the handle, to be given to varlen_fa_meta_free.
varlen_fa_status varlen_fa_meta_create(const struct varlen_fa_key_mask *key_mask, struct varlen_fa_meta **meta);

// Creates the metadata of several documents in each row, for self-attention: tokens with the same
// number see one another and nothing else; tokens numbered 0 are masked.
//
// `document_ids`: [B, S] numbers in host memory, row-major; the tokens of a document lie together.
// `meta`: receives the handle, to be given to varlen_fa_meta_free.
varlen_fa_status varlen_fa_meta_from_document_ids(const uint32_t *document_ids,
                                                  uint64_t batch,
                                                  uint64_t seq,
                                                  struct varlen_fa_meta **meta);

// The sizes of the batch that metadata describes.
varlen_fa_status varlen_fa_meta_describe(const struct varlen_fa_meta *meta, struct varlen_fa_meta_info *info);

// Makes the device's copy of the metadata now, not at its first use there. The metadata keeps the
// copy either way. Call this before metadata is used while a CUDA graph is captured.
varlen_fa_status varlen_fa_meta_upload(const struct varlen_fa_meta *meta, const struct varlen_fa_device *device);

// Copies the flat positions b*S + s of the valid tokens, ascending.
//
// `indices`: host memory for `count` numbers.
// `count`: total_valid.
varlen_fa_status varlen_fa_meta_copy_indices(const struct varlen_fa_meta *meta, uint32_t *indices, uint64_t count);

// Copies the packed row of each token, -1 where it is masked.
//
// `inv_indices`: host memory for `count` numbers.
// `count`: B*S.
varlen_fa_status varlen_fa_meta_copy_inv_indices(const struct varlen_fa_meta *meta,
                                                 int32_t *inv_indices,
                                                 uint64_t count);

// Copies the cumulative sequence lengths of the packed rows.
//
// `values`: host memory for `count` numbers.
// `count`: B + 1.
varlen_fa_status varlen_fa_meta_copy_cu_seqlens(const struct varlen_fa_meta *meta, int32_t *values, uint64_t count);

// Frees metadata; NULL is ignored.
varlen_fa_status varlen_fa_meta_free(struct varlen_fa_meta *meta);

// Creates cumulative sequence lengths from numbers in host memory, which are copied.
//
// `values`: `count` numbers that start at 0 and never decrease.
// `count`: the number of sequences + 1.
// `cu_seqlens`: receives the handle, to be given to varlen_fa_cu_seqlens_free.
varlen_fa_status varlen_fa_cu_seqlens_create(const int32_t *values,
                                             uint64_t count,
                                             struct varlen_fa_cu_seqlens **cu_seqlens);

// Creates a handle for the cumulative sequence lengths of metadata's packed rows. It keeps the
// metadata alive.
//
// `cu_seqlens`: receives the handle, to be given to varlen_fa_cu_seqlens_free.
varlen_fa_status varlen_fa_cu_seqlens_from_meta(const struct varlen_fa_meta *meta,
                                                struct varlen_fa_cu_seqlens **cu_seqlens);

// Frees cumulative sequence lengths; NULL is ignored.
varlen_fa_status varlen_fa_cu_seqlens_free(struct varlen_fa_cu_seqlens *cu_seqlens);

// Creates a key mask from [batch, seq] numbers in host memory that models add to scores, row-major:
// 0 keeps the token, and anything from -1000 down drops it: -10000, the lowest number of a type,
// -infinity. Other values are refused, for a mask is not a bias. The elements of a [B, 1, 1, S]
// mask are the same in the same order.
//
// `mask`: the numbers, which are copied.
// `dtype`: their type.
// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
varlen_fa_status varlen_fa_key_mask_from_additive(const void *mask,
                                                  varlen_fa_dtype dtype,
                                                  uint64_t batch,
                                                  uint64_t seq,
                                                  struct varlen_fa_key_mask **key_mask);

// Creates a key mask from [batch, seq] integers in host memory, row-major, of which 1 keeps the
// token and 0 drops it. Other values are refused.
//
// `mask`: the integers, which are copied.
// `dtype`: their size.
// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
varlen_fa_status varlen_fa_key_mask_from_integers_strict(const void *mask,
                                                         varlen_fa_mask_dtype dtype,
                                                         uint64_t batch,
                                                         uint64_t seq,
                                                         struct varlen_fa_key_mask **key_mask);

// Creates the key mask of `batch` rows that are all like the one row of a mask.
//
// `row`: a mask of one row, or of `batch` rows, of which this makes a copy.
// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
varlen_fa_status varlen_fa_key_mask_broadcast(const struct varlen_fa_key_mask *row,
                                              uint64_t batch,
                                              struct varlen_fa_key_mask **key_mask);

// Creates ranges of a window: query i sees `left` keys before its own place and `right` keys after
// it. -1 is no limit on that side, so left = -1 and right = 0 is a causal mask. Where queries and
// keys differ in number, the place of query i is i + Sk - Sq.
//
// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
varlen_fa_status varlen_fa_key_ranges_window(const struct varlen_fa_ranges_of *of,
                                             int64_t left,
                                             int64_t right,
                                             struct varlen_fa_key_ranges **ranges);

// Creates ranges of a prefix: every query sees the first `count` keys, and the others up to its own
// place.
//
// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
varlen_fa_status varlen_fa_key_ranges_prefix(const struct varlen_fa_ranges_of *of,
                                             uint64_t count,
                                             struct varlen_fa_key_ranges **ranges);

// Creates ranges of the caller's own.
//
// `values`: a range for each query in host memory, [B, Sq] of them for padded tensors and [total_q]
// for packed rows.
// `count`: their number.
// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
varlen_fa_status varlen_fa_key_ranges_from_values(const struct varlen_fa_ranges_of *of,
                                                  const struct varlen_fa_key_range *values,
                                                  uint64_t count,
                                                  struct varlen_fa_key_ranges **ranges);

// Creates the ranges that both allow. They must be made for the same sizes.
//
// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
varlen_fa_status varlen_fa_key_ranges_intersect(const struct varlen_fa_key_ranges *one,
                                                const struct varlen_fa_key_ranges *other,
                                                struct varlen_fa_key_ranges **ranges);

// Frees ranges; NULL is ignored.
varlen_fa_status varlen_fa_key_ranges_free(struct varlen_fa_key_ranges *ranges);

// Allocates device memory for the metadata of [batch, seq] masks. No token is valid until
// varlen_fa_device_meta_rebuild.
//
// `meta`: receives the handle, to be given to varlen_fa_device_meta_free.
varlen_fa_status varlen_fa_device_meta_create(const struct varlen_fa_device *device,
                                              uint64_t batch,
                                              uint64_t seq,
                                              struct varlen_fa_device_meta **meta);

// Rebuilds the metadata from a mask. If the mask is in the device's memory, nothing is downloaded
// and the call does not wait. Earlier calls still use the metadata as it was. In a captured CUDA
// graph, each replay rebuilds it from what the mask holds then.
//
// `mask`: of the size that the metadata was created for; in host memory, or on CUDA devices in CUDA
// memory.
varlen_fa_status varlen_fa_device_meta_rebuild(const struct varlen_fa_device_meta *meta,
                                               const struct varlen_fa_mask_view *mask);

// Frees device metadata; NULL is ignored.
varlen_fa_status varlen_fa_device_meta_free(struct varlen_fa_device_meta *meta);

// Scaled dot-product attention over padded tensors, into external memory.
//
// `device`: computes.
// `options`: may be NULL.
// `q`: [B, Sq, H, D]; D is from 1 to 512.
// `k`, `v`: [B, Sk, Hkv, D]; Hkv divides H, and query head h reads key/value head h / (H / Hkv).
// `mask`: NULL for no mask.
// `out`: [B, Sq, H, D] of q's element type, in memory that no input shares. Every element is
// written, and nothing else.
// `plan`: receives the path and the kernel that were used, and why; may be NULL.
varlen_fa_status varlen_fa_forward(const struct varlen_fa_device *device,
                                   const struct varlen_fa_attention_options *options,
                                   const struct varlen_fa_tensor *q,
                                   const struct varlen_fa_tensor *k,
                                   const struct varlen_fa_tensor *v,
                                   const struct varlen_fa_attention_mask *mask,
                                   const struct varlen_fa_tensor *out,
                                   struct varlen_fa_plan *plan);

// varlen_fa_forward, and the log-sum-exp of every row.
//
// `lse`: [B, H, Sq] f32, receives ln(sum of exp(score)) of each row: -inf for a query that sees no
// key or is masked, NaN where the row of `out` is. Its last dimension is contiguous. NULL for none.
//
// Outputs share no memory with one another or with an input.
varlen_fa_status varlen_fa_forward_with_lse(const struct varlen_fa_device *device,
                                            const struct varlen_fa_attention_options *options,
                                            const struct varlen_fa_tensor *q,
                                            const struct varlen_fa_tensor *k,
                                            const struct varlen_fa_tensor *v,
                                            const struct varlen_fa_attention_mask *mask,
                                            const struct varlen_fa_tensor *out,
                                            const struct varlen_fa_tensor *lse,
                                            struct varlen_fa_plan *plan);

// varlen_fa_forward_with_lse on tensors in segments along S, which then need not be concatenated.
//
// `q`, `k`, `v`, `out`: each cut as it likes. Lengths add up to Sq and to Sk; B, H or Hkv, D and the
// element type are the same in all segments. The mask is over all segments, one after another, and so
// is `lse`: one tensor, or NULL.
//
// The result is that of the call on whole tensors, bit for bit. Messages name a segment as in
// `segments[1].k`. CPU devices read and write segments where they lie, other devices copy them.
varlen_fa_status varlen_fa_forward_segments(const struct varlen_fa_device *device,
                                            const struct varlen_fa_attention_options *options,
                                            const struct varlen_fa_segments *q,
                                            const struct varlen_fa_segments *k,
                                            const struct varlen_fa_segments *v,
                                            const struct varlen_fa_attention_mask *mask,
                                            const struct varlen_fa_segments *out,
                                            const struct varlen_fa_tensor *lse,
                                            struct varlen_fa_plan *plan);

// Copies the valid rows of padded tensors to packed tensors, bit for bit, in one launch.
//
// `q`: [B, S, H, D]. `k`, `v`: [B, S, Hkv, D].
// `meta`: of [B, S].
// `packed_q`: [total_valid, H, D]. `packed_k`, `packed_v`: [total_valid, Hkv, D]. They share no
// memory with one another or with an input.
varlen_fa_status varlen_fa_pack_qkv(const struct varlen_fa_device *device,
                                    const struct varlen_fa_tensor *q,
                                    const struct varlen_fa_tensor *k,
                                    const struct varlen_fa_tensor *v,
                                    const struct varlen_fa_meta *meta,
                                    const struct varlen_fa_tensor *packed_q,
                                    const struct varlen_fa_tensor *packed_k,
                                    const struct varlen_fa_tensor *packed_v);

// Attention over packed rows: sequence b of the queries attends to sequence b of the keys. Either
// may be empty; a query without keys gives zeros.
//
// `options`: may be NULL. `path` must be AUTO.
// `q`: [total_q, H, D]. `k`, `v`: [total_k, Hkv, D].
// `cu_seqlens_q`, `cu_seqlens_k`: the sequences of queries and keys, of equal number.
// `out`: [total_q, H, D] of q's element type.
// `lse`: [H, total_q] f32, receives ln(sum of exp(score)) of each row, -inf for a row without
// keys; may be NULL.
// `plan`: receives the kernel that was used; may be NULL.
//
// Outputs share no memory with one another or with an input.
varlen_fa_status varlen_fa_varlen_attention(const struct varlen_fa_device *device,
                                            const struct varlen_fa_attention_options *options,
                                            const struct varlen_fa_tensor *q,
                                            const struct varlen_fa_tensor *k,
                                            const struct varlen_fa_tensor *v,
                                            const struct varlen_fa_cu_seqlens *cu_seqlens_q,
                                            const struct varlen_fa_cu_seqlens *cu_seqlens_k,
                                            const struct varlen_fa_tensor *out,
                                            const struct varlen_fa_tensor *lse,
                                            struct varlen_fa_plan *plan);

// Copies packed rows to the valid rows of a padded tensor, bit for bit, and writes +0.0 to the
// masked rows, in one launch.
//
// `packed`: [total_valid, H, D].
// `meta`: of [B, S].
// `padded`: [B, S, H, D], in memory that `packed` does not share. Every element is written, and
// nothing else.
varlen_fa_status varlen_fa_scatter_to_padded(const struct varlen_fa_device *device,
                                             const struct varlen_fa_tensor *packed,
                                             const struct varlen_fa_meta *meta,
                                             const struct varlen_fa_tensor *padded);

// Creates score modifiers, for `num_heads` query heads. Their values are checked by the calls that
// use them.
//
// `softcap`: scores become softcap * tanh(score / softcap), after the softmax scale; 0 for no cap.
// `alibi`: the slope of each query head, whose product with the distance of query and key,
// |i + Sk - Sq - j|, is taken from the score; NULL for none.
// `sinks`: one more score of each query head, without a value, that takes weight from the keys;
// NULL for none.
// Both arrays lie in host memory and are copied; a bias is added after the cap and ALiBi.
// `modifiers`: receives the handle, to be given to varlen_fa_score_modifiers_free.
varlen_fa_status varlen_fa_score_modifiers_create(float softcap,
                                                  const float *alibi,
                                                  const float *sinks,
                                                  uint64_t num_heads,
                                                  struct varlen_fa_score_modifiers **modifiers);

// Frees score modifiers; NULL is ignored.
varlen_fa_status varlen_fa_score_modifiers_free(struct varlen_fa_score_modifiers *modifiers);

// Attention over all keys from attention over two parts of them, which share no key. With
// m = max(lse1, lse2) and w = exp(lse - m) of each part it is
// out = (w1 out1 + w2 out2) / (w1 + w2) and lse = m + ln(w1 + w2).
//
// `out1`, `out2`: what attention over each part gave, [B, S, H, D], or [total, H, D] of packed rows.
// `lse1`, `lse2`: their log-sum-exps, [B, H, S] or [H, total] f32. A part that saw no key, -inf,
// does not count.
// `out`: of the shape and element type of the parts; +0.0 where neither saw a key.
// `lse`: of the shape of the parts' log-sum-exps, -inf where neither saw a key; may be NULL.
//
// Outputs share no memory with one another or with an input.
varlen_fa_status varlen_fa_merge_attention(const struct varlen_fa_device *device,
                                           const struct varlen_fa_tensor *out1,
                                           const struct varlen_fa_tensor *lse1,
                                           const struct varlen_fa_tensor *out2,
                                           const struct varlen_fa_tensor *lse2,
                                           const struct varlen_fa_tensor *out,
                                           const struct varlen_fa_tensor *lse);

// QK-norm and rotary embedding of 1 to 8 segments in one call: each head of q and k is normalised,
// x * weight / sqrt(mean(x^2) + eps), then rotated: of a pair (a, b) of its first R elements comes
// (a cos - b sin, b cos + a sin). All in f32, and rounded once.
//
// `segments`: `count` of them. They agree in B, H, Hkv, D and element type.
// `key_mask`, `meta`: which tokens count, of [B, S] over the segments one after another; at most one
// of them, NULL for every token. Rows of the others are neither read nor written. Give the metadata
// that attention gets, and no key mask where attention computes every query.
//
// Outputs share no memory with one another or with an input, but for the input that they replace.
// CUDA devices have no kernel for it yet: NOT_APPLICABLE.
varlen_fa_status varlen_fa_prepare_qk(const struct varlen_fa_device *device,
                                      const struct varlen_fa_qk_segment *segments,
                                      uint64_t count,
                                      const struct varlen_fa_key_mask *key_mask,
                                      const struct varlen_fa_meta *meta);

// Creates the ranks of one process: one handle for each of its threads, in order.
//
// `time_out_ms`: how long a call waits for other ranks, in milliseconds; 0 for a minute.
// `communicators`: receives `world_size` handles, each to be given to varlen_fa_communicator_free.
varlen_fa_status varlen_fa_communicator_threads(uint64_t world_size,
                                                uint64_t time_out_ms,
                                                struct varlen_fa_communicator **communicators);

// Creates the ranks of one process whose CUDA devices copy from one another: one handle for each of
// its threads, in the order of the devices. Several ranks may share a device. Access between the
// devices' contexts is enabled and stays.
//
// `devices`: `world_size` CUDA devices. Each rank's requests are prepared with its own.
// `time_out_ms`: as of varlen_fa_communicator_threads.
// `communicators`: receives `world_size` handles, each to be given to varlen_fa_communicator_free.
varlen_fa_status varlen_fa_communicator_peers(const struct varlen_fa_device *const *devices,
                                              uint64_t world_size,
                                              uint64_t time_out_ms,
                                              struct varlen_fa_communicator **communicators);

// Joins processes by TCP: this one is rank `rank` of `world_size`. Returns when all are there.
//
// `meeting`: an address on which rank 0 listens, such as "127.0.0.1:4321", or "file:" and the path
// of a file that rank 0 writes, for processes of one machine. Nothing is encrypted or
// authenticated: use networks that you trust.
// `time_out_ms`: as of varlen_fa_communicator_threads; for the meeting too.
// `communicator`: receives the handle, to be given to varlen_fa_communicator_free.
varlen_fa_status varlen_fa_communicator_connect(const char *meeting,
                                                uint64_t rank,
                                                uint64_t world_size,
                                                uint64_t time_out_ms,
                                                struct varlen_fa_communicator **communicator);

// Joins processes whose CUDA devices send and receive by NCCL (libnccl.so.2, loaded at run time):
// this one is rank `rank` of `world_size`. Returns when all are there. Run on two GPUs of one host, and never between hosts.
//
// `device`: a CUDA device, on a GPU of its own. Requests of this rank are prepared with it.
// `meeting`, `time_out_ms`: as of varlen_fa_communicator_connect. What takes longer than the time-out
// is aborted, on the device too.
// `comm`: an ncclComm_t of the caller's, of the same rank and ranks and on the same GPU, which stays
// the caller's; NULL makes one. Nobody else uses it during a call, and it lives until the
// communicator is freed.
// `communicator`: receives the handle, to be given to varlen_fa_communicator_free.
varlen_fa_status varlen_fa_communicator_nccl(const struct varlen_fa_device *device,
                                             const char *meeting,
                                             uint64_t rank,
                                             uint64_t world_size,
                                             uint64_t time_out_ms,
                                             void *comm,
                                             struct varlen_fa_communicator **communicator);

// Frees a communicator. NULL is ignored. Other ranks that still wait for this one get an error.
varlen_fa_status varlen_fa_communicator_free(struct varlen_fa_communicator *communicator);

// Creates the metadata of a sequence that is divided among ranks, as rank `rank` sees it. Every
// rank does so once per request, from the mask of the whole sequence; nothing is sent.
//
// `key_mask`: [B, S], S = prefix + the sum of the lengths + suffix; the same on every rank.
// `ranges`: [B, S, S], of the whole sequence; NULL for none.
// `sharded_meta`: receives the handle, to be given to varlen_fa_sharded_meta_free.
varlen_fa_status varlen_fa_sharded_meta_create(const struct varlen_fa_key_mask *key_mask,
                                               const struct varlen_fa_shards *shards,
                                               uint64_t rank,
                                               const struct varlen_fa_key_ranges *ranges,
                                               struct varlen_fa_sharded_meta **sharded_meta);

// Frees sharded metadata. NULL is ignored.
varlen_fa_status varlen_fa_sharded_meta_free(struct varlen_fa_sharded_meta *sharded_meta);

// Prepares a request: chooses a mode, and checks that all ranks were given the same. Every rank
// calls it once per request. After an error the communicator takes no more calls, on any rank.
//
// `request`: receives the handle, to be given to varlen_fa_parallel_request_free. It keeps device and
// metadata alive.
// `plan`: receives the mode and why it was chosen; may be NULL.
varlen_fa_status varlen_fa_parallel_prepare(const struct varlen_fa_device *device,
                                            const struct varlen_fa_communicator *communicator,
                                            const struct varlen_fa_sharded_meta *sharded_meta,
                                            const struct varlen_fa_parallel_options *options,
                                            struct varlen_fa_parallel_request **request,
                                            struct varlen_fa_parallel_plan *plan);

// Frees a request. NULL is ignored.
varlen_fa_status varlen_fa_parallel_request_free(struct varlen_fa_parallel_request *request);

// Attention of this rank's tokens to those of all ranks. Every rank calls it, in the same order.
//
// `q`, `out`: [B, prefix + shard + suffix, H, D]. `out` lies in memory that no input shares; rows of
// masked tokens are exactly zero.
// `k`, `v`: [B, prefix + shard + suffix, Hkv, D].
//
// Prefix and suffix hold the same on every rank. After an error, here or on another rank, the
// communicator takes no more calls, on any rank; nothing waits longer than its time-out. `out` may
// then hold anything.
varlen_fa_status varlen_fa_parallel_forward(const struct varlen_fa_communicator *communicator,
                                            const struct varlen_fa_parallel_request *request,
                                            const struct varlen_fa_tensor *q,
                                            const struct varlen_fa_tensor *k,
                                            const struct varlen_fa_tensor *v,
                                            const struct varlen_fa_tensor *out);

// varlen_fa_parallel_forward on tensors in segments along S, with a bias or score modifiers, and with
// the log-sum-exp. docs/sequence-parallel.md says which modes compute what; others are refused with
// NOT_APPLICABLE before anything is sent. To have a mode chosen that does, say so in the options of
// varlen_fa_parallel_prepare.
//
// `q`, `k`, `v`, `out`: each is cut where prefix, shard and suffix meet, or only at some of these
// places; one segment is the whole tensor.
// `scores`: NULL for neither a bias nor modifiers.
// `lse`: [B, H, prefix + shard + suffix] f32, receives the log-sum-exp of this rank's rows over all
// keys, as in varlen_fa_forward_with_lse; NULL for none.
//
// Outputs share no memory with one another or with an input. Messages name a segment as in
// `segments[1].k`.
varlen_fa_status varlen_fa_parallel_forward_segments(const struct varlen_fa_communicator *communicator,
                                                     const struct varlen_fa_parallel_request *request,
                                                     const struct varlen_fa_segments *q,
                                                     const struct varlen_fa_segments *k,
                                                     const struct varlen_fa_segments *v,
                                                     const struct varlen_fa_parallel_scores *scores,
                                                     const struct varlen_fa_segments *out,
                                                     const struct varlen_fa_tensor *lse);

// Makes the device ready for calls of varlen_fa_forward of this kind, so that the first of them
// takes no longer than the others: compiles their shaders and uploads the metadata. It runs one
// call on zeros and waits for it. Without it, the first call on a wgpu device may take seconds.
//
// On wgpu devices a shader depends on the element type, D and the kind of the mask, not on B, S
// and the number of heads: a small batch will do, as long as the plan is the same.
//
// `device`: is made ready. Any thread may do so, also beside calls on the device.
// `options`: may be NULL.
// `dtype`: the element type of q, k, v and the output.
// `q_shape`: B, Sq, H and D.
// `kv_shape`: B, Sk, Hkv and D.
// `mask`: NULL for no mask.
// `plan`: receives the plan that such calls have; may be NULL.
varlen_fa_status varlen_fa_warm_up(const struct varlen_fa_device *device,
                                   const struct varlen_fa_attention_options *options,
                                   varlen_fa_dtype dtype,
                                   const uint64_t *q_shape,
                                   const uint64_t *kv_shape,
                                   const struct varlen_fa_attention_mask *mask,
                                   struct varlen_fa_plan *plan);

// Gives a wgpu device a pipeline cache, with which it compiles shaders from now on. What
// varlen_fa_pipeline_cache_copy gives at the end of a program makes its next start fast, where the
// driver keeps no cache of its own. Data of another adapter or driver counts as none.
//
// `device`: a wgpu device; NOT_APPLICABLE if it is none or its adapter has no pipeline caches.
// `data`: `bytes` bytes that varlen_fa_pipeline_cache_copy gave, unchanged: drivers trust them.
// `bytes`: 0 for an empty cache.
varlen_fa_status varlen_fa_pipeline_cache_load(const struct varlen_fa_device *device,
                                               const uint8_t *data,
                                               uint64_t bytes);

// Copies what a device's pipeline cache holds, to be kept in a file.
//
// `device`: a wgpu device whose cache varlen_fa_pipeline_cache_load made; NOT_APPLICABLE if it has
// none.
// `data`: receives the bytes; NULL to ask for their number alone.
// `capacity`: the size of the memory at `data`; LENGTH if it is too small, with `bytes` set.
// `bytes`: receives the number of bytes. It grows when shaders are compiled.
varlen_fa_status varlen_fa_pipeline_cache_copy(const struct varlen_fa_device *device,
                                               uint8_t *data,
                                               uint64_t capacity,
                                               uint64_t *bytes);

// The name of a status, as its constant has it: "BAD_HANDLE"; or NULL.
//
// As all functions that return names: NULL means that the number has none, and the text is valid
// while the library is loaded. Numbers with a name are less than 255, so a loop over these finds
// every name that this library knows.
const char *varlen_fa_status_name(varlen_fa_status status);

// The name of a device kind, as in VARLEN_FA_DEVICE: "cuda"; or NULL.
const char *varlen_fa_device_kind_name(varlen_fa_device_kind kind);

// The name of an element type: "bf16"; or NULL.
const char *varlen_fa_dtype_name(varlen_fa_dtype dtype);

// The name of a path, as in the text of plans: "fused"; or NULL.
const char *varlen_fa_path_name(varlen_fa_path path);

// The name of a kernel, as in the text of plans and in VARLEN_FA_KERNEL: "sm80"; or NULL.
const char *varlen_fa_kernel_name(varlen_fa_kernel kernel);

// The name of a reason: "all-valid"; or NULL.
const char *varlen_fa_reason_name(varlen_fa_reason reason);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* VARLEN_FA_H */
