//! Seeded inputs, made on every core.

use rayon::prelude::*;
use varlen_fa::{Device, Element, Result, Tensor};
use varlen_fa_testkit::random::normal_stream;

/// Values that one task makes, from a stream of their own, so that the result does not depend on the number of cores.
const CHUNK: usize = 1 << 16;

/// `len` standard normal values, the same on every machine.
pub fn standard_normal(seed: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| {
        chunk.copy_from_slice(&normal_stream(seed, index as u64, chunk.len()));
    });
    values
}

/// A tensor of standard normal values.
pub fn tensor<T: Element>(device: &Device, seed: u64, shape: &[usize]) -> Result<Tensor> {
    let values: Vec<T> = standard_normal(seed, shape.iter().product()).into_iter().map(T::from_f32).collect();
    Tensor::from_slice(device, &values, shape)
}
