//! Key masks and their sizes from a short text, shared by examples and benches.
//!
//! A SPEC is a kind and its keys, `kind:key=value:key=value`:
//!
//! | kind | mask of batch row `b` | keys |
//! |---|---|---|
//! | `joint` | the first `valid[b]` text tokens, and every image token after the text | `text=`, `image=`, `valid=` |
//! | `prefix` | the first `valid[b]` tokens | `len=`, `valid=` |
//! | `random` | each token with probability `p` | `len=`, `p=`, `seed=` (0 unless given) |
//!
//! `valid` is a list such as `37,211` with one entry per batch row. `batch=` sets the number of rows instead; the list is
//! then repeated or cut to it. `random` has one row unless `batch=` says otherwise. Every kind takes `heads=`,
//! `kv_heads=` and `dim=`, which are left to the caller where absent. A name of [`NAMED`] stands for its SPEC.

mod error;
mod fields;
mod named;

pub use error::WorkloadError;
pub use fields::MAX_MASK;
pub use named::NAMED;

use std::fmt;
use std::str::FromStr;

use crate::random::bernoulli_mask;
use fields::Fields;

/// How a workload's mask is laid out.
#[derive(Clone, Debug, PartialEq)]
pub enum WorkloadKind {
    /// `[valid text | text padding | image, all valid]`.
    Joint {
        /// Text tokens, valid or not.
        text: usize,
        /// Image tokens.
        image: usize,
        /// Valid text tokens, repeated over the batch.
        valid: Vec<usize>,
    },
    /// `[valid | padding]`.
    Prefix {
        /// Tokens of a batch row.
        len: usize,
        /// Valid tokens, repeated over the batch.
        valid: Vec<usize>,
    },
    /// Tokens kept independently.
    Random {
        /// Tokens of a batch row.
        len: usize,
        /// The probability that one is kept.
        p: f64,
        /// The seed of the draws.
        seed: u64,
    },
}

impl WorkloadKind {
    /// The word that starts the SPEC.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Joint { .. } => "joint",
            Self::Prefix { .. } => "prefix",
            Self::Random { .. } => "random",
        }
    }
}

/// A key mask, its size, and optionally the heads to run it with. Its `Display` is its canonical SPEC.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// The name it was asked for by, or else its canonical SPEC.
    pub name: String,
    /// How the mask was made.
    pub kind: WorkloadKind,
    /// Batch rows.
    pub batch: usize,
    /// Tokens of a batch row.
    pub seq: usize,
    /// `[batch, seq]`, true where a token is kept.
    pub mask: Vec<bool>,
    /// Query heads.
    pub heads: Option<usize>,
    /// Key and value heads.
    pub kv_heads: Option<usize>,
    /// Elements of one head.
    pub dim: Option<usize>,
}

impl Workload {
    /// Reads a name of [`NAMED`] or a SPEC.
    ///
    /// # Errors
    /// [`WorkloadError`] names the key, what was expected, what came, and the SPEC.
    pub fn parse(text: &str) -> Result<Self, WorkloadError> {
        match NAMED.iter().find(|(name, _)| *name == text) {
            Some((name, spec)) => Ok(Self { name: (*name).to_owned(), ..Self::from_spec(spec)? }),
            None => Self::from_spec(text),
        }
    }

    /// Every workload of [`NAMED`].
    ///
    /// # Errors
    /// None in practice: a test reads them all.
    pub fn named() -> Result<Vec<Self>, WorkloadError> {
        NAMED.iter().map(|(name, _)| Self::parse(name)).collect()
    }

    /// The share of tokens kept.
    pub fn valid_fraction(&self) -> f64 {
        self.total_valid() as f64 / self.mask.len() as f64
    }

    /// Kept tokens of the whole batch.
    pub fn total_valid(&self) -> usize {
        self.mask.iter().filter(|&&keep| keep).count()
    }

    /// Kept tokens of each batch row.
    pub fn row_lengths(&self) -> Vec<usize> {
        self.mask.chunks(self.seq).map(|row| row.iter().filter(|&&keep| keep).count()).collect()
    }

    /// Query and key pairs that attention over kept tokens computes, per head: `Σ len_b²`.
    pub fn valid_pairs(&self) -> u64 {
        self.row_lengths().iter().map(|&len| (len as u64).pow(2)).sum()
    }

    /// Operations of attention over kept tokens: `4 · Σ len_b² · heads · dim`.
    pub fn attention_flops(&self, heads: usize, dim: usize) -> f64 {
        4.0 * self.valid_pairs() as f64 * heads as f64 * dim as f64
    }

    /// Operations of attention over all tokens: `4 · batch · seq² · heads · dim`.
    pub fn dense_flops(&self, heads: usize, dim: usize) -> f64 {
        4.0 * self.batch as f64 * (self.seq as f64).powi(2) * heads as f64 * dim as f64
    }

    fn from_spec(spec: &str) -> Result<Self, WorkloadError> {
        let fields = Fields::split(spec)?;
        let (kind, seq, default_batch) = match fields.kind() {
            "joint" => {
                let text = fields.required("text", fields.count("text")?)?;
                let image = fields.required("image", fields.count("image")?)?;
                let valid = fields.lengths("valid", text)?;
                let batch = valid.len();
                // Each fits the mask, so their sum does not overflow.
                (WorkloadKind::Joint { text, image, valid }, text + image, batch)
            }
            "prefix" => {
                let len = fields.required("len", fields.count("len")?)?;
                let valid = fields.lengths("valid", len)?;
                let batch = valid.len();
                (WorkloadKind::Prefix { len, valid }, len, batch)
            }
            "random" => {
                let len = fields.required("len", fields.count("len")?)?;
                let p = fields.required("p", fields.probability("p")?)?;
                (WorkloadKind::Random { len, p, seed: fields.seed("seed")?.unwrap_or(0) }, len, 1)
            }
            _ => return Err(fields.unknown_kind()),
        };
        let batch = fields.count("batch")?.unwrap_or(default_batch);
        if batch.checked_mul(seq).is_none_or(|entries| entries > MAX_MASK) {
            return Err(fields.mask_too_large(seq, batch));
        }
        let heads = fields.count("heads")?;
        let kv_heads = fields.count("kv_heads")?;
        if let (Some(heads), Some(kv_heads)) = (heads, kv_heads)
            && !heads.is_multiple_of(kv_heads)
        {
            return Err(fields.uneven_heads(heads, kv_heads));
        }
        let dim = fields.count("dim")?;
        let mask = fields.mask(&kind, batch, seq)?;
        let mut workload = Self { name: String::new(), kind, batch, seq, mask, heads, kv_heads, dim };
        workload.name = workload.to_string();
        Ok(workload)
    }
}

impl Fields<'_> {
    fn mask(&self, kind: &WorkloadKind, batch: usize, seq: usize) -> Result<Vec<bool>, WorkloadError> {
        // Tokens below `valid` or from `rest` on.
        let rows = |valid: &[usize], rest: usize| -> Vec<bool> {
            let row = |&valid: &usize| (0..seq).map(move |token| token < valid || token >= rest);
            valid.iter().cycle().take(batch).flat_map(row).collect()
        };
        match kind {
            WorkloadKind::Joint { text, valid, .. } => Ok(rows(valid, *text)),
            WorkloadKind::Prefix { valid, .. } => Ok(rows(valid, seq)),
            WorkloadKind::Random { p, seed, .. } => bernoulli_mask(*seed, batch * seq, *p)
                .map_err(|error| self.bad_probability("p", &error.got.to_string())),
        }
    }
}

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |valid: &[usize]| valid.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let (entries, batch) = match &self.kind {
            WorkloadKind::Joint { text, image, valid } => {
                write!(f, "joint:text={text}:image={image}:valid={}", list(valid))?;
                (valid.len(), self.batch)
            }
            WorkloadKind::Prefix { len, valid } => {
                write!(f, "prefix:len={len}:valid={}", list(valid))?;
                (valid.len(), self.batch)
            }
            WorkloadKind::Random { len, p, seed } => {
                write!(f, "random:len={len}:p={p}:batch={}:seed={seed}", self.batch)?;
                (self.batch, self.batch)
            }
        };
        if entries != batch {
            write!(f, ":batch={batch}")?;
        }
        for (key, value) in [("heads", self.heads), ("kv_heads", self.kv_heads), ("dim", self.dim)] {
            if let Some(value) = value {
                write!(f, ":{key}={value}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(spec: &str) -> WorkloadError {
        let error = Workload::parse(spec).expect_err(spec);
        let message = error.to_string();
        assert!(message.contains(&format!("`{spec}`")), "the whole SPEC is in: {message}");
        assert!(message.contains("expected") && message.contains("got"), "{message}");
        error
    }

    #[test]
    fn joint_keeps_valid_text_and_every_image_token() {
        let workload = Workload::parse("joint:text=3:image=2:valid=1,3,0").unwrap();
        let expected = [1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1].map(|keep| keep == 1);
        assert_eq!((workload.batch, workload.seq), (3, 5));
        assert_eq!(workload.mask, expected);
        assert_eq!(workload.row_lengths(), [3, 5, 2]);
        assert_eq!(workload.total_valid(), 10);
        assert_eq!(workload.valid_pairs(), 9 + 25 + 4);
        assert_eq!(workload.valid_fraction(), 10.0 / 15.0);
        assert_eq!(workload.attention_flops(2, 8), 4.0 * 38.0 * 16.0);
        assert_eq!(workload.dense_flops(2, 8), 4.0 * 75.0 * 16.0);
    }

    #[test]
    fn prefix_cycles_or_cuts_its_list_to_the_batch() {
        let lengths = |spec: &str| Workload::parse(spec).unwrap().row_lengths();
        assert_eq!(lengths("prefix:len=4:valid=1,4"), [1, 4]);
        assert_eq!(lengths("prefix:len=4:valid=1,4,0:batch=5"), [1, 4, 0, 1, 4]);
        assert_eq!(lengths("prefix:len=4:valid=1,4,0:batch=2"), [1, 4]);
        assert_eq!(Workload::parse("prefix:len=3:valid=2").unwrap().mask, [true, true, false]);
    }

    #[test]
    fn random_follows_its_seed_and_probability() {
        let parse = |spec: &str| Workload::parse(spec).unwrap();
        let one = parse("random:len=4096:p=0.5:batch=4:seed=0");
        assert_eq!((one.batch, one.seq, one.mask.len()), (4, 4096, 4 * 4096));
        assert!((one.valid_fraction() - 0.5).abs() < 0.02);
        assert_ne!(one.mask, parse("random:len=4096:p=0.5:batch=4:seed=1").mask);
        let rows: Vec<_> = one.mask.chunks(4096).collect();
        assert_ne!(rows[0], rows[1]);
        assert_eq!(parse("random:p=0.5:len=9"), parse("random:len=9:p=0.5:batch=1:seed=0"));
        assert_eq!(parse("random:len=9:p=0").total_valid(), 0);
        assert_eq!(parse("random:len=9:p=1").total_valid(), 9);
    }

    #[test]
    fn heads_and_dim_are_optional_everywhere() {
        for spec in ["joint:text=1:image=1:valid=1", "prefix:len=1:valid=1", "random:len=1:p=1"] {
            let plain = Workload::parse(spec).unwrap();
            assert_eq!((plain.heads, plain.kv_heads, plain.dim), (None, None, None));
            let full = Workload::parse(&format!("{spec}:heads=24:kv_heads=8:dim=96")).unwrap();
            assert_eq!((full.heads, full.kv_heads, full.dim), (Some(24), Some(8), Some(96)));
        }
    }

    #[test]
    fn display_is_canonical_and_reads_back() {
        for (spec, canonical) in [
            ("joint:valid=37,211:text=256:image=4096", "joint:text=256:image=4096:valid=37,211"),
            ("joint:text=8:image=8:valid=3:batch=2", "joint:text=8:image=8:valid=3:batch=2"),
            ("joint:text=8:image=8:valid=3,4:batch=2", "joint:text=8:image=8:valid=3,4"),
            ("prefix:len=2048:valid=300,1792:dim=64", "prefix:len=2048:valid=300,1792:dim=64"),
            ("prefix:valid=007:len=08:batch=1:kv_heads=2:heads=4", "prefix:len=8:valid=7:heads=4:kv_heads=2"),
            ("random:len=16:p=5e-1", "random:len=16:p=0.5:batch=1:seed=0"),
            ("random:seed=18446744073709551615:len=16:p=0.1", "random:len=16:p=0.1:batch=1:seed=18446744073709551615"),
        ] {
            let workload: Workload = spec.parse().unwrap();
            assert_eq!(workload.to_string(), canonical);
            assert_eq!(workload.name, canonical);
            assert_eq!(canonical.parse(), Ok(workload));
        }
        for workload in Workload::named().unwrap() {
            let again = Workload::parse(&workload.to_string()).unwrap();
            assert_eq!(Workload { name: workload.name.clone(), ..again }, workload);
        }
    }

    #[test]
    fn unknown_kinds_name_the_known_ones() {
        let error = refused("ragged:len=4");
        assert!(matches!(&error, WorkloadError::UnknownKind { got, .. } if got == "ragged"), "{error:?}");
        assert!(error.to_string().contains("joint, prefix, random") && error.to_string().contains("joint-1024-b1"));
    }

    #[test]
    fn missing_keys() {
        for (spec, missing) in [
            ("joint:image=4:valid=1", "text"),
            ("joint:text=4:valid=1", "image"),
            ("joint:text=4:image=4", "valid"),
            ("prefix:valid=1", "len"),
            ("prefix", "len"),
            ("random:len=4", "p"),
        ] {
            let error = refused(spec);
            assert!(matches!(&error, WorkloadError::MissingKey { key, .. } if *key == missing), "{error:?}");
            assert!(error.to_string().contains(&format!("key `{missing}`")), "{error}");
        }
    }

    #[test]
    fn unknown_keys_name_the_known_ones() {
        for (spec, unknown) in [
            ("joint:text=4:image=4:valid=1:len=4", "len"),
            ("random:len=4:p=1:valid=2", "valid"),
            ("prefix:len=4:valid=1:head=2", "head"),
            ("prefix:len=4:vald=1", "vald"),
        ] {
            let error = refused(spec);
            assert!(matches!(&error, WorkloadError::UnknownKey { key, .. } if key == unknown), "{error:?}");
            assert!(error.to_string().contains("batch, heads, kv_heads, dim"), "{error}");
        }
    }

    #[test]
    fn duplicate_keys() {
        let error = refused("prefix:len=4:valid=1:len=5");
        assert!(matches!(&error, WorkloadError::DuplicateKey { key, .. } if key == "len"), "{error:?}");
        assert!(error.to_string().contains("got 4 and 5"), "{error}");
    }

    #[test]
    fn bad_numbers() {
        for (spec, bad, value) in [
            ("prefix:len=four:valid=1", "len", "four"),
            ("prefix:len=4:valid=1,,2", "valid", ""),
            ("prefix:len=4:valid=", "valid", ""),
            ("prefix:len=4:valid=1, 2", "valid", " 2"),
            ("prefix:len=-4:valid=1", "len", "-4"),
            ("prefix:len=+4:valid=1", "len", "+4"),
            ("prefix:len=99999999999999999999:valid=1", "len", "99999999999999999999"),
            ("random:len=4:p=half", "p", "half"),
            ("random:len=4:p=1:seed=0x1", "seed", "0x1"),
            ("random:len=4:p=1:heads=1.5", "heads", "1.5"),
        ] {
            let error = refused(spec);
            let found = matches!(&error, WorkloadError::BadNumber { key, got, .. } if *key == bad && got == value);
            assert!(found, "{error:?}");
        }
    }

    #[test]
    fn out_of_range() {
        for (spec, bad) in [
            ("joint:text=4:image=4:valid=5", "valid"),
            ("joint:text=0:image=4:valid=0", "text"),
            ("joint:text=4:image=0:valid=1", "image"),
            ("prefix:len=4:valid=4,5", "valid"),
            ("prefix:len=0:valid=0", "len"),
            ("prefix:len=4:valid=1:batch=0", "batch"),
            ("prefix:len=4:valid=1:heads=0", "heads"),
            ("prefix:len=4:valid=1:kv_heads=0", "kv_heads"),
            ("prefix:len=4:valid=1:heads=24:kv_heads=7", "kv_heads"),
            ("prefix:len=4:valid=1:dim=0", "dim"),
            ("random:len=4:p=1.5", "p"),
            ("random:len=4:p=-0.5", "p"),
            ("random:len=4:p=nan", "p"),
            ("random:len=4:p=inf", "p"),
            ("random:len=1073741825:p=1", "len"),
            ("joint:text=18446744073709551615:image=18446744073709551615:valid=1", "text"),
            ("prefix:len=1073741824:valid=1:batch=2", "batch"),
            ("prefix:len=1073741824:valid=1,2", "batch"),
        ] {
            let error = refused(spec);
            assert!(matches!(&error, WorkloadError::OutOfRange { key, .. } if *key == bad), "{error:?}");
        }
        let message = refused("joint:text=4:image=4:valid=5").to_string();
        assert_eq!(message, "key `valid` of workload `joint:text=4:image=4:valid=5`: expected 0 to 4, got 5");
    }

    #[test]
    fn malformed_texts() {
        for (spec, part) in [
            ("", ""),
            ("joint:", ""),
            ("prefix:len", "len"),
            ("prefix::len=4", ""),
            ("prefix:=4", "=4"),
            (":len=4", ""),
        ] {
            let error = refused(spec);
            assert!(matches!(&error, WorkloadError::Malformed { got, .. } if got == part), "{error:?}");
        }
    }
}
