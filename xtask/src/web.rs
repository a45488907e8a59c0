//! The page of examples/web: its wasm, the JavaScript half of that, and the files that go with
//! them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use wasm_bindgen_cli_support::Bindgen;

use crate::workspace::{Workspace, cargo, run, stdout_of};

const PACKAGE: &str = "masked_attention_web";
const TARGET: &str = "wasm32-unknown-unknown";

/// Builds the page into `out`.
pub fn build(workspace: &Workspace, out: Option<&Path>) -> Result<()> {
    let web = workspace.target.join("web");
    let out = out.map_or_else(|| web.join("page"), Path::to_owned);
    // A separate target folder, since flags differ where the standard library is compiled too.
    let build = web.join("build");
    let mut command = cargo();
    command.args(["build", "--release", "--lib", "--package", PACKAGE, "--target", TARGET, "--target-dir"]).arg(&build);
    if let Some(library) = standard_library_to_compile(workspace, &web)? {
        // `-Zbuild-std` is not stable; these are the variables that tests of cargo itself set.
        command.args(["-Zbuild-std=std,panic_abort"]).env("RUSTC_BOOTSTRAP", "1");
        command.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
    }
    run(&mut command)?;

    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let wasm = build.join(TARGET).join("release").join(PACKAGE).with_extension("wasm");
    let mut bindgen = Bindgen::new();
    bindgen.input_path(&wasm).typescript(false).omit_default_module_path(false);
    bindgen.web(true).and_then(|bindgen| bindgen.generate(&out)).map_err(|error| anyhow!("{error:#}"))?;
    let page = workspace.root.join("examples/web/page");
    for entry in fs::read_dir(&page).with_context(|| format!("cannot read {}", page.display()))? {
        let entry = entry?;
        let to = out.join(entry.file_name());
        fs::copy(entry.path(), &to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    let bytes = fs::metadata(out.join(format!("{PACKAGE}_bg.wasm")))?.len();
    println!("{}: wasm of {} KiB", out.display(), bytes >> 10);
    Ok(())
}

/// The sources of the standard library, unless a compiled one is there.
fn standard_library_to_compile(workspace: &Workspace, web: &Path) -> Result<Option<PathBuf>> {
    let rustc =
        |arguments: &[&str]| stdout_of(Command::new("rustc").args(arguments)).map(|text| text.trim().to_owned());
    if Path::new(&rustc(&["--print", "target-libdir", "--target", TARGET])?).is_dir() {
        return Ok(None);
    }
    let component = Path::new(&rustc(&["--print", "sysroot"])?).join("lib/rustlib/src/rust/library");
    if component.is_dir() {
        return Ok(Some(component));
    }
    let fetched = web.join("rust-src");
    run(Command::new(workspace.root.join("scripts/web/fetch_rust_src.sh")).arg(&fetched)).with_context(|| {
        format!("no standard library for {TARGET}, and no sources of it: `rustup target add {TARGET}` adds it")
    })?;
    Ok(Some(fetched.join("library")))
}
