//! The model against the reference vectors, on the CPU device.
//!
//! The model is no part of the repository: `scripts/fetch_minilm.sh` downloads it into `models/all-MiniLM-L6-v2`;
//! `VARLEN_FA_MINILM` names another folder. Without it these tests are skipped and say so, or fail if
//! `VARLEN_FA_TEST_REQUIRE_MODEL=1`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use anyhow::Result;
use embed_sentences::attention::{BatchMask, Padding};
use embed_sentences::embed::Run;
use embed_sentences::model::Encoder;
use embed_sentences::model_files::require_file;
use embed_sentences::reference::{MIN_COSINE, REFERENCE, Reference, SENTENCES};
use embed_sentences::tokens::{SentenceTokenizer, Tokens, batches, padding_fraction};
use varlen_fa::{Device, DeviceChoice};

struct Model {
    encoder: Encoder,
    tokenizer: SentenceTokenizer,
}

/// The model, or `None` after saying why there is none.
fn model() -> Result<Option<Model>> {
    let dir = match std::env::var_os("VARLEN_FA_MINILM") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/all-MiniLM-L6-v2"),
    };
    let missing = ["config.json", "model.safetensors", "tokenizer.json"].map(|name| require_file(&dir, name).err());
    if let Some(error) = missing.into_iter().flatten().next() {
        if std::env::var_os("VARLEN_FA_TEST_REQUIRE_MODEL").is_some_and(|value| value == "1") {
            return Err(error.context("VARLEN_FA_TEST_REQUIRE_MODEL=1, and the model is missing"));
        }
        // Past the test harness, which keeps what a passing test prints to itself.
        static SAID: Once = Once::new();
        SAID.call_once(|| drop(writeln!(io::stderr(), "skipped: the tests that need the model: {error}")));
        return Ok(None);
    }
    let encoder = Encoder::load(&dir)?;
    let tokenizer = SentenceTokenizer::load(&dir, encoder.config().max_position_embeddings)?;
    Ok(Some(Model { encoder, tokenizer }))
}

fn sentences() -> Vec<String> {
    SENTENCES.lines().map(str::to_owned).collect()
}

/// The message of an error; empty where there is none.
fn message_of<T>(result: Result<T>) -> String {
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

impl Model {
    fn embed(&self, padding: Padding, sentences: &[Tokens], batch_size: usize) -> Result<Vec<f32>> {
        // Tests run side by side, and the CPU device is one and times one caller.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut run = Run::new(&Device::new(DeviceChoice::Cpu)?, padding);
        for batch in batches(sentences, batch_size, self.tokenizer.pad_id()) {
            run.push(&self.encoder, &batch)?;
        }
        Ok(run.embeddings)
    }

    fn width(&self) -> usize {
        self.encoder.config().hidden_size
    }
}

#[test]
fn tokens_are_the_references_and_batches_pad_to_their_longest() -> Result<()> {
    let Some(model) = model()? else { return Ok(()) };
    let tokens = model.tokenizer.encode(&sentences())?;
    let lengths: Vec<usize> = tokens.iter().map(|tokens| tokens.ids.len()).collect();
    let expected: Vec<usize> = Reference::from_json(REFERENCE)?.sentences.iter().map(|s| s.tokens).collect();
    assert_eq!(lengths, expected);
    let batches = batches(&tokens, 32, model.tokenizer.pad_id());
    assert_eq!((batches.len(), batches[0].seq), (1, 66));
    assert!(padding_fraction(&batches) > 0.5);
    Ok(())
}

#[test]
fn both_paths_agree_with_the_reference() -> Result<()> {
    let Some(model) = model()? else { return Ok(()) };
    let reference = Reference::from_json(REFERENCE)?;
    reference.check_sentences(&sentences())?;
    let tokens = model.tokenizer.encode(&sentences())?;
    for (padding, batch_size) in [(Padding::KeyMask, 7), (Padding::Varlen, 7), (Padding::Varlen, 1)] {
        let embeddings = model.embed(padding, &tokens, batch_size)?;
        let agreement = reference.compare(&embeddings, model.width())?;
        println!("{} in batches of {batch_size}: min cosine {:.9}", padding.name(), agreement.min_cosine);
        assert!(agreement.min_cosine >= MIN_COSINE, "{padding:?}, batches of {batch_size}: {agreement:?}");
    }
    Ok(())
}

#[test]
fn a_long_sentence_is_cut_at_the_models_limit() -> Result<()> {
    let Some(model) = model()? else { return Ok(()) };
    let tokens = model.tokenizer.encode(&["word ".repeat(600), "word ".repeat(510), "word ".repeat(511)])?;
    let found: Vec<_> = tokens.iter().map(|tokens| (tokens.ids.len(), tokens.truncated)).collect();
    assert_eq!(found, [(512, true), (512, false), (512, true)]);
    let embeddings = model.embed(Padding::Varlen, &tokens[..1], 1)?;
    let norm: f32 = embeddings.iter().map(|value| value * value).sum();
    assert!((norm - 1.0).abs() < 1e-5, "length {norm}");
    Ok(())
}

#[test]
fn a_batch_past_the_models_limit_is_an_error() -> Result<()> {
    let Some(model) = model()? else { return Ok(()) };
    let too_long = Tokens { ids: vec![1; 513], truncated: false };
    let message = message_of(model.embed(Padding::Varlen, &[too_long], 1));
    assert_eq!(message, "a batch of 513 tokens, but the model takes at most 512");
    let unknown = Tokens { ids: vec![101, 30522, 102], truncated: false };
    let message = message_of(model.embed(Padding::Varlen, &[unknown], 1));
    assert_eq!(message, "token id 30522, but the model has 30522 ids from 0");
    Ok(())
}

#[test]
fn a_missing_model_names_the_folder_and_the_script() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-model-here");
    for message in [message_of(Encoder::load(&dir)), message_of(SentenceTokenizer::load(&dir, 512))] {
        assert!(message.contains(&*dir.to_string_lossy()), "{message}");
        assert!(message.contains("scripts/fetch_minilm.sh"), "{message}");
    }
}

#[test]
fn an_incomplete_model_names_the_file_and_the_script() -> Result<()> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("incomplete-model");
    std::fs::create_dir_all(&dir)?;
    let message = message_of(Encoder::load(&dir));
    assert!(message.contains("config.json") && message.contains("scripts/fetch_minilm.sh"), "{message}");
    Ok(())
}

#[test]
fn masks_follow_the_lengths() -> Result<()> {
    let BatchMask::Varlen(meta) = BatchMask::new(Padding::Varlen, 4, &[3, 0, 4])? else {
        anyhow::bail!("no metadata");
    };
    assert_eq!(meta.cu_seqlens().as_slice(), [0, 3, 3, 7]);
    assert!(BatchMask::new(Padding::Varlen, 4, &[5]).is_err());
    Ok(())
}
