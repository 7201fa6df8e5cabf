//! The WGSL sources and the few lines that join them.
//!
//! A shader is a file with one entry point, `main`; `#import name` on a line of its own stands for
//! `shaders/shared/name.wgsl`, once. *Helps* keep shaders plain files that editors and naga understand.
//! *Hurts* error messages, which count lines of the joined text; the tests validate every shader, so users
//! do not meet them.

/// Every shader: its name, which is that of its kernel, and its source.
pub(crate) const SHADERS: &[(&str, &str)] = &[
    ("attend", include_str!("../../../shaders/attend.wgsl")),
    ("attend_factored", include_str!("../../../shaders/attend_factored.wgsl")),
    ("attention_mass", include_str!("../../../shaders/attention_mass.wgsl")),
    ("code_scores", include_str!("../../../shaders/code_scores.wgsl")),
    ("dot_scores", include_str!("../../../shaders/dot_scores.wgsl")),
    ("gather", include_str!("../../../shaders/gather.wgsl")),
    ("linear", include_str!("../../../shaders/linear.wgsl")),
    ("merge_partials", include_str!("../../../shaders/merge_partials.wgsl")),
    ("merge_rows", include_str!("../../../shaders/merge_rows.wgsl")),
    ("nearest", include_str!("../../../shaders/nearest.wgsl")),
    ("pool", include_str!("../../../shaders/pool.wgsl")),
    ("rebuild", include_str!("../../../shaders/rebuild.wgsl")),
    ("rope", include_str!("../../../shaders/rope.wgsl")),
    ("row_norms", include_str!("../../../shaders/row_norms.wgsl")),
    ("top_k", include_str!("../../../shaders/top_k.wgsl")),
    ("weigh_values", include_str!("../../../shaders/weigh_values.wgsl")),
    ("window_scores", include_str!("../../../shaders/window_scores.wgsl")),
];

const SHARED: &[(&str, &str)] = &[
    ("chunk", include_str!("../../../shaders/shared/chunk.wgsl")),
    ("element", include_str!("../../../shaders/shared/element.wgsl")),
    ("group", include_str!("../../../shaders/shared/group.wgsl")),
    ("logit", include_str!("../../../shaders/shared/logit.wgsl")),
    ("narrow", include_str!("../../../shaders/shared/narrow.wgsl")),
    ("packed", include_str!("../../../shaders/shared/packed.wgsl")),
    ("weights", include_str!("../../../shaders/shared/weights.wgsl")),
];

fn find(table: &[(&'static str, &'static str)], name: &str) -> Option<&'static str> {
    table.iter().find(|(n, _)| *n == name).map(|(_, source)| *source)
}

/// The whole text of a shader, imports included; `None` if there is no such shader or import.
pub(crate) fn source(name: &str) -> Option<String> {
    expand(find(SHADERS, name)?, &|import| find(SHARED, import))
}

fn expand(text: &str, shared: &dyn Fn(&str) -> Option<&'static str>) -> Option<String> {
    fn add(
        text: &str,
        shared: &dyn Fn(&str) -> Option<&'static str>,
        done: &mut Vec<String>,
        out: &mut String,
    ) -> Option<()> {
        for line in text.lines() {
            let Some(name) = line.strip_prefix("#import ") else {
                out.push_str(line);
                out.push('\n');
                continue;
            };
            let name = name.trim();
            if !done.iter().any(|d| d == name) {
                done.push(name.to_owned());
                add(shared(name)?, shared, done, out)?;
            }
        }
        Some(())
    }
    let mut out = String::with_capacity(2 * text.len());
    add(text, shared, &mut Vec::new(), &mut out)?;
    Some(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use bytemuck::Zeroable;
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    fn module(name: &str) -> naga::Module {
        let text = source(name).unwrap();
        naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&text)))
    }

    #[test]
    fn imports_are_joined_once_and_nested() {
        let shared = |name: &str| match name {
            "a" => Some("#import b\na"),
            "b" => Some("#import a\nb"),
            _ => None,
        };
        assert_eq!(expand("#import a\n#import b\nmain", &shared).unwrap(), "b\na\nmain\n");
        assert_eq!(expand("#import missing", &shared), None);
    }

    #[test]
    fn every_shader_parses_validates_and_asks_for_no_feature() {
        for (name, _) in SHADERS {
            let module = module(name);
            // What a device without optional features may run.
            let allowed = Capabilities::default() | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
            Validator::new(ValidationFlags::all(), allowed)
                .validate(&module)
                .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source(name).unwrap())));
            assert_eq!(module.entry_points.len(), 1, "{name}");
            let entry = &module.entry_points[0];
            assert_eq!(entry.name, "main");
            assert!(entry.workgroup_size.iter().product::<u32>() <= 256, "{name}");
            let storage = module
                .global_variables
                .iter()
                .filter(|(_, v)| matches!(v.space, naga::AddressSpace::Storage { .. }))
                .count();
            assert!(storage <= 8, "{name} binds {storage} storage buffers");
            let layouter = {
                let mut l = naga::proc::Layouter::default();
                l.update(module.to_ctx()).unwrap();
                l
            };
            let workgroup: u32 = module
                .global_variables
                .iter()
                .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
                .map(|(_, v)| layouter[v.ty].size)
                .sum();
            assert!(workgroup <= 16 << 10, "{name} uses {workgroup} bytes of workgroup memory");
        }
    }

    /// Offsets and size of the struct `name` of a shader.
    fn wgsl_layout(shader: &str, name: &str) -> (Vec<u32>, u32) {
        let module = module(shader);
        let found = module.types.iter().find(|(_, t)| t.name.as_deref() == Some(name));
        match &found.unwrap_or_else(|| panic!("{shader} has no {name}")).1.inner {
            naga::TypeInner::Struct { members, span } => (members.iter().map(|m| m.offset).collect(), *span),
            other => panic!("{other:?}"),
        }
    }

    fn matches<T: bytemuck::Pod + Zeroable>(shader: &str, name: &str) {
        // All are plain runs of 4-byte scalars, so equal size and dense offsets are equal layouts.
        let (offsets, size) = wgsl_layout(shader, name);
        assert_eq!(size as usize, size_of::<T>(), "{shader}::{name}");
        let dense: Vec<u32> = (0..size / 4).map(|i| 4 * i).collect();
        assert_eq!(offsets, dense, "{shader}::{name}");
    }

    #[test]
    fn structs_have_the_layout_of_their_rust_twins() {
        use crate::device::gpu::side::Pack;
        use crate::kernel;
        let packed = [
            "attend",
            "attention_mass",
            "dot_scores",
            "gather",
            "row_norms",
            "weigh_values",
            "window_scores",
        ];
        for shader in packed {
            matches::<Pack>(shader, "Pack");
        }
        matches::<kernel::attend::gpu::Params>("attend", "AttentionParams");
        matches::<kernel::attend::gpu::Params>("attention_mass", "AttentionParams");
        matches::<kernel::attend::gpu::Stretch>("attend", "Stretch");
        matches::<kernel::attention_mass::gpu::Chunk>("attention_mass", "Chunk");
        matches::<kernel::attention_mass::gpu::Chunk>("window_scores", "Chunk");
        matches::<kernel::code_scores::gpu::Params>("code_scores", "Params");
        matches::<kernel::code_scores::gpu::Chunk>("code_scores", "Chunk");
        matches::<kernel::attend::gpu::Params>("dot_scores", "AttentionParams");
        matches::<kernel::attention_mass::gpu::Chunk>("dot_scores", "Chunk");
        matches::<kernel::linear::gpu::Params>("linear", "Params");
        matches::<kernel::merge_partials::gpu::Params>("merge_partials", "Params");
        matches::<kernel::merge_partials::gpu::Row>("merge_partials", "Row");
        matches::<kernel::merge_rows::gpu::Params>("merge_rows", "Params");
        matches::<kernel::merge_rows::gpu::Sum>("merge_rows", "Sum");
        matches::<kernel::merge_rows::gpu::Weight>("merge_rows", "Weight");
        matches::<kernel::nearest::gpu::Params>("nearest", "Params");
        matches::<kernel::row_norms::gpu::Params>("row_norms", "Params");
        matches::<kernel::row_norms::gpu::Chunk>("row_norms", "Chunk");
        matches::<kernel::pool::gpu::Params>("pool", "Params");
        matches::<kernel::top_k::gpu::Params>("top_k", "Params");
        matches::<kernel::top_k::gpu::Row>("top_k", "Row");
        matches::<kernel::gather::gpu::Params>("gather", "Params");
        matches::<kernel::gather::gpu::Entry>("gather", "Entry");
        matches::<kernel::rope::gpu::Params>("rope", "Params");
        matches::<kernel::weigh_values::gpu::Params>("weigh_values", "Params");
        matches::<kernel::weigh_values::gpu::Stretch>("weigh_values", "Stretch");
    }
}
