//! Layouts of any shape and strides, and chains of views of them, against the list of their
//! elements' positions.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use varlen_fa::Layout;

#[derive(Debug, Arbitrary)]
struct Input {
    dims: Vec<(Number, Number)>,
    offset: Number,
    views: Vec<View>,
}

/// Small, so that elements can be listed; or as large as it gets.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Number {
    Small(u8),
    Any(u64),
}

#[derive(Debug, Arbitrary)]
enum View {
    Permute(Vec<u8>),
    Slice { dim: u8, start: u8, end: u8 },
}

impl Number {
    fn get(self) -> u64 {
        match self {
            Self::Small(value) => u64::from(value % 12),
            Self::Any(value) => value,
        }
    }
}

/// The most elements that are listed.
const MAX_LISTED: u128 = 4096;

fuzz_target!(|input: Input| run(&input));

fn run(input: &Input) {
    let shape: Vec<usize> = input.dims.iter().map(|(size, _)| size.get() as usize).collect();
    let strides: Vec<u64> = input.dims.iter().map(|(_, stride)| stride.get()).collect();
    if let Ok(contiguous) = Layout::contiguous(&shape) {
        check(&contiguous, contiguous.strides());
        assert!(contiguous.is_contiguous() && !contiguous.self_overlaps(), "{contiguous:?}");
    }
    let Ok(mut layout) = Layout::strided(&shape, &strides, input.offset.get()) else { return };
    check(&layout, &strides);
    for view in &input.views {
        let made = match view {
            View::Permute(order) => {
                let order: Vec<usize> = order.iter().map(|&dim| dim.into()).collect();
                let mut sorted = order.clone();
                sorted.sort_unstable();
                let permuted = layout.permute(&order);
                assert_eq!(permuted.is_ok(), sorted.iter().copied().eq(0..layout.rank()), "{order:?}: {permuted:?}");
                if let Ok(permuted) = &permuted {
                    let dims = |layout: &Layout, dim: usize| (layout.shape()[dim], layout.strides()[dim]);
                    assert!(order.iter().enumerate().all(|(to, &from)| dims(permuted, to) == dims(&layout, from)));
                    assert_eq!((permuted.numel(), permuted.end()), (layout.numel(), layout.end()));
                }
                permuted
            }
            &View::Slice { dim, start, end } => {
                let (dim, start, end) = (dim.into(), start.into(), end.into());
                let fits = layout.shape().get(dim).is_some_and(|&size| start <= end && end <= size);
                let sliced = layout.slice(dim, start..end);
                assert_eq!(sliced.is_ok(), fits, "{dim}, {start}..{end}: {sliced:?}");
                sliced
            }
        };
        let Ok(view) = made else { continue };
        assert!(view.numel() == 0 || (layout.offset() <= view.offset() && view.end() <= layout.end()));
        let strides = view.strides().to_vec();
        check(&view, &strides);
        layout = view;
    }
}

/// What a layout says of itself, against its elements one by one.
fn check(layout: &Layout, strides: &[u64]) {
    assert_eq!((layout.rank(), layout.strides()), (layout.shape().len(), strides));
    let numel = layout.shape().iter().fold(1_u128, |product, &size| product.saturating_mul(size as u128));
    assert_eq!(layout.numel() as u128, numel, "{layout:?}");
    if numel == 0 {
        assert!(layout.end() == layout.offset() && layout.is_contiguous() && !layout.self_overlaps(), "{layout:?}");
    }
    if numel > MAX_LISTED {
        return;
    }
    let mut positions: Vec<u64> = (0..numel as u64)
        .map(|index| {
            let mut rest = index;
            let mut position = layout.offset();
            for (&size, &stride) in layout.shape().iter().zip(layout.strides()).rev() {
                position += rest % size as u64 * stride;
                rest /= size as u64;
            }
            position
        })
        .collect();
    if let Some(&last) = positions.iter().max() {
        assert_eq!(layout.end(), last + 1, "{layout:?}");
    }
    let is_row_major = positions.iter().copied().eq(layout.offset()..layout.offset() + numel as u64);
    assert_eq!(layout.is_contiguous(), is_row_major, "{layout:?}");
    positions.sort_unstable();
    // The test is conservative: some layouts that do not overlap are reported as overlapping, never
    // the other way round.
    let overlaps = positions.windows(2).any(|pair| pair[0] == pair[1]);
    assert!(!overlaps || layout.self_overlaps(), "{layout:?}");
}
