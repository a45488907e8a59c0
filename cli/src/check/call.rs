//! A call, drawn from a seed.

use std::fmt;

use anyhow::{Result, ensure};
use varlen_fa::{Capabilities, DType, Device, Kernel, Path, alibi_slopes};
use varlen_fa_testkit::random::{Draws, bernoulli_mask};
use varlen_fa_testkit::{OracleShape, Precision};

/// What calls may use.
#[derive(Debug, Clone)]
pub struct Choices {
    kernels: Vec<Kernel>,
    dtypes: Vec<DType>,
}

impl Choices {
    /// All that a device has, or the kernel and the element type that are asked for.
    ///
    /// # Errors
    /// The device, or the kernel, has not what is asked for.
    pub fn of(device: &Device, kernel: Option<Kernel>, dtype: Option<DType>) -> Result<Self> {
        let Capabilities { kernels, dtypes, adapter, .. } = device.capabilities();
        let has = |given: &Kernel| kernel.is_none_or(|kernel| kernel == *given);
        let kernels: Vec<_> = kernels.iter().copied().filter(has).collect();
        ensure!(
            !kernels.is_empty(),
            "kernel: expected one of {adapter}, got `{}`",
            kernel.map_or("none", Kernel::name)
        );
        let computes = |given: &DType| {
            dtype.is_none_or(|dtype| dtype == *given) && kernels.iter().any(|kernel| kernel.dtypes().contains(given))
        };
        let dtypes: Vec<_> = dtypes.iter().copied().filter(computes).collect();
        ensure!(!dtypes.is_empty(), "dtype: expected one of {adapter}, got `{}`", dtype.map_or("none", DType::name));
        Ok(Self { kernels, dtypes })
    }
}

/// Which tokens count.
#[derive(Debug, Clone)]
pub enum Tokens {
    /// All.
    All,
    /// `[B, Sk]`: dropped queries are computed like others.
    Key(Vec<bool>),
    /// `[B, S]`, self-attention.
    Varlen(Vec<bool>),
    /// `[B, Sq]` and `[B, Sk]`.
    Cross(Vec<bool>, Vec<bool>),
}

impl Tokens {
    /// Which queries have an output; none if all have.
    pub fn query_keep(&self) -> Option<&[bool]> {
        match self {
            Self::All | Self::Key(_) => None,
            Self::Varlen(keep) | Self::Cross(keep, _) => Some(keep),
        }
    }

    /// Which keys count; none if all do.
    pub fn key_keep(&self) -> Option<&[bool]> {
        match self {
            Self::All => None,
            Self::Key(keep) | Self::Varlen(keep) | Self::Cross(_, keep) => Some(keep),
        }
    }
}

/// Which keys each query sees, in words of this program: `sees` is its own reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Those up to its own place, counted from the end.
    Causal,
    /// As many before and after its own place, counted from the end.
    Window(usize, usize),
    /// The first so many, and the others as in `Causal`.
    Prefix(usize),
}

impl Rule {
    /// Whether query i sees key j.
    pub fn sees(self, [i, j]: [usize; 2], [queries, keys]: [usize; 2]) -> bool {
        let after = j as i64 + queries as i64 - i as i64 - keys as i64;
        match self {
            Self::Causal => after <= 0,
            Self::Window(left, right) => (-(left as i64)..=right as i64).contains(&after),
            Self::Prefix(count) => j < count || after <= 0,
        }
    }
}

/// How tensors lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// `[B, S, H, D]`, each in memory of its own.
    Rows,
    /// `[B, H, S, D]`, each in memory of its own.
    Heads,
    /// q, k and v side by side in `[B, S, H + 2·Hkv, D]`; the output as in `Rows`.
    Fused,
}

/// A call, but for the values of its tensors, which follow from the seed too.
#[derive(Debug, Clone)]
pub struct Call {
    /// What it is drawn from.
    pub seed: u64,
    /// Extents.
    pub shape: OracleShape,
    /// Of q, k, v, the output and a bias.
    pub dtype: DType,
    /// The mask.
    pub tokens: Tokens,
    /// The key ranges.
    pub rule: Option<Rule>,
    /// 0 for none.
    pub softcap: f32,
    /// `[H]`
    pub slopes: Option<Vec<f32>>,
    /// `[H]`
    pub sinks: Option<Vec<f32>>,
    /// The shape of a bias, which broadcasts to `[B, H, Sq, Sk]`.
    pub bias: Option<[usize; 4]>,
    /// The softmax scale; the default if there is none.
    pub scale: Option<f32>,
    /// Where tensors lie.
    pub place: Place,
    /// Forced.
    pub kernel: Option<Kernel>,
    /// Forced.
    pub path: Option<Path>,
    /// Whether the log-sum-exp is asked for.
    pub lse: bool,
}

impl Call {
    /// The call of a seed.
    pub fn draw(seed: u64, choices: &Choices) -> Self {
        let draws = &mut Draws::new(seed, 0);
        // Both lists have an entry, as `Choices::of` sees to.
        let dtype = draws.pick(&choices.dtypes).unwrap_or(DType::F32);
        let kernels: Vec<_> =
            choices.kernels.iter().copied().filter(|kernel| kernel.dtypes().contains(&dtype)).collect();
        let kernel = draws.pick(&kernels);
        let can = |what: fn(Kernel) -> bool| kernel.is_some_and(what);

        let place = draws.pick(&[Place::Rows, Place::Rows, Place::Heads, Place::Fused]).unwrap_or(Place::Rows);
        let kind = draws.below(6);
        let is_self = place == Place::Fused || kind >= 4;
        let seq_q = length(draws);
        let seq_k = if is_self { seq_q } else { length(draws) };
        let kv_heads = 1 + draws.below(3);
        let heads = kv_heads * (1 + draws.below(3));
        let most = kernel.map_or(128, Kernel::max_head_dim);
        let head_dim = head_dim(draws).min(most);
        let shape = OracleShape { batch: 1 + draws.below(3), seq_q, seq_k, heads, kv_heads, head_dim };

        let tokens = match kind {
            0 => Tokens::All,
            1 => Tokens::Key(mask(draws, shape.batch, seq_k)),
            2 | 3 if !is_self => Tokens::Cross(mask(draws, shape.batch, seq_q), mask(draws, shape.batch, seq_k)),
            _ => Tokens::Varlen(mask(draws, shape.batch, seq_q)),
        };
        let rule = (can(Kernel::has_ranges) && draws.one_in(3)).then(|| match draws.below(3) {
            0 => Rule::Causal,
            1 => Rule::Window(draws.below(seq_k + 1), draws.below(seq_k + 1)),
            _ => Rule::Prefix(draws.below(seq_k + 1)),
        });
        let bias = (can(Kernel::has_bias) && draws.one_in(6)).then(|| {
            let full = [shape.batch, heads, seq_q, seq_k];
            full.map(|size| if draws.one_in(2) { 1 } else { size })
        });
        let metadata = tokens.query_keep().is_some() && bias.is_none();
        let path =
            (metadata && draws.one_in(2)).then(|| draws.pick(&[Path::Dense, Path::Fused, Path::Packed])).flatten();
        // Packed rows have lost their distances.
        let alibi = can(Kernel::has_alibi) && path != Some(Path::Packed) && draws.one_in(4);
        let sinks = can(Kernel::has_sinks) && draws.one_in(4);
        let slope = draws.uniform(0.1, 4.0) as f32;
        let sink = draws.uniform(-4.0, 6.0) as f32;
        Self {
            seed,
            shape,
            dtype,
            tokens,
            rule,
            softcap: if can(Kernel::has_softcap) && draws.one_in(4) { draws.uniform(0.05, 40.0) as f32 } else { 0.0 },
            slopes: alibi.then(|| alibi_slopes(heads).into_iter().map(|published| published * slope).collect()),
            sinks: sinks.then(|| (0..heads).map(|head| sink - head as f32).collect()),
            bias,
            // The rules of judgement take scores for moderate.
            scale: draws.one_in(4).then(|| (draws.uniform(-2.0, 2.0) / (head_dim as f64).sqrt()) as f32),
            place,
            // A kernel that is asked for computes every call.
            kernel: kernel.filter(|_| choices.kernels.len() == 1 || draws.one_in(2)),
            path,
            // A log-sum-exp of padded rows has no place for a sink.
            lse: draws.one_in(3),
        }
    }

    /// What tensors are rounded to.
    pub fn precision(&self) -> Precision {
        match self.dtype {
            DType::F16 => Precision::F16,
            DType::Bf16 => Precision::Bf16,
            _ => Precision::F32,
        }
    }
}

/// Mostly short: the lengths between tiles matter more than the long ones.
fn length(draws: &mut Draws) -> usize {
    let most = draws.pick(&[16, 80, 80, 200, 400]).unwrap_or(80);
    1 + draws.below(most)
}

/// Those that models have, others, and now and then a large one.
fn head_dim(draws: &mut Draws) -> usize {
    match draws.below(8) {
        0..=2 => draws.pick(&[32, 64, 80, 96, 128]).unwrap_or(64),
        3..=5 => 8 * (1 + draws.below(16)),
        6 => 1 + draws.below(130),
        _ => 129 + draws.below(384),
    }
}

/// `[batch, seq]`: everything, nothing, each token by itself, prefixes or runs.
fn mask(draws: &mut Draws, batch: usize, seq: usize) -> Vec<bool> {
    let by_row = |keeps: &mut dyn FnMut(usize) -> Vec<bool>| (0..batch).flat_map(keeps).collect();
    match draws.below(12) {
        0 => vec![true; batch * seq],
        1 => vec![false; batch * seq],
        2..=4 => {
            let (seed, p) = (draws.below(1 << 30) as u64, draws.uniform(0.0, 1.0));
            // A probability in its range is never refused.
            bernoulli_mask(seed, batch * seq, p).unwrap_or_default()
        }
        5..=8 => by_row(&mut |_| {
            let kept = draws.below(seq + 1);
            (0..seq).map(|token| token < kept).collect()
        }),
        _ => {
            let run = 1 + draws.below(40);
            by_row(&mut |_| {
                let first = draws.below(run);
                (0..seq).map(|token| ((token + first) / run).is_multiple_of(2)).collect()
            })
        }
    }
}

/// All that the seed says, but for the values.
impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OracleShape { batch, seq_q, seq_k, heads, kv_heads, head_dim } = self.shape;
        write!(f, "seed {}, {}, q [{batch}, {seq_q}, {heads}, {head_dim}], ", self.seed, self.dtype)?;
        write!(f, "k and v [{batch}, {seq_k}, {kv_heads}, {head_dim}], ")?;
        let kept = |keep: &[bool]| format!("{} of {} tokens", keep.iter().filter(|&&keep| keep).count(), keep.len());
        match &self.tokens {
            Tokens::All => write!(f, "no mask")?,
            Tokens::Key(keep) => write!(f, "a key mask of {}", kept(keep))?,
            Tokens::Varlen(keep) => write!(f, "metadata of {}", kept(keep))?,
            Tokens::Cross(query, key) => {
                write!(f, "metadata of {} for queries, {} for keys", kept(query), kept(key))?;
            }
        }
        if let Some(rule) = self.rule {
            write!(f, ", ranges {rule:?}")?;
        }
        if self.softcap != 0.0 {
            write!(f, ", soft cap {}", self.softcap)?;
        }
        let modifiers = [("ALiBi", self.slopes.is_some()), ("sinks", self.sinks.is_some()), ("lse", self.lse)];
        for (name, _) in modifiers.iter().filter(|(_, is_there)| *is_there) {
            write!(f, ", {name}")?;
        }
        if let Some(bias) = self.bias {
            write!(f, ", bias {bias:?}")?;
        }
        if let Some(scale) = self.scale {
            write!(f, ", scale {scale}")?;
        }
        write!(f, ", tensors by {:?}", self.place)?;
        if let Some(path) = self.path {
            write!(f, ", path {path}")?;
        }
        self.kernel.map_or(Ok(()), |kernel| write!(f, ", kernel {kernel}"))
    }
}
