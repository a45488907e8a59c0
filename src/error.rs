//! What can go wrong, as values: each variant names the argument, what was expected and what came.

use std::time::Duration;

use crate::dtype::DType;

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed.
///
/// Variants up to [`Error::OutOfMemory`] are raised before anything is launched or written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong number of dimensions.
    #[error("`{argument}`: expected {expected} dimensions, got {got}")]
    Rank {
        /// Name of the argument.
        argument: &'static str,
        /// Expected dimensions, with their names.
        expected: &'static str,
        /// Number of dimensions that came.
        got: usize,
    },
    /// A tensor's shape does not fit the other arguments.
    #[error("`{argument}`: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// Name of the argument.
        argument: &'static str,
        /// Shape that fits.
        expected: Vec<usize>,
        /// Shape that came.
        got: Vec<usize>,
    },
    /// A bias dimension is neither 1 nor the full size.
    #[error("`bias`: shape {got:?} does not broadcast to [B, H, Sq, Sk] = {expected:?}")]
    Broadcast {
        /// `[B, H, Sq, Sk]`.
        expected: Vec<usize>,
        /// Shape that came.
        got: Vec<usize>,
    },
    /// The number of query heads is not a multiple of the number of key/value heads.
    #[error("`k`: num_kv_heads must {}, got {num_kv_heads}", kv_heads_rule(*num_heads, *num_kv_heads))]
    HeadsNotDivisible {
        /// Heads of `q`.
        num_heads: usize,
        /// Heads of `k` and `v`.
        num_kv_heads: usize,
    },
    /// The head dimension is not supported.
    #[error("`q`: head_dim must be from 1 to 512, got {got}")]
    HeadDim {
        /// Head dimension that came.
        got: usize,
    },
    /// A call or one of its tensors has no segment, or too many.
    #[error("`{argument}`: expected 1 to {limit} segments, got {got}")]
    SegmentCount {
        /// Name of the argument.
        argument: &'static str,
        /// The most that it may have.
        limit: usize,
        /// Segments that came.
        got: usize,
    },
    /// A norm's `eps` is negative or no number.
    #[error("`{argument}`: must be finite and not negative, got {got}")]
    Eps {
        /// Name of the argument.
        argument: &'static str,
        /// Value that came.
        got: f32,
    },
    /// More elements of a head would rotate than it has.
    #[error(
        "`{argument}`: [S, R/2] or [B, S, R/2] tables rotate R elements of a head, an even number of at most \
         head_dim = {head_dim}, got R = {got}"
    )]
    RotaryDim {
        /// Name of the argument.
        argument: &'static str,
        /// Elements of a head.
        head_dim: usize,
        /// Elements that the tables would rotate.
        got: usize,
    },
    /// The device cannot compute with this element type.
    #[error("`{argument}`: element type {got} is not supported by device {device}, which takes {expected:?}")]
    UnsupportedDType {
        /// Name of the argument.
        argument: &'static str,
        /// Device that was asked.
        device: String,
        /// Element types it takes.
        expected: Vec<DType>,
        /// Element type that came.
        got: DType,
    },
    /// Element types of the arguments differ where they must agree.
    #[error("`{argument}`: expected element type {expected}, got {got}")]
    DTypeMismatch {
        /// Name of the argument.
        argument: &'static str,
        /// Element type that fits.
        expected: DType,
        /// Element type that came.
        got: DType,
    },
    /// The last dimension of a view is not contiguous.
    #[error("`{argument}`: the last dimension must have stride 1, got {got}")]
    InnerStride {
        /// Name of the argument.
        argument: &'static str,
        /// Stride that came, in elements.
        got: u64,
    },
    /// A view's address, offset or strides do not keep the alignment that the device needs.
    #[error(
        "`{argument}`: address, offset and strides must be multiples of {expected} bytes on this device, got {got}"
    )]
    Misaligned {
        /// Name of the argument.
        argument: &'static str,
        /// Alignment needed, in bytes.
        expected: u64,
        /// Offending offset, stride or address, in bytes.
        got: u64,
    },
    /// A view reaches past the end of its memory.
    #[error("`{argument}`: the view reaches byte {expected} of a buffer of {got} bytes")]
    BufferTooSmall {
        /// Name of the argument.
        argument: &'static str,
        /// Bytes that the view needs.
        expected: u64,
        /// Bytes that the memory has.
        got: u64,
    },
    /// The output may share memory with an input. The test is conservative: views that interleave
    /// without sharing an element count as overlapping.
    #[error("`{argument}` may share memory with `{other}`: an output needs a range of addresses to itself")]
    Overlap {
        /// Name of the output.
        argument: &'static str,
        /// Name of the argument that it overlaps.
        other: &'static str,
    },
    /// Two elements of an output view may lie at the same address. The test is conservative: each
    /// stride must step over all that the dimensions of smaller strides reach.
    #[error(
        "`{argument}`: strides {strides:?} may put elements of shape {shape:?} over one another; each stride must \
         step over the dimensions of smaller strides"
    )]
    SelfOverlap {
        /// Name of the output.
        argument: &'static str,
        /// Shape of the view.
        shape: Vec<usize>,
        /// Strides of the view, in elements.
        strides: Vec<u64>,
    },
    /// A slice or permutation names a dimension or range that the view does not have.
    #[error("`{argument}`: {expected}, got {got}")]
    View {
        /// Name of the argument.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// A slice of host data has the wrong number of elements.
    #[error("`{argument}`: expected {expected} elements, got {got}")]
    Length {
        /// Name of the argument.
        argument: &'static str,
        /// Elements expected.
        expected: usize,
        /// Elements that came.
        got: usize,
    },
    /// A mask or metadata was built for another batch or sequence length.
    #[error("`{argument}`: expected a mask of [batch, sequence] = {expected:?}, got one of {got:?}")]
    MaskSize {
        /// Name of the argument.
        argument: &'static str,
        /// `[batch, sequence]` of the tensors.
        expected: [usize; 2],
        /// `[batch, sequence]` of the mask.
        got: [usize; 2],
    },
    /// A length or a run of a mask reaches outside its row, or a value is none that masks have.
    #[error("`{argument}`: row {row}: {expected}, got {got}")]
    MaskRow {
        /// Name of the argument.
        argument: &'static str,
        /// Batch row.
        row: usize,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// Key ranges were made for other queries or keys.
    #[error("`{argument}`: expected ranges for {expected}, got ranges for {got}")]
    RangesSize {
        /// Name of the argument.
        argument: &'static str,
        /// Sizes of the call.
        expected: String,
        /// Sizes that the ranges were made for.
        got: String,
    },
    /// Cumulative sequence lengths do not start at 0, fall, or end elsewhere than the tensors do.
    #[error("`{argument}`: expected {expected}, got {got}")]
    CuSeqlens {
        /// Name of the argument.
        argument: &'static str,
        /// The rule that was broken.
        expected: String,
        /// What came.
        got: String,
    },
    /// The softmax scale is not a finite number.
    #[error("`softmax_scale`: expected a finite number, got {got}")]
    SoftmaxScale {
        /// Scale that came.
        got: f32,
    },
    /// A score modifier has a value that means nothing, or not one value a query head.
    #[error("`{argument}`: expected {expected}, got {got}")]
    ScoreModifier {
        /// `softcap`, `alibi` or `sinks`.
        argument: &'static str,
        /// What it may be.
        expected: String,
        /// What came.
        got: String,
    },
    /// A size does not fit the integers or the limits that hold it.
    #[error("`{argument}`: {limit_name} allows {limit}, got {got}")]
    TooLarge {
        /// Name of the argument.
        argument: &'static str,
        /// The limit's name.
        limit_name: &'static str,
        /// The largest value allowed.
        limit: u64,
        /// The value that came.
        got: u64,
    },
    /// An environment variable has a value that is not understood.
    #[error("environment variable {variable}: expected {expected}, got {got:?}")]
    Environment {
        /// Name of the variable.
        variable: &'static str,
        /// Values that are understood.
        expected: String,
        /// Value that came.
        got: String,
    },
    /// A kernel's name is not understood.
    #[error("`kernel`: expected {expected}, got {got:?}")]
    UnknownKernel {
        /// Names that are understood.
        expected: String,
        /// Name that came.
        got: String,
    },
    /// A device's name is not understood.
    #[error("`device`: expected {expected}, got {got:?}")]
    UnknownDevice {
        /// Names that are understood.
        expected: &'static str,
        /// Name that came.
        got: String,
    },
    /// A tensor lives on another device than the one asked to compute.
    #[error("`{argument}`: expected a tensor of device {expected}, got one of {got}")]
    DeviceMismatch {
        /// Name of the argument.
        argument: &'static str,
        /// Device of the call.
        expected: String,
        /// Device of the tensor.
        got: String,
    },
    /// A device of one kind was expected, and one of another came.
    #[error("`{argument}`: expected a {expected} device, got {got}")]
    DeviceKind {
        /// Name of the argument.
        argument: &'static str,
        /// Kind of device that fits: `wgpu`, `cuda` or `cpu`.
        expected: &'static str,
        /// Device that came.
        got: String,
    },
    /// The application's device was created with a limit that the shaders do not fit.
    #[error("`device`: its limit {limit_name} must be {expected}, got {got}")]
    DeviceLimit {
        /// The limit's name in `wgpu::Limits`.
        limit_name: &'static str,
        /// What would do.
        expected: String,
        /// The device's own.
        got: u64,
    },
    /// A queue belongs to another device than the one it came with.
    #[error("`queue`: expected the queue of `device`, got that of another device")]
    QueueMismatch,
    /// The application's buffer was created without a usage that is needed.
    #[error("`{argument}`: the buffer must be created with usage {missing}")]
    BufferUsage {
        /// Name of the argument.
        argument: &'static str,
        /// Names of the missing flags of `wgpu::BufferUsages`.
        missing: String,
    },
    /// The application's buffer is destroyed, mapped, empty or of another wgpu device.
    #[error("`{argument}`: the buffer cannot be used: {why}")]
    BufferUnusable {
        /// Name of the argument.
        argument: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A raw handle or address of the caller is not what it should be.
    #[error("`{argument}`: expected {expected}, got {got}")]
    Handle {
        /// Name of the argument.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The caller is capturing the device's stream into a graph, which cannot hold the operation. The capture goes on as if it
    /// had not been asked for.
    #[error(
        "device {device}: {operation} is not possible while its stream is being captured; wait, copy and allocate before or \
         after, and let `forward_into` write to memory that is there"
    )]
    StreamCaptured {
        /// Device that was asked.
        device: String,
        /// What was asked for.
        operation: &'static str,
    },
    /// The chosen device cannot be used here.
    #[error("device {device} is not available: {why}")]
    DeviceUnavailable {
        /// Device that was asked for.
        device: String,
        /// Why it cannot be used.
        why: String,
    },
    /// A forced path or kernel does not exist on this device or for this call.
    #[error("`{argument}`: {got} cannot be forced here: {why}")]
    NotApplicable {
        /// `path` or `kernel`.
        argument: &'static str,
        /// The one that was forced.
        got: String,
        /// Why it cannot run.
        why: String,
    },
    /// Shards of a sequence, ranks, or a mode of sequence parallelism do not fit one another.
    #[error("`{argument}`: expected {expected}, got {got}")]
    Sharding {
        /// Name of the argument.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// Memory ran out.
    #[error("device {device} has no memory for {requested} more bytes: {why}")]
    OutOfMemory {
        /// Device that ran out.
        device: String,
        /// Bytes asked for.
        requested: u64,
        /// What the device said.
        why: String,
    },
    /// The device is gone: every tensor on it is lost, and no later call on it succeeds.
    #[error("device {device} is lost: {why}")]
    DeviceLost {
        /// Device that was lost.
        device: String,
        /// What the device said.
        why: String,
    },
    /// The call would wait for the device, and the thread of a browser's page may not.
    #[error("device {device}: {operation} would block the thread, which is not possible in a browser; use {instead}")]
    WouldBlock {
        /// Device that was asked.
        device: String,
        /// What was asked for.
        operation: &'static str,
        /// What to use there.
        instead: &'static str,
    },
    /// Ranks of a communicator were given different masks, shapes or settings, or called in a different order. The
    /// communicator takes no more calls.
    #[error("{operation}: rank {rank} has other {what} than rank {own_rank}")]
    RanksDiffer {
        /// What was being done.
        operation: &'static str,
        /// This rank.
        own_rank: usize,
        /// The rank that differs.
        rank: usize,
        /// What they differ in.
        what: String,
    },
    /// A rank of a communicator ended, lost its connection, or gave up after an error of its own. The communicator takes no
    /// more calls.
    #[error("{operation}: rank {rank} is lost: {why}")]
    RankLost {
        /// What was being done.
        operation: &'static str,
        /// The rank that was lost.
        rank: usize,
        /// What is known of it.
        why: String,
    },
    /// A rank of a communicator did not answer in time. The communicator takes no more calls.
    #[error("{operation}: rank {rank} did not answer within {limit:?}")]
    RankTimedOut {
        /// What was being done.
        operation: &'static str,
        /// The rank that was waited for.
        rank: usize,
        /// The communicator's time-out.
        limit: Duration,
    },
    /// The device or its driver refused an operation.
    #[error("device {device}: {operation} failed: {why}")]
    Backend {
        /// Device that failed.
        device: String,
        /// What was being done.
        operation: &'static str,
        /// What the device said.
        why: String,
    },
}

impl Error {
    /// Checks a slice's number of elements.
    pub(crate) fn expect_length(argument: &'static str, expected: usize, got: usize) -> Result<()> {
        if expected == got {
            return Ok(());
        }
        Err(Self::Length { argument, expected, got })
    }
}

/// What the number of key/value heads must be. 0 is wrong whatever it would have to divide.
fn kv_heads_rule(num_heads: usize, num_kv_heads: usize) -> String {
    match num_kv_heads {
        0 => "be at least 1".to_owned(),
        _ => format!("divide num_heads = {num_heads}"),
    }
}
