//! The enums of the header as tables: each value, what it means in the Rust library, and its name.
//!
//! Everything that knows the values reads these tables: conversions both ways, the check of numbers
//! that C passes, and the names that C can ask for. A new kernel is one value in `types.rs` and one
//! word here.

use std::ffi::{CStr, c_char};
use std::fmt::Debug;
use std::mem::MaybeUninit;

use varlen::{BackendKind, DType, Kernel, MaskDType, Path, Reason, RotaryPairing};

use crate::types::{
    varlen_fa_device_kind, varlen_fa_dtype, varlen_fa_kernel, varlen_fa_mask_dtype, varlen_fa_mask_kind,
    varlen_fa_memory, varlen_fa_parallel_mode, varlen_fa_path, varlen_fa_reason, varlen_fa_rotary_pairing,
    varlen_fa_status,
};

/// An enum of the header. Values without a row (UNLISTED) are never accepted from C.
pub(crate) trait Named: Copy + Debug + PartialEq + 'static {
    /// What a value means in the Rust library; the value itself if only this library uses it.
    type Meaning: Copy + Debug + PartialEq + 'static;
    const TABLE: &'static [Row<Self>];
}

/// One value of an enum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<E: Named> {
    pub value: E,
    pub number: u32,
    pub meaning: E::Meaning,
    pub name: &'static CStr,
}

/// The value with a meaning, if the header has one.
pub(crate) fn value_of<E: Named>(meaning: E::Meaning) -> Option<E> {
    E::TABLE.iter().find(|row| row.meaning == meaning).map(|row| row.value)
}

/// The number that C passed as an enum.
pub(crate) fn number<E: Named>(given: MaybeUninit<E>) -> u32 {
    const { assert!(size_of::<E>() == size_of::<u32>() && align_of::<E>() == align_of::<u32>()) };
    // SAFETY: an initialised number of this size and alignment, since C passes arguments and fields
    // initialised. It is read as a number because it may be none of the enum's.
    unsafe { given.as_ptr().cast::<u32>().read() }
}

/// The row of a number that C passed, if there is one.
pub(crate) fn row_of<E: Named>(number: u32) -> Option<&'static Row<E>> {
    E::TABLE.iter().find(|row| row.number == number)
}

/// A name that is a constant of the Rust library, as a C string.
macro_rules! c_name {
    ($name:expr) => {{
        const NAME: &str = $name;
        const BYTES: [u8; NAME.len() + 1] = terminated(NAME);
        match CStr::from_bytes_with_nul(&BYTES) {
            Ok(name) => name,
            Err(_) => panic!("a name contains a zero byte"),
        }
    }};
}

const fn terminated<const N: usize>(name: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let mut at = 0;
    while at < name.len() {
        bytes[at] = name.as_bytes()[at];
        at += 1;
    }
    bytes
}

/// The table of an enum. Values are spelled as in the Rust type that they stand for.
macro_rules! table {
    // Values of a Rust type that has names.
    ($enum:ident: $type:ident { $($value:ident),+ }) => {
        table!($enum: $type = $type { $($value = $type::$value, c_name!($type::$value.name());)+ });
    };
    // The same, and AUTO, which leaves the choice to the library.
    ($enum:ident: Option<$type:ident> { $($value:ident),+ }) => {
        table!($enum: $type = Option<$type> {
            Auto = None, c"auto";
            $($value = Some($type::$value), c_name!($type::$value.name());)+
        });
    };
    // Values of a Rust type without names.
    ($enum:ident: $type:ident { $($value:ident: $name:literal),+ }) => {
        table!($enum: $type = $type { $($value = $type::$value, $name;)+ });
    };
    // Values that no Rust type has.
    ($enum:ident { $($value:ident: $name:literal),+ }) => {
        table!($enum: $enum { $($value: $name),+ });
    };
    ($enum:ident: $type:ident = $meaning:ty { $($value:ident = $means:expr, $name:expr;)+ }) => {
        impl Named for $enum {
            type Meaning = $meaning;
            const TABLE: &'static [Row<Self>] = &[$(
                Row { value: Self::$value, number: Self::$value as u32, meaning: $means, name: $name },
            )+];
        }
    };
}

table!(varlen_fa_device_kind: Option<BackendKind> { Cpu, Wgpu, Cuda });
table!(varlen_fa_dtype: DType { F32, F16, Bf16 });
table!(varlen_fa_path: Option<Path> { Dense, Fused, Packed, Zero });
table!(varlen_fa_kernel: Option<Kernel> { CpuTiled, WgslPortable, WgslCoop, CudaSm80, CudaSm90, CudaSm100 });
table!(varlen_fa_mask_dtype: MaskDType { U8: c"8 bits", U16: c"16 bits", U32: c"32 bits", U64: c"64 bits" });
table!(varlen_fa_rotary_pairing: RotaryPairing { Interleaved: c"interleaved", Halves: c"halves" });
table!(varlen_fa_memory { Host: c"host", Cuda: c"cuda" });
table!(varlen_fa_mask_kind {
    None: c"none",
    Key: c"key",
    Bias: c"bias",
    Varlen: c"varlen",
    VarlenCross: c"varlen-cross",
    DeviceVarlen: c"device-varlen",
    DeviceVarlenCross: c"device-varlen-cross"
});
table!(varlen_fa_parallel_mode {
    Auto: c"auto",
    Gather: c"gather",
    Ulysses: c"ulysses",
    Ring: c"ring",
    UlyssesGather: c"ulysses-gather",
    UlyssesRing: c"ulysses-ring"
});
table!(varlen_fa_reason: Reason {
    NoMask: c"no-mask",
    KeyMask: c"key-mask",
    KeyMaskKeepsAll: c"key-mask-keeps-all",
    Bias: c"bias",
    AllValid: c"all-valid",
    NothingValid: c"nothing-valid",
    Fused: c"fused",
    DenseForced: c"dense-forced",
    PathForced: c"path-forced",
    AlreadyPacked: c"already-packed",
    Fragmented: c"fragmented",
    KeyRanges: c"key-ranges",
    FewMasked: c"few-masked"
});
table!(varlen_fa_status {
    Ok: c"OK",
    NullPointer: c"NULL_POINTER",
    BadHandle: c"BAD_HANDLE",
    BadValue: c"BAD_VALUE",
    Misaligned: c"MISALIGNED",
    Rank: c"RANK",
    Shape: c"SHAPE",
    Broadcast: c"BROADCAST",
    HeadsNotDivisible: c"HEADS_NOT_DIVISIBLE",
    HeadDim: c"HEAD_DIM",
    UnsupportedDtype: c"UNSUPPORTED_DTYPE",
    DtypeMismatch: c"DTYPE_MISMATCH",
    InnerStride: c"INNER_STRIDE",
    BufferTooSmall: c"BUFFER_TOO_SMALL",
    Overlap: c"OVERLAP",
    SelfOverlap: c"SELF_OVERLAP",
    Length: c"LENGTH",
    MaskSize: c"MASK_SIZE",
    MaskRow: c"MASK_ROW",
    CuSeqlens: c"CU_SEQLENS",
    SoftmaxScale: c"SOFTMAX_SCALE",
    TooLarge: c"TOO_LARGE",
    Environment: c"ENVIRONMENT",
    DeviceMismatch: c"DEVICE_MISMATCH",
    NotApplicable: c"NOT_APPLICABLE",
    ScoreModifier: c"SCORE_MODIFIER",
    Sharding: c"SHARDING",
    Refused: c"REFUSED",
    DeviceUnavailable: c"DEVICE_UNAVAILABLE",
    OutOfMemory: c"OUT_OF_MEMORY",
    DeviceLost: c"DEVICE_LOST",
    Backend: c"BACKEND",
    StreamCaptured: c"STREAM_CAPTURED",
    RanksDiffer: c"RANKS_DIFFER",
    RankLost: c"RANK_LOST",
    RankTimedOut: c"RANK_TIMED_OUT",
    Panic: c"PANIC"
});

fn name_of<E: Named>(given: MaybeUninit<E>) -> *const c_char {
    row_of::<E>(number(given)).map_or(std::ptr::null(), |row| row.name.as_ptr())
}

/// The name of a status, as its constant has it: "BAD_HANDLE"; or NULL.
///
/// As all functions that return names: NULL means that the number has none, and the text is valid
/// while the library is loaded. Numbers with a name are less than 255, so a loop over these finds
/// every name that this library knows.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_status_name(status: MaybeUninit<varlen_fa_status>) -> *const c_char {
    name_of(status)
}

/// The name of a device kind, as in VARLEN_FA_DEVICE: "cuda"; or NULL.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_device_kind_name(kind: MaybeUninit<varlen_fa_device_kind>) -> *const c_char {
    name_of(kind)
}

/// The name of an element type: "bf16"; or NULL.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_dtype_name(dtype: MaybeUninit<varlen_fa_dtype>) -> *const c_char {
    name_of(dtype)
}

/// The name of a path, as in the text of plans: "fused"; or NULL.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_path_name(path: MaybeUninit<varlen_fa_path>) -> *const c_char {
    name_of(path)
}

/// The name of a kernel, as in the text of plans and in VARLEN_FA_KERNEL: "sm80"; or NULL.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_kernel_name(kernel: MaybeUninit<varlen_fa_kernel>) -> *const c_char {
    name_of(kernel)
}

/// The name of a reason: "all-valid"; or NULL.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_reason_name(reason: MaybeUninit<varlen_fa_reason>) -> *const c_char {
    name_of(reason)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const HEADER: &str = include_str!("../include/varlen_fa.h");
    const UNLISTED: u32 = 255;

    /// The constants of an enum of the header, without what their names have in common.
    fn constants(enum_name: &str) -> BTreeMap<u32, &'static str> {
        let start = format!("enum {enum_name}\n");
        let body = HEADER.split(&start).nth(1).and_then(|rest| rest.split("\n}").next()).unwrap();
        let prefix = format!("{}_", enum_name.to_uppercase());
        let lines = body.lines().filter_map(|line| line.trim().strip_prefix(&prefix));
        let constants = lines.map(|line| line.trim_end_matches(',').split_once(" = ").unwrap());
        constants.map(|(name, number)| (number.parse().unwrap(), name)).collect()
    }

    /// The table has what the header has, names and meanings are unique, and conversions lead back.
    fn check<E: Named>(enum_name: &str) -> BTreeMap<u32, &'static str> {
        let mut in_header = constants(enum_name);
        in_header.remove(&UNLISTED);
        assert!(E::TABLE.iter().map(|row| row.number).all(|number| in_header.contains_key(&number)), "{enum_name}");
        assert_eq!(E::TABLE.len(), in_header.len(), "{enum_name} lacks a row or has one twice");
        let mut names = BTreeMap::new();
        for row in E::TABLE {
            assert!(row.number < UNLISTED);
            assert_eq!(value_of::<E>(row.meaning), Some(row.value), "{enum_name}: a meaning is listed twice");
            assert_eq!(number(MaybeUninit::new(row.value)), row.number);
            assert_eq!(row_of::<E>(row.number).unwrap().value, row.value);
            names.insert(row.number, row.name.to_str().unwrap());
        }
        let mut unique: Vec<_> = names.values().collect();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "{enum_name}: a name is listed twice");
        names
    }

    #[test]
    fn tables_have_what_the_header_has() {
        check::<varlen_fa_device_kind>("varlen_fa_device_kind");
        check::<varlen_fa_dtype>("varlen_fa_dtype");
        check::<varlen_fa_path>("varlen_fa_path");
        check::<varlen_fa_kernel>("varlen_fa_kernel");
        check::<varlen_fa_mask_dtype>("varlen_fa_mask_dtype");
        check::<varlen_fa_memory>("varlen_fa_memory");
        check::<varlen_fa_rotary_pairing>("varlen_fa_rotary_pairing");
        let kinds = check::<varlen_fa_mask_kind>("varlen_fa_mask_kind");
        let reasons = check::<varlen_fa_reason>("varlen_fa_reason");
        let statuses = check::<varlen_fa_status>("varlen_fa_status");
        for (names, enum_name) in [(kinds, "varlen_fa_mask_kind"), (reasons, "varlen_fa_reason")] {
            let constants = constants(enum_name);
            assert!(names.iter().all(|(number, name)| name.to_uppercase().replace('-', "_") == constants[number]));
        }
        assert_eq!(statuses, constants("varlen_fa_status"));
    }

    #[test]
    fn every_kernel_and_backend_is_in_the_header() {
        for kernel in Kernel::ALL {
            let value = value_of::<varlen_fa_kernel>(Some(*kernel)).unwrap();
            let name = varlen_fa_kernel_name(MaybeUninit::new(value));
            // SAFETY: a C string that lives forever.
            assert_eq!(unsafe { CStr::from_ptr(name) }.to_str(), Ok(kernel.name()));
            // Devices list their kernels as bits.
            assert!((value as u32) < u32::BITS, "{kernel}");
        }
        assert_eq!(varlen_fa_kernel::TABLE.len(), Kernel::ALL.len() + 1);
        for backend in BackendKind::ALL {
            assert!(value_of::<varlen_fa_device_kind>(Some(*backend)).is_some(), "{backend}");
        }
        assert_eq!(varlen_fa_device_kind::TABLE.len(), BackendKind::ALL.len() + 1);
    }

    #[test]
    fn numbers_without_a_name_give_null() {
        assert!(varlen_fa_kernel_name(MaybeUninit::new(varlen_fa_kernel::Unlisted)).is_null());
        // The reason 8 was removed, and its number stays reserved.
        assert!(row_of::<varlen_fa_reason>(8).is_none() && !constants("varlen_fa_reason").contains_key(&8));
    }
}
