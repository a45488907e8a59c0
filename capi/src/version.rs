//! Which library this is.

use std::ffi::c_char;

/// Version of this header. Compare with varlen_fa_version(): versions with the same major number
/// and, while that is 0, the same minor number work together.
pub const VARLEN_FA_VERSION_MAJOR: u32 = 0;
/// See VARLEN_FA_VERSION_MAJOR.
pub const VARLEN_FA_VERSION_MINOR: u32 = 1;
/// See VARLEN_FA_VERSION_MAJOR.
pub const VARLEN_FA_VERSION_PATCH: u32 = 0;

/// The library's version, as major * 1000000 + minor * 1000 + patch.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_version() -> u32 {
    VARLEN_FA_VERSION_MAJOR * 1_000_000 + VARLEN_FA_VERSION_MINOR * 1000 + VARLEN_FA_VERSION_PATCH
}

/// The library's version as text, e.g. "0.1.0"; valid for as long as the library is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_package_version() {
        let numbers = [VARLEN_FA_VERSION_MAJOR, VARLEN_FA_VERSION_MINOR, VARLEN_FA_VERSION_PATCH];
        assert_eq!(numbers.map(|number| number.to_string()).join("."), env!("CARGO_PKG_VERSION"));
    }
}
