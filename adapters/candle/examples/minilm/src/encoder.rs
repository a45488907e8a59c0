//! BERT as candle-transformers has it, layer by layer of candle-nn, but for its attention.

use candle_core::{D, Device, Module, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, VarBuilder, embedding, layer_norm, linear};
use embed_sentences::model::Config;
use embed_sentences::ops::mean_pool;
use embed_sentences::tokens::Batch;
use varlen_fa_candle::Attention;
use varlen_fa_candle::varlen_fa::{CuSeqlens, KeyMask, VarlenMeta};

/// How the tokens of a batch lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// `[B, S]`, with padding: linear layers compute it, attention does not.
    Padded,
    /// `[total]`, sentence after sentence: nothing computes padding.
    Packed,
}

/// The model without its pooling.
pub struct Encoder {
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
            words: embedding(config.vocab_size, hidden, of.pp("word_embeddings"))?,
            positions: embedding(config.max_position_embeddings, hidden, of.pp("position_embeddings"))?,
            token_type: token_types.get(0)?,
            norm: layer_norm(hidden, f64::from(config.layer_norm_eps), of.pp("LayerNorm"))?,
            layers,
        })
    }

    /// The embeddings of the batch's sentences, `[sentences, hidden]`, each of length 1.
    pub fn embed(&self, batch: &Batch, rows: Rows) -> anyhow::Result<Vec<f32>> {
        match rows {
            Rows::Padded => self.embed_padded(batch),
            Rows::Packed => self.embed_packed(batch),
        }
    }

    fn embed_padded(&self, batch: &Batch) -> anyhow::Result<Vec<f32>> {
        let &Batch { ref ids, ref lengths, seq } = batch;
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, lengths)?)?;
        let ids = Tensor::from_slice(ids, (lengths.len(), seq), &Device::Cpu)?;
        let positions = Tensor::arange(0, seq as u32, &Device::Cpu)?;
        let x = self.forward(&ids, &positions, &Attention::masked(&meta))?;
        let width = x.dim(2)?;
        Ok(mean_pool(&x.flatten_all()?.to_vec1::<f32>()?, lengths, seq, width))
    }

    fn embed_packed(&self, batch: &Batch) -> anyhow::Result<Vec<f32>> {
        let &Batch { ref ids, ref lengths, seq } = batch;
        let sequences = CuSeqlens::from_lengths(lengths)?;
        let valid = |(row, &length): (&[u32], &usize)| row[..length].to_vec();
        let ids: Vec<u32> = ids.chunks(seq.max(1)).zip(lengths).flat_map(valid).collect();
        let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
        let (ids, positions) = (Tensor::new(ids, &Device::Cpu)?, Tensor::new(positions, &Device::Cpu)?);
        let x = self.forward(&ids, &positions, &Attention::packed(&sequences, &sequences))?;
        let (width, x) = (x.dim(1)?, x.flatten_all()?.to_vec1::<f32>()?);
        let mut rest = &x[..];
        let of_sentence = |&length: &usize| {
            let (rows, others) = rest.split_at(length * width);
            rest = others;
            mean_pool(rows, &[length], length, width)
        };
        Ok(lengths.iter().flat_map(of_sentence).collect())
    }

    /// Hidden states of tokens that lie in any way that `attention` is for; `positions` broadcast over `ids`.
    fn forward(&self, ids: &Tensor, positions: &Tensor, attention: &Attention) -> Result<Tensor> {
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

    fn forward(&self, x: &Tensor, attention: &Attention) -> Result<Tensor> {
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
