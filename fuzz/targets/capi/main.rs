//! The C functions, called with arguments that are right but for a few faults: sequences of calls
//! over memory that this program owns.
//!
//! Whatever comes: nothing panics (the engine aborts at a panic, also at one that the border would
//! catch), the status is one of the header's, an error leaves every byte as it was and has a
//! message, success writes the elements of outputs and nothing else, and success needs arguments
//! that the header allows. A call without a fault must succeed.
//!
//! The header's own rule for pointers is kept, since no library can check it: what is neither NULL,
//! in the first page nor misaligned points to as much memory as the call says.
#![no_main]
#![allow(non_camel_case_types, reason = "types have the names that they have in C")]
#![allow(clippy::missing_safety_doc, reason = "the header states once what callers must ensure")]

// The C library is no Rust library that could be imported, so its sources are compiled into this
// program. They know the Rust library by this name.
extern crate varlen_fa as varlen;

#[path = "../../../capi/src/arguments.rs"]
mod arguments;
#[path = "../../../capi/src/attention.rs"]
mod attention;
#[path = "../../../capi/src/attention_mask.rs"]
mod attention_mask;
#[path = "../../../capi/src/cuda.rs"]
mod cuda;
#[path = "../../../capi/src/device.rs"]
mod device;
#[path = "../../../capi/src/device_meta.rs"]
mod device_meta;
#[path = "../../../capi/src/dist.rs"]
mod dist;
#[path = "../../../capi/src/failure.rs"]
mod failure;
#[path = "../../../capi/src/handles.rs"]
mod handles;
#[path = "../../../capi/src/key_ranges.rs"]
mod key_ranges;
#[path = "../../../capi/src/mask_values.rs"]
mod mask_values;
#[path = "../../../capi/src/masks.rs"]
mod masks;
#[path = "../../../capi/src/names.rs"]
mod names;
#[path = "../../../capi/src/outputs.rs"]
mod outputs;
#[path = "../../../capi/src/prepare_qk.rs"]
mod prepare_qk;
#[path = "../../../capi/src/primitives.rs"]
mod primitives;
#[path = "../../../capi/src/score_modifiers.rs"]
mod score_modifiers;
#[path = "../../../capi/src/segments.rs"]
mod segments;
#[path = "../../../capi/src/tensors.rs"]
mod tensors;
#[path = "../../../capi/src/types.rs"]
mod types;

mod calls;
mod memory;
mod session;
mod tensor;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

use self::calls::Call;
use self::session::Session;

/// Calls of one input; what comes after them is not looked at.
const MAX_CALLS: usize = 12;

#[derive(Debug, Arbitrary)]
struct Input {
    /// Fills the memory.
    seed: u64,
    /// Batch rows and tokens of the objects that exist before the first call.
    batch: u8,
    seq: u8,
    calls: Vec<Call>,
}

fuzz_target!(|input: Input| {
    let mut session = Session::new(input.seed, u64::from(input.batch % 4), u64::from(input.seq % 10));
    for call in input.calls.iter().take(MAX_CALLS) {
        calls::run(&mut session, call);
    }
    session.end();
});
