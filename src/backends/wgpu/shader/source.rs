//! The WGSL text of a variant, composed of snippets.

use std::fmt::Write;

use crate::dtype::DType;
use crate::score_modifiers::ModifierSet;

use super::super::head_table::MAX_HEADS;
use super::super::params::{AttentionParams, CopyParams, MergeParams, MetadataParams, PrepareQkParams, RangesParams};
use super::bindings::Binding;
use super::tiles::Algorithm;
use super::unroll::unrolled;
use super::variant::{
    AttentionRows, AttentionShader, HeadAccess, INVOCATIONS, MetadataStep, PrepareQkShader, RangesOf, RangesStep,
    Shader, TileKeys,
};

/// How a shader gets its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamsIn {
    /// In a part of a buffer, at binding 0.
    Uniform,
    /// In the command buffer, where the device has the feature: nothing is written to a buffer
    /// before a launch.
    Immediates,
}

impl ParamsIn {
    const fn declaration(self) -> &'static str {
        match self {
            Self::Uniform => "@group(0) @binding(0) var<uniform> params: Params;\n",
            Self::Immediates => "var<immediate> params: Params;\n",
        }
    }
}

/// The whole text: parameters, bindings and constants, then the snippets in order.
pub fn source(shader: Shader, params: ParamsIn) -> String {
    let mut source = String::new();
    source.push_str(match shader {
        Shader::Attention(AttentionShader { algorithm: Algorithm::Coop(_), .. }) => {
            "enable f16;\nenable wgpu_cooperative_matrix;\n"
        }
        _ => "",
    });
    source.push_str(match shader {
        Shader::Attention(_) => AttentionParams::WGSL,
        Shader::Merge { .. } => MergeParams::WGSL,
        Shader::PrepareQk(_) => PrepareQkParams::WGSL,
        Shader::Metadata(_) => MetadataParams::WGSL,
        Shader::Ranges(_) => RangesParams::WGSL,
        _ => CopyParams::WGSL,
    });
    source.push_str(params.declaration());
    for (index, Binding { name, element, writes }) in shader.bindings().iter().enumerate() {
        let (slot, access) = (index + 1, if *writes { "read_write" } else { "read" });
        // Writing to a String does not fail.
        let _ = writeln!(source, "@group(0) @binding({slot}) var<storage, {access}> {name}: array<{element}>;");
    }
    if shader.has_head_table() {
        let slot = shader.bindings().len() + 1;
        let _ = writeln!(source, "@group(0) @binding({slot}) var<uniform> heads: Heads;");
    }
    for (name, value) in constants(shader) {
        let _ = writeln!(source, "const {name} = {value};");
    }
    for snippet in snippets(shader) {
        source.push('\n');
        source.push_str(snippet);
    }
    match shader {
        Shader::Attention(attention) => {
            let AttentionShader { algorithm, dtype, head_dim, ranges, modifiers, out_buffers, tiles, .. } = attention;
            let marks = [
                ("splits", tiles != TileKeys::All),
                ("modifiers", !modifiers.is_empty()),
                ("ranges", ranges),
                ("2 buffers", out_buffers >= 2),
                ("3 buffers", out_buffers >= 3),
                ("4 buffers", out_buffers >= 4),
            ];
            let own = marks.iter().fold(source, |source, (what, has_it)| of_variant(&source, what, *has_it));
            unrolled(&own, &algorithm.unrolled_loops(dtype, head_dim, attention.is_plain()))
        }
        Shader::PrepareQk(PrepareQkShader { dtype, access: HeadAccess::Octets, .. }) => {
            // Words of eight elements.
            unrolled(&source, &[("OCTET_WORDS", dtype.size() as u32 / 2)])
        }
        _ => source,
    }
}

/// Without the lines of the other variants: with `ranges`, say, those marked `// without ranges`,
/// else those marked `// with ranges`. naga translates branches on constants too.
fn of_variant(source: &str, what: &str, has_it: bool) -> String {
    let [with, without] = ["with", "without"].map(|word| format!(" // {word} {what}"));
    let (own, others) = if has_it { (with, without) } else { (without, with) };
    let lines = source.lines().filter(|line| !line.ends_with(&others));
    // Other marks may stand before these.
    lines.flat_map(|line| [line.strip_suffix(&own).unwrap_or(line), "\n"]).collect()
}

/// Constants rather than overrides: they size private arrays, and branches on them must vanish
/// before translation.
fn constants(shader: Shader) -> Vec<(&'static str, String)> {
    let Shader::Attention(attention @ AttentionShader { algorithm, head_dim, rows, modifiers, .. }) = shader else {
        return vec![("INVOCATIONS", format!("{INVOCATIONS}u"))];
    };
    let mut constants = vec![
        ("HEAD_DIM", format!("{head_dim}u")),
        ("KEY_MASK", rows.has_key_mask().to_string()),
        ("BIAS", rows.bias().is_some().to_string()),
    ];
    if !modifiers.is_empty() {
        let ModifierSet { softcap, alibi, sinks } = modifiers;
        let named = [("SOFTCAP", softcap), ("ALIBI", alibi), ("SINKS", sinks)];
        constants.extend(named.map(|(name, has_it)| (name, has_it.to_string())));
        constants.push(("MAX_HEADS", format!("{MAX_HEADS}u")));
    }
    constants.extend(algorithm.constants(head_dim, attention.is_plain()));
    constants
}

/// A file under `shaders/`.
macro_rules! snippet {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $path))
    };
}

fn snippets(shader: Shader) -> Vec<&'static str> {
    let copy = |of_shader: &[&'static str]| [&[snippet!("copy/words.wgsl")], of_shader].concat();
    match shader {
        Shader::Attention(attention) => attention_snippets(attention),
        Shader::PackRows => copy(&[snippet!("copy/pack_rows.wgsl")]),
        Shader::ScatterRows => copy(&[snippet!("copy/scatter_rows.wgsl")]),
        Shader::ZeroRows => copy(&[snippet!("copy/zero_rows.wgsl")]),
        Shader::MoveRows => copy(&[snippet!("copy/move_rows.wgsl")]),
        Shader::AlignRows { element_bytes } => {
            let load =
                if element_bytes == 2 { snippet!("copy/load_16bit.wgsl") } else { snippet!("copy/load_32bit.wgsl") };
            copy(&[load, snippet!("copy/align_rows.wgsl")])
        }
        Shader::NarrowRows { element_bytes: 2 } => {
            copy(&[snippet!("copy/store_16bit.wgsl"), snippet!("copy/narrow_rows.wgsl")])
        }
        Shader::NarrowRows { .. } => copy(&[snippet!("copy/store_32bit.wgsl"), snippet!("copy/narrow_rows.wgsl")]),
        Shader::ScatterLse => vec![snippet!("copy/scatter_lse.wgsl")],
        Shader::NoKeys => vec![snippet!("copy/no_keys.wgsl")],
        Shader::Merge { dtype } => [elements(dtype), &[snippet!("merge/merge.wgsl")]].concat(),
        Shader::PrepareQk(prepare_qk) => prepare_qk_snippets(prepare_qk),
        Shader::Metadata(step) => metadata_snippets(step).to_vec(),
        Shader::Ranges(step) => ranges_snippets(step).to_vec(),
    }
}

fn metadata_snippets(step: MetadataStep) -> &'static [&'static str] {
    match step {
        MetadataStep::Bits => &[snippet!("metadata/scan.wgsl"), snippet!("metadata/bits.wgsl")],
        MetadataStep::Blocks => &[snippet!("metadata/scan.wgsl"), snippet!("metadata/blocks.wgsl")],
        MetadataStep::Starts => &[snippet!("metadata/scan.wgsl"), snippet!("metadata/starts.wgsl")],
        MetadataStep::Lists => &[snippet!("metadata/lists.wgsl")],
        MetadataStep::Tiles => &[snippet!("metadata/tiles.wgsl")],
    }
}

fn ranges_snippets(step: RangesStep) -> &'static [&'static str] {
    match step {
        RangesStep::Queries(RangesOf::Fused) => {
            &[snippet!("metadata/positions.wgsl"), snippet!("metadata/ranges_fused.wgsl")]
        }
        RangesStep::Queries(RangesOf::Packed) => {
            &[snippet!("metadata/positions.wgsl"), snippet!("metadata/ranges_packed.wgsl")]
        }
        RangesStep::Queries(RangesOf::Dense) => &[snippet!("metadata/ranges_dense.wgsl")],
        RangesStep::Tiles { listed: true } => {
            &[snippet!("metadata/tiles_listed.wgsl"), snippet!("metadata/unions.wgsl")]
        }
        RangesStep::Tiles { listed: false } => {
            &[snippet!("metadata/tiles_dense.wgsl"), snippet!("metadata/unions.wgsl")]
        }
    }
}

/// How words become numbers, and numbers words.
fn elements(dtype: DType) -> &'static [&'static str] {
    match dtype {
        DType::F32 => &[snippet!("elements/f32.wgsl")],
        DType::F16 => &[snippet!("elements/f16.wgsl"), snippet!("elements/pairs.wgsl")],
        DType::Bf16 => &[snippet!("elements/bf16.wgsl"), snippet!("elements/pairs.wgsl")],
    }
}

fn prepare_qk_snippets(PrepareQkShader { dtype, in_place, access, joins }: PrepareQkShader) -> Vec<&'static str> {
    let mut snippets = elements(dtype).to_vec();
    snippets.extend([
        match (in_place, access) {
            (false, _) => snippet!("prepare_qk/source_other.wgsl"),
            (true, HeadAccess::Octets | HeadAccess::Pairs) => snippet!("prepare_qk/source_in_place.wgsl"),
            (true, HeadAccess::Elements) => snippet!("prepare_qk/source_in_place_odd.wgsl"),
        },
        match (joins, access, dtype) {
            (false, ..) => snippet!("prepare_qk/joint_none.wgsl"),
            (true, HeadAccess::Octets, _) => snippet!("prepare_qk/joint_octets.wgsl"),
            (true, _, DType::F32) => snippet!("prepare_qk/joint_32bit.wgsl"),
            (true, ..) => snippet!("prepare_qk/joint_16bit.wgsl"),
        },
        snippet!("prepare_qk/heads.wgsl"),
    ]);
    snippets.extend(match (access, dtype) {
        (HeadAccess::Octets, _) => None,
        (_, DType::F32) => Some(snippet!("prepare_qk/elements_32bit.wgsl")),
        (HeadAccess::Pairs, _) => Some(snippet!("prepare_qk/elements_16bit.wgsl")),
        (HeadAccess::Elements, _) => Some(snippet!("prepare_qk/elements_16bit_odd.wgsl")),
    });
    snippets.push(match access {
        HeadAccess::Octets => snippet!("prepare_qk/octets.wgsl"),
        HeadAccess::Pairs | HeadAccess::Elements => snippet!("prepare_qk/prepare_qk.wgsl"),
    });
    snippets
}

fn attention_snippets(shader: AttentionShader) -> Vec<&'static str> {
    let AttentionShader { algorithm, dtype, rows, ranges, lse, modifiers, out_buffers, tiles, .. } = shader;
    let mut snippets = elements(dtype).to_vec();
    // Where tiles lie.
    snippets.push(snippet!("rows/tile.wgsl"));
    snippets.extend(match rows {
        AttentionRows::Dense { .. } => [snippet!("rows/dense.wgsl")].as_slice(),
        AttentionRows::Fused { .. } => &[snippet!("rows/tile_list.wgsl"), snippet!("rows/fused.wgsl")],
        AttentionRows::Packed => &[snippet!("rows/tile_list.wgsl"), snippet!("rows/packed.wgsl")],
    });
    snippets.extend(match rows {
        AttentionRows::Dense { zero_rows: false, .. } => Some(snippet!("rows/every_row.wgsl")),
        AttentionRows::Dense { .. } if lse && ranges => Some(snippet!("rows/seeing_rows.wgsl")),
        AttentionRows::Dense { .. } => Some(snippet!("rows/kept_rows.wgsl")),
        AttentionRows::Fused { bias } if ranges && (lse || bias.is_some()) => {
            Some(snippet!("rows/query_list_in_ranges.wgsl"))
        }
        AttentionRows::Fused { .. } => Some(snippet!("rows/query_list.wgsl")),
        AttentionRows::Packed => None,
    });
    // What they meet, what is added, and what is written beside the output.
    snippets.push(snippet!("rows/key_range.wgsl"));
    snippets.push(if ranges { snippet!("rows/ranges.wgsl") } else { snippet!("rows/no_ranges.wgsl") });
    snippets.push(if rows.has_key_mask() { snippet!("rows/key_mask.wgsl") } else { snippet!("rows/no_key_mask.wgsl") });
    snippets.extend(match rows.bias() {
        // The kernel on matrices looks for keys that a row sees instead.
        None if (ranges || !modifiers.is_empty()) && algorithm == Algorithm::Portable => {
            [snippet!("rows/saturated.wgsl")].as_slice()
        }
        None => &[snippet!("rows/no_bias.wgsl")],
        Some(DType::F32) => &[snippet!("rows/bias.wgsl"), snippet!("elements/bias_f32.wgsl")],
        Some(DType::F16) => &[snippet!("rows/bias.wgsl"), snippet!("elements/bias_f16.wgsl")],
        Some(DType::Bf16) => &[snippet!("rows/bias.wgsl"), snippet!("elements/bias_bf16.wgsl")],
    });
    snippets.push(match out_buffers {
        0 => snippet!("rows/output.wgsl"),
        _ => snippet!("rows/output_segments.wgsl"),
    });
    snippets.push(if lse { snippet!("rows/lse.wgsl") } else { snippet!("rows/no_lse.wgsl") });
    snippets.extend((!modifiers.is_empty()).then_some(snippet!("scores/modifiers.wgsl")));
    // The kernel.
    match algorithm {
        Algorithm::Portable => snippets.push(snippet!("attention/portable.wgsl")),
        Algorithm::Coop(tile) => {
            snippets.extend([if dtype == DType::F16 {
                snippet!("elements/half_f16.wgsl")
            } else {
                snippet!("elements/half_bf16.wgsl")
            }]);
            snippets.extend((tiles != TileKeys::All).then_some(snippet!("attention/coop_splits.wgsl")));
            if tiles == TileKeys::Merged {
                snippets.push(snippet!("attention/coop_merge.wgsl"));
                return snippets;
            }
            snippets.extend([
                if tile.shape == 8 {
                    snippet!("attention/coop_8x8.wgsl")
                } else {
                    snippet!("attention/coop_16x16.wgsl")
                },
                snippet!("attention/coop.wgsl"),
                snippet!("attention/coop_zeros.wgsl"),
            ]);
            snippets.extend(ranges.then_some(snippet!("attention/coop_ranges.wgsl")));
        }
    }
    snippets
}
