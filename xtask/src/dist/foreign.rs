//! What a shared library has to do with others.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::stdout_of;

/// What a library needs and offers, as the tools of binutils read it.
#[derive(Debug)]
pub struct Foreign {
    /// The newest version of the C library of which it needs a symbol; none if it is not glibc.
    pub glibc: Option<(u32, u32)>,
    /// Shared libraries that it needs.
    pub libraries: Vec<String>,
    /// Functions that it exports.
    pub exports: usize,
}

impl Foreign {
    /// Looks at a shared library.
    ///
    /// # Errors
    /// It exports something that is not ours, or has another name than the one given.
    pub fn of(library: &Path, soname: &str) -> Result<Self> {
        let dynamic = stdout_of(Command::new("nm").args(["--dynamic", "--defined-only"]).arg(library))
            .context("symbols are listed by binutils")?;
        let names: Vec<&str> = dynamic.lines().filter_map(|line| line.split_whitespace().last()).collect();
        let foreign: Vec<_> = names.iter().filter(|name| !name.starts_with("varlen_fa_")).collect();
        ensure!(foreign.is_empty(), "{} exports {foreign:?}", library.display());
        ensure!(!names.is_empty(), "{} exports nothing", library.display());
        let headers = stdout_of(Command::new("objdump").arg("-p").arg(library))?;
        let all = |key: &str| -> Vec<String> {
            let found = headers.lines().filter_map(|line| line.trim().strip_prefix(key));
            found.map(|value| value.trim().to_owned()).collect()
        };
        let named = all("SONAME");
        ensure!(named == [soname], "{} is called {named:?}, expected {soname}", library.display());
        Ok(Self { glibc: newest_glibc(&headers), libraries: all("NEEDED"), exports: names.len() })
    }

    /// For people.
    pub fn in_words(&self) -> String {
        let glibc = self.glibc.map_or(String::new(), |(major, minor)| format!(", glibc {major}.{minor} or newer"));
        format!("exports {} functions, all varlen_fa_…; needs {}{glibc}", self.exports, self.libraries.join(", "))
    }
}

/// The newest of the versions that a library's headers name: `0x0d696910 0x00 04 GLIBC_2.28`.
fn newest_glibc(headers: &str) -> Option<(u32, u32)> {
    let versions = headers.split_whitespace().filter_map(|word| word.strip_prefix("GLIBC_"));
    let numbers = versions.filter_map(|version| {
        let mut parts = version.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    });
    numbers.max()
}

#[cfg(test)]
mod tests {
    use super::newest_glibc;

    #[test]
    fn versions_are_compared_as_numbers() {
        let headers =
            "required from libc.so.6:\n 0x1 0x00 04 GLIBC_2.28\n 0x2 0x00 03 GLIBC_2.9\n 0x3 0x00 02 GLIBC_2.2.5\n";
        assert_eq!(newest_glibc(headers), Some((2, 28)));
        assert_eq!(newest_glibc("required from libc.so:\n"), None);
    }
}
