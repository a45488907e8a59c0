//! The record beside the compiled kernels: what they were made from, with what, and what came out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Explains `sources_sha256` to readers of the file.
const ABOUT: &str = "Written by `cargo xtask kernels`. sources_sha256 is the SHA-256 of what `sha256sum SOURCE HEADERS...` prints in \
                     the kernels folder, headers in the order given here.";

/// kernels/prebuilt/manifest.json.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    about: String,
    /// What the compiler says its version is.
    compiler: String,
    /// The packages that it and its headers came in.
    packages: Vec<String>,
    /// Arguments of the compiler, without file names and the number of threads.
    flags: Vec<String>,
    /// SHA-256 of each header that any kernel may include, by its path in the kernels folder.
    headers: BTreeMap<String, String>,
    /// By the name of the file, without `.fatbin`.
    fatbins: BTreeMap<String, Fatbin>,
}

/// One compiled file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Fatbin {
    /// Its path in the kernels folder.
    source: String,
    /// Names of its kernels.
    kernels: BTreeSet<String>,
    bytes: usize,
    sha256: String,
    sources_sha256: String,
}

impl Manifest {
    /// A manifest without fatbins.
    pub fn new<'a>(
        compiler: &str,
        packages: &str,
        flags: &[String],
        headers: impl Iterator<Item = (&'a String, &'a Vec<u8>)>,
    ) -> Self {
        Self {
            about: ABOUT.to_owned(),
            compiler: compiler.to_owned(),
            packages: packages.lines().map(str::to_owned).collect(),
            flags: flags.to_vec(),
            headers: headers.map(|(path, content)| (path.clone(), sha256(content))).collect(),
            fatbins: BTreeMap::new(),
        }
    }

    /// Adds the fatbin with a name: its source, by path and contents, and its kernels.
    pub fn add(&mut self, name: &str, source: &str, contents: &[u8], kernels: BTreeSet<String>, fatbin: &[u8]) {
        let mut listing = format!("{}  {source}\n", sha256(contents));
        for (path, sha256) in &self.headers {
            listing += &format!("{sha256}  {path}\n");
        }
        let fatbin = Fatbin {
            source: source.to_owned(),
            kernels,
            bytes: fatbin.len(),
            sha256: sha256(fatbin),
            sources_sha256: sha256(listing.as_bytes()),
        };
        self.fatbins.insert(name.to_owned(), fatbin);
    }

    /// Bytes of all fatbins.
    pub fn total_bytes(&self) -> usize {
        self.fatbins.values().map(|fatbin| fatbin.bytes).sum()
    }

    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", path.display()))
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Each way in which the kernels of now, `self`, differ from those that `recorded` describes,
    /// one sentence each.
    pub fn differences(&self, recorded: &Self) -> Vec<String> {
        let mut found = vec![];
        if recorded.about != self.about {
            found.push("the manifest explains itself in other words".to_owned());
        }
        if recorded.compiler != self.compiler {
            found.push(format!("the compiler was {:?} and is {:?}", recorded.compiler, self.compiler));
        }
        for (what, was, is) in
            [("packages", &recorded.packages, &self.packages), ("flags", &recorded.flags, &self.flags)]
        {
            if was != is {
                found.push(format!("the {what} were {:?} and are {:?}", was.join(" "), is.join(" ")));
            }
        }
        let mut source_changed = false;
        each(&recorded.headers, &self.headers, |path, change| {
            source_changed = true;
            found.push(format!("{path} {}", change.word()));
        });
        each(&recorded.fatbins, &self.fatbins, |name, change| match change {
            Change::Added | Change::Removed => found.push(format!("{name}.fatbin {}", change.word())),
            Change::Changed(was, is) => {
                if was.source != is.source {
                    found.push(format!("the source of {name}.fatbin was {} and is {}", was.source, is.source));
                } else if was.sources_sha256 != is.sources_sha256 && !source_changed {
                    found.push(format!("{} changed", is.source));
                }
                if was.kernels != is.kernels {
                    let change: Vec<_> = was.kernels.symmetric_difference(&is.kernels).collect();
                    found.push(format!("{name}.fatbin holds other kernels: {change:?} are new or gone"));
                }
                if was.sha256 != is.sha256 || was.bytes != is.bytes {
                    found.push(format!(
                        "{name}.fatbin was {} bytes, SHA-256 {}, and is {} bytes, SHA-256 {}",
                        was.bytes, was.sha256, is.bytes, is.sha256
                    ));
                }
            }
        });
        found
    }
}

enum Change<'a, T> {
    Added,
    Removed,
    Changed(&'a T, &'a T),
}

impl<T> Change<'_, T> {
    fn word(&self) -> &'static str {
        match self {
            Self::Added => "is new",
            Self::Removed => "is gone",
            Self::Changed(..) => "changed",
        }
    }
}

/// Calls `tell` for each key whose value differs.
fn each<T: PartialEq>(was: &BTreeMap<String, T>, is: &BTreeMap<String, T>, mut tell: impl FnMut(&str, Change<'_, T>)) {
    for (key, old) in was {
        match is.get(key) {
            None => tell(key, Change::Removed),
            Some(new) if new != old => tell(key, Change::Changed(old, new)),
            Some(_) => {}
        }
    }
    for key in is.keys().filter(|key| !was.contains_key(*key)) {
        tell(key, Change::Added);
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::{Manifest, sha256};

    fn manifest(header: &str, source: &str, fatbin: &str) -> Manifest {
        let headers = BTreeMap::from([("common/a.cuh".to_owned(), header.into())]);
        let flags = ["-O3", "-v"].map(str::to_owned);
        let mut manifest = Manifest::new("nvcc 1", "one==1\ntwo==2\n", &flags, headers.iter());
        let kernels = BTreeSet::from(["pack_rows".to_owned()]);
        manifest.add("pack", "rows/pack.cu", source.as_bytes(), kernels, fatbin.as_bytes());
        manifest
    }

    #[test]
    fn hashes_are_those_of_sha256sum() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let listing = format!("{}  rows/pack.cu\n{}  common/a.cuh\n", sha256(b"source"), sha256(b"header"));
        assert_eq!(manifest("header", "source", "").fatbins["pack"].sources_sha256, sha256(listing.as_bytes()));
    }

    #[test]
    fn what_is_written_reads_back() {
        let written = manifest("header", "source", "fatbin");
        let read: Manifest = serde_json::from_str(&serde_json::to_string(&written).unwrap()).unwrap();
        assert_eq!(read, written);
        assert_eq!(read.total_bytes(), 6);
    }

    #[test]
    fn every_difference_is_named() {
        let was = manifest("header", "source", "fatbin");
        assert_eq!(was.differences(&was), [""; 0]);
        let expect = |is: &Manifest, expected: &[&str]| {
            let found = is.differences(&was);
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.contains(expected), "{found:?} does not say {expected:?}");
            }
        };
        expect(&manifest("other", "source", "fatbin"), &["common/a.cuh changed"]);
        expect(&manifest("header", "other", "fatbin"), &["rows/pack.cu changed"]);
        expect(&manifest("header", "source", "other fatbin"), &["pack.fatbin was 6 bytes"]);
        expect(&manifest("header", "source", "nibtaf"), &["pack.fatbin was 6 bytes"]);
        expect(&manifest("header", "other", "nibtaf"), &["rows/pack.cu changed", "pack.fatbin"]);

        let mut is = was.clone();
        is.compiler = "nvcc 2".to_owned();
        is.packages.pop();
        is.flags.reverse();
        is.add("scatter", "rows/scatter.cu", b"", BTreeSet::new(), b"");
        is.add("pack", "rows/pack.cu", b"source", BTreeSet::from(["copy_rows".to_owned()]), b"fatbin");
        expect(
            &is,
            &[
                "\"nvcc 2\"",
                "packages were \"one==1 two==2\" and are \"one==1\"",
                "\"-v -O3\"",
                "[\"copy_rows\", \"pack_rows\"]",
                "scatter.fatbin is new",
            ],
        );
        let gone = was.differences(&is);
        assert!(gone.contains(&"scatter.fatbin is gone".to_owned()), "{gone:?}");
    }
}
