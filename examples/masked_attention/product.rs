//! The matrix product of the examples, on every core of the host.

use rayon::prelude::*;

/// `y += x · w`: `x` is `[rows, inputs]`, `w` `[inputs, outputs]`, `y` `[rows, outputs]`, row-major.
pub fn add_product(y: &mut [f32], x: &[f32], w: &[f32], inputs: usize, outputs: usize) {
    let rows = x.len() / inputs;
    assert!(
        x.len() == rows * inputs && y.len() == rows * outputs && w.len() == inputs * outputs,
        "shapes of a product"
    );
    let rows_of_a_task = rows.div_ceil(rayon::current_num_threads());
    let tasks = y.par_chunks_mut(rows_of_a_task * outputs).zip(x.par_chunks(rows_of_a_task * inputs));
    tasks.for_each(|(y, x)| {
        let rows = x.len() / inputs;
        // SAFETY: by the assertion above the three slices hold exactly the matrices that their sizes and strides describe; slices
        // fit an isize, and `y` is borrowed for this task alone.
        unsafe {
            matrixmultiply::sgemm(
                rows,
                inputs,
                outputs,
                1.0,
                x.as_ptr(),
                inputs as isize,
                1,
                w.as_ptr(),
                outputs as isize,
                1,
                1.0,
                y.as_mut_ptr(),
                outputs as isize,
                1,
            );
        }
    });
}
