//! The compiled kernels: what they and the host agree on, and how they are loaded.
//!
//! | module | what it holds |
//! |---|---|
//! | `params` | parameters and shared constants, from which the kernels' header is generated |
//! | `tiles` | tile sizes, read from the tables that the kernels are compiled with |
//! | `module` | the images of the kernels, loaded once for each context, and their functions |

pub mod module;
#[cfg_attr(not(test), allow(dead_code, reason = "`cargo xtask kernels` uses the half that makes text"))]
pub mod params;
pub mod tiles;
