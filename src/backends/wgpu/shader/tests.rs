//! Every variant against naga: valid, translated, and inside the default limits.

use crate::dtype::DType;
use crate::score_modifiers::ModifierSet;

use super::*;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
/// The least and the greatest, powers of two, and those whose last chunk of 64 is not full.
const HEAD_DIMS: [usize; 10] = [8, 16, 32, 64, 72, 96, 128, 136, 192, 256];
/// Those of the portable kernel alone: with the blocks of 512 columns.
const WIDE_HEAD_DIMS: [usize; 3] = [264, 384, 512];

const COOP_TILES: [CoopTile; 4] = [
    CoopTile { shape: 16, subgroup_size: 32, subgroups: 8, keys: 32 },
    CoopTile { shape: 16, subgroup_size: 32, subgroups: 2, keys: 64 },
    CoopTile { shape: 16, subgroup_size: 32, subgroups: 4, keys: 16 },
    CoopTile { shape: 8, subgroup_size: 8, subgroups: 4, keys: 16 },
];

#[test]
fn marked_loops_are_unrolled_but_those_without_a_constant_bound() {
    // The portable kernel's loop over the columns of a chunk, where the last chunk is not full; and
    // every loop of the kernel on matrices of 8, whose devices compile unrolled loops for seconds.
    for shader in portable_variants().chain(coop_variants()) {
        let is_of_8 = matches!(shader.algorithm, Algorithm::Coop(tile) if tile.shape == 8);
        let text = source(Shader::Attention(shader), ParamsIn::Uniform);
        let mut left = text.lines().filter(|line| line.ends_with("// unroll"));
        assert!(is_of_8 || left.all(|line| line.contains("column < columns")), "{shader:?}");
    }
}

fn every_variant() -> Vec<Shader> {
    let copies = [
        Shader::PackRows,
        Shader::ScatterRows,
        Shader::ZeroRows,
        Shader::MoveRows,
        Shader::AlignRows { element_bytes: 2 },
        Shader::AlignRows { element_bytes: 4 },
        Shader::NarrowRows { element_bytes: 2 },
        Shader::NarrowRows { element_bytes: 4 },
        Shader::ScatterLse,
        Shader::NoKeys,
    ];
    let merges = DTYPES.map(|dtype| Shader::Merge { dtype });
    let prepared = DTYPES.into_iter().flat_map(|dtype| {
        let accesses = [HeadAccess::Octets, HeadAccess::Pairs, HeadAccess::Elements];
        let exists = move |access: &HeadAccess| *access != HeadAccess::Elements || dtype != DType::F32;
        accesses.into_iter().filter(exists).flat_map(move |access| {
            let forms = [(false, false), (true, false), (false, true), (true, true)];
            forms.map(|(in_place, joins)| Shader::PrepareQk(PrepareQkShader { dtype, in_place, access, joins }))
        })
    });
    let steps =
        [MetadataStep::Bits, MetadataStep::Blocks, MetadataStep::Starts, MetadataStep::Lists, MetadataStep::Tiles];
    let of_queries = [RangesOf::Fused, RangesOf::Packed, RangesOf::Dense].map(RangesStep::Queries);
    let of_tiles = [true, false].map(|listed| RangesStep::Tiles { listed });
    copies
        .into_iter()
        .chain(merges)
        .chain(prepared)
        .chain(steps.map(Shader::Metadata))
        .chain(of_queries.map(Shader::Ranges))
        .chain(of_tiles.map(Shader::Ranges))
        .chain(portable_variants().map(Shader::Attention))
        .collect()
}

fn portable_variants() -> impl Iterator<Item = AttentionShader> {
    DTYPES.into_iter().flat_map(|dtype| attention_variants(Algorithm::Portable, dtype))
}

fn coop_variants() -> impl Iterator<Item = AttentionShader> {
    let dtypes = [DType::F16, DType::Bf16];
    let tiles = COOP_TILES.map(Algorithm::Coop);
    let whole = tiles.into_iter().flat_map(move |tile| dtypes.map(|dtype| attention_variants(tile, dtype))).flatten();
    whole.flat_map(|shader| {
        let split = shader.with_splits(usize::MAX);
        let merged = split.map(|split| AttentionShader { tiles: TileKeys::Merged, ..split });
        [shader].into_iter().chain(split).chain(merged)
    })
}

fn attention_variants(algorithm: Algorithm, dtype: DType) -> Vec<AttentionShader> {
    let masks = [(false, false), (true, false), (false, true), (true, true)];
    let dense = masks.map(|(key_mask, zero_rows)| AttentionRows::Dense { key_mask, zero_rows, bias: None });
    let biased = [(DType::F32, false), (dtype, true)].map(|(bias, masks)| AttentionRows::Dense {
        key_mask: masks,
        zero_rows: masks,
        bias: Some(bias),
    });
    let fused = [None, Some(dtype)].map(|bias| AttentionRows::Fused { bias });
    let rows = [&dense[..], &biased, &[AttentionRows::Packed], &fused].concat();
    let of_width = |head_dim| {
        let of_rows = move |&rows| {
            let none = ModifierSet::default();
            // Modifiers beside neither or both of the others: they are lines of their own.
            let of = [
                (false, false, none),
                (false, true, none),
                (true, false, none),
                (true, true, none),
                (false, false, ModifierSet::ALL),
                (true, true, ModifierSet::ALL),
            ];
            // No plan has both on the fused path.
            let exists = move |lse| !(lse && matches!(rows, AttentionRows::Fused { bias: Some(_) }));
            let of = of.into_iter().filter(move |&(_, lse, _)| exists(lse));
            of.map(move |(ranges, lse, modifiers)| AttentionShader {
                algorithm,
                dtype,
                head_dim,
                rows,
                ranges,
                lse,
                modifiers,
                out_buffers: 0,
                tiles: TileKeys::All,
            })
        };
        rows.iter().flat_map(of_rows)
    };
    // How many buffers an output lies in is a matter of a few lines; one width shows them.
    let in_segments = of_width(64).filter(|shader| shader.rows != AttentionRows::Packed).collect::<Vec<_>>();
    let in_segments = in_segments
        .into_iter()
        .flat_map(|shader| (1..=4).map(move |out_buffers| AttentionShader { out_buffers, ..shader }));
    let wide = WIDE_HEAD_DIMS.into_iter().filter(|_| algorithm == Algorithm::Portable);
    HEAD_DIMS.into_iter().chain(wide).flat_map(of_width).chain(in_segments).collect()
}

fn parse(shader: Shader, params: ParamsIn) -> (naga::Module, ModuleInfo) {
    let text = source(shader, params);
    // `SHADER_FLOAT16_IN_FLOAT32` is WGSL's own `unpack2x16float`; nothing optional is allowed.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::IMMEDIATES, params == ParamsIn::Immediates);
    if let Shader::Attention(AttentionShader { algorithm: Algorithm::Coop(_), .. }) = shader {
        capabilities |= Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP;
    }
    let options = naga::front::wgsl::Options { parse_doc_comments: false, capabilities };
    let module = naga::front::wgsl::Frontend::new_with_options(options)
        .parse(&text)
        .unwrap_or_else(|error| panic!("{shader:?}: {}", error.emit_to_string(&text)));
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all())
        .validate(&module)
        .unwrap_or_else(|error| panic!("{shader:?}: {}", error.emit_to_string(&text)));
    (module, info)
}

/// Each shader with parameters in a uniform buffer; where they are declared is one line, so in the
/// command buffer those of one head dimension, which saves half of the time.
fn with_params(shaders: impl IntoIterator<Item = Shader>) -> impl Iterator<Item = (Shader, ParamsIn)> {
    let in_commands = |shader: Shader| match shader {
        Shader::Attention(AttentionShader { head_dim, .. }) => head_dim == HEAD_DIMS[0],
        _ => true,
    };
    shaders.into_iter().flat_map(move |shader| {
        let uniform = Some((shader, ParamsIn::Uniform));
        let immediates = in_commands(shader).then_some((shader, ParamsIn::Immediates));
        uniform.into_iter().chain(immediates)
    })
}

// Parsing and validating take most of the time, so each module is made once for all that is asked of
// it.
#[test]
fn every_cooperative_variant_knows_its_workgroup_memory_and_translates_to_spirv() {
    for (shader, params) in with_params(coop_variants().map(Shader::Attention)) {
        let (module, info) = parse(shader, params);
        knows_its_workgroup_memory(shader, &module);
        let spirv = spv::write_vec(&module, &info, &spv::Options::default(), None);
        assert!(spirv.as_ref().is_ok_and(|words| words.len() > 100), "{shader:?}, {params:?}: SPIR-V: {spirv:?}");
    }
    println!("cooperative variants in HLSL: skipped, naga's writer has no cooperative matrices");
    println!("cooperative variants in MSL: skipped, its loads take pointers to elements, not to vectors of them");
}

#[test]
fn every_variant_stays_inside_the_default_limits_and_translates_to_spirv_msl_and_hlsl() {
    for (shader, params) in with_params(every_variant()) {
        let (module, info) = parse(shader, params);
        stays_inside_the_default_limits(shader, &module);
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

fn stays_inside_the_default_limits(shader: Shader, module: &naga::Module) {
    let limits = wgpu::Limits::default();
    let shared = workgroup_bytes(module);
    assert!(shared <= limits.max_compute_workgroup_storage_size, "{shader:?}: {shared} bytes");
    let [x, y, z] = module.entry_points[0].workgroup_size;
    assert!(x * y * z <= limits.max_compute_invocations_per_workgroup, "{shader:?}");
    let is_optional = matches!(shader, Shader::Attention(AttentionShader { out_buffers: 2.., .. }));
    assert!(shader.bindings().len() as u32 <= MAX_STORAGE_BUFFERS || is_optional, "{shader:?}");
    assert_eq!(module.entry_points[0].name, shader.entry_point());
}

fn knows_its_workgroup_memory(shader: Shader, module: &naga::Module) {
    let Shader::Attention(AttentionShader { algorithm: Algorithm::Coop(tile), head_dim, .. }) = shader else {
        panic!("{shader:?}")
    };
    let is_merge = matches!(shader, Shader::Attention(AttentionShader { tiles: TileKeys::Merged, .. }));
    assert_eq!(workgroup_bytes(module), if is_merge { 0 } else { tile.workgroup_bytes(head_dim) }, "{shader:?}");
    let [x, ..] = module.entry_points[0].workgroup_size;
    assert_eq!(x, tile.subgroups * tile.subgroup_size, "{shader:?}");
    assert_eq!(module.entry_points[0].name, shader.entry_point());
}

#[test]
fn tiles_are_split_where_a_storage_buffer_is_left() {
    let shader = |rows, out_buffers| AttentionShader {
        algorithm: Algorithm::Coop(COOP_TILES[0]),
        dtype: DType::F16,
        head_dim: 128,
        rows,
        ranges: false,
        lse: false,
        modifiers: ModifierSet::default(),
        out_buffers,
        tiles: TileKeys::All,
    };
    let dense = AttentionRows::Dense { key_mask: false, zero_rows: true, bias: None };
    let fused = AttentionRows::Fused { bias: None };
    // Of an output in as many buffers, and the storage buffers that its splits need.
    for (rows, out_buffers, needed) in
        [(AttentionRows::Packed, 0, 7), (dense, 0, 6), (dense, 2, 7), (fused, 0, 8), (fused, 1, 8), (fused, 4, 11)]
    {
        let shader = shader(rows, out_buffers);
        let split = shader.with_splits(needed);
        assert_eq!(split, Some(AttentionShader { tiles: TileKeys::LastSplit, ..shader }), "{shader:?}");
        assert_eq!(shader.with_splits(needed - 1), None, "{shader:?}");
    }
}

#[test]
fn a_broken_shader_does_not_pass() {
    let text = source(Shader::PackRows, ParamsIn::Uniform).replace("indices[", "missing[");
    assert!(naga::front::wgsl::parse_str(&text).is_err());
}
