//! Buffers: of tensors, external ones, and scratch.

use std::any::Any;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use wgpu::BufferUsages;

use crate::backends::rows::WORD_BYTES;
use crate::cache::DeviceId;
use crate::call::memory::DeviceBuffer;
use crate::error::{Error, Result};

use super::fault::Faults;
use super::scratch::{Kept, Taker};

/// Storage bindings are whole u32s.
const BINDING_SIZE_STEP: u64 = 4;

/// A tensor's memory.
#[derive(Debug)]
pub(super) struct WgpuBuffer {
    pub raw: wgpu::Buffer,
    size: u64,
    /// Bytes that may be bound: those up to the buffer's last whole u32.
    bindable: u64,
    /// Whether the buffer is external: then nothing outside of the views is ours.
    is_external: bool,
    device: DeviceId,
    device_name: Arc<str>,
    space: u64,
}

impl WgpuBuffer {
    pub fn bindable(&self) -> u64 {
        self.bindable
    }

    pub fn is_external(&self) -> bool {
        self.is_external
    }

    /// Checks that the buffer was created with a usage. Buffers made here have all that they need.
    pub fn expect_usage(&self, argument: &'static str, usage: BufferUsages) -> Result<()> {
        expect_usage(argument, &self.raw, usage)
    }

    /// Checks that the host has not mapped the buffer: a submission that uses it would fail. Only
    /// external buffers can be mapped.
    pub fn expect_unmapped(&self, argument: &'static str) -> Result<()> {
        let is_mapped = self.is_external && self.raw.slice(..self.bindable).get_mapped_range().is_ok();
        if is_mapped { Err(unusable(argument, "it is mapped".to_owned())) } else { Ok(()) }
    }
}

pub(super) fn unusable(argument: &'static str, why: String) -> Error {
    Error::BufferUnusable { argument, why }
}

fn expect_usage(argument: &'static str, buffer: &wgpu::Buffer, usage: BufferUsages) -> Result<()> {
    match usage.difference(buffer.usage()) {
        missing if missing.is_empty() => Ok(()),
        missing => {
            let missing = missing.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
            Err(Error::BufferUsage { argument, missing })
        }
    }
}

/// The address space of a buffer: clones of one have the same. It is a hash, so two buffers share
/// one in one of 2⁶³ pairs. Then a valid call is refused; an invalid one never runs.
fn space_of(buffer: &wgpu::Buffer) -> u64 {
    let mut hasher = DefaultHasher::new();
    buffer.hash(&mut hasher);
    // Never the host's, which is 0.
    hasher.finish() | 1
}

impl DeviceBuffer for WgpuBuffer {
    fn device(&self) -> DeviceId {
        self.device
    }

    fn device_name(&self) -> &str {
        &self.device_name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn space(&self) -> u64 {
        self.space
    }

    /// A launch cannot both read and write one buffer.
    fn touched(&self, _bytes: Range<u64>) -> Range<u64> {
        0..self.size
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Makes buffers of one device.
#[derive(Debug)]
pub(super) struct Allocator {
    device: wgpu::Device,
    faults: Arc<Faults>,
    id: DeviceId,
    device_name: Arc<str>,
    max_buffer_bytes: u64,
    /// Scratch that is free.
    pub kept: Kept,
    /// One storage buffer, to test whether a buffer can be bound.
    probe_layout: wgpu::BindGroupLayout,
}

impl Allocator {
    pub fn new(device: &wgpu::Device, faults: &Arc<Faults>, id: DeviceId, device_name: &Arc<str>) -> Result<Self> {
        let ty = wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: true },
            has_dynamic_offset: false,
            min_binding_size: None,
        };
        let entries =
            [wgpu::BindGroupLayoutEntry { binding: 0, visibility: wgpu::ShaderStages::COMPUTE, ty, count: None }];
        let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some("probe"), entries: &entries };
        let probe_layout =
            faults.capture("creating a bind group layout", 0, || device.create_bind_group_layout(&descriptor))?;
        Ok(Self {
            device: device.clone(),
            faults: Arc::clone(faults),
            id,
            device_name: Arc::clone(device_name),
            max_buffer_bytes: device.limits().max_buffer_size,
            kept: Kept::default(),
            probe_layout,
        })
    }

    /// Memory for a tensor.
    pub fn tensor(&self, size: u64) -> Result<WgpuBuffer> {
        let raw = self.storage("tensor", size)?;
        let bindable = raw.size();
        Ok(self.buffer(raw, size, bindable, false))
    }

    /// An external buffer as a tensor's memory.
    pub fn external(&self, raw: wgpu::Buffer) -> Result<WgpuBuffer> {
        expect_usage("buffer", &raw, BufferUsages::STORAGE)?;
        let size = raw.size() / BINDING_SIZE_STEP * BINDING_SIZE_STEP;
        if size == 0 {
            let why = format!("it has {} bytes, and {BINDING_SIZE_STEP} are the least that can be bound", raw.size());
            return Err(unusable("buffer", why));
        }
        let buffer = self.buffer(raw, size, size, true);
        buffer.expect_unmapped("buffer")?;
        self.expect_bindable("buffer", &buffer.raw)?;
        Ok(buffer)
    }

    fn buffer(&self, raw: wgpu::Buffer, size: u64, bindable: u64, is_external: bool) -> WgpuBuffer {
        let space = space_of(&raw);
        let (device, device_name) = (self.id, Arc::clone(&self.device_name));
        WgpuBuffer { raw, size, bindable, is_external, device, device_name, space }
    }

    /// Checks that the device lets a buffer be bound: it belongs to the device and is not
    /// destroyed.
    pub fn expect_bindable(&self, argument: &'static str, buffer: &wgpu::Buffer) -> Result<()> {
        let binding = wgpu::BufferBinding { buffer, offset: 0, size: NonZeroU64::new(BINDING_SIZE_STEP) };
        let entries = [wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(binding) }];
        let (label, layout) = (Some("probe"), &self.probe_layout);
        let descriptor = wgpu::BindGroupDescriptor { label, layout, entries: &entries };
        // wgpu panics on some buffers of another `wgpu::Instance`.
        let bind = || catch_unwind(AssertUnwindSafe(|| drop(self.device.create_bind_group(&descriptor))));
        match self.faults.capture("binding a buffer", 0, bind) {
            Ok(Ok(())) => self.faults.probe(),
            Ok(Err(_)) => Err(unusable(argument, "it belongs to another wgpu instance".to_owned())),
            Err(Error::Backend { why, .. }) => Err(unusable(argument, why)),
            Err(error) => Err(error),
        }
    }

    /// A storage buffer that can be copied from and to. Its size is rounded up to whole words,
    /// and to one at least: an empty tensor must still be bindable.
    pub fn storage(&self, label: &'static str, size: u64) -> Result<wgpu::Buffer> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        self.raw(label, size.next_multiple_of(WORD_BYTES).max(WORD_BYTES), usage)
    }

    pub fn raw(&self, label: &'static str, size: u64, usage: BufferUsages) -> Result<wgpu::Buffer> {
        let buffer = self.unproven(label, size, usage)?;
        self.faults.probe()?;
        Ok(buffer)
    }

    /// The same without asking whether the device is still there. For buffers that are written at
    /// once: the write fails on a lost device.
    pub fn unproven(&self, label: &'static str, size: u64, usage: BufferUsages) -> Result<wgpu::Buffer> {
        if size > self.max_buffer_bytes {
            let (limit_name, limit) = ("max_buffer_size (bytes)", self.max_buffer_bytes);
            return Err(Error::TooLarge { argument: label, limit_name, limit, got: size });
        }
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.faults.capture("creating a buffer", size, || self.device.create_buffer(&descriptor))
    }

    /// Scratch of at least `size` bytes, with contents that are not specified.
    pub fn scratch(&self, taker: Taker, size: u64) -> Result<wgpu::Buffer> {
        match self.kept.take(taker, size) {
            Some(buffer) => Ok(buffer),
            None => self.storage("scratch", size),
        }
    }
}
