//! The CPU device's threads: one, two, and those of an application's pool, each through the trials of
//! every path. Processes that fork, and those that cannot start threads, are tested from C.

use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::{Result, ensure};
use varlen_fa::rayon::{ThreadPool, ThreadPoolBuilder};
use varlen_fa::{AttentionMask, Config, Device, DeviceChoice, MaskedAttention, Tensor};

use super::trials::{Register, Trials};
use super::{dense, masks, packed};

/// Dense, fused and packed.
const OF_EACH_NUMBER: &[Register] = &[dense::register, packed::register, masks::register];

pub fn register(trials: &mut Trials) {
    let devices = [
        ("threads-1", open(1)),
        ("threads-2", open(2)),
        ("application-pool", pool(3).and_then(|pool| Ok(Device::from_thread_pool(pool, Config::default())?))),
    ];
    for (label, device) in devices {
        match device {
            Ok(device) => trials.add_on(label, device, OF_EACH_NUMBER),
            Err(error) => trials.once_with(label, move |_| Err::<(), _>(error)),
        }
    }
    trials.once("threads/numbers", numbers);
    trials.once("threads/application_pool_is_used", application_pool_is_used);
}

fn open(threads: usize) -> Result<Device> {
    let config = Config::default().with_device(DeviceChoice::Cpu).with_threads(NonZeroUsize::new(threads));
    Ok(Device::with_config(config)?)
}

fn pool(threads: usize) -> Result<Arc<ThreadPool>> {
    Ok(Arc::new(ThreadPoolBuilder::new().num_threads(threads).build()?))
}

/// What is asked for is what the device has, up to the limit.
fn numbers(_: &Device) -> Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let limit = Config::MAX_THREADS.max(processors);
    for (asked, expected) in [(1, 1), (2, 2), (7, 7), (limit, limit), (limit + 1, limit), (usize::MAX, limit)] {
        let device = open(asked)?;
        let adapter = &device.capabilities().adapter;
        ensure!(adapter.starts_with(&format!("{expected} threads, ")), "{asked} threads were asked for: {adapter}");
    }
    let unset = open(0)?;
    let adapter = &unset.capabilities().adapter;
    ensure!(adapter.starts_with(&format!("{processors} threads, ")), "none were asked for: {adapter}");
    Ok(())
}

/// A call that is worth threads waits for those of the pool: it does not end while all are kept busy.
fn application_pool_is_used(_: &Device) -> Result<()> {
    let pool = pool(2)?;
    let device = Device::from_thread_pool(Arc::clone(&pool), Config::default())?;
    let values: Vec<f32> = (0..512 * 4 * 64).map(|at: usize| (at * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
    let x = Tensor::from_slice(&device, &values, &[1, 512, 4, 64])?;
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let (is_held, both) = std::sync::mpsc::channel();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let occupied = scope.spawn(|| {
            pool.broadcast(|_| {
                // Both workers wait here, one of them for the lock.
                let _ = is_held.clone().send(());
                let _ = held.lock().map(|held| held.recv());
            });
        });
        both.recv()?;
        both.recv()?;
        let call = scope.spawn(|| {
            let attended = MaskedAttention::new(&device).forward(&x, &x, &x, AttentionMask::none());
            is_over.store(true, std::sync::atomic::Ordering::SeqCst);
            attended.map(|_| ())
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        let was_over = is_over.load(std::sync::atomic::Ordering::SeqCst);
        drop(release);
        ensure!(occupied.join().is_ok(), "the pool's workers ended");
        call.join().map_err(|_| anyhow::anyhow!("the call panicked"))??;
        ensure!(!was_over, "the call did not use the pool");
        Ok(())
    })
}
