//! Archives of the C library, for people without Rust.

mod files;
mod foreign;
mod layout;
mod licences;
mod strangers;
mod texts;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use self::layout::{Format, Layout};
use crate::table;
use crate::toolchain::Toolchain;
use crate::workspace::{Workspace, run, stdout_of};

/// What to build, and where to put it.
#[derive(Debug)]
pub struct Options<'a> {
    /// The system that they are for, as Rust names it; by default the one that builds.
    pub target: Option<&'a str>,
    /// The folder of the archives.
    pub out: Option<&'a Path>,
    /// Cargo's profile.
    pub profile: &'a str,
    /// Whether to build strangers' projects from the archives.
    pub check: bool,
}

/// Builds the library and writes archives of it: a tar.gz and a zip, for Windows a zip alone.
pub fn build(workspace: &Workspace, options: &Options<'_>) -> Result<()> {
    let toolchain = Toolchain::of(options.target)?;
    if let Some(missing) = toolchain.missing() {
        bail!(missing);
    }
    let layout = Layout::new(&workspace.version("varlen-fa-capi")?, toolchain)?;
    let [shared, archive] = libraries(workspace, options.profile, &layout)?;
    let default = workspace.target.join("archives");
    let out = options.out.unwrap_or(&default);
    let folder = out.join(&layout.name);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;

    let foreign = layout.install(workspace, &folder, &shared, &archive)?;
    licences::write(workspace, layout.toolchain.target(), &folder)?;
    let archives = pack(workspace, out, &layout)?;
    let mut rows = vec![["file", "bytes"].map(str::to_owned).to_vec()];
    for file in [&folder.join(&layout.shared), &folder.join(layout.archive)].into_iter().chain(&archives) {
        let name = file.strip_prefix(out).unwrap_or(file).display().to_string();
        rows.push(vec![name, fs::metadata(file)?.len().to_string()]);
    }
    print!("{}", table::format(&rows));
    println!("{}", foreign.in_words());
    if options.check {
        strangers::check(workspace, &archives[0], &layout)?;
    }
    Ok(())
}

/// The shared library, and the one to link with, as cargo builds them.
fn libraries(workspace: &Workspace, profile: &str, layout: &Layout) -> Result<[PathBuf; 2]> {
    #[derive(Deserialize)]
    struct Message {
        target: Option<Target>,
        #[serde(default)]
        filenames: Vec<PathBuf>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    let mut rustc =
        layout.toolchain.cargo(workspace, &["rustc", "-p", "varlen-fa-capi", "--lib", "--profile", profile])?;
    rustc.args(["--message-format=json-render-diagnostics", "--"]);
    let printed = stdout_of(rustc.args(layout.link_arguments()))?;
    let mut files = Vec::new();
    for line in printed.lines() {
        let message: Message = serde_json::from_str(line).with_context(|| format!("cargo printed {line:?}"))?;
        if message.target.is_some_and(|target| target.name == "varlen_fa") {
            files.extend(message.filenames);
        }
    }
    let [shared, archive] = layout.built_names().map(|name| {
        let found = files.iter().find(|file| file.file_name().is_some_and(|of| of == name));
        found.cloned().with_context(|| format!("cargo built {files:?}, no {name}"))
    });
    Ok([shared?, archive?])
}

/// Writes the archives. Their bytes depend on nothing but the files and the time of the commit.
fn pack(workspace: &Workspace, out: &Path, layout: &Layout) -> Result<Vec<PathBuf>> {
    let name = &layout.name;
    let extensions: &[_] = match layout.format {
        Format::Elf => &["tar.gz", "zip"],
        Format::Pe => &["zip"],
    };
    let time = stdout_of(Command::new("git").current_dir(&workspace.root).args(["log", "-1", "--format=%ct"]))?;
    let archives: Vec<_> = extensions.iter().map(|extension| out.join(format!("{name}.{extension}"))).collect();
    for archive in &archives {
        let mut python = Command::new("python3");
        python.args(["-c", PACK]).arg(archive).arg(out).arg(name).arg(time.trim());
        run(&mut python).context("archives are written by Python 3")?;
    }
    Ok(archives)
}

/// Python's standard library writes both kinds, with links as links.
const PACK: &str = "
import gzip, pathlib, stat, sys, tarfile, time, zipfile
archive, out, name, seconds = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
files = sorted(path for path in (out / name).rglob('*') if path.is_symlink() or path.is_file())
if archive.endswith('.zip'):
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as to:
        for path in files:
            info = zipfile.ZipInfo(path.relative_to(out).as_posix(), time.gmtime(max(seconds, 315532800))[:6])
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            is_link = path.is_symlink()
            info.external_attr = (stat.S_IFLNK | 0o777 if is_link else stat.S_IFREG | 0o644) << 16
            to.writestr(info, str(path.readlink()) if is_link else path.read_bytes())
else:
    def plain(info):
        info.uid = info.gid = 0
        info.uname = info.gname = ''
        info.mtime, info.mode = seconds, 0o777 if info.issym() else 0o644
        return info
    with open(archive, 'wb') as raw, gzip.GzipFile('', 'wb', 9, raw, mtime=seconds) as packed:
        with tarfile.open(fileobj=packed, mode='w') as to:
            for path in files:
                to.add(path, path.relative_to(out).as_posix(), filter=plain)
";
