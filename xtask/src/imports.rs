//! Which files of a package import which: they make no circle, and the library's rooms import only
//! from those below them.
//!
//! An import is a path that leads to another file of the package, in a `use` or elsewhere; a name
//! that a file only passes on counts as the file's where it is declared. Unit tests are left out, and
//! so is what stands inside macro calls.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree, Visibility};

use crate::workspace::Workspace;

/// Folders of packages' sources.
const SOURCES: &[&str] = &[
    "src",
    "capi/src",
    "cli/src",
    "python/src",
    "testkit/src",
    "harness/src",
    "tests/suite",
    "adapters/burn/src",
    "adapters/burn/examples/encoder/src",
    "adapters/candle/src",
    "adapters/candle/tests/suite",
    "adapters/candle/examples/minilm/src",
    "examples/embed_sentences/src",
    "examples/joint_block",
    "examples/masked_attention",
    "examples/sequence_parallel",
    "examples/web/src",
    "fuzz/targets/capi",
    "xtask/src",
];

/// The rooms of `src/`, files and folders, from the lowest. Those of one line do not import one
/// another unless the line is the vocabulary, the first.
const ROOMS: &[&[&str]] = &[
    &["error", "dtype", "layout", "kernel", "config", "process", "cache", "fifo_cache", "host_vec", "score_modifiers"],
    &["mask"],
    &["call"],
    &["backends"],
    &["device"],
    &["tensor"],
    &["attention_mask", "attention_outputs"],
    &["attention", "primitives", "merge", "prepare_qk"],
    &["joint"],
    &["encode"],
    &["dist"],
];

/// Rooms that never import one another, though one may be below the other.
const APART: &[&str] = &["backends::cpu", "backends::cuda", "backends::wgpu"];

/// Fails with every circle of every package, and every import that goes up.
pub fn check(workspace: &Workspace) -> Result<()> {
    let mut faults = Vec::new();
    let mut count = 0;
    for folder in SOURCES {
        let package = Package::read(workspace, folder)?;
        let imports = package.imports();
        count += package.files.len();
        faults.extend(circles(&imports).iter().map(|circle| format!("{folder}: a circle of imports\n{circle}")));
        if *folder == "src" {
            let found = ups(&imports, ROOMS).into_iter().chain(across(&imports, APART));
            faults.extend(found.map(|fault| format!("{folder}: {fault}")));
        }
    }
    ensure!(faults.is_empty(), "the imports have {} faults\n{}", faults.len(), faults.join("\n"));
    println!("the imports of {count} files are in order");
    Ok(())
}

/// A module's path, from the package's root.
type Module = Vec<String>;

/// What each file imports: the other file, and one of the paths that say so.
type Imports = BTreeMap<Module, BTreeMap<Module, String>>;

/// The files of a package, by their modules.
struct Package {
    files: BTreeMap<Module, File>,
}

/// The names of one file.
#[derive(Default)]
struct File {
    /// Paths in the code, from the root; those of `use` that are private among them.
    uses: BTreeSet<Module>,
    /// Names that the file passes on, and their paths from the root.
    passed_on: BTreeMap<String, Module>,
}

impl Package {
    fn read(workspace: &Workspace, folder: &str) -> Result<Self> {
        let mut sources = Vec::new();
        for name in workspace.files(&format!("{folder}/*.rs"))? {
            let text = fs::read_to_string(workspace.root.join(&name)).with_context(|| format!("cannot read {name}"))?;
            let module = module_of(Path::new(&name).strip_prefix(folder)?);
            sources.push((module, syn::parse_file(&text).with_context(|| format!("cannot parse {name}"))?));
        }
        ensure!(!sources.is_empty(), "git lists no file in {folder}");
        Ok(Self::of(sources))
    }

    fn of(sources: Vec<(Module, syn::File)>) -> Self {
        let modules: BTreeSet<Module> = sources.iter().map(|(module, _)| module.clone()).collect();
        // Files of other folders, by `#[path]`, import nothing here.
        let elsewhere = sources.iter().flat_map(|(module, source)| {
            let declared = |item: &Item| match item {
                Item::Mod(inner) if inner.content.is_none() => Some([&module[..], &[inner.ident.to_string()]].concat()),
                _ => None,
            };
            source.items.iter().filter_map(declared).filter(|path| !modules.contains(path))
        });
        let elsewhere: Vec<_> = elsewhere.map(|path| (path, File::default())).collect();
        let files = sources.into_iter().map(|(module, source)| {
            let mut reader = Reader { modules: &modules, here: module.clone(), names: vec![], file: File::default() };
            reader.visit_file(&source);
            (module, reader.file)
        });
        Self { files: files.chain(elsewhere).collect() }
    }

    fn imports(&self) -> Imports {
        let of_file = |(module, file): (&Module, &File)| {
            let found = file.uses.iter().map(|path| (self.declares(path, 0), path.join("::")));
            (module.clone(), found.filter(|(other, _)| other != module).collect())
        };
        self.files.iter().map(of_file).collect()
    }

    /// The file that declares what a path from the root names.
    fn declares(&self, path: &[String], depth: usize) -> Module {
        let length = (0..=path.len()).rev().find(|&length| self.files.contains_key(&path[..length])).unwrap_or(0);
        let (module, rest) = path.split_at(length);
        let passed_on = rest.first().and_then(|name| self.files.get(module)?.passed_on.get(name));
        match passed_on {
            // Names that are passed on in a circle lead nowhere.
            Some(from) if depth < 16 => self.declares(&[from, &rest[1..]].concat(), depth + 1),
            _ => module.to_vec(),
        }
    }
}

/// `a/b.rs` and `a/b/mod.rs` are `a::b`; `lib.rs` and `main.rs` are the root.
fn module_of(file: &Path) -> Module {
    let mut module: Module = file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    let is_folder = matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main"));
    module.truncate(module.len() - usize::from(is_folder));
    module
}

/// Collects the paths of one file.
struct Reader<'a> {
    modules: &'a BTreeSet<Module>,
    /// The file's module, or one inside of it.
    here: Module,
    /// The modules that each scope has by a name of its own, the innermost last.
    names: Vec<BTreeMap<String, Module>>,
    file: File,
}

impl Reader<'_> {
    /// A path from the root, if it leads to the package's own files.
    fn rooted(&self, path: &[String]) -> Option<Module> {
        let (first, rest) = path.split_first()?;
        let named = || self.names.last()?.get(first);
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([&self.here, rest].concat()),
            "super" => {
                let ups = path.iter().take_while(|part| *part == "super").count();
                Some([&self.here[..self.here.len().checked_sub(ups)?], &path[ups..]].concat())
            }
            _ => named().map(|module| [module, rest].concat()),
        }
    }

    /// Goes through the items of a file or of a module inside of it.
    fn read_items(&mut self, items: &[Item]) {
        let mut names = BTreeMap::new();
        for item in items {
            if let Item::Mod(module) = item {
                let path = [&self.here[..], &[module.ident.to_string()]].concat();
                names.insert(module.ident.to_string(), path);
            }
        }
        self.names.push(names);
        for item in items {
            if let Item::Use(item) = item
                && !is_test(&item.attrs)
            {
                let mut leaves = Vec::new();
                flatten(&item.tree, &mut Vec::new(), &mut leaves);
                for (path, name) in leaves {
                    let Some(path) = self.rooted(&path) else { continue };
                    if !matches!(item.vis, Visibility::Inherited) {
                        self.file.passed_on.insert(name, path);
                    } else if self.modules.contains(&path) {
                        // The paths that start with it are what is used.
                        self.names.last_mut().map(|names| names.insert(name, path));
                    } else {
                        self.file.uses.insert(path);
                    }
                }
            }
        }
        items.iter().for_each(|item| self.visit_item(item));
        self.names.pop();
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_file(&mut self, file: &'ast syn::File) {
        self.read_items(&file.items);
    }

    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Use(_) => return,
            Item::Mod(module) => {
                if let Some((_, items)) = &module.content
                    && !is_test(&module.attrs)
                {
                    self.here.push(module.ident.to_string());
                    self.read_items(items);
                    self.here.pop();
                }
                return;
            }
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Const(item) => &item.attrs,
            Item::Static(item) => &item.attrs,
            _ => &vec![],
        };
        if !is_test(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_test(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|part| part.ident.to_string()).collect();
        if parts.len() > 1
            && let Some(path) = self.rooted(&parts)
        {
            self.file.uses.insert(path);
        }
        visit::visit_path(self, path);
    }
}

/// Whether an item is there for unit tests alone.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let mut is_test = false;
        // Anything but `test` alone is no reason to leave it out.
        let _ = attribute.path().is_ident("cfg").then(|| {
            attribute.parse_nested_meta(|meta| {
                is_test |= meta.path.is_ident("test");
                Ok(())
            })
        });
        is_test
    })
}

/// The paths of a `use`, each with the name that it gets.
fn flatten(tree: &UseTree, path: &mut Module, leaves: &mut Vec<(Module, String)>) {
    let leaf = |path: &Module, name: &syn::Ident, shown: &syn::Ident| match name == "self" {
        true => {
            (path.clone(), if name == shown { path.last().cloned().unwrap_or_default() } else { shown.to_string() })
        }
        false => ([&path[..], &[name.to_string()]].concat(), shown.to_string()),
    };
    match tree {
        UseTree::Path(step) => {
            path.push(step.ident.to_string());
            flatten(&step.tree, path, leaves);
            path.pop();
        }
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, path, leaves)),
        UseTree::Name(name) => leaves.push(leaf(path, &name.ident, &name.ident)),
        UseTree::Rename(name) => leaves.push(leaf(path, &name.ident, &name.rename)),
        UseTree::Glob(_) => leaves.push((path.clone(), "*".to_owned())),
    }
}

/// The circles: of each file that imports itself over others, the shortest way; each circle once.
fn circles(imports: &Imports) -> Vec<String> {
    let mut known = BTreeSet::new();
    let mut found = Vec::new();
    for start in imports.keys() {
        let Some(circle) = way_back(imports, start) else { continue };
        if known.insert(circle.iter().copied().collect::<BTreeSet<_>>()) {
            let steps = circle.iter().zip(circle.iter().cycle().skip(1));
            let lines = steps.map(|(from, to)| format!("  {} imports {}", shown(from), imports[*from][*to]));
            found.push(lines.collect::<Vec<_>>().join("\n"));
        }
    }
    found
}

/// The shortest way from a file over its imports back to it.
fn way_back<'a>(imports: &'a Imports, start: &'a Module) -> Option<Vec<&'a Module>> {
    let mut ways = vec![vec![start]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in imports.get(*way.last()?)?.keys() {
                if next == start {
                    return Some(way);
                }
                if seen.insert(next) {
                    longer.push([&way[..], &[next]].concat());
                }
            }
        }
        ways = longer;
    }
    None
}

/// The imports of a room from one that is not below it, and rooms that are not in the list.
fn ups(imports: &Imports, rooms: &[&[&str]]) -> Vec<String> {
    let mut found = Vec::new();
    let height = |room: &String| rooms.iter().position(|line| line.contains(&room.as_str()));
    for (from, others) in imports {
        // The root is above all.
        let Some(room) = from.first() else { continue };
        let Some(own) = height(room) else {
            found.push(format!("{room} has no place in the order of rooms (xtask/src/imports.rs)"));
            continue;
        };
        for (to, path) in others {
            let is_below = match to.first() {
                Some(other) => other == room || height(other).is_some_and(|other| other < own.max(1)),
                None => false,
            };
            if !is_below {
                found.push(format!("{} imports {path}, which is not below it", shown(from)));
            }
        }
    }
    found
}

/// The imports of one of these rooms from another.
fn across(imports: &Imports, apart: &[&str]) -> Vec<String> {
    let room = |module: &Module| {
        let module = shown(module);
        let is_inside =
            |room: &&&str| module.strip_prefix(**room).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
        apart.iter().find(is_inside).copied()
    };
    let mut found = Vec::new();
    for (from, others) in imports {
        let Some(own) = room(from) else { continue };
        let foreign = others.iter().filter(|(to, _)| room(to).is_some_and(|other| other != own));
        found.extend(foreign.map(|(_, path)| format!("{} imports {path}, which stands apart", shown(from))));
    }
    found
}

fn shown(module: &Module) -> String {
    if module.is_empty() { "the root".to_owned() } else { module.join("::") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The imports of a package of files, each a module and its text.
    fn imports(files: &[(&str, &str)]) -> Imports {
        let parsed = files.iter().map(|(file, text)| (module_of(Path::new(file)), syn::parse_file(text).unwrap()));
        Package::of(parsed.collect()).imports()
    }

    /// The files that a file imports.
    fn of_file(imports: &Imports, module: &str) -> Vec<String> {
        imports[&module.split("::").map(str::to_owned).collect::<Module>()].keys().map(shown).collect()
    }

    #[test]
    fn paths_lead_to_the_files_that_declare() {
        let imports = imports(&[
            ("lib.rs", "mod a; mod b; mod c; #[path = \"../d.rs\"] mod d; pub use crate::b::deep::Thing;"),
            ("a.rs", "use crate::{b, c::{self as other, One}, Thing}; fn f() { b::deep::g(); other::h(); }"),
            ("b/mod.rs", "pub mod deep; pub mod near; pub use deep::Thing;"),
            ("b/deep.rs", "use super::near::{Near}; use std::fmt; fn g() { self::inner(); fmt::f(); }"),
            ("b/near.rs", "mod inline { use super::Near; use super::super::super::c::Two; } struct Near;"),
            (
                "c.rs",
                "#[cfg(test)] mod tests { use crate::a::A; } #[cfg(test)] fn t() { crate::a::f() } struct One; fn d() { crate::d::f(); }",
            ),
        ]);
        assert_eq!(of_file(&imports, "a"), ["b::deep", "c"]);
        assert_eq!(of_file(&imports, "b::deep"), ["b::near"]);
        assert_eq!(of_file(&imports, "b::near"), ["c"]);
        assert_eq!(of_file(&imports, "c"), ["d"]);
        assert!(circles(&imports).is_empty());
    }

    #[test]
    fn circles_are_told_once() {
        let imports = imports(&[
            ("main.rs", "mod a; mod b; mod c; mod d;"),
            ("a.rs", "use crate::b::B; use crate::d::D;"),
            ("b.rs", "fn f() -> crate::c::C { }"),
            ("c.rs", "use super::a;  fn f() { a::g(); }"),
            ("d.rs", "use crate::b::B;"),
        ]);
        let found = circles(&imports);
        assert_eq!(found[0], "  a imports b::B\n  b imports c::C\n  c imports a::g");
        assert_eq!(found[1], "  d imports b::B\n  b imports c::C\n  c imports a::g\n  a imports d::D");
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn imports_go_down() {
        let imports = imports(&[
            ("lib.rs", "mod low; mod lower; mod mid; mod left; mod right; mod new;"),
            ("low.rs", "use crate::lower::L; use crate::mid::M;"),
            ("lower.rs", "use crate::Root;"),
            ("mid.rs", "use crate::low::L;"),
            ("left.rs", "use crate::right::R; use crate::mid::M;"),
            ("right.rs", ""),
            ("new.rs", "use crate::mid::M;"),
        ]);
        let expected = [
            "left imports right::R, which is not below it",
            "low imports mid::M, which is not below it",
            "lower imports Root, which is not below it",
            "new has no place in the order of rooms (xtask/src/imports.rs)",
        ];
        assert_eq!(ups(&imports, &[&["low", "lower"], &["mid"], &["left", "right"]]), expected);
    }

    #[test]
    fn rooms_that_stand_apart_do_not_meet() {
        let imports = imports(&[
            ("lib.rs", "mod a; mod b;"),
            ("a/mod.rs", "mod one; mod other; mod one_more;"),
            ("a/one/mod.rs", "mod inner;"),
            ("a/one/inner.rs", "use crate::a::other::O; use crate::a::one::I; use crate::b::B;"),
            ("a/other.rs", "use super::one_more::M;"),
            ("a/one_more.rs", "use super::one::I;"),
            ("b.rs", ""),
        ]);
        let expected = ["a::one::inner imports a::other::O, which stands apart"];
        assert_eq!(across(&imports, &["a::one", "a::other"]), expected);
    }
}
