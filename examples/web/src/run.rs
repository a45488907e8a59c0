//! One workload: with metadata, densely, recorded into the page's own commands; checked.

use anyhow::{Context, Result, bail};
use varlen_fa::wgpu::{BufferDescriptor, BufferUsages};
use varlen_fa::{
    AttentionMask, Config, Device, DeviceChoice, DeviceMemory, Element, KeyMask, Layout, MaskedAttention, Path, Tensor,
    TensorView, VarlenMeta, bf16, f16,
};
use varlen_fa_testkit::random::normal_rounded;
use varlen_fa_testkit::{Oracle, OracleProblem, OracleShape, Precision, Value, Workload, WorkloadKind};

use crate::check;
use crate::report::{self, Report, Timed};

/// Calls that are timed, after one that is not.
const TIMED_CALLS: usize = 3;
const SEED: u64 = 1;

/// Heads and head dimension where the workload does not say.
const DEFAULT_HEADS: usize = 8;
const DEFAULT_HEAD_DIM: usize = 64;

/// Runs a workload, such as `joint:text=64:image=256:valid=20,48:heads=8:dim=64`, in f32, f16 or bf16.
///
/// # Errors
/// A workload or element type that is not understood, and whatever the device reports. A wrong result is no error here: the
/// report says so.
pub async fn run(device: &Device, workload: &str, dtype: &str) -> Result<Report> {
    let workload = Workload::parse(workload)?;
    match dtype {
        "f32" => run_in::<f32>(device, &workload, Precision::F32).await,
        "f16" => run_in::<f16>(device, &workload, Precision::F16).await,
        "bf16" => run_in::<bf16>(device, &workload, Precision::Bf16).await,
        _ => bail!("element type: expected f32, f16 or bf16, got {dtype:?}"),
    }
}

async fn run_in<T: Element + Value>(device: &Device, workload: &Workload, precision: Precision) -> Result<Report> {
    let heads = workload.heads.unwrap_or(DEFAULT_HEADS);
    let kv_heads = workload.kv_heads.unwrap_or(heads);
    let head_dim = workload.dim.unwrap_or(DEFAULT_HEAD_DIM);
    let shape = [workload.batch, workload.seq, heads, head_dim];
    let kv_shape = [workload.batch, workload.seq, kv_heads, head_dim];

    let mask = KeyMask::from_bool(workload.batch, workload.seq, &workload.mask)?;
    let meta = VarlenMeta::from_key_mask(&mask)?;
    let shapes = [shape, kv_shape, kv_shape];
    let normal = |i: usize| normal_rounded(SEED, i as u64, shapes[i].iter().product(), precision);
    let wide = [normal(0), normal(1), normal(2)];
    let host = [0, 1, 2].map(|i| wide[i].iter().map(|&value| T::from_f32(value)).collect::<Vec<T>>());
    let upload = |i: usize| Tensor::from_slice(device, &host[i], &shapes[i]);
    let qkv = [upload(0)?, upload(1)?, upload(2)?];

    let layer = MaskedAttention::new(device);
    let (varlen, out, by_device) = timed(&layer, &qkv, AttentionMask::varlen(&meta), shape).await?;
    let every_row = layer.with_path(Path::Dense);
    let (dense, _, _) = timed(&every_row, &qkv, AttentionMask::key(&mask), shape).await?;
    let out = out.to_vec_async::<T>().await?;
    let recorded = recorded(device, &host, shapes, &meta).await?;

    let cpu = Device::with_config(Config::default().with_device(DeviceChoice::Cpu))?;
    let on_host = |i: usize| TensorView::from_host(&host[i], &shapes[i]);
    let layer = MaskedAttention::new(&cpu);
    let on_cpu =
        layer.forward(on_host(0)?, on_host(1)?, on_host(2)?, AttentionMask::varlen(&meta))?.out.to_vec::<T>()?;

    let keep = workload.mask.as_slice();
    let oracle_shape = OracleShape { kv_heads, ..OracleShape::self_attention(shape[0], shape[1], heads, head_dim) };
    let problem = OracleProblem::new(oracle_shape, &wide[0], &wide[1], &wide[2]);
    let oracle = Oracle::new(OracleProblem { key_keep: Some(keep), query_keep: Some(keep), ..problem })?;
    let checks = vec![
        check::against_oracle(&oracle, precision, &out)?,
        check::against_cpu(shape, precision, &out, &on_cpu)?,
        check::masked_rows_are_zero(shape, keep, &out),
        check::same_bits("recorded into the page's own commands", shape, &out, &recorded),
    ];

    let values: Vec<f32> = out.iter().map(|value| value.to_f32()).collect();
    Ok(Report {
        workload: workload.to_string(),
        adapter: device.capabilities().adapter.clone(),
        dtype: T::DTYPE.name(),
        shape,
        text: match workload.kind {
            WorkloadKind::Joint { text, .. } => Some(text),
            _ => None,
        },
        valid: workload.total_valid(),
        valid_pairs: workload.valid_pairs() as f64 / (workload.batch * workload.seq * workload.seq) as f64,
        runs: report::runs(&mask),
        magnitude: report::magnitude(shape, &values),
        varlen,
        dense,
        by_device,
        checks,
    })
}

/// Times some calls; gives the output too, and whether the adapter measured.
async fn timed(
    layer: &MaskedAttention,
    [q, k, v]: &[Tensor; 3],
    mask: AttentionMask<'_>,
    shape: [usize; 4],
) -> Result<(Timed, Tensor, bool)> {
    let device = layer.device();
    let mut out = Tensor::zeros(device, q.dtype(), &shape)?;
    // Compiles the shaders and uploads the metadata.
    let plan = layer.forward_into(q, k, v, mask, &mut out)?;
    let mut timings = Vec::new();
    for _ in 0..TIMED_CALLS {
        timings.push(device.time_async(|| layer.forward_into(q, k, v, mask, &mut out)).await?.1);
    }
    let by_device = timings.iter().all(|timing| timing.by_device);
    Ok((Timed::of(&plan, &timings), out, by_device))
}

/// The same attention recorded into commands of the application's, on its own device, into its own buffer.
async fn recorded<T: Element>(
    device: &Device,
    host: &[Vec<T>; 3],
    shapes: [[usize; 4]; 3],
    meta: &VarlenMeta,
) -> Result<Vec<T>> {
    let (wgpu, queue) = device.wgpu().context("not a wgpu device")?;
    let size = size_of_val(host[0].as_slice()) as u64;
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
    let target = wgpu.create_buffer(&BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    let mut encoder = wgpu.create_command_encoder(&Default::default());

    let library = Device::from_wgpu(wgpu, queue, Config::default())?;
    let upload = |i: usize| Tensor::from_slice(&library, &host[i], &shapes[i]);
    let (q, k, v) = (upload(0)?, upload(1)?, upload(2)?);
    let mut memory = DeviceMemory::from_wgpu(&library, target)?;
    let out = memory.view_mut(T::DTYPE, Layout::contiguous(&shapes[0])?);
    MaskedAttention::new(&library).encode_into(&mut encoder, &q, &k, &v, AttentionMask::varlen(meta), out)?;

    queue.submit([encoder.finish()]);
    let mut values = vec![T::from_f32(0.0); host[0].len()];
    memory.read_async(&mut values).await?;
    Ok(values)
}
