//! Shader variants: which snippets make up each, and the one table of bindings that both the WGSL declarations and the bind
//! group layouts come from.

use std::fmt::Write;

use super::params::{AttentionParams, CopyParams};
use crate::dtype::DType;

/// A storage buffer of a shader. Binding 0 is the uniform `params`; storage buffers follow in the order of their table.
#[derive(Debug)]
pub(super) struct Binding {
    pub name: &'static str,
    pub element: &'static str,
    pub writes: bool,
}

const fn reads(name: &'static str, element: &'static str) -> Binding {
    Binding { name, element, writes: false }
}

const fn writes(name: &'static str, element: &'static str) -> Binding {
    Binding { name, element, writes: true }
}

const WORD: &str = "vec4<u32>";

const ATTENTION_DENSE: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    reads("key_bits", "u32"),
    reads("row_bits", "u32"),
    reads("bias", "u32"),
];
const ATTENTION_PACKED: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    writes("lse", "u32"),
    reads("tiles", WORD),
    reads("cu_seqlens_k", "u32"),
];
const ATTENTION_FUSED: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    reads("tiles", WORD),
    reads("query_tokens", "u32"),
    reads("key_tokens", "u32"),
];
const PACK_ROWS: &[Binding] = &[reads("src", WORD), writes("dst", WORD), reads("indices", "u32")];
const SCATTER_ROWS: &[Binding] = &[reads("src", WORD), writes("dst", WORD), reads("inv_indices", "i32")];
const ZERO_ROWS: &[Binding] = &[writes("dst", WORD)];
const ALIGN_ROWS: &[Binding] = &[reads("src", "u32"), writes("dst", "u32")];

/// The cooperative-matrix kernel's shape and tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct CoopTile {
    /// Rows and columns of a matrix: 8 or 16.
    pub shape: u32,
    /// Invocations of a subgroup; every subgroup has as many.
    pub subgroup_size: u32,
    /// Subgroups of a workgroup.
    pub subgroups: u32,
    /// Keys of a step.
    pub keys: u32,
}

impl CoopTile {
    /// Query rows of a workgroup.
    pub fn rows(self) -> usize {
        (self.subgroups * self.shape) as usize
    }

    /// Bytes of workgroup memory; what `attention_coop.wgsl` declares.
    pub fn workgroup_bytes(self, head_dim: usize) -> u32 {
        let dim = (head_dim as u32).next_multiple_of(self.shape);
        let lanes = self.subgroup_size / self.shape;
        let staged = 2 * self.keys * (dim / 8 + 1) * 16;
        let (probs, scores) = ((self.keys / 4 + 2) * 8, (self.keys / 4 + lanes) * 16);
        staged + self.rows() as u32 * (probs + scores) + 20
    }
}

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Algorithm {
    /// `attention.wgsl`.
    Portable,
    /// `attention_coop.wgsl`.
    Coop(CoopTile),
}

impl Algorithm {
    /// Query rows of a workgroup.
    pub fn tile_rows(self, head_dim: usize) -> usize {
        match self {
            Self::Portable => PortableTile::of(head_dim).tile_rows() as usize,
            Self::Coop(tile) => tile.rows(),
        }
    }
}

/// How the portable kernel splits a tile over its invocations: 8 row groups of 16 lanes.
#[derive(Debug, Clone, Copy)]
struct PortableTile {
    /// Rows of an invocation.
    rows: u32,
    /// Its vectors of four columns in a block of the output's columns.
    vecs: u32,
    /// Blocks of columns.
    blocks: u32,
    /// Whether chunks are fetched into registers a step ahead.
    fetches_ahead: bool,
}

impl PortableTile {
    /// Keys of a step.
    const KEYS: u32 = 64;

    /// Scores and output of an invocation take 48 to 96 registers. Whether words are fetched ahead is what was faster
    /// (docs/log/wgsl.md).
    const fn of(head_dim: usize) -> Self {
        let vecs = if head_dim <= 64 { 1 } else { 2 };
        Self {
            rows: if head_dim <= 128 { 8 } else { 4 },
            vecs,
            blocks: (head_dim as u32).div_ceil(64 * vecs),
            fetches_ahead: head_dim > 64,
        }
    }

    const fn tile_rows(self) -> u32 {
        8 * self.rows
    }

    /// Bounds of the loops that are written out, by their names in `attention.wgsl`.
    fn unrolled_loops(self, dtype: DType, head_dim: usize) -> Vec<(&'static str, u32)> {
        let vecs_per_word = 4 / dtype.size() as u32;
        // Rows whose part of a chunk all 128 invocations fetch at once: 8 vectors of each.
        let fetched_rows = 16 * vecs_per_word;
        let mut loops = vec![
            ("ROWS", self.rows),
            ("ROW_QUADS", self.rows / 4),
            ("QUAD", 4),
            ("VECS", self.vecs),
            ("BLOCKS", self.blocks),
            ("VECS_PER_WORD", vecs_per_word),
            ("Q_FETCHES", self.tile_rows() / fetched_rows),
            ("K_FETCHES", Self::KEYS / fetched_rows),
            ("V_FETCHES", 4 / vecs_per_word),
        ];
        // All chunks have all their columns.
        if head_dim > 64 && head_dim.is_multiple_of(32) {
            loops.push(("columns", 8));
        }
        loops
    }
}

/// How a shader gets its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParamsIn {
    /// A part of a buffer, at binding 0.
    Uniform,
    /// The command buffer, where the device has the feature: nothing is written to a buffer before a launch.
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

/// One compute pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Shader {
    AttentionDense {
        algorithm: Algorithm,
        dtype: DType,
        head_dim: usize,
        key_mask: bool,
        zero_rows: bool,
        bias: Option<DType>,
    },
    AttentionPacked {
        algorithm: Algorithm,
        dtype: DType,
        head_dim: usize,
        lse: bool,
    },
    AttentionFused {
        algorithm: Algorithm,
        dtype: DType,
        head_dim: usize,
    },
    PackRows,
    ScatterRows,
    ZeroRows,
    AlignRows {
        element_bytes: usize,
    },
}

impl Shader {
    /// Name of the entry point, and of the file that holds it.
    pub fn entry_point(self) -> &'static str {
        match self {
            Self::AttentionDense { .. } | Self::AttentionPacked { .. } | Self::AttentionFused { .. } => "attention",
            Self::PackRows => "pack_rows",
            Self::ScatterRows => "scatter_rows",
            Self::ZeroRows => "zero_rows",
            Self::AlignRows { .. } => "align_rows",
        }
    }

    /// Size of the parameters.
    pub const fn params_bytes(self) -> u32 {
        let bytes = match self {
            Self::AttentionDense { .. } | Self::AttentionPacked { .. } | Self::AttentionFused { .. } => {
                size_of::<AttentionParams>()
            }
            Self::PackRows | Self::ScatterRows | Self::ZeroRows | Self::AlignRows { .. } => size_of::<CopyParams>(),
        };
        bytes as u32
    }

    pub fn bindings(self) -> &'static [Binding] {
        match self {
            Self::AttentionDense { .. } => ATTENTION_DENSE,
            Self::AttentionPacked { .. } => ATTENTION_PACKED,
            Self::AttentionFused { .. } => ATTENTION_FUSED,
            Self::PackRows => PACK_ROWS,
            Self::ScatterRows => SCATTER_ROWS,
            Self::ZeroRows => ZERO_ROWS,
            Self::AlignRows { .. } => ALIGN_ROWS,
        }
    }

    /// The whole WGSL text: parameters, bindings and constants, then the snippets in order.
    pub fn source(self, params: ParamsIn) -> String {
        let mut source = String::new();
        if let Some(Algorithm::Coop(_)) = self.algorithm() {
            source.push_str("enable f16;\nenable wgpu_cooperative_matrix;\n");
        }
        source.push_str(match self {
            Self::AttentionDense { .. } | Self::AttentionPacked { .. } | Self::AttentionFused { .. } => {
                AttentionParams::WGSL
            }
            _ => CopyParams::WGSL,
        });
        source.push_str(params.declaration());
        for (index, Binding { name, element, writes }) in self.bindings().iter().enumerate() {
            let (slot, access) = (index + 1, if *writes { "read_write" } else { "read" });
            // Writing to a String does not fail.
            let _ = writeln!(source, "@group(0) @binding({slot}) var<storage, {access}> {name}: array<{element}>;");
        }
        for (name, value) in self.constants() {
            let _ = writeln!(source, "const {name} = {value};");
        }
        for snippet in self.snippets() {
            source.push('\n');
            source.push_str(snippet);
        }
        match self.algorithm() {
            Some(Algorithm::Portable) => unrolled(&source, &self.portable_loops()),
            // Devices with matrices of 8 are processors, which take seconds to compile loops written out.
            Some(Algorithm::Coop(tile)) if tile.shape > 8 => unrolled(&source, &self.unrolled_loops(tile)),
            _ => source,
        }
    }

    fn portable_loops(self) -> Vec<(&'static str, u32)> {
        match self {
            Self::AttentionDense { dtype, head_dim, .. }
            | Self::AttentionPacked { dtype, head_dim, .. }
            | Self::AttentionFused { dtype, head_dim, .. } => {
                PortableTile::of(head_dim).unrolled_loops(dtype, head_dim)
            }
            _ => Vec::new(),
        }
    }

    /// Bounds of the loops that are written out, by their constants' names in `attention_coop.wgsl`.
    fn unrolled_loops(self, tile: CoopTile) -> [(&'static str, u32); 6] {
        let (Self::AttentionDense { head_dim, .. }
        | Self::AttentionPacked { head_dim, .. }
        | Self::AttentionFused { head_dim, .. }) = self
        else {
            return [("", 0); 6];
        };
        let dim = (head_dim as u32).next_multiple_of(tile.shape);
        let (dim_fragments, key_fragments) = (dim / tile.shape, tile.keys / tile.shape);
        [
            ("DIM_FRAGMENTS", dim_fragments),
            ("KEY_FRAGMENTS", key_fragments),
            ("SLICES", dim_fragments.div_ceil(key_fragments)),
            ("LANE_WORDS", (tile.keys / 8).div_ceil(tile.subgroup_size / tile.shape)),
            ("QUADS", tile.keys / 4 / (tile.subgroup_size / tile.shape)),
            ("FETCHES", (tile.keys * dim / 8).div_ceil(tile.subgroups * tile.subgroup_size)),
        ]
    }

    /// How attention is computed, if this computes it.
    fn algorithm(self) -> Option<Algorithm> {
        match self {
            Self::AttentionDense { algorithm, .. }
            | Self::AttentionPacked { algorithm, .. }
            | Self::AttentionFused { algorithm, .. } => Some(algorithm),
            _ => None,
        }
    }

    /// The head dimension of attention, 0 for what moves rows.
    fn head_dim(self) -> usize {
        match self {
            Self::AttentionDense { head_dim, .. }
            | Self::AttentionPacked { head_dim, .. }
            | Self::AttentionFused { head_dim, .. } => head_dim,
            _ => 0,
        }
    }

    /// Constants rather than overrides: they size private arrays, and branches on them must vanish before translation.
    fn constants(self) -> Vec<(&'static str, String)> {
        let mut constants = match self {
            Self::AttentionDense { head_dim, key_mask, zero_rows, bias, .. } => vec![
                ("HEAD_DIM", format!("{head_dim}u")),
                ("KEY_MASK", key_mask.to_string()),
                ("ZERO_ROWS", zero_rows.to_string()),
                ("BIAS", bias.is_some().to_string()),
            ],
            Self::AttentionPacked { head_dim, lse, .. } => {
                vec![("HEAD_DIM", format!("{head_dim}u")), ("WRITE_LSE", lse.to_string()), ("BIAS", false.to_string())]
            }
            Self::AttentionFused { head_dim, .. } => {
                vec![("HEAD_DIM", format!("{head_dim}u")), ("BIAS", false.to_string())]
            }
            _ => Vec::new(),
        };
        match self.algorithm() {
            None => (),
            Some(Algorithm::Portable) => {
                let tile = PortableTile::of(self.head_dim());
                constants.extend([
                    ("ROWS", format!("{}u", tile.rows)),
                    ("VECS", format!("{}u", tile.vecs)),
                    ("AHEAD", tile.fetches_ahead.to_string()),
                    ("TILE_ROWS", format!("{}u", tile.tile_rows())),
                    ("TILE_KEYS", format!("{}u", PortableTile::KEYS)),
                ]);
            }
            Some(Algorithm::Coop(tile)) => {
                constants.extend([
                    ("SUBGROUP_SIZE", format!("{}u", tile.subgroup_size)),
                    ("SUBGROUPS", format!("{}u", tile.subgroups)),
                    ("TILE_ROWS", format!("{}u", tile.rows())),
                    ("TILE_KEYS", format!("{}u", tile.keys)),
                ]);
            }
        }
        constants
    }

    fn snippets(self) -> Vec<&'static str> {
        match self {
            Self::AttentionDense { algorithm, dtype, bias, .. } => {
                let bias = match bias.unwrap_or(DType::F32) {
                    DType::F32 => include_str!("../../../shaders/shared/bias_f32.wgsl"),
                    DType::F16 => include_str!("../../../shaders/shared/bias_f16.wgsl"),
                    DType::Bf16 => include_str!("../../../shaders/shared/bias_bf16.wgsl"),
                };
                attention(algorithm, dtype, &[bias, include_str!("../../../shaders/shared/rows_dense.wgsl")])
            }
            Self::AttentionPacked { algorithm, dtype, .. } => {
                attention(algorithm, dtype, &[include_str!("../../../shaders/shared/rows_packed.wgsl")])
            }
            Self::AttentionFused { algorithm, dtype, .. } => {
                attention(algorithm, dtype, &[include_str!("../../../shaders/shared/rows_fused.wgsl")])
            }
            Self::PackRows => vec![include_str!("../../../shaders/pack_rows.wgsl")],
            Self::ScatterRows => vec![include_str!("../../../shaders/scatter_rows.wgsl")],
            Self::ZeroRows => vec![include_str!("../../../shaders/zero_rows.wgsl")],
            Self::AlignRows { element_bytes } => vec![
                if element_bytes == 2 {
                    include_str!("../../../shaders/shared/load_16bit.wgsl")
                } else {
                    include_str!("../../../shaders/shared/load_32bit.wgsl")
                },
                include_str!("../../../shaders/align_rows.wgsl"),
            ],
        }
    }
}

/// Snippets of an attention kernel; `rows` say where tiles lie and what is masked.
fn attention(algorithm: Algorithm, dtype: DType, rows: &[&'static str]) -> Vec<&'static str> {
    let mut snippets = vec![
        match dtype {
            DType::F32 => include_str!("../../../shaders/shared/element_f32.wgsl"),
            DType::F16 => include_str!("../../../shaders/shared/element_f16.wgsl"),
            DType::Bf16 => include_str!("../../../shaders/shared/element_bf16.wgsl"),
        },
        include_str!("../../../shaders/shared/tile.wgsl"),
    ];
    snippets.extend(rows);
    snippets.push(include_str!("../../../shaders/shared/kept.wgsl"));
    match algorithm {
        Algorithm::Portable => snippets.push(include_str!("../../../shaders/attention.wgsl")),
        Algorithm::Coop(tile) => snippets.extend([
            if tile.shape == 8 {
                include_str!("../../../shaders/shared/coop_8.wgsl")
            } else {
                include_str!("../../../shaders/shared/coop_16.wgsl")
            },
            if dtype == DType::F16 {
                include_str!("../../../shaders/shared/half_f16.wgsl")
            } else {
                include_str!("../../../shaders/shared/half_bf16.wgsl")
            },
            include_str!("../../../shaders/attention_coop.wgsl"),
        ]),
    }
    snippets
}

/// The source with every loop marked `// unroll` written out. Drivers keep an array in registers only where every index is a
/// constant, and not all of them unroll loops around matrices. A marked loop counts from 0 to one of the bounds, and ends at the
/// first `}` of its own indentation.
fn unrolled(source: &str, bounds: &[(&str, u32)]) -> String {
    fn write_out(lines: &[&str], bounds: &[(&str, u32)], out: &mut String) {
        let mut rest = lines;
        while let Some((line, after)) = rest.split_first() {
            rest = after;
            let indent = &line[..line.len() - line.trim_start().len()];
            let is_end = |other: &&str| other.strip_prefix(indent) == Some("}");
            let header = line.trim_start().strip_prefix("for (var ").filter(|_| line.ends_with("// unroll"));
            let marked = header.and_then(|header| {
                let (name, bound) = (header.split(' ').next()?, header.split("< ").nth(1)?.split(';').next()?);
                let count = bounds.iter().find(|(other, _)| *other == bound)?.1;
                Some((name, count, after.iter().position(is_end)?))
            });
            let Some((name, count, end)) = marked else {
                out.push_str(line);
                out.push('\n');
                continue;
            };
            for value in 0..count {
                // Writing to a String does not fail.
                let _ = writeln!(out, "{indent}{{\n{indent}let {name} = {value}u;");
                write_out(&after[..end], bounds, out);
                let _ = writeln!(out, "{indent}}}");
            }
            rest = &after[end + 1..];
        }
    }
    let lines: Vec<&str> = source.lines().collect();
    let mut out = String::new();
    write_out(&lines, bounds, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use naga::back::{hlsl, msl, spv};
    use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
    /// The least and the greatest, powers of two, and those whose last chunk of 64 is not full.
    const HEAD_DIMS: [usize; 10] = [8, 16, 32, 64, 72, 96, 128, 136, 192, 256];

    const COOP_TILES: [CoopTile; 3] = [
        CoopTile { shape: 16, subgroup_size: 32, subgroups: 8, keys: 32 },
        CoopTile { shape: 16, subgroup_size: 32, subgroups: 2, keys: 64 },
        CoopTile { shape: 8, subgroup_size: 8, subgroups: 4, keys: 16 },
    ];

    #[test]
    fn marked_loops_are_written_out() {
        let source = "for (var b = 0u; b < N; b++) { // unroll\n    for (var i = 0u; i < N; i++) { // unroll\n        f(b, i);\n    }\n}\n";
        let lines: Vec<String> = unrolled(source, &[("N", 2)]).lines().map(|line| line.trim().to_owned()).collect();
        let inner = |i: u32| ["{".to_owned(), format!("let i = {i}u;"), "f(b, i);".to_owned(), "}".to_owned()];
        let outer = |b: u32| {
            let head = ["{".to_owned(), format!("let b = {b}u;")];
            head.into_iter().chain(inner(0)).chain(inner(1)).chain(["}".to_owned()]).collect::<Vec<_>>()
        };
        assert_eq!(lines, [outer(0), outer(1)].concat());
        let marked: Vec<_> = coop_variants()
            .into_iter()
            .filter(|shader| shader.source(ParamsIn::Uniform).contains("// unroll"))
            .collect();
        let are_of_8 =
            marked.iter().all(|shader| matches!(shader.algorithm(), Some(Algorithm::Coop(t)) if t.shape == 8));
        assert!(are_of_8, "{marked:?}");
        // Of the portable kernel's, that over the columns of a chunk alone stays a loop, where the last chunk is not full.
        for shader in every_variant() {
            let source = shader.source(ParamsIn::Uniform);
            let mut left = source.lines().filter(|line| line.ends_with("// unroll"));
            assert!(left.all(|line| line.contains("column < columns")), "{shader:?}");
        }
    }

    fn every_variant() -> Vec<Shader> {
        let mut shaders = vec![
            Shader::PackRows,
            Shader::ScatterRows,
            Shader::ZeroRows,
            Shader::AlignRows { element_bytes: 2 },
            Shader::AlignRows { element_bytes: 4 },
        ];
        for dtype in DTYPES {
            shaders.extend(attention_variants(Algorithm::Portable, dtype));
        }
        shaders
    }

    fn coop_variants() -> Vec<Shader> {
        let dtypes = [DType::F16, DType::Bf16];
        let tiles = COOP_TILES.map(Algorithm::Coop);
        tiles.iter().flat_map(|tile| dtypes.map(|dtype| attention_variants(*tile, dtype))).flatten().collect()
    }

    fn attention_variants(algorithm: Algorithm, dtype: DType) -> Vec<Shader> {
        let mut shaders = Vec::new();
        for head_dim in HEAD_DIMS {
            for lse in [false, true] {
                shaders.push(Shader::AttentionPacked { algorithm, dtype, head_dim, lse });
            }
            shaders.push(Shader::AttentionFused { algorithm, dtype, head_dim });
            for (key_mask, zero_rows) in [(false, false), (true, false), (false, true), (true, true)] {
                shaders.push(Shader::AttentionDense { algorithm, dtype, head_dim, key_mask, zero_rows, bias: None });
            }
            for bias in [DType::F32, dtype] {
                let (key_mask, zero_rows, bias) = (false, false, Some(bias));
                shaders.push(Shader::AttentionDense { algorithm, dtype, head_dim, key_mask, zero_rows, bias });
            }
        }
        shaders
    }

    fn parse(shader: Shader) -> (naga::Module, ModuleInfo) {
        parse_with(shader, ParamsIn::Uniform)
    }

    fn parse_with(shader: Shader, params: ParamsIn) -> (naga::Module, ModuleInfo) {
        let source = shader.source(params);
        // `SHADER_FLOAT16_IN_FLOAT32` is WGSL's own `unpack2x16float`; nothing optional is allowed.
        let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        capabilities.set(Capabilities::IMMEDIATES, params == ParamsIn::Immediates);
        if let Some(Algorithm::Coop(_)) = shader.algorithm() {
            capabilities |= Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP;
        }
        let options = naga::front::wgsl::Options { parse_doc_comments: false, capabilities };
        let module = naga::front::wgsl::Frontend::new_with_options(options)
            .parse(&source)
            .unwrap_or_else(|error| panic!("{shader:?}: {}", error.emit_to_string(&source)));
        let info = Validator::new(ValidationFlags::all(), capabilities)
            .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
            .subgroup_operations(naga::valid::SubgroupOperationSet::all())
            .validate(&module)
            .unwrap_or_else(|error| panic!("{shader:?}: {}", error.emit_to_string(&source)));
        (module, info)
    }

    fn with_params(shaders: Vec<Shader>) -> impl Iterator<Item = (Shader, ParamsIn)> {
        shaders.into_iter().flat_map(|shader| [(shader, ParamsIn::Uniform), (shader, ParamsIn::Immediates)])
    }

    #[test]
    fn every_cooperative_variant_translates_to_spirv() {
        for (shader, params) in with_params(coop_variants()) {
            let (module, info) = parse_with(shader, params);
            let spirv = spv::write_vec(&module, &info, &spv::Options::default(), None);
            assert!(spirv.as_ref().is_ok_and(|words| words.len() > 100), "{shader:?}, {params:?}: SPIR-V: {spirv:?}");
        }
        println!("cooperative variants in HLSL: skipped, naga's writer has no cooperative matrices");
        println!("cooperative variants in MSL: skipped, its loads take pointers to elements, not to vectors of them");
    }

    #[test]
    fn every_variant_translates_to_spirv_msl_and_hlsl() {
        for (shader, params) in with_params(every_variant()) {
            let (module, info) = parse_with(shader, params);
            let spirv = spv::write_vec(&module, &info, &spv::Options::default(), None);
            assert!(spirv.is_ok_and(|words| words.len() > 100), "{shader:?}, {params:?}: SPIR-V");
            let msl = msl::write_string(
                &module,
                &info,
                &msl::Options { fake_missing_bindings: true, ..Default::default() },
                &msl::PipelineOptions::default(),
            );
            assert!(msl.is_ok_and(|(text, _)| text.contains("kernel void")), "{shader:?}, {params:?}: MSL");
            let mut text = String::new();
            let (options, pipeline) = (
                hlsl::Options {
                    fake_missing_bindings: true,
                    immediates_target: Some(hlsl::BindTarget::default()),
                    ..Default::default()
                },
                Default::default(),
            );
            let hlsl = hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None);
            assert!(hlsl.is_ok(), "{shader:?}, {params:?}: HLSL: {hlsl:?}");
            assert!(text.contains("numthreads"), "{shader:?}, {params:?}: HLSL has no entry point");
        }
    }

    fn workgroup_bytes(module: &naga::Module) -> u32 {
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap_or_else(|error| panic!("{error}"));
        let variables = module.global_variables.iter().map(|(_, variable)| variable);
        let shared = variables.filter(|variable| variable.space == naga::AddressSpace::WorkGroup);
        shared.map(|variable| layouter[variable.ty].size).sum()
    }

    #[test]
    fn every_variant_stays_inside_the_default_limits() {
        let limits = wgpu::Limits::default();
        for shader in every_variant() {
            let (module, _) = parse(shader);
            let shared = workgroup_bytes(&module);
            assert!(shared <= limits.max_compute_workgroup_storage_size, "{shader:?}: {shared} bytes");
            let [x, y, z] = module.entry_points[0].workgroup_size;
            assert!(x * y * z <= limits.max_compute_invocations_per_workgroup, "{shader:?}");
            assert!(shader.bindings().len() as u32 <= limits.max_storage_buffers_per_shader_stage, "{shader:?}");
            assert_eq!(module.entry_points[0].name, shader.entry_point());
        }
    }

    #[test]
    fn a_cooperative_tile_knows_its_workgroup_memory() {
        for shader in coop_variants() {
            let (module, _) = parse(shader);
            let Some(Algorithm::Coop(tile)) = shader.algorithm() else { panic!("{shader:?}") };
            let (Shader::AttentionDense { head_dim, .. }
            | Shader::AttentionPacked { head_dim, .. }
            | Shader::AttentionFused { head_dim, .. }) = shader
            else {
                panic!("{shader:?}")
            };
            assert_eq!(workgroup_bytes(&module), tile.workgroup_bytes(head_dim), "{shader:?}");
            let [x, ..] = module.entry_points[0].workgroup_size;
            assert_eq!(x, tile.subgroups * tile.subgroup_size, "{shader:?}");
            assert_eq!(module.entry_points[0].name, shader.entry_point());
        }
    }

    #[test]
    fn a_broken_shader_does_not_pass() {
        let source = Shader::PackRows.source(ParamsIn::Uniform).replace("indices[", "missing[");
        assert!(naga::front::wgsl::parse_str(&source).is_err());
    }
}
