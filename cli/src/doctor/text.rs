//! The report for people.

use std::io::{Result, Write};

use anstyle::{AnsiColor, Style};

use super::cold_start::ColdStart;
use super::report::{Checked, Facts, Finding, Report};
use super::speed::Speed;

const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const DOUBTFUL: Style = AnsiColor::Yellow.on_default();
const NAME: Style = Style::new().bold();

/// What does not depend on a device.
pub fn head(out: &mut impl Write, report: &Report) -> Result<()> {
    let Report { version, features, os, arch, processors, variables, .. } = report;
    let features = if features.is_empty() { "no features".to_owned() } else { format!("with {}", features.join(", ")) };
    writeln!(out, "varlen-fa {version} {features}; {os}, {arch}, {processors} processors")?;
    for (name, value) in variables {
        writeln!(out, "{DOUBTFUL}{name}={value}{DOUBTFUL:#}")?;
    }
    Ok(())
}

/// One device.
pub fn device(out: &mut impl Write, finding: &Finding) -> Result<()> {
    let Finding { device, why_not, facts, log } = finding;
    write!(out, "\n{NAME}{device}{NAME:#}: ")?;
    if let Some(why) = why_not {
        writeln!(out, "{DOUBTFUL}not available{DOUBTFUL:#}: {why}")?;
    }
    if let Some(facts) = facts {
        self::facts(out, facts)?;
    }
    for note in log {
        line(out, "log", note)?;
    }
    Ok(())
}

fn facts(out: &mut impl Write, facts: &Facts) -> Result<()> {
    let software = if facts.is_software { " (emulated by the processor)" } else { "" };
    writeln!(out, "{}{software}", facts.adapter)?;
    let preferred = if facts.kernels.len() > 1 { ", the first where it can" } else { "" };
    line(out, "kernels", &format!("{}{preferred}; {}", facts.kernels.join(", "), facts.dtypes.join(", ")))?;
    if let Some(matrices) = facts.cooperative_matrices {
        line(out, "matrices", &format!("cooperative matrices: {matrices}"))?;
    }
    let clock = if facts.has_timestamps { "its own clock" } else { "no clock of its own" };
    let multiprocessors = facts.multiprocessors.map_or(String::new(), |count| format!(", {count} multiprocessors"));
    let [tensor, binding] = [facts.max_buffer_bytes, facts.max_binding_bytes].map(bytes);
    line(
        out,
        "limits",
        &format!(
            "tensors of {tensor}, {binding} a launch, head dimension {}, {clock}{multiprocessors}",
            facts.max_head_dim
        ),
    )?;
    let ColdStart { open_ms, open_again_ms, first_call_ms, next_call_ms } = facts.cold_start;
    line(
        out,
        "cold start",
        &format!(
            "opened in {open_ms:.1} ms, again in {open_again_ms:.1}; first call {first_call_ms:.2} ms, next {next_call_ms:.2}"
        ),
    )?;
    check(out, &facts.check)?;
    if let Some(why) = &facts.speed_error {
        line(out, "speed", &format!("{BAD}not measured{BAD:#}: {why}"))?;
    }
    facts.speed.as_ref().map_or(Ok(()), |speed| self::speed(out, speed))
}

fn check(out: &mut impl Write, check: &Checked) -> Result<()> {
    let Checked { seed, right, refused, failure } = check;
    match failure {
        None => line(
            out,
            "check",
            &format!(
                "{GOOD}right{GOOD:#}: {right} random calls against f64 from seed {seed} on, {refused} not applicable"
            ),
        ),
        Some(why) => line(out, "check", &format!("{BAD}WRONG{BAD:#} after {right} right calls: {why}")),
    }
}

fn speed(out: &mut impl Write, speed: &Speed) -> Result<()> {
    let Speed { call, plan, min_ms, median_ms, tflops, expected } = speed;
    line(out, "speed", &format!("{tflops:.3} TFLOP/s, {min_ms:.3} ms (median {median_ms:.3}): {call}"))?;
    line(out, "", plan)?;
    let (Some(expected), Some(share)) = (expected, speed.share()) else {
        return line(out, "", "nothing to compare it with");
    };
    let verdict = match speed.is_slow() {
        true => format!("{DOUBTFUL}slow: below {:.0} %{DOUBTFUL:#}", 100.0 * expected.least),
        false => format!("{GOOD}as expected{GOOD:#}: at least {:.0} %", 100.0 * expected.least),
    };
    line(out, "", &format!("{:.0} % of {:.3} TFLOP/s by {}; {verdict}", 100.0 * share, expected.tflops, expected.by))
}

/// What to do with the report.
pub fn end(out: &mut impl Write, report: &Report) -> Result<()> {
    let verdict = match report.is_well {
        true => format!("{GOOD}All is well.{GOOD:#}"),
        false => format!("{BAD}Something is wrong.{BAD:#}"),
    };
    writeln!(out, "\n{verdict} In a bug report, paste all of this. To search longer: varlen-fa check --minutes 10.")
}

fn line(out: &mut impl Write, name: &str, text: &str) -> Result<()> {
    writeln!(out, "  {name:<11} {text}")
}

/// Largest sizes are powers of two or nearly so; the CPU's is no limit at all.
fn bytes(bytes: u64) -> String {
    const GIB: u64 = 1 << 30;
    match bytes {
        bytes if bytes > 1 << 50 => "any size".to_owned(),
        bytes if bytes >= GIB => format!("{:.1} GiB", bytes as f64 / GIB as f64),
        bytes => format!("{} MiB", bytes >> 20),
    }
}
