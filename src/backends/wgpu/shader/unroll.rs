//! Loops of shaders, written out.

use std::fmt::Write;

/// The source with every loop marked `// unroll` written out. Drivers keep an array in registers
/// only where every index is a constant, and not all of them unroll loops around matrices. A
/// marked loop counts from 0 to one of the bounds, and ends at the first `}` of its indentation.
/// A loop whose bound is not listed stays a loop.
pub fn unrolled(source: &str, bounds: &[(&str, u32)]) -> String {
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

    #[test]
    fn marked_loops_are_written_out() {
        let source = "\
for (var b = 0u; b < N; b++) { // unroll
    for (var i = 0u; i < N; i++) { // unroll
        f(b, i);
    }
}
";
        let lines: Vec<String> = unrolled(source, &[("N", 2)]).lines().map(|line| line.trim().to_owned()).collect();
        let inner = |i: u32| ["{".to_owned(), format!("let i = {i}u;"), "f(b, i);".to_owned(), "}".to_owned()];
        let outer = |b: u32| {
            let head = ["{".to_owned(), format!("let b = {b}u;")];
            head.into_iter().chain(inner(0)).chain(inner(1)).chain(["}".to_owned()]).collect::<Vec<_>>()
        };
        assert_eq!(lines, [outer(0), outer(1)].concat());
    }
}
