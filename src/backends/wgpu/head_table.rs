//! The values of heads that modify scores, in a uniform buffer: no storage binding is left for them.

use crate::call::problem::AttentionProblem;
use crate::error::{Error, Result};
use crate::score_modifiers::ScoreModifiers;

use super::context::Context;
use super::dispatch::Window;
use super::transfer::upload;

/// Heads of a table, as many as fit the smallest limit on a uniform binding, 16 KiB.
pub(super) const MAX_HEADS: usize = 1024;

/// A device's copy of the table.
#[derive(Debug)]
struct HeadTable(wgpu::Buffer);

/// The binding of the values of heads, uploaded once and kept with the modifiers.
pub(super) fn head_table(context: &Context, modifiers: &ScoreModifiers, problem: &AttentionProblem) -> Result<Window> {
    let got = problem.shape.num_heads;
    if got > MAX_HEADS {
        let (argument, limit_name) = ("q", "query heads of a call with score modifiers on wgpu");
        return Err(Error::TooLarge { argument, limit_name, limit: MAX_HEADS as u64, got: got as u64 });
    }
    let (limit, bytes) = (context.device.limits().max_uniform_buffer_binding_size, (MAX_HEADS * 16) as u64);
    if limit < bytes {
        let limit_name = "max_uniform_buffer_binding_size (bytes) of a call with score modifiers";
        return Err(Error::TooLarge { argument: "modifiers", limit_name, limit, got: bytes });
    }
    let table = modifiers.copies().get_or_make(context.id, || {
        // Shaders compute without infinities where they can.
        let values: Vec<[f32; 4]> =
            (0..MAX_HEADS).map(|head| modifiers.of_head(head).map(|x| x.max(f32::MIN))).collect();
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let buffer = context.allocator.raw("heads", bytes.len() as u64, usage)?;
        upload(context, &buffer, bytes)?;
        Ok(HeadTable(buffer))
    })?;
    Ok(Window::whole(&table.0))
}
