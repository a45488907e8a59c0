//! The `key=value` parts of a SPEC, taken one by one.

use std::str::FromStr;

use super::error::WorkloadError;
use super::named::NAMED;

/// The most mask entries (`batch × seq`) that a SPEC may ask for: 1 GiB of them.
pub const MAX_MASK: usize = 1 << 30;

/// The kinds, and the keys that only they have.
const KINDS: [(&str, &[&str]); 3] =
    [("joint", &["text", "image", "valid"]), ("prefix", &["len", "valid"]), ("random", &["len", "p", "seed"])];

/// The keys of every kind.
const COMMON: [&str; 4] = ["batch", "heads", "kv_heads", "dim"];

/// A SPEC cut at its colons, its kind and keys known.
pub(super) struct Fields<'a> {
    spec: &'a str,
    kind: &'a str,
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> Fields<'a> {
    pub(super) fn split(spec: &'a str) -> Result<Self, WorkloadError> {
        let malformed = |part, expected, got: &str| {
            Err(WorkloadError::Malformed { spec: spec.to_owned(), part, expected, got: got.to_owned() })
        };
        let mut parts = spec.split(':').enumerate();
        let kind = parts.next().map_or("", |(_, kind)| kind);
        if kind.is_empty() {
            return malformed(0, "a kind or a name", kind);
        }
        let mut fields = Self { spec, kind, pairs: Vec::new() };
        let Some((_, own)) = KINDS.iter().find(|(name, _)| *name == kind) else {
            return Err(fields.unknown_kind());
        };
        for (index, part) in parts {
            let Some((key, value)) = part.split_once('=').filter(|(key, _)| !key.is_empty()) else {
                return malformed(index, "key=value", part);
            };
            // Before the missing ones: a key misspelt is both, and this says which.
            if !own.contains(&key) && !COMMON.contains(&key) {
                let expected = [own, COMMON.as_slice()].concat().join(", ");
                return Err(WorkloadError::UnknownKey { spec: spec.to_owned(), key: key.to_owned(), expected });
            }
            if let Some((_, first)) = fields.pairs.iter().find(|(earlier, _)| *earlier == key) {
                return Err(WorkloadError::DuplicateKey {
                    spec: spec.to_owned(),
                    key: key.to_owned(),
                    first: (*first).to_owned(),
                    second: value.to_owned(),
                });
            }
            fields.pairs.push((key, value));
        }
        Ok(fields)
    }

    pub(super) fn kind(&self) -> &'a str {
        self.kind
    }

    /// The value of a key that must be there.
    pub(super) fn required<T>(&self, key: &'static str, value: Option<T>) -> Result<T, WorkloadError> {
        value.ok_or_else(|| WorkloadError::MissingKey { spec: self.spec.to_owned(), key })
    }

    /// A number from 1 to the largest mask.
    pub(super) fn count(&self, key: &'static str) -> Result<Option<usize>, WorkloadError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        let value = self.digits(key, text)?;
        self.in_range(key, value, 1, MAX_MASK).map(Some)
    }

    /// A list of numbers from 0 to `max`; the key must be there.
    pub(super) fn lengths(&self, key: &'static str, max: usize) -> Result<Vec<usize>, WorkloadError> {
        let text = self.required(key, self.take(key))?;
        text.split(',').map(|entry| self.in_range(key, self.digits(key, entry)?, 0, max)).collect()
    }

    pub(super) fn seed(&self, key: &'static str) -> Result<Option<u64>, WorkloadError> {
        self.take(key).map(|text| self.digits(key, text)).transpose()
    }

    pub(super) fn probability(&self, key: &'static str) -> Result<Option<f64>, WorkloadError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        let p: f64 = text.parse().map_err(|_| self.bad_number(key, "a number", text))?;
        if (0.0..=1.0).contains(&p) { Ok(Some(p)) } else { Err(self.bad_probability(key, text)) }
    }

    pub(super) fn unknown_kind(&self) -> WorkloadError {
        let names = NAMED.map(|(name, _)| name).join(", ");
        WorkloadError::UnknownKind {
            spec: self.spec.to_owned(),
            expected: format!("one of {}, or a name: {names}", KINDS.map(|(name, _)| name).join(", ")),
            got: self.kind.to_owned(),
        }
    }

    pub(super) fn mask_too_large(&self, seq: usize, batch: usize) -> WorkloadError {
        self.out_of_range("batch", format!("at most {MAX_MASK} mask entries at {seq} tokens a row"), batch.to_string())
    }

    pub(super) fn uneven_heads(&self, heads: usize, kv_heads: usize) -> WorkloadError {
        self.out_of_range("kv_heads", format!("a divisor of heads={heads}"), kv_heads.to_string())
    }

    pub(super) fn bad_probability(&self, key: &'static str, got: &str) -> WorkloadError {
        self.out_of_range(key, "0 to 1".to_owned(), got.to_owned())
    }

    fn take(&self, key: &'static str) -> Option<&'a str> {
        self.pairs.iter().find(|(given, _)| *given == key).map(|(_, value)| *value)
    }

    /// Digits only: `FromStr` would take a plus sign, and the SPEC would not be canonical.
    fn digits<T: FromStr>(&self, key: &'static str, text: &str) -> Result<T, WorkloadError> {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse()
            .ok()
            .filter(|_| plain)
            .ok_or_else(|| self.bad_number(key, "a whole number of at most 64 bits", text))
    }

    fn in_range(&self, key: &'static str, value: usize, min: usize, max: usize) -> Result<usize, WorkloadError> {
        if (min..=max).contains(&value) {
            return Ok(value);
        }
        Err(self.out_of_range(key, format!("{min} to {max}"), value.to_string()))
    }

    fn bad_number(&self, key: &'static str, expected: &'static str, got: &str) -> WorkloadError {
        WorkloadError::BadNumber { spec: self.spec.to_owned(), key, expected, got: got.to_owned() }
    }

    fn out_of_range(&self, key: &'static str, expected: String, got: String) -> WorkloadError {
        WorkloadError::OutOfRange { spec: self.spec.to_owned(), key, expected, got }
    }
}
