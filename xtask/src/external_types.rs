//! Types of other crates in the library's API. Their major versions are part of it.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::workspace::{Workspace, cargo, run};

/// Crates whose types the API may name: Rust's own, those that the library re-exports, the crate of
/// rayon's pools, and bytemuck, whose trait bounds `Element` and `DeviceMemory`.
const ALLOWED: &[&str] = &["alloc", "bytemuck", "core", "half", "rayon_core", "std", "wgpu"];

/// Fails with every type of a crate that is not allowed.
pub fn check(workspace: &Workspace) -> Result<()> {
    let mut rustdoc = cargo();
    rustdoc.current_dir(&workspace.root).env("RUSTDOC", workspace.root.join("scripts/rustdoc_unstable.sh"));
    rustdoc.args(["rustdoc", "--release", "-p", "varlen-fa", "--lib", "--"]);
    run(rustdoc.args(["-Zunstable-options", "--output-format", "json"]))?;
    let path = workspace.target.join("doc/varlen_fa.json");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let types = external_types(&serde_json::from_str(&text)?)?;
    ensure!(!types.is_empty(), "{} names no type of another crate, not even of core", path.display());
    let crates: BTreeSet<&str> = types.iter().map(|(name, _)| name.as_str()).collect();
    println!("the API has types of {}", crates.iter().copied().collect::<Vec<_>>().join(", "));
    let faults: Vec<_> = types.iter().filter(|(name, _)| !ALLOWED.contains(&name.as_str())).collect();
    ensure!(faults.is_empty(), "types of other crates than {}: {faults:?}", ALLOWED.join(", "));
    Ok(())
}

/// The crates and paths of all types and traits that public items name, from rustdoc's JSON. It lists public items only. Impls
/// that the compiler or a blanket gives are not ours.
fn external_types(document: &Value) -> Result<BTreeSet<(String, String)>> {
    let index = document["index"].as_object().context("rustdoc's JSON has no index")?;
    let mut types = BTreeSet::new();
    for item in index.values() {
        let of_impl = &item["inner"]["impl"];
        let is_given = of_impl["is_synthetic"] == true || !of_impl["blanket_impl"].is_null();
        if item["crate_id"] == 0 && !is_given {
            collect(&item["inner"], document, &mut types);
        }
    }
    Ok(types)
}

/// A type or trait with its arguments is an object with `id` and `args`.
fn collect(value: &Value, document: &Value, types: &mut BTreeSet<(String, String)>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| collect(value, document, types)),
        Value::Object(fields) => {
            if let (Some(id), true) = (fields.get("id"), fields.contains_key("args")) {
                let path = &document["paths"][id.to_string()];
                let name = &document["external_crates"][path["crate_id"].to_string()]["name"];
                if let (Some(name), Some(segments)) = (name.as_str(), path["path"].as_array()) {
                    let segments: Vec<_> = segments.iter().filter_map(Value::as_str).collect();
                    types.insert((name.to_owned(), segments.join("::")));
                }
            }
            fields.values().for_each(|value| collect(value, document, types));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::external_types;

    #[test]
    fn types_are_found_in_signatures_and_given_impls_are_passed_over() {
        let named = |id: u32| json!({"resolved_path": {"path": "x", "id": id, "args": null}});
        let document = json!({
            "index": {
                "1": {"crate_id": 0, "inner": {"function": {"sig": {"inputs": [["a", named(10)]], "output": named(1)}}}},
                "2": {"crate_id": 0, "inner": {"impl": {"is_synthetic": true, "trait": {"id": 11, "args": null}}}},
                "3": {"crate_id": 0, "inner": {"impl": {"is_synthetic": false, "blanket_impl": named(11)}}},
                "4": {"crate_id": 0, "inner": {"impl": {"is_synthetic": false, "trait": {"id": 12, "args": null}}}},
            },
            "paths": {
                "1": {"crate_id": 0, "path": ["ours", "Own"]},
                "10": {"crate_id": 5, "path": ["half", "f16"]},
                "11": {"crate_id": 6, "path": ["hidden", "Trait"]},
                "12": {"crate_id": 7, "path": ["core", "Clone"]},
            },
            "external_crates": {"5": {"name": "half"}, "6": {"name": "hidden"}, "7": {"name": "core"}},
        });
        let found: Vec<_> = external_types(&document).unwrap().into_iter().map(|(_, path)| path).collect();
        assert_eq!(found, ["core::Clone", "half::f16"]);
        assert!(external_types(&json!({})).is_err());
    }
}
