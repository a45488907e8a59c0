//! How many dispatches a call became and how many shaders it compiled, as the wgpu device logs it.

use std::cell::RefCell;
use std::sync::Once;

use anyhow::{Context, Result};

/// What one call became.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dispatches {
    pub dispatches: usize,
    /// None where the call was recorded for the application to submit.
    pub command_buffers: Option<usize>,
}

/// How the line about a shader begins.
const COMPILED: &str = "compiled ";

thread_local! {
    /// Lines of this thread, while it counts.
    static LINES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

struct Lines;

impl log::Log for Lines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().ends_with("::launcher")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.with_borrow_mut(|lines| lines.iter_mut().for_each(|lines| lines.push(record.args().to_string())));
        }
    }

    fn flush(&self) {}
}

/// Runs `calls` and gives what each of its calls on this thread became, besides its result.
pub fn count<R>(calls: impl FnOnce() -> Result<R>) -> Result<(R, Vec<Dispatches>)> {
    let (result, lines) = lines(calls)?;
    let counts = lines.iter().filter(|line| !line.starts_with(COMPILED));
    let counts = counts.map(|line| parse(line).with_context(|| line.clone())).collect::<Result<Vec<_>>>()?;
    Ok((result, counts))
}

/// Runs `calls` and gives how many shaders it compiled on this thread, besides its result.
pub fn count_compiled<R>(calls: impl FnOnce() -> Result<R>) -> Result<(R, usize)> {
    let (result, lines) = lines(calls)?;
    Ok((result, lines.iter().filter(|line| line.starts_with(COMPILED)).count()))
}

fn lines<R>(calls: impl FnOnce() -> Result<R>) -> Result<(R, Vec<String>)> {
    static LOGGER: Once = Once::new();
    LOGGER.call_once(|| {
        // A logger that is there already would show as no lines at all.
        if log::set_logger(&Lines).is_ok() {
            log::set_max_level(log::LevelFilter::Debug);
        }
    });
    LINES.set(Some(Vec::new()));
    let result = calls();
    let lines = LINES.take().context("the lines went away")?;
    Ok((result?, lines))
}

fn parse(line: &str) -> Result<Dispatches> {
    let numbers: Vec<usize> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    match (line.split(' ').next(), &numbers[..]) {
        (Some("submitting"), &[dispatches, buffers]) => Ok(Dispatches { dispatches, command_buffers: Some(buffers) }),
        (Some("recording"), &[dispatches]) => Ok(Dispatches { dispatches, command_buffers: None }),
        _ => anyhow::bail!("not a line about dispatches"),
    }
}
