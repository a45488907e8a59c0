//! The CUDA kernels, compiled ahead of time into `kernels/prebuilt`, and the header that they share
//! with the host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::compiler::{Compiler, PACKAGES};
use crate::manifest::Manifest;
use crate::params;
use crate::ptxas::{self, Usage};
use crate::table;
use crate::workspace::{Workspace, capture, text};

/// Every fatbin together; they are part of each program that uses the library.
const MAX_TOTAL_BYTES: usize = 8_000_000;

/// The packages of compiled kernels, folders of `kernels/prebuilt`: crates.io's users download what is in them with the feature
/// `cuda` alone, and none is larger than `package.rs` allows.
pub const IMAGE_PACKAGES: [&str; 3] = [KERNELS, KERNELS_SM80, KERNELS_SM80_LATER];
const KERNELS: &str = "varlen-fa-kernels";
const KERNELS_SM80: &str = "varlen-fa-kernels-sm80";
const KERNELS_SM80_LATER: &str = "varlen-fa-kernels-sm80-later";

/// One source, and what it is compiled for.
#[derive(Debug)]
struct Source {
    /// The name of its fatbin.
    name: &'static str,
    /// The package that its fatbin is in.
    package: &'static str,
    /// Where it is in the kernels folder.
    path: &'static str,
    target: Target,
    /// Bytes that each of its kernels may spill to local memory, stores and loads each, on any
    /// architecture. Kernels that are named `*_masked` are off the hot path and may spill more.
    spill_bytes: u32,
}

/// A row for each fatbin; the library's `module.rs` loads them by these names.
const SOURCES: [Source; 9] = [
    sm80("attention_sm80", KERNELS_SM80, Target::UP_TO_SM100),
    sm80("attention_sm80_later", KERNELS_SM80_LATER, Target::FROM_SM120),
    // The exact softmax and the sums of parts are in the kernel too, and what a query tile
    // needs at its end is put aside while its loop runs. The loop itself has no spills. With key
    // ranges, head dimension 96 has the most: three warpgroups, and what each row sees; with segments
    // the loading warps add theirs.
    Source { target: Target::SM90, spill_bytes: 448, ..source("attention_sm90", "attention/sm90/attention.cu") },
    Source { target: Target::SM100, spill_bytes: 48, ..source("attention_sm100", "attention/sm100/attention.cu") },
    source("lse", "rows/lse.cu"),
    source("metadata", "rows/metadata.cu"),
    source("prepare_qk", "rows/prepare_qk.cu"),
    source("pack", "rows/pack.cu"),
    Source { target: Target::BY_TILE_LISTS, ..source("tile_lists", "rows/tile_lists.cu") },
];

/// A source for every chip, whose kernels spill nothing.
const fn source(name: &'static str, path: &'static str) -> Source {
    Source { name, package: KERNELS, path, target: Target::EVERY, spill_bytes: 0 }
}

/// The sm80 kernel, for some of the chips that `Target::EVERY` has: one package would be too large for all of them.
const fn sm80(name: &'static str, package: &'static str, target: Target) -> Source {
    // A few pointers. The fragments at head dimension 128 fill the register file, and the
    // compiler puts load addresses aside that it reads back once a tile; keeping them in shared
    // memory instead ended the spills and cost 3 to 5% on an H200.
    // Key ranges add a few more at head dimension 64, where three blocks share the registers, and
    // score modifiers and a bias by lists at 32 and 128.
    let spill_bytes = 128;
    let path = "attention/sm80/attention.cu";
    Source { name, package, path, target, spill_bytes }
}

impl Source {
    /// Where its fatbin is in `kernels/prebuilt`.
    fn place(&self) -> String {
        format!("{}/{}", self.package, fatbin_name(self.name))
    }
}

/// The files of a package of compiled kernels.
pub fn images(package: &str) -> impl Iterator<Item = String> {
    SOURCES.iter().filter(move |source| source.package == package).map(|source| fatbin_name(source.name))
}

/// What a source is compiled for.
#[derive(Debug, Clone, Copy)]
struct Target {
    /// Architectures as ptxas names them.
    archs: &'static [&'static str],
    /// Values of `-gencode`.
    codes: &'static [&'static str],
}

impl Target {
    /// Every chip from SM80 on. 86 and 89 run sm_80's machine code, and 103 and 121 that of 100 and
    /// 120; later chips compile the PTX.
    const EVERY: Self = Self {
        archs: &["sm_80", "sm_90", "sm_100", "sm_120"],
        codes: &[
            "arch=compute_80,code=sm_80",
            "arch=compute_80,code=sm_90",
            "arch=compute_80,code=sm_100",
            "arch=compute_80,code=sm_120",
            "arch=compute_80,code=compute_80",
        ],
    };
    /// The halves of `EVERY`: machine code that chips up to 10.3 run; and what the others do.
    const UP_TO_SM100: Self = Self {
        archs: &["sm_80", "sm_90", "sm_100"],
        codes: &["arch=compute_80,code=sm_80", "arch=compute_80,code=sm_90", "arch=compute_80,code=sm_100"],
    };
    const FROM_SM120: Self =
        Self { archs: &["sm_120"], codes: &["arch=compute_80,code=sm_120", "arch=compute_80,code=compute_80"] };
    /// Chips whose attention kernels read tile lists.
    const BY_TILE_LISTS: Self =
        Self { archs: &["sm_90", "sm_100"], codes: &["arch=compute_80,code=sm_90", "arch=compute_80,code=sm_100"] };
    /// 9.0 alone, with the instructions that only it has.
    const SM90: Self = Self { archs: &["sm_90a"], codes: &["arch=compute_90a,code=sm_90a"] };
    /// The family of 10.0, of which 10.3 is.
    const SM100: Self = Self { archs: &["sm_100f"], codes: &["arch=compute_100f,code=sm_100f"] };

    fn flags(self) -> impl Iterator<Item = &'static str> {
        self.codes.iter().flat_map(|code| ["-gencode", code])
    }
}

/// For every kernel. `size` is the strongest compression; a driver that loads this compiler's PTX
/// (580) unpacks it.
const FLAGS: [&str; 8] =
    ["-fatbin", "-O3", "-std=c++17", "--compress-mode=size", "-Werror", "all-warnings", "-Xptxas", "-v"];

/// The sm100 kernel over an emulation of what compute capability 9.0 lacks; with waits between its
/// warps in the second form, and wrong on purpose in the third.
const EMULATED: &str = "attention_sm100";
const EMULATED_FORMS: [(&str, &[&str]); 3] = [
    ("emulated", &[]),
    ("emulated_jitter", &["-DVARLEN_FA_JITTER=1"]),
    ("emulated_wrong", &["-DVARLEN_FA_EMULATE_WRONG"]),
];

/// Folders of sources and headers; the others hold what comes of them.
const FOLDERS: [&str; 4] = ["attention", "common", "ptx", "rows"];

const MANIFEST: &str = "manifest.json";

/// Writes the shared header, compiles everything and writes `kernels/prebuilt`.
pub fn build(workspace: &Workspace) -> Result<()> {
    let header = workspace.root.join(params::HEADER);
    fs::write(&header, params::header()).with_context(|| format!("cannot write {}", header.display()))?;
    let kernels = Kernels::read(workspace)?;
    let built = kernels.compile(workspace)?;
    let folder = kernels.folder.join("prebuilt");
    for stale in fatbins_in(&folder)?.into_iter().filter(|place| !built.fatbins.contains_key(place)) {
        fs::remove_file(folder.join(&stale))?;
        println!("removed {stale}: its source is gone");
    }
    for (place, bytes) in &built.fatbins {
        let path = folder.join(place);
        // Renamed into place: a compilation of the library beside this one reads whole files.
        let part = path.with_extension("part");
        fs::write(&part, bytes)
            .and_then(|()| fs::rename(&part, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    built.manifest.write(&folder.join(MANIFEST))?;
    println!("wrote {}", folder.display());
    built.check_defects()
}

/// Compiles the emulated forms of the sm100 kernel, and the program that tests the emulation
/// itself, into `target/kernels`.
pub fn build_emulated(workspace: &Workspace) -> Result<()> {
    let compiler = Compiler::install(workspace)?;
    let (folder, out) = (workspace.root.join("kernels"), workspace.target.join("kernels"));
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let source = SOURCES.iter().find(|source| source.name == EMULATED).context("the emulated kernel has no source")?;
    let common =
        ["-O3", "-std=c++17", "--compress-mode=size", "-Werror", "all-warnings", "-DVARLEN_FA_EMULATE_TCGEN05"];
    // A barrier that never opens gives wrong results instead of a hanging device.
    let limit = "-DVARLEN_FA_SPIN_LIMIT=20000000";
    for (form, defines) in EMULATED_FORMS {
        let fatbin = out.join(fatbin_name(&format!("{EMULATED}_{form}")));
        let mut nvcc = compiler.command();
        nvcc.current_dir(&folder)
            .arg("-fatbin")
            .args(common)
            .arg(limit)
            .args(defines)
            .args(Target::SM90.flags())
            .arg("-o")
            .arg(&fatbin);
        capture(nvcc.arg(source.path)).with_context(|| format!("cannot compile the {form} form"))?;
        println!("wrote {}", fatbin.display());
    }
    let program = out.join("tcgen05_emulated");
    let mut nvcc = compiler.command();
    nvcc.current_dir(&folder).args(common).args(Target::SM90.flags()).arg("-L").arg(compiler.libraries()?);
    nvcc.arg("-o").arg(&program).arg("tests/tcgen05_emulated.cu");
    capture(&mut nvcc).context("cannot compile the tests of the emulation")?;
    println!("wrote {}", program.display());
    Ok(())
}

/// Compares the shared header with what the library declares; compiles everything and compares it
/// with `kernels/prebuilt`.
pub fn check(workspace: &Workspace) -> Result<()> {
    let header = read(&workspace.root.join(params::HEADER))?;
    ensure!(
        header == params::header().as_bytes(),
        "{} is not what the library declares: run `cargo xtask kernels` and commit it",
        params::HEADER
    );
    let kernels = Kernels::read(workspace)?;
    let built = kernels.compile(workspace)?;
    let folder = kernels.folder.join("prebuilt");
    let mut differences = match Manifest::read(&folder.join(MANIFEST)) {
        Ok(recorded) => built.manifest.differences(&recorded),
        Err(error) => vec![format!("{error:#}")],
    };
    differences.extend(file_differences(&built.fatbins, &folder)?);
    if !differences.is_empty() {
        for difference in &differences {
            eprintln!("- {difference}");
        }
        // Nothing else is worth saying about kernels that nobody would run.
        bail!(
            "kernels/prebuilt is not what the sources in kernels compile to: run `cargo xtask kernels` and commit kernels/prebuilt"
        );
    }
    println!("kernels/prebuilt is up to date");
    built.check_defects()
}

/// Contents of the kernels folder.
struct Kernels {
    folder: PathBuf,
    /// Each header and each source, by its path in the folder.
    files: BTreeMap<String, Vec<u8>>,
}

impl Kernels {
    fn read(workspace: &Workspace) -> Result<Self> {
        let folder = workspace.root.join("kernels");
        let mut files = BTreeMap::new();
        for below in FOLDERS {
            read_files(&folder, below, &mut files)?;
        }
        let is_listed = |path: &&String| SOURCES.iter().any(|source| source.path == path.as_str());
        let unlisted: Vec<_> = files.keys().filter(|path| is_source(path)).filter(|path| !is_listed(path)).collect();
        ensure!(unlisted.is_empty(), "SOURCES in xtask/src/kernels.rs does not list {unlisted:?}");
        Ok(Self { folder, files })
    }

    /// Compiles each source, as many at a time as there are cores, and prints what came out.
    fn compile(&self, workspace: &Workspace) -> Result<Built> {
        let compiler = Compiler::install(workspace)?;
        let out = workspace.target.join("kernels");
        fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let compiled = in_parallel(&SOURCES, threads, |source| self.compile_one(&compiler, &out, source, threads))?;

        let of_source =
            |source: &Source| format!("{}: {}", source.path, source.target.flags().collect::<Vec<_>>().join(" "));
        let flags: Vec<String> = FLAGS.map(str::to_owned).into_iter().chain(SOURCES.iter().map(of_source)).collect();
        let headers = self.files.iter().filter(|(path, _)| !is_source(path));
        let mut manifest = Manifest::new(&compiler.version, PACKAGES, &flags, headers);
        let mut fatbins = BTreeMap::new();
        let mut usages = vec![];
        let mut defects = vec![];
        let mut rows = vec![["image", "seconds", "kernels", "fatbin bytes"].map(str::to_owned).to_vec()];
        for (source, one) in SOURCES.iter().zip(compiled) {
            let text = self.files.get(source.path).with_context(|| format!("there is no {}", source.path))?;
            let kernels: BTreeSet<_> = one.usages.iter().map(|usage| usage.kernel.clone()).collect();
            rows.push(vec![
                source.name.to_owned(),
                format!("{:.1}", one.time.as_secs_f64()),
                kernels.len().to_string(),
                one.fatbin.len().to_string(),
            ]);
            manifest.add(source.name, source.path, text, kernels, &one.fatbin);
            let spilling = one.usages.iter().filter(|usage| usage.is_defect(source.spill_bytes));
            defects.extend(spilling.map(|usage| format!("{} ({})", usage.kernel, usage.arch)));
            fatbins.insert(source.place(), one.fatbin);
            usages.extend(one.usages);
        }
        println!("{}", compiler.version);
        println!("\nRegisters, bytes of static shared memory, bytes of spill stores/loads:");
        let archs: BTreeSet<_> = usages.iter().map(|usage: &Usage| usage.arch.as_str()).collect();
        print!("{}", ptxas::usage_table(&usages, &archs.into_iter().collect::<Vec<_>>()));
        println!("\n{}", table::format(&rows));
        let total = manifest.total_bytes();
        ensure!(
            total < MAX_TOTAL_BYTES,
            "the fatbins have {total} bytes together, at most {MAX_TOTAL_BYTES} are allowed"
        );
        Ok(Built { manifest, fatbins, defects })
    }

    fn compile_one(&self, compiler: &Compiler, out: &Path, source: &Source, threads: usize) -> Result<Compiled> {
        let start = Instant::now();
        let &Source { name, path, target, .. } = source;
        let fatbin = out.join(fatbin_name(name));
        let mut nvcc = compiler.command();
        nvcc.current_dir(&self.folder)
            .args(FLAGS)
            .args(source.target.flags())
            .args(["--threads", &threads.to_string()])
            .arg("-o")
            .arg(&fatbin);
        let output = capture(nvcc.arg(path)).with_context(|| format!("cannot compile {path}"))?;
        let printed = text(&output);
        // What -Werror leaves a warning.
        ensure!(!printed.contains("warning"), "{path} compiles with warnings:\n{printed}");
        let usages = ptxas::parse(&printed).with_context(|| format!("{path}:\n{printed}"))?;
        let archs = target.archs;
        for &arch in archs {
            let count = usages.iter().filter(|usage| usage.arch == arch).count();
            let all = usages.len();
            ensure!(
                count * archs.len() == all && count > 0,
                "{path}: ptxas reports {count} kernels for {arch}, {all} for {archs:?}"
            );
        }
        let time = start.elapsed();
        eprintln!("{name}: {:.1} s", time.as_secs_f64());
        Ok(Compiled { fatbin: read(&fatbin)?, usages, time })
    }
}

/// What one source was compiled to.
struct Compiled {
    fatbin: Vec<u8>,
    usages: Vec<Usage>,
    time: Duration,
}

/// What all sources were compiled to.
struct Built {
    manifest: Manifest,
    /// By their places in `kernels/prebuilt`.
    fatbins: BTreeMap<String, Vec<u8>>,
    /// Hot kernels that spill more than their source may.
    defects: Vec<String>,
}

impl Built {
    fn check_defects(&self) -> Result<()> {
        ensure!(self.defects.is_empty(), "hot kernels spill registers: {}", self.defects.join(", "));
        Ok(())
    }
}

/// How the files of the packages in a folder differ from what they must be.
fn file_differences(built: &BTreeMap<String, Vec<u8>>, folder: &Path) -> Result<Vec<String>> {
    let mut differences = vec![];
    for (place, bytes) in built {
        match fs::read(folder.join(place)) {
            Err(error) => differences.push(format!("cannot read prebuilt/{place}: {error}")),
            Ok(found) if found != *bytes => {
                let same = found.iter().zip(bytes).take_while(|(a, b)| a == b).count();
                let (was, is) = (found.len(), bytes.len());
                differences
                    .push(format!("prebuilt/{place} has {was} bytes, {is} expected, and differs from byte {same} on"));
            }
            Ok(_) => {}
        }
    }
    for place in fatbins_in(folder)?.into_iter().filter(|place| !built.contains_key(place)) {
        differences.push(format!("prebuilt/{place} has no source"));
    }
    Ok(differences)
}

/// The fatbins of a folder and of the packages in it, by their places there, in order.
fn fatbins_in(folder: &Path) -> Result<Vec<String>> {
    let mut found = vec![];
    for path in entries(folder)? {
        let files = if path.is_dir() { entries(&path)? } else { vec![path] };
        let fatbins = files.iter().filter(|file| file.extension().is_some_and(|is| is == "fatbin"));
        found.extend(fatbins.filter_map(|file| Some(file.strip_prefix(folder).ok()?.to_str()?.to_owned())));
    }
    found.sort();
    Ok(found)
}

fn fatbin_name(name: &str) -> String {
    format!("{name}.fatbin")
}

fn is_source(path: &str) -> bool {
    path.ends_with(".cu")
}

fn read_files(folder: &Path, below: &str, into: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    for path in entries(&folder.join(below))? {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = format!("{below}/{}", name.with_context(|| format!("{} is not named in UTF-8", path.display()))?);
        if path.is_dir() {
            read_files(folder, &name, into)?;
        } else {
            into.insert(name, read(&path)?);
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(list.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The results of `work` for each item, in their order, `threads` at a time; all errors together if
/// there are any.
fn in_parallel<I: Sync, T: Send>(items: &[I], threads: usize, work: impl Fn(&I) -> Result<T> + Sync) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = vec![];
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut results: Vec<(usize, Result<T>)> = vec![];
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(items.len())).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            match worker.join() {
                Ok(done) => results.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    results.sort_by_key(|&(index, _)| index);
    let mut values = vec![];
    let mut errors = vec![];
    for (_, result) in results {
        match result {
            Ok(value) => values.push(value),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    ensure!(errors.is_empty(), "{}", errors.join("\n\n"));
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::{env, fs, process};

    use anyhow::ensure;

    use super::{IMAGE_PACKAGES, KERNELS_SM80_LATER, SOURCES, Source, Target, file_differences, images, in_parallel};

    #[test]
    fn every_architecture_is_asked_for() {
        for source in SOURCES {
            let codes: Vec<_> = source.target.flags().filter_map(|flag| flag.split_once("code=")).collect();
            let machine_codes: Vec<_> =
                codes.iter().map(|&(_, code)| code).filter(|code| code.starts_with("sm_")).collect();
            assert_eq!(machine_codes, source.target.archs, "{}", source.name);
        }
    }

    #[test]
    fn halves_are_the_whole() {
        let halves = [Target::UP_TO_SM100, Target::FROM_SM120];
        assert_eq!(halves.map(|half| half.archs).concat(), Target::EVERY.archs);
        assert_eq!(halves.map(|half| half.codes).concat(), Target::EVERY.codes);
    }

    #[test]
    fn every_package_has_images() {
        let listed: BTreeSet<_> = SOURCES.iter().map(|source| source.package).collect();
        assert_eq!(listed, BTreeSet::from(IMAGE_PACKAGES));
        assert_eq!(images(KERNELS_SM80_LATER).collect::<Vec<_>>(), ["attention_sm80_later.fatbin"]);
        let places: BTreeSet<_> = SOURCES.iter().map(Source::place).collect();
        assert_eq!(places.len(), SOURCES.len());
    }

    #[test]
    fn results_keep_their_order_and_all_errors_are_told() {
        let items = ["a", "bb", "ccc", "dddd", "eeeee"];
        for threads in [1, 3, 8] {
            assert_eq!(in_parallel(&items, threads, |item| Ok(item.len())).unwrap(), [1, 2, 3, 4, 5]);
            let odd = |item: &&str| {
                ensure!(item.len() % 2 == 1, "even: {item}");
                Ok(())
            };
            let error = in_parallel(&items, threads, odd).unwrap_err().to_string();
            assert_eq!(error, "even: bb\n\neven: dddd");
        }
    }

    #[test]
    fn files_that_differ_are_named() {
        let folder = env::temp_dir().join(format!("xtask-test-{}", process::id()));
        fs::create_dir_all(folder.join("package")).unwrap();
        for (name, bytes) in [("same", "abc"), ("changed", "abc"), ("longer", "abcd"), ("stale", "abc")] {
            fs::write(folder.join(format!("package/{name}.fatbin")), bytes).unwrap();
        }
        fs::write(folder.join("manifest.json"), "").unwrap();
        fs::write(folder.join("outside.fatbin"), "abc").unwrap();
        let built = [("same", "abc"), ("changed", "abx"), ("longer", "abc"), ("absent", "abc")];
        let built =
            BTreeMap::from(built.map(|(name, bytes)| (format!("package/{name}.fatbin"), bytes.as_bytes().to_vec())));
        let found = file_differences(&built, &folder);
        fs::remove_dir_all(&folder).unwrap();
        let found = found.unwrap();
        let expected = [
            "cannot read prebuilt/package/absent.fatbin",
            "prebuilt/package/changed.fatbin has 3 bytes, 3 expected, and differs from byte 2",
            "prebuilt/package/longer.fatbin has 4 bytes, 3 expected, and differs from byte 3",
            "prebuilt/outside.fatbin has no source",
            "prebuilt/package/stale.fatbin has no source",
        ];
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found}");
        }
    }
}
