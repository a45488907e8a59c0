//! The cost model's formulas for the tiles that the kernels have.

use crate::call::cost::Machine;
use crate::call::cost_cases::check;
use crate::error::Result;
use crate::kernel::Kernel;

use super::kernels::tiles::tilings;

#[test]
fn the_script_that_fits_the_constants_has_the_same_formulas() -> Result<()> {
    // What the blocks of a multiprocessor share on an H100.
    let Some(machine) = Machine::new((9, 0), 132, tilings(228 * 1024)) else { unreachable!("the H100 has a row") };
    check(&machine, &[Kernel::CudaSm80, Kernel::CudaSm90])
}
