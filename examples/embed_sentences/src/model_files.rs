//! The files that `scripts/fetch_minilm.sh` leaves.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The path of a model file; an error that says how to get it where it is missing.
pub fn require_file(model_dir: &Path, name: &str) -> Result<PathBuf> {
    let path = model_dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let dir = model_dir.display();
    if model_dir.is_dir() {
        bail!("the model folder {dir} has no file {name}; `scripts/fetch_minilm.sh {dir}` downloads it");
    }
    bail!("there is no model folder {dir}; `scripts/fetch_minilm.sh {dir}` downloads the model (84 MB) into it");
}
