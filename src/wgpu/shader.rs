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

/// One compute pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Shader {
    AttentionDense { dtype: DType, head_dim: usize, key_mask: bool, zero_rows: bool, bias: Option<DType> },
    AttentionPacked { dtype: DType, head_dim: usize, lse: bool },
    AttentionFused { dtype: DType, head_dim: usize },
    PackRows,
    ScatterRows,
    ZeroRows,
    AlignRows { element_bytes: usize },
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
    pub fn source(self) -> String {
        let mut source = String::from(match self {
            Self::AttentionDense { .. } | Self::AttentionPacked { .. } | Self::AttentionFused { .. } => {
                AttentionParams::WGSL
            }
            _ => CopyParams::WGSL,
        });
        source.push_str("@group(0) @binding(0) var<uniform> params: Params;\n");
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
        source
    }

    /// Constants rather than overrides: they size private arrays, and branches on them must vanish before translation.
    fn constants(self) -> Vec<(&'static str, String)> {
        match self {
            Self::AttentionDense { head_dim, key_mask, zero_rows, bias, .. } => vec![
                ("HEAD_DIM", format!("{head_dim}u")),
                ("KEY_MASK", key_mask.to_string()),
                ("ZERO_ROWS", zero_rows.to_string()),
                ("BIAS", bias.is_some().to_string()),
            ],
            Self::AttentionPacked { head_dim, lse, .. } => {
                vec![("HEAD_DIM", format!("{head_dim}u")), ("WRITE_LSE", lse.to_string())]
            }
            Self::AttentionFused { head_dim, .. } => vec![("HEAD_DIM", format!("{head_dim}u"))],
            _ => Vec::new(),
        }
    }

    fn snippets(self) -> Vec<&'static str> {
        let element = |dtype| match dtype {
            DType::F32 => include_str!("../../shaders/shared/element_f32.wgsl"),
            DType::F16 => include_str!("../../shaders/shared/element_f16.wgsl"),
            DType::Bf16 => include_str!("../../shaders/shared/element_bf16.wgsl"),
        };
        let tile = include_str!("../../shaders/shared/tile.wgsl");
        let attention = include_str!("../../shaders/attention.wgsl");
        match self {
            Self::AttentionDense { dtype, bias, .. } => {
                let bias = match bias.unwrap_or(DType::F32) {
                    DType::F32 => include_str!("../../shaders/shared/bias_f32.wgsl"),
                    DType::F16 => include_str!("../../shaders/shared/bias_f16.wgsl"),
                    DType::Bf16 => include_str!("../../shaders/shared/bias_bf16.wgsl"),
                };
                vec![element(dtype), tile, bias, include_str!("../../shaders/shared/rows_dense.wgsl"), attention]
            }
            Self::AttentionPacked { dtype, .. } => {
                vec![element(dtype), tile, include_str!("../../shaders/shared/rows_packed.wgsl"), attention]
            }
            Self::AttentionFused { dtype, .. } => {
                vec![element(dtype), tile, include_str!("../../shaders/shared/rows_fused.wgsl"), attention]
            }
            Self::PackRows => vec![include_str!("../../shaders/pack_rows.wgsl")],
            Self::ScatterRows => vec![include_str!("../../shaders/scatter_rows.wgsl")],
            Self::ZeroRows => vec![include_str!("../../shaders/zero_rows.wgsl")],
            Self::AlignRows { element_bytes } => vec![
                if element_bytes == 2 {
                    include_str!("../../shaders/shared/load_16bit.wgsl")
                } else {
                    include_str!("../../shaders/shared/load_32bit.wgsl")
                },
                include_str!("../../shaders/align_rows.wgsl"),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use naga::back::{hlsl, msl, spv};
    use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
    /// The least and the greatest, powers of two, and those whose last chunk of 64 is not full.
    const HEAD_DIMS: [usize; 10] = [8, 16, 32, 64, 72, 96, 128, 136, 192, 256];

    fn every_variant() -> Vec<Shader> {
        let mut shaders = vec![
            Shader::PackRows,
            Shader::ScatterRows,
            Shader::ZeroRows,
            Shader::AlignRows { element_bytes: 2 },
            Shader::AlignRows { element_bytes: 4 },
        ];
        for dtype in DTYPES {
            for head_dim in HEAD_DIMS {
                for lse in [false, true] {
                    shaders.push(Shader::AttentionPacked { dtype, head_dim, lse });
                }
                shaders.push(Shader::AttentionFused { dtype, head_dim });
                for (key_mask, zero_rows) in [(false, false), (true, false), (false, true), (true, true)] {
                    shaders.push(Shader::AttentionDense { dtype, head_dim, key_mask, zero_rows, bias: None });
                }
                for bias in [DType::F32, dtype] {
                    let (key_mask, zero_rows, bias) = (false, false, Some(bias));
                    shaders.push(Shader::AttentionDense { dtype, head_dim, key_mask, zero_rows, bias });
                }
            }
        }
        shaders
    }

    fn parse(shader: Shader) -> (naga::Module, ModuleInfo) {
        let source = shader.source();
        // `SHADER_FLOAT16_IN_FLOAT32` is WGSL's own `unpack2x16float`; nothing optional is allowed.
        let capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|error| panic!("{shader:?}: {}", error.emit_to_string(&source)));
        let info = Validator::new(ValidationFlags::all(), capabilities)
            .validate(&module)
            .unwrap_or_else(|error| panic!("{shader:?}: {}", error.emit_to_string(&source)));
        (module, info)
    }

    #[test]
    fn every_variant_translates_to_spirv_msl_and_hlsl() {
        for shader in every_variant() {
            let (module, info) = parse(shader);
            let spirv = spv::write_vec(&module, &info, &spv::Options::default(), None);
            assert!(spirv.is_ok_and(|words| words.len() > 100), "{shader:?}: SPIR-V");
            let msl = msl::write_string(
                &module,
                &info,
                &msl::Options { fake_missing_bindings: true, ..Default::default() },
                &msl::PipelineOptions::default(),
            );
            assert!(msl.is_ok_and(|(text, _)| text.contains("kernel void")), "{shader:?}: MSL");
            let mut text = String::new();
            let (options, pipeline) =
                (hlsl::Options { fake_missing_bindings: true, ..Default::default() }, Default::default());
            let hlsl = hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None);
            assert!(hlsl.is_ok(), "{shader:?}: HLSL: {hlsl:?}");
            assert!(text.contains("numthreads"), "{shader:?}: HLSL has no entry point");
        }
    }

    #[test]
    fn every_variant_stays_inside_the_default_limits() {
        let limits = wgpu::Limits::default();
        for shader in every_variant() {
            let (module, _) = parse(shader);
            let mut layouter = naga::proc::Layouter::default();
            layouter.update(module.to_ctx()).unwrap_or_else(|error| panic!("{shader:?}: {error}"));
            let shared: u32 = module
                .global_variables
                .iter()
                .filter(|(_, variable)| variable.space == naga::AddressSpace::WorkGroup)
                .map(|(_, variable)| layouter[variable.ty].size)
                .sum();
            assert!(shared <= limits.max_compute_workgroup_storage_size, "{shader:?}: {shared} bytes");
            let [x, y, z] = module.entry_points[0].workgroup_size;
            assert!(x * y * z <= limits.max_compute_invocations_per_workgroup, "{shader:?}");
            assert!(shader.bindings().len() as u32 <= limits.max_storage_buffers_per_shader_stage, "{shader:?}");
            assert_eq!(module.entry_points[0].name, shader.entry_point());
        }
    }

    #[test]
    fn a_broken_shader_does_not_pass() {
        let source = Shader::PackRows.source().replace("indices[", "missing[");
        assert!(naga::front::wgsl::parse_str(&source).is_err());
    }
}
