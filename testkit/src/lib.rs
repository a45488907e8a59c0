//! What varlen-fa's tests, benches and examples share: workloads, seeded inputs, an f64 oracle and the comparison rules.
//!
//! This package does not depend on `varlen-fa`. The oracle reads masks in its own way, straight from their `bool`s,
//! so a mistake in the library's metadata cannot hide in the answer it is compared with.
//!
//! * [`Workload`]: a key mask and its size, from a short text such as `joint:text=256:image=4096:valid=37,211`.
//! * [`CASES`]: the named cases that every device must pass.
//! * [`random`]: the same standard normal values on every platform, rounded to any [`Precision`].
//! * [`Oracle`] and [`attend_packed`]: naive attention in f64; [`naive_low_precision`]: the same in the working precision.
//! * [`compare`]: the tolerance rules, exact zeros and bit equality, each with a message that says where it failed.
//!
//! Tensors are contiguous `[batch, seq, heads, head_dim]` slices; a mask is `[batch, seq]`, true where a token is kept.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod cases;
pub mod compare;
pub mod low_precision;
pub mod oracle;
mod parallel;
pub mod precision;
pub mod random;
pub mod workload;

pub use cases::{CASES, Case};
pub use compare::{
    CompareError, ErrorStats, Tolerance, Value, Yardsticks, check_bits_equal, check_close, check_exact_zero,
    check_field_rule, check_masked_rows_zero, check_relative,
};
pub use low_precision::{naive_low_precision, naive_low_precision_rows};
pub use oracle::{
    AttendedRow, Modifiers, Oracle, OracleError, OracleProblem, OracleShape, PackedOutput, PackedProblem, Pairs,
    RowIndex, Turn, attend_packed, prepared_head,
};
pub use precision::Precision;
pub use workload::{Workload, WorkloadError, WorkloadKind};
