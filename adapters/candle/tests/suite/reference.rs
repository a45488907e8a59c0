//! Attention by candle's own operations, one sequence after the other, in f32 on the CPU.

use candle_core::{D, DType, Device, Result, Tensor};

/// Query heads, and key and value heads.
pub const HEADS: [usize; 2] = [4, 2];
pub const DIM: usize = 24;
pub const SCALE: f32 = 0.3;

/// What a reference does to scores.
#[derive(Clone, Copy, Default)]
pub struct Rule<'a> {
    pub left: Option<usize>,
    pub right: Option<usize>,
    pub slopes: Option<&'a [f32]>,
    pub softcap: Option<f64>,
}

/// Attention of one sequence: `q` `[Sq, H, D]`, `k` and `v` `[Sk, Hkv, D]`.
pub fn reference(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, rule: Rule<'_>) -> Result<Tensor> {
    let ((seq_q, heads, _), (seq_k, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let by_head = |x: &Tensor, repeat: usize| -> Result<Tensor> {
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?;
        let (heads, seq, dim) = x.dims3()?;
        x.unsqueeze(1)?.broadcast_as((heads, repeat, seq, dim))?.reshape((heads * repeat, seq, dim))
    };
    let (q, k, v) = (by_head(q, 1)?, by_head(k, heads / kv_heads)?, by_head(v, heads / kv_heads)?);
    let mut scores = (q.matmul(&k.t()?)? * f64::from(scale))?;
    if let Some(cap) = rule.softcap {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let mut added = Vec::with_capacity(heads * seq_q * seq_k);
    for h in 0..heads {
        for i in 0..seq_q {
            for j in 0..seq_k {
                let ahead = j as i64 - (i as i64 + seq_k as i64 - seq_q as i64);
                let hidden = rule.right.is_some_and(|right| ahead > right as i64)
                    || rule.left.is_some_and(|left| -ahead > left as i64);
                let slope = rule.slopes.map_or(0.0, |slopes| slopes[h]);
                added.push(if hidden { f32::NEG_INFINITY } else { -slope * ahead.abs() as f32 });
            }
        }
    }
    let added = Tensor::from_vec(added, (heads, seq_q, seq_k), q.device())?;
    let scores = (scores + added)?;
    // Rows that see no key are zeros.
    let most = scores.max_keepdim(D::Minus1)?.maximum(f32::MIN)?;
    let weights = scores.broadcast_sub(&most)?.exp()?;
    let sum = weights.sum_keepdim(D::Minus1)?.maximum(f32::MIN_POSITIVE)?;
    weights.broadcast_div(&sum)?.matmul(&v)?.transpose(0, 1)?.contiguous()
}

/// The devices that there are, each with its element types: the CPU, and with the feature `cuda` the first GPU, on a stream of its own
/// and on candle's stream per thread. Where there is no GPU that is said, or fails if `VARLEN_FA_TEST_REQUIRE` names `cuda`.
pub fn devices() -> Result<Vec<(Device, &'static [DType])>> {
    let on_cpu: (_, &[DType]) = (Device::Cpu, &[DType::F32, DType::F16, DType::BF16]);
    let mut devices = vec![on_cpu];
    if cfg!(feature = "cuda") {
        match Device::new_cuda_with_stream(0) {
            Ok(device) => {
                let per_thread = Device::new_cuda(0)?;
                devices.extend([device, per_thread].map(|device| (device, &[DType::F16, DType::BF16][..])));
            }
            Err(error) => {
                let required = std::env::var("VARLEN_FA_TEST_REQUIRE").unwrap_or_default();
                assert!(!required.split(',').any(|name| name == "cuda"), "no CUDA device: {error}");
                println!("CUDA is skipped: {error}");
            }
        }
    }
    Ok(devices)
}

/// Runs a test with each element type of each device.
pub fn on_every_device(test: impl Fn(&Device, DType) -> Result<()>) -> Result<()> {
    for (device, dtypes) in devices()? {
        for &dtype in dtypes {
            println!("{:?}, {}", device.location(), dtype.as_str());
            test(&device, dtype)?;
        }
    }
    Ok(())
}

/// Made on the CPU: the same on every device.
pub fn random(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::randn(0_f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// The elements on the host.
pub fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()
}

pub fn expect_close(found: &Tensor, expected: &Tensor, tolerance: f32) -> Result<()> {
    assert_eq!(found.dims(), expected.dims());
    assert!(found.is_contiguous());
    for (at, (found, expected)) in values(found)?.iter().zip(&values(expected)?).enumerate() {
        // A NaN is not close.
        assert!((found - expected).abs() <= tolerance, "element {at}: {found}, expected {expected}");
    }
    Ok(())
}

/// On a GPU the weights have 16 bits too, and not the output alone.
pub fn tolerance(device: &Device, dtype: DType) -> f32 {
    let of_output = match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 2e-3,
        _ => 2e-2,
    };
    if device.is_cuda() { 2.0 * of_output } else { of_output }
}
