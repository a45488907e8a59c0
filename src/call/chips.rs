//! The constants of the cost model (`cost`): what a chip's launches, memory and tiles cost. Times are in nanoseconds, rates in
//! bytes a nanosecond.
//!
//! `cargo bench --bench calibrate` measures them on a GPU, and `benches/peers/fit_cost.py` fits them to the measurements of
//! `benches/peers/regret.py`.

use crate::kernel::Kernel;

/// What differs between chips.
#[derive(Debug, PartialEq)]
pub(crate) struct Chip {
    /// Major and minor. A chip that has no row takes the last one before it. (0, 0) is any GPU through wgpu, which does not tell.
    compute_capability: (i32, i32),
    /// Until the first block of an attention kernel works, and after its last.
    pub launch: f64,
    /// The same for kernels that work by tile lists: they read tensor maps and set up barriers before.
    pub lists_launch: f64,
    /// More for these where rows are packed already: no copy before covers their start.
    pub rows_launch: f64,
    /// The same for a kernel that copies rows.
    pub copy_launch: f64,
    /// Bytes that kernels which copy rows read and write.
    pub copy_rate: f64,
    /// The same for attention.
    pub memory_rate: f64,
    /// A warp's write of zeros, 16 bytes a lane.
    pub zero_piece: f64,
    /// A warp's search for a row that it writes as zeros, where no list has them.
    pub zero_row: f64,
    /// A warp's search for 64 rows of one head that no group covers.
    pub zero_span: f64,
    /// Bytes of zeros that a scatter writes.
    pub scatter_rate: f64,
    /// A row of one head that a block of a kernel that reads single rows writes as zeros before it computes, and one of a block that
    /// does nothing else.
    pub zero_beside: f64,
    pub zero_alone: f64,
    /// Times of blocks whose tiles are wider than the heads, over those of heads as wide as the tiles.
    pub narrow: f64,
    /// More for a query tile that heads share.
    pub shared_heads: f64,
    /// More for a query tile of packed rows whose keys are those of other tokens, of kernels that work by tile lists.
    pub cross_rows: f64,
    /// The part of the time of keys that warps without a query save the others of their block: of kernels that read single rows,
    /// and of warpgroups of those that work by tile lists.
    pub rows_idle: f64,
    pub lists_idle: f64,
    /// How much longer another choice must take than one that packs, so that packing is taken.
    pub packed_lead: f64,
    /// Times of blocks over those of the table below: of the sm80 kernel, and of kernels that work by tile lists.
    rows_time: f64,
    lists_time: f64,
    /// Where the row comes from.
    source: &'static str,
}

/// By rising compute capability.
///
/// Where the row says "data sheet", nobody has measured: rates are 80 % of the memory's, and the times of blocks are those of the
/// H100 times the ratio of the dense bf16 products of a multiprocessor, of which the sm80 kernel reaches 2.7 TFLOP/s on the H100
/// and 65 to 80 % on older chips.
const CHIPS: &[Chip] = &[
    Chip {
        compute_capability: (8, 0),
        launch: 3000.0,
        lists_launch: 4700.0,
        rows_launch: 400.0,
        copy_launch: 2500.0,
        copy_rate: 1.6e3,
        memory_rate: 1.6e3,
        zero_piece: 18.0,
        zero_row: 100.0,
        zero_span: 290.0,
        scatter_rate: 1.35e3,
        zero_beside: 12.0,
        zero_alone: 25.0,
        narrow: 1.06,
        shared_heads: 220.0,
        cross_rows: 330.0,
        rows_idle: 0.15,
        lists_idle: 0.34,
        packed_lead: 1.02,
        rows_time: 1.33,
        lists_time: 1.0,
        source: "data sheet of the A100 80GB: 312 TFLOP/s, 108 multiprocessors, 2.0 TB/s",
    },
    Chip {
        compute_capability: (8, 6),
        launch: 3000.0,
        lists_launch: 4700.0,
        rows_launch: 400.0,
        copy_launch: 2500.0,
        copy_rate: 0.75e3,
        memory_rate: 0.75e3,
        zero_piece: 18.0,
        zero_row: 100.0,
        zero_span: 290.0,
        scatter_rate: 0.63e3,
        zero_beside: 12.0,
        zero_alone: 25.0,
        narrow: 1.06,
        shared_heads: 220.0,
        cross_rows: 330.0,
        rows_idle: 0.15,
        lists_idle: 0.34,
        packed_lead: 1.02,
        rows_time: 3.8,
        lists_time: 1.0,
        source: "data sheet of the RTX 3090: 71 TFLOP/s, 82 multiprocessors, 0.94 TB/s",
    },
    Chip {
        compute_capability: (8, 9),
        launch: 3000.0,
        lists_launch: 4700.0,
        rows_launch: 400.0,
        copy_launch: 2500.0,
        copy_rate: 0.8e3,
        memory_rate: 0.8e3,
        zero_piece: 18.0,
        zero_row: 100.0,
        zero_span: 290.0,
        scatter_rate: 0.68e3,
        zero_beside: 12.0,
        zero_alone: 25.0,
        narrow: 1.06,
        shared_heads: 220.0,
        cross_rows: 330.0,
        rows_idle: 0.15,
        lists_idle: 0.34,
        packed_lead: 1.02,
        rows_time: 2.6,
        lists_time: 1.0,
        source: "data sheet of the RTX 4090: 165 TFLOP/s, 128 multiprocessors, 1.0 TB/s",
    },
    Chip {
        compute_capability: (9, 0),
        launch: 2223.1,
        lists_launch: 4219.1,
        rows_launch: 420.9,
        copy_launch: 1175.8,
        copy_rate: 4271.0,
        memory_rate: 4461.1,
        zero_piece: 12.6,
        zero_row: 96.7,
        zero_span: 317.8,
        scatter_rate: 3667.7,
        zero_beside: 16.1,
        zero_alone: 22.9,
        narrow: 1.051,
        shared_heads: 184.7,
        cross_rows: 445.8,
        rows_idle: 0.235,
        lists_idle: 0.342,
        packed_lead: 1.020,
        rows_time: 1.0,
        lists_time: 1.0,
        source: "fitted on an H200 to 1990 random calls (`regret.py`, seeds 32 to 37 and 40 to 43) and 400 on packed rows (seeds 50, 51), \
                 then from there to 1510 (seeds 70 to 77)",
    },
    Chip {
        compute_capability: (10, 0),
        launch: 2500.0,
        lists_launch: 4700.0,
        rows_launch: 400.0,
        copy_launch: 2000.0,
        copy_rate: 6.4e3,
        memory_rate: 6.4e3,
        zero_piece: 18.0,
        zero_row: 100.0,
        zero_span: 290.0,
        scatter_rate: 5.40e3,
        zero_beside: 12.0,
        zero_alone: 25.0,
        narrow: 1.06,
        shared_heads: 220.0,
        cross_rows: 330.0,
        rows_idle: 0.15,
        lists_idle: 0.0,
        packed_lead: 1.02,
        rows_time: 1.0,
        lists_time: 1.0,
        source: "data sheet of the B200: 2250 TFLOP/s, 148 multiprocessors, 8.0 TB/s; mma.sync as on the H100",
    },
    Chip {
        compute_capability: (12, 0),
        launch: 3000.0,
        lists_launch: 4700.0,
        rows_launch: 400.0,
        copy_launch: 2500.0,
        copy_rate: 1.4e3,
        memory_rate: 1.4e3,
        zero_piece: 18.0,
        zero_row: 100.0,
        zero_span: 290.0,
        scatter_rate: 1.18e3,
        zero_beside: 12.0,
        zero_alone: 25.0,
        narrow: 1.06,
        shared_heads: 220.0,
        cross_rows: 330.0,
        rows_idle: 0.15,
        lists_idle: 0.34,
        packed_lead: 1.02,
        rows_time: 2.7,
        lists_time: 1.0,
        source: "data sheet of the RTX 5090: 210 TFLOP/s, 170 multiprocessors, 1.8 TB/s",
    },
];

/// A GPU through wgpu, whatever it is. Copies are those of a desktop's card: faster memory than a GPU has would have it pack in
/// vain, and costs an H200 nothing of note.
const ADAPTER: Chip = Chip {
    compute_capability: (0, 0),
    launch: 15962.5,
    lists_launch: 15962.5,
    rows_launch: 0.0,
    copy_launch: 982.6,
    copy_rate: 1000.0,
    memory_rate: 1881.0,
    zero_piece: 24.2,
    zero_row: 100.0,
    zero_span: 1.0,
    scatter_rate: 1000.0,
    zero_beside: 24.2,
    zero_alone: 24.2,
    narrow: 1.0,
    shared_heads: 0.0,
    cross_rows: 0.0,
    rows_idle: 0.0,
    lists_idle: 0.0,
    packed_lead: 1.0,
    rows_time: 1.0,
    lists_time: 1.0,
    source: "fitted to 35 random calls in f32 (`cargo bench --bench regret`, seed 2) on an H200's Vulkan, but for the copies",
};

impl Chip {
    /// The row of every GPU through wgpu.
    pub fn of_adapter() -> &'static Self {
        &ADAPTER
    }

    /// The row of a chip, if it is not older than the first.
    pub fn of(compute_capability: (i32, i32)) -> Option<&'static Self> {
        CHIPS.iter().rev().find(|chip| chip.compute_capability <= compute_capability)
    }

    /// The costs of a kernel's tiles of a width and so many keys on this chip.
    pub fn tile_cost(&self, kernel: Kernel, width: usize, keys: usize) -> Option<TileCost> {
        let time = if kernel.works_by_tile_lists() { self.lists_time } else { self.rows_time };
        let (.., found) = TILE_COSTS.iter().find(|&&(of, at, step, _)| (of, at, step) == (kernel, width, keys))?;
        Some(TileCost {
            item: found.item * time,
            listed: found.listed * time,
            scattered: found.scattered * time,
            step: found.step * time,
            masked: found.masked * time,
            dropped: found.dropped * time,
            spared: found.spared * time,
            alone: found.alone,
        })
    }
}

/// What a block of a kernel takes, where as many blocks share a multiprocessor as fit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TileCost {
    /// Start and end of a query tile.
    pub item: f64,
    /// More for a query tile of the fused path, where the kernel reads tile lists.
    pub listed: f64,
    /// More for a query tile of packed rows that the kernel scatters itself.
    pub scattered: f64,
    /// A tile of keys in one piece.
    pub step: f64,
    /// A tile of keys that is made of groups, or that sm80 gathers row by row.
    pub masked: f64,
    /// Each dropped key in a tile that is made of groups.
    pub dropped: f64,
    /// Less for each key that the first tile of a query tile has fewer than the others.
    pub spared: f64,
    /// The time of a lone block of a multiprocessor over that of one that shares it with as many as fit.
    pub alone: f64,
}

/// `TileCost`, in the order of its fields.
const fn tile([item, listed, scattered, step, masked, dropped, spared, alone]: [f64; 8]) -> TileCost {
    TileCost { item, listed, scattered, step, masked, dropped, spared, alone }
}

/// Kernel, width and keys of its tiles, and their costs. Those of sm80 and sm90, and that of WGSL were fitted on an H200, the latter as if one
/// workgroup had a multiprocessor. Those of sm100 are from the B200's data sheet, at 60 % of its products.
const TILE_COSTS: &[(Kernel, usize, usize, TileCost)] = &[
    (Kernel::CudaSm80, 32, 128, tile([2000.0, 0.0, 0.0, 2500.0, 2600.0, 0.00, 15.0, 0.63])),
    (Kernel::CudaSm80, 64, 64, tile([3483.9, 0.0, 0.0, 2587.1, 2770.6, 0.00, 2.8, 0.55])),
    (Kernel::CudaSm80, 96, 64, tile([3991.5, 0.0, 0.0, 2307.9, 2343.5, 0.00, 9.3, 0.67])),
    (Kernel::CudaSm80, 128, 64, tile([4286.7, 0.0, 0.0, 3029.7, 2968.6, 0.00, 4.3, 0.67])),
    (Kernel::CudaSm80, 192, 32, tile([3590.7, 0.0, 0.0, 1607.2, 1662.1, 0.00, 9.5, 1.00])),
    (Kernel::CudaSm80, 256, 32, tile([4192.9, 0.0, 0.0, 1961.7, 1981.3, 0.00, 7.6, 0.66])),
    (Kernel::CudaSm90, 64, 128, tile([1413.4, 486.3, 1087.2, 1389.9, 1835.6, 1.01, 0.8, 1.00])),
    (Kernel::CudaSm90, 64, 64, tile([1475.1, 297.6, 419.1, 807.1, 1330.8, 0.99, 1.7, 1.00])),
    (Kernel::CudaSm90, 96, 112, tile([2653.1, 43.1, 1098.3, 1552.9, 2317.4, 4.80, 6.1, 1.00])),
    (Kernel::CudaSm90, 96, 64, tile([2359.1, 63.8, 437.2, 1107.3, 1724.1, 0.69, 12.8, 1.00])),
    (Kernel::CudaSm90, 128, 160, tile([1618.4, 303.9, 964.6, 1814.6, 2271.4, 2.63, 7.2, 1.00])),
    (Kernel::CudaSm90, 128, 128, tile([1505.6, 555.3, 1033.3, 1464.9, 1907.4, 2.72, 8.8, 1.00])),
    (Kernel::CudaSm90, 128, 64, tile([1583.8, 78.7, 412.7, 820.1, 1339.5, 1.46, 8.5, 1.00])),
    (Kernel::CudaSm90, 192, 112, tile([2823.5, 584.0, 1430.0, 1730.1, 2303.8, 3.07, 8.0, 1.00])),
    (Kernel::CudaSm90, 192, 80, tile([2375.4, 142.7, 577.3, 1323.5, 1777.9, 7.75, 15.3, 1.00])),
    (Kernel::CudaSm90, 192, 64, tile([1708.4, 147.5, 785.6, 1288.7, 1764.0, 7.44, 12.5, 1.00])),
    (Kernel::CudaSm90, 256, 80, tile([3545.7, 1335.9, 2922.2, 1700.6, 2035.5, 12.13, 14.6, 1.00])),
    (Kernel::CudaSm90, 256, 48, tile([2377.3, 311.6, 525.0, 1203.4, 1564.3, 15.87, 20.0, 1.00])),
    (Kernel::CudaSm100, 64, 128, tile([3500.0, 500.0, 0.0, 1200.0, 1450.0, 4.00, 0.0, 1.00])),
    (Kernel::CudaSm100, 96, 128, tile([3500.0, 500.0, 0.0, 1500.0, 1800.0, 4.00, 0.0, 1.00])),
    (Kernel::CudaSm100, 128, 128, tile([3500.0, 500.0, 0.0, 1850.0, 2200.0, 4.00, 0.0, 1.00])),
    (Kernel::WgslPortable, 64, 64, tile([432.6, 0.0, 0.0, 4547.0, 4718.4, 0.00, 0.0, 1.00])),
    (Kernel::WgslPortable, 128, 64, tile([2563.9, 0.0, 0.0, 8161.7, 8455.0, 0.00, 0.0, 1.00])),
    (Kernel::WgslPortable, 256, 64, tile([1431.9, 0.0, 0.0, 10074.7, 10099.2, 0.00, 0.0, 1.00])),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chip_without_a_row_takes_the_one_before_it() {
        let found = |capability| Chip::of(capability).map(|chip| chip.compute_capability);
        assert_eq!(found((7, 5)), None);
        for (capability, expected) in [((8, 0), (8, 0)), ((8, 7), (8, 6)), ((9, 0), (9, 0)), ((10, 3), (10, 0))] {
            assert_eq!(found(capability), Some(expected));
        }
        assert_eq!(found((12, 1)), Some((12, 0)));
        assert!(CHIPS.is_sorted_by_key(|chip| chip.compute_capability));
    }

    #[test]
    fn every_row_has_sensible_constants_and_says_where_they_come_from() {
        for chip in CHIPS {
            assert!(!chip.source.is_empty());
            let launches = [chip.launch, chip.lists_launch, chip.copy_launch];
            let rates =
                [chip.copy_rate, chip.memory_rate, chip.zero_piece, chip.zero_row, chip.zero_beside, chip.zero_alone];
            assert!(chip.zero_span > 0.0 && chip.scatter_rate > 0.0 && chip.shared_heads >= 0.0, "{chip:?}");
            assert!(chip.cross_rows >= 0.0, "{chip:?}");
            assert!([chip.narrow, chip.packed_lead].iter().all(|&ratio| (1.0..1.2).contains(&ratio)), "{chip:?}");
            assert!([chip.rows_idle, chip.lists_idle].iter().all(|&part| (0.0..1.0).contains(&part)), "{chip:?}");
            let times = launches.into_iter().chain(rates).chain([chip.rows_time, chip.lists_time]);
            assert!(times.into_iter().all(|time| time > 0.0), "{chip:?}");
        }
        for &(kernel, width, _, cost) in TILE_COSTS {
            assert!(cost.item > 0.0 && cost.step > 0.0 && cost.masked > 0.0, "{kernel} {width}: {cost:?}");
            assert!(cost.alone > 0.0 && cost.alone <= 1.0, "{kernel} {width}: {cost:?}");
            assert!(cost.spared >= 0.0 && cost.scattered >= 0.0, "{kernel} {width}: {cost:?}");
            let of_lists = [cost.listed, cost.dropped];
            let is_sensible = |&time: &f64| if kernel.works_by_tile_lists() { time >= 0.0 } else { time == 0.0 };
            assert!(of_lists.iter().all(is_sensible), "{kernel} {width}: {cost:?}");
        }
    }
}
