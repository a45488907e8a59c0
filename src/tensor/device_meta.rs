//! Metadata of a mask that is on the device already: built there, without waiting for the host.

use crate::cache::{BuildCopies, DeviceId};
use crate::call::memory::{Source, Storage, foreign_memory};
use crate::call::op::{DeviceTables, MaskInput, MetadataPlace, Op, no_device_tables};
use crate::call::problem::{DeviceMaskInfo, DeviceMetaInfo, check_device_mask};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::host_vec;
use crate::kernel::BackendKind;
use crate::layout::Layout;
use crate::mask::key_mask::{KeyMask, MaskDType, MaskInteger, check_token_count};
use crate::mask::meta::VarlenMeta;
use crate::tensor::memory::DeviceMemory;

/// A borrowed `[B, S]` mask in a device's memory, of any strides.
#[derive(Debug, Clone, Copy)]
pub struct MaskView<'a> {
    memory: Source<'a>,
    layout: Layout,
    dtype: MaskDType,
}

impl<'a> MaskView<'a> {
    /// Host memory as a row-major mask of the CPU device.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has not `batch · seq` elements; [`Error::TooLarge`].
    pub fn from_host<T: MaskInteger>(data: &'a [T], batch: usize, seq: usize) -> Result<Self> {
        let layout = Layout::contiguous(&[batch, seq])?;
        Error::expect_length("mask", layout.numel(), data.len())?;
        Ok(Self { memory: Source::Host(bytemuck::cast_slice(data)), layout, dtype: T::MASK_DTYPE })
    }

    /// Part of a device's memory as a mask. The layout, `[B, S]`, counts elements from the start of the memory; that it stays
    /// inside is checked when the view is used.
    #[must_use]
    pub fn over(memory: &'a DeviceMemory, dtype: MaskDType, layout: Layout) -> Self {
        Self { memory: memory.source(), layout, dtype }
    }

    fn info(&self) -> DeviceMaskInfo<'_> {
        let (device, device_name, memory_bytes) = match self.memory {
            Source::Host(bytes) => (DeviceId::CPU, BackendKind::Cpu.name(), bytes.len() as u64),
            Source::Device(buffer) => (buffer.device(), buffer.device_name(), buffer.size()),
        };
        let (layout, element_bytes) = (self.layout, self.dtype.size());
        DeviceMaskInfo { layout, element_bytes, device, device_name, memory_bytes }
    }

    fn input(self) -> MaskInput<'a> {
        MaskInput { memory: self.memory, layout: self.layout, element_bytes: self.dtype.size() }
    }
}

impl DeviceMemory {
    /// Part of the memory as a mask, as [`MaskView::over`].
    #[must_use]
    pub fn mask_view(&self, dtype: MaskDType, layout: Layout) -> MaskView<'_> {
        MaskView::over(self, dtype, layout)
    }
}

/// What [`VarlenMeta`] is, built on the device from a mask that is there already.
///
/// Nothing is downloaded and nobody waits: launches that use it are sized for `B·S` valid tokens, and kernels read the true
/// number where the device has it. So [`rebuild`](Self::rebuild) and the calls that use the metadata may be captured in a CUDA
/// graph, whose replays then follow whatever the mask holds. On wgpu devices `encode_rebuild` and
/// `MaskedAttention::encode_into` record both into the application's commands. The price is a plan that cannot know the mask: the
/// shortcuts for batches that are all valid or all masked are not taken. What a kernel reads beside the metadata, its lists of tiles, is
/// made by the first call and kept until the next [`rebuild`](Self::rebuild). A rebuild that is captured after such a call makes it anew
/// in the graph, for the graph's calls too; else each captured call makes its own. Where the host has the mask, [`VarlenMeta`] is the
/// better choice.
///
/// Key ranges and a bias go beside it where [a kernel takes them](crate::Kernel::takes_all_with_device_meta). On the CPU device the
/// mask is in host memory, and the one builder of [`VarlenMeta`] is used.
///
/// ```
/// use varlen_fa::{AttentionMask, Device, DeviceChoice, DeviceVarlenMeta, MaskView, MaskedAttention, Tensor};
///
/// let device = Device::new(DeviceChoice::Cpu)?;
/// let x = Tensor::from_slice(&device, &vec![0.5_f32; 2 * 3 * 8], &[2, 3, 1, 8])?;
/// let mut meta = DeviceVarlenMeta::new(&device, 2, 3)?;
/// meta.rebuild(MaskView::from_host(&[1_u8, 1, 0, 0, 0, 1], 2, 3)?)?;
/// let attended = MaskedAttention::new(&device).forward(&x, &x, &x, AttentionMask::varlen(&meta))?;
/// assert!(attended.out.to_vec::<f32>()?[16..40].iter().all(|&masked| masked == 0.0));
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug)]
pub struct DeviceVarlenMeta {
    device: Device,
    batch: usize,
    seq: usize,
    tables: Tables,
    kept: BuildCopies,
}

#[derive(Debug)]
enum Tables {
    /// The device's memory is the host's.
    Host(Box<VarlenMeta>),
    /// Laid out as the device has it.
    Device(Storage),
}

impl DeviceVarlenMeta {
    /// Room for the metadata of `[batch, seq]` masks. Until the first [`rebuild`](Self::rebuild) no token is valid.
    ///
    /// # Errors
    /// [`Error::NotApplicable`] on devices that cannot build metadata, [`Error::TooLarge`] if `batch · seq` does not fit an `i32`,
    /// or on wgpu devices if a table does not fit a binding (the largest has 4 bytes for each of `batch · (seq + 1)`),
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn new(device: &Device, batch: usize, seq: usize) -> Result<Self> {
        check_token_count("mask", batch, seq)?;
        let tables = match device.backend()?.metadata_place() {
            MetadataPlace::Host => Tables::Host(Box::new(VarlenMeta::from_key_mask(&KeyMask::none(batch, seq)?)?)),
            MetadataPlace::Device => Tables::Device(device.backend()?.alloc_metadata(batch, seq)?),
            MetadataPlace::Nowhere => return Err(no_device_tables(device.name())),
        };
        Ok(Self { device: device.clone(), batch, seq, tables, kept: BuildCopies::new() })
    }

    /// Builds the metadata of a mask anew. Calls made before this one still see the metadata as it was.
    ///
    /// # Errors
    /// [`Error::MaskSize`] if the mask is not of the size that the metadata was made for, [`Error::DeviceMismatch`] if it is
    /// another device's, [`Error::BufferTooSmall`] or [`Error::Misaligned`] if it does not fit its memory, [`Error::TooLarge`] if
    /// it does not fit one binding of a wgpu device; nothing is built then.
    pub fn rebuild(&mut self, mask: MaskView<'_>) -> Result<()> {
        let device = self.device.clone();
        self.rebuild_by(mask, |op| device.backend()?.execute(op))
    }

    /// The same by launches that `execute` takes.
    pub(crate) fn rebuild_by(&mut self, mask: MaskView<'_>, execute: impl FnOnce(Op<'_>) -> Result<()>) -> Result<()> {
        check_device_mask(self.device.info(), &mask.info(), [self.batch, self.seq])?;
        // First, as a build that fails may leave anything.
        self.kept.renew();
        match &mut self.tables {
            Tables::Host(meta) => {
                let keep = host_mask(&mask, self.batch, self.seq)?;
                **meta = VarlenMeta::from_key_mask(&keep)?;
                Ok(())
            }
            Tables::Device(storage) => {
                let (memory, kept) = (storage.source(), &self.kept);
                let tables = DeviceTables { memory, batch: self.batch, seq: self.seq, kept };
                execute(Op::Metadata { mask: mask.input(), tables })
            }
        }
    }

    /// The device that holds the metadata.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Number of batch rows, B.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of each padded row, S.
    #[must_use]
    pub fn seq(&self) -> usize {
        self.seq
    }

    pub(crate) fn info(&self) -> DeviceMetaInfo<'_> {
        let (device, device_name) = (self.device.info().id, self.device.name());
        DeviceMetaInfo { device, device_name, size: [self.batch, self.seq] }
    }

    /// The metadata, where the device's memory is the host's.
    pub(crate) fn on_host(&self) -> Option<&VarlenMeta> {
        match &self.tables {
            Tables::Host(meta) => Some(meta),
            Tables::Device(_) => None,
        }
    }

    /// The tables, where the device has them.
    pub(crate) fn on_device(&self) -> Option<DeviceTables<'_>> {
        match &self.tables {
            Tables::Host(_) => None,
            Tables::Device(storage) => {
                let (memory, kept) = (storage.source(), &self.kept);
                Some(DeviceTables { memory, batch: self.batch, seq: self.seq, kept })
            }
        }
    }
}

/// A mask in host memory, in bits.
fn host_mask(mask: &MaskView<'_>, batch: usize, seq: usize) -> Result<KeyMask> {
    let Source::Host(bytes) = mask.memory else {
        return Err(foreign_memory(BackendKind::Cpu.name(), "another device"));
    };
    let (size, strides, offset) = (mask.dtype.size(), mask.layout.strides(), mask.layout.offset());
    let mut keep = host_vec::reserve(batch * seq)?;
    for row in 0..batch as u64 {
        for token in 0..seq as u64 {
            // In bounds and small enough: checked by problem.
            let start = (offset + row * strides[0] + token * strides[1]) as usize * size;
            keep.push(bytes[start..start + size].iter().any(|&byte| byte != 0));
        }
    }
    KeyMask::from_bool(batch, seq, &keep)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceChoice;

    #[test]
    fn masks_of_every_type_and_stride_are_read() -> Result<()> {
        let device = Device::new(DeviceChoice::Cpu)?;
        let mut meta = DeviceVarlenMeta::new(&device, 2, 3)?;
        let indices = |meta: &DeviceVarlenMeta| {
            meta.on_host().and_then(|meta| meta.indices().ok()).map(<[u32]>::to_vec).unwrap_or_default()
        };
        assert!(meta.on_host().is_some_and(VarlenMeta::is_empty));
        meta.rebuild(MaskView::from_host(&[0_i64, 1 << 40, -1, 0, 0, 7], 2, 3)?)?;
        assert_eq!(indices(&meta), [1, 2, 5]);
        meta.rebuild(MaskView::from_host(&[256_u16, 0, 0, 0, 1, 0], 2, 3)?)?;
        assert_eq!(indices(&meta), [0, 4]);
        let mut memory = DeviceMemory::alloc(&device, 64)?;
        memory.write(&[0_u8, 1, 0, 0, 1, 1, 0, 1])?;
        // The transpose of a [3, 2] mask that starts at the second byte.
        meta.rebuild(memory.mask_view(MaskDType::U8, Layout::strided(&[2, 3], &[1, 2], 1)?))?;
        assert_eq!(indices(&meta), [0, 2, 4]);
        Ok(())
    }

    #[test]
    fn another_size_is_refused_and_leaves_the_metadata() -> Result<()> {
        let device = Device::new(DeviceChoice::Cpu)?;
        let mut meta = DeviceVarlenMeta::new(&device, 1, 2)?;
        meta.rebuild(MaskView::from_host(&[1_u8, 1], 1, 2)?)?;
        let error = meta.rebuild(MaskView::from_host(&[0_u8; 3], 1, 3)?).err();
        assert_eq!(error, Some(Error::MaskSize { argument: "mask", expected: [1, 2], got: [1, 3] }));
        assert_eq!(meta.on_host().map(VarlenMeta::total_valid), Some(2));
        let memory = DeviceMemory::alloc(&device, 8)?;
        let outside = memory.mask_view(MaskDType::U64, Layout::contiguous(&[1, 2])?);
        assert!(matches!(meta.rebuild(outside), Err(Error::BufferTooSmall { .. })));
        assert!(matches!(DeviceVarlenMeta::new(&device, usize::MAX, 2), Err(Error::TooLarge { .. })));
        Ok(())
    }
}
