//! Names that the launches of the kernels with tile lists still use.

pub(super) use super::params::{TileListForm as Form, TileListParams as AttentionParamsSm90};
