//! Tensors: what goes in comes out, bit for bit.

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use varlen_fa::{DType, Device, DeviceMemory, Error, Tensor, TensorView, TensorViewMut, bf16, f16};

use super::memory::{download, poison, upload};
use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    trials.each_dtype("tensors/bits_survive_the_round_trip", bits_survive_the_round_trip);
    trials.each_dtype("tensors/zeros_are_zero", zeros_are_zero);
    trials.each_dtype("tensors/write_replaces_everything", write_replaces_everything);
    trials.once("tensors/read_and_written_by_many_threads", read_and_written_by_many_threads);
    trials.once("tensors/refusals", refusals);
    trials.once("tensors/views_know_their_layout", views_know_their_layout);
    trials.once("tensors/time_gives_the_works_result", time_gives_the_works_result);
    trials.once("tensors/async_forms_do_the_same", async_forms_do_the_same);
}

/// The forms for browsers, which wait here like the others.
fn async_forms_do_the_same(device: &Device) -> Result<()> {
    let opened = pollster::block_on(Device::with_config_async(device.config()))?;
    ensure!(opened.capabilities().backend == device.capabilities().backend, "opened {}", opened.name());

    let values: Vec<f16> = (0..999).map(f16::from_bits).collect();
    let mut tensor = Tensor::zeros(device, DType::F16, &[999])?;
    let (written, timing) = pollster::block_on(device.time_async(|| tensor.write(&values).map(|()| 7)))?;
    ensure!(written == 7, "time_async gave {written}, {timing:?}");
    pollster::block_on(device.synchronize_async())?;
    ensure!(pollster::block_on(tensor.to_vec_async::<f16>())? == values);
    let error = pollster::block_on(tensor.to_vec_async::<bf16>()).err().context("read as bf16")?;
    ensure!(matches!(error, Error::DTypeMismatch { .. }), "got {error:?}");

    let mut memory = DeviceMemory::alloc(device, 1998)?;
    memory.write(&values)?;
    let mut read = vec![f16::ONE; 999];
    pollster::block_on(memory.read_async(&mut read))?;
    ensure!(read == values);
    let error = pollster::block_on(memory.read_async(&mut [0_u8; 2001])).err().context("read past the end")?;
    ensure!(matches!(error, Error::BufferTooSmall { .. }), "got {error:?}");
    Ok(())
}

/// Every 16-bit pattern, or as many of f32.
fn patterns(dtype: DType, len: usize) -> Vec<u32> {
    let spread =
        |at: usize| if dtype == DType::F32 { (at as u32).wrapping_mul(0x9e37_79b9) } else { at as u32 & 0xffff };
    (0..len).map(|at| if at % 7 == 0 { poison(at, dtype) } else { spread(at) }).collect()
}

fn bits_survive_the_round_trip(device: &Device, dtype: DType) -> Result<()> {
    // Odd lengths end in the middle of a 32-bit word.
    let shapes: [&[usize]; 8] =
        [&[1], &[3], &[1, 1, 1, 1], &[5, 7], &[3, 5, 7], &[2, 3, 4, 8], &[0, 3, 4, 8], &[65536]];
    for shape in shapes {
        let bits = patterns(dtype, shape.iter().product());
        let tensor = upload(device, dtype, &bits, shape)?;
        ensure!(tensor.shape() == shape && tensor.dtype() == dtype, "got {tensor:?}");
        ensure!(download(&tensor)? == bits, "bits of shape {shape:?} changed");
        ensure!(download(&tensor)? == bits, "bits of shape {shape:?} changed after they were read");
    }
    Ok(())
}

fn zeros_are_zero(device: &Device, dtype: DType) -> Result<()> {
    for shape in [[1, 1, 1, 3], [2, 3, 5, 7], [2, 300, 4, 64]] {
        // Memory that was used before, if the device hands it out again.
        drop(upload(device, dtype, &patterns(dtype, shape.iter().product()), &shape)?);
        let zeros = Tensor::zeros(device, dtype, &shape)?;
        ensure!(download(&zeros)?.iter().all(|&bits| bits == 0), "{shape:?} is not all +0.0");
    }
    Ok(())
}

fn write_replaces_everything(device: &Device, dtype: DType) -> Result<()> {
    for len in [1, 5, 1000] {
        let (before, after) = (patterns(dtype, 2 * len), patterns(dtype, len));
        let mut tensor = upload(device, dtype, &before[len..], &[len])?;
        match dtype {
            DType::F32 => tensor.write(&after.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>())?,
            DType::F16 => tensor.write(&after.iter().map(|&bits| f16::from_bits(bits as u16)).collect::<Vec<_>>())?,
            _ => tensor.write(&after.iter().map(|&bits| bf16::from_bits(bits as u16)).collect::<Vec<_>>())?,
        }
        ensure!(download(&tensor)? == after, "length {len}");
    }
    Ok(())
}

/// Threads that share nothing but the device: each finds what it wrote.
fn read_and_written_by_many_threads(device: &Device) -> Result<()> {
    let one_thread = |thread: u32| -> Result<()> {
        for round in 0..1000 {
            let bits: Vec<u32> = (0..1000).map(|at| (at ^ round ^ thread << 8) & 0xffff).collect();
            let tensor = upload(device, DType::Bf16, &bits, &[1000])?;
            ensure!(download(&tensor)? == bits, "round {round}: other bits came back");
        }
        Ok(())
    };
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|number| scope.spawn(move || one_thread(number))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    for (number, result) in results.into_iter().enumerate() {
        result.map_err(|_| anyhow!("thread {number} panicked"))?.with_context(|| format!("thread {number}"))?;
    }
    Ok(())
}

fn refusals(device: &Device) -> Result<()> {
    let mut tensor = upload(device, DType::F16, &[1, 2, 3, 4, 5, 6], &[2, 3])?;
    let of = |error: Option<Error>| error.context("expected an error");
    let mismatch = |argument, got| Error::DTypeMismatch { argument, expected: DType::F16, got };
    ensure!(of(tensor.to_vec::<f32>().err())? == mismatch("T", DType::F32));
    ensure!(of(tensor.to_vec::<bf16>().err())? == mismatch("T", DType::Bf16));
    ensure!(of(tensor.write(&[0.0_f32; 6]).err())? == mismatch("data", DType::F32));
    let length = |got| Error::Length { argument: "data", expected: 6, got };
    ensure!(of(tensor.write(&[f16::ONE; 5]).err())? == length(5));
    ensure!(of(tensor.write(&[f16::ONE; 7]).err())? == length(7));
    ensure!(download(&tensor)? == [1, 2, 3, 4, 5, 6], "a refused write changed the tensor");
    ensure!(of(Tensor::from_slice(device, &[f16::ONE; 5], &[2, 3]).err())? == length(5));
    let rank = |got| Error::Rank { argument: "shape", expected: "1 to 4", got };
    ensure!(of(Tensor::zeros(device, DType::F16, &[]).err())? == rank(0));
    ensure!(of(Tensor::zeros(device, DType::F16, &[1; 5]).err())? == rank(5));
    Ok(())
}

fn views_know_their_layout(device: &Device) -> Result<()> {
    let mut tensor = Tensor::zeros(device, DType::Bf16, &[2, 3, 4, 8])?;
    fn facts(layout: &varlen_fa::Layout) -> (Vec<usize>, Vec<u64>, u64) {
        (layout.shape().to_vec(), layout.strides().to_vec(), layout.offset())
    }
    let expected = (vec![2, 2, 3, 8], vec![96, 8, 32, 1], 8);
    let view: TensorView<'_> = (&tensor).into();
    let view = view.slice(2, 1..3)?.permute(&[0, 2, 1, 3])?;
    ensure!(facts(view.layout()) == expected && view.shape() == [2, 2, 3, 8] && view.dtype() == DType::Bf16);
    let view: TensorViewMut<'_> = (&mut tensor).into();
    let view = view.slice(2, 1..3)?.permute(&[0, 2, 1, 3])?;
    ensure!(facts(view.layout()) == expected && view.shape() == [2, 2, 3, 8] && view.dtype() == DType::Bf16);
    let layout = varlen_fa::Layout::strided(&[4], &[2], 1)?;
    ensure!(facts(tensor.view().with_layout(layout).layout()) == (vec![4], vec![2], 1));
    ensure!(facts(tensor.view_mut().with_layout(layout).layout()) == (vec![4], vec![2], 1));
    ensure!(matches!(tensor.view().slice(4, 0..1), Err(Error::View { argument: "range", .. })));
    ensure!(matches!(tensor.view().permute(&[0, 1, 2]), Err(Error::View { argument: "order", .. })));
    Ok(())
}

fn time_gives_the_works_result(device: &Device) -> Result<()> {
    // No other trial times anything: a device has one timer.
    let (tensor, timing) = device.time(|| Tensor::zeros(device, DType::F16, &[8]))?;
    ensure!(download(&tensor)? == [0; 8], "the timed work's tensor");
    ensure!(timing.by_device == device.capabilities().has_timestamps, "got {timing:?}");
    let refused = device.time(|| Tensor::zeros(device, DType::F16, &[]).map(drop));
    ensure!(matches!(refused, Err(Error::Rank { .. })), "the work's own error comes back");
    // And the timer is free again.
    device.time(|| Ok(()))?;
    Ok(())
}
