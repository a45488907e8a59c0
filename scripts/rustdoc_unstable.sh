#!/bin/sh
# rustdoc with its unstable options, of the stable toolchain. `cargo xtask` starts it as RUSTDOC: the
# variable set for cargo itself would make it compile dependencies again.
RUSTC_BOOTSTRAP=1 exec rustdoc "$@"
