//! The block in f64, token by token, from its weights alone.

use rayon::prelude::*;
use varlen_fa::KeyMask;
use varlen_fa_testkit::{Pairs, Turn, prepared_head};

use super::block::{Block, EPS, Stream};

/// How far a block's output is from the oracle's.
pub struct Judged {
    /// Tokens that were compared.
    pub tokens: usize,
    /// The largest difference, as a share of the largest element; NaN if an element is.
    pub error: f64,
}

/// A token of a batch row.
#[derive(Clone, Copy)]
struct Token {
    batch: usize,
    /// 0 in the text, 1 in the image.
    stream: usize,
    /// Place in the stream.
    place: usize,
}

/// Compares at most `limit` valid tokens, evenly spread over all of them.
pub fn judge(block: &Block, mask: &KeyMask, hidden: &[Vec<f32>; 2], limit: usize) -> Judged {
    let width = block.sizes.width();
    let [text, _] = &block.streams;
    let valid: Vec<Token> = (0..mask.batch() * mask.seq())
        .map(|at| (at / mask.seq(), at % mask.seq()))
        .filter(|&(batch, token)| mask.keeps(batch, token))
        .map(|(batch, token)| match token.checked_sub(text.seq) {
            None => Token { batch, stream: 0, place: token },
            Some(place) => Token { batch, stream: 1, place },
        })
        .collect();
    let oracle = Oracle::new(block, &valid);
    let sample: Vec<Token> = valid.iter().copied().step_by(valid.len().div_ceil(limit).max(1)).collect();
    let expected: Vec<Vec<f64>> = sample.par_iter().map(|&token| oracle.token(token)).collect();
    let largest = expected.iter().flatten().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let mut error = 0.0;
    for (token, expected) in sample.iter().zip(&expected) {
        let start = (token.batch * block.streams[token.stream].seq + token.place) * width;
        for (&got, expected) in hidden[token.stream][start..][..width].iter().zip(expected) {
            let difference = (f64::from(got) - expected).abs() / largest;
            // `max` passes over NaN.
            error = if difference.is_nan() { f64::NAN } else { difference.max(error) };
            if error.is_nan() {
                return Judged { tokens: sample.len(), error };
            }
        }
    }
    Judged { tokens: sample.len(), error }
}

struct Oracle<'a> {
    block: &'a Block,
    /// Of text and image, by batch row: the six parts one after another.
    modulations: [Vec<Vec<f64>>; 2],
    /// k and v of the valid tokens of each batch row, `[H, D]`.
    keys: Vec<Vec<[Vec<f64>; 2]>>,
}

impl<'a> Oracle<'a> {
    fn new(block: &'a Block, valid: &[Token]) -> Self {
        let width = block.sizes.width();
        let active = |time: &[f32]| time.iter().map(|&x| f64::from(x) / (1.0 + (-f64::from(x)).exp())).collect();
        let of_time = |stream: &Stream| {
            let rows = block.time.chunks(width).map(|time| {
                let active: Vec<f64> = active(time);
                product(&active, &stream.modulation, 6 * width)
            });
            rows.collect()
        };
        let mut oracle = Self { block, modulations: block.streams.each_ref().map(of_time), keys: vec![] };
        let of_batch = |batch: usize| {
            let tokens: Vec<Token> = valid.iter().copied().filter(|token| token.batch == batch).collect();
            let key = |token: &Token| {
                let row = oracle.normalised(*token, &oracle.hidden(*token), 0);
                let weights = &block.streams[token.stream].project;
                [oracle.prepared(*token, 1, &row), product(&row, &weights[2], width)]
            };
            tokens.par_iter().map(key).collect()
        };
        oracle.keys = (0..block.batch).map(of_batch).collect();
        oracle
    }

    fn stream(&self, token: Token) -> &'a Stream {
        &self.block.streams[token.stream]
    }

    fn hidden(&self, token: Token) -> Vec<f64> {
        let (stream, width) = (self.stream(token), self.block.sizes.width());
        let start = (token.batch * stream.seq + token.place) * width;
        stream.hidden[start..][..width].iter().map(|&value| f64::from(value)).collect()
    }

    fn part(&self, token: Token, part: usize) -> &[f64] {
        let width = self.block.sizes.width();
        &self.modulations[token.stream][token.batch][part * width..][..width]
    }

    /// LayerNorm of a row, modulated by two of the six parts.
    fn normalised(&self, token: Token, row: &[f64], shift: usize) -> Vec<f64> {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / row.len() as f64;
        let root = (variance + f64::from(EPS)).sqrt();
        let parts = self.part(token, shift).iter().zip(self.part(token, shift + 1));
        row.iter().zip(parts).map(|(value, (shift, scale))| (value - mean) / root * (1.0 + scale) + shift).collect()
    }

    /// q or k of a normalised row, `[H, D]`, by norm and rotation.
    fn prepared(&self, token: Token, which: usize, row: &[f64]) -> Vec<f64> {
        let (stream, dim) = (self.stream(token), self.block.sizes.head_dim);
        let projected = product(row, &stream.project[which], self.block.sizes.width());
        let [cos, sin] = stream.tables.each_ref().map(|table| &table[token.place * (dim / 2)..][..dim / 2]);
        let head = |head: &[f64]| {
            let head: Vec<f32> = head.iter().map(|&value| value as f32).collect();
            let turn = Turn { cos, sin, pairs: Pairs::Neighbours };
            prepared_head(&head, Some((&stream.norms[which], EPS)), Some(turn))
        };
        projected.chunks(dim).flat_map(head).collect()
    }

    /// A token's hidden states after the block.
    fn token(&self, token: Token) -> Vec<f64> {
        let (stream, width) = (self.stream(token), self.block.sizes.width());
        let mut hidden = self.hidden(token);
        let row = self.normalised(token, &hidden, 0);
        let attended = self.attend(token, &self.prepared(token, 0, &row));
        add_gated(&mut hidden, &product(&attended, &stream.out, width), self.part(token, 2));
        let row = self.normalised(token, &hidden, 3);
        let inner: Vec<f64> = product(&row, &stream.up, 4 * width).into_iter().map(gelu).collect();
        add_gated(&mut hidden, &product(&inner, &stream.down, width), self.part(token, 5));
        hidden
    }

    /// All heads of a query over the valid tokens of its batch row.
    fn attend(&self, token: Token, q: &[f64]) -> Vec<f64> {
        let dim = self.block.sizes.head_dim;
        let keys = &self.keys[token.batch];
        let head = |(head, q): (usize, &[f64])| {
            let of_head = head * dim..(head + 1) * dim;
            let dot = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt();
            let scores: Vec<f64> = keys.iter().map(|[k, _]| dot(&k[of_head.clone()])).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut out = vec![0.0; dim];
            for ([_, v], weight) in keys.iter().zip(weights) {
                out.iter_mut().zip(&v[of_head.clone()]).for_each(|(out, value)| *out += weight / sum * value);
            }
            out
        };
        q.chunks(dim).enumerate().flat_map(head).collect()
    }
}

fn add_gated(hidden: &mut [f64], row: &[f64], gate: &[f64]) {
    hidden.iter_mut().zip(row).zip(gate).for_each(|((hidden, value), gate)| *hidden += gate * value);
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

/// A row times a matrix of so many columns.
fn product(row: &[f64], matrix: &[f32], columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; columns];
    for (value, weights) in row.iter().zip(matrix.chunks(columns)) {
        out.iter_mut().zip(weights).for_each(|(out, &weight)| *out += value * f64::from(weight));
    }
    out
}
