//! The C header, made from the sources of the C library.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// Writes the header.
pub fn write(workspace: &Workspace) -> Result<()> {
    let (path, text) = (path(workspace), generate(workspace)?);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}

/// Fails unless the committed header is what the sources give.
pub fn check(workspace: &Workspace) -> Result<()> {
    let path = path(workspace);
    let committed = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let line = first_difference(&committed, &generate(workspace)?);
    ensure!(
        line.is_none(),
        "{} is stale from line {} on: run `cargo xtask header` and commit the result",
        path.display(),
        line.unwrap_or_default()
    );
    println!("{} is fresh", path.display());
    Ok(())
}

fn path(workspace: &Workspace) -> PathBuf {
    workspace.root.join("capi/include/varlen_fa.h")
}

fn generate(workspace: &Workspace) -> Result<String> {
    let package = workspace.root.join("capi");
    let config = cbindgen::Config::from_file(package.join("cbindgen.toml")).map_err(anyhow::Error::msg)?;
    let builder = cbindgen::Builder::new().with_crate(&package).with_config(config);
    let bindings = builder.generate().context("cbindgen cannot read the sources of capi")?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    Ok(String::from_utf8(text)?)
}

/// The number of the first line in which two texts differ.
fn first_difference(a: &str, b: &str) -> Option<usize> {
    let (mut a_lines, mut b_lines) = (a.lines(), b.lines());
    for number in 1.. {
        match (a_lines.next(), b_lines.next()) {
            (None, None) => break,
            (a_line, b_line) if a_line != b_line => return Some(number),
            _ => {}
        }
    }
    // The same lines, but other line ends.
    (a != b).then_some(1)
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn differences_are_found_wherever_they_are() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some(2));
        assert_eq!(first_difference("a\nb\n", "a\nb\nc\n"), Some(3));
        assert_eq!(first_difference("a\nb\nc\n", "a\nb\n"), Some(3));
        assert_eq!(first_difference("a\r\n", "a\n"), Some(1));
    }
}
