//! What the program found: printed, and written as JSON.

use std::collections::BTreeMap;
use std::io::{Result, Write};
use std::time::Duration;

use serde::{Serialize, Serializer};

use embed_sentences::embed::Run;
use embed_sentences::neighbours::Neighbour;
use embed_sentences::reference::{Agreement, MIN_COSINE};

/// Longest piece of a sentence in a printed line, in characters.
const SHOWN_CHARACTERS: usize = 72;

/// Everything the program found.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    pub device: &'a str,
    pub transfer: &'a str,
    pub model: String,
    #[serde(rename = "load_ms", serialize_with = "serialize_milliseconds")]
    pub load_time: Duration,
    #[serde(rename = "tokenise_ms", serialize_with = "serialize_milliseconds")]
    pub token_time: Duration,
    pub batch_size: usize,
    pub batches: usize,
    pub padding_fraction: f64,
    pub truncated: usize,
    pub runs: Vec<RunReport<'a>>,
    pub sentences: Vec<SentenceReport<'a>>,
}

/// One way to treat padding.
#[derive(Debug, Serialize)]
pub struct RunReport<'a> {
    pub padding: &'static str,
    /// Path, kernel and reason, with the number of calls.
    pub plans: &'a BTreeMap<String, usize>,
    #[serde(rename = "mask_ms", serialize_with = "serialize_milliseconds")]
    pub mask_time: Duration,
    #[serde(rename = "attention_ms", serialize_with = "serialize_milliseconds")]
    pub attention_time: Duration,
    #[serde(rename = "attention_with_copies_ms", serialize_with = "serialize_milliseconds")]
    pub attention_time_with_copies: Duration,
    #[serde(rename = "total_ms", serialize_with = "serialize_milliseconds")]
    pub total_time: Duration,
    /// The comparison with the reference, where one was asked for.
    pub agreement: Option<Agreement>,
}

/// One sentence.
#[derive(Debug, Serialize)]
pub struct SentenceReport<'a> {
    pub text: &'a str,
    pub tokens: usize,
    pub neighbours: &'a [Neighbour],
    pub embedding: &'a [f32],
}

impl Report<'_> {
    /// Whether every comparison with the reference passed.
    pub fn agrees(&self) -> bool {
        self.runs.iter().filter_map(|run| run.agreement).all(agrees)
    }

    /// Prints all but the embeddings.
    pub fn print(&self, out: &mut impl Write) -> Result<()> {
        self.print_setting(out)?;
        self.print_neighbours(out)?;
        self.print_times(out)?;
        self.print_agreements(out)?;
        out.flush()
    }

    fn print_setting(&self, out: &mut impl Write) -> Result<()> {
        writeln!(out, "device    {} ({})", self.device, self.transfer)?;
        writeln!(out, "model     {}; loaded in {}", self.model, milliseconds(self.load_time))?;
        let lengths = || self.sentences.iter().map(|sentence| sentence.tokens);
        let (shortest, longest) = (lengths().min().unwrap_or(0), lengths().max().unwrap_or(0));
        write!(out, "text      {} sentences of {shortest} to {longest} tokens", self.sentences.len())?;
        if self.truncated > 0 {
            write!(out, ", {} of them longer and cut", self.truncated)?;
        }
        writeln!(out, "; tokenised in {}", milliseconds(self.token_time))?;
        let percent = 100.0 * self.padding_fraction;
        writeln!(
            out,
            "batches   {} of at most {}; {percent:.1}% of the tokens are padding",
            self.batches, self.batch_size
        )?;
        for run in &self.runs {
            for (plan, calls) in run.plans {
                writeln!(out, "{:<9} {plan} ({calls} calls)", run.padding)?;
            }
        }
        Ok(())
    }

    fn print_neighbours(&self, out: &mut impl Write) -> Result<()> {
        if self.sentences.iter().all(|sentence| sentence.neighbours.is_empty()) {
            return Ok(());
        }
        writeln!(out)?;
        for sentence in &self.sentences {
            writeln!(out, "{}", shortened(sentence.text))?;
            for neighbour in sentence.neighbours {
                let text = self.sentences[neighbour.index].text;
                writeln!(out, "  {:.3}  {}", neighbour.cosine, shortened(text))?;
            }
        }
        Ok(())
    }

    fn print_times(&self, out: &mut impl Write) -> Result<()> {
        writeln!(out, "\n{:<9} {:>12} {:>12} {:>12} {:>12}", "time", "masks", "attention", "with copies", "total")?;
        for run in &self.runs {
            let times = [run.mask_time, run.attention_time, run.attention_time_with_copies, run.total_time];
            let [masks, attention, with_copies, total] = times.map(milliseconds);
            writeln!(out, "{:<9} {masks:>12} {attention:>12} {with_copies:>12} {total:>12}", run.padding)?;
        }
        if let [dense, varlen] = &self.runs[..] {
            let ratio = |time: fn(&RunReport<'_>) -> Duration| {
                format!("{:.2}x", time(dense).as_secs_f64() / time(varlen).as_secs_f64())
            };
            let attention = ratio(|run| run.attention_time);
            let with_copies = ratio(|run| run.attention_time_with_copies);
            let total = ratio(|run| run.total_time);
            writeln!(out, "{:<9} {:>12} {attention:>12} {with_copies:>12} {total:>12}", "speed-up", "")?;
        }
        Ok(())
    }

    fn print_agreements(&self, out: &mut impl Write) -> Result<()> {
        for run in &self.runs {
            let Some(agreement) = run.agreement else { continue };
            let Agreement { min_cosine, sentence } = agreement;
            let count = self.sentences.len();
            write!(out, "check     {:<6} min cosine {min_cosine:.8} to {count} reference vectors: ", run.padding)?;
            if agrees(agreement) {
                writeln!(out, "ok")?;
            } else {
                writeln!(out, "FAILED, expected {MIN_COSINE} at least")?;
                writeln!(out, "          worst: {}", shortened(self.sentences[sentence].text))?;
            }
        }
        Ok(())
    }
}

impl<'a> RunReport<'a> {
    /// What a run found.
    pub fn new(run: &'a Run, agreement: Option<Agreement>) -> Self {
        Self {
            padding: run.padding().name(),
            plans: run.attention().plans(),
            mask_time: run.mask_time,
            attention_time: run.attention().time(),
            attention_time_with_copies: run.attention().time_with_copies(),
            total_time: run.total_time,
            agreement,
        }
    }
}

fn agrees(agreement: Agreement) -> bool {
    agreement.min_cosine >= MIN_COSINE
}

/// The sentence, cut to what fits a line.
fn shortened(sentence: &str) -> String {
    match sentence.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", sentence[..end].trim_end()),
        None => sentence.to_owned(),
    }
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

fn serialize_milliseconds<S: Serializer>(duration: &Duration, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64() * 1e3)
}
