//! What the page runs, outside of a browser: on the best wgpu adapter, software adapters included.
#![allow(clippy::panic, reason = "a test")]

use masked_attention_web::{Check, run, selftest};
use varlen_fa::{Config, Device, DeviceChoice, Error};

/// The device, or none where there is no adapter.
fn device() -> Option<Device> {
    match pollster::block_on(Device::with_config_async(Config::default().with_device(DeviceChoice::Wgpu))) {
        Ok(device) => Some(device),
        Err(Error::DeviceUnavailable { why, .. }) => {
            println!("skipped: {why}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn expect_all(checks: &[Check]) {
    let failed: Vec<_> = checks.iter().filter(|check| !check.ok).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn a_workload_is_right_in_every_element_type() {
    let Some(device) = device() else { return };
    for dtype in ["f32", "f16", "bf16"] {
        let workload = "joint:text=8:image=24:valid=3,8,0:heads=4:kv_heads=2:dim=32";
        let report = pollster::block_on(run(&device, workload, dtype)).unwrap();
        expect_all(&report.checks);
        assert_eq!((report.shape, report.valid, report.dtype), ([3, 32, 4, 32], 83, dtype));
        assert_eq!(report.runs[0], [[0, 3], [8, 32]]);
        assert!(report.magnitude[0][3..8].iter().all(|&value| value == 0.0) && report.magnitude[0][8] > 0.0);
    }
}

#[test]
fn what_is_not_understood_is_an_error() {
    let Some(device) = device() else { return };
    assert!(pollster::block_on(run(&device, "joint:text=8", "f32")).is_err());
    assert!(pollster::block_on(run(&device, "joint-small", "f64")).is_err());
}

#[test]
fn the_self_test_passes() {
    if device().is_some() {
        expect_all(&pollster::block_on(selftest()).unwrap());
    }
}
