//! What lies where in the archive.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::files::copy;
use super::foreign::Foreign;
use super::texts;
use crate::toolchain::Toolchain;
use crate::workspace::{Workspace, run, stdout_of};

/// Names of files, which depend on the system and the version.
#[derive(Debug)]
pub struct Layout {
    /// Of the archive and of its folder.
    pub name: String,
    version: String,
    pub format: Format,
    /// The shared library, below the archive's folder.
    pub shared: String,
    /// What programs are linked with: the static library, or on Windows the import library.
    pub archive: &'static str,
    /// How programs that were linked with it call it: it stays while they and a newer library work together.
    soname: String,
    pub toolchain: Toolchain,
}

/// The form of a system's libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Linux.
    Elf,
    /// Windows.
    Pe,
}

impl Layout {
    /// For the system that the toolchain builds for.
    ///
    /// # Errors
    /// A system for which there is no layout yet.
    pub fn new(version: &str, toolchain: Toolchain) -> Result<Self> {
        let target = toolchain.target();
        // By binutils' tools: elsewhere the library has other names, and nobody has tried them.
        let format = match target {
            linux if linux.ends_with("-linux-gnu") => Format::Elf,
            windows if windows.ends_with("-windows-gnu") => Format::Pe,
            other => bail!("archives are made for Linux with glibc and for Windows so far, not for {other}"),
        };
        let [major, minor, _] = version.split('.').collect::<Vec<_>>()[..] else {
            bail!("expected a version of three numbers, got {version}");
        };
        // Before 1.0 a minor version may change the library.
        let compatible = if major == "0" { format!("0.{minor}") } else { major.to_owned() };
        let (shared, archive, soname) = match format {
            Format::Elf => (
                format!("lib/libvarlen_fa.so.{version}"),
                "lib/libvarlen_fa.a",
                format!("libvarlen_fa.so.{compatible}"),
            ),
            Format::Pe => ("bin/varlen_fa.dll".to_owned(), "lib/libvarlen_fa.dll.a", "varlen_fa.dll".to_owned()),
        };
        Ok(Self {
            name: format!("varlen-fa-{version}-{target}"),
            version: version.to_owned(),
            format,
            shared,
            archive,
            soname,
            toolchain,
        })
    }

    /// Arguments of rustc, for the shared library.
    pub fn link_arguments(&self) -> Vec<String> {
        match self.format {
            Format::Elf => vec!["-C".to_owned(), format!("link-arg=-Wl,-soname,{}", self.soname)],
            Format::Pe => vec![],
        }
    }

    /// Which of the files that cargo built becomes the shared library, and which the other one.
    pub fn built_names(&self) -> [&'static str; 2] {
        match self.format {
            Format::Elf => ["libvarlen_fa.so", "libvarlen_fa.a"],
            Format::Pe => ["varlen_fa.dll", "libvarlen_fa.dll.a"],
        }
    }

    /// Fills the folder, but for licences of dependencies. Gives what the shared library needs.
    pub fn install(&self, workspace: &Workspace, folder: &Path, shared: &Path, archive: &Path) -> Result<Foreign> {
        let to = folder.join(&self.shared);
        copy(shared, &to)?;
        run(Command::new(self.toolchain.tool("strip")).arg("--strip-unneeded").arg(&to))
            .context("libraries are stripped by binutils")?;
        let lib = folder.join("lib");
        fs::create_dir_all(&lib)?;
        match self.format {
            Format::Elf => {
                let file = to.file_name().context("a library without a name")?;
                for link in [&self.soname, "libvarlen_fa.so"] {
                    run(Command::new("ln").arg("-s").arg(file).arg(lib.join(link)))?;
                }
                self.hide_foreign_symbols(workspace, archive, &folder.join(self.archive))?;
            }
            Format::Pe => copy(archive, &folder.join(self.archive))?,
        }
        let foreign = match self.format {
            Format::Elf => Foreign::of_elf(&self.toolchain, &to, &self.soname)?,
            Format::Pe => Foreign::of_pe(&self.toolchain, &to, &self.soname)?,
        };

        let capi = workspace.root.join("capi");
        for file in ["include/varlen_fa.h", "include/varlen_fa.hpp", "python/varlen_fa.py"] {
            copy(&capi.join(file), &folder.join(file))?;
        }
        for file in ["examples/masked_attention.c", "examples/masked_attention.cpp"] {
            copy(&capi.join(file), &folder.join(file))?;
        }
        for file in ["LICENSE-MIT", "LICENSE-APACHE", "CHANGELOG.md"] {
            copy(&workspace.root.join(file), &folder.join(file))?;
        }
        let cmake = lib.join("cmake/varlen_fa");
        let (targets, readme) = match self.format {
            Format::Elf => (texts::CMAKE_ELF, texts::README_ELF),
            Format::Pe => (texts::CMAKE_PE, texts::README_PE),
        };
        let files = [
            (lib.join("pkgconfig/varlen_fa.pc"), texts::PKG_CONFIG),
            (cmake.join("varlen_fa-config.cmake"), targets),
            (cmake.join("varlen_fa-config-version.cmake"), texts::CMAKE_VERSION),
            (folder.join("README.md"), readme),
        ];
        // What programs need that are linked with the static library, as `rustc --print native-static-libs` says.
        let system = match self.format {
            Format::Elf => "-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc",
            // There is no static library.
            Format::Pe => "",
        };
        let tried = if self.toolchain.is_native() {
            ""
        } else {
            "It was tried in an emulator, on the CPU; nobody has tried a GPU on this system."
        };
        for (path, text) in files {
            fs::create_dir_all(path.parent().context("a file without a folder")?)?;
            let text = text
                .trim_start()
                .replace("@VERSION@", &self.version)
                .replace("@SHARED@", &self.shared)
                .replace("@SONAME@", &self.soname)
                .replace("@SYSTEM@", system)
                .replace("@TRIED@", tried)
                .replace("@NEEDS@", &foreign.in_words());
            ensure!(!text.contains('@'), "{}: a placeholder is left", path.display());
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(foreign)
    }

    /// Makes one object of a static library, of which only our functions can be seen from outside: it would else not link beside
    /// another Rust library. Symbols of nothing but debuggers go.
    fn hide_foreign_symbols(&self, workspace: &Workspace, from: &Path, to: &Path) -> Result<()> {
        let object = workspace.target.join("dist-varlen_fa.o");
        run(Command::new(self.toolchain.tool("ld"))
            .args(["--relocatable", "--whole-archive", "-o"])
            .arg(&object)
            .arg(from))
        .context("objects are linked by binutils")?;
        let ours = ["--wildcard", "--keep-global-symbol=varlen_fa_*", "--strip-unneeded"];
        // The standard library brings its bitcode, which is of no use here, and which plug-ins of `ar` fall over.
        let no_bitcode = ["--remove-section=.llvmbc", "--remove-section=.llvmcmd"];
        run(Command::new(self.toolchain.tool("objcopy")).args(ours).args(no_bitcode).arg(&object))?;
        if to.exists() {
            fs::remove_file(to)?;
        }
        // D: no times and owners.
        run(Command::new(self.toolchain.tool("ar")).arg("crsD").arg(to).arg(&object))?;
        let seen =
            stdout_of(Command::new(self.toolchain.tool("nm")).args(["--extern-only", "--defined-only"]).arg(to))?;
        let foreign: Vec<_> = seen
            .lines()
            .filter_map(|line| line.split_whitespace().nth(2))
            .filter(|name| !name.starts_with("varlen_fa_"))
            .collect();
        ensure!(foreign.is_empty(), "{} shows {foreign:?}", to.display());
        fs::remove_file(&object)?;
        Ok(())
    }
}
