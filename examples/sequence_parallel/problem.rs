//! The whole sequence, as every rank can make it: sizes, mask, and seeded q, k and v.

use anyhow::Result;
use varlen_fa::dist::{Heads, Shards};
use varlen_fa::{AttentionMask, DType, Device, Element, KeyMask, MaskedAttention, Tensor, VarlenMeta};
use varlen_fa_testkit::random;

use super::arguments::Arguments;

/// An element of tensors.
pub trait Value: Element {}
impl<T: Element> Value for T {}

/// Sizes and mask.
#[derive(Debug)]
pub struct Problem {
    /// How the sequence is divided: text is the prefix.
    pub shards: Shards,
    /// `[B, S]` of the whole sequence.
    pub mask: KeyMask,
    heads: [usize; 3],
    head_dim: usize,
}

impl Problem {
    /// What the options say.
    pub fn new(arguments: &Arguments) -> Result<Self> {
        let prefix = arguments.text.iter().copied().max().unwrap_or(0);
        let shards = Shards::equal(arguments.image, arguments.ranks())?.with_prefix(prefix)?;
        let rows: Vec<_> = arguments.text.iter().map(|&text| [0..text, prefix..shards.seq()]).collect();
        let (heads, kv_heads) = (arguments.heads.get(), arguments.kv_heads.get());
        Ok(Self {
            mask: KeyMask::from_runs(shards.seq(), &rows)?,
            shards,
            heads: [heads, kv_heads, kv_heads],
            head_dim: arguments.head_dim.get(),
        })
    }

    /// For people.
    pub fn describe(&self) -> String {
        let (batch, seq, valid) = (self.mask.batch(), self.mask.seq(), self.mask.total_kept());
        let shards: Vec<_> = (0..self.shards.ranks()).map(|rank| self.shards.shard(rank).len()).collect();
        let [heads, kv_heads, _] = self.heads;
        format!(
            "[B, S] = [{batch}, {seq}], {valid} of {} tokens valid; text {} on every rank, image {shards:?}; heads {heads} \
             ({kv_heads} of keys) of {}",
            batch * seq,
            self.shards.prefix(),
            self.head_dim,
        )
    }

    /// The heads, for plans.
    pub fn heads(&self, dtype: DType) -> Heads {
        let [num_heads, num_kv_heads, _] = self.heads;
        Heads { num_heads, num_kv_heads, head_dim: self.head_dim, dtype }
    }

    /// Global positions of a rank's tokens.
    pub fn tokens(&self, rank: usize) -> Vec<usize> {
        (0..self.shards.prefix()).chain(self.shards.shard(rank)).collect()
    }

    /// q, k and v of some tokens. Rows of masked ones are NaN.
    pub fn inputs<T: Value>(&self, device: &Device, tokens: &[usize]) -> Result<[Tensor; 3]> {
        let (batch, seq) = (self.mask.batch(), self.mask.seq());
        let tensor = |stream: usize| {
            let width = self.heads[stream] * self.head_dim;
            let whole = random::normal_stream(20, stream as u64, batch * seq * width);
            let mut rows = Vec::with_capacity(batch * tokens.len() * width);
            for (b, &token) in (0..batch).flat_map(|b| tokens.iter().map(move |token| (b, token))) {
                let row = &whole[(b * seq + token) * width..][..width];
                let is_valid = self.mask.keeps(b, token);
                rows.extend(row.iter().map(|&value| T::from_f32(if is_valid { value } else { f32::NAN })));
            }
            Tensor::from_slice(device, &rows, &[batch, tokens.len(), self.heads[stream], self.head_dim])
        };
        Ok([tensor(0)?, tensor(1)?, tensor(2)?])
    }

    /// The output of one device, `[B, S, H, D]`.
    pub fn reference<T: Value>(&self, device: &Device) -> Result<Vec<T>> {
        let all: Vec<usize> = (0..self.mask.seq()).collect();
        let [q, k, v] = self.inputs::<T>(device, &all)?;
        let meta = VarlenMeta::from_key_mask(&self.mask)?;
        let attended = MaskedAttention::new(device).forward(&q, &k, &v, AttentionMask::varlen(&meta))?;
        Ok(attended.out.to_vec()?)
    }

    /// Rows of some tokens of it.
    pub fn rows<T: Value>(&self, whole: &[T], tokens: &[usize]) -> Vec<T> {
        let (batch, seq, width) = (self.mask.batch(), self.mask.seq(), self.heads[0] * self.head_dim);
        let rows = (0..batch).flat_map(|b| tokens.iter().map(move |token| b * seq + token));
        rows.flat_map(|row| &whole[row * width..][..width]).copied().collect()
    }
}
