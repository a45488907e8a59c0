//! The adapter's tests, on every device that there is.

#[cfg(feature = "cuda")]
mod cuda;
mod devices;
mod reference;
