//! The types of the header: plain data with fixed values, and reserved space for later versions.
//!
//! Fields and parameters in which C passes an enum are `MaybeUninit<...>`, because C may pass any
//! number, and a Rust enum must not hold one that is not its own. The header shows them as the
//! enum.

use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;

/// What a call returns: 0, or why it was refused or failed. varlen_fa_last_error() has the message.
///
/// Up to 99, the arguments are at fault: nothing was launched and nothing was written. From 100 on,
/// the device is at fault; from 200 on, this library.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_status {
    /// Success.
    Ok = 0,
    /// A pointer that must not be NULL is NULL, or points into the first page.
    NullPointer = 1,
    /// Not a live handle of the right type: freed, of another type, or never issued. Also a CUDA
    /// context, stream or address that the driver does not know.
    BadHandle = 2,
    /// A number that is not a value of its enum, a negative stride, a flag that is neither 0 nor 1,
    /// or reserved space that is not 0.
    BadValue = 3,
    /// A pointer, an offset or a stride that is not a multiple of the required alignment.
    Misaligned = 4,
    /// A tensor has the wrong number of dimensions.
    Rank = 10,
    /// A tensor's shape does not fit the other arguments.
    Shape = 11,
    /// A bias dimension is neither 1 nor the full size.
    Broadcast = 12,
    /// The number of query heads is not a multiple of the number of key/value heads.
    HeadsNotDivisible = 13,
    /// The head dimension is not from 1 to 512.
    HeadDim = 14,
    /// The device does not compute with this element type.
    UnsupportedDtype = 15,
    /// Element types differ where they must agree.
    DtypeMismatch = 16,
    /// The last dimension of a tensor is not contiguous.
    InnerStride = 17,
    /// Shape and strides reach past the end of the memory.
    BufferTooSmall = 18,
    /// An output shares memory with an input or another output.
    Overlap = 19,
    /// Two elements of an output lie at the same address.
    SelfOverlap = 20,
    /// An array has the wrong number of elements.
    Length = 21,
    /// A mask or metadata was built for another batch or sequence length.
    MaskSize = 22,
    /// A length or a run reaches outside its row.
    MaskRow = 23,
    /// Cumulative sequence lengths do not start at 0, decrease, or do not end at the tensors' size.
    CuSeqlens = 24,
    /// The softmax scale is not a finite number.
    SoftmaxScale = 25,
    /// A size exceeds an integer type or a limit.
    TooLarge = 26,
    /// An environment variable has an invalid value.
    Environment = 27,
    /// A tensor, memory or metadata belongs to another device.
    DeviceMismatch = 28,
    /// The forced path or kernel cannot compute this call on this device.
    NotApplicable = 29,
    /// A soft cap, ALiBi slopes or attention sinks are no good numbers, or not one a query head.
    ScoreModifier = 30,
    /// Shards, ranks or a mode of sequence parallelism do not fit one another.
    Sharding = 31,
    /// An argument is wrong in a way that has no number in this header.
    Refused = 99,
    /// The requested device is unavailable.
    DeviceUnavailable = 100,
    /// Out of memory.
    OutOfMemory = 101,
    /// The device is lost; no later call on it succeeds.
    DeviceLost = 102,
    /// An operation of the device or its driver failed.
    Backend = 103,
    /// The device's stream is being captured into a CUDA graph, which cannot hold this operation.
    /// The capture goes on.
    StreamCaptured = 104,
    /// Ranks were given different masks, shapes or settings, or called in another order. The
    /// communicator takes no more calls.
    RanksDiffer = 105,
    /// A rank ended, or gave up after an error of its own. The communicator takes no more calls.
    RankLost = 106,
    /// A rank did not answer in time. The communicator takes no more calls.
    RankTimedOut = 107,
    /// A defect of this library; the message says where. Please report it.
    Panic = 200,
}

/// Where a device computes.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_device_kind {
    /// The device that VARLEN_FA_DEVICE names, or the best one present: CUDA, then a hardware GPU
    /// through wgpu, then the CPU.
    Auto = 0,
    /// The CPU.
    Cpu = 1,
    /// Vulkan, Metal or DirectX 12 through wgpu, including software adapters.
    Wgpu = 2,
    /// An NVIDIA GPU.
    Cuda = 3,
}

/// Element type of a tensor. 0 is not a value, so that a forgotten field is an error.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_dtype {
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary16.
    F16 = 2,
    /// The upper 16 bits of a binary32.
    Bf16 = 3,
}

/// Element type of a mask, whose number is its size in bytes. 0 drops the token; any other value
/// keeps it, for bool, signed and unsigned integers alike.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_mask_dtype {
    /// bool, uint8_t, int8_t.
    U8 = 1,
    /// uint16_t, int16_t.
    U16 = 2,
    /// uint32_t, int32_t.
    U32 = 4,
    /// uint64_t, int64_t.
    U64 = 8,
}

/// The memory that an address points to.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_memory {
    /// Host memory. The CPU device works on it directly. For other devices, a call copies inputs to
    /// the device and outputs back, and returns when that is done.
    Host = 0,
    /// Memory of the CUDA device that computes, which is used directly. The call returns before the
    /// work is done.
    Cuda = 1,
}

/// How a call is computed.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_path {
    /// In options: the library decides.
    Auto = 0,
    /// Every query against every key; masked keys are dropped from the softmax.
    Dense = 1,
    /// One pass over the padded tensors that skips what is masked.
    Fused = 2,
    /// Pack, varlen attention on the packed rows, scatter with zeros.
    Packed = 3,
    /// Zeros only: no query or no key is valid.
    Zero = 4,
    /// In plans: one that this header does not list; the text names it.
    Unlisted = 255,
}

/// What computes a call.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_kernel {
    /// In options: the device's preferred one.
    Auto = 0,
    /// The CPU device's kernel.
    CpuTiled = 1,
    /// The WGSL kernel that needs no optional feature.
    WgslPortable = 2,
    /// The WGSL kernel on cooperative matrices (tensor cores).
    WgslCoop = 6,
    /// The CUDA kernel for every chip from compute capability 8.0 on.
    CudaSm80 = 3,
    /// The CUDA kernel for compute capability 9.0.
    CudaSm90 = 4,
    /// The CUDA kernel for compute capabilities 10.0 and 10.3.
    CudaSm100 = 5,
    /// In plans: one that this header does not list; the text names it.
    Unlisted = 255,
}

/// Why a path was taken. 8 is reserved.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_reason {
    /// No mask was given.
    NoMask = 1,
    /// A key mask was given. Dropped queries are computed like any other.
    KeyMask = 2,
    /// The key mask keeps every key, so it is not applied.
    KeyMaskKeepsAll = 3,
    /// An additive bias was given.
    Bias = 4,
    /// Metadata was given in which every token is valid.
    AllValid = 5,
    /// Metadata was given with no valid query or no valid key.
    NothingValid = 6,
    /// Metadata was given, and the kernel reads the padded tensors directly.
    Fused = 7,
    /// VARLEN_FA=0.
    DenseForced = 9,
    /// The caller forced the path.
    PathForced = 10,
    /// The tensors were packed already.
    AlreadyPacked = 11,
    /// A mask was given whose runs are so short that packing takes less time than the fused path.
    Fragmented = 13,
    /// Key ranges were given, and no mask of tokens.
    KeyRanges = 14,
    /// Metadata was given, but so few tokens are masked that computing every row takes less time.
    FewMasked = 15,
    /// One that this header does not list; the text names it.
    Unlisted = 255,
}

/// How an attention mask is given.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_mask_kind {
    /// Every query attends to every key.
    None = 0,
    /// `key_mask`: every query attends to the kept keys of its batch row. Rows of dropped queries
    /// are computed like any other.
    Key = 1,
    /// `bias`: added to the scaled scores, broadcast over [B, H, Sq, Sk]. An entry of -infinity
    /// gives a key no weight, but does not hide NaN in the key or its value as a key mask does.
    Bias = 2,
    /// `query_meta`: self-attention among the valid tokens. Other rows are exactly zero.
    Varlen = 3,
    /// `query_meta` and `key_meta`: valid queries attend to the valid keys of their batch row.
    /// Other rows are exactly zero.
    VarlenCross = 4,
    /// `query_device_meta`: as VARLEN, with metadata built by the device.
    DeviceVarlen = 5,
    /// `query_device_meta` and `key_device_meta`: as VARLEN_CROSS, with metadata built by the
    /// device.
    DeviceVarlenCross = 6,
}

/// Which elements of a head rotate together.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_rotary_pairing {
    /// Elements 2i and 2i + 1, as in Qwen-Image and Flux.
    Interleaved = 1,
    /// Elements i and i + R/2, as in Llama and ModernBERT.
    Halves = 2,
}

/// How ranks share the work of a call. docs/sequence-parallel.md describes the modes.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum varlen_fa_parallel_mode {
    /// What the plan chooses.
    Auto = 0,
    /// Queries stay; every rank receives all keys and values.
    Gather = 1,
    /// Rows are exchanged for heads, and back. The ranks divide the heads.
    Ulysses = 2,
    /// Queries stay; keys and values go round. The last bits differ from one device.
    Ring = 3,
    /// ULYSSES in groups of `ulysses` consecutive ranks, GATHER among them.
    UlyssesGather = 4,
    /// ULYSSES in groups of `ulysses` consecutive ranks, RING among them.
    UlyssesRing = 5,
}

/// A device. Handles are numbers in the form of pointers; they do not point to memory.
pub struct varlen_fa_device {
    _private: (),
}

/// Which tokens of a [B, S] batch are kept.
pub struct varlen_fa_key_mask {
    _private: (),
}

/// Which tokens of a [B, S] batch are valid, as attention needs it. Create it once per request for
/// all layers and steps: it keeps a copy on each device that used it.
pub struct varlen_fa_meta {
    _private: (),
}

/// The same as varlen_fa_meta, built by the device from a mask in its memory, without waiting for
/// the host.
pub struct varlen_fa_device_meta {
    _private: (),
}

/// Cumulative sequence lengths of packed rows: sequence b is rows cu_seqlens[b] to cu_seqlens[b +
/// 1].
pub struct varlen_fa_cu_seqlens {
    _private: (),
}

/// Which keys each query sees: a causal mask, a window, or any range of keys for each query. Create
/// it once per request for all layers and steps: it keeps a copy on each device that used it.
pub struct varlen_fa_key_ranges {
    _private: (),
}

/// What happens to scores: a soft cap, ALiBi, attention sinks. Create it once for each layer of a
/// model: it keeps a copy on each device that used it.
pub struct varlen_fa_score_modifiers {
    _private: (),
}

/// One member of a group of ranks that exchange rows: a thread of one process, or a process. Calls
/// of one communicator run one after another.
pub struct varlen_fa_communicator {
    _private: (),
}

/// Which tokens of a sequence that is divided among ranks are valid, as one rank needs it.
pub struct varlen_fa_sharded_meta {
    _private: (),
}

/// A request that ranks have agreed on, for all layers and steps.
pub struct varlen_fa_parallel_request {
    _private: (),
}

/// A tensor in external memory.
///
/// Element [b, s, h, d] of a [B, S, H, D] tensor lies at `data` + b*strides[0] + s*strides[1] +
/// h*strides[2] + d*strides[3], in elements. The last dimension must be contiguous (stride 1),
/// except in a bias. The other strides are free, so that slices of a fused projection and permuted
/// tensors need no copy.
///
/// Start from zeros, as in `varlen_fa_tensor q = {0};`, so that reserved space is 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_tensor {
    /// The first element. May be NULL if the tensor has no elements.
    pub data: *mut c_void,
    /// Size of the memory at `data`. Shape and strides that reach further are refused.
    pub bytes: u64,
    /// Element type.
    pub dtype: MaybeUninit<varlen_fa_dtype>,
    /// The memory that `data` points to.
    pub memory: MaybeUninit<varlen_fa_memory>,
    /// Number of dimensions, 1 to 4.
    pub rank: u32,
    /// 0.
    pub reserved_word: u32,
    /// Size of each dimension; entries from `rank` on are ignored.
    pub shape: [u64; 4],
    /// Distance between neighbours in each dimension, in elements, at least 0; entries from `rank`
    /// on are ignored.
    pub strides: [i64; 4],
    /// 0.
    pub reserved: [u64; 2],
}

/// A tensor [B, S, H, D] in segments [B, S_i, H, D] that follow one another along S, each in memory
/// of its own and with strides of its own: the text and the image of a joint layer. Start from zeros,
/// as with a tensor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_segments {
    /// The segments, in order. Any may be empty.
    pub tensors: *const varlen_fa_tensor,
    /// How many there are, 1 to 8.
    pub count: u64,
    /// 0.
    pub reserved: [u64; 2],
}

/// A [B, S] mask in external memory. Start from zeros, as with a tensor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_mask_view {
    /// The first element. May be NULL if the mask has no elements.
    pub data: *const c_void,
    /// Size of the memory at `data`, in bytes.
    pub bytes: u64,
    /// Element type.
    pub dtype: MaybeUninit<varlen_fa_mask_dtype>,
    /// The memory that `data` points to.
    pub memory: MaybeUninit<varlen_fa_memory>,
    /// B and S.
    pub shape: [u64; 2],
    /// Distance between neighbours in each dimension, in elements, at least 0.
    pub strides: [i64; 2],
    /// 0.
    pub reserved: [u64; 2],
}

/// A range of kept tokens in one batch row. It may be empty; ranges may touch or overlap.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct varlen_fa_run {
    /// Batch row.
    pub row: u64,
    /// First kept token.
    pub start: u64,
    /// One past the last kept token.
    pub end: u64,
}

/// A range of keys: `first` <= key < `end`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct varlen_fa_key_range {
    /// First key.
    pub first: u64,
    /// One past the last key.
    pub end: u64,
}

/// What key ranges are made for: padded tensors by their sizes, or packed rows by their sequences.
/// Start from zeros, as with a tensor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_ranges_of {
    /// B, for padded tensors. Ranges count positions of the padded keys.
    pub batch: u64,
    /// Sq, for padded tensors.
    pub seq_q: u64,
    /// Sk, for padded tensors.
    pub seq_k: u64,
    /// Sequences of the queries, for packed rows; NULL for padded tensors. Ranges count keys from
    /// the first one of the sequence.
    pub cu_seqlens_q: *const varlen_fa_cu_seqlens,
    /// Sequences of the keys, for packed rows; NULL for padded tensors.
    pub cu_seqlens_k: *const varlen_fa_cu_seqlens,
    /// 0.
    pub reserved: [u64; 4],
}

/// Which queries attend to which keys. All zeros, or a NULL struct, means no mask. Pointers that
/// `kind` does not use must be NULL; `bias` and `ranges` go with every kind.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_attention_mask {
    /// Which of the fields below are used.
    pub kind: MaybeUninit<varlen_fa_mask_kind>,
    /// 0.
    pub reserved_word: u32,
    /// [B, Sk], for KEY.
    pub key_mask: *const varlen_fa_key_mask,
    /// Added to the scaled scores: 1 to 4 dimensions that broadcast to [B, H, Sq, Sk], in the
    /// tensors' element type or f32. NULL for none; not NULL for BIAS.
    pub bias: *const varlen_fa_tensor,
    /// [B, S] for VARLEN, [B, Sq] for VARLEN_CROSS.
    pub query_meta: *const varlen_fa_meta,
    /// [B, Sk], for VARLEN_CROSS.
    pub key_meta: *const varlen_fa_meta,
    /// [B, S] for DEVICE_VARLEN, [B, Sq] for DEVICE_VARLEN_CROSS.
    pub query_device_meta: *const varlen_fa_device_meta,
    /// [B, Sk], for DEVICE_VARLEN_CROSS.
    pub key_device_meta: *const varlen_fa_device_meta,
    /// Made for [B, Sq, Sk]: each query sees the keys of its range that count. NULL for none.
    pub ranges: *const varlen_fa_key_ranges,
    /// What else happens to the scores; they go with every kind. NULL for nothing.
    pub modifiers: *const varlen_fa_score_modifiers,
    /// 0.
    pub reserved: [u64; 2],
}

/// Tokens whose q and k lie together: the text or the image of a joint layer. Start from zeros, as
/// with a tensor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_qk_segment {
    /// [B, S, H, D].
    pub q: *const varlen_fa_tensor,
    /// [B, S, Hkv, D].
    pub k: *const varlen_fa_tensor,
    /// As `q`. NULL, or `q`'s own elements, to replace `q`; then `k` is replaced too.
    pub q_out: *const varlen_fa_tensor,
    /// As `k`. NULL, or `k`'s own elements, to replace `k`; then `q` is replaced too.
    pub k_out: *const varlen_fa_tensor,
    /// Weight of q's norm: [D], f32 or of q's element type. NULL with `k_weight` for no norm.
    pub q_weight: *const varlen_fa_tensor,
    /// Weight of k's norm.
    pub k_weight: *const varlen_fa_tensor,
    /// Cosines: [S, R/2] or [B, S, R/2], f32 or of q's element type. NULL with `sin` for no rotation.
    pub cos: *const varlen_fa_tensor,
    /// Sines, as `cos`.
    pub sin: *const varlen_fa_tensor,
    /// Added to the mean of squares: finite and not negative; 0 without a norm.
    pub eps: f32,
    /// Which elements are pairs; 0 without a rotation.
    pub pairing: MaybeUninit<varlen_fa_rotary_pairing>,
    /// 0.
    pub reserved: [u64; 4],
}

/// Options of an attention call. All zeros, or a NULL struct, means the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_attention_options {
    /// 1 to use `softmax_scale`; 0 for 1/sqrt(D).
    pub has_softmax_scale: u32,
    /// Factor on q*k before the softmax; any finite number.
    pub softmax_scale: f32,
    /// Forces a path, for tests and comparisons.
    pub path: MaybeUninit<varlen_fa_path>,
    /// Forces a kernel, for tests and comparisons.
    pub kernel: MaybeUninit<varlen_fa_kernel>,
    /// For varlen_fa_varlen_attention: made for its sequences, each query sees the keys of its range.
    /// NULL for none, and for other calls, whose mask has ranges.
    pub ranges: *const varlen_fa_key_ranges,
    /// For varlen_fa_varlen_attention: what else happens to the scores. NULL for nothing, and for
    /// other calls, whose mask has modifiers.
    pub modifiers: *const varlen_fa_score_modifiers,
    /// 0.
    pub reserved: [u64; 2],
}

/// What was decided for a call.
#[repr(C)]
pub struct varlen_fa_plan {
    /// How the call was computed.
    pub path: varlen_fa_path,
    /// What computed it; no kernel runs on the ZERO path.
    pub kernel: varlen_fa_kernel,
    /// Why.
    pub reason: varlen_fa_reason,
    /// 0.
    pub reserved_word: u32,
    /// The same in words, e.g. "fused by cpu-tiled: metadata was given and the kernel reads padded
    /// tensors directly".
    pub text: [c_char; 240],
    /// 0.
    pub reserved: [u64; 2],
}

/// What a device is and can do.
#[repr(C)]
pub struct varlen_fa_device_info {
    /// Where it computes; never AUTO.
    pub kind: varlen_fa_device_kind,
    /// 1 if the device is emulated on the CPU, or is the CPU.
    pub is_software: u32,
    /// Bit `1 << dtype` for each supported element type.
    pub dtypes: u32,
    /// Bit `1 << kernel` for each kernel of this header that runs on it.
    pub kernels: u32,
    /// Largest possible size of a tensor, in bytes.
    pub max_buffer_bytes: u64,
    /// Kind and hardware, for messages.
    pub name: [c_char; 192],
    /// The hardware, and its driver if it has one.
    pub adapter: [c_char; 192],
    /// 0.
    pub reserved: [u64; 4],
}

/// Sizes of the batch that metadata describes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct varlen_fa_meta_info {
    /// Number of batch rows, B.
    pub batch: u64,
    /// Tokens of each padded row, S.
    pub seq: u64,
    /// Number of valid tokens, which is the number of packed rows.
    pub total_valid: u64,
    /// Valid tokens of the longest row.
    pub max_seqlen: u64,
    /// 0.
    pub reserved: [u64; 4],
}

/// How a sequence is divided: a prefix and a suffix that every rank has, and between them one shard
/// for each rank. Start from zeros, as with a tensor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_shards {
    /// Tokens of the prefix.
    pub prefix: u64,
    /// Tokens of the suffix.
    pub suffix: u64,
    /// Tokens of each shard; any may be 0.
    pub lengths: *const u64,
    /// How many shards and ranks there are, at least 1.
    pub ranks: u64,
    /// 0.
    pub reserved: [u64; 4],
}

/// What a request computes, the same on every rank. Start from zeros, as with a tensor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_parallel_options {
    /// H.
    pub num_heads: u64,
    /// Hkv, which divides H.
    pub num_kv_heads: u64,
    /// D.
    pub head_dim: u64,
    /// Ranks of a group, for modes of two levels; else 0.
    pub ulysses: u64,
    /// Element type of all tensors.
    pub dtype: MaybeUninit<varlen_fa_dtype>,
    /// Forces a mode.
    pub mode: MaybeUninit<varlen_fa_parallel_mode>,
    /// 1 to use `softmax_scale`; 0 for 1/sqrt(D).
    pub has_softmax_scale: u32,
    /// Factor on q*k before the softmax; any finite number.
    pub softmax_scale: f32,
    /// What calls carry that not every mode computes, so that the plan takes one that does: modifiers
    /// of these kinds, whose values do not count; NULL for none.
    pub modifiers: *const varlen_fa_score_modifiers,
    /// 1 for a bias, else 0.
    pub has_bias: u32,
    /// 1 for the log-sum-exp, else 0.
    pub has_lse: u32,
    /// 0.
    pub reserved: [u64; 2],
}

/// What a call of sequence parallelism does to the scores, the same on every rank. Start from zeros,
/// as with a tensor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct varlen_fa_parallel_scores {
    /// Is added to the scores of the whole sequence: floating-point, broadcast over [B, H, S, S], the
    /// one that one device would be given. Any strides. NULL for none.
    pub bias: *const varlen_fa_tensor,
    /// Of all H heads; NULL for none.
    pub modifiers: *const varlen_fa_score_modifiers,
    /// 0.
    pub reserved: [u64; 4],
}

/// What was decided for a request.
#[repr(C)]
pub struct varlen_fa_parallel_plan {
    /// How ranks share the work; never AUTO.
    pub mode: varlen_fa_parallel_mode,
    /// 0.
    pub reserved_word: u32,
    /// Ranks of a group, for modes of two levels; else 0.
    pub ulysses: u64,
    /// The same in words, and why.
    pub text: [c_char; 496],
    /// 0.
    pub reserved: [u64; 2],
}
