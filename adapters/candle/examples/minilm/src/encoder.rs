//! BERT as candle-transformers has it, layer by layer of candle-nn, with varlen-fa's attention, or candle's own.

use std::ops::Range;

use candle_core::{D, DType, Device, Module, Result, Shape, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{Embedding, LayerNorm, Linear, VarBuilder, embedding, layer_norm, linear};
use embed_sentences::model::Config;
use embed_sentences::ops::mean_pool;
use embed_sentences::tokens::Batch;
use varlen_fa_candle::Attention;
use varlen_fa_candle::varlen_fa::{CuSeqlens, KeyMask, VarlenMeta};

/// How the tokens of a batch lie, and what attention they have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// `[B, S]`, with padding, which all layers compute: candle's operations, as candle-transformers has them.
    Candle,
    /// `[B, S]`, with padding: linear layers compute it, attention does not.
    Padded,
    /// `[total]`, sentence after sentence: nothing computes padding.
    Packed,
}

/// Attention of the tokens of one batch.
enum Attend {
    Ours(Attention),
    /// What is added to the scores, `[B, 1, 1, S]`: a large negative number at padding.
    Candle(Tensor),
}

impl Attend {
    /// `q`, `k` and `v` are `[.., H, D]`.
    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let added = match self {
            Self::Ours(attention) => return attention.forward(q, k, v),
            Self::Candle(added) => added,
        };
        let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
        let scores = (by_head(q)?.matmul(&by_head(k)?.t()?)? * scale)?.broadcast_add(added)?;
        softmax_last_dim(&scores)?.matmul(&by_head(v)?)?.transpose(1, 2)?.contiguous()
    }
}

/// The model without its pooling.
pub struct Encoder {
    device: Device,
    dtype: DType,
    words: Embedding,
    positions: Embedding,
    /// Of the one type that single sentences have.
    token_type: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    heads: usize,
}

impl Encoder {
    /// The weights of a BERT model.
    pub fn load(weights: &VarBuilder<'_>, config: &Config) -> Result<Self> {
        let (hidden, of) = (config.hidden_size, weights.pp("embeddings"));
        let token_types = of.get((2, hidden), "token_type_embeddings.weight")?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(&weights.pp(format!("encoder.layer.{index}")), config))
            .collect::<Result<_>>()?;
        Ok(Self {
            device: weights.device().clone(),
            dtype: weights.dtype(),
            words: embedding(config.vocab_size, hidden, of.pp("word_embeddings"))?,
            positions: embedding(config.max_position_embeddings, hidden, of.pp("position_embeddings"))?,
            token_type: token_types.get(0)?,
            norm: layer_norm(hidden, f64::from(config.layer_norm_eps), of.pp("LayerNorm"))?,
            layers,
        })
    }

    /// The embeddings of the batch's sentences, `[sentences, hidden]`, each of length 1.
    pub fn embed(&self, batch: &Batch, rows: Rows) -> anyhow::Result<Vec<f32>> {
        let &Batch { ref ids, ref lengths, seq } = batch;
        let (device, batch) = (&self.device, lengths.len());
        let pooled = if rows == Rows::Packed {
            let sequences = CuSeqlens::from_lengths(lengths)?;
            let valid = |(row, &length): (&[u32], &usize)| row[..length].to_vec();
            let ids: Vec<u32> = ids.chunks(seq.max(1)).zip(lengths).flat_map(valid).collect();
            let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
            let total = ids.len();
            let (ids, positions) = (Tensor::new(ids, device)?, Tensor::new(positions, device)?);
            let x = self.forward(&ids, &positions, &Attend::Ours(Attention::packed(&sequences, &sequences)))?;
            let mut start = 0;
            let own = lengths.iter().map(|&length| {
                start += length;
                start - length..start
            });
            self.means(own, total, (batch, total))?.matmul(&x)?
        } else {
            let attend = match rows {
                Rows::Candle => {
                    let added = lengths.iter().flat_map(|&length| (0..seq).map(move |at| at < length));
                    // Less than any score, and a number of 16 bits too.
                    let added: Vec<f32> = added.map(|is_valid| if is_valid { 0.0 } else { -1e4 }).collect();
                    Attend::Candle(Tensor::from_vec(added, (batch, 1, 1, seq), device)?.to_dtype(self.dtype)?)
                }
                _ => {
                    Attend::Ours(Attention::masked(&VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, lengths)?)?))
                }
            };
            let ids = Tensor::from_slice(ids, (batch, seq), device)?;
            let x = self.forward(&ids, &Tensor::arange(0, seq as u32, device)?, &attend)?;
            self.means(lengths.iter().map(|&length| 0..length), seq, (batch, 1, seq))?.matmul(&x)?.squeeze(1)?
        };
        let width = pooled.dim(1)?;
        let pooled = pooled.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        // Each is a mean already: to length 1.
        Ok(mean_pool(&pooled, &vec![1; batch], 1, width))
    }

    /// What makes the means of these ranges of `rows` rows each, as a matrix of this shape.
    fn means<S: Into<Shape>>(&self, of: impl Iterator<Item = Range<usize>>, rows: usize, shape: S) -> Result<Tensor> {
        let weights = of.flat_map(|range| {
            let weight = 1.0 / range.len().max(1) as f32;
            (0..rows).map(move |row| if range.contains(&row) { weight } else { 0.0 })
        });
        Tensor::from_vec(weights.collect::<Vec<f32>>(), shape, &self.device)?.to_dtype(self.dtype)
    }

    /// Hidden states of tokens that lie in any way that `attention` is for; `positions` broadcast over `ids`.
    fn forward(&self, ids: &Tensor, positions: &Tensor, attention: &Attend) -> Result<Tensor> {
        let x = self.words.forward(ids)?.broadcast_add(&self.token_type)?;
        let x = self.norm.forward(&x.broadcast_add(&self.positions.forward(positions)?)?)?;
        self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, attention))
    }
}

impl Layer {
    fn load(weights: &VarBuilder<'_>, config: &Config) -> Result<Self> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let epsilon = f64::from(config.layer_norm_eps);
        let (own, attention, output) =
            (weights.pp("attention.self"), weights.pp("attention.output"), weights.pp("output"));
        Ok(Self {
            query: linear(hidden, hidden, own.pp("query"))?,
            key: linear(hidden, hidden, own.pp("key"))?,
            value: linear(hidden, hidden, own.pp("value"))?,
            attention_output: linear(hidden, hidden, attention.pp("dense"))?,
            attention_norm: layer_norm(hidden, epsilon, attention.pp("LayerNorm"))?,
            intermediate: linear(hidden, intermediate, weights.pp("intermediate.dense"))?,
            output: linear(intermediate, hidden, output.pp("dense"))?,
            output_norm: layer_norm(hidden, epsilon, output.pp("LayerNorm"))?,
            heads: config.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor, attention: &Attend) -> Result<Tensor> {
        // [.., hidden] is [.., heads, head_dim] as it lies.
        let (shape, hidden) = (x.dims(), x.dim(D::Minus1)?);
        let by_head = [&shape[..shape.len() - 1], &[self.heads, hidden / self.heads]].concat();
        let project = |linear: &Linear| linear.forward(x)?.reshape(&by_head[..]);
        let attended = attention.forward(&project(&self.query)?, &project(&self.key)?, &project(&self.value)?)?;
        let attended = self.attention_output.forward(&attended.reshape(shape)?)?;
        let x = self.attention_norm.forward(&(attended + x)?)?;
        let inner = self.intermediate.forward(&x)?.gelu_erf()?;
        self.output_norm.forward(&(self.output.forward(&inner)? + x)?)
    }
}
