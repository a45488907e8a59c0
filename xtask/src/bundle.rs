//! A folder with every program of the library, for a machine with an NVIDIA GPU and without Rust.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::table;
use crate::workspace::{Workspace, cargo, run, stdout_of};

/// Limit on the size of the bundle.
const MAX_BYTES: u64 = 60_000_000;

/// The programs, compressed: each one carries the library with all its kernels and shaders, which xz
/// finds again at its highest level. run.sh unpacks it.
const PROGRAMS: &str = "programs.tar.xz";

/// The C library's place among the programs.
const C_LIBRARY: &str = "capi/libvarlen_fa.so";

/// Builds the programs and writes the bundle to `out`.
pub fn build(workspace: &Workspace, out: Option<&Path>) -> Result<()> {
    let default = workspace.target.join("gpu-bundle");
    let out = out.unwrap_or(&default);
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let printed = stdout_of(cargo().current_dir(&workspace.root).args([
        "build",
        "--release",
        "--package=varlen-fa",
        "--package=varlen-fa-tests",
        "--all-features",
        "--tests",
        "--benches",
        "--examples",
        "--message-format=json-render-diagnostics",
    ]))?;
    let programs = programs(&printed)?;

    let staging = workspace.target.join("gpu-bundle-programs");
    if staging.exists() {
        fs::remove_dir_all(&staging).with_context(|| format!("cannot remove {}", staging.display()))?;
    }
    let mut rows = vec![["program", "bytes, stripped"].map(str::to_owned).to_vec()];
    for (name, executable) in &programs {
        let to = staging.join(name);
        let folder = to.parent().context("a program outside of any folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        run(Command::new("strip").arg("-o").arg(&to).arg(executable)).context("programs are stripped with binutils")?;
        rows.push(vec![name.clone(), fs::metadata(&to)?.len().to_string()]);
    }
    rows.push(vec![C_LIBRARY.to_owned(), add_c_library(workspace, &staging)?.to_string()]);
    let archive = out.join(PROGRAMS);
    run(Command::new("tar").env("XZ_OPT", "-9").arg("-cJf").arg(&archive).arg("-C").arg(&staging).arg("."))?;
    let script = out.join("run.sh");
    let source = workspace.root.join("scripts/gpu/run.sh");
    fs::copy(&source, &script).with_context(|| format!("cannot copy {} to {}", source.display(), script.display()))?;

    print!("{}", table::format(&rows));
    let total = fs::metadata(&archive)?.len() + fs::metadata(&script)?.len();
    ensure!(total < MAX_BYTES, "the bundle has {total} bytes, at most {MAX_BYTES} are allowed");
    println!(
        "\nwrote {}: {total} bytes. Copy it to the machine with the GPU and start run.sh.\n\
         Not in it, because of the model's 91 MB: the embed_sentences example.",
        out.display()
    );
    Ok(())
}

/// Puts the C library beside its Python test, in folders that lie to one another as they do here.
/// Gives the library's size.
fn add_c_library(workspace: &Workspace, staging: &Path) -> Result<u64> {
    run(cargo().current_dir(&workspace.root).args(["build", "--release", "--package=varlen-fa-capi"]))?;
    for file in ["capi/tests/test_varlen_fa.py", "capi/python/varlen_fa.py"] {
        let (from, to) = (workspace.root.join(file), staging.join(file));
        let folder = to.parent().context("a file outside of any folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::copy(&from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    let (from, to) = (workspace.target.join("release/libvarlen_fa.so"), staging.join(C_LIBRARY));
    run(Command::new("strip").arg("-o").arg(&to).arg(&from)).context("the library is stripped with binutils")?;
    Ok(fs::metadata(&to)?.len())
}

/// A line of `cargo build --message-format=json`.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

/// The executables that cargo says it built, by their names in the bundle.
fn programs(printed: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut programs = BTreeMap::new();
    for line in printed.lines() {
        let message: Message = serde_json::from_str(line).with_context(|| format!("cargo printed {line:?}"))?;
        let (Some(executable), Some(target)) = (message.executable, message.target) else { continue };
        let name = match target.kind.first().map(String::as_str) {
            Some("lib") => "tests/unit".to_owned(),
            Some("test") => format!("tests/{}", target.name),
            Some("bench") => format!("benches/{}", target.name),
            Some("example") => format!("examples/{}", target.name),
            _ => continue,
        };
        let first = programs.insert(name.clone(), executable);
        ensure!(first.is_none(), "cargo built two programs for {name}");
    }
    ensure!(programs.contains_key("tests/suite"), "cargo built {:?}, no tests/suite", programs.keys());
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::programs;

    const PRINTED: &str = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"half"},"executable":null}
{"reason":"build-script-executed","package_id":"libm"}
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"varlen_fa"},"executable":"/t/varlen_fa-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"suite"},"executable":"/t/suite-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"metadata"},"executable":"/t/metadata-1"}
{"reason":"compiler-artifact","target":{"kind":["bench"],"name":"metadata"},"executable":"/t/metadata-2"}
{"reason":"compiler-artifact","target":{"kind":["example"],"name":"layer"},"executable":"/t/examples/layer"}
{"reason":"build-finished","success":true}
"#;

    #[test]
    fn every_program_has_a_place() {
        let found = programs(PRINTED).unwrap();
        let names: Vec<_> = found.keys().map(String::as_str).collect();
        assert_eq!(names, ["benches/metadata", "examples/layer", "tests/metadata", "tests/suite", "tests/unit"]);
        assert_eq!(found["benches/metadata"], Path::new("/t/metadata-2"));
    }

    #[test]
    fn a_bundle_without_the_suite_is_refused() {
        assert!(programs(&PRINTED.replace("\"suite\"", "\"other\"")).is_err());
        assert!(programs(&PRINTED.replace("\"metadata\"", "\"suite\"").replace("bench", "test")).is_err());
        assert!(programs("Compiling").is_err());
    }
}
