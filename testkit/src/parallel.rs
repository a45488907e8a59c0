//! Rows of an output computed on every core.

use std::sync::Mutex;
use std::thread;

/// Calls `compute(row, values)` once for each row of `row_len` values in `out`.
///
/// Rows are handed out one by one, so masked rows, which cost nothing, do not leave a thread idle.
pub(crate) fn fill_rows<T: Send>(out: &mut [T], row_len: usize, compute: impl Fn(usize, &mut [T]) + Sync) {
    if row_len == 0 {
        return;
    }
    let threads = thread::available_parallelism().map_or(1, |count| count.get());
    if threads == 1 {
        // In a browser there is no other to start.
        return out.chunks_mut(row_len).enumerate().for_each(|(row, values)| compute(row, values));
    }
    let rows = Mutex::new(out.chunks_mut(row_len).enumerate());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    // The lock lasts for this statement only. It cannot be poisoned: nothing under it panics.
                    let Some((row, values)) = rows.lock().ok().and_then(|mut rows| rows.next()) else {
                        return;
                    };
                    compute(row, values);
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::fill_rows;

    #[test]
    fn each_row_is_computed_once_in_its_place() {
        let mut out = vec![0usize; 7 * 3];
        fill_rows(&mut out, 3, |row, values| {
            for (column, value) in values.iter_mut().enumerate() {
                *value += 10 * row + column + 1;
            }
        });
        let expected: Vec<usize> = (0..7).flat_map(|row| (1..4).map(move |column| 10 * row + column)).collect();
        assert_eq!(out, expected);
    }

    #[test]
    fn nothing_to_fill_calls_nothing() {
        fill_rows(&mut [0u8; 4], 0, |_, _| unreachable!());
        fill_rows(&mut [0u8; 0], 4, |_, _| unreachable!());
    }
}
