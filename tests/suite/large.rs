//! Sizes past 32 bits, and sizes that no device has memory for.

use std::fs;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use rayon::iter::IndexedParallelIterator;
use rayon::slice::ParallelSlice;
use varlen_fa::{
    AttentionMask, BackendKind, DType, Device, DeviceMemory, Error, KeyMask, Layout, MaskedAttention, Path, Tensor,
    TensorView, TensorViewMut, VarlenMeta, f16, pack, scatter_to_padded_into,
};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::masks::mask;
use super::memory::{download, narrow, sentinel};
use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    trials.once("large/layouts_count_in_64_bits", layouts_count_in_64_bits);
    trials.once("large/more_than_any_memory", more_than_any_memory);
    trials.once("large/one_byte_over_the_limit", one_byte_over_the_limit);
    trials.alone("large/memory_runs_out", memory_runs_out);
    trials.alone("large/strides_past_32_bits", strides_past_32_bits);
    trials.alone("large/more_than_2_31_elements", more_than_2_31_elements);
    trials.once("large/the_same_with_3_batch_rows", |device| many_batch_rows(device, 3));
}

fn layouts_count_in_64_bits(_: &Device) -> Result<()> {
    let layout = Layout::contiguous(&[64, 32_768, 64, 128])?;
    ensure!(layout.numel() == 1 << 34 && layout.end() == 1 << 34);
    ensure!(layout.strides() == [1 << 28, 1 << 13, 1 << 7, 1]);
    let last = layout.slice(0, 63..64)?.slice(1, 32_767..32_768)?.slice(2, 63..64)?;
    ensure!(last.offset() == (1 << 34) - 128 && last.end() == 1 << 34);
    let turned = layout.permute(&[0, 2, 1, 3])?;
    ensure!(turned.end() == 1 << 34 && !turned.self_overlaps() && !turned.is_contiguous());
    Ok(())
}

/// 2^50 bytes: an error that says how much, no abort.
fn more_than_any_memory(device: &Device) -> Result<()> {
    let shape = [1 << 20, 1 << 20, 16, 32];
    for dtype in [DType::F16, DType::Bf16] {
        let error = Tensor::zeros(device, dtype, &shape).err().context("2^50 bytes were granted")?;
        let asked = match &error {
            Error::OutOfMemory { requested, .. } => *requested,
            Error::TooLarge { got, .. } => *got,
            _ => 0,
        };
        ensure!(asked == 1 << 50, "expected OutOfMemory or TooLarge for 2^50 bytes, got {error:?}");
        ensure!(error.to_string().contains(&asked.to_string()), "{error} does not say how much was asked for");
    }
    // The device goes on.
    ensure!(download(&Tensor::zeros(device, DType::F16, &[3])?)? == [0; 3]);
    Ok(())
}

fn one_byte_over_the_limit(device: &Device) -> Result<Completion> {
    let limit = device.capabilities().max_buffer_bytes;
    if limit > 1 << 40 {
        return Ok(Completion::ignored_with(format!("{} limits no buffer below 2^40 bytes", device.name())));
    }
    let elements = usize::try_from(limit / 2 + 1)?;
    let error =
        Tensor::zeros(device, DType::F16, &[elements]).err().context("more than max_buffer_bytes was granted")?;
    match &error {
        Error::TooLarge { limit_name, limit: named, got, .. } => {
            ensure!(*named == limit && *got > limit && !limit_name.is_empty(), "got {error:?}");
        }
        _ => anyhow::bail!("expected TooLarge, got {error:?}"),
    }
    ensure!(error.to_string().contains(&limit.to_string()), "{error} does not name the limit");
    Ok(Completion::Completed)
}

/// Takes all of a GPU's memory, on a device of its own.
fn memory_runs_out(device: &Device) -> Result<Completion> {
    let capabilities = device.capabilities();
    if capabilities.is_software {
        return Ok(Completion::ignored_with(format!("{} shares the host's memory", device.name())));
    }
    let device = Device::with_config(device.config())?;
    let len = usize::try_from(capabilities.max_buffer_bytes.min(1 << 31) / 2)?;
    let mut held = Vec::new();
    let error = loop {
        match Tensor::zeros(&device, DType::F16, &[len]) {
            Ok(tensor) => held.push(tensor),
            Err(error) => break error,
        }
        ensure!(held.len() < 4096, "{} buffers of {len} elements fit", held.len());
    };
    ensure!(matches!(&error, Error::OutOfMemory { requested, .. } if *requested == 2 * len as u64), "got {error:?}");
    drop(held);
    device.synchronize()?;
    let small = Tensor::zeros(&device, DType::F16, &[1000])?;
    ensure!(download(&small)? == [0; 1000], "the device does not go on after memory ran out");
    Ok(Completion::Completed)
}

/// Bytes of host memory that are free, where that can be told.
fn free_host_memory() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Batch rows 2^30 elements apart, in host memory that is reserved and hardly touched: places past 2^31 elements and 2^32 bytes.
fn strides_past_32_bits(device: &Device) -> Result<Completion> {
    if device.capabilities().backend != BackendKind::Cpu {
        return Ok(Completion::ignored_with(
            "only the CPU device reads host memory in place; see more_than_2_31_elements",
        ));
    }
    let needed = 12 << 30;
    match free_host_memory() {
        Some(free) if free >= needed => {}
        free => {
            return Ok(Completion::ignored_with(format!("needs {needed} bytes of address space, {free:?} are free")));
        }
    }
    let shape = OracleShape::self_attention(3, 40, 2, 64);
    let keep = mask(3, 40, |row, token| token % (row + 2) != 0);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(3, 40, &keep)?)?;
    let call = Call::random(shape, Mask::Varlen(keep), DType::F16, 2);
    let reference = call.reference(usize::MAX)?;
    let (far, row) = (1_usize << 30, 40 * 2 * 64);
    let len = 2 * far + row;
    let layout = Layout::strided(&[3, 40, 2, 64], &[far as u64, 128, 64, 1], 0)?;
    ensure!(layout.end() > 1 << 31);

    for path in [Path::Dense, Path::Fused, Path::Packed] {
        // Integers, since zeroed pages of those are not touched until they are written.
        let memories: Vec<Vec<u16>> = call
            .values
            .iter()
            .map(|values| {
                let mut memory = vec![0_u16; len];
                for (b, values) in values.chunks(row).enumerate() {
                    let places = memory[b * far..].iter_mut();
                    places.zip(values).for_each(|(place, &value)| *place = narrow(value, DType::F16) as u16);
                }
                memory
            })
            .collect();
        let view = |input: usize| TensorView::from_host_strided::<f16>(bytemuck::cast_slice(&memories[input]), layout);
        let mut out = vec![0_u16; len];
        for b in 0..3 {
            out[b * far..b * far + row].fill(sentinel(DType::F16) as u16);
        }
        let into = TensorViewMut::from_host_strided::<f16>(bytemuck::cast_slice_mut(&mut out), layout);
        let layer = MaskedAttention::new(device).with_path(path);
        layer.forward_into(view(0), view(1), view(2), AttentionMask::varlen(&meta), into)?;
        let bits: Vec<u32> = (0..3).flat_map(|b| &out[b * far..b * far + row]).map(|&bits| u32::from(bits)).collect();
        call.judge(&bits, &reference, Rules::standard(DType::F16)).with_context(|| path.name())?;
        ensure!(
            out[row] == 0 && out[far - 1] == 0 && out[far + row] == 0,
            "{path}: memory between batch rows was written"
        );

        // Pack reads there too.
        let packed = pack(device, view(0), &meta)?;
        let [total, heads, dim] = [meta.total_valid(), 2, 64];
        ensure!(packed.shape() == [total, heads, dim]);
        let expected: Vec<u32> = meta
            .indices()?
            .iter()
            .flat_map(|&flat| &call.values[0][flat as usize * 128..][..128])
            .map(|&value| narrow(value, DType::F16))
            .collect();
        ensure!(download(&packed)? == expected, "pack past 2^31 elements");
    }
    Ok(Completion::Completed)
}

/// A tensor of 2^31 + 2^19 elements, as q, k and v at once, on GPUs that have the memory.
fn more_than_2_31_elements(device: &Device) -> Result<Completion> {
    let batch = 4097;
    let elements = batch * BATCH_ROW;
    ensure!(elements > 1 << 31);
    let bytes = 2 * elements as u64;
    let capabilities = device.capabilities();
    if capabilities.is_software {
        return Ok(Completion::ignored_with(format!("{} is a device in software, too slow for this", device.name())));
    }
    if capabilities.max_buffer_bytes < bytes {
        let limit = capabilities.max_buffer_bytes;
        return Ok(Completion::ignored_with(format!(
            "needs tensors of {bytes} bytes, {} allows {limit}",
            device.name()
        )));
    }
    let needed = 4 * bytes;
    match free_host_memory() {
        Some(free) if free >= needed => {}
        free => return Ok(Completion::ignored_with(format!("needs {needed} bytes of host memory, {free:?} are free"))),
    }
    many_batch_rows(device, batch)
}

const SEQ: usize = 128;
const HEADS: usize = 32;
const DIM: usize = 128;
const BATCH_ROW: usize = SEQ * HEADS * DIM;

/// Attention, pack and scatter of as many batch rows of 2^19 elements, of which some are held against the oracle.
fn many_batch_rows(device: &Device, batch: usize) -> Result<Completion> {
    const ROW: usize = HEADS * DIM;
    // A pattern whose period shares no factor with any size, so that every batch row is different.
    let pattern = random::to_f16(&random::normal(3, 1_000_003));
    let data: Vec<f16> = pattern.iter().cycle().take(batch * BATCH_ROW).copied().collect();
    let x = Tensor::from_slice(device, &data, &[batch, SEQ, HEADS, DIM])?;
    let keep = mask(batch, SEQ, |row, token| !(row % 50..row % 50 + 30).contains(&token));
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, SEQ, &keep)?)?;

    // One output, on the device and here: the pages of a new one would take longer than all the rest.
    let layout = Layout::contiguous(&[batch, SEQ, HEADS, DIM])?;
    let mut host = vec![f16::ZERO; batch * BATCH_ROW];
    let mut memory = match DeviceMemory::alloc(device, 2 * host.len() as u64) {
        Err(Error::OutOfMemory { why, .. }) => {
            return Ok(Completion::ignored_with(format!("no memory for the output: {why}")));
        }
        memory => memory?,
    };
    let capabilities = device.capabilities();
    for path in [Path::Dense, Path::Fused, Path::Packed] {
        for &kernel in capabilities.kernels.iter() {
            let layer = MaskedAttention::new(device).with_path(path).with_kernel(kernel);
            let out = memory.view_mut(DType::F16, layout);
            match layer.forward_into(&x, &x, &x, AttentionMask::varlen(&meta), out) {
                Err(Error::OutOfMemory { why, .. }) => {
                    return Ok(Completion::ignored_with(format!("{path} by {kernel}: no memory for it: {why}")));
                }
                attended => attended?,
            };
            memory.read(&mut host)?;
            judge_batch_rows(&host, &data, &keep).with_context(|| format!("{path} by {kernel}"))?;
        }
    }

    let packed = pack(device, &x, &meta)?;
    scatter_to_padded_into(device, &packed, &meta, memory.view_mut(DType::F16, layout))?;
    memory.read(&mut host)?;
    let wrong = first_wrong_row(&host, &keep, |at, keep, got| {
        if keep { got == &data[at * ROW..][..ROW] } else { got.iter().all(|value| value.to_bits() == 0) }
    });
    ensure!(wrong.is_none(), "pack and scatter: row and token {wrong:?}");
    Ok(Completion::Completed)
}

/// The batch row and token of the first row of `out` that is not right, by all the machine's threads.
fn first_wrong_row(
    out: &[f16],
    keep: &[bool],
    is_right: impl Fn(usize, bool, &[f16]) -> bool + Sync,
) -> Option<(usize, usize)> {
    let rows = out.par_chunks(HEADS * DIM).zip(keep).enumerate();
    rows.position_first(|(at, (row, &keep))| !is_right(at, keep, row)).map(|at| (at / SEQ, at % SEQ))
}

/// Masked rows are zero and the others are not; some whole batch rows are held against the oracle.
fn judge_batch_rows(out: &[f16], data: &[f16], keep: &[bool]) -> Result<()> {
    let batch = keep.len() / SEQ;
    let wrong = first_wrong_row(out, keep, |_, keep, row| keep != row.iter().all(|value| value.to_bits() == 0));
    ensure!(wrong.is_none(), "row and token {wrong:?}: zero though it is kept, or the other way round");
    // The first and the last, and those around 2^30 bytes, 2^31 bytes and 2^32 bytes.
    for b in [0, 1, 1023, 1024, 2047, 2048, batch - 2, batch - 1].into_iter().filter(|&b| b < batch) {
        let values: Vec<f32> = data[b * BATCH_ROW..][..BATCH_ROW].iter().map(|value| value.to_f32()).collect();
        let mask = Mask::Varlen(keep[b * SEQ..][..SEQ].to_vec());
        let shape = OracleShape::self_attention(1, SEQ, HEADS, DIM);
        let call = Call::new(shape, mask, DType::F16, [values.clone(), values.clone(), values]);
        let bits: Vec<u32> = out[b * BATCH_ROW..][..BATCH_ROW].iter().map(|value| u32::from(value.to_bits())).collect();
        call.judge(&bits, &call.reference(500)?, Rules::standard(DType::F16))
            .with_context(|| format!("batch row {b}"))?;
    }
    Ok(())
}
