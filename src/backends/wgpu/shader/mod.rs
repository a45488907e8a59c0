//! Shader variants: the snippets, constants and bindings that each is made of.

mod bindings;
mod source;
#[cfg(test)]
mod tests;
mod tiles;
mod unroll;
mod variant;

pub(super) use bindings::MAX_STORAGE_BUFFERS;
pub(super) use source::{ParamsIn, source};
pub(super) use tiles::{Algorithm, CoopTile};
pub(super) use variant::{
    AttentionRows, AttentionShader, HeadAccess, INVOCATIONS, MetadataStep, PrepareQkShader, RangesOf, RangesStep,
    Shader, TileKeys,
};
