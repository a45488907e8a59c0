//! What a command found.

/// How a command ended that could do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong.
    Well,
    /// A device computes wrong results. The report says which.
    Wrong,
}
