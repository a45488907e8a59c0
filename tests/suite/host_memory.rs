//! What only the CPU device has: tensors in the application's own host memory.

use anyhow::{Result, ensure};
use varlen_fa::{
    AttentionMask, Device, DeviceChoice, Error, KeyMask, Layout, MaskedAttention, TensorView, TensorViewMut,
    VarlenMeta, f16,
};

use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    trials.once("host_memory/views", views);
    trials.once("host_memory/halves_of_one_buffer", halves_of_one_buffer);
    trials.once("host_memory/lengths_are_checked", lengths_are_checked);
    trials.once("host_memory/is_one_device", is_one_device);
}

const SHAPE: [usize; 4] = [2, 3, 2, 8];

/// One distinct value for each row of 8.
fn rows() -> Vec<f32> {
    (0..2 * 3 * 2 * 8).map(|at| (at / 8) as f32).collect()
}

/// Under a mask that keeps token 1 alone, attention copies its row.
fn expected() -> Vec<f32> {
    let copied = |at: usize| (at / 48 * 6 + 2 + at / 8 % 2) as f32;
    (0..2 * 3 * 2 * 8).map(|at| if at / 16 % 3 == 1 { copied(at) } else { 0.0 }).collect()
}

fn meta() -> Result<VarlenMeta> {
    Ok(VarlenMeta::from_key_mask(&KeyMask::from_runs(3, &[[1..2], [1..2]])?)?)
}

fn views(device: &Device) -> Result<()> {
    let (x, meta) = (rows(), meta()?);
    let mut out = vec![f32::NAN; x.len()];
    let view = TensorView::from_host(&x, &SHAPE)?;
    let into = TensorViewMut::from_host(&mut out, &SHAPE)?;
    MaskedAttention::new(device).forward_into(view, view, view, AttentionMask::varlen(&meta), into)?;
    ensure!(out == expected(), "got {out:?}");
    Ok(())
}

/// Input and output in one allocation, side by side.
fn halves_of_one_buffer(device: &Device) -> Result<()> {
    let meta = meta()?;
    let mut memory = rows();
    memory.resize(2 * memory.len(), f32::NAN);
    let (x, out) = memory.split_at_mut(2 * 3 * 2 * 8);
    let view = TensorView::from_host(x, &SHAPE)?;
    let into = TensorViewMut::from_host(out, &SHAPE)?;
    MaskedAttention::new(device).forward_into(view, view, view, AttentionMask::varlen(&meta), into)?;
    ensure!(out == expected(), "got {out:?}");
    Ok(())
}

fn lengths_are_checked(device: &Device) -> Result<()> {
    let (x, mut out) = ([f16::ONE; 95], [f16::NAN; 97]);
    let length = |got| Some(Error::Length { argument: "data", expected: 96, got });
    ensure!(TensorView::from_host(&x, &SHAPE).err() == length(95));
    ensure!(TensorViewMut::from_host(&mut out, &SHAPE).err() == length(97));
    // A layout is checked when the view is used.
    let layout = Layout::contiguous(&SHAPE)?;
    let view = TensorView::from_host_strided(&x, layout);
    let into = TensorViewMut::from_host_strided(&mut out, layout);
    let refused = MaskedAttention::new(device).forward_into(view, view, view, AttentionMask::none(), into);
    ensure!(refused.err() == Some(Error::BufferTooSmall { argument: "q", expected: 192, got: 190 }));
    ensure!(out.iter().all(|value| value.is_nan()), "a refused call wrote to its output");
    Ok(())
}

/// Devices made one by one are the same: their tensors mix.
fn is_one_device(device: &Device) -> Result<()> {
    let other = Device::with_config(device.config().with_device(DeviceChoice::Cpu).with_force_dense(true))?;
    let x = varlen_fa::Tensor::from_slice(&other, &rows(), &SHAPE)?;
    let attended = MaskedAttention::new(device).forward(&x, &x, &x, AttentionMask::varlen(&meta()?))?;
    ensure!(attended.out.to_vec::<f32>()? == expected());
    Ok(())
}
