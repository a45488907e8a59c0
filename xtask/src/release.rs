//! Everything that a release needs, tried without publishing anything.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::package::{LIBRARY, Source, Unpacked, published};
use crate::workspace::{Workspace, cargo, is_installed, run, stdout_of};
use crate::{external_types, header, pages};

/// Fails with the first thing that stands in the way of publishing the commit. Says what a person does.
pub fn dry_run(workspace: &Workspace) -> Result<()> {
    let version = workspace.version(LIBRARY)?;
    let tag = format!("v{version}");
    println!("=== {tag}: changelog, header, pages");
    let changelog = fs::read_to_string(workspace.root.join("CHANGELOG.md")).context("cannot read CHANGELOG.md")?;
    let entries = unreleased(&changelog, &version)?;
    let tags =
        stdout_of(Command::new("git").current_dir(&workspace.root).args(["tag", "--list", "v*", "--sort=v:refname"]))?;
    let tags: Vec<&str> = tags.lines().collect();
    ensure!(!tags.contains(&tag.as_str()), "the tag {tag} exists: a version is published once");
    header::check(workspace)?;
    pages::check(workspace)?;

    println!("=== types of other crates in the API");
    external_types::check(workspace)?;

    println!("=== what the API promised in the version before");
    semver(workspace, tags.last().copied())?;

    println!("=== the packages, as cargo verifies them, and the library's tests");
    let names: Vec<_> = published().flat_map(|name| ["-p", name]).collect();
    run(cargo().current_dir(&workspace.root).args(["package", "--locked", "--quiet"]).args(&names))?;
    let unpacked = Unpacked::new(workspace, Source::Commit)?;
    unpacked.cargo(workspace, &["test", "--release", "--locked"])?;

    println!("=== the oldest versions of the dependencies that Cargo.toml allows");
    // An option of unstable cargo, which resolves only: the stable one compiles.
    let mut resolve = cargo();
    resolve.current_dir(&unpacked.library).env("RUSTC_BOOTSTRAP", "1").args([
        "update",
        "--quiet",
        "-Zdirect-minimal-versions",
    ]);
    run(&mut resolve)?;
    unpacked.cargo(workspace, &["check", "--release", "--lib", "--locked"])?;

    println!("\nNothing here stands in the way of {tag}. The tag needs, by RELEASE.md:");
    if entries > 0 {
        println!(
            "- CHANGELOG.md: its {entries} lines under Unreleased in a section of their version, with the day as its date"
        );
    }
    println!(
        "- a run of the GPU bundle, and `cargo deny check advisories`: no machine without a GPU or a network knows"
    );
    println!("- cargo publish {}, then git tag {tag}", names.join(" "));
    Ok(())
}

/// Compares the API with that of the version before, where there is one.
fn semver(workspace: &Workspace, before: Option<&str>) -> Result<()> {
    let Some(before) = before else {
        println!("skipped: no version has a tag yet, so there is no API to compare with");
        return Ok(());
    };
    if !is_installed("cargo-semver-checks") {
        println!("skipped: cargo-semver-checks is not installed: `cargo install cargo-semver-checks --locked`");
        return Ok(());
    }
    let mut check = cargo();
    check.current_dir(&workspace.root).args([
        "semver-checks",
        "check-release",
        "-p",
        LIBRARY,
        "--baseline-rev",
        before,
    ]);
    run(&mut check)
}

/// The lines of the changelog that belong to no version yet.
///
/// # Errors
/// It has no dated section of the version.
fn unreleased(changelog: &str, version: &str) -> Result<usize> {
    let start = format!("## [{version}] - ");
    let section = changelog.lines().find_map(|line| line.strip_prefix(start.as_str()));
    let date = section.with_context(|| format!("CHANGELOG.md has no section `{start}YYYY-MM-DD`"))?;
    let is_date = date.len() == 10
        && date
            .bytes()
            .enumerate()
            .all(|(at, byte)| if matches!(at, 4 | 7) { byte == b'-' } else { byte.is_ascii_digit() });
    ensure!(is_date, "CHANGELOG.md: the date of {version} is {date}, expected YYYY-MM-DD");
    let lines = changelog.lines().skip_while(|line| *line != "## [Unreleased]").skip(1);
    let of_section = lines.take_while(|line| !line.starts_with("## "));
    Ok(of_section.filter(|line| !line.is_empty() && !line.starts_with('#')).count())
}

#[cfg(test)]
mod tests {
    use super::unreleased;

    #[test]
    fn a_version_needs_a_dated_section() {
        let changelog = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- a\n  b\n\n## [0.2.0] - 2026-11-29\n\n- c\n";
        assert_eq!(unreleased(changelog, "0.2.0").unwrap(), 2);
        assert_eq!(unreleased("## [0.2.0] - 2026-11-29\n", "0.2.0").unwrap(), 0);
        assert!(unreleased(changelog, "0.3.0").is_err());
        assert!(unreleased("## [0.2.0] - soon\n", "0.2.0").is_err());
    }
}
