//! What holds on burn's wgpu runtime alone: order in its queue, memory that it uses again, devices and streams.

use burn_tensor::module::attention as burn_attention;
use burn_tensor::{Device, Tensor};
use varlen_fa_burn::varlen_fa::AttentionMask;
use varlen_fa_burn::{masked_attention, share_wgpu};

use crate::support::{Values, expect_close, opened_wgpu};
use crate::{message, random};

fn ours([q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    masked_attention(q, k, v, AttentionMask::none(), None).unwrap()
}

fn burns([q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    burn_attention(q, k, v, None, None, Default::default())
}

/// Steps that use the result of the step before, with nothing read in between: burn has its kernels before and after each call
/// recorded and not submitted, and gives memory back that the next step gets.
fn steps(x: &Tensor<4>, attend: fn([Tensor<4>; 3]) -> Tensor<4>) -> Tensor<4> {
    (0..20).fold(x.clone(), |x, step| {
        let [q, k] = [0.5, 0.25].map(|factor| (x.clone() * factor).tanh() + step as f32 * 0.01);
        let v = x.clone().sin();
        (attend([q, k, v]) + x) * 0.75
    })
}

#[test]
fn calls_and_burns_kernels_run_in_order() {
    let Some((device, _)) = opened_wgpu() else { return };
    let x = random([2, 3, 50, 32], device);
    let expected = Values::of(&steps(&x, burns));
    for _ in 0..3 {
        expect_close(&steps(&x, ours), &expected, 1e-4, |_, _| true);
    }
}

#[test]
fn tensors_of_other_threads() {
    let Some((device, _)) = opened_wgpu() else { return };
    // Each thread has a stream of its own in burn.
    let made = |seed: f32| {
        let device = device.clone();
        std::thread::spawn(move || random([2, 3, 50, 32], &device) * seed + 0.5).join().unwrap()
    };
    for _ in 0..10 {
        let qkv = [made(1.0), made(0.5), made(2.0)];
        let found = ours(qkv.clone());
        // A clone is kept: burn 0.22 itself reads too early what another thread computes in place.
        let kept = found.clone();
        let found = std::thread::spawn(move || found.tanh()).join().unwrap();
        expect_close(&found, &Values::of(&burns(qkv).tanh()), 2e-5, |_, _| true);
        drop(kept);
    }
}

#[test]
fn a_device_must_be_shared_first() {
    let Some((device, setup)) = opened_wgpu() else { return };
    // The same handles are another device to burn.
    let other = Device::wgpu_options().setup(setup.clone()).init().unwrap();
    assert_ne!(&other, device);
    let call = || {
        let [q, k, v] = [(); 3].map(|()| random([1, 2, 8, 16], &other));
        masked_attention(q, k, v, AttentionMask::none(), None)
    };
    let refused = message(call());
    assert!(refused.contains("`q`: expected a tensor on a device that share_wgpu was told of"), "{refused}");
    for _ in 0..2 {
        share_wgpu(&other, &setup.device, &setup.queue).unwrap();
        assert_eq!(call().unwrap().dims(), [1, 2, 8, 16]);
    }
    let [q, k] = [device, &other].map(|device| random([1, 2, 8, 16], device));
    let refused = message(masked_attention(q.clone(), k, q, AttentionMask::none(), None));
    assert!(refused.contains("`k`: expected a tensor on"), "{refused}");
}

#[cfg(feature = "flex")]
#[test]
fn tensors_of_two_backends_are_refused() {
    let Some((device, setup)) = opened_wgpu() else { return };
    let [here, there] = [&Device::flex(), device].map(|device| random([1, 2, 8, 16], device));
    for (q, k) in [(here.clone(), there.clone()), (there, here)] {
        let message = message(masked_attention(q.clone(), k, q, AttentionMask::none(), None));
        assert!(message.contains("`k`: expected a float tensor"), "{message}");
    }
    let refused = share_wgpu(&Device::flex(), &setup.device, &setup.queue).unwrap_err().to_string();
    assert!(refused.contains("`device`: expected a device of burn's wgpu runtime"), "{refused}");
}
