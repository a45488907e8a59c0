//! Texts of the archive. `@NAMES@` are filled in.

pub const PKG_CONFIG: &str = "
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

pub const CMAKE_ELF: &str = r#"
# Targets: varlen_fa::varlen_fa, the shared library, and varlen_fa::static.
get_filename_component(_varlen_fa_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET varlen_fa::varlen_fa)
  add_library(varlen_fa::varlen_fa SHARED IMPORTED)
  set_target_properties(varlen_fa::varlen_fa PROPERTIES
    IMPORTED_LOCATION "${_varlen_fa_prefix}/@SHARED@"
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

pub const CMAKE_PE: &str = r#"
# The target: varlen_fa::varlen_fa, the DLL.
get_filename_component(_varlen_fa_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET varlen_fa::varlen_fa)
  add_library(varlen_fa::varlen_fa SHARED IMPORTED)
  set_target_properties(varlen_fa::varlen_fa PROPERTIES
    IMPORTED_LOCATION "${_varlen_fa_prefix}/@SHARED@"
    IMPORTED_IMPLIB "${_varlen_fa_prefix}/lib/libvarlen_fa.dll.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_varlen_fa_prefix}/include")
endif()
unset(_varlen_fa_prefix)
"#;

pub const CMAKE_VERSION: &str = r#"
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

pub const README_ELF: &str = "
# varlen-fa @VERSION@, the C library

Attention over padded batches that computes only what is valid, on CUDA, on Vulkan and on the CPU.

- `include/`: `varlen_fa.h` for C, `varlen_fa.hpp` for C++11 and newer.
- `lib/`: the shared library, called `@SONAME@` by programs; the static one; files for pkg-config and
  CMake (`find_package(varlen_fa)`, targets `varlen_fa::varlen_fa` and `varlen_fa::static`).
- `python/varlen_fa.py`: a binding by ctypes, one file without dependencies.
- `examples/`: complete programs.

The shared library @NEEDS@. Drivers of GPUs are loaded when a device is opened.
@TRIED@

```sh
export PKG_CONFIG_PATH=$PWD/lib/pkgconfig LD_LIBRARY_PATH=$PWD/lib
cc examples/masked_attention.c $(pkg-config --cflags --libs varlen_fa) -lm -o masked_attention
./masked_attention cpu
cc examples/masked_attention.c -I include lib/libvarlen_fa.a @SYSTEM@ -o static
PYTHONPATH=$PWD/python python3 -c 'import varlen_fa; print(varlen_fa.Library().version)'
```

MIT or Apache-2.0, at your choice. `THIRD-PARTY-LICENSES.txt` has the licences of what is built in.
";

pub const README_PE: &str = "
# varlen-fa @VERSION@, the C library for Windows, x86-64

Attention over padded batches that computes only what is valid, on CUDA, on Vulkan and DirectX 12,
and on the CPU.

- `bin/@SONAME@`: the library. Lay it beside your program.
- `lib/`: the import library, `libvarlen_fa.dll.a`; files for pkg-config and CMake
  (`find_package(varlen_fa)`, target `varlen_fa::varlen_fa`).
- `include/`: `varlen_fa.h` for C, `varlen_fa.hpp` for C++11 and newer.
- `python/varlen_fa.py`: a binding by ctypes, one file without dependencies.
- `examples/`: complete programs.

The library @NEEDS@. Windows 10 and newer have them all. Drivers of GPUs are loaded when a device is
opened. @TRIED@
It was built by MinGW-w64; nobody has tried Microsoft's compiler.

```sh
gcc examples/masked_attention.c -I include -L lib -lvarlen_fa -o bin/masked_attention.exe
bin/masked_attention.exe cpu
```

MIT or Apache-2.0, at your choice. `THIRD-PARTY-LICENSES.txt` has the licences of what is built in.
";
