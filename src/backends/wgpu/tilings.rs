//! The tiles of the attention kernels, as the cost model sees them.

use crate::call::cost::Tiling;
use crate::kernel::Kernel;

use super::coop::Coop;
use super::shader::Algorithm;

/// Head dimensions that the model has costs of. Kernels are compiled for each.
const WIDTHS: [usize; 5] = [64, 96, 128, 192, 256];

/// Those of every kernel of a device with such cooperative matrices, or none.
pub(super) fn tilings(coop: Option<Coop>) -> impl Iterator<Item = Tiling> {
    WIDTHS.into_iter().flat_map(move |width| {
        let coop = coop.map(|coop| (Kernel::WgslCoop, Algorithm::Coop(coop.tile(width))));
        let of = move |(kernel, algorithm): (Kernel, Algorithm)| Tiling {
            kernel,
            width,
            rows: algorithm.tile_rows(width),
            keys: algorithm.step_keys(),
            blocks: 1,
            splits: false,
            max_heads: usize::MAX,
        };
        coop.into_iter().chain([(Kernel::WgslPortable, Algorithm::Portable)]).map(of)
    })
}
