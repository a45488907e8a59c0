//! What the host does in a call of sequence parallelism: time and allocations, with memory that is kept between calls and without, in
//! turns. Ranks are tiny, and the communicator costs nothing: it moves no bytes, so results mean nothing.
//!
//! ```text
//! cargo bench --bench parallel_host
//! ```

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use allocation_counter::AllocationInfo;
use anyhow::{Context, Result};
use varlen_fa::dist::{Communicator, Exchange, Heads, Mode, SequenceParallel, ShardedMeta, Shards};
use varlen_fa::{Config, DType, Device, DeviceChoice, KeyMask, Tensor};

/// Rank 0 of a world whose other ranks answer at once.
#[derive(Debug)]
struct Free {
    world: usize,
}

impl Communicator for Free {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        self.world
    }

    fn moves_memory_of(&self, _: &Device) -> bool {
        true
    }

    fn exchange(
        &mut self,
        _: Exchange<'_>,
        meanwhile: &mut dyn FnMut() -> varlen_fa::Result<()>,
    ) -> varlen_fa::Result<()> {
        meanwhile()
    }

    fn abort(&mut self, _: &str) {}

    fn all_gather_16(&mut self, _: &'static str, own: [u8; 16]) -> varlen_fa::Result<Vec<[u8; 16]>> {
        Ok(vec![own; self.world])
    }
}

/// Calls a timing.
const REPEATS: u32 = 200;
const ROUNDS: usize = 15;
const HEADS: Heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 8, dtype: DType::F32 };

fn main() -> Result<()> {
    let device = Device::with_config(Config::from_env_for(DeviceChoice::Cpu)?.with_threads(NonZeroUsize::new(1)))?;
    println!(
        "{}; the best of {ROUNDS} rounds of {REPEATS} calls, in turns; a call of 4 + 8 tokens",
        device.capabilities()
    );
    println!("ranks and mode              kept      anew   anew/kept   allocations: kept, anew");
    let rows = [(1, Mode::Gather), (2, Mode::Gather), (2, Mode::Ulysses), (2, Mode::Ring), (4, Mode::Ring)];
    for (world, mode) in rows {
        measure(&device, world, mode).with_context(|| format!("{world} ranks, {mode}"))?;
    }
    Ok(())
}

fn measure(device: &Device, world: usize, mode: Mode) -> Result<()> {
    let mut communicator = Free { world };
    let shards = Shards::equal(8 * world, world)?.with_prefix(4)?;
    // Masked tokens in the text and in each shard.
    let keep: Vec<bool> = (0..shards.seq()).map(|at| at % 4 != 3).collect();
    let meta = ShardedMeta::new(&KeyMask::from_bool(1, shards.seq(), &keep)?, &shards, 0)?;
    let parallel = SequenceParallel::new(device).with_mode(mode);
    let request = parallel.prepare(&mut communicator, &meta, &HEADS)?;
    let new = || Tensor::zeros(device, HEADS.dtype, &[1, shards.local_len(0), HEADS.num_heads, HEADS.head_dim]);
    let ([q, k, v], mut out) = ([new()?, new()?, new()?], new()?);
    let mut call = |is_kept: bool| -> Result<()> {
        if !is_kept {
            request.release_memory();
        }
        Ok(parallel.forward_into(&mut communicator, &request, &q, &k, &v, &mut out)?)
    };
    let mut best = [Duration::MAX; 2];
    for _ in 0..ROUNDS {
        for (best, is_kept) in best.iter_mut().zip([true, false]) {
            call(is_kept)?;
            let started = Instant::now();
            for _ in 0..REPEATS {
                call(is_kept)?;
            }
            *best = (*best).min(started.elapsed() / REPEATS);
        }
    }
    let mut allocations = [0; 2];
    for (count, is_kept) in allocations.iter_mut().zip([true, false]) {
        call(true)?;
        let mut done = Ok(());
        let AllocationInfo { count_total, .. } = allocation_counter::measure(|| done = call(is_kept));
        done?;
        *count = count_total;
    }
    let [kept, anew] = best.map(|time| 1e6 * time.as_secs_f64());
    let name = format!("{world}, {mode}");
    println!(
        "{name:<20} {kept:>8.2} µs {anew:>6.2} µs {:>11.2}   {:>17}, {}",
        anew / kept,
        allocations[0],
        allocations[1]
    );
    Ok(())
}
