//! candle-transformers' own BERT.

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::BertModel;
use embed_sentences::ops::mean_pool;
use embed_sentences::tokens::Batch;

/// The model, as candle-transformers has it.
pub struct Peer(BertModel);

impl Peer {
    /// The weights of a BERT model, and the contents of its `config.json`.
    pub fn load(weights: VarBuilder<'_>, config: &[u8]) -> anyhow::Result<Self> {
        Ok(Self(BertModel::load(weights, &serde_json::from_slice(config)?)?))
    }

    /// The embeddings of the batch's sentences, pooled as ours are.
    pub fn embed(&self, batch: &Batch) -> Result<Vec<f32>> {
        let &Batch { ref ids, ref lengths, seq } = batch;
        let ids = Tensor::from_slice(ids, (lengths.len(), seq), &Device::Cpu)?;
        let kept = lengths.iter().flat_map(|&length| (0..seq).map(move |token| u32::from(token < length)));
        let mask = Tensor::from_vec(kept.collect::<Vec<u32>>(), (lengths.len(), seq), &Device::Cpu)?;
        let x = self.0.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let width = x.dim(2)?;
        Ok(mean_pool(&x.flatten_all()?.to_vec1::<f32>()?, lengths, seq, width))
    }
}
