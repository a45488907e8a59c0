//! Layouts, from one library to the other.

/// Turns dimensions `[B, H, S, D]`, burn's order, into the library's `[B, S, H, D]`, and back. Packed rows, `[total, H, D]`, have
/// one order.
pub fn swap_heads<T>(dimensions: &mut [T]) {
    if let [_, heads, rows, _] = dimensions {
        std::mem::swap(heads, rows);
    }
}

/// A tensor's layout as the library has it, in elements.
pub fn of(
    shape: &[usize],
    strides: impl IntoIterator<Item = u64>,
    offset: u64,
) -> varlen_fa::Result<varlen_fa::Layout> {
    let (mut shape, mut strides) = (shape.to_vec(), Vec::from_iter(strides));
    // A dimension of one element may have any stride in burn.
    if let ([.., 1], [.., last]) = (&shape[..], &mut strides[..]) {
        *last = 1;
    }
    swap_heads(&mut shape);
    swap_heads(&mut strides);
    varlen_fa::Layout::strided(&shape, &strides, offset)
}

/// Strides, in burn's order, of an output of this shape: the rows of one token lie together, whichever head they are of.
pub fn token_major(shape: &[usize]) -> Vec<usize> {
    let mut lying = shape.to_vec();
    swap_heads(&mut lying);
    let mut strides = vec![1_usize; lying.len()];
    for at in (1..lying.len()).rev() {
        strides[at - 1] = strides[at].saturating_mul(lying[at]);
    }
    swap_heads(&mut strides);
    strides
}

/// Whether the elements of the last dimension lie one after the other.
pub fn has_contiguous_rows(shape: &[usize], strides: impl IntoIterator<Item = isize>) -> bool {
    let mut fits = true;
    let mut last = 1;
    for stride in strides {
        fits &= stride >= 0;
        last = stride;
    }
    fits && (last == 1 || shape.last() == Some(&1))
}
