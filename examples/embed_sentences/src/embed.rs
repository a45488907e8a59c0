//! A whole text through the encoder, timed.

use std::time::{Duration, Instant};

use anyhow::Result;
use varlen_fa::Device;

use crate::attention::{BatchMask, Padding, SelfAttention};
use crate::model::Encoder;
use crate::tokens::Batch;

/// Embeddings of a text under one way to treat padding, and what they cost.
#[derive(Debug)]
pub struct Run {
    padding: Padding,
    attention: SelfAttention,
    /// `[sentences, hidden]`, each of length 1.
    pub embeddings: Vec<f32>,
    /// Time to build masks and metadata, once per batch.
    pub mask_time: Duration,
    /// Time of everything from token ids to embeddings, masks and attention included.
    pub total_time: Duration,
}

impl Run {
    /// An empty run on `device`.
    pub fn new(device: &Device, padding: Padding) -> Self {
        Self {
            padding,
            attention: SelfAttention::new(device),
            embeddings: Vec::new(),
            mask_time: Duration::ZERO,
            total_time: Duration::ZERO,
        }
    }

    /// Embeds one more batch.
    pub fn push(&mut self, encoder: &Encoder, batch: &Batch) -> Result<()> {
        let start = Instant::now();
        let mask = BatchMask::new(self.padding, batch.seq, &batch.lengths)?;
        self.mask_time += start.elapsed();
        let embeddings = encoder.embed(batch, &mask, &mut self.attention)?;
        self.total_time += start.elapsed();
        self.embeddings.extend(embeddings);
        Ok(())
    }

    /// Embeds a batch and forgets it, so that the next one finds the device and its kernels ready.
    pub fn warm_up(&mut self, encoder: &Encoder, batch: &Batch) -> Result<()> {
        self.push(encoder, batch)?;
        self.embeddings.clear();
        self.attention.reset();
        self.mask_time = Duration::ZERO;
        self.total_time = Duration::ZERO;
        Ok(())
    }

    /// How padding is treated.
    pub fn padding(&self) -> Padding {
        self.padding
    }

    /// The attention, with its time and plans.
    pub fn attention(&self) -> &SelfAttention {
        &self.attention
    }
}
