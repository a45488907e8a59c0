//! What a shader variant is chosen by.

use crate::dtype::DType;
use crate::score_modifiers::ModifierSet;

use super::super::params::{AttentionParams, CopyParams, MergeParams, MetadataParams, PrepareQkParams, RangesParams};
use super::bindings::{self, Binding};
use super::tiles::Algorithm;

/// Invocations of a workgroup of the shaders that move rows or build metadata.
pub const INVOCATIONS: usize = 256;

/// One compute pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shader {
    Attention(AttentionShader),
    PackRows,
    ScatterRows,
    ZeroRows,
    MoveRows,
    AlignRows { element_bytes: usize },
    NarrowRows { element_bytes: usize },
    ScatterLse,
    NoKeys,
    Merge { dtype: DType },
    PrepareQk(PrepareQkShader),
    Metadata(MetadataStep),
    Ranges(RangesStep),
}

/// A variant of norm and rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrepareQkShader {
    pub dtype: DType,
    pub in_place: bool,
    pub access: HeadAccess,
    /// Whether heads are written a second time, among those of all segments.
    pub joins: bool,
}

/// How heads are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HeadAccess {
    /// In whole words of 16 bytes, as weights and tables are read.
    Octets,
    /// A u32 at a time.
    Pairs,
    /// Half a u32 at a time: heads of 16-bit elements start or end inside one.
    Elements,
}

impl PrepareQkShader {
    fn bindings(self) -> Vec<&'static Binding> {
        let all = match self.access {
            HeadAccess::Octets => bindings::PREPARE_QK_OCTETS,
            HeadAccess::Pairs => bindings::PREPARE_QK,
            HeadAccess::Elements => bindings::PREPARE_QK_ODD,
        };
        let is_bound = |binding: &&Binding| match binding.name {
            "src" => !self.in_place,
            "joint" => self.joins,
            _ => true,
        };
        all.iter().filter(is_bound).collect()
    }
}

/// A step of building metadata: see `shaders/metadata/scan.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MetadataStep {
    Bits,
    Blocks,
    Starts,
    Lists,
    Tiles,
}

/// A step of numbering key ranges by metadata of the device: see `shaders/metadata/positions.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RangesStep {
    /// The ranges of queries.
    Queries(RangesOf),
    /// Those of tiles, of a list unless all queries are computed.
    Tiles { listed: bool },
}

/// Which queries have ranges, in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RangesOf {
    /// All of each batch row in the order of its list.
    Fused,
    /// The kept ones, one after another.
    Packed,
    /// All in the order of their positions.
    Dense,
}

/// A variant of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShader {
    pub algorithm: Algorithm,
    pub dtype: DType,
    pub head_dim: usize,
    pub rows: AttentionRows,
    /// Whether each query has a range of keys.
    pub ranges: bool,
    /// Whether the log-sum-exp is written.
    pub lse: bool,
    /// What happens to the scores beside their scale and a bias.
    pub modifiers: ModifierSet,
    /// Buffers that segments of the output lie in; 0 if it is one tensor.
    pub out_buffers: u32,
    pub tiles: TileKeys,
}

/// Which keys of its tile a workgroup takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TileKeys {
    All,
    /// All of most tiles, of the last ones a split, of which it leaves what merges.
    LastSplit,
    /// None: it merges what splits left.
    Merged,
}

/// Where tiles lie, and what is masked or added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionRows {
    /// Padded tensors, every query row.
    Dense { key_mask: bool, zero_rows: bool, bias: Option<DType> },
    /// Padded tensors, kept queries and keys by lists. Beside a bias there is no binding left for the
    /// log-sum-exp.
    Fused { bias: Option<DType> },
    /// Packed rows.
    Packed,
}

impl AttentionRows {
    pub fn has_key_mask(self) -> bool {
        matches!(self, Self::Dense { key_mask: true, .. })
    }

    /// Element type of the bias.
    pub fn bias(self) -> Option<DType> {
        match self {
            Self::Dense { bias, .. } | Self::Fused { bias } => bias,
            Self::Packed => None,
        }
    }
}

impl AttentionShader {
    /// What a form of attention may bind.
    fn table(self) -> &'static [Binding] {
        match (self.rows, self.lse, self.ranges) {
            (AttentionRows::Dense { .. }, false, _) => bindings::ATTENTION_DENSE,
            (AttentionRows::Dense { .. }, true, false) => bindings::ATTENTION_DENSE_LSE,
            (AttentionRows::Dense { .. }, true, true) => bindings::ATTENTION_DENSE_LSE_RANGES,
            (AttentionRows::Fused { bias: None }, false, _) => bindings::ATTENTION_FUSED,
            (AttentionRows::Fused { bias: Some(_) }, false, false) => bindings::ATTENTION_FUSED_BIAS,
            (AttentionRows::Fused { bias: Some(_) }, false, true) => bindings::ATTENTION_FUSED_BIAS_RANGES,
            (AttentionRows::Fused { .. }, true, false) => bindings::ATTENTION_FUSED_LSE,
            (AttentionRows::Fused { .. }, true, true) => bindings::ATTENTION_FUSED_LSE_RANGES,
            (AttentionRows::Packed, ..) => bindings::ATTENTION_PACKED,
        }
    }

    fn binds(self, binding: &Binding) -> bool {
        match binding.name {
            "q" | "k" | "v" => self.tiles != TileKeys::Merged,
            "lse" => self.lse,
            "key_bits" => self.rows.has_key_mask(),
            "row_bits" => matches!(self.rows, AttentionRows::Dense { zero_rows: true, .. }),
            "bias" => self.rows.bias().is_some(),
            "ranges" => self.ranges,
            _ => true,
        }
    }

    fn bindings(self) -> Vec<&'static Binding> {
        let further = bindings::FURTHER_OUTPUTS.iter().take(self.out_buffers.saturating_sub(1) as usize);
        let splits = match self.tiles {
            TileKeys::All => None,
            TileKeys::LastSplit => Some(&bindings::WRITES_SPLITS),
            TileKeys::Merged => Some(&bindings::READS_SPLITS),
        };
        self.table().iter().chain(further).filter(|binding| self.binds(binding)).chain(splits).collect()
    }

    /// Whether elements are f16 and scores are only scaled.
    pub(super) fn is_plain(self) -> bool {
        self.dtype == DType::F16 && self.modifiers.is_empty() && self.rows.bias().is_none()
    }

    /// The variant in which several workgroups share the keys of each of the last tiles. There is none unless each has
    /// steps of its own, nothing beside the output is written, and one of `storage_buffers` is left for what splits leave.
    pub fn with_splits(self, storage_buffers: usize) -> Option<Self> {
        let is_plain = !self.ranges && !self.lse && self.modifiers.is_empty() && self.rows.bias().is_none();
        let can_split = matches!(self.algorithm, Algorithm::Coop(_)) && is_plain && !self.rows.has_key_mask();
        let split = Self { tiles: TileKeys::LastSplit, ..self };
        (can_split && split.bindings().len() <= storage_buffers).then_some(split)
    }

    /// Those of a form's windows that the variant binds.
    pub fn bound<T>(self, windows: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
        let of_form = windows.into_iter().zip(self.table());
        of_form.filter(move |(_, binding)| self.binds(binding)).map(|(window, _)| window)
    }

    /// Storage buffers that the variant leaves to the output, of `all`.
    pub fn left_for_output(self, all: usize) -> usize {
        all.saturating_sub(self.bindings().len() - 1)
    }
}

impl Shader {
    /// Name of the entry point.
    pub fn entry_point(self) -> &'static str {
        match self {
            Self::Attention(AttentionShader { tiles: TileKeys::Merged, .. }) => "merge_splits",
            Self::Attention(_) => "attention",
            Self::PackRows => "pack_rows",
            Self::ScatterRows => "scatter_rows",
            Self::ZeroRows => "zero_rows",
            Self::MoveRows => "move_rows",
            Self::AlignRows { .. } => "align_rows",
            Self::NarrowRows { .. } => "narrow_rows",
            Self::ScatterLse => "scatter_lse",
            Self::NoKeys => "no_keys",
            Self::Merge { .. } => "merge",
            Self::PrepareQk(_) => "prepare_qk",
            Self::Metadata(MetadataStep::Bits) => "metadata_bits",
            Self::Metadata(MetadataStep::Blocks) => "metadata_blocks",
            Self::Metadata(MetadataStep::Starts) => "metadata_starts",
            Self::Metadata(MetadataStep::Lists) => "metadata_lists",
            Self::Metadata(MetadataStep::Tiles) => "metadata_tiles",
            Self::Ranges(RangesStep::Queries(_)) => "metadata_ranges",
            Self::Ranges(RangesStep::Tiles { .. }) => "metadata_unions",
        }
    }

    /// Size of the parameters.
    pub const fn params_bytes(self) -> u32 {
        let bytes = match self {
            Self::Attention(_) => size_of::<AttentionParams>(),
            Self::Merge { .. } => size_of::<MergeParams>(),
            Self::PrepareQk(_) => size_of::<PrepareQkParams>(),
            Self::Metadata(_) => size_of::<MetadataParams>(),
            Self::Ranges(_) => size_of::<RangesParams>(),
            _ => size_of::<CopyParams>(),
        };
        bytes as u32
    }

    /// Whether a uniform buffer with values of heads follows the storage buffers.
    pub fn has_head_table(self) -> bool {
        matches!(self, Self::Attention(AttentionShader { modifiers, .. }) if !modifiers.is_empty())
    }

    pub fn bindings(self) -> Vec<&'static Binding> {
        let all = match self {
            Self::Attention(attention) => return attention.bindings(),
            Self::PrepareQk(prepare_qk) => return prepare_qk.bindings(),
            Self::PackRows => bindings::PACK_ROWS,
            Self::ScatterRows => bindings::SCATTER_ROWS,
            Self::ZeroRows => bindings::ZERO_ROWS,
            Self::MoveRows => bindings::MOVE_ROWS,
            Self::AlignRows { .. } => bindings::ALIGN_ROWS,
            Self::NarrowRows { .. } => bindings::NARROW_ROWS,
            Self::ScatterLse => bindings::SCATTER_LSE,
            Self::NoKeys => bindings::NO_KEYS,
            Self::Merge { .. } => bindings::MERGE,
            Self::Metadata(MetadataStep::Bits) => bindings::METADATA_BITS,
            Self::Metadata(MetadataStep::Blocks) => bindings::METADATA_BLOCKS,
            Self::Metadata(MetadataStep::Starts) => bindings::METADATA_STARTS,
            Self::Metadata(MetadataStep::Lists) => bindings::METADATA_LISTS,
            Self::Metadata(MetadataStep::Tiles) => bindings::METADATA_TILES,
            Self::Ranges(RangesStep::Queries(RangesOf::Fused)) => bindings::RANGES_FUSED,
            Self::Ranges(RangesStep::Queries(RangesOf::Packed)) => bindings::RANGES_PACKED,
            Self::Ranges(RangesStep::Queries(RangesOf::Dense)) => bindings::RANGES_DENSE,
            Self::Ranges(RangesStep::Tiles { listed: true }) => bindings::RANGES_OF_LISTED_TILES,
            Self::Ranges(RangesStep::Tiles { listed: false }) => bindings::RANGES_OF_TILES,
        };
        all.iter().collect()
    }
}
