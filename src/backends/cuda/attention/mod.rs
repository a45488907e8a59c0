//! Attention calls: which launch they go to.
//!
//! | module | what it holds |
//! |---|---|
//! | `call` | what the launches of every kernel share |
//! | `packing` | packed copies of padded tensors, for the packed path |
//! | `sm80` | launches of the sm80 kernel, which reads single rows |
//! | `by_tile_lists` | launches of the sm90 and sm100 kernels, which read padded tensors by tile lists |
//! | `tile_lists` | how tile lists are made from metadata |
//! | `device_lists` | how the device makes them where it alone knows the mask |
//! | `dense_metas` | metadata that stands for the masks of dense calls |
//! | `range_tiles` | which key tiles calls with key ranges need, and how their work is dealt out |
//! | `device_work` | how the device does both where it alone knows the mask |
//! | `split` | how query tiles are shared out among blocks |
//! | `fifo_cache` | the cache that tile lists are kept in |

mod by_tile_lists;
mod call;
mod dense_metas;
mod device_lists;
mod device_work;
mod packing;
mod range_tiles;
mod sm80;
mod split;
mod tile_lists;

use crate::backends::cuda::driver::count;
use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::launcher::Launcher;
use crate::backends::cuda::tensors::key_ranges::PlacedRanges;
use crate::backends::cuda::tensors::lse::PlacedLse;
use crate::backends::cuda::tensors::metadata::{self, Tables};
use crate::backends::cuda::tensors::placement::{Operand, place_input, place_input_for_maps};
use crate::backends::cuda::tensors::segments::{Pieces, Segments};
use crate::backends::rows::with_filled_heads;
use crate::call::op::{Arrivals, Attention, DeviceTables, Rows};
use crate::call::path::Path;
use crate::call::problem::{AttentionProblem, AttentionShape};
use crate::call::segments::{Cuts, Role, Segmented};
use crate::error::Result;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::meta::VarlenMeta;

use by_tile_lists::Placement;
use call::{PackedRows, SegmentedTensors, Tensors};
use device_lists::DeviceLists;
use packing::Packing;

/// Launches a call.
pub fn attend(launcher: &Launcher, attention: Attention<'_>) -> Result<()> {
    // Tensors keep their layouts: placing them says which are copied.
    let filled = with_filled_heads(attention.problem);
    let copies_heads = attention.problem.shape.head_dim != filled.shape.head_dim;
    let attention = &attention.on(&filled);
    let fuses_segments = attention.problem.cuts != Cuts::None && !attention.plan.copies_segments;
    if let Some(arrivals) = attention.arrivals.filter(|_| copies_heads || !fuses_segments) {
        // What copies tensors, or reads them by another kernel, comes after all of them.
        wait_for_all(launcher, arrivals, attention.problem)?;
    }
    match &attention.rows {
        Rows::Varlen { query, key } if fuses_segments => {
            let run = |tensors: Placement<'_>| by_tile_lists::fused(launcher, attention, tensors, query, key);
            return fused_segments(launcher, attention, run);
        }
        Rows::DeviceVarlen { query, key } if fuses_segments => {
            let run =
                |tensors: Placement<'_>| by_tile_lists::fused_with_tables(launcher, attention, tensors, query, key);
            return fused_segments(launcher, attention, run);
        }
        _ => {}
    }
    // Lives until the last launch, which keeps its memory.
    let mut scratch = Vec::new();
    let tensors = place(launcher, attention, &mut scratch)?;
    launch(launcher, attention, tensors)?;
    Segments::output(launcher, Role::Out, &attention.out)?.finish_output(launcher, &tensors.out)
}

/// Later work comes after the last of the keys and values that arrive.
fn wait_for_all(
    launcher: &Launcher,
    Arrivals { count, before }: Arrivals<'_>,
    problem: &AttentionProblem,
) -> Result<()> {
    let AttentionShape { batch, num_kv_heads, .. } = problem.shape;
    // The number counts modulo 2^32, as the sum does.
    let last = before.wrapping_add((batch * num_kv_heads) as u32);
    let count = launcher.source(count)?;
    // SAFETY: a `u32` of this device's memory, which what is under way sets (`Arrivals`). Copies of later calls come after this
    // stream's work so far (`Lane::mark`), and with them the next numbers.
    unsafe { count::wait(&launcher.context, count.address(), last) }
}

/// A fused call on segments, where they lie: `run` launches it.
fn fused_segments(
    launcher: &Launcher,
    attention: &Attention<'_>,
    run: impl FnOnce(Placement<'_>) -> Result<()>,
) -> Result<()> {
    let mut scratch = Vec::new();
    let out = Segments::output(launcher, Role::Out, &attention.out)?;
    let written = out.place_outputs(launcher, &mut scratch)?;
    let lse = attention.lse.as_ref().map(|lse| PlacedLse::of(&Operand::output(launcher, "lse", lse)?)).transpose()?;
    let mut place = |role, inputs: &Segmented<_>| {
        Segments::input(launcher, role, inputs)?.place_inputs(launcher, &mut scratch, place_input_for_maps)
    };
    let (q, k, v) = (place(Role::Q, &attention.q)?, place(Role::K, &attention.k)?, place(Role::V, &attention.v)?);
    let tensors = SegmentedTensors { queries: Pieces::new([&q, &written]), keys: Pieces::new([&k, &v]), lse };
    run(Placement::Segments(&tensors))?;
    out.finish_outputs(launcher, &written)
}

fn launch(launcher: &Launcher, attention: &Attention<'_>, tensors: Tensors) -> Result<()> {
    match &attention.rows {
        Rows::Dense { key_mask, zero_rows } if by_tile_lists(attention) => {
            by_tile_lists::dense(launcher, attention, &tensors, *key_mask, *zero_rows)
        }
        Rows::Dense { key_mask, zero_rows } => sm80::dense(launcher, attention, &tensors, *key_mask, *zero_rows),
        Rows::Packed { query, key } => packed_call(launcher, attention, &tensors, query, key),
        Rows::Varlen { query, key } => varlen(launcher, attention, tensors, query, key),
        Rows::DeviceVarlen { query, key } => device_varlen(launcher, attention, tensors, query, key),
    }
}

/// Has what calls keep of metadata made anew, after the metadata, if a graph rebuilds that.
pub fn renew_lists(launcher: &Launcher, tables: &DeviceTables<'_>) -> Result<()> {
    if tables.kept.is_replayed() { DeviceLists::renew(launcher, tables) } else { Ok(()) }
}

fn by_tile_lists(attention: &Attention<'_>) -> bool {
    attention.plan.kernel.works_by_tile_lists()
}

/// Finds the tensors; inputs that the kernel cannot read where they lie are copied to scratch.
fn place(launcher: &Launcher, attention: &Attention<'_>, scratch: &mut Vec<CudaBuffer>) -> Result<Tensors> {
    // The outputs first: one that is refused is refused before anything is launched.
    let out = Segments::output(launcher, Role::Out, &attention.out)?.place_output(launcher, scratch)?;
    let lse = attention.lse.as_ref().map(|lse| PlacedLse::of(&Operand::output(launcher, "lse", lse)?)).transpose()?;
    let place_one = if by_tile_lists(attention) { place_input_for_maps } else { place_input };
    let mut place = |role, inputs: &Segmented<_>| {
        Segments::input(launcher, role, inputs)?.place_input(launcher, scratch, place_one)
    };
    let (q, k, v) = (place(Role::Q, &attention.q)?, place(Role::K, &attention.k)?, place(Role::V, &attention.v)?);
    Ok(Tensors { q, k, v, out, lse })
}

/// A call whose tensors the application has packed.
fn packed_call(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: &Tensors,
    query: &CuSeqlens,
    key: &CuSeqlens,
) -> Result<()> {
    let query_rows = metadata::cu_seqlens(launcher, query)?;
    let key_rows = metadata::cu_seqlens(launcher, key)?;
    let rows = PackedRows {
        cu_seqlens_q: Some(query_rows.address()),
        cu_seqlens_k: Some(key_rows.address()),
        batch_order: Some(key_rows.order()),
        batch: query.batch(),
        queries: query.total(),
        keys: key.total(),
        max_queries: query.max_seqlen(),
        lengths: Some([query, key]),
        ranges: attention.ranges.map(|ranges| PlacedRanges::packed(launcher, ranges)).transpose()?,
        scatters: None,
    };
    packed(launcher, attention, tensors, &rows)
}

/// A padded call with metadata that the host built, fused or packed.
fn varlen(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: Tensors,
    query: &VarlenMeta,
    key: &VarlenMeta,
) -> Result<()> {
    let is_fused = attention.plan.path == Path::Fused;
    if is_fused && by_tile_lists(attention) {
        return by_tile_lists::fused(launcher, attention, Placement::Whole(&tensors), query, key);
    }
    if is_fused {
        return sm80::fused(launcher, attention, &tensors, query, key);
    }
    let tables = [metadata::host_tables(launcher, query)?, metadata::host_tables(launcher, key)?];
    let ranges = attention.ranges.map(|ranges| PlacedRanges::listed(launcher, ranges, query, key)).transpose()?;
    let lengths = Some([query.cu_seqlens(), key.cu_seqlens()]);
    through_packed_rows(launcher, attention, tensors, tables, lengths, ranges)
}

/// A padded call with metadata that the device built: dense, fused or packed.
fn device_varlen(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: Tensors,
    query: &DeviceTables<'_>,
    key: &DeviceTables<'_>,
) -> Result<()> {
    if attention.plan.path == Path::Dense {
        return sm80::dense_with_tables(launcher, attention, &tensors, query, key);
    }
    if attention.plan.path == Path::Fused && by_tile_lists(attention) {
        return by_tile_lists::fused_with_tables(launcher, attention, Placement::Whole(&tensors), query, key);
    }
    let tables = [metadata::device_tables(launcher, query)?, metadata::device_tables(launcher, key)?];
    let placed = |ranges| PlacedRanges::listed_by_tables(launcher, ranges, &tables);
    let ranges = attention.ranges.map(placed).transpose()?;
    match attention.plan.path {
        Path::Fused => sm80::fused_with_tables(launcher, attention, &tensors, &tables, ranges.as_ref()),
        _ => through_packed_rows(launcher, attention, tensors, tables, None, ranges),
    }
}

/// Packs the padded tensors, computes on the packed rows, and scatters the output.
fn through_packed_rows(
    launcher: &Launcher,
    attention: &Attention<'_>,
    padded: Tensors,
    [query, key]: [Tables; 2],
    lengths: Option<[&CuSeqlens; 2]>,
    ranges: Option<PlacedRanges>,
) -> Result<()> {
    let packing = Packing::new(launcher, attention, padded, [query, key])?;
    packed(launcher, attention, packing.tensors(), &packing.rows(lengths, ranges))?;
    packing.scatter(launcher)
}

/// Computes on packed rows.
fn packed(launcher: &Launcher, attention: &Attention<'_>, tensors: &Tensors, rows: &PackedRows<'_>) -> Result<()> {
    match by_tile_lists(attention) {
        true => by_tile_lists::packed(launcher, attention, tensors, rows),
        false => sm80::packed(launcher, attention, tensors, rows),
    }
}
