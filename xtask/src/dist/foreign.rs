//! What a shared library has to do with others.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::toolchain::Toolchain;
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
    /// Looks at a shared library of Linux.
    ///
    /// # Errors
    /// It exports something that is not ours, or has another name than the one given.
    pub fn of_elf(toolchain: &Toolchain, library: &Path, soname: &str) -> Result<Self> {
        let mut nm = Command::new(toolchain.tool("nm"));
        let dynamic = stdout_of(nm.args(["--dynamic", "--defined-only"]).arg(library))
            .context("symbols are listed by binutils")?;
        let names: Vec<&str> = dynamic.lines().filter_map(|line| line.split_whitespace().last()).collect();
        let headers = stdout_of(Command::new(toolchain.tool("objdump")).arg("-p").arg(library))?;
        Self::checked(library, &names, &values(&headers, "SONAME"), soname)?;
        Ok(Self { glibc: newest_glibc(&headers), libraries: values(&headers, "NEEDED"), exports: names.len() })
    }

    /// Looks at a DLL.
    ///
    /// # Errors
    /// As of one of Linux.
    pub fn of_pe(toolchain: &Toolchain, library: &Path, name: &str) -> Result<Self> {
        let headers = stdout_of(Command::new(toolchain.tool("objdump")).arg("-p").arg(library))
            .context("headers are read by binutils")?;
        let names = names_of_pe(&headers);
        // It says its own name and then those of its functions.
        let own: Vec<_> = headers.lines().filter_map(|line| line.strip_prefix("Name")).collect();
        let own: Vec<_> = own.iter().filter_map(|line| line.split_whitespace().last()).map(str::to_owned).collect();
        Self::checked(library, &names, &own, name)?;
        // Each object that was linked has a table of its own, in its own case.
        let libraries: BTreeSet<_> = values(&headers, "DLL Name:").iter().map(|name| name.to_lowercase()).collect();
        Ok(Self { glibc: None, libraries: libraries.into_iter().collect(), exports: names.len() })
    }

    fn checked(library: &Path, exports: &[&str], called: &[String], expected: &str) -> Result<()> {
        let foreign: Vec<_> = exports.iter().filter(|name| !name.starts_with("varlen_fa_")).collect();
        ensure!(foreign.is_empty(), "{} exports {foreign:?}", library.display());
        ensure!(!exports.is_empty(), "{} exports nothing", library.display());
        ensure!(called == [expected], "{} is called {called:?}, expected {expected}", library.display());
        Ok(())
    }

    /// For people.
    pub fn in_words(&self) -> String {
        let glibc = self.glibc.map_or(String::new(), |(major, minor)| format!(", glibc {major}.{minor} or newer"));
        format!("exports {} functions, all varlen_fa_…; needs {}{glibc}", self.exports, self.libraries.join(", "))
    }
}

/// The values of a key in a library's headers.
fn values(headers: &str, key: &str) -> Vec<String> {
    let found = headers.lines().filter_map(|line| line.trim().strip_prefix(key));
    found.map(|value| value.trim().to_owned()).collect()
}

/// The functions that a DLL's headers list: `[   0] varlen_fa_version`, after a title.
fn names_of_pe(headers: &str) -> Vec<&str> {
    let table = headers.lines().skip_while(|line| !line.starts_with("[Ordinal/Name Pointer] Table")).skip(1);
    let rows = table.map(str::trim).take_while(|line| line.starts_with('['));
    rows.filter_map(|row| row.split_whitespace().last()).collect()
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
    use super::{names_of_pe, newest_glibc};

    #[test]
    fn versions_are_compared_as_numbers() {
        let headers =
            "required from libc.so.6:\n 0x1 0x00 04 GLIBC_2.28\n 0x2 0x00 03 GLIBC_2.9\n 0x3 0x00 02 GLIBC_2.2.5\n";
        assert_eq!(newest_glibc(headers), Some((2, 28)));
        assert_eq!(newest_glibc("required from libc.so:\n"), None);
    }

    #[test]
    fn functions_of_a_dll_are_those_of_one_table() {
        let headers = "Export Address Table -- Ordinal Base 1\n\t[   0] +base[   1] 64710 Export RVA\n\n\
                       [Ordinal/Name Pointer] Table\n\t[   0] a\n\t[   1] b\n\nThe Function Table\n\t[ 3] c\n";
        assert_eq!(names_of_pe(headers), ["a", "b"]);
        assert!(names_of_pe("").is_empty());
    }
}
