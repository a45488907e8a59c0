//! Where results go: text for people, JSON lines for programs.

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;

/// The text and, where asked for, the JSON lines.
pub struct Report {
    /// Text for people: standard output, or standard error where the JSON goes there.
    pub text: Box<dyn Write>,
    json: Option<Box<dyn Write>>,
}

impl Report {
    /// `json` is a file to write, or `-` for standard output.
    pub fn new(json: Option<&Path>) -> Result<Self> {
        Ok(match json {
            None => Self { text: Box::new(io::stdout()), json: None },
            Some(path) if path == Path::new("-") => {
                Self { text: Box::new(io::stderr()), json: Some(Box::new(io::stdout())) }
            }
            Some(path) => {
                let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
                Self { text: Box::new(io::stdout()), json: Some(Box::new(BufWriter::new(file))) }
            }
        })
    }

    /// Writes one JSON line, if JSON was asked for.
    pub fn json(&mut self, record: &impl Serialize) -> Result<()> {
        if let Some(json) = &mut self.json {
            writeln!(json, "{}", serde_json::to_string(record)?)?;
            // A run that is cut short leaves whole lines.
            json.flush()?;
        }
        Ok(())
    }
}

/// Prints the error, if there is one, and says whether the program succeeded.
pub fn exit_code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader such as `head` that has seen enough is no failure.
        Err(error) if error.downcast_ref().is_some_and(|e: &io::Error| e.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
