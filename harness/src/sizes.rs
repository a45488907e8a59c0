//! How large the workloads of a bench are.

/// What a bench runs, where its options name no workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// Workloads that show how fast a device is.
    Full,
    /// One tiny workload, once: shows that everything runs.
    Smoke,
}
