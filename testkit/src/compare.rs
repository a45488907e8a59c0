//! The comparison rules, each with a message that says where and by how much it failed.
//!
//! NaN passes no rule. Every rule takes the name of its case and the shape `[batch, seq, heads, head_dim]`, so that a
//! failure can be found; for sampled rows, `[1, rows, 1, head_dim]` will do.

mod bits;
mod error;
mod tolerance;
mod value;

pub use bits::{check_bits_equal, check_exact_zero, check_masked_rows_zero};
pub use error::CompareError;
pub use tolerance::{ErrorStats, Tolerance, Yardsticks, check_close, check_field_rule, check_relative};
pub use value::Value;
