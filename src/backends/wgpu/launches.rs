//! The launches that an operation becomes, and the parts that long ones are split into.

use std::ops::Range;

use crate::call::segments::Role;
use crate::error::Result;

use super::buffer::Allocator;
use super::dispatch::{Launch, Window};
use super::params::AttentionParams;
use super::scratch::{Taker, smallest_of};
use super::shader::Shader;
use super::work::Work;

/// The launches of some operations in order, and the scratch that is free for later ones of them.
#[derive(Debug)]
pub(super) struct Launches<'a> {
    allocator: &'a Allocator,
    taker: Taker,
    list: Vec<Launch>,
    /// Free for later launches; kept for other operations in the end.
    scratch: Vec<wgpu::Buffer>,
    /// q and k of the attention that comes next, as far as they are joined already.
    joined: [Option<Joined>; 2],
    /// The main shader of attention, and its floating-point operations.
    main: Option<(Shader, u64)>,
    /// Floating-point operations of one submission, if these are more.
    limit: Option<u64>,
}

/// Segments of q or k, one after another along S in one tensor.
#[derive(Debug)]
pub(super) struct Joined {
    /// `[B, S, H, D]` from its start on.
    pub buffer: wgpu::Buffer,
    /// First tokens of the segments that are there.
    pub firsts: Vec<usize>,
}

/// Attention over a whole grid.
#[derive(Debug)]
pub(super) struct AttentionLaunch {
    pub shader: Shader,
    pub params: AttentionParams,
    pub windows: Vec<Window>,
    /// Where its grid begins in that of all heads, and its size.
    pub first: [u32; 3],
    pub groups: [u32; 3],
    /// Floating-point operations of the largest workgroup.
    pub group_operations: u64,
}

impl<'a> Launches<'a> {
    pub fn new(allocator: &'a Allocator, taker: Taker) -> Self {
        Self { allocator, taker, list: Vec::new(), scratch: Vec::new(), joined: [None, None], main: None, limit: None }
    }

    /// Announces the work, before its launches. If it is more than `limit` floating-point
    /// operations, attention is split into dispatches of at most that many, or of one workgroup.
    pub fn announce(&mut self, shader: Shader, work: Work, limit: u64) {
        self.main = Some((shader, work.operations));
        self.limit = (work.in_whole_tiles > limit).then_some(limit);
    }

    pub fn push(&mut self, launch: Launch) {
        self.list.push(launch);
    }

    pub fn push_attention(&mut self, launch: AttentionLaunch) {
        let AttentionLaunch { shader, params, windows, first: [x, y, z], groups, group_operations } = launch;
        let most = self.limit.map_or(u64::MAX, |limit| limit / group_operations.max(1));
        for Part { first, groups } in parts(groups, most) {
            let [first_group_x, first_group_y, first_group_z] = [x + first[0], y + first[1], z + first[2]];
            let params = AttentionParams { first_group_x, first_group_y, first_group_z, ..params };
            self.list.push(Launch {
                shader,
                params: bytemuck::bytes_of(&params).to_vec(),
                windows: windows.clone(),
                groups,
                operations: count(groups).saturating_mul(group_operations),
            });
        }
    }

    /// Scratch of at least `size` bytes, with contents that are not specified. Give it back as soon
    /// as the launches that use it are listed: later ones run after them.
    pub fn take_scratch(&mut self, size: u64) -> Result<wgpu::Buffer> {
        match smallest_of(&self.scratch, size) {
            Some(index) => Ok(self.scratch.swap_remove(index)),
            None => self.allocator.scratch(self.taker, size),
        }
    }

    pub fn give_back(&mut self, scratch: impl IntoIterator<Item = wgpu::Buffer>) {
        self.scratch.extend(scratch);
    }

    /// Leaves segments that are joined to the attention that comes next.
    pub fn leave_joined(&mut self, role: Role, joined: Joined) {
        if let Some(place) = self.joined_of(role) {
            *place = Some(joined);
        }
    }

    /// What was left; give it back as scratch.
    pub fn take_joined(&mut self, role: Role) -> Option<Joined> {
        self.joined_of(role)?.take()
    }

    fn joined_of(&mut self, role: Role) -> Option<&mut Option<Joined>> {
        let [q, k] = &mut self.joined;
        match role {
            Role::Q => Some(q),
            Role::K => Some(k),
            Role::V | Role::Out => None,
        }
    }

    pub fn as_slice(&self) -> &[Launch] {
        &self.list
    }

    /// The launches of each submission: all of them in one, unless the operation is long.
    pub fn submissions(&self) -> Vec<Range<usize>> {
        submissions(self.list.iter().map(|launch| launch.operations), self.limit.unwrap_or(u64::MAX))
    }

    /// The main shader of attention, and its floating-point operations. None in other operations.
    pub fn main(&self) -> Option<(Shader, u64)> {
        self.main
    }
}

/// By now all is recorded or submitted, or nothing will be.
impl Drop for Launches<'_> {
    fn drop(&mut self) {
        let joined = self.joined.iter_mut().filter_map(Option::take).map(|joined| joined.buffer);
        self.allocator.kept.give_back(self.taker, self.scratch.drain(..).chain(joined));
    }
}

/// A box of a grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    first: [u32; 3],
    groups: [u32; 3],
}

fn count(groups: [u32; 3]) -> u64 {
    groups.iter().map(|&groups| u64::from(groups)).product()
}

/// Boxes that cover a grid, each of at most `most` workgroups or of one: planes while one fits,
/// then rows, then parts of a row.
fn parts(grid: [u32; 3], most: u64) -> Vec<Part> {
    let mut parts = vec![Part { first: [0; 3], groups: grid }];
    for dim in [2, 1, 0] {
        parts = parts.into_iter().flat_map(|part| part.along(dim, most)).collect();
    }
    parts
}

impl Part {
    /// Cut across one dimension, into pieces of about the same size, if it is too large.
    fn along(self, dim: usize, most: u64) -> Vec<Self> {
        let len = self.groups[dim];
        if count(self.groups) <= most || len <= 1 {
            return vec![self];
        }
        let slice = count(self.groups) / u64::from(len);
        // Fits: at most `len`.
        let step = (most / slice).clamp(1, u64::from(len)) as u32;
        let step = len.div_ceil(len.div_ceil(step));
        (0..len)
            .step_by(step as usize)
            .map(|start| {
                let mut piece = self;
                piece.first[dim] += start;
                piece.groups[dim] = step.min(len - start);
                piece
            })
            .collect()
    }
}

/// Ranges of launches of at most `limit` operations together, or of one.
fn submissions(operations: impl Iterator<Item = u64>, limit: u64) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut sum = 0_u64;
    for (index, operations) in operations.enumerate() {
        sum = sum.saturating_add(operations);
        match ranges.last_mut() {
            Some(range) if sum <= limit => range.end = index + 1,
            _ => {
                ranges.push(index..index + 1);
                sum = operations;
            }
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_grid_once_and_keep_the_limit() {
        for grid in [[7, 3, 5], [1, 1, 1], [130, 1, 24], [65_535, 2, 3], [5, 0, 2], [0, 0, 0]] {
            for most in [0, 1, 2, 6, 7, 8, 20, 21, 22, 104, 105, 70_000, u64::MAX] {
                let parts = parts(grid, most);
                let mut seen = std::collections::HashSet::new();
                for Part { first, groups } in &parts {
                    assert!(count(*groups) <= most.max(1) || count(grid) == 0, "{grid:?}, {most}: {groups:?}");
                    if count(grid) < 1000 {
                        for x in first[0]..first[0] + groups[0] {
                            for y in first[1]..first[1] + groups[1] {
                                for z in first[2]..first[2] + groups[2] {
                                    assert!(seen.insert([x, y, z]), "{grid:?}, {most}: {x}, {y}, {z} twice");
                                }
                            }
                        }
                    }
                }
                let sum: u64 = parts.iter().map(|part| count(part.groups)).sum();
                assert_eq!(sum, count(grid), "{grid:?}, {most}");
                assert!(parts.iter().all(|part| (0..3).all(|dim| part.first[dim] + part.groups[dim] <= grid[dim])));
                assert!(count(grid) > most || parts.len() == 1, "{grid:?}, {most}: split without need");
            }
        }
    }

    #[test]
    fn pieces_of_a_dimension_are_even() {
        let heads: Vec<u32> = parts([10, 1, 9], 80).iter().map(|part| part.groups[2]).collect();
        assert_eq!(heads, [5, 4]);
    }

    #[test]
    fn submissions_keep_the_limit_and_the_order() {
        let of = |operations: &[u64], limit| submissions(operations.iter().copied(), limit);
        assert_eq!(of(&[], 5), []);
        assert_eq!(of(&[0, 0, 3, 2, 0, 4, 9, 1], 5), [0..5, 5..6, 6..7, 7..8]);
        let all = 0..8;
        assert_eq!(of(&[0, 0, 3, 2, 0, 4, 9, 1], u64::MAX), [all]);
    }
}
