//! Reference embeddings of an independent implementation (`testdata/make_reference.py`), and the comparison with them.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// The bundled text, one sentence a line.
pub const SENTENCES: &str = include_str!("../testdata/sentences.txt");

/// The reference embeddings of [`SENTENCES`].
pub const REFERENCE: &str = include_str!("../testdata/reference.json");

/// The least cosine to a reference vector that counts as agreement.
pub const MIN_COSINE: f64 = 0.9999;

/// Reference embeddings and where they come from.
#[derive(Clone, Debug, Deserialize)]
pub struct Reference {
    /// How they were made.
    pub recipe: String,
    /// One for each sentence.
    pub sentences: Vec<ReferenceSentence>,
}

/// One sentence of the reference.
#[derive(Clone, Debug, Deserialize)]
pub struct ReferenceSentence {
    /// The sentence.
    pub text: String,
    /// How many tokens it has.
    pub tokens: usize,
    /// Its embedding, of length 1.
    pub embedding: Vec<f64>,
}

/// The least cosine of a comparison, and the sentence it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Least cosine over all sentences.
    pub min_cosine: f64,
    /// Sentence with that cosine.
    pub sentence: usize,
}

impl Reference {
    /// Reads the JSON of `testdata/make_reference.py`.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).context("not a reference file of testdata/make_reference.py")
    }

    /// Fails where the reference is for other sentences than these.
    pub fn check_sentences(&self, sentences: &[String]) -> Result<()> {
        ensure!(
            self.sentences.len() == sentences.len(),
            "the reference has {} sentences, the text has {}",
            self.sentences.len(),
            sentences.len()
        );
        for (index, (expected, text)) in self.sentences.iter().zip(sentences).enumerate() {
            let expected = &expected.text;
            ensure!(expected == text, "sentence {} is not the reference's: {text:?}, expected {expected:?}", index + 1);
        }
        Ok(())
    }

    /// Compares `embeddings`, `[sentences.len(), width]`, with the reference.
    pub fn compare(&self, embeddings: &[f32], width: usize) -> Result<Agreement> {
        let count = self.sentences.len();
        ensure!(count > 0, "the reference has no sentences");
        ensure!(
            embeddings.len() == count * width,
            "{} embedding values for {count} sentences of {width}",
            embeddings.len()
        );
        let mut worst = Agreement { min_cosine: f64::INFINITY, sentence: 0 };
        for (index, expected) in self.sentences.iter().enumerate() {
            let embedding = &embeddings[index * width..][..width];
            ensure!(
                expected.embedding.len() == width,
                "the reference's sentence {} has {} values, expected {width}",
                index + 1,
                expected.embedding.len()
            );
            let cosine = cosine(embedding, &expected.embedding);
            ensure!(cosine.is_finite(), "the embedding of sentence {} is not finite: {:?}", index + 1, expected.text);
            if cosine < worst.min_cosine {
                worst = Agreement { min_cosine: cosine, sentence: index };
            }
        }
        Ok(worst)
    }
}

/// The cosine of the angle between `a` and `b`; not a number where either has length 0.
fn cosine(a: &[f32], b: &[f64]) -> f64 {
    let (mut product, mut a_square, mut b_square) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().map(|value| f64::from(*value)).zip(b) {
        product += a * b;
        a_square += a * a;
        b_square += b * b;
    }
    product / (a_square * b_square).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference() -> Result<Reference> {
        let json = r#"{"recipe": "by hand", "sentences": [
            {"text": "a", "tokens": 3, "embedding": [1.0, 0.0]}, {"text": "b", "tokens": 3, "embedding": [0.6, 0.8]}]}"#;
        Reference::from_json(json)
    }

    fn text(sentences: &[&str]) -> Vec<String> {
        sentences.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_least_cosine_counts() -> Result<()> {
        let agreement = reference()?.compare(&[1.0, 0.0, 0.0, 1.0], 2)?;
        assert_eq!(agreement.sentence, 1);
        assert!((agreement.min_cosine - 0.8).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn another_text_is_an_error() -> Result<()> {
        let reference = reference()?;
        let check = |texts: &[&str], message: Option<&str>| {
            let error = reference.check_sentences(&text(texts)).err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), message);
        };
        check(&["a", "b"], None);
        check(&["a"], Some("the reference has 2 sentences, the text has 1"));
        check(&["a", "c"], Some("sentence 2 is not the reference's: \"c\", expected \"b\""));
        Ok(())
    }

    #[test]
    fn broken_vectors_are_errors() -> Result<()> {
        let reference = reference()?;
        let check = |embeddings: &[f32], message: &str| {
            let error = reference.compare(embeddings, 2).err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), Some(message));
        };
        check(&[1.0; 3], "3 embedding values for 2 sentences of 2");
        let not_finite = "the embedding of sentence 2 is not finite: \"b\"";
        check(&[1.0, 0.0, f32::NAN, 1.0], not_finite);
        check(&[1.0, 0.0, 0.0, 0.0], not_finite);
        Ok(())
    }

    #[test]
    fn the_bundled_reference_is_for_the_bundled_text() -> Result<()> {
        let reference = Reference::from_json(REFERENCE)?;
        let texts: Vec<&str> = reference.sentences.iter().map(|sentence| sentence.text.as_str()).collect();
        assert_eq!(texts, SENTENCES.lines().collect::<Vec<_>>());
        Ok(())
    }
}
