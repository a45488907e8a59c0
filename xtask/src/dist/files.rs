//! Files of the archive.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Copies a file, and says which if that fails.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let Some(folder) = to.parent() else { bail!("{} has no folder", to.display()) };
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
