//! What a SPEC can have wrong with it.

/// A SPEC that is not a workload: the key, what was expected, what came, and the SPEC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// Neither a kind nor a name.
    #[error("kind of workload `{spec}`: expected {expected}, got `{got}`")]
    UnknownKind {
        /// The whole SPEC.
        spec: String,
        /// The kinds and names there are.
        expected: String,
        /// The word that came.
        got: String,
    },
    /// A key that the kind cannot do without.
    #[error("key `{key}` of workload `{spec}`: expected `{key}=`, got no such key")]
    MissingKey {
        /// The whole SPEC.
        spec: String,
        /// The key.
        key: &'static str,
    },
    /// A key that the kind does not have.
    #[error("key `{key}` of workload `{spec}`: expected one of {expected}, got `{key}`")]
    UnknownKey {
        /// The whole SPEC.
        spec: String,
        /// The key.
        key: String,
        /// The keys there are.
        expected: String,
    },
    /// A key given twice.
    #[error("key `{key}` of workload `{spec}`: expected it once, got {first} and {second}")]
    DuplicateKey {
        /// The whole SPEC.
        spec: String,
        /// The key.
        key: String,
        /// Its first value.
        first: String,
        /// Its second value.
        second: String,
    },
    /// A value that is no number, or none that fits.
    #[error("key `{key}` of workload `{spec}`: expected {expected}, got `{got}`")]
    BadNumber {
        /// The whole SPEC.
        spec: String,
        /// The key.
        key: &'static str,
        /// The kind of number.
        expected: &'static str,
        /// The text that came.
        got: String,
    },
    /// A number outside its range.
    #[error("key `{key}` of workload `{spec}`: expected {expected}, got {got}")]
    OutOfRange {
        /// The whole SPEC.
        spec: String,
        /// The key.
        key: &'static str,
        /// The range.
        expected: String,
        /// The value that came.
        got: String,
    },
    /// A text without a kind, or a part of it that is not `key=value`.
    #[error("part {part} of workload `{spec}`: expected {expected}, got `{got}`")]
    Malformed {
        /// The whole SPEC.
        spec: String,
        /// Which of the parts between colons, from 0.
        part: usize,
        /// What it should look like.
        expected: &'static str,
        /// The part.
        got: String,
    },
}
