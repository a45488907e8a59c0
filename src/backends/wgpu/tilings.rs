//! The tiles of attention, as the cost model sees them.

use crate::call::cost::Tiling;
use crate::kernel::Kernel;

use super::shader::Algorithm;

/// Head dimensions that the model has costs of. Kernels are compiled for each.
const WIDTHS: [usize; 3] = [64, 128, 256];

/// Those of the kernel that the model knows. Of `wgsl-coop` the fused path was within 6 % of the best one on every call that was
/// measured, so nothing is estimated there.
pub(super) fn tilings() -> impl Iterator<Item = Tiling> {
    WIDTHS.into_iter().map(|width| Tiling {
        kernel: Kernel::WgslPortable,
        width,
        rows: Algorithm::Portable.tile_rows(width),
        keys: Algorithm::Portable.step_keys(),
        blocks: 1,
        splits: false,
        max_heads: usize::MAX,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::cost::Machine;
    use crate::call::cost_cases::check;
    use crate::error::Result;

    #[test]
    fn the_script_that_fits_the_constants_has_the_same_formulas() -> Result<()> {
        check(&Machine::of_adapter(tilings()), &[Kernel::WgslPortable])
    }
}
