//! The handles that were issued so far, and what every call is held against.

use std::ffi::CStr;
use std::fmt::Debug;
use std::ptr::{null, null_mut, without_provenance_mut};

use arbitrary::Arbitrary;

use crate::failure::varlen_fa_last_error;
use crate::memory::{Arena, At, Slot};
use crate::tensor::enum_of;
use crate::types::{varlen_fa_ranges_of, varlen_fa_status};
use crate::{device, device_meta, key_ranges, masks};

/// What a handle is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Kind {
    Device,
    KeyMask,
    Meta,
    CuSeqlens,
    DeviceMeta,
    KeyRanges,
}

/// Which handle a call is given: mostly a live one of the right kind; else any that was issued,
/// NULL, or a number.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Ref {
    choice: u8,
    index: u8,
}

/// Sizes of what a handle stands for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    pub batch: u64,
    pub seq: u64,
    /// Valid tokens; of cumulative lengths the last one; of ranges Sk. 0 where nobody asks.
    pub total: u64,
}

impl Sizes {
    /// Of ranges of packed rows, which no padded tensor has.
    pub const PACKED: Self = Self { batch: u64::MAX, seq: u64::MAX, total: u64::MAX };
}

#[derive(Debug)]
struct Issued {
    address: usize,
    kind: Kind,
    sizes: Sizes,
    is_live: bool,
}

pub struct Session {
    pub arena: Arena,
    /// Whether any metadata may be of documents.
    pub has_documents: bool,
    issued: Vec<Issued>,
}

/// A handle argument, and what it stands for if it is live and of the right kind.
#[derive(Debug)]
pub struct Handle<H> {
    pub pointer: *mut H,
    pub object: Option<Sizes>,
}

// Derived ones would ask for a Copy of what the handle is of.
impl<H> Clone for Handle<H> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H> Copy for Handle<H> {}

impl Session {
    /// A device, and a mask with all that is made from it.
    pub fn new(seed: u64, batch: u64, seq: u64) -> Self {
        let mut session = Self { arena: Arena::new(seed), has_documents: false, issued: Vec::new() };
        let mut slot = Slot::new(At::GOOD);
        // SAFETY: a place for a handle; as in the lines below, where arrays are as long as said.
        let status = unsafe { device::varlen_fa_device_open(enum_of(1), 0, slot.pointer()) };
        let opened = session.made(&"setup", status, &mut slot, Kind::Device, Sizes::default()).expect("the CPU device");
        let lengths: Vec<u64> = (0..batch).map(|row| (seed >> row) % (seq + 1)).collect();
        let sizes = Sizes { batch, seq, total: lengths.iter().sum() };
        let mut slot = Slot::new(At::GOOD);
        // SAFETY: as above.
        let status = unsafe { masks::varlen_fa_key_mask_from_lengths(lengths.as_ptr(), batch, seq, slot.pointer()) };
        let mask = session.made(&"setup", status, &mut slot, Kind::KeyMask, sizes).expect("a mask");
        let mut slot = Slot::new(At::GOOD);
        // SAFETY: as above.
        let status = unsafe { masks::varlen_fa_meta_create(mask, slot.pointer()) };
        let meta = session.made(&"setup", status, &mut slot, Kind::Meta, sizes).expect("metadata");
        let mut slot = Slot::new(At::GOOD);
        // SAFETY: as above.
        let status = unsafe { masks::varlen_fa_cu_seqlens_from_meta(meta, slot.pointer()) };
        let cu = session.made(&"setup", status, &mut slot, Kind::CuSeqlens, sizes).expect("cu_seqlens");
        let none = varlen_fa_ranges_of {
            batch: 0,
            seq_q: 0,
            seq_k: 0,
            cu_seqlens_q: null(),
            cu_seqlens_k: null(),
            reserved: [0; 4],
        };
        let padded = varlen_fa_ranges_of { batch, seq_q: seq, seq_k: seq, ..none };
        let packed = varlen_fa_ranges_of { cu_seqlens_q: cu, cu_seqlens_k: cu, ..none };
        for (of, sizes) in [(padded, Sizes { batch, seq, total: seq }), (packed, Sizes::PACKED)] {
            let mut slot = Slot::new(At::GOOD);
            // SAFETY: as above.
            let status = unsafe { key_ranges::varlen_fa_key_ranges_window(&raw const of, -1, 0, slot.pointer()) };
            session.made(&"setup", status, &mut slot, Kind::KeyRanges, sizes).expect("ranges");
        }
        let mut slot = Slot::new(At::GOOD);
        // SAFETY: as above.
        let status = unsafe { device_meta::varlen_fa_device_meta_create(opened, batch, seq, slot.pointer()) };
        session.made(&"setup", status, &mut slot, Kind::DeviceMeta, sizes).expect("device metadata");
        session
    }

    /// The handle that a call is given.
    pub fn handle<H>(&self, kind: Kind, given: Ref) -> Handle<H> {
        let pick = |found: Vec<&Issued>| found.get(usize::from(given.index) % found.len().max(1)).map(|it| it.address);
        let address = match given.choice {
            0..=219 => pick(self.issued.iter().filter(|it| it.is_live && it.kind == kind).collect()),
            220..=239 => pick(self.issued.iter().collect()),
            240..=247 => None,
            248.. => Some(usize::from(given.index)),
        };
        let is_it = |it: &&Issued| it.is_live && it.kind == kind && Some(it.address) == address;
        let object = self.issued.iter().find(is_it).map(|it| it.sizes);
        Handle { pointer: address.map_or(null_mut(), without_provenance_mut), object }
    }

    /// Judges a call that makes an object: the handle is new, or nothing was written.
    pub fn made<H>(
        &mut self,
        call: &dyn Debug,
        status: varlen_fa_status,
        slot: &mut Slot<*mut H>,
        kind: Kind,
        sizes: Sizes,
    ) -> Option<*mut H> {
        self.judge(call, status, [], None);
        let handle = slot.result(status == varlen_fa_status::Ok)?;
        assert!(!handle.is_null() && self.issued.iter().all(|it| it.address != handle.addr()), "{handle:?} is not new");
        self.issued.push(Issued { address: handle.addr(), kind, sizes, is_live: true });
        Some(handle)
    }

    /// Judges a call that frees a handle.
    pub fn freed(&mut self, call: &dyn Debug, status: varlen_fa_status, address: usize, kind: Kind) {
        let found = self.issued.iter_mut().find(|it| it.is_live && it.kind == kind && it.address == address);
        let expected = if found.is_some() || address == 0 { varlen_fa_status::Ok } else { varlen_fa_status::BadHandle };
        assert_eq!(status, expected, "{call:?}");
        if let Some(found) = found {
            found.is_live = false;
        }
        self.judge(call, status, [], None);
    }

    /// What holds after any call. `written`: what a successful one writes in the arena. `is_sound`:
    /// whether the header allows the arguments, if the caller knows that it does or does not.
    pub fn judge(
        &mut self,
        call: &dyn Debug,
        status: varlen_fa_status,
        written: impl IntoIterator<Item = (usize, usize)>,
        is_sound: Option<bool>,
    ) {
        let is_ok = status == varlen_fa_status::Ok;
        // SAFETY: text that ends with 0, which no call of this thread replaces meanwhile.
        let message = unsafe { CStr::from_ptr(varlen_fa_last_error()) }.to_str().expect("a message in UTF-8");
        match status as u32 {
            0 => {}
            // Wrong arguments; no such device; no memory for what was asked.
            1..=101 => assert!(!message.is_empty(), "{call:?}: {status:?} without a message"),
            _ => panic!("{call:?}: {status:?}: {message}"),
        }
        match is_sound {
            Some(true) => assert!(is_ok, "{call:?}: sound, but {status:?}: {message}"),
            Some(false) => assert!(!is_ok, "{call:?}: accepted"),
            None => {}
        }
        if is_ok { self.arena.check(written) } else { self.arena.check([]) }
    }

    /// Frees what is left.
    pub fn end(mut self) {
        let live: Vec<_> = self.issued.iter().filter(|it| it.is_live).map(|it| (it.kind, it.address)).collect();
        for (kind, address) in live {
            let status = free(kind, address);
            self.freed(&"end", status, address, kind);
        }
    }
}

/// Frees a handle with the function of its kind.
pub fn free(kind: Kind, address: usize) -> varlen_fa_status {
    match kind {
        Kind::Device => device::varlen_fa_device_free(without_provenance_mut(address)),
        Kind::KeyMask => masks::varlen_fa_key_mask_free(without_provenance_mut(address)),
        Kind::Meta => masks::varlen_fa_meta_free(without_provenance_mut(address)),
        Kind::CuSeqlens => masks::varlen_fa_cu_seqlens_free(without_provenance_mut(address)),
        Kind::DeviceMeta => device_meta::varlen_fa_device_meta_free(without_provenance_mut(address)),
        Kind::KeyRanges => key_ranges::varlen_fa_key_ranges_free(without_provenance_mut(address)),
    }
}
