//! What the tests share: the devices of this build, and an oracle in f64 that shares no code with the library or with burn.

use burn_tensor::{DType, Device, Tensor};

/// The devices that this build and this machine have, with their names.
pub fn devices() -> Vec<(&'static str, Device)> {
    let found: Vec<Option<(&'static str, Device)>> = Vec::from([
        #[cfg(feature = "flex")]
        Some(("flex", Device::flex())),
        #[cfg(feature = "wgpu")]
        opened_wgpu().map(|(device, _)| ("wgpu", device.clone())),
    ]);
    found.into_iter().flatten().collect()
}

/// The wgpu device, the same for all tests, and what it is made of; nothing where there is none, with the reason printed.
#[cfg(feature = "wgpu")]
pub fn opened_wgpu() -> Option<&'static (Device, burn_tensor::wgpu::WgpuSetup)> {
    type Opened = Result<(Device, burn_tensor::wgpu::WgpuSetup), String>;
    static OPENED: std::sync::OnceLock<Opened> = std::sync::OnceLock::new();
    let opened = OPENED.get_or_init(|| {
        let (device, setup) = Device::wgpu_options().init_with_setup().map_err(|error| error.to_string())?;
        varlen_fa_burn::share_wgpu(&device, &setup.device, &setup.queue).map_err(|error| error.to_string())?;
        println!("wgpu: {:?}", setup.adapter.get_info());
        Ok((device, setup))
    });
    opened
        .as_ref()
        .map_err(|error| {
            let required = std::env::var("VARLEN_FA_TEST_REQUIRE").is_ok_and(|devices| devices.contains("wgpu"));
            assert!(!required, "VARLEN_FA_TEST_REQUIRE has wgpu, and there is none: {error}");
            println!("skipped on wgpu: {error}");
        })
        .ok()
}

/// Elements of `[B, H, S, D]`, row-major.
pub struct Values {
    pub shape: [usize; 4],
    pub values: Vec<f64>,
}

impl Values {
    pub fn of(tensor: &Tensor<4>) -> Self {
        let values = tensor.to_data().iter::<f64>().collect();
        Self { shape: tensor.dims(), values }
    }

    pub fn row(&self, b: usize, h: usize, s: usize) -> &[f64] {
        let [_, heads, rows, dim] = self.shape;
        let at = ((b * heads + h) * rows + s) * dim;
        &self.values[at..at + dim]
    }
}

/// Attention in f64: query `i` of batch row `b` attends to the keys `j` with `sees(b, i, j)`; no key gives zeros.
pub fn oracle(qkv: &[Tensor<4>; 3], scale: f64, sees: impl Fn(usize, usize, usize) -> bool) -> Values {
    let [q, k, v] = qkv.each_ref().map(Values::of);
    let ([batch, heads, queries, _], [_, kv_heads, keys, _]) = (q.shape, k.shape);
    let dim = v.shape[3];
    let mut values = Vec::with_capacity(batch * heads * queries * dim);
    for b in 0..batch {
        for h in 0..heads {
            let of = h / (heads / kv_heads);
            for i in 0..queries {
                let dot = |j| q.row(b, h, i).iter().zip(k.row(b, of, j)).map(|(q, k)| q * k).sum::<f64>() * scale;
                let scores: Vec<(usize, f64)> = (0..keys).filter(|&j| sees(b, i, j)).map(|j| (j, dot(j))).collect();
                let most = scores.iter().fold(f64::NEG_INFINITY, |most, &(_, score)| most.max(score));
                let sum: f64 = scores.iter().map(|&(_, score)| (score - most).exp()).sum();
                let mut row = vec![0.0; dim];
                for &(j, score) in &scores {
                    let weight = (score - most).exp() / sum;
                    row.iter_mut().zip(v.row(b, of, j)).for_each(|(out, v)| *out += weight * v);
                }
                values.extend(row);
            }
        }
    }
    Values { shape: [batch, heads, queries, dim], values }
}

/// Compares the rows that `counts` names.
pub fn expect_close(found: &Tensor<4>, expected: &Values, tolerance: f64, counts: impl Fn(usize, usize) -> bool) {
    let found = Values::of(found);
    assert_eq!(found.shape, expected.shape);
    let [batch, heads, rows, _] = found.shape;
    for b in 0..batch {
        for h in 0..heads {
            for s in (0..rows).filter(|&s| counts(b, s)) {
                for (found, expected) in found.row(b, h, s).iter().zip(expected.row(b, h, s)) {
                    // A NaN is not close.
                    let near = (found - expected).abs() <= tolerance;
                    assert!(near, "batch row {b}, head {h}, token {s}: {found}, expected {expected}");
                }
            }
        }
    }
}

/// How near a result of elements of this type is, for values of the size of 1.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 2e-3,
        _ => 2e-2,
    }
}
