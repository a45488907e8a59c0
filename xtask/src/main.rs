//! Chores of this repository; `cargo xtask --help` lists them.

mod bundle;
mod ci;
mod compiler;
mod dist;
mod external_types;
mod header;
mod imports;
mod kernels;
mod manifest;
mod package;
mod pages;
/// The library's own declarations.
#[path = "../../src/backends/cuda/kernels/params.rs"]
#[allow(dead_code, reason = "only the text half is used here")]
mod params;
mod platforms;
mod ptxas;
mod python_package;
mod release;
mod table;
mod targets;
mod toolchain;
#[cfg(feature = "web")]
mod web;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// Chores of the varlen-fa repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Run everything that must hold before a change lands, or some steps of it
    ///
    /// Needs Rust, a C compiler, Python with venv and, for the first step, apt; no GPU. Stops at
    /// the first step that fails, and prints at the end how long each step took.
    Ci {
        /// Print the steps and run none
        #[arg(long, conflicts_with = "steps")]
        list: bool,
        /// Steps to run [default: all]
        #[arg(value_name = "STEP")]
        steps: Vec<String>,
    },
    /// Write kernels/common/params.cuh, and compile the CUDA kernels into kernels/prebuilt
    ///
    /// The header is made from src/backends/cuda/kernels/params.rs. Each source becomes one fatbin, that
    /// of sm80 two, in one of the packages of kernels/prebuilt: machine code for sm_80, sm_90, sm_100
    /// and sm_120, and PTX for newer chips; or for the one architecture whose instructions it uses. The compiler, CUDA 13.0, is installed into target/cuda-compiler the first
    /// time (about 500 MB, through pip); no CUDA toolkit and no GPU is needed, only python3 with venv,
    /// gcc and g++. Prints the registers and the spills of every kernel.
    ///
    /// Fails on a compiler warning, on more register spills than xtask/src/kernels.rs allows the
    /// source, and when the fatbins exceed 8 MB together.
    Kernels {
        /// Write nothing: compare the header, rebuild under target/ and compare with
        /// kernels/prebuilt byte for byte
        #[arg(long)]
        check: bool,
        /// Compile instead, into target/kernels, the sm100 kernel as compute capability 9.0 runs it
        /// for the tests, its tensor memory and its products emulated
        #[arg(long, conflicts_with = "check")]
        emulated: bool,
    },
    /// Write capi/include/varlen_fa.h, the C header, from the sources of capi
    Header {
        /// Write nothing: fail if the committed header is not what the sources give
        #[arg(long)]
        check: bool,
    },
    /// Put tests, benches and examples into one folder that runs on a machine with an NVIDIA GPU
    /// and no Rust
    ///
    /// Builds the programs in release mode with every feature, strips them and puts them beside
    /// scripts/gpu/run.sh. That machine needs the NVIDIA driver and a glibc no older than this
    /// one's. Copy the folder there and start run.sh; run.sh --help says more.
    ///
    /// The bundle is limited to 60 MB. The embed_sentences example and its model (91 MB) are not
    /// part of it.
    GpuBundle {
        /// Folder to write, created if need be [default: gpu-bundle in the target folder]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Write archives of the C library, target/archives/varlen-fa-VERSION-TARGET.tar.gz and .zip
    ///
    /// In them are the shared and the static library, stripped and optimised as one program, with our
    /// functions alone to be seen; headers for C and C++; files for pkg-config and CMake; the Python
    /// binding; examples; the licences of all that is built in. For Windows there is a zip, with the DLL
    /// and its import library. Prints what the library needs of the system. Needs binutils and Python;
    /// makes archives on Linux alone so far.
    Dist {
        /// The system that they are for, as Rust names it: x86_64-unknown-linux-gnu,
        /// aarch64-unknown-linux-gnu or x86_64-pc-windows-gnu; other than this one by a cross compiler
        /// [default: this one]
        #[arg(long, value_name = "TARGET")]
        target: Option<String>,
        /// Folder of the archives [default: archives in the target folder]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Cargo's profile
        #[arg(long, default_value = "dist")]
        profile: String,
        /// Unpack the archive, and the published crates, in a temporary folder, and build and run projects
        /// there in C, C++, Python and Rust; for another system in C and C++, in an emulator
        #[arg(long)]
        check: bool,
    },
    /// Check that the library compiles for Windows, macOS, Android, 32-bit x86 and browsers
    ///
    /// Adds their standard libraries by rustup. Nothing is linked or run. A weekly workflow starts it.
    Targets,
    /// Try everything that publishing the crates needs, and publish nothing
    ///
    /// The changelog, the header and the pages; types of other crates in the API; the API beside that of
    /// the last tag, by cargo-semver-checks where both are there; the packages, verified by cargo, their
    /// sizes and contents, and the library's tests where they are unpacked; the oldest versions of the
    /// dependencies.
    /// Nothing may be uncommitted. Takes some minutes.
    Release {
        /// Publish nothing. There is no other way: a person publishes, by RELEASE.md
        #[arg(long, required = true)]
        dry_run: bool,
    },
    /// Build the page of examples/web: `cargo xtask-web`
    ///
    /// Compiles the package to wasm, writes its JavaScript half, and puts both beside the page in
    /// one folder, which any web server can serve. If Rust has no standard library for
    /// wasm32-unknown-unknown (`rustup target add wasm32-unknown-unknown` adds it), its sources are
    /// taken from rustup's component rust-src, or fetched from Debian, and compiled too.
    #[cfg(feature = "web")]
    Web {
        /// Folder to write, created if need be [default: web/page in the target folder]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let workspace = Workspace::find()?;
    match &arguments.chore {
        Chore::Ci { list: true, .. } => {
            ci::list();
            Ok(())
        }
        Chore::Ci { steps, .. } => ci::run_steps(&workspace, steps),
        Chore::Kernels { emulated: true, .. } => kernels::build_emulated(&workspace),
        Chore::Kernels { check: false, .. } => kernels::build(&workspace),
        Chore::Kernels { check: true, .. } => kernels::check(&workspace),
        Chore::Header { check: false } => header::write(&workspace),
        Chore::Header { check: true } => header::check(&workspace),
        Chore::GpuBundle { out } => bundle::build(&workspace, out.as_deref()),
        Chore::Dist { target, out, profile, check } => dist::build(
            &workspace,
            &dist::Options { target: target.as_deref(), out: out.as_deref(), profile, check: *check },
        ),
        Chore::Targets => targets::check(&workspace),
        Chore::Release { dry_run: _ } => release::dry_run(&workspace),
        #[cfg(feature = "web")]
        Chore::Web { out } => web::build(&workspace, out.as_deref()),
    }
}
