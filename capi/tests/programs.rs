//! Programs that use the C library as its users do: C with the shared and the static library, and
//! Python through ctypes.
//!
//! Cargo builds the library with this test. A program exits with 77 if its device is absent: then
//! the trial is ignored with the reason, or fails if `VARLEN_FA_TEST_REQUIRE` names the device.

mod library;

use std::env;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use self::library::{Library, NAME, expect_success, package, run};

const NOT_AVAILABLE: i32 = 77;
const REQUIRE: &str = "VARLEN_FA_TEST_REQUIRE";
const WARNINGS: [&str; 5] = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow"];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if cfg!(windows) {
        let trial = Trial::ignorable_test("programs", || {
            Ok(Completion::ignored_with("these trials call the compilers of Unix systems"))
        });
        return libtest_mimic::run(&arguments, vec![trial]).exit_code();
    }
    let mut trials = Vec::new();
    for (language, standard) in [("c", "c99"), ("c", "c11"), ("c", "c17"), ("c++", "c++11"), ("c++", "c++20")] {
        trials.push(trial(format!("header/{standard}"), move |_| header(language, standard)));
    }
    for standard in ["c++11", "c++17", "c++20"] {
        trials.push(trial(format!("hpp/{standard}"), move |_| hpp(standard)));
    }
    for linkage in [Linkage::Shared, Linkage::Static] {
        for device in ["cpu", "wgpu"] {
            for program in ["examples/masked_attention.c", "examples/masked_attention.cpp", "tests/contract.c"] {
                let name = Path::new(program).file_name().map(|name| name.to_string_lossy().replace('.', "_"));
                let name = format!("{}/{linkage:?}/{device}", name.unwrap_or_default()).to_lowercase();
                trials.push(trial(name, move |library| {
                    let mut program = compile(library, program, linkage)?;
                    judge(device, program.arg(device))
                }));
            }
        }
    }
    for test in ["fork", "fork_while_busy", "no_threads", "few_threads", "little_memory", "many_threads"] {
        trials.push(trial(format!("processes/{test}/cpu"), move |library| {
            let mut program = compile(library, "tests/processes.c", Linkage::Shared)?;
            judge("cpu", program.arg(test).arg("cpu"))
        }));
    }
    trials.push(trial("processes/fork/wgpu".to_owned(), |library| {
        let mut program = compile(library, "tests/processes.c", Linkage::Shared)?;
        judge("wgpu", program.arg("fork").arg("wgpu"))
    }));
    trials.push(trial("parallel/cpu".to_owned(), |library| {
        judge("cpu", &mut compile(library, "tests/parallel.c", Linkage::Shared)?)
    }));
    trials.push(trial("address_space/cpu".to_owned(), |library| {
        judge("address_space", &mut compile(library, "tests/address_space.c", Linkage::Shared)?)
    }));
    trials.push(trial("unload/cpu".to_owned(), unload));
    trials.push(trial("symbols".to_owned(), only_our_symbols));
    trials.push(trial("environment/dense_is_forced".to_owned(), dense_is_forced));
    trials.push(trial("environment/bad_value".to_owned(), bad_value));
    trials.push(trial("python/documentation".to_owned(), documented_python));
    for device in ["cpu", "wgpu", "cuda"] {
        trials.push(trial(format!("python/{device}"), move |library| python(library, device)));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(name: String, test: impl FnOnce(&Library) -> Result<Completion> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        Library::built().and_then(|library| test(&library)).map_err(|error| Failed::from(format!("{error:#}")))
    })
}

#[derive(Debug, Clone, Copy)]
enum Linkage {
    Shared,
    Static,
}

fn header(language: &str, standard: &str) -> Result<Completion> {
    let mut compiler = Command::new(if language == "c" { "cc" } else { "c++" });
    compiler.args(["-x", language, "-fsyntax-only", &format!("-std={standard}")]).args(WARNINGS);
    run(compiler.arg(package().join("include/varlen_fa.h")))?;
    Ok(Completion::Completed)
}

/// The header for C++ alone, and in a program.
fn hpp(standard: &str) -> Result<Completion> {
    let mut compiler = Command::new("c++");
    compiler
        .args(["-fsyntax-only", &format!("-std={standard}")])
        .args(WARNINGS)
        .arg("-I")
        .arg(package().join("include"));
    run(compiler.arg(package().join("examples/masked_attention.cpp")))?;
    Ok(Completion::Completed)
}

/// Loaded, used and unloaded while its threads live, and that again.
fn unload(library: &Library) -> Result<Completion> {
    if !cfg!(target_os = "linux") {
        return Ok(Completion::ignored_with("the library stays loaded by an option of ELF linkers"));
    }
    let mut program = compile(library, "tests/unload.c", Linkage::Shared)?;
    expect_success(&Command::new("unload"), &program.arg(&library.shared_library).output()?)?;
    Ok(Completion::Completed)
}

/// What the shared library exports is the header's.
fn only_our_symbols(library: &Library) -> Result<Completion> {
    if !cfg!(target_os = "linux") {
        return Ok(Completion::ignored_with("symbols are listed by binutils"));
    }
    let listed = run(Command::new("nm").args(["--dynamic", "--defined-only"]).arg(&library.shared_library))?;
    let listed = String::from_utf8(listed.stdout)?;
    let exported: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    let header = std::fs::read_to_string(package().join("include/varlen_fa.h"))?;
    ensure!(!exported.is_empty(), "the library exports nothing");
    for name in exported {
        ensure!(header.contains(&format!("{name}(")), "the library exports {name}, which the header does not have");
    }
    Ok(Completion::Completed)
}

/// The program, ready to be started.
fn compile(library: &Library, source: &str, linkage: Linkage) -> Result<Command> {
    let stem = Path::new(source).file_stem().context("a program without a name")?.to_string_lossy();
    // A name that no other trial uses at the same time.
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{stem}-{number}"));
    let (compiler, standard) = if source.ends_with(".cpp") { ("c++", "c++11") } else { ("cc", "c11") };
    let mut compiler = Command::new(compiler);
    compiler.arg(format!("-std={standard}")).arg("-O1").args(WARNINGS).arg("-I").arg(package().join("include"));
    compiler.arg("-o").arg(&program).arg(package().join(source));
    match linkage {
        Linkage::Shared => {
            let rpath = format!("-Wl,-rpath,{}", library.folder.display());
            compiler.arg("-L").arg(&library.folder).args([&format!("-l{NAME}"), &rpath])
        }
        Linkage::Static => compiler.arg(&library.static_library),
    };
    // What `rustc --print native-static-libs` names, and what the program needs.
    compiler.args(["-lm", "-lpthread"]);
    if cfg!(target_os = "linux") {
        compiler.args(["-ldl", "-lrt", "-lgcc_s"]);
    }
    if cfg!(target_os = "macos") {
        for framework in ["Foundation", "CoreGraphics", "QuartzCore", "Metal"] {
            compiler.args(["-framework", framework]);
        }
    }
    run(&mut compiler)?;
    let mut program = Command::new(program);
    clean(&mut program);
    Ok(program)
}

/// Removes the variables that the library reads.
fn clean(program: &mut Command) {
    for variable in ["", "_DEVICE", "_KERNEL", "_CPU", "_THREADS"] {
        program.env_remove(format!("VARLEN_FA{variable}"));
    }
}

fn python(library: &Library, device: &str) -> Result<Completion> {
    let Some(mut program) = python_with(library) else {
        return Ok(Completion::ignored_with("python3 is not installed"));
    };
    judge(device, program.arg(package().join("tests/test_varlen_fa.py")).arg(device))
}

/// The program in docs/external-c.md.
fn documented_python(library: &Library) -> Result<Completion> {
    let text = std::fs::read_to_string(package().join("../docs/external-c.md"))?;
    let program =
        text.split("```python\n").nth(1).and_then(|rest| rest.split("```").next()).context("no Python there")?;
    let path = library.shared_library.to_str().context("a folder whose name is no text")?;
    ensure!(program.contains("target/release/libvarlen_fa.so"), "the program loads another library");
    let program = program.replace("target/release/libvarlen_fa.so", path);
    let Some(mut python) = python_with(library) else {
        return Ok(Completion::ignored_with("python3 is not installed"));
    };
    python.env("PYTHONPATH", package().join("python"));
    let output = run(python.arg("-c").arg(program))?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(printed.starts_with("fused by cpu-tiled: metadata was given and"), "got {printed}");
    Ok(Completion::Completed)
}

/// Python, if it is installed, with the library's path in its environment.
fn python_with(library: &Library) -> Option<Command> {
    Command::new("python3").arg("--version").output().ok()?;
    let mut python = Command::new("python3");
    clean(&mut python);
    python.env("VARLEN_FA_LIBRARY", &library.shared_library).env("PYTHONDONTWRITEBYTECODE", "1");
    Some(python)
}

/// Runs a program that uses a device.
fn judge(device: &str, program: &mut Command) -> Result<Completion> {
    let output = program.output().with_context(|| format!("cannot start {program:?}"))?;
    if output.status.code() != Some(NOT_AVAILABLE) {
        expect_success(program, &output)?;
        return Ok(Completion::Completed);
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let required = env::var(REQUIRE).unwrap_or_default();
    ensure!(!required.split(',').any(|name| name.trim() == device), "{REQUIRE} names {device}, but {why}");
    Ok(Completion::ignored_with(why))
}

fn dense_is_forced(library: &Library) -> Result<Completion> {
    let mut program = compile(library, "examples/masked_attention.c", Linkage::Shared)?;
    let output = run(program.arg("cpu").env("VARLEN_FA", "0"))?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(printed.contains("dense attention is forced (VARLEN_FA=0)"), "got {printed}");
    Ok(Completion::Completed)
}

fn bad_value(library: &Library) -> Result<Completion> {
    let mut program = compile(library, "examples/masked_attention.c", Linkage::Shared)?;
    program.arg("auto");
    for (variable, value) in [("VARLEN_FA_DEVICE", "tpu"), ("VARLEN_FA_KERNEL", "fastest")] {
        clean(&mut program);
        let output = program.env(variable, value).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains(variable) && said.contains(value), "got {said}");
    }
    // The variable chooses a device only where the program names none.
    let mut program = compile(library, "examples/masked_attention.c", Linkage::Shared)?;
    run(program.arg("cpu").env("VARLEN_FA_DEVICE", "tpu"))?;
    Ok(Completion::Completed)
}
