//! What lies where in the archive.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::files::copy;
use super::foreign::Foreign;
use crate::workspace::{Workspace, run, stdout_of};

/// Names of files, which depend on the system and the version.
#[derive(Debug)]
pub struct Layout {
    /// Of the archive and of its folder.
    pub name: String,
    version: String,
    /// The shared library.
    pub shared: String,
    /// How programs that were linked with it call it: it stays while they and a newer library work together.
    soname: String,
    /// As cargo names it.
    pub extension: &'static str,
    /// What programs need that are linked with the static library, as `rustc --print native-static-libs` says.
    system: &'static str,
}

impl Layout {
    /// For the machine that builds.
    ///
    /// # Errors
    /// A system for which there is no layout yet.
    pub fn of_host(version: &str) -> Result<Self> {
        let about = stdout_of(Command::new("rustc").arg("-vV"))?;
        let host = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
        // One layout, and checks by binutils: elsewhere the library has other names, and nobody has tried them.
        ensure!(host.contains("-linux-"), "archives are made on Linux alone so far, not on {host}");
        let [major, minor, _] = version.split('.').collect::<Vec<_>>()[..] else {
            bail!("expected a version of three numbers, got {version}");
        };
        // Before 1.0 a minor version may change the library.
        let compatible = if major == "0" { format!("0.{minor}") } else { major.to_owned() };
        Ok(Self {
            name: format!("varlen-fa-{version}-{host}"),
            version: version.to_owned(),
            shared: format!("libvarlen_fa.so.{version}"),
            soname: format!("libvarlen_fa.so.{compatible}"),
            extension: "so",
            system: "-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc",
        })
    }

    /// Arguments of rustc, for the shared library.
    pub fn link_arguments(&self) -> [String; 2] {
        ["-C".to_owned(), format!("link-arg=-Wl,-soname,{}", self.soname)]
    }

    /// Fills the folder, but for licences of dependencies. Gives what the shared library needs.
    pub fn install(&self, workspace: &Workspace, folder: &Path, shared: &Path, archive: &Path) -> Result<Foreign> {
        let lib = folder.join("lib");
        let to = lib.join(&self.shared);
        copy(shared, &to)?;
        run(Command::new("strip").arg("--strip-unneeded").arg(&to)).context("libraries are stripped by binutils")?;
        for link in [&self.soname, "libvarlen_fa.so"] {
            run(Command::new("ln").arg("-s").arg(&self.shared).arg(lib.join(link)))?;
        }
        hide_foreign_symbols(workspace, archive, &lib.join("libvarlen_fa.a"))?;
        let foreign = Foreign::of(&to, &self.soname)?;

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
        let texts = [
            (lib.join("pkgconfig/varlen_fa.pc"), PKG_CONFIG),
            (cmake.join("varlen_fa-config.cmake"), CMAKE),
            (cmake.join("varlen_fa-config-version.cmake"), CMAKE_VERSION),
            (folder.join("README.md"), README),
        ];
        for (path, text) in texts {
            fs::create_dir_all(path.parent().context("a file without a folder")?)?;
            let text = text
                .trim_start()
                .replace("@VERSION@", &self.version)
                .replace("@SHARED@", &self.shared)
                .replace("@SONAME@", &self.soname)
                .replace("@SYSTEM@", self.system)
                .replace("@NEEDS@", &foreign.in_words());
            ensure!(!text.contains('@'), "{}: a placeholder is left", path.display());
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(foreign)
    }
}

/// Makes one object of a static library, of which only our functions can be seen from outside: it would else not link beside
/// another Rust library. Symbols of nothing but debuggers go.
fn hide_foreign_symbols(workspace: &Workspace, from: &Path, to: &Path) -> Result<()> {
    let object = workspace.target.join("dist-varlen_fa.o");
    run(Command::new("ld").args(["--relocatable", "--whole-archive", "-o"]).arg(&object).arg(from))
        .context("objects are linked by binutils")?;
    let ours = ["--wildcard", "--keep-global-symbol=varlen_fa_*", "--strip-unneeded"];
    // The standard library brings its bitcode, which is of no use here, and which plug-ins of `ar` fall over.
    let no_bitcode = ["--remove-section=.llvmbc", "--remove-section=.llvmcmd"];
    run(Command::new("objcopy").args(ours).args(no_bitcode).arg(&object))?;
    if to.exists() {
        fs::remove_file(to)?;
    }
    // D: no times and owners.
    run(Command::new("ar").arg("crsD").arg(to).arg(&object))?;
    let seen = stdout_of(Command::new("nm").args(["--extern-only", "--defined-only"]).arg(to))?;
    let foreign: Vec<_> = seen
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .filter(|name| !name.starts_with("varlen_fa_"))
        .collect();
    ensure!(foreign.is_empty(), "{} shows {foreign:?}", to.display());
    fs::remove_file(&object)?;
    Ok(())
}

const PKG_CONFIG: &str = "
prefix=${pcfiledir}/../..
libdir=${prefix}/lib
includedir=${prefix}/include

Name: varlen_fa
Description: Attention over padded batches that computes only what is valid
URL: https://github.com/varlen-fa/varlen-fa
Version: @VERSION@
Cflags: -I${includedir}
Libs: -L${libdir} -lvarlen_fa
Libs.private: @SYSTEM@
";

const CMAKE: &str = r#"
# Targets: varlen_fa::varlen_fa, the shared library, and varlen_fa::static.
get_filename_component(_varlen_fa_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET varlen_fa::varlen_fa)
  add_library(varlen_fa::varlen_fa SHARED IMPORTED)
  set_target_properties(varlen_fa::varlen_fa PROPERTIES
    IMPORTED_LOCATION "${_varlen_fa_prefix}/lib/@SHARED@"
    IMPORTED_SONAME "@SONAME@"
    INTERFACE_INCLUDE_DIRECTORIES "${_varlen_fa_prefix}/include")
  add_library(varlen_fa::static STATIC IMPORTED)
  set_target_properties(varlen_fa::static PROPERTIES
    IMPORTED_LOCATION "${_varlen_fa_prefix}/lib/libvarlen_fa.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_varlen_fa_prefix}/include"
    INTERFACE_LINK_LIBRARIES "@SYSTEM@")
endif()
unset(_varlen_fa_prefix)
"#;

const CMAKE_VERSION: &str = r#"
set(PACKAGE_VERSION "@VERSION@")
# Before 1.0 versions of one minor number work together.
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _varlen_fa_have "${PACKAGE_VERSION}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _varlen_fa_want "${PACKAGE_FIND_VERSION}")
if(PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION OR
   (_varlen_fa_want AND NOT _varlen_fa_want STREQUAL _varlen_fa_have))
  set(PACKAGE_VERSION_COMPATIBLE FALSE)
else()
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
  if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
  endif()
endif()
"#;

const README: &str = "
# varlen-fa @VERSION@, the C library

Attention over padded batches that computes only what is valid, on CUDA, on Vulkan and on the CPU.

- `include/`: `varlen_fa.h` for C, `varlen_fa.hpp` for C++11 and newer.
- `lib/`: the shared library, called `@SONAME@` by programs; the static one; files for pkg-config and
  CMake (`find_package(varlen_fa)`, targets `varlen_fa::varlen_fa` and `varlen_fa::static`).
- `python/varlen_fa.py`: a binding by ctypes, one file without dependencies.
- `examples/`: complete programs.

The shared library @NEEDS@. Drivers of GPUs are loaded when a device is opened.

```sh
export PKG_CONFIG_PATH=$PWD/lib/pkgconfig LD_LIBRARY_PATH=$PWD/lib
cc examples/masked_attention.c $(pkg-config --cflags --libs varlen_fa) -lm -o masked_attention
./masked_attention cpu
cc examples/masked_attention.c -I include lib/libvarlen_fa.a @SYSTEM@ -o static
PYTHONPATH=$PWD/python python3 -c 'import varlen_fa; print(varlen_fa.Library().version)'
```

MIT or Apache-2.0, at your choice. `THIRD-PARTY-LICENSES.txt` has the licences of what is built in.
";
