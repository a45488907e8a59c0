//! What the examples and benches share: their common options, the size of a problem, seeded inputs, the check of an output,
//! timings, and how results are written.

pub mod arguments;
pub mod benches;
pub mod check;
pub mod comparison;
pub mod peak;
pub mod progress;
pub mod random;
pub mod record;
pub mod report;
pub mod sizes;
pub mod times;
