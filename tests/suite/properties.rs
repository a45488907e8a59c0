//! Random calls: any shape, mask, layout, scale and path, against the oracle.

use std::env;

use anyhow::{Context, Result, anyhow};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use varlen_fa::{Device, alibi_slopes};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Inputs, Mask};
use super::check::Rules;
use super::head_dims::{explain, few};
use super::modifying::Modifying;
use super::placement::Placement;
use super::trials::{Trials, Variant, has_modifiers, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    explain(trials.device(), "properties");
    trials.each_path("properties/metadata", |variant| explore(variant, with_metadata(head_dim(variant))));
    trials.each_kernel("properties/dense", |variant| explore(variant, without_metadata(head_dim(variant))));
}

fn variable(name: &str, default: u64) -> Result<u64> {
    match env::var(name) {
        Ok(value) => value.parse().with_context(|| format!("{name}: expected a whole number, got {value:?}")),
        Err(_) => Ok(default),
    }
}

fn cases(device: &Device) -> Result<u32> {
    Ok(u32::try_from(variable("VARLEN_FA_TEST_CASES", if is_emulated_gpu(device) { 8 } else { 64 })?)?)
}

/// Runs random calls on one variant, and names the smallest that fails.
fn explore(variant: &Variant, calls: impl Strategy<Value = Random>) -> Result<()> {
    let seed = variable("VARLEN_FA_TEST_SEED", 0)?;
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: cases(&variant.device)?,
        failure_persistence: None,
        max_shrink_iters: 300,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let result =
        runner.run(&calls, |random| random.check(variant).map_err(|error| TestCaseError::fail(format!("{error:#}"))));
    result.map_err(|error| match error {
        TestError::Fail(reason, smallest) => anyhow!("{reason}\nsmallest call that fails: {smallest:#?}"),
        TestError::Abort(reason) => anyhow!("gave up: {reason}"),
    })
}

/// How the tokens of a mask are chosen.
#[derive(Debug, Clone)]
enum Tokens {
    All,
    None,
    Each(f64),
    Prefix,
    Runs(usize),
}

impl Tokens {
    fn mask(&self, batch: usize, seq: usize, seed: u64) -> Result<Vec<bool>> {
        let draws = random::normal(seed, batch * (seq + 1));
        let row_draw = |row: usize| draws[batch * seq + row].abs().fract();
        Ok(match *self {
            Self::All => vec![true; batch * seq],
            Self::None => vec![false; batch * seq],
            Self::Each(p) => random::bernoulli_mask(seed, batch * seq, p)?,
            Self::Prefix => {
                (0..batch * seq).map(|at| ((at % seq) as f32) < row_draw(at / seq) * (seq as f32 + 1.0)).collect()
            }
            Self::Runs(len) => (0..batch * seq)
                .map(|at| ((at % seq) / len + (10.0 * row_draw(at / seq)) as usize).is_multiple_of(2))
                .collect(),
        })
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Plain,
    Key,
    Varlen,
    Cross,
}

/// A call as proptest draws and shrinks it.
#[derive(Debug, Clone)]
struct Random {
    shape: OracleShape,
    kind: Kind,
    query: Tokens,
    key: Tokens,
    scale: Option<f32>,
    /// Soft cap, how many times the published slopes, and the sink of the first head.
    modifiers: (Option<f32>, Option<f32>, Option<f32>),
    is_fused_qkv: bool,
    placements: [Placement; 4],
    seed: u64,
}

impl Random {
    fn check(&self, variant: &Variant) -> Result<()> {
        let mut shape = self.shape;
        shape.head_dim = shape.head_dim.min(variant.kernel.max_head_dim());
        if matches!(self.kind, Kind::Varlen) || self.is_fused_qkv {
            shape.seq_k = shape.seq_q;
        }
        let query = self.query.mask(shape.batch, shape.seq_q, self.seed)?;
        let key = self.key.mask(shape.batch, shape.seq_k, self.seed + 1)?;
        let mask = match self.kind {
            Kind::Plain => Mask::None,
            Kind::Key => Mask::Key(key),
            Kind::Varlen => Mask::Varlen(query),
            Kind::Cross => Mask::Cross { query, key },
        };
        let mut call = Call::random(shape, mask, variant.dtype, self.seed);
        call.scale = self.scale;
        if has_modifiers(&variant.kernel) {
            call.modifying = self.modifying(shape.heads).on(variant.path);
        }
        let [q, k, v, out] = self.placements;
        call.inputs = if self.is_fused_qkv { Inputs::FusedQkv } else { Inputs::Apart([q, k, v]) };
        call.output = out;
        let mut rules = Rules::standard(variant.dtype);
        // A few rows of a few elements: a naive run may be exact by luck, and no yardstick.
        if shape.batch * shape.seq_q * shape.heads < 16 {
            rules.yardsticks = None;
        }
        call.check_by(variant, rules)
    }
}

impl Random {
    fn modifying(&self, heads: usize) -> Modifying {
        let (softcap, slope, sink) = self.modifiers;
        Modifying {
            softcap: softcap.unwrap_or(0.0),
            slopes: slope.map(|slope| alibi_slopes(heads).iter().map(|published| published * slope).collect()),
            sinks: sink.map(|sink| (0..heads).map(|head| sink - head as f32).collect()),
        }
    }
}

fn with_metadata(head_dim: BoxedStrategy<usize>) -> impl Strategy<Value = Random> {
    random_call(head_dim, prop_oneof![Just(Kind::Varlen), Just(Kind::Cross)])
}

fn without_metadata(head_dim: BoxedStrategy<usize>) -> impl Strategy<Value = Random> {
    random_call(head_dim, prop_oneof![Just(Kind::Plain), Just(Kind::Key)])
}

fn random_call(head_dim: BoxedStrategy<usize>, kind: impl Strategy<Value = Kind>) -> impl Strategy<Value = Random> {
    let sizes = (0_usize..=3, 0_usize..=70, 0_usize..=70, 1_usize..=3, 1_usize..=3, head_dim);
    let shape = sizes.prop_map(|(batch, seq_q, seq_k, kv_heads, group, head_dim)| OracleShape {
        batch,
        seq_q,
        seq_k,
        heads: kv_heads * group,
        kv_heads,
        head_dim,
    });
    let scale = prop_oneof![3 => Just(None), 1 => (-0.3_f32..0.3).prop_map(Some)];
    let modifiers = (maybe(0.05_f32..40.0), maybe(0.1_f32..4.0), maybe(-4.0_f32..6.0));
    let placements = [placement(), placement(), placement(), placement()];
    (shape, kind, tokens(), tokens(), scale, modifiers, any::<bool>(), placements, 0_u64..1000).prop_map(
        |(shape, kind, query, key, scale, modifiers, is_fused_qkv, placements, seed)| Random {
            shape,
            kind,
            query,
            key,
            scale,
            modifiers,
            is_fused_qkv,
            placements,
            seed,
        },
    )
}

/// None in two of three draws.
fn maybe<S: Strategy>(value: S) -> impl Strategy<Value = Option<S::Value>> {
    prop::option::weighted(1.0 / 3.0, value)
}

/// Mostly small: the sizes between tiles matter more than the large ones.
fn head_dim(variant: &Variant) -> BoxedStrategy<usize> {
    match few(&variant.device, variant.kernel) {
        Some(few) => prop::sample::select(few).boxed(),
        None => {
            let of_eights = prop_oneof![3 => 1_usize..=10, 1 => 11_usize..=32].prop_map(|eighths| 8 * eighths);
            prop_oneof![3 => of_eights, 1 => 1_usize..=130].boxed()
        }
    }
}

fn tokens() -> impl Strategy<Value = Tokens> {
    prop_oneof![
        1 => Just(Tokens::All),
        1 => Just(Tokens::None),
        4 => (0.0..=1.0).prop_map(Tokens::Each),
        3 => Just(Tokens::Prefix),
        3 => (1_usize..=40).prop_map(Tokens::Runs),
    ]
}

fn placement() -> impl Strategy<Value = Placement> {
    let outer = Just([0, 1, 2]).prop_shuffle();
    let room = || (0_usize..=2, 0_usize..=2);
    // The last dimension's room keeps rows on 16-byte boundaries, where the head dimension is a multiple of 8.
    let room_in_row = (0_usize..=1, 0_usize..=2).prop_map(|(before, after)| (8 * before, 8 * after));
    (outer, room(), room(), room(), room_in_row).prop_map(|([a, b, c], batch, seq, heads, dim)| Placement {
        order: [a, b, c, 3],
        margin: [batch, seq, heads, dim],
    })
}
