//! Embeds the lines of a text file and prints each one's nearest neighbours, with dense and varlen attention side by side.

mod report;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use varlen_fa::{Device, DeviceChoice};

use embed_sentences::attention::Padding;
use embed_sentences::embed::Run;
use embed_sentences::model::Encoder;
use embed_sentences::neighbours::nearest;
use embed_sentences::reference::{REFERENCE, Reference, SENTENCES};
use embed_sentences::tokens::{Batch, SentenceTokenizer, batches, padding_fraction};

use crate::report::{Report, RunReport, SentenceReport};

/// Inputs of fewer batches are done before a progress bar would help.
const PROGRESS_FROM_BATCHES: usize = 16;

/// Embed the lines of a text with all-MiniLM-L6-v2, every attention through varlen-fa.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Text with one sentence a line; blank lines are skipped. Without it, the bundled sentences.
    file: Option<PathBuf>,
    /// Folder of the model, as scripts/fetch_minilm.sh leaves it.
    #[arg(long, value_name = "DIR", default_value = "models/all-MiniLM-L6-v2")]
    model: PathBuf,
    /// Sentences of a batch, in the file's order; each batch is padded to its longest.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_count)]
    batch_size: usize,
    /// Device of the attention: cuda, cuda:N, wgpu or cpu. Without it, VARLEN_FA_DEVICE or the best one present.
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Run dense attention alone, without varlen beside it.
    #[arg(long)]
    dense: bool,
    /// Neighbours to print for each sentence.
    #[arg(long, value_name = "K", default_value_t = 1)]
    top: usize,
    /// Compare with reference vectors, and fail where a cosine is below 0.9999; without FILE, the bundled ones.
    #[arg(long, value_name = "FILE")]
    check: Option<Option<PathBuf>>,
    /// Write embeddings, neighbours and timings to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    env_logger::init();
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what the arguments say; `false` where a check found embeddings that disagree with the reference.
fn run(arguments: &Arguments) -> Result<bool> {
    let sentences = read_sentences(arguments)?;
    let reference = read_reference(arguments)?;
    if let Some(reference) = &reference {
        reference.check_sentences(&sentences)?;
    }

    let start = Instant::now();
    let encoder = Encoder::load(&arguments.model)?;
    let tokenizer = SentenceTokenizer::load(&arguments.model, encoder.config().max_position_embeddings)?;
    let load_time = start.elapsed();
    let device = match arguments.device {
        Some(choice) => Device::new(choice)?,
        None => Device::from_env()?,
    };

    let start = Instant::now();
    let tokens = tokenizer.encode(&sentences)?;
    let token_time = start.elapsed();
    let batches = batches(&tokens, arguments.batch_size, tokenizer.pad_id());
    let runs = embed(arguments, &device, &encoder, &batches)?;

    let width = encoder.config().hidden_size;
    let embeddings = runs.last().map_or(&[][..], |run| &run.embeddings);
    let neighbours = nearest(embeddings, width, arguments.top);
    let report = Report {
        device: device.name(),
        transfer: runs.first().map_or("", |run| run.attention().transfer()),
        model: encoder.config().to_string(),
        load_time,
        token_time,
        batch_size: arguments.batch_size,
        batches: batches.len(),
        padding_fraction: padding_fraction(&batches),
        truncated: tokens.iter().filter(|tokens| tokens.truncated).count(),
        runs: runs
            .iter()
            .map(|run| {
                let check = |reference: &Reference| reference.compare(&run.embeddings, width);
                Ok(RunReport::new(run, reference.as_ref().map(check).transpose()?))
            })
            .collect::<Result<_>>()?,
        sentences: sentences
            .iter()
            .zip(&tokens)
            .zip(embeddings.chunks_exact(width).zip(&neighbours))
            .map(|((text, tokens), (embedding, neighbours))| SentenceReport {
                text,
                tokens: tokens.ids.len(),
                neighbours,
                embedding,
            })
            .collect(),
    };
    if let Some(path) = &arguments.json {
        let json = serde_json::to_vec(&report)?;
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match report.print(&mut io::stdout().lock()) {
        // A reader such as `head` that has seen enough is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed.context("cannot write to standard output")?,
    }
    Ok(report.agrees())
}

/// Embeds the batches, dense and varlen in turn unless dense alone is asked for.
fn embed(arguments: &Arguments, device: &Device, encoder: &Encoder, batches: &[Batch]) -> Result<Vec<Run>> {
    let paddings: &[Padding] = if arguments.dense { &[Padding::KeyMask] } else { &[Padding::KeyMask, Padding::Varlen] };
    let mut runs: Vec<Run> = paddings.iter().map(|&padding| Run::new(device, padding)).collect();
    if let Some(first) = batches.first() {
        for run in &mut runs {
            run.warm_up(encoder, first)?;
        }
    }
    let progress = progress_bar(batches.len())?;
    for batch in batches {
        for run in &mut runs {
            run.push(encoder, batch)?;
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(runs)
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("expected a whole number of at least 1, got {text}")),
        Ok(count) => Ok(count),
    }
}

fn read_sentences(arguments: &Arguments) -> Result<Vec<String>> {
    let text = match &arguments.file {
        Some(path) => fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => SENTENCES.to_owned(),
    };
    let sentences: Vec<String> =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    let name = arguments.file.as_ref().map_or("the bundled text".into(), |path| path.to_string_lossy());
    ensure!(!sentences.is_empty(), "{name} has no sentences, only blank lines");
    Ok(sentences)
}

fn read_reference(arguments: &Arguments) -> Result<Option<Reference>> {
    match &arguments.check {
        None => Ok(None),
        Some(None) => Reference::from_json(REFERENCE).map(Some),
        Some(Some(path)) => {
            let json = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            Reference::from_json(&json).with_context(|| format!("cannot use {}", path.display())).map(Some)
        }
    }
}

fn progress_bar(batches: usize) -> Result<ProgressBar> {
    if batches < PROGRESS_FROM_BATCHES {
        return Ok(ProgressBar::hidden());
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} batches, {eta} left")?;
    Ok(ProgressBar::new(batches as u64).with_style(style))
}
