//! The BERT encoder of all-MiniLM-L6-v2, read from the files that `scripts/fetch_minilm.sh` leaves.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::attention::{BatchMask, SelfAttention};
use crate::model_files::require_file;
use crate::ops::{LayerNorm, Linear, add, gelu, mean_pool};
use crate::tokens::Batch;

/// What `config.json` says of the model.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Width of a token's vector.
    pub hidden_size: usize,
    /// Width between the two feed-forward layers.
    pub intermediate_size: usize,
    /// Attention heads of each layer.
    pub num_attention_heads: usize,
    /// Encoder layers.
    pub num_hidden_layers: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// The constant that layer normalisation adds to the variance.
    pub layer_norm_eps: f32,
    /// Activation of the feed-forward layers.
    pub hidden_act: String,
}

impl Config {
    fn load(model_dir: &Path) -> Result<Self> {
        let path = require_file(model_dir, "config.json")?;
        let read = || -> Result<Self> {
            let config: Self = serde_json::from_slice(&fs::read(&path)?)?;
            let heads = config.num_attention_heads;
            ensure!(
                heads > 0 && config.hidden_size.is_multiple_of(heads),
                "hidden_size {} is not a multiple of num_attention_heads {heads}",
                config.hidden_size
            );
            ensure!(config.hidden_act == "gelu", "hidden_act is {:?}, expected \"gelu\"", config.hidden_act);
            Ok(config)
        };
        read().with_context(|| format!("cannot use {}", path.display()))
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { num_hidden_layers: layers, num_attention_heads: heads, hidden_size: hidden, .. } = self;
        write!(f, "{layers} layers, {heads} heads of {}, hidden size {hidden}", self.head_dim())
    }
}

/// The model: embeddings, encoder layers, mean pooling.
#[derive(Debug)]
pub struct Encoder {
    config: Config,
    words: Vec<f32>,
    /// Position embeddings with the one token type of single sentences added.
    positions: Vec<f32>,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    /// Query, key and value projections in one: `[3·hidden, hidden]`.
    qkv: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

impl Encoder {
    /// Reads `config.json` and `model.safetensors` in `model_dir`.
    pub fn load(model_dir: &Path) -> Result<Self> {
        let config = Config::load(model_dir)?;
        let path = require_file(model_dir, "model.safetensors")?;
        let read = || -> Result<Self> {
            let bytes = fs::read(&path)?;
            Self::from_weights(config, &Weights(SafeTensors::deserialize(&bytes)?))
        };
        read().with_context(|| format!("cannot use {}", path.display()))
    }

    fn from_weights(config: Config, weights: &Weights<'_>) -> Result<Self> {
        let (hidden, epsilon) = (config.hidden_size, config.layer_norm_eps);
        let mut positions =
            weights.tensor("embeddings.position_embeddings.weight", &[config.max_position_embeddings, hidden])?;
        let token_types = weights.tensor("embeddings.token_type_embeddings.weight", &[2, hidden])?;
        for position in positions.chunks_exact_mut(hidden) {
            add(position, &token_types[..hidden]);
        }
        Ok(Self {
            words: weights.tensor("embeddings.word_embeddings.weight", &[config.vocab_size, hidden])?,
            positions,
            norm: weights.layer_norm("embeddings.LayerNorm", hidden, epsilon)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| Layer::from_weights(&config, weights, &format!("encoder.layer.{index}")))
                .collect::<Result<_>>()?,
            config,
        })
    }

    /// What `config.json` says of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The embeddings of the batch's sentences, `[batch, hidden]`, each of length 1. Every layer's attention runs on
    /// `attention`'s device under `mask`, which is the batch's.
    pub fn embed(&self, batch: &Batch, mask: &BatchMask, attention: &mut SelfAttention) -> Result<Vec<f32>> {
        let (hidden, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let mut x = self.embed_tokens(batch)?;
        for layer in &self.layers {
            let qkv = layer.qkv.forward(&x);
            let shape = [batch.lengths.len(), batch.seq, 3 * heads, self.config.head_dim()];
            let attended = attention.forward(&qkv, shape, mask)?;
            layer.finish(&mut x, &attended);
        }
        Ok(mean_pool(&x, &batch.lengths, batch.seq, hidden))
    }

    fn embed_tokens(&self, batch: &Batch) -> Result<Vec<f32>> {
        let hidden = self.config.hidden_size;
        let longest = self.config.max_position_embeddings;
        ensure!(batch.seq <= longest, "a batch of {} tokens, but the model takes at most {longest}", batch.seq);
        if let Some(id) = batch.ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
            bail!("token id {id}, but the model has {} ids from 0", self.config.vocab_size);
        }
        let mut x = vec![0.0; batch.ids.len() * hidden];
        x.par_chunks_exact_mut(hidden).zip(&batch.ids).enumerate().for_each(|(index, (token, &id))| {
            token.copy_from_slice(&self.words[id as usize * hidden..][..hidden]);
            add(token, &self.positions[index % batch.seq * hidden..][..hidden]);
        });
        self.norm.forward(&mut x);
        Ok(x)
    }
}

impl Layer {
    fn from_weights(config: &Config, weights: &Weights<'_>, prefix: &str) -> Result<Self> {
        let (hidden, intermediate, epsilon) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let linear =
            |name: &str, outputs, inputs| weights.linear(&[&format!("{prefix}.{name}.dense")], outputs, inputs);
        let norm = |name: &str| weights.layer_norm(&format!("{prefix}.{name}.LayerNorm"), hidden, epsilon);
        let qkv = ["query", "key", "value"].map(|part| format!("{prefix}.attention.self.{part}"));
        Ok(Self {
            qkv: weights.linear(&[&qkv[0], &qkv[1], &qkv[2]], hidden, hidden)?,
            attention_output: linear("attention.output", hidden, hidden)?,
            attention_norm: norm("attention.output")?,
            intermediate: linear("intermediate", intermediate, hidden)?,
            output: linear("output", hidden, intermediate)?,
            output_norm: norm("output")?,
        })
    }

    /// The layer after its attention; each half adds its input and normalises afterwards.
    fn finish(&self, x: &mut [f32], attended: &[f32]) {
        add(x, &self.attention_output.forward(attended));
        self.attention_norm.forward(x);
        let mut inner = self.intermediate.forward(x);
        gelu(&mut inner);
        add(x, &self.output.forward(&inner));
        self.output_norm.forward(x);
    }
}

/// The weights file, read by tensor name.
struct Weights<'a>(SafeTensors<'a>);

impl Weights<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.0.tensor(name).with_context(|| format!("no tensor {name}"))?;
        ensure!(tensor.dtype() == Dtype::F32, "{name}: element type {:?}, expected F32", tensor.dtype());
        ensure!(tensor.shape() == shape, "{name}: shape {:?}, expected {shape:?}", tensor.shape());
        let (values, _) = tensor.data().as_chunks::<4>();
        Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// One linear layer of the named ones, their outputs side by side.
    fn linear(&self, names: &[&str], outputs: usize, inputs: usize) -> Result<Linear> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            weight.extend(self.tensor(&format!("{name}.weight"), &[outputs, inputs])?);
            bias.extend(self.tensor(&format!("{name}.bias"), &[outputs])?);
        }
        Linear::new(weight, bias, inputs).with_context(|| format!("{}: empty layer", names.join(", ")))
    }

    fn layer_norm(&self, name: &str, width: usize, epsilon: f32) -> Result<LayerNorm> {
        let weight = self.tensor(&format!("{name}.weight"), &[width])?;
        let bias = self.tensor(&format!("{name}.bias"), &[width])?;
        LayerNorm::new(weight, bias, epsilon).with_context(|| format!("{name}: empty layer"))
    }
}
