//! Compilers and emulators: how programs for a system are built and run on this one.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, cargo, is_installed, run, stdout_of};

/// A system that is not this one.
#[derive(Debug)]
struct Cross {
    /// As Rust names it.
    target: &'static str,
    /// What the names of its compiler and of its binutils start with.
    prefix: &'static str,
    emulator: Emulator,
    /// Debian's packages of both.
    packages: &'static str,
}

/// What runs programs of another system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Emulator {
    /// None: they run by themselves.
    None,
    /// QEMU in user mode, for 64-bit Arm.
    Qemu,
    Wine,
}

const CROSS: &[Cross] = &[
    Cross {
        target: "aarch64-unknown-linux-gnu",
        prefix: "aarch64-linux-gnu-",
        emulator: Emulator::Qemu,
        packages: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static",
    },
    Cross {
        target: "x86_64-pc-windows-gnu",
        prefix: "x86_64-w64-mingw32-",
        emulator: Emulator::Wine,
        packages: "gcc-mingw-w64-x86-64-win32 wine wine64",
    },
    Cross { target: "x86_64-unknown-linux-musl", prefix: "musl-", emulator: Emulator::None, packages: "musl-tools" },
];

/// Debian's packages of all compilers and emulators.
pub fn packages() -> impl Iterator<Item = &'static str> {
    CROSS.iter().flat_map(|cross| cross.packages.split(' '))
}

/// How programs of one system are built and run.
#[derive(Debug)]
pub struct Toolchain {
    host: String,
    /// None: this system's own.
    cross: Option<&'static Cross>,
}

impl Toolchain {
    /// For a target, as Rust names it; by default for the machine that builds.
    ///
    /// # Errors
    /// A target for which nothing is known of compilers and emulators.
    pub fn of(target: Option<&str>) -> Result<Self> {
        let about = stdout_of(Command::new("rustc").arg("-vV"))?;
        let host = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
        let target = target.unwrap_or(host);
        let cross = CROSS.iter().find(|cross| cross.target == target && target != host);
        let known: Vec<_> = CROSS.iter().map(|cross| cross.target).collect();
        ensure!(target == host || cross.is_some(), "{target}: expected {host} or one of {}", known.join(", "));
        Ok(Self { host: host.to_owned(), cross })
    }

    /// As Rust names it.
    pub fn target(&self) -> &str {
        self.cross.map_or(&self.host, |cross| cross.target)
    }

    /// Whether it is the machine that builds.
    pub fn is_native(&self) -> bool {
        self.cross.is_none()
    }

    /// The name of a tool: `gcc`, `g++`, `strip`, …
    pub fn tool(&self, name: &str) -> String {
        match (self.cross, name) {
            (None, "gcc") => "cc".to_owned(),
            (None, "g++") => "c++".to_owned(),
            (None, name) => name.to_owned(),
            (Some(cross), name) => format!("{}{name}", cross.prefix),
        }
    }

    /// What is missing of it, and where it is had; none if it is complete.
    pub fn missing(&self) -> Option<String> {
        let cross = self.cross?;
        let emulator_is_there = match cross.emulator {
            Emulator::None => self.host.starts_with("x86_64-") && self.host.contains("-linux-"),
            Emulator::Qemu => qemu().is_some(),
            Emulator::Wine => is_installed("wine"),
        };
        let tools_are_there = is_installed(&self.tool("gcc")) && emulator_is_there;
        (!tools_are_there).then(|| {
            format!(
                "the compiler or the emulator of {} is not installed: apt-get install {}",
                cross.target, cross.packages
            )
        })
    }

    /// Cargo in the repository's root, told of the linker. `words` start with what cargo shall do.
    ///
    /// # Errors
    /// Rust has no standard library for the target, and rustup cannot add it.
    pub fn cargo(&self, workspace: &Workspace, words: &[&str]) -> Result<Command> {
        let mut command = cargo();
        command.current_dir(&workspace.root).args(words);
        if let Some(cross) = self.cross {
            add_standard_library(cross.target)?;
            command.args(["--target", cross.target]);
            // Rust knows MinGW-w64's by name, and brings what it links with for musl.
            if cross.emulator == Emulator::Qemu {
                let variable = format!("CARGO_TARGET_{}_LINKER", cross.target.to_uppercase().replace('-', "_"));
                command.env(variable, self.tool("gcc"));
            }
        }
        Ok(command)
    }

    /// A command that runs this program.
    pub fn program(&self, workspace: &Workspace, path: impl AsRef<OsStr>) -> Result<Command> {
        match self.cross.map_or(Emulator::None, |cross| cross.emulator) {
            Emulator::None => Ok(Command::new(path)),
            Emulator::Qemu => {
                let mut command = Command::new(qemu().context("there is no qemu-aarch64-static")?);
                command.args(["-L", "/usr/aarch64-linux-gnu"]).arg(path);
                Ok(command)
            }
            Emulator::Wine => {
                let prefix = self.wine_prefix(workspace)?;
                let mut command = wine(&prefix, "wine");
                command.arg(path);
                Ok(command)
            }
        }
    }

    /// The folder in which Wine keeps its Windows, made ready when it is first asked for.
    fn wine_prefix(&self, workspace: &Workspace) -> Result<String> {
        const PRIMITIVES: &str = "bcryptprimitives.dll";
        let folder = workspace.target.join("wine");
        let prefix = folder.display().to_string();
        let system = folder.join("drive_c/windows/system32");
        if !system.is_dir() {
            fs::create_dir_all(&workspace.target)?;
            // Its servers live on for a while, and would keep pipes of ours open.
            let mut boot = wine(&prefix, "wineboot");
            run(boot.arg("--init").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))?;
            run(wine(&prefix, "wineserver").arg("--wait"))?;
        }
        if !system.join(PRIMITIVES).exists() {
            println!("this Wine has no {PRIMITIVES}: scripts/wine/bcryptprimitives.c stands in");
            let mut compiler = Command::new(self.tool("gcc"));
            compiler.arg("-shared").arg("-o").arg(system.join(PRIMITIVES));
            run(compiler.arg(workspace.root.join("scripts/wine/bcryptprimitives.c")).arg("-ladvapi32"))?;
        }
        Ok(prefix)
    }
}

/// A program of Wine; it says nothing of its own, and asks for none of the packages that it might want.
fn wine(prefix: &str, program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("WINEPREFIX", prefix).env("WINEDEBUG", "-all").env("WINEDLLOVERRIDES", "mscoree,mshtml=");
    command
}

/// Debian 13 calls the static one by the plain name.
fn qemu() -> Option<&'static str> {
    ["qemu-aarch64-static", "qemu-aarch64"].into_iter().find(|name| is_installed(name))
}

/// Adds Rust's standard library for a target by rustup where it is missing.
pub fn add_standard_library(target: &str) -> Result<()> {
    let library = stdout_of(Command::new("rustc").args(["--print", "target-libdir", "--target", target]))?;
    if !Path::new(library.trim()).is_dir() {
        run(Command::new("rustup").args(["target", "add", target]))
            .with_context(|| format!("{target}: rustup adds the standard library for it"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{CROSS, Toolchain, packages};

    #[test]
    fn tools_of_another_system_have_its_prefix() {
        let native = Toolchain::of(None).unwrap();
        assert!(native.is_native() && native.missing().is_none());
        assert_eq!([native.tool("gcc"), native.tool("nm")], ["cc", "nm"]);
        assert!(Toolchain::of(Some(native.target())).unwrap().is_native());

        let windows = Toolchain::of(Some("x86_64-pc-windows-gnu")).unwrap();
        assert!(!windows.is_native());
        assert_eq!(windows.tool("gcc"), "x86_64-w64-mingw32-gcc");
        let error = Toolchain::of(Some("aarch64-apple-darwin")).unwrap_err().to_string();
        assert!(error.contains("aarch64-apple-darwin: expected") && error.contains(CROSS[0].target), "{error}");
    }

    #[test]
    fn packages_are_single_names() {
        assert!(packages().all(|name| !name.is_empty() && !name.contains(' ')));
        assert!(packages().any(|name| name == "wine"));
    }
}
