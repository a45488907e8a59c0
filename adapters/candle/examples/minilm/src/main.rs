//! all-MiniLM-L6-v2 by candle's layers and varlen-fa's attention, padded and packed, beside candle-transformers' own BERT: checked
//! against reference vectors, then timed in turns on sentences of unequal length.
//!
//! ```text
//! scripts/fetch_minilm.sh
//! cd adapters/candle && RUSTFLAGS="-C target-cpu=native" cargo run --release -p candle_minilm
//! ```
//!
//! candle chooses its instructions when it is compiled, so it is built for this processor. With `--features cuda` and `--device cuda`
//! it runs on a GPU, in f16.

mod encoder;
#[cfg(feature = "peer")]
mod peer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use clap::{Parser, ValueEnum};
use embed_sentences::model::Config;
use embed_sentences::model_files::require_file;
use embed_sentences::reference::{MIN_COSINE, REFERENCE, Reference, SENTENCES};
use embed_sentences::tokens::{Batch, SentenceTokenizer, Tokens, batches, padding_fraction};
use rand::seq::IndexedRandom;
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, LogNormal};

use crate::encoder::{Encoder, Rows};
#[cfg(feature = "peer")]
use crate::peer::Peer;

/// What sentences are made of.
const WORDS: &str = "the a of padding attention keys rows mask computes only what is valid on every device and no more";

/// MiniLM by candle, with attention of varlen-fa and with its own.
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder of the model, as scripts/fetch_minilm.sh leaves it.
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../../models/all-MiniLM-L6-v2"))]
    model: PathBuf,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
    /// Draw the weights instead of reading them, and check nothing against the reference vectors: the model's folder needs
    /// `config.json` and `tokenizer.json` alone.
    #[arg(long)]
    random_weights: bool,
    /// Sentences to time.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    sentences: usize,
    /// Sentences of a batch; each batch is padded to its longest.
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch_size: usize,
    /// Rounds of all ways in turns; the fastest of each counts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: usize,
}

/// A device, and the element type that it computes in.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum On {
    /// f32.
    Cpu,
    /// The first GPU, in f16.
    Cuda,
}

impl On {
    fn open(self) -> Result<(Device, DType)> {
        Ok(match self {
            Self::Cpu => (Device::Cpu, DType::F32),
            Self::Cuda => (Device::new_cuda_with_stream(0).context("built with --features cuda?")?, DType::F16),
        })
    }
}

/// A way to compute the embeddings.
#[derive(Clone, Copy, Debug)]
enum Way {
    #[cfg(feature = "peer")]
    Transformers,
    Layers(Rows),
}

/// The first is what the others are compared with.
const WAYS: &[(&str, Way)] = &[
    #[cfg(feature = "peer")]
    ("candle-transformers, padded", Way::Transformers),
    ("candle's attention, padded", Way::Layers(Rows::Candle)),
    ("varlen-fa, padded", Way::Layers(Rows::Padded)),
    ("varlen-fa, packed rows", Way::Layers(Rows::Packed)),
];

/// What one way made of the sentences.
struct Run {
    name: &'static str,
    way: Way,
    fastest: Duration,
    made: Vec<f32>,
}

struct Model {
    tokenizer: SentenceTokenizer,
    encoder: Encoder,
    /// On the CPU alone: in 16 bits its mask of valid tokens is 0 · −∞.
    #[cfg(feature = "peer")]
    peer: Option<Peer>,
    width: usize,
    has_real_weights: bool,
}

impl Model {
    fn load(folder: &Path, on: On, random_weights: bool) -> Result<Self> {
        let (device, dtype) = on.open()?;
        let path = require_file(folder, "config.json")?;
        let json = fs::read(&path)?;
        let config: Config =
            serde_json::from_slice(&json).with_context(|| format!("cannot read {}", path.display()))?;
        let weights = match random_weights {
            false => candle_core::safetensors::load_buffer(
                &fs::read(require_file(folder, "model.safetensors")?)?,
                &Device::Cpu,
            )?,
            true => {
                // Variables are drawn when they are first asked for.
                let drawn = VarMap::new();
                Encoder::load(&VarBuilder::from_varmap(&drawn, DType::F32, &Device::Cpu), &config)?;
                let drawn = drawn.data().lock().unwrap_or_else(PoisonError::into_inner);
                drawn.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone())).collect()
            }
        };
        let weights = VarBuilder::from_tensors(weights, dtype, &device);
        Ok(Self {
            tokenizer: SentenceTokenizer::load(folder, config.max_position_embeddings)?,
            encoder: Encoder::load(&weights, &config)?,
            width: config.hidden_size,
            has_real_weights: !random_weights,
            #[cfg(feature = "peer")]
            peer: device.is_cpu().then(|| Peer::load(weights, &json)).transpose()?,
        })
    }

    fn embed(&self, way: Way, batches: &[Batch]) -> Result<Vec<f32>> {
        let embed = |batch| match way {
            #[cfg(feature = "peer")]
            Way::Transformers => Ok(self.peer.as_ref().context("the peer is not there")?.embed(batch)?),
            Way::Layers(rows) => self.encoder.embed(batch, rows),
        };
        Ok(batches.iter().map(embed).collect::<Result<Vec<_>>>()?.concat())
    }

    fn ways(&self) -> impl Iterator<Item = (&'static str, Way)> {
        let is_there = |way: Way| match way {
            #[cfg(feature = "peer")]
            Way::Transformers => self.peer.is_some(),
            Way::Layers(_) => true,
        };
        WAYS.iter().copied().filter(move |&(_, way)| is_there(way))
    }

    fn batches(&self, tokens: &[Tokens], size: usize) -> Vec<Batch> {
        batches(tokens, size, self.tokenizer.pad_id())
    }

    /// The bundled sentences against vectors of an independent implementation.
    fn check(&self) -> Result<()> {
        if !self.has_real_weights {
            println!("not compared with the reference vectors: the weights are random");
            return Ok(());
        }
        let reference = Reference::from_json(REFERENCE)?;
        let sentences: Vec<String> = SENTENCES.lines().map(str::to_owned).collect();
        let batches = self.batches(&self.tokenizer.encode(&sentences)?, 7);
        for (name, way) in self.ways() {
            let cosine = reference.compare(&self.embed(way, &batches)?, self.width)?.min_cosine;
            println!("{name:<28} least cosine to {} reference vectors {cosine:.7}", sentences.len());
            ensure!(
                cosine >= MIN_COSINE,
                "{name}: a cosine of {cosine} to the reference, expected {MIN_COSINE} at least"
            );
        }
        Ok(())
    }

    /// All ways in turns on the same batches.
    fn time(&self, name: &str, tokens: &[Tokens], arguments: &Arguments) -> Result<()> {
        let batches = self.batches(tokens, arguments.batch_size);
        let percent = 100.0 * padding_fraction(&batches);
        println!("\n{name}: {} sentences, batches of {}, {percent:.0}% padding", tokens.len(), arguments.batch_size);
        let mut runs =
            self.ways().map(|(name, way)| Run { name, way, fastest: Duration::MAX, made: vec![] }).collect::<Vec<_>>();
        for _ in 0..arguments.rounds.max(1) {
            for run in &mut runs {
                let start = Instant::now();
                run.made = self.embed(run.way, &batches)?;
                run.fastest = start.elapsed().min(run.fastest);
            }
        }
        let Some(first) = runs.first() else { return Ok(()) };
        for Run { name, fastest, made, .. } in &runs {
            let (seconds, cosine) = (fastest.as_secs_f64(), self.least_cosine(made, &first.made));
            let (rate, ratio) = (tokens.len() as f64 / seconds, first.fastest.as_secs_f64() / seconds);
            println!("{name:<28} {rate:8.1} sentences/s  {ratio:5.2}x  least cosine to the first {cosine:.7}");
            ensure!(
                cosine >= MIN_COSINE,
                "{name}: a cosine of {cosine} to {}, expected {MIN_COSINE} at least",
                first.name
            );
        }
        Ok(())
    }

    fn least_cosine(&self, a: &[f32], b: &[f32]) -> f64 {
        let cosine =
            |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        // All are of length 1. A NaN stays the least.
        let cosines = a.chunks(self.width).zip(b.chunks(self.width)).map(cosine);
        cosines.fold(1.0, |least, cosine| if cosine >= least { least } else { cosine })
    }
}

/// Most are short, few are long: 3 to 200 words. As python/benches/sentences.py has them.
fn sentences(count: usize) -> Result<Vec<String>> {
    let (words, lengths): (Vec<&str>, _) = (WORDS.split(' ').collect(), LogNormal::new(2.5_f64, 0.8)?);
    let mut random = StdRng::seed_from_u64(26318);
    let mut sentence = || {
        let length = (3 + lengths.sample(&mut random) as usize).min(200);
        (0..length).filter_map(|_| words.choose(&mut random).copied()).collect::<Vec<_>>().join(" ")
    };
    Ok((0..count).map(|_| sentence()).collect())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let model = Model::load(&arguments.model, arguments.device, arguments.random_weights)?;
    model.check()?;
    if arguments.sentences == 0 {
        return Ok(());
    }
    let mut tokens = model.tokenizer.encode(&sentences(arguments.sentences)?)?;
    model.time("in order", &tokens, &arguments)?;
    tokens.sort_by_key(|tokens| tokens.ids.len());
    model.time("sorted by length", &tokens, &arguments)
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    /// The model is no part of the repository: `scripts/fetch_minilm.sh` downloads it; `VARLEN_FA_MINILM` names another folder.
    /// Without it this is skipped and says so, or fails if `VARLEN_FA_TEST_REQUIRE_MODEL=1`.
    #[test]
    fn every_way_gives_the_reference_vectors_and_the_embeddings_of_the_first() -> Result<()> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../../models/all-MiniLM-L6-v2");
        let folder = env::var_os("VARLEN_FA_MINILM").map_or(own, PathBuf::from);
        if let Err(error) = require_file(&folder, "model.safetensors") {
            ensure!(env::var_os("VARLEN_FA_TEST_REQUIRE_MODEL").is_none_or(|value| value != "1"), error);
            println!("skipped: {error}");
            return Ok(());
        }
        let model = Model::load(&folder, On::Cpu, false)?;
        model.check()?;
        let tokens = model.tokenizer.encode(&sentences(64)?)?;
        model.time(
            "in order",
            &tokens,
            &Arguments {
                model: folder,
                device: On::Cpu,
                random_weights: false,
                sentences: 64,
                batch_size: 16,
                rounds: 1,
            },
        )
    }
}
