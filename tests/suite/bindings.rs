//! Tensors larger than one storage binding, which only wgpu devices have: the work is split by batch row.

use anyhow::{Context, Result, ensure};
use varlen_fa::{
    AttentionMask, BackendKind, Config, CuSeqlens, DType, Device, DeviceChoice, DeviceMemory, DeviceVarlenMeta, Error,
    KeyMask, Layout, MaskDType, Path, VarlenMeta, VarlenOptions, pack, scatter_to_padded, varlen_attention,
};
use varlen_fa_testkit::OracleShape;

use super::call::{Call, Inputs, Mask};
use super::check::Rules;
use super::limits;
use super::masks::mask;
use super::memory::{download, narrow, upload};
use super::placement::Placement;
use super::prepare_qk;
use super::trials::{Trials, Variant};

/// Bytes of a binding here: two batch rows of [`SHAPE`] in f32, four in 16 bits, and not a whole batch.
const BINDING: u64 = 64 << 10;
const SHAPE: OracleShape = OracleShape { batch: 9, seq_q: 16, seq_k: 16, heads: 8, kv_heads: 8, head_dim: 64 };

pub fn register(trials: &mut Trials) {
    if trials.device().capabilities().backend != BackendKind::Wgpu {
        return;
    }
    trials.each_path("bindings/batches_are_split", batches_are_split);
    trials.each_path("bindings/strided_batches_are_split", strided_batches_are_split);
    trials.each_kernel("bindings/dense_calls_are_split", dense_calls_are_split);
    trials.each_kernel("bindings/packed_rows_are_split", packed_rows_are_split);
    trials.each_dtype("bindings/pack_and_scatter_are_split", pack_and_scatter_are_split);
    trials.each_kernel("bindings/a_batch_row_must_fit", a_batch_row_must_fit);
    trials.once("bindings/prepare_qk_is_split", |device| prepare_qk::many_batch_rows(&small(device)?));
    trials.each_path_of_device_meta_in(&[DType::F32], "bindings/metadata_of_the_device", metadata_of_the_device);
    trials.once("bindings/tables_of_the_device_must_fit", tables_of_the_device_must_fit);
}

/// A device of the same adapter with small bindings.
fn small(device: &Device) -> Result<Device> {
    let config = Config::default().with_device(DeviceChoice::Wgpu).with_max_binding_bytes(BINDING);
    let small = limits::open(config)?;
    let got = small.capabilities().max_binding_bytes;
    ensure!(got == BINDING, "asked for bindings of {BINDING} bytes, got {got}");
    ensure!(small.capabilities().adapter == device.capabilities().adapter, "got {}", small.name());
    Ok(small)
}

fn on_small(variant: &Variant) -> Result<Variant> {
    Ok(Variant { device: small(&variant.device)?, ..variant.clone() })
}

/// Batch rows 3 and 4 are empty, so that a part of the batch is.
fn keep() -> Vec<bool> {
    mask(SHAPE.batch, SHAPE.seq_q, |row, token| !(3..5).contains(&row) && (row + token) % 4 != 0)
}

fn batches_are_split(variant: &Variant) -> Result<()> {
    let variant = on_small(variant)?;
    Call::random(SHAPE, Mask::Varlen(keep()), variant.dtype, 1).check(&variant)?;
    let key = mask(SHAPE.batch, 11, |row, token| row != 6 && token % 3 != row % 3);
    let shape = OracleShape { seq_k: 11, kv_heads: 4, ..SHAPE };
    Call::random(shape, Mask::Cross { query: keep(), key }, variant.dtype, 2).check(&variant).context("cross")
}

fn strided_batches_are_split(variant: &Variant) -> Result<()> {
    let variant = on_small(variant)?;
    // Smaller rows: a view inside a larger tensor binds what lies between its rows too.
    let shape = OracleShape { heads: 2, kv_heads: 2, ..SHAPE };
    let mut call = Call::random(shape, Mask::Varlen(keep()), variant.dtype, 3);
    call.output = Placement::ROOM_AROUND;
    call.inputs = Inputs::FusedQkv;
    call.check(&variant).context("fused QKV")?;
    call.inputs = Inputs::Apart([Placement::HEADS_OUTSIDE, Placement::ROOM_AROUND, Placement::HEADS_OUTSIDE]);
    call.check(&variant)?;
    // Copies of all segments fit a binding too.
    Call::random(shape, Mask::Varlen(keep()), variant.dtype, 10).check_segments(&variant, &[3]).context("segments")
}

fn dense_calls_are_split(variant: &Variant) -> Result<()> {
    let variant = on_small(variant)?;
    Call::random(SHAPE, Mask::None, variant.dtype, 4).check(&variant).context("no mask")?;
    Call::random(SHAPE, Mask::Key(keep()), variant.dtype, 5).check(&variant).context("key mask")?;
    let shape = [SHAPE.batch, SHAPE.heads, SHAPE.seq_q, SHAPE.seq_k];
    let bias = varlen_fa_testkit::random::normal_rounded(
        6,
        0,
        shape.iter().product(),
        super::memory::precision(variant.dtype),
    );
    let bits: Vec<u32> = bias.iter().map(|&value| narrow(value, variant.dtype)).collect();
    let tensor = upload(&variant.device, variant.dtype, &bits, &shape)?;
    let mut call = Call::random(SHAPE, Mask::None, variant.dtype, 6);
    call.bias = Some(bias);
    let (_, out) = call.run_as(&variant, AttentionMask::bias(tensor.view()))?;
    call.judge(&out, &call.reference(usize::MAX)?, Rules::standard(variant.dtype)).context("bias")
}

/// One packed call against the same sequences one by one.
fn packed_rows_are_split(variant: &Variant) -> Result<()> {
    let device = small(&variant.device)?;
    let lengths = [16, 0, 3, 16, 16, 1, 16, 16, 9];
    let cu = CuSeqlens::from_lengths(&lengths)?;
    let row = 8 * 64;
    let values = varlen_fa_testkit::random::normal(7, cu.total() * row);
    let bits: Vec<u32> = values.iter().map(|&value| narrow(value, variant.dtype)).collect();
    let options = VarlenOptions::default().with_kernel(variant.kernel).with_lse();
    let run = |range: std::ops::Range<usize>, cu: &CuSeqlens| -> Result<(Vec<u32>, Vec<f32>)> {
        let bits = &bits[range.start * row..range.end * row];
        let x = upload(&device, variant.dtype, bits, &[range.len(), 8, 64])?;
        let attended = varlen_attention(&device, [&x, &x, &x], cu, cu, options)?;
        Ok((download(&attended.out)?, attended.lse.context("lse was asked for")?.to_vec::<f32>()?))
    };
    let (whole, whole_lse) = run(0..cu.total(), &cu)?;
    ensure!(whole.iter().any(|&bits| bits != 0), "the output is all zeros: nothing was tested");
    for (sequence, &length) in lengths.iter().enumerate() {
        let start = cu.as_slice()[sequence] as usize;
        let (alone, lse) = run(start..start + length, &CuSeqlens::from_lengths(&[length])?)?;
        ensure!(whole[start * row..(start + length) * row] == alone, "sequence {sequence}");
        for head in 0..8 {
            let of_whole = &whole_lse[head * cu.total() + start..][..length];
            ensure!(of_whole == &lse[head * length..][..length], "lse of sequence {sequence}, head {head}");
        }
    }
    Ok(())
}

fn pack_and_scatter_are_split(device: &Device, dtype: DType) -> Result<()> {
    let (device, keep) = (small(device)?, keep());
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(SHAPE.batch, SHAPE.seq_q, &keep)?)?;
    let row = SHAPE.heads * SHAPE.head_dim;
    let bits: Vec<u32> = (0..keep.len() * row).map(|at| at as u32 * 2_654_435_761 % 65_521).collect();
    let padded = upload(&device, dtype, &bits, &[SHAPE.batch, SHAPE.seq_q, SHAPE.heads, SHAPE.head_dim])?;
    let packed = pack(&device, &padded, &meta)?;
    let rows = || bits.chunks(row).zip(&keep);
    let expected: Vec<u32> = rows().filter(|(_, keep)| **keep).flat_map(|(row, _)| row).copied().collect();
    ensure!(download(&packed)? == expected, "pack");
    let zeros = vec![0; row];
    let expected: Vec<u32> = rows().flat_map(|(row, &keep)| if keep { row } else { &zeros[..] }).copied().collect();
    ensure!(download(&scatter_to_padded(&device, &packed, &meta)?)? == expected, "scatter");
    Ok(())
}

/// Split by batch row, and no further: the error names the argument and the limit, and nothing is written.
fn a_batch_row_must_fit(variant: &Variant) -> Result<()> {
    let variant = on_small(variant)?;
    let shape = OracleShape { batch: 2, seq_q: 16, seq_k: 200, ..SHAPE };
    let call = Call::random(shape, Mask::None, variant.dtype, 8);
    let error = call.run(&variant).err().context("200 tokens of 512 elements fit into 64 KiB")?;
    let Some(Error::TooLarge { argument: "k", limit_name, limit, got }) = error.downcast_ref::<Error>() else {
        anyhow::bail!("expected TooLarge for k, got {error:?}");
    };
    let bytes = (200 * 8 * 64 * variant.dtype.size()) as u64;
    ensure!((*limit, *got) == (BINDING, bytes), "got {error:?}");
    ensure!(limit_name.contains("max_storage_buffer_binding_size"), "got {error:?}");
    Ok(())
}

/// Split like any other, but on the packed path: only the device knows where the packed rows of a part start.
fn metadata_of_the_device(variant: &Variant) -> Result<()> {
    let variant = on_small(variant)?;
    let outcome = Call::random(SHAPE, Mask::Device(keep()), variant.dtype, 9).check(&variant);
    if variant.path != Some(Path::Packed) {
        return outcome;
    }
    let error = outcome.err().context("144 rows of 512 elements fit into 64 KiB")?;
    let Some(Error::TooLarge { argument: "q", limit_name, limit: BINDING, got: 294_912 }) = error.downcast_ref() else {
        anyhow::bail!("expected TooLarge for q, got {error:?}");
    };
    ensure!(limit_name.contains("metadata of the device"), "got {error:?}");
    Ok(())
}

fn tables_of_the_device_must_fit(device: &Device) -> Result<()> {
    let device = small(device)?;
    let error = DeviceVarlenMeta::new(&device, 2, 20_000).err().context("40,002 words fit into 64 KiB")?;
    ensure!(
        matches!(error, Error::TooLarge { argument: "mask", limit: BINDING, got: 160_008, .. }),
        "metadata that is too large: {error:?}"
    );
    // The tables fit, and this mask does not.
    let mut meta = DeviceVarlenMeta::new(&device, 2, 6000)?;
    let mut memory = DeviceMemory::alloc(&device, 96_000)?;
    memory.write(&[0xff_u8; 96_000])?;
    let layout = Layout::contiguous(&[2, 6000])?;
    let error = meta.rebuild(memory.mask_view(MaskDType::U64, layout)).err().context("96,000 bytes fit into 64 KiB")?;
    ensure!(
        matches!(error, Error::TooLarge { argument: "mask", limit: BINDING, got: 96_000, .. }),
        "a mask that is too large: {error:?}"
    );
    Ok(meta.rebuild(memory.mask_view(MaskDType::U32, layout))?)
}
