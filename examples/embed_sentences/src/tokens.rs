//! Text to token ids, and token ids to padded batches.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use tokenizers::{Tokenizer, TruncationParams};

use crate::model_files::require_file;

/// The model's WordPiece tokenizer, set to add `[CLS]` and `[SEP]`, to truncate at the model's limit and never to pad.
#[derive(Debug)]
pub struct SentenceTokenizer {
    tokenizer: Tokenizer,
    max_tokens: usize,
    pad_id: u32,
}

/// Token ids of one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Ids, with those of `[CLS]` and `[SEP]`.
    pub ids: Vec<u32>,
    /// Whether the sentence was longer and lost its end.
    pub truncated: bool,
}

impl SentenceTokenizer {
    /// Reads `tokenizer.json` in `model_dir`; sentences are cut at `max_tokens`.
    pub fn load(model_dir: &Path, max_tokens: usize) -> Result<Self> {
        let path = require_file(model_dir, "tokenizer.json")?;
        let mut tokenizer =
            Tokenizer::from_file(&path).map_err(|error| anyhow!("cannot read {}: {error}", path.display()))?;
        // The file asks for truncation at 128 and padding to 128: here the batch's longest sentence decides.
        let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        tokenizer
            .with_padding(None)
            .with_truncation(Some(truncation))
            .map_err(|error| anyhow!("cannot truncate at {max_tokens} tokens: {error}"))?;
        let pad_id =
            tokenizer.token_to_id("[PAD]").with_context(|| format!("{} has no [PAD] token", path.display()))?;
        Ok(Self { tokenizer, max_tokens, pad_id })
    }

    /// The most tokens a sentence keeps.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The id that fills padded positions.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// Tokenises each sentence.
    pub fn encode(&self, sentences: &[String]) -> Result<Vec<Tokens>> {
        let inputs = sentences.iter().map(String::as_str).collect();
        let encodings = self
            .tokenizer
            .encode_batch_fast(inputs, true)
            .map_err(|error| anyhow!("cannot tokenise the text: {error}"))?;
        Ok(encodings
            .iter()
            .map(|encoding| Tokens {
                ids: encoding.get_ids().to_vec(),
                truncated: !encoding.get_overflowing().is_empty(),
            })
            .collect())
    }
}

/// A padded batch: `ids` is `[lengths.len(), seq]`, and the first `lengths[b]` ids of batch row `b` are valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, row by row.
    pub ids: Vec<u32>,
    /// Valid tokens of each batch row.
    pub lengths: Vec<usize>,
    /// Length of the longest sentence, to which all rows are padded.
    pub seq: usize,
}

impl Batch {
    /// Pads the sentences to the longest of them.
    pub fn pad(sentences: &[Tokens], pad_id: u32) -> Self {
        let lengths: Vec<usize> = sentences.iter().map(|sentence| sentence.ids.len()).collect();
        let seq = lengths.iter().copied().max().unwrap_or(0);
        let mut ids = Vec::with_capacity(seq * lengths.len());
        for sentence in sentences {
            ids.extend_from_slice(&sentence.ids);
            ids.resize(ids.len() + seq - sentence.ids.len(), pad_id);
        }
        Self { ids, lengths, seq }
    }

    /// Valid tokens of the batch.
    pub fn valid(&self) -> usize {
        self.lengths.iter().sum()
    }
}

/// Cuts the sentences, in their order, into batches of at most `size` (at least 1).
pub fn batches(sentences: &[Tokens], size: usize, pad_id: u32) -> Vec<Batch> {
    sentences.chunks(size.max(1)).map(|chunk| Batch::pad(chunk, pad_id)).collect()
}

/// The fraction of the batches' positions that is padding.
pub fn padding_fraction(batches: &[Batch]) -> f64 {
    let positions: usize = batches.iter().map(|batch| batch.ids.len()).sum();
    let valid: usize = batches.iter().map(Batch::valid).sum();
    if positions == 0 { 0.0 } else { (positions - valid) as f64 / positions as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[u32]) -> Tokens {
        Tokens { ids: ids.to_vec(), truncated: false }
    }

    #[test]
    fn batches_pad_to_their_own_longest_sentence() {
        let sentences = [tokens(&[1, 2]), tokens(&[3, 4, 5]), tokens(&[6])];
        let batches = batches(&sentences, 2, 0);
        assert_eq!(batches[0], Batch { ids: vec![1, 2, 0, 3, 4, 5], lengths: vec![2, 3], seq: 3 });
        assert_eq!(batches[1], Batch { ids: vec![6], lengths: vec![1], seq: 1 });
        assert_eq!(padding_fraction(&batches), 1.0 / 7.0);
    }

    #[test]
    fn no_text_is_no_batch_and_no_padding() {
        assert!(batches(&[], 4, 0).is_empty());
        assert_eq!(padding_fraction(&[]), 0.0);
        assert_eq!(Batch::pad(&[], 0), Batch { ids: vec![], lengths: vec![], seq: 0 });
    }
}
