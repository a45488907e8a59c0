//! Checks of the pages, *.md: links lead somewhere, and pages keep to their length and width.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// The most columns of a line of prose; tables and code may be wider.
const MAX_COLUMNS: usize = 100;

/// The most lines of pages that are read first.
const MAX_LINES: [(&str, usize); 2] = [("README.md", 90), ("docs/architecture.md", 150)];

/// Fails with every fault of every page.
pub fn check(workspace: &Workspace) -> Result<()> {
    let mut faults = Vec::new();
    let pages = workspace.files("*.md")?;
    ensure!(!pages.is_empty(), "git lists no page");
    for page in &pages {
        let path = workspace.root.join(page);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let folder = path.parent().unwrap_or(&workspace.root);
        let links = links(&text).into_iter().filter_map(|(line, link)| Some((line, broken(folder, &path, &link)?)));
        faults.extend(links.chain(wide_lines(&text)).map(|(line, fault)| format!("{page}:{line}: {fault}")));
        if let Some((_, most)) = MAX_LINES.iter().find(|(name, _)| name == page)
            && text.lines().count() > *most
        {
            faults.push(format!("{page}: {} lines, at most {most} are allowed", text.lines().count()));
        }
    }
    ensure!(faults.is_empty(), "the pages have {} faults\n{}", faults.len(), faults.join("\n"));
    println!("{} pages are in order", pages.len());
    Ok(())
}

/// The lines outside of code blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    text.lines().zip(1..).filter_map(move |(line, number)| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        (!in_code && !is_fence).then_some((number, line))
    })
}

/// The targets of links, `[text](target)`, with the number of their line.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (number, line) in prose(text) {
        let mut rest = line;
        while let Some((_, after)) = rest.split_once("](") {
            let Some((target, behind)) = after.split_once(')') else { break };
            links.push((number, target.to_owned()));
            rest = behind;
        }
    }
    links
}

/// What is wrong with a link from a page in this folder.
fn broken(folder: &Path, page: &Path, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
    let target = if file.is_empty() { page.to_owned() } else { folder.join(file) };
    if !target.exists() {
        return Some(format!("the link {link} leads to no file"));
    }
    let anchor = anchor?;
    let text = fs::read_to_string(&target).unwrap_or_default();
    (!anchors(&text).any(|known| known == anchor)).then(|| format!("the link {link} leads to no heading"))
}

/// The anchors of a page's headings, as GitHub makes them: lower case, spaces as hyphens, no other
/// punctuation.
fn anchors(text: &str) -> impl Iterator<Item = String> {
    prose(text).filter(|(_, line)| line.starts_with('#')).map(|(_, line)| {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    })
}

/// Lines of prose that are too wide.
fn wide_lines(text: &str) -> impl Iterator<Item = (usize, String)> {
    let lines = prose(text).filter(|(_, line)| !line.starts_with('|'));
    lines.filter_map(|(number, line)| {
        let columns = line.chars().count();
        (columns > MAX_COLUMNS).then(|| (number, format!("{columns} columns, at most {MAX_COLUMNS} are allowed")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# One, two: `three`\n\nSee [a](a.md) and [b](#b).\n\n```sh\nno [link](here)\n```\n[c](c.md)\n";

    #[test]
    fn links_outside_of_code_are_found() {
        let expected = [(3, "a.md"), (3, "#b"), (8, "c.md")].map(|(line, link)| (line, link.to_owned()));
        assert_eq!(links(PAGE), expected);
    }

    #[test]
    fn headings_have_anchors() {
        assert_eq!(anchors(PAGE).collect::<Vec<_>>(), ["one-two-three"]);
    }

    #[test]
    fn links_that_lead_nowhere_are_told() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let page = folder.join("Cargo.toml");
        let broken = |link: &str| broken(folder, &page, link);
        assert_eq!(broken("src/pages.rs"), None);
        assert_eq!(broken("https://example.org/none"), None);
        assert!(broken("src/none.rs").is_some_and(|fault| fault.ends_with("no file")));
        assert!(broken("../README.md#no-such-heading").is_some_and(|fault| fault.ends_with("no heading")));
    }

    #[test]
    fn wide_prose_is_told_and_tables_and_code_are_not() {
        let wide = "x".repeat(101);
        let text = format!("{wide}\n| {wide} |\n```\n{wide}\n```\n{}\n", "x".repeat(100));
        assert_eq!(wide_lines(&text).map(|(line, _)| line).collect::<Vec<_>>(), [1]);
    }
}
