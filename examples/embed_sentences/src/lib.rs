//! all-MiniLM-L6-v2 sentence embeddings on padded batches, with every attention through `varlen-fa`.
//!
//! The parts: [`tokens`] cuts the text into padded batches, [`model`] is the BERT encoder, read from its files ([`model_files`]), [`attention`] is the one place
//! that calls `varlen-fa`, [`embed`] runs a whole text through them, [`neighbours`] and [`mod@reference`] use the result.
//! The linear layers run on the CPU on every device; only the attention runs on the device chosen.

pub mod attention;
pub mod embed;
pub mod model;
pub mod model_files;
pub mod neighbours;
pub mod ops;
pub mod reference;
pub mod tokens;
