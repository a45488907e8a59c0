//! What `ptxas -v` says about each kernel, and which of it is a defect.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use crate::table;

/// Ends the names of kernels off the hot path, which may spill.
const MASKED: &str = "_masked";

/// One kernel on one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    pub kernel: String,
    pub arch: String,
    pub registers: u32,
    /// Static shared memory; what the host asks for at launch is not in it.
    pub shared_bytes: u32,
    pub spill_store_bytes: u32,
    pub spill_load_bytes: u32,
}

impl Usage {
    /// Whether the kernel is on the hot path and stores or loads more bytes of spills than allowed.
    pub fn is_defect(&self, allowed: u32) -> bool {
        !self.kernel.ends_with(MASKED) && self.spill_store_bytes.max(self.spill_load_bytes) > allowed
    }

    fn cell(&self) -> String {
        let mut cell = self.registers.to_string();
        if self.shared_bytes > 0 {
            cell += &format!(" {}B", self.shared_bytes);
        }
        if self.spill_store_bytes + self.spill_load_bytes > 0 {
            cell += &format!(" spills {}/{}", self.spill_store_bytes, self.spill_load_bytes);
        }
        cell
    }
}

/// Reads the output of one compilation. Three lines matter for each kernel and architecture: its
/// name, its spills, its registers. Functions that were not inlined have lines of spills too; they
/// count towards the kernel whose registers come next.
pub fn parse(output: &str) -> Result<Vec<Usage>> {
    let mut usages = vec![];
    let mut entry: Option<(&str, &str)> = None;
    let mut spills: Option<(u32, u32)> = None;
    for line in output.lines() {
        if let Some(rest) = after(line, "Compiling entry function '") {
            ensure!(entry.is_none(), "ptxas says nothing about {entry:?}");
            entry = rest.strip_suffix('\'').and_then(|rest| rest.split_once("' for '"));
            ensure!(entry.is_some(), "cannot read this line of ptxas: {line}");
        } else if let Some(text) = line.strip_suffix(" bytes spill loads") {
            let (stores, loads) =
                spill_bytes(text).with_context(|| format!("cannot read this line of ptxas: {line}"))?;
            let (stores_before, loads_before) = spills.unwrap_or_default();
            spills = Some((stores_before + stores, loads_before + loads));
        } else if let Some(rest) = after(line, "ptxas info    : Used ") {
            let (Some((kernel, arch)), Some((stores, loads))) = (entry.take(), spills.take()) else {
                bail!("ptxas did not name the kernel of this line: {line}");
            };
            let number = |unit| amount(rest, unit).with_context(|| format!("cannot read this line of ptxas: {line}"));
            usages.push(Usage {
                kernel: kernel.to_owned(),
                arch: arch.to_owned(),
                registers: number(" registers")?.context("ptxas names no registers")?,
                shared_bytes: number(" bytes smem")?.unwrap_or(0),
                spill_store_bytes: stores,
                spill_load_bytes: loads,
            });
        }
    }
    ensure!(entry.is_none(), "ptxas says nothing about {entry:?}");
    ensure!(spills.is_none_or(|bytes| bytes == (0, 0)), "ptxas names no kernel for the last spills");
    Ok(usages)
}

fn after<'a>(line: &'a str, start: &str) -> Option<&'a str> {
    line.split_once(start).map(|(_, rest)| rest)
}

/// From `8 bytes stack frame, 12 bytes spill stores, 8`.
fn spill_bytes(text: &str) -> Option<(u32, u32)> {
    let (stores, loads) = text.rsplit_once(" bytes spill stores, ")?;
    Some((stores.rsplit_once(' ')?.1.parse().ok()?, loads.parse().ok()?))
}

/// The number before `unit` in a list such as `255 registers, used 1 barriers, 512 bytes smem`.
fn amount(list: &str, unit: &str) -> Result<Option<u32>> {
    let item = list.split(", ").find_map(|item| item.strip_suffix(unit));
    Ok(item.map(str::parse).transpose()?)
}

/// A row for each kernel, a column for each architecture.
pub fn usage_table(usages: &[Usage], archs: &[&str]) -> String {
    let mut kernels: BTreeMap<&str, BTreeMap<&str, &Usage>> = BTreeMap::new();
    for usage in usages {
        kernels.entry(&usage.kernel).or_default().insert(&usage.arch, usage);
    }
    let head = ["kernel"].iter().chain(archs).map(|&name| name.to_owned()).collect();
    let row = |(kernel, by_arch): (&&str, &BTreeMap<&str, &Usage>)| {
        let cells = archs.iter().map(|arch| by_arch.get(arch).map_or_else(|| "-".to_owned(), |usage| usage.cell()));
        [(*kernel).to_owned()].into_iter().chain(cells).collect()
    };
    let rows: Vec<Vec<String>> = [head].into_iter().chain(kernels.iter().map(row)).collect();
    table::format(&rows)
}

#[cfg(test)]
mod tests {
    use super::{Usage, parse, usage_table};

    /// From nvcc 13.0.88.
    const OUTPUT: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention_sm80_bf16_d128' for 'sm_100'
ptxas info    : Function properties for attention_sm80_bf16_d128
    32 bytes stack frame, 40 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 32 bytes cumulative stack size
ptxas info    : Compile time = 407.961 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'pack' for 'sm_80'
ptxas info    : Function properties for pack
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 512 bytes smem, 600 bytes cmem[0]
ptxas info    : Compile time = 1.061 ms
";

    fn usage(kernel: &str, arch: &str, numbers: [u32; 4]) -> Usage {
        let [registers, shared_bytes, spill_store_bytes, spill_load_bytes] = numbers;
        let (kernel, arch) = (kernel.to_owned(), arch.to_owned());
        Usage { kernel, arch, registers, shared_bytes, spill_store_bytes, spill_load_bytes }
    }

    #[test]
    fn every_number_is_read() {
        let expected =
            [usage("attention_sm80_bf16_d128", "sm_100", [255, 0, 40, 32]), usage("pack", "sm_80", [48, 512, 0, 0])];
        assert_eq!(parse(OUTPUT).unwrap(), expected);
    }

    #[test]
    fn output_that_is_not_understood_is_an_error() {
        let without = |text: &str| OUTPUT.lines().filter(|line| !line.contains(text)).collect::<Vec<_>>().join("\n");
        for text in ["spill stores", "Used", "Compiling entry"] {
            assert!(parse(&without(text)).is_err(), "without {text}");
        }
        for (from, to) in [("40 bytes spill", "forty bytes spill"), ("Used 255", "Used many"), ("' for '", " on ")] {
            assert!(parse(&OUTPUT.replace(from, to)).is_err(), "{to}");
        }
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn functions_that_were_not_inlined_count() {
        let helper = "ptxas info    : Function properties for helper\n    \
                      8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n";
        let used = "ptxas info    : Used 48";
        let usages = parse(&OUTPUT.replace(used, &format!("{helper}{used}"))).unwrap();
        assert_eq!(usages[1], usage("pack", "sm_80", [48, 512, 8, 4]));
        assert!(parse(&format!("{OUTPUT}{helper}")).is_err());
    }

    #[test]
    fn spills_are_defects_on_the_hot_path_alone() {
        assert!(usage("attention_d128", "sm_80", [255, 0, 52, 0]).is_defect(48));
        assert!(usage("attention_d128", "sm_80", [255, 0, 0, 52]).is_defect(48));
        assert!(!usage("attention_d128", "sm_80", [255, 0, 48, 48]).is_defect(48));
        assert!(!usage("attention_d128_masked", "sm_80", [255, 0, 52, 52]).is_defect(48));
    }

    #[test]
    fn the_table_has_a_place_for_everything() {
        let expected = "\
kernel                    sm_80               sm_100
attention_sm80_bf16_d128      -  255 spills 40/32
pack                      48 512B                  -
";
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&usage_table(&parse(OUTPUT).unwrap(), &["sm_80", "sm_100"])), words(expected));
    }
}
