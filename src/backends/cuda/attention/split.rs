//! How query tiles are shared out among blocks when the last of them would leave multiprocessors
//! idle.

use crate::backends::cuda::kernels::tiles::ListTile;
use crate::call::cost::{MAX_PARTS, MIN_PART_STEPS};

/// Query tiles of a launch, the last of which may be split: several blocks share the keys of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// The first that is split.
    pub from: usize,
    /// Parts of each of those.
    pub parts: usize,
    /// Query tiles in all.
    pub items: usize,
}

/// Cycles that parts cost beside their own work; fitted when each launch had its counts of parts zeroed before it.
const LAUNCH_CYCLES: usize = 3500;

impl Split {
    /// Splits the last, incomplete wave of query tiles into as many parts as take the least time.
    /// `fewest_steps` is the number of key tiles of the query tile with the fewest, 0 if it is not
    /// known: then nothing is split.
    pub fn of(tile: ListTile, items: usize, fewest_steps: usize, blocks_at_once: usize) -> Self {
        // Narrow tiles have few steps.
        if tile.splitting_warpgroups.is_none() || tile.blocks > 1 {
            return Self::none(items);
        }
        let tail = items % blocks_at_once;
        let cycles = |parts: usize| {
            if parts == 1 {
                return item_cycles(fewest_steps);
            }
            let rounds = (tail * parts).div_ceil(blocks_at_once);
            // All of a query tile are read by one block.
            LAUNCH_CYCLES + rounds * part_cycles(fewest_steps, parts) + parts * 2500
        };
        let most = if tail == 0 { 1 } else { (fewest_steps / MIN_PART_STEPS).clamp(1, MAX_PARTS) };
        match (1..=most).min_by_key(|&parts| cycles(parts)) {
            None | Some(1) => Self::none(items),
            Some(parts) => Self { from: items - tail, parts, items },
        }
    }

    /// Splits nothing.
    pub const fn none(items: usize) -> Self {
        // The kernel counts items in an i32.
        Self { from: i32::MAX as usize, parts: 1, items }
    }

    /// Query tiles that are split.
    pub const fn split_items(&self) -> usize {
        self.items.saturating_sub(self.from)
    }

    /// Parts of all split query tiles.
    pub const fn part_items(&self) -> usize {
        self.split_items() * self.parts
    }

    /// Work items of the launch: whole query tiles and parts.
    pub const fn work_items(&self) -> usize {
        self.items - self.split_items() + self.part_items()
    }
}

/// An estimate of the cycles of a query tile, fitted to measurements at head dimension 128 on an
/// H100: a step for each key tile, and its start and end.
pub const fn item_cycles(steps: usize) -> usize {
    steps * STEP_CYCLES + ITEM_CYCLES
}

/// Of each key tile.
pub const STEP_CYCLES: usize = 3300;
/// Of the start and the end.
pub const ITEM_CYCLES: usize = 7000;

/// The same of one of the parts of a query tile, which are computed by the exact softmax, in order;
/// each is written.
pub const fn part_cycles(steps: usize, parts: usize) -> usize {
    item_cycles(steps.div_ceil(parts)) * 9 / 8 + 5000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Result};
    use crate::kernel::Kernel;

    fn tile(kernel: Kernel) -> Result<ListTile> {
        ListTile::of(kernel, 128).ok_or(Error::HeadDim { got: 128 })
    }

    #[test]
    fn a_last_wave_that_leaves_multiprocessors_idle_is_split() -> Result<()> {
        let tile = tile(Kernel::CudaSm90)?;
        let split = |items, fewest_steps| Split::of(tile, items, fewest_steps, 132);
        // Twelve query tiles after nine waves.
        let last = split(1200, 20);
        assert_eq!((last.from, last.items, last.split_items()), (1188, 1200, 12));
        assert!((2..=MAX_PARTS).contains(&last.parts) && last.part_items() <= 132, "{last:?}");
        assert_eq!(last.work_items(), 1188 + 12 * last.parts);
        let few = split(3, 100);
        assert_eq!((few.from, few.parts, few.part_items(), few.work_items()), (0, MAX_PARTS, 24, 24));
        // Whole waves; nearly whole ones; too few keys; keys that the host does not know; nothing.
        for (items, steps) in [(792, 26), (131, 100), (12, 3), (12, 0), (0, 0)] {
            assert_eq!(split(items, steps), Split::none(items), "{items} items of {steps} key tiles");
            assert_eq!((split(items, steps).part_items(), split(items, steps).work_items()), (0, items));
        }
        Ok(())
    }

    #[test]
    fn kernels_that_cannot_add_up_parts_and_narrow_tiles_split_nothing() -> Result<()> {
        assert_eq!(Split::of(tile(Kernel::CudaSm100)?, 3, 100, 132), Split::none(3));
        let wide = ListTile::of(Kernel::CudaSm90, 64).ok_or(Error::HeadDim { got: 64 })?;
        let narrow = wide.narrow(64).ok_or(Error::HeadDim { got: 64 })?;
        assert_eq!(Split::of(narrow, 3, 100, 396), Split::none(3));
        assert_ne!(Split::of(wide, 3, 100, 132), Split::none(3));
        Ok(())
    }
}
