//! Projects of people who have nothing but the archive and the published crate, in a folder outside of the repository.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context, Result, ensure};

use super::layout::{Format, Layout};
use crate::package::{Source, Unpacked};
use crate::workspace::{Workspace, capture, cargo, is_installed, run, stdout_of};

/// Builds and runs them; leaves nothing behind unless one fails.
pub fn check(workspace: &Workspace, archive: &Path, layout: &Layout) -> Result<()> {
    let folder = env::temp_dir().join(format!("varlen-fa-strangers-{}", process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    match layout.format {
        Format::Elf => run(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(&folder))?,
        Format::Pe => run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(archive).arg(&folder))?,
    }
    let stranger = Stranger { workspace, layout, unpacked: folder.join(&layout.name), folder };
    stranger.c_and_cpp()?;
    if layout.toolchain.is_native() {
        stranger.cmake()?;
        stranger.python()?;
        stranger.rust()?;
    } else {
        println!("+ CMake, Python and Rust: skipped, they are tried with the archive of the machine that builds");
        stranger.path_of_the_binding()?;
    }
    fs::remove_dir_all(&stranger.folder)?;
    println!("strangers' projects build and run");
    Ok(())
}

struct Stranger<'a> {
    workspace: &'a Workspace,
    layout: &'a Layout,
    folder: PathBuf,
    unpacked: PathBuf,
}

impl Stranger<'_> {
    /// The examples with pkg-config, and with the static library where there is one.
    fn c_and_cpp(&self) -> Result<()> {
        let lib = self.unpacked.join("lib");
        let flags = |arguments: &[&str]| -> Result<Vec<String>> {
            let mut pkg_config = Command::new("pkg-config");
            pkg_config.env("PKG_CONFIG_PATH", lib.join("pkgconfig"));
            let printed = stdout_of(pkg_config.args(arguments).arg("varlen_fa")).context("pkg-config is needed")?;
            Ok(printed.split_whitespace().map(str::to_owned).collect())
        };
        let compile = flags(&["--cflags"])?;
        let mut linkages = vec![("shared", flags(&["--libs"])?)];
        if self.layout.format == Format::Elf {
            let system = flags(&["--libs-only-l", "--static"])?.into_iter().filter(|flag| flag != "-lvarlen_fa");
            let library = self.unpacked.join(self.layout.archive).display().to_string();
            linkages.push(("static", [library].into_iter().chain(system).collect()));
        }
        let toolchain = &self.layout.toolchain;
        for (compiler, source) in [("gcc", "masked_attention.c"), ("g++", "masked_attention.cpp")] {
            let compiler = toolchain.tool(compiler);
            if !toolchain.is_native() && !is_installed(&compiler) {
                println!("+ {source}: skipped, {compiler} is not installed");
                continue;
            }
            for (linkage, libraries) in &linkages {
                // Windows looks for libraries where the program lies, Linux where it is told to.
                let folder = match self.layout.format {
                    Format::Elf => self.folder.clone(),
                    Format::Pe => self.unpacked.join("bin"),
                };
                let program = folder.join(format!("{source}-{linkage}.exe"));
                let mut command = Command::new(&compiler);
                command.arg("-o").arg(&program).arg(self.unpacked.join("examples").join(source));
                if self.layout.format == Format::Pe {
                    // The compiler's own libraries would have to lie beside the program.
                    command.args(["-static-libgcc", "-static-libstdc++"]);
                }
                run(command.args(&compile).args(libraries).arg("-lm"))?;
                println!("+ {source}, {linkage}");
                let mut program = toolchain.program(self.workspace, &program)?;
                if self.layout.format == Format::Elf && *linkage == "shared" {
                    program.env("LD_LIBRARY_PATH", &lib);
                }
                run(program.arg("cpu"))?;
            }
        }
        Ok(())
    }

    /// `find_package`, where there is CMake.
    fn cmake(&self) -> Result<()> {
        if capture(Command::new("cmake").arg("--version")).is_err() {
            println!("+ CMake: skipped, it is not installed");
            return Ok(());
        }
        let project = self.folder.join("cmake");
        fs::create_dir_all(&project)?;
        fs::write(project.join("CMakeLists.txt"), CMAKE_PROJECT)?;
        for source in ["masked_attention.c", "masked_attention.cpp"] {
            fs::copy(self.unpacked.join("examples").join(source), project.join(source))?;
        }
        let build = project.join("build");
        println!("+ CMake");
        let mut configure = Command::new("cmake");
        configure.arg("-S").arg(&project).arg("-B").arg(&build);
        capture(configure.arg(format!("-DCMAKE_PREFIX_PATH={}", self.unpacked.display())))?;
        capture(Command::new("cmake").arg("--build").arg(&build))?;
        for program in ["with_shared", "with_static", "with_cpp"] {
            run(Command::new(build.join(program)).arg("cpu"))?;
        }
        Ok(())
    }

    /// The binding finds the library beside it.
    fn python(&self) -> Result<()> {
        println!("+ Python");
        let mut python = Command::new("python3");
        python
            .current_dir(&self.folder)
            .env("PYTHONPATH", self.unpacked.join("python"))
            .env_remove("VARLEN_FA_LIBRARY");
        run(python.args(["-c", PYTHON_PROGRAM]))
    }

    /// The binding would look for the library where it lies: there is no Python of that system here.
    fn path_of_the_binding(&self) -> Result<()> {
        let platform = match self.layout.format {
            Format::Elf => "linux",
            Format::Pe => "win32",
        };
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", self.unpacked.join("python")).env_remove("VARLEN_FA_LIBRARY");
        let found = stdout_of(python.args(["-c", PYTHON_PATH, platform]))?;
        let found = fs::canonicalize(found.trim()).with_context(|| format!("the binding looks for {found:?}"))?;
        ensure!(found == fs::canonicalize(self.unpacked.join(&self.layout.shared))?, "the binding takes {found:?}");
        Ok(())
    }

    /// The crates as they are published, in a project with the README's program.
    fn rust(&self) -> Result<()> {
        let workspace = self.workspace;
        println!("+ Rust");
        let Unpacked { library, patches } = Unpacked::new(workspace, Source::WorkingTree)?;
        let project = self.folder.join("rust");
        fs::create_dir_all(project.join("src"))?;
        let manifest = format!(
            "[package]\nname = \"stranger\"\nversion = \"1.0.0\"\nedition = \"2024\"\n\n[dependencies]\nvarlen-fa = {{ path = {:?} }}\n{patches}",
            library.display().to_string()
        );
        fs::write(project.join("Cargo.toml"), manifest)?;
        let readme = fs::read_to_string(library.join("README.md"))?;
        let program = readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next());
        fs::write(project.join("src/main.rs"), program.context("the README has no program")?)?;
        // The versions that are tested, and compiled already.
        fs::copy(workspace.root.join("Cargo.lock"), project.join("Cargo.lock"))?;
        let mut command = cargo();
        command.current_dir(&project).env("CARGO_TARGET_DIR", &workspace.target).env("VARLEN_FA_DEVICE", "cpu");
        let printed = stdout_of(command.args(["run", "--release", "--quiet"]))?;
        ensure!(printed.contains("cpu-tiled"), "the README's program printed {printed:?}");
        print!("{printed}");
        Ok(())
    }
}

const CMAKE_PROJECT: &str = "\
cmake_minimum_required(VERSION 3.10)
project(stranger C CXX)
find_package(varlen_fa 0.1 REQUIRED)
add_executable(with_shared masked_attention.c)
target_link_libraries(with_shared varlen_fa::varlen_fa m)
add_executable(with_static masked_attention.c)
target_link_libraries(with_static varlen_fa::static m)
set(CMAKE_CXX_STANDARD 11)
add_executable(with_cpp masked_attention.cpp)
target_link_libraries(with_cpp varlen_fa::varlen_fa)
";

const PYTHON_PATH: &str = "
import sys, varlen_fa
sys.platform = sys.argv[1]
print(varlen_fa.default_path())
";

const PYTHON_PROGRAM: &str = "
import array, varlen_fa as vf
library = vf.Library()
device = library.open('cpu')
meta = library.meta_from_lengths([3, 5], seq=5)
x = array.array('f', [0.5] * (2 * 5 * 4 * 8))
out = array.array('f', [0.0] * len(x))
view = lambda data: vf.tensor(data.buffer_info()[0], [2, 5, 4, 8], None, vf.F32)
plan = vf.Plan()
device.forward(view(x), view(x), view(x), view(out), vf.varlen(meta), plan=plan)
assert out[0] == 0.5 and out[3 * 4 * 8] == 0.0
print(library.version, plan)
";
