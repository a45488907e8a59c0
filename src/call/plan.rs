//! Which path and kernel a call takes, and why. Pure: it looks at the checked call, the device's capabilities and the settings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::call::cost::{Choice, Machine, Tiling};
use crate::call::path::Path;
use crate::call::problem::{AttentionProblem, MaskInfo, TokenInfo};
use crate::call::segments::Cuts;
use crate::config::Config;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{BackendKind, Kernel, SegmentAccess};
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_ranges::KeyRanges;
use crate::score_modifiers::{ModifierSet, ScoreModifiers};

/// What a call asks of a kernel.
#[derive(Debug, Clone, Copy)]
struct Needs {
    dtype: DType,
    head_dim: usize,
    bias: bool,
    ranges: bool,
    modifiers: ModifierSet,
    /// Metadata in tables of the device.
    device_tables: bool,
    /// The dense path.
    dense: bool,
}

impl Needs {
    fn new(problem: &AttentionProblem, mask: &MaskInfo<'_>, dense: bool) -> Self {
        Self {
            dtype: problem.dtype,
            head_dim: problem.shape.head_dim,
            bias: mask.bias.is_some(),
            ranges: mask.ranges.is_some(),
            modifiers: mask.modifiers.map(ScoreModifiers::set).unwrap_or_default(),
            device_tables: matches!(mask.tokens, TokenInfo::DeviceVarlen { .. }),
            dense,
        }
    }
}

impl Kernel {
    /// Why it cannot compute a call, if it cannot.
    fn refuses(self, needs: Needs) -> Option<&'static str> {
        let Needs { dtype, head_dim, bias, ranges, modifiers, device_tables, dense } = needs;
        let refusals = [
            (!self.dtypes().contains(&dtype), "it computes with f16 and bf16 alone"),
            (head_dim > self.max_head_dim(), "its tiles are not as wide as the head dimension"),
            (bias && !self.has_bias(), "it adds no bias"),
            (
                bias && device_tables && !self.takes_all_with_device_meta(),
                "a bias needs metadata that was built on the host",
            ),
            (ranges && !self.has_ranges(), "it takes no key ranges"),
            (modifiers.softcap && !self.has_softcap(), "it does not cap scores"),
            (modifiers.alibi && !self.has_alibi(), "it has no ALiBi"),
            (modifiers.sinks && !self.has_sinks(), "it has no attention sinks"),
            (
                ranges && device_tables && !self.takes_all_with_device_meta(),
                "key ranges need metadata that was built on the host",
            ),
            (
                device_tables && dense && self.works_by_tile_lists(),
                "its dense form needs metadata that was built on the host",
            ),
        ];
        refusals.into_iter().find_map(|(applies, why)| applies.then_some(why))
    }
}

/// Why a path was taken. [`Display`](fmt::Display) says it in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// No mask was given.
    NoMask,
    /// A key mask was given: dropped queries are computed like any other.
    KeyMask,
    /// A key mask was given that keeps every key, so it is not applied.
    KeyMaskKeepsAll,
    /// An additive bias was given.
    Bias,
    /// Key ranges were given, and no mask of tokens.
    KeyRanges,
    /// Metadata was given in which every token is valid.
    AllValid,
    /// Metadata was given with no valid query or no valid key.
    NothingValid,
    /// Metadata was given, and the kernel reads the padded tensors directly.
    Fused,
    /// A mask was given, but packing takes less time than the fused path: runs are short, say.
    Fragmented,
    /// Metadata was given, but so few tokens are masked that computing every row takes less time than reading the valid ones by
    /// lists.
    FewMasked,
    /// `VARLEN_FA=0`, or [`Config::force_dense`].
    DenseForced,
    /// The caller forced the path.
    PathForced,
    /// The tensors were packed already.
    AlreadyPacked,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMask => "no mask was given",
            Self::KeyMask => "a key mask without metadata computes every query row",
            Self::KeyMaskKeepsAll => "the key mask keeps every key",
            Self::Bias => "an additive bias was given",
            Self::KeyRanges => "key ranges were given, and every token counts",
            Self::AllValid => "every token is valid, so there is nothing to skip",
            Self::NothingValid => "no query or no key is valid, so the output is zeros",
            Self::Fused => "metadata was given and the kernel reads padded tensors directly",
            Self::Fragmented => "packing the rows that count takes less time than reading them in place",
            Self::FewMasked => "computing the few masked rows too takes less time than reading the others by lists",
            Self::DenseForced => "dense attention is forced (VARLEN_FA=0)",
            Self::PathForced => "the caller forced this path",
            Self::AlreadyPacked => "the rows are packed already",
        })
    }
}

/// What was decided for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// How the call is computed.
    pub path: Path,
    /// What computes it. No kernel runs on [`Path::Zero`].
    pub kernel: Kernel,
    /// Why.
    pub reason: Reason,
    /// Whether the device copies [`Segments`](crate::Segments) to one tensor first, or the output from one afterwards, since the
    /// kernel does not take them where they lie.
    pub copies_segments: bool,
    /// Keys of the kernel's tiles, where it has several for the head dimension and the cost model chose.
    pub(crate) tile_keys: Option<u16>,
    /// How long that takes by the cost model, where the device has one and the host knows the mask.
    pub estimate: Option<Estimate>,
}

/// Without the estimate, so that calls of one kind have one text: [`Plan::with_estimate`] has both.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path {
            Path::Zero => write!(f, "{}: {}", self.path, self.reason)?,
            path => {
                write!(f, "{path} by {}", self.kernel)?;
                if let Some(keys) = self.tile_keys {
                    write!(f, " in tiles of {keys} keys")?;
                }
                write!(f, ": {}", self.reason)?;
            }
        }
        if self.copies_segments {
            f.write_str("; segments are copied, since the kernel takes whole tensors")?;
        }
        Ok(())
    }
}

impl Plan {
    /// The plan's text, followed by the estimate if there is one.
    #[must_use]
    pub fn with_estimate(&self) -> impl fmt::Display + use<> {
        WithEstimate(*self)
    }
}

struct WithEstimate(Plan);

impl fmt::Display for WithEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)?;
        self.0.estimate.map_or(Ok(()), |estimate| write!(f, " ({estimate})"))
    }
}

/// The GPU time of a plan, and of the best other choice, by the cost model. It chooses by these times; they are no promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Estimate {
    /// Of the plan.
    pub time: Duration,
    /// The first of the choices that were not taken, if there is another one.
    pub other: Option<(Path, Kernel, Duration)>,
}

impl Estimate {
    /// Of the choice that is taken.
    fn of(best: Choice, choices: &[Choice], capabilities: &Capabilities) -> Self {
        let duration = |choice: Choice| Duration::from_nanos(choice.time as u64);
        // Of what this device runs: the model knows every kernel.
        let is_other = |choice: &Choice| *choice != best && capabilities.kernels.contains(&choice.kernel);
        let other = choices.iter().copied().find(is_other);
        Self { time: duration(best), other: other.map(|choice| (choice.path, choice.kernel, duration(choice))) }
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let microseconds = |time: Duration| time.as_secs_f64() * 1e6;
        write!(f, "about {:.1} µs", microseconds(self.time))?;
        match self.other {
            None => Ok(()),
            Some((path, kernel, time)) => write!(f, ", {path} by {kernel} {:.1}", microseconds(time)),
        }
    }
}

/// What a device can do.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The kind of device.
    pub backend: BackendKind,
    /// The hardware's name, and its driver's where there is one.
    pub adapter: String,
    /// Whether the device is emulated on the CPU.
    pub is_software: bool,
    /// Element types that it computes with.
    pub dtypes: &'static [DType],
    /// Kernels that run on it, the preferred one first; or the only one that [`Config::kernel`] allows. Of a GPU's, those that gave
    /// on it what its oldest one gives.
    pub kernels: Vec<Kernel>,
    /// Bytes of the largest tensor.
    pub max_buffer_bytes: u64,
    /// Bytes that one kernel launch can reach of one tensor; work on larger tensors is split by batch row.
    pub max_binding_bytes: u64,
    /// Whether GPU time is measured by timestamp queries.
    pub has_timestamps: bool,
    /// What the cost model knows of the device, if it has one.
    pub(crate) machine: Option<Machine>,
}

impl Capabilities {
    /// The multiprocessors of a CUDA device; `None` for other devices.
    #[must_use]
    pub fn multiprocessors(&self) -> Option<usize> {
        self.machine.as_ref().filter(|machine| !machine.is_assumed()).map(Machine::multiprocessors)
    }

    /// The multiprocessors that the cost model reckons with, where the device has one: those of a CUDA device, or as many as a GPU
    /// through wgpu, which does not tell, is taken to have. For benches.
    #[must_use]
    pub fn modelled_multiprocessors(&self) -> Option<usize> {
        self.machine.as_ref().map(Machine::multiprocessors)
    }

    /// How a kernel cuts calls of a head dimension into tiles, where the device has a cost model. For benches.
    #[must_use]
    pub fn tiling(&self, kernel: Kernel, head_dim: usize) -> Option<Tiling> {
        self.tilings(kernel, head_dim).next()
    }

    /// The same, and after it shorter tiles among which the cost model chooses, if the kernel has such.
    pub fn tilings(&self, kernel: Kernel, head_dim: usize) -> impl Iterator<Item = Tiling> {
        self.machine.iter().flat_map(move |machine| machine.tilings(kernel, head_dim)).map(|&(tiling, _)| tiling)
    }
}

/// What a caller forces, for tests and comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Forced {
    pub path: Option<Path>,
    pub kernel: Option<Kernel>,
    /// Keys of the kernel's tiles, where it has several.
    pub tile_keys: Option<usize>,
}

/// Plans a call on padded tensors.
pub(crate) fn plan_padded(
    problem: &AttentionProblem,
    mask: &MaskInfo<'_>,
    capabilities: &Capabilities,
    config: &Config,
    forced: Forced,
) -> Result<Plan> {
    let is_dense = match forced.path {
        Some(path) => path == Path::Dense,
        None => config.force_dense,
    };
    let needs = Needs::new(problem, mask, is_dense);
    let preferred = pick_kernel(capabilities, forced, needs)?;
    let fuses = mask.bias.is_none() || preferred.refuses_fused_bias(problem.lse).is_none();
    // Without a copy, where the dense path needs one.
    let fuses_segments =
        fuses && problem.cuts == Cuts::Few && preferred.traits().segments == SegmentAccess::InPlaceFused;
    // A sink is the log-sum-exp of a query without keys, which a kernel writes.
    let has_sink_alone = problem.lse && needs.modifiers.sinks;
    let chosen = match mask.tokens {
        TokenInfo::Varlen { query, .. } if query.is_empty() => (Path::Zero, Reason::NothingValid),
        _ if problem.shape.seq_k == 0 && !has_sink_alone => (Path::Zero, Reason::NothingValid),
        TokenInfo::Varlen { key, .. } if key.is_empty() && !has_sink_alone => (Path::Zero, Reason::NothingValid),
        TokenInfo::Key(mask) if mask.is_empty() && !has_sink_alone => (Path::Zero, Reason::NothingValid),
        TokenInfo::All | TokenInfo::Key(_) if mask.bias.is_some() => (Path::Dense, Reason::Bias),
        TokenInfo::All if mask.ranges.is_some() => (Path::Dense, Reason::KeyRanges),
        TokenInfo::All => (Path::Dense, Reason::NoMask),
        TokenInfo::Key(mask) if mask.is_all_kept() => (Path::Dense, Reason::KeyMaskKeepsAll),
        TokenInfo::Key(_) if config.force_dense || preferred.traits().skips_dropped_keys => {
            (Path::Dense, Reason::KeyMask)
        }
        TokenInfo::Key(_) => (Path::Fused, Reason::KeyMask),
        TokenInfo::Varlen { .. } | TokenInfo::DeviceVarlen { .. } if config.force_dense => {
            (Path::Dense, Reason::DenseForced)
        }
        TokenInfo::DeviceVarlen { .. } if !fuses => (Path::Dense, Reason::Bias),
        TokenInfo::DeviceVarlen { .. } => (Path::Fused, Reason::Fused),
        TokenInfo::Varlen { query, key } if query.is_all_valid() && key.is_all_valid() && !fuses_segments => {
            (Path::Dense, Reason::AllValid)
        }
        TokenInfo::Varlen { .. } if !fuses => (Path::Dense, Reason::Bias),
        TokenInfo::Varlen { .. } => (Path::Fused, Reason::Fused),
    };
    let (path, reason) = match forced.path {
        None => chosen,
        Some(path) => (path, check_forced_path(path, mask, preferred, problem.lse)?),
    };
    let plan_of = |path, kernel: Kernel, reason, tile_keys, estimate| {
        let is_in_place = match kernel.traits().segments {
            SegmentAccess::InPlace => true,
            SegmentAccess::InPlaceFused => path == Path::Fused && problem.cuts == Cuts::Few,
            SegmentAccess::Copied => false,
        };
        let copies_segments = path != Path::Zero && problem.cuts != Cuts::None && !is_in_place;
        // Calls with ranges and segments have their own.
        let is_plain = !needs.ranges && problem.cuts == Cuts::None;
        let tile_keys = own_tile_keys(tile_keys, (kernel, needs.head_dim), capabilities, forced).filter(|_| is_plain);
        Plan { path, kernel, reason, copies_segments, tile_keys, estimate }
    };
    let plan = plan_of(path, preferred, reason, None, None);
    let Some(choices) = choices(problem, mask, capabilities, path)? else { return Ok(plan) };
    let may_take = |choice: &Choice| {
        // The model knows how many tiles ranges leave, but not the speed of each kernel's form with ranges.
        // Nor does it know copies of segments.
        // Nor, of a GPU that it does not know, how much faster one kernel is than another.
        let is_known = capabilities.machine.as_ref().is_some_and(|machine| !machine.is_assumed());
        let is_free = is_known && forced == Forced::default() && mask.ranges.is_none() && problem.cuts == Cuts::None;
        let is_kernel =
            choice.kernel == preferred || is_free && is_suited(choice.kernel, preferred, capabilities, needs);
        is_kernel && forced.path.is_none_or(|path| choice.path == path)
    };
    let Some(best) = choices.iter().copied().find(may_take) else { return Ok(plan) };
    let reason = match (forced.path, best.path) {
        (None, Path::Fused) if !matches!(mask.tokens, TokenInfo::Key(_)) => Reason::Fused,
        (None, Path::Packed) => Reason::Fragmented,
        (None, Path::Dense) if path != Path::Dense && !matches!(mask.tokens, TokenInfo::Key(_)) => Reason::FewMasked,
        _ => reason,
    };
    let estimate = Some(Estimate::of(best, &choices, capabilities));
    Ok(plan_of(best.path, best.kernel, reason, best.tile_keys, estimate))
}

/// The choices of a call on a path that the cost model knows: fused and packed by every kernel under a key mask or metadata of the
/// host, on a GPU that it does not know dense too; dense by every kernel where no key is dropped and there are no ranges.
fn choices(
    problem: &AttentionProblem,
    mask: &MaskInfo<'_>,
    capabilities: &Capabilities,
    path: Path,
) -> Result<Option<Arc<[Choice]>>> {
    let Some(machine) = &capabilities.machine else { return Ok(None) };
    // The model knows neither what a bias costs nor what else is done to scores.
    if mask.bias.is_some() || mask.modifiers.is_some() {
        return Ok(None);
    }
    // Nor, of a GPU that it does not know, what ranges and segments do to each path.
    if machine.is_assumed() && (mask.ranges.is_some() || problem.cuts != Cuts::None) {
        return Ok(None);
    }
    let keeps_all = match mask.tokens {
        TokenInfo::All => true,
        TokenInfo::Key(mask) => mask.is_all_kept(),
        TokenInfo::Varlen { query, key } => query.is_all_valid() && key.is_all_valid(),
        TokenInfo::DeviceVarlen { .. } => false,
    };
    Ok(match (path, mask.tokens) {
        (Path::Dense, _) if keeps_all && mask.ranges.is_none() => Some(machine.dense_choices(problem).into()),
        (Path::Fused | Path::Packed, TokenInfo::Varlen { query, key }) => {
            Some(machine.choices(problem, query, key, mask.ranges)?)
        }
        (Path::Fused | Path::Packed, TokenInfo::Key(keys)) => {
            let every = keys.every_query(problem.shape.seq_q)?;
            Some(machine.choices(problem, &every.query, &every.key, mask.ranges)?)
        }
        _ => None,
    })
}

/// Whether a kernel may take the place of the preferred one.
fn is_suited(kernel: Kernel, preferred: Kernel, capabilities: &Capabilities, needs: Needs) -> bool {
    capabilities.kernels.contains(&kernel)
        && kernel.refuses(needs).is_none()
        && (kernel.is_efficient_at(needs.head_dim) || !preferred.is_efficient_at(needs.head_dim))
}

/// Keys of a kernel's tiles: the model's choice, or what is forced where the kernel has tiles of so many.
fn own_tile_keys(
    chosen: Option<usize>,
    (kernel, head_dim): (Kernel, usize),
    capabilities: &Capabilities,
    forced: Forced,
) -> Option<u16> {
    let is_there = |&keys: &usize| capabilities.tilings(kernel, head_dim).any(|tiling| tiling.keys == keys);
    let keys = match forced.tile_keys {
        Some(keys) => Some(keys).filter(is_there),
        None => chosen,
    };
    // Fits: a tile has some hundred keys at most.
    keys.and_then(|keys| u16::try_from(keys).ok())
}

/// Plans a call on packed rows, whose sequences are those of the query and of the key.
pub(crate) fn plan_packed(
    problem: &AttentionProblem,
    (query, key): (&CuSeqlens, &CuSeqlens),
    (ranges, modifiers): (Option<&KeyRanges>, Option<&ScoreModifiers>),
    capabilities: &Capabilities,
    forced: Forced,
) -> Result<Plan> {
    let mask = MaskInfo { tokens: TokenInfo::All, ranges, modifiers, bias: None };
    let needs = Needs::new(problem, &mask, false);
    let preferred = pick_kernel(capabilities, forced, needs)?;
    let plan = Plan {
        path: Path::Packed,
        kernel: preferred,
        reason: Reason::AlreadyPacked,
        copies_segments: false,
        tile_keys: None,
        estimate: None,
    };
    // As of padded calls; and without a row there is nothing to choose.
    let is_known = ranges.is_none() && modifiers.is_none() && query.total() > 0;
    let Some(machine) = capabilities.machine.as_ref().filter(|machine| is_known && !machine.is_assumed()) else {
        return Ok(plan);
    };
    let choices = machine.rows_choices(problem, query, key)?;
    let is_free = forced.kernel.is_none();
    let may_take = |choice: &Choice| {
        choice.kernel == preferred || is_free && is_suited(choice.kernel, preferred, capabilities, needs)
    };
    let Some(best) = choices.iter().copied().find(may_take) else { return Ok(plan) };
    let tile_keys = own_tile_keys(best.tile_keys, (best.kernel, needs.head_dim), capabilities, forced);
    let estimate = Some(Estimate::of(best, &choices, capabilities));
    Ok(Plan { kernel: best.kernel, tile_keys, estimate, ..plan })
}

fn pick_kernel(capabilities: &Capabilities, forced: Forced, needs: Needs) -> Result<Kernel> {
    if let Some(kernel) = forced.kernel {
        let why = match kernel.refuses(needs) {
            _ if !capabilities.kernels.contains(&kernel) => format!("{capabilities} does not run it"),
            Some(why) => why.to_owned(),
            None => return Ok(kernel),
        };
        return Err(not_applicable("kernel", kernel.name(), why));
    }
    let able = || capabilities.kernels.iter().copied().filter(|kernel| kernel.refuses(needs).is_none());
    let suited = able().find(|kernel| kernel.is_efficient_at(needs.head_dim));
    suited.or_else(|| able().next()).ok_or_else(|| {
        let refusals: Vec<_> = capabilities
            .kernels
            .iter()
            .filter_map(|kernel| Some(format!("{kernel}: {}", kernel.refuses(needs)?)))
            .collect();
        not_applicable("kernel", "any", format!("{capabilities} has no kernel for this call ({})", refusals.join("; ")))
    })
}

fn check_forced_path(path: Path, mask: &MaskInfo<'_>, kernel: Kernel, lse: bool) -> Result<Reason> {
    let is_on_device = matches!(mask.tokens, TokenInfo::DeviceVarlen { .. });
    let is_masked = is_on_device || matches!(mask.tokens, TokenInfo::Varlen { .. } | TokenInfo::Key(_));
    let why = match path {
        Path::Dense => return Ok(Reason::PathForced),
        Path::Zero => "it follows from the metadata alone".to_owned(),
        Path::Fused | Path::Packed if !is_masked => "it needs AttentionMask::key or varlen".to_owned(),
        Path::Packed if mask.bias.is_some() => "packed rows take no bias".to_owned(),
        Path::Packed if mask.modifiers.is_some_and(|modifiers| modifiers.set().alibi) => {
            "packed rows have lost the positions that ALiBi counts in".to_owned()
        }
        Path::Fused if mask.bias.is_some() => match kernel.refuses_fused_bias(lse) {
            Some(why) => format!("kernel {kernel} {why}"),
            None => return Ok(Reason::PathForced),
        },
        Path::Fused | Path::Packed => return Ok(Reason::PathForced),
    };
    Err(not_applicable("path", path.name(), why))
}

fn not_applicable(argument: &'static str, got: &str, why: String) -> Error {
    Error::NotApplicable { argument, got: got.to_owned(), why }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.backend, self.adapter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::DeviceId;
    use crate::call::problem::{AttentionShape, DeviceMetaInfo, ViewInfo};
    use crate::layout::Layout;
    use crate::mask::key_mask::KeyMask;
    use crate::mask::meta::VarlenMeta;

    const BATCH: usize = 2;
    const SEQ: usize = 4096;

    /// A CUDA device with these kernels.
    fn device(kernels: &[Kernel]) -> Capabilities {
        Capabilities {
            backend: BackendKind::Cuda,
            adapter: "none".to_owned(),
            is_software: false,
            dtypes: &[DType::F16, DType::Bf16],
            kernels: kernels.to_vec(),
            max_buffer_bytes: u64::MAX,
            max_binding_bytes: u64::MAX,
            has_timestamps: true,
            machine: None,
        }
    }

    fn plan(kernels: &[Kernel], mask: &MaskInfo<'_>, forced: Forced) -> Result<Plan> {
        plan_on(&device(kernels), mask, forced)
    }

    fn plan_on(device: &Capabilities, mask: &MaskInfo<'_>, forced: Forced) -> Result<Plan> {
        plan_padded(&problem(), mask, device, &Config::default(), forced)
    }

    fn problem() -> AttentionProblem {
        let shape =
            AttentionShape { batch: BATCH, seq_q: SEQ, seq_k: SEQ, num_heads: 24, num_kv_heads: 24, head_dim: 128 };
        AttentionProblem { shape, dtype: DType::Bf16, softmax_scale: 1.0, bias: None, cuts: Cuts::None, lse: false }
    }

    fn masked(tokens: TokenInfo<'_>) -> MaskInfo<'_> {
        MaskInfo { tokens, ranges: None, modifiers: None, bias: None }
    }

    /// Every kernel's tiles at head dimension 128, on a chip of 132 multiprocessors.
    fn hopper() -> Option<Machine> {
        hopper_with([
            (Kernel::CudaSm80, 64, 2, false),
            (Kernel::CudaSm90, 160, 1, true),
            (Kernel::CudaSm100, 128, 1, false),
        ])
    }

    /// With tiles of these kernels, keys and blocks, which are split or not.
    fn hopper_with(tilings: [(Kernel, usize, usize, bool); 3]) -> Option<Machine> {
        let tiling = |(kernel, keys, blocks, splits)| Tiling {
            kernel,
            width: 128,
            rows: 128,
            keys,
            blocks,
            splits,
            max_heads: usize::MAX,
        };
        Machine::new((9, 0), 132, tilings.map(tiling))
    }

    /// Half of the tokens are valid: the last half of each batch row, or every other token.
    fn meta(is_fragmented: bool) -> Result<VarlenMeta> {
        let is_valid = |at: usize| if is_fragmented { at.is_multiple_of(2) } else { at % SEQ >= SEQ / 2 };
        let keep: Vec<bool> = (0..BATCH * SEQ).map(is_valid).collect();
        VarlenMeta::from_key_mask(&KeyMask::from_bool(BATCH, SEQ, &keep)?)
    }

    #[test]
    fn a_plan_says_where_segments_are_copied() -> Result<()> {
        let problem = AttentionProblem { cuts: Cuts::Few, ..problem() };
        let mask = MaskInfo { tokens: TokenInfo::All, ranges: None, modifiers: None, bias: None };
        let planned =
            |kernels: &[Kernel], forced| plan_padded(&problem, &mask, &device(kernels), &Config::default(), forced);
        // Copies are no reason to take another kernel.
        let kernels = [Kernel::WgslCoop, Kernel::WgslPortable];
        for forced in [Forced::default(), Forced { kernel: Some(Kernel::WgslPortable), ..Forced::default() }] {
            let plan = planned(&kernels, forced)?;
            assert_eq!((plan.kernel, plan.copies_segments), (forced.kernel.unwrap_or(kernels[0]), true));
            assert!(
                plan.to_string().ends_with("; segments are copied, since the kernel takes whole tensors"),
                "{plan}"
            );
        }
        let plan = planned(&[Kernel::CpuTiled], Forced::default())?;
        assert!(!plan.copies_segments && !plan.to_string().contains("segments"), "{plan}");
        // sm90 has maps of them, as many as its lists may be cut for.
        let meta = meta(false)?;
        for (path, cuts, copies) in
            [(Path::Fused, Cuts::Few, false), (Path::Fused, Cuts::Many, true), (Path::Dense, Cuts::Few, true)]
        {
            let problem = AttentionProblem { cuts, ..problem.clone() };
            let mask = masked(TokenInfo::Varlen { query: &meta, key: &meta });
            let forced = Forced { path: Some(path), ..Forced::default() };
            let plan = plan_padded(&problem, &mask, &device(&[Kernel::CudaSm90]), &Config::default(), forced)?;
            assert_eq!((plan.path, plan.copies_segments), (path, copies), "{plan}");
        }
        Ok(())
    }

    #[test]
    fn without_a_cost_model_kernels_work_in_place_whatever_the_runs_are() -> Result<()> {
        for is_fragmented in [false, true] {
            let meta = meta(is_fragmented)?;
            let mask = masked(TokenInfo::Varlen { query: &meta, key: &meta });
            for &kernel in Kernel::ALL {
                let plan = plan(&[kernel], &mask, Forced::default())?;
                assert_eq!((plan.path, plan.reason, plan.estimate), (Path::Fused, Reason::Fused, None));
            }
        }
        Ok(())
    }

    #[test]
    fn the_cost_model_packs_short_runs_and_nothing_else() -> Result<()> {
        let kernels = [Kernel::CudaSm90, Kernel::CudaSm80];
        let device = Capabilities { machine: hopper(), ..device(&kernels) };
        let free = Forced::default();
        for (is_fragmented, path, reason) in
            [(false, Path::Fused, Reason::Fused), (true, Path::Packed, Reason::Fragmented)]
        {
            let meta = meta(is_fragmented)?;
            let mask = masked(TokenInfo::Varlen { query: &meta, key: &meta });
            let plan = plan_on(&device, &mask, free)?;
            assert_eq!((plan.path, plan.kernel, plan.reason), (path, Kernel::CudaSm90, reason));
            let estimate = plan.estimate.map(|estimate| (estimate.time, estimate.other.map(|(.., time)| time)));
            assert!(matches!(estimate, Some((time, Some(other))) if time <= other), "{plan}");
            assert!(
                plan.with_estimate().to_string().contains("(about ") && !plan.to_string().contains("about"),
                "{plan}"
            );

            // A forced choice has its own estimate, and the best of the others beside it.
            let forced = |path, kernel| Forced { path: Some(path), kernel: Some(kernel), ..Forced::default() };
            let slow = plan_on(&device, &mask, forced(Path::Packed, Kernel::CudaSm80))?;
            assert_eq!((slow.path, slow.kernel, slow.reason), (Path::Packed, Kernel::CudaSm80, Reason::PathForced));
            let other = slow.estimate.and_then(|estimate| estimate.other);
            assert_eq!(other.map(|(path, kernel, _)| (path, kernel)), Some((path, Kernel::CudaSm90)));

            assert!(
                plan.estimate
                    .and_then(|estimate| estimate.other)
                    .is_some_and(|(_, kernel, _)| kernels.contains(&kernel))
            );

            // A forced kernel takes its own best path.
            let rows = plan_on(&device, &mask, Forced { kernel: Some(Kernel::CudaSm80), ..free })?;
            assert_eq!((rows.path, rows.kernel), (Path::Fused, Kernel::CudaSm80));
            // A kernel that failed its self-check is not taken.
            let only = Capabilities { kernels: vec![Kernel::CudaSm80], ..device.clone() };
            assert_eq!(plan_on(&only, &mask, free)?.kernel, Kernel::CudaSm80);
        }
        Ok(())
    }

    #[test]
    fn packed_rows_take_the_tiles_and_the_kernel_of_their_lengths() -> Result<()> {
        let machine = hopper_with([
            (Kernel::CudaSm80, 64, 2, false),
            (Kernel::CudaSm90, 160, 1, true),
            (Kernel::CudaSm90, 64, 1, true),
        ]);
        let kernels = [Kernel::CudaSm90, Kernel::CudaSm80];
        let with_model = Capabilities { machine, ..device(&kernels) };
        let plan_of = |capabilities: &Capabilities, lengths: &[usize], forced| {
            let cu_seqlens = CuSeqlens::from_lengths(lengths)?;
            let (batch, total) = (cu_seqlens.batch(), cu_seqlens.total());
            let shape = AttentionShape { batch, seq_q: total, seq_k: total, ..problem().shape };
            let problem = AttentionProblem { shape, ..problem() };
            plan_packed(&problem, (&cu_seqlens, &cu_seqlens), (None, None), capabilities, forced)
        };
        let chosen = |plan: &Plan| (plan.kernel, plan.tile_keys);
        let free = Forced::default();
        let (long, short) = ([4000, 4000], [60; 40]);
        let plan = plan_of(&with_model, &long, free)?;
        assert_eq!(
            (chosen(&plan), plan.path, plan.reason),
            ((Kernel::CudaSm90, Some(160)), Path::Packed, Reason::AlreadyPacked)
        );
        assert!(plan.estimate.is_some_and(|estimate| estimate.other.is_some()), "{plan}");
        let shorter = plan_of(&with_model, &short, Forced { kernel: Some(Kernel::CudaSm90), ..free })?;
        assert_eq!(chosen(&shorter), (Kernel::CudaSm90, Some(64)));
        // A few rows are launched sooner by sm80.
        assert_eq!(chosen(&plan_of(&with_model, &[3, 9], free)?), (Kernel::CudaSm80, None));
        // What is forced; the longest tiles are taken where there are none of so many keys.
        for (keys, expected) in [(160, Some(160)), (48, None)] {
            let forced = Forced { kernel: Some(Kernel::CudaSm90), tile_keys: Some(keys), ..free };
            assert_eq!(chosen(&plan_of(&with_model, &short, forced)?), (Kernel::CudaSm90, expected));
        }
        // Nothing to choose by, and nothing to choose for.
        let plain = plan_of(&device(&kernels), &long, free)?;
        assert_eq!((chosen(&plain), plain.estimate), ((Kernel::CudaSm90, None), None));
        assert_eq!(plan_of(&with_model, &[0, 0], free)?.estimate, None);
        Ok(())
    }

    #[test]
    fn of_a_gpu_that_is_not_known_the_model_chooses_the_path_alone() -> Result<()> {
        let device =
            Capabilities { machine: Some(Machine::portable()), ..device(&[Kernel::WgslCoop, Kernel::WgslPortable]) };
        assert_eq!((device.multiprocessors(), device.modelled_multiprocessors().is_some()), (None, true));
        let (meta, ranges) = (meta(true)?, KeyRanges::causal([BATCH, SEQ, SEQ])?);
        let mask = masked(TokenInfo::Varlen { query: &meta, key: &meta });
        for kernel in [None, Some(Kernel::WgslPortable)] {
            let forced = Forced { kernel, ..Forced::default() };
            let kernel = kernel.unwrap_or(Kernel::WgslCoop);
            let plan = plan_on(&device, &mask, forced)?;
            assert_eq!(plan.kernel, kernel);
            // Of the other kernel it knows nothing.
            assert_eq!(plan.estimate.is_some(), kernel == Kernel::WgslPortable, "{plan}");
            assert!(plan.estimate.is_some() || plan.path == Path::Fused, "{plan}");
            // Ranges and segments it does not know.
            let plan = plan_on(&device, &MaskInfo { ranges: Some(&ranges), ..mask.clone() }, forced)?;
            assert_eq!((plan.path, plan.kernel, plan.estimate), (Path::Fused, kernel, None));
            let cut = AttentionProblem { cuts: Cuts::Few, ..problem() };
            let plan = plan_padded(&cut, &mask, &device, &Config::default(), forced)?;
            assert_eq!((plan.path, plan.kernel, plan.estimate), (Path::Fused, kernel, None));
        }
        let all = plan_on(&device, &masked(TokenInfo::All), Forced::default())?;
        assert_eq!((all.path, all.kernel), (Path::Dense, Kernel::WgslCoop));
        Ok(())
    }

    #[test]
    fn dense_calls_have_an_estimate_where_no_key_is_dropped() -> Result<()> {
        let device = Capabilities { machine: hopper(), ..device(&[Kernel::CudaSm90, Kernel::CudaSm80]) };
        let all = KeyMask::all(BATCH, SEQ)?;
        for mask in [TokenInfo::All, TokenInfo::Key(&all)].map(masked) {
            let plan = plan_on(&device, &mask, Forced::default())?;
            assert_eq!((plan.path, plan.kernel), (Path::Dense, Kernel::CudaSm90), "{mask:?}");
            assert!(plan.estimate.is_some(), "{mask:?}");
        }
        Ok(())
    }

    #[test]
    fn key_masks_take_the_paths_of_metadata() -> Result<()> {
        let (half, short) = (KeyMask::from_lengths(SEQ, &[SEQ / 2; BATCH])?, meta(true)?);
        let short = short.key_mask();
        let plain = device(&[Kernel::WgslPortable]);
        let modelled = Capabilities { machine: hopper(), ..device(&[Kernel::CudaSm90, Kernel::CudaSm80]) };
        let free = Forced::default();
        let outcome = |device: &Capabilities, mask, forced| {
            plan_on(device, &masked(TokenInfo::Key(mask)), forced).map(|plan| (plan.path, plan.reason))
        };
        assert_eq!(outcome(&plain, &half, free)?, (Path::Fused, Reason::KeyMask));
        assert_eq!(outcome(&modelled, &half, free)?, (Path::Fused, Reason::KeyMask));
        assert!(plan_on(&modelled, &masked(TokenInfo::Key(&half)), free)?.estimate.is_some());
        // Runs of one key: packed, or a kernel that gathers rows; never all of the keys.
        let packed = outcome(&modelled, short, free)?;
        assert!([(Path::Packed, Reason::Fragmented), (Path::Fused, Reason::KeyMask)].contains(&packed), "{packed:?}");
        assert_eq!(outcome(&device(&[Kernel::CpuTiled]), short, free)?, (Path::Dense, Reason::KeyMask));
        for path in [Path::Dense, Path::Fused, Path::Packed] {
            let forced = Forced { path: Some(path), ..Forced::default() };
            assert_eq!(outcome(&plain, &half, forced)?, (path, Reason::PathForced));
        }
        let nothing = KeyMask::from_lengths(SEQ, &[0; BATCH])?;
        assert_eq!(outcome(&plain, &nothing, free)?, (Path::Zero, Reason::NothingValid));
        let dense = Config::default().with_force_dense(true);
        let mask = masked(TokenInfo::Key(&half));
        let plan = plan_padded(&problem(), &mask, &plain, &dense, free)?;
        assert_eq!((plan.path, plan.reason), (Path::Dense, Reason::KeyMask));
        Ok(())
    }

    #[test]
    fn ranges_go_to_the_first_kernel() -> Result<()> {
        let ranges = KeyRanges::causal([BATCH, SEQ, SEQ])?;
        let meta = meta(true)?;
        let mask = MaskInfo { ranges: Some(&ranges), ..masked(TokenInfo::Varlen { query: &meta, key: &meta }) };
        let both = [Kernel::CudaSm100, Kernel::CudaSm80];
        let first = |kernels: &[Kernel]| plan(kernels, &mask, Forced::default()).map(|plan| (plan.kernel, plan.path));
        for (at, kernel) in both.into_iter().enumerate() {
            assert_eq!(first(&both[at..])?, (kernel, Path::Fused));
            let forced = Forced { kernel: Some(kernel), ..Forced::default() };
            assert_eq!(plan(&both, &mask, forced)?.kernel, kernel);
        }
        Ok(())
    }

    #[test]
    fn modifiers_go_to_the_first_kernel_that_has_them() -> Result<()> {
        let meta = meta(true)?;
        let none = ScoreModifiers::new();
        let with = |modifiers| MaskInfo {
            modifiers: Some(modifiers),
            ..masked(TokenInfo::Varlen { query: &meta, key: &meta })
        };
        let free = Forced::default();
        let both = [Kernel::CudaSm90, Kernel::WgslPortable];
        assert_eq!(plan(&both, &with(&none), free)?.kernel, Kernel::CudaSm90);
        let lacking = [
            (none.clone().with_softcap(1.0), "does not cap scores"),
            (none.clone().with_alibi([0.5; 24]), "has no ALiBi"),
            (none.clone().with_sinks([0.5; 24]), "has no attention sinks"),
        ];
        for (modifiers, why_not) in &lacking {
            assert_eq!(plan(&both, &with(modifiers), free)?.kernel, Kernel::WgslPortable);
            let forced = Forced { kernel: Some(Kernel::CudaSm90), ..Forced::default() };
            for refused in [plan(&both, &with(modifiers), forced), plan(&both[..1], &with(modifiers), free)] {
                let refused = refused.err();
                assert!(
                    matches!(&refused, Some(Error::NotApplicable { argument: "kernel", why, .. }) if why.contains(why_not)),
                    "{refused:?}"
                );
            }
        }
        // Short runs, which a cost model would pack: not with modifiers, which it does not know, and never with ALiBi.
        let hopper = Capabilities { machine: hopper(), ..device(Kernel::ALL) };
        let packed = Forced { path: Some(Path::Packed), ..Forced::default() };
        for (modifiers, _) in &lacking {
            assert_eq!(plan_on(&hopper, &with(modifiers), free)?.path, Path::Fused);
            let forced = plan_on(&hopper, &with(modifiers), packed);
            match modifiers.alibi() {
                None => assert_eq!(forced?.path, Path::Packed),
                Some(_) => assert!(matches!(forced.err(), Some(Error::NotApplicable { argument: "path", .. }))),
            }
        }
        Ok(())
    }

    #[test]
    fn metadata_of_the_device_is_used_in_place() -> Result<()> {
        let meta = DeviceMetaInfo { device: DeviceId::unique(), device_name: "cuda", size: [BATCH, SEQ] };
        let mask = masked(TokenInfo::DeviceVarlen { query: meta, key: meta });
        let both = [Kernel::CudaSm90, Kernel::CudaSm80];
        let outcome = |kernels: &[Kernel], forced| plan(kernels, &mask, forced).map(|plan| (plan.path, plan.reason));
        assert_eq!(outcome(&both[1..], Forced::default())?, (Path::Fused, Reason::Fused));
        assert_eq!(outcome(&both, Forced::default())?, (Path::Fused, Reason::Fused));
        let forced = |path, kernel| Forced { path: Some(path), kernel: Some(kernel), ..Forced::default() };
        for kernel in both {
            assert_eq!(outcome(&both, forced(Path::Fused, kernel))?, (Path::Fused, Reason::PathForced));
        }
        let is_refusal = |refused: Option<Error>| matches!(&refused, Some(Error::NotApplicable { argument: "kernel", why, .. }) if why.contains("on the host"));
        assert!(is_refusal(outcome(&both, forced(Path::Dense, Kernel::CudaSm90)).err()));
        // What else is asked of it, by the kernel that takes it.
        let ranges = KeyRanges::causal([BATCH, SEQ, SEQ])?;
        let bias = ViewInfo {
            layout: Layout::contiguous(&[SEQ])?,
            dtype: DType::F32,
            device: meta.device,
            device_name: meta.device_name,
            memory_bytes: u64::MAX,
            space: 0,
            touched: 0..0,
        };
        let with_ranges = MaskInfo { ranges: Some(&ranges), ..mask.clone() };
        let with_bias = MaskInfo { bias: Some(bias), ..mask.clone() };
        for (mask, kernel) in [(&with_ranges, Kernel::CudaSm90), (&with_bias, Kernel::CudaSm80)] {
            let got = plan(&both, mask, Forced::default())?;
            assert_eq!((got.kernel, got.path, got.reason), (kernel, Path::Fused, Reason::Fused));
            assert_eq!(plan(&both, mask, forced(Path::Dense, Kernel::CudaSm80))?.path, Path::Dense);
            let got = plan(&[Kernel::WgslPortable], mask, Forced::default())?;
            assert_eq!((got.path, got.reason), (Path::Fused, Reason::Fused));
        }
        assert!(plan(&[Kernel::CudaSm90], &with_bias, Forced::default()).is_err());
        let newer = [Kernel::CudaSm100, Kernel::CudaSm80];
        assert_eq!(plan(&newer, &with_ranges, Forced::default())?.kernel, Kernel::CudaSm100);
        assert_eq!(plan(&both, &with_ranges, forced(Path::Packed, Kernel::CudaSm90))?.path, Path::Packed);
        assert!(is_refusal(plan(&both, &with_ranges, forced(Path::Dense, Kernel::CudaSm90)).err()));
        Ok(())
    }

    #[test]
    fn wide_heads_go_to_a_kernel_whose_tiles_hold_them() -> Result<()> {
        let mut problem = problem();
        let hopper = Capabilities { machine: hopper(), ..device(&[Kernel::CudaSm90, Kernel::CudaSm80]) };
        let meta = meta(true)?;
        for head_dim in [257, 320, 512] {
            problem.shape.head_dim = head_dim;
            for (mask, path) in [
                (masked(TokenInfo::All), Path::Dense),
                (masked(TokenInfo::Varlen { query: &meta, key: &meta }), Path::Fused),
            ] {
                let got = plan_padded(&problem, &mask, &hopper, &Config::default(), Forced::default())?;
                assert_eq!((got.kernel, got.path, got.estimate), (Kernel::CudaSm80, path, None), "{head_dim}");
            }
            let forced = Forced { kernel: Some(Kernel::CudaSm90), ..Forced::default() };
            let refused = plan_padded(&problem, &masked(TokenInfo::All), &hopper, &Config::default(), forced).err();
            assert!(
                matches!(&refused, Some(Error::NotApplicable { why, .. }) if why.contains("as wide as the head dimension")),
                "{refused:?}"
            );
        }
        Ok(())
    }
}
