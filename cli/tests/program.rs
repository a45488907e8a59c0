//! The program as people start it: what it prints, its exit codes, pipes that close, colours.

use std::io::Read;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

const WRONG_ARGUMENTS: i32 = 2;
const NOT_AVAILABLE: i32 = 3;

/// The program without the variables that decide about devices and colours.
fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_varlen-fa"));
    for variable in ["", "_DEVICE", "_KERNEL", "_CPU", "_THREADS"] {
        command.env_remove(format!("VARLEN_FA{variable}"));
    }
    for variable in ["RUST_LOG", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(variable);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Result<Output> {
    Ok(program(arguments).output()?)
}

fn stdout(arguments: &[&str]) -> Result<String> {
    let output = output(arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn every_command_has_help() -> Result<()> {
    for arguments in [&["--help"][..], &["doctor", "--help"], &["check", "--help"], &["bench", "ranges", "--help"]] {
        let text = stdout(arguments)?;
        ensure!(text.contains("Usage: varlen-fa"), "{arguments:?}: {text}");
    }
    ensure!(stdout(&["--help"])?.contains("Exit codes:"));
    ensure!(stdout(&["--version"])? == concat!("varlen-fa ", env!("CARGO_PKG_VERSION"), "\n"));
    Ok(())
}

#[test]
fn wrong_arguments_are_told() -> Result<()> {
    for arguments in
        [&["doctor", "--device", "tpu"][..], &["check", "--seed", "x"], &["check", "--kernel", "sm70"], &[]]
    {
        let output = output(arguments)?;
        ensure!(output.status.code() == Some(WRONG_ARGUMENTS), "{arguments:?}: {}", output.status);
        ensure!(!output.stderr.is_empty() && output.stdout.is_empty(), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn an_absent_device_has_an_exit_code_of_its_own() -> Result<()> {
    // No machine has so many.
    for command in ["check", "doctor"] {
        let output = output(&[command, "--device", "cuda:4000"])?;
        ensure!(output.status.code() == Some(NOT_AVAILABLE), "{command}: {}", output.status);
        let said = String::from_utf8(output.stderr)?;
        ensure!(said.contains("cuda:4000") && said.contains("NVIDIA driver"), "{said}");
    }
    Ok(())
}

#[test]
fn doctor_reports_the_processor() -> Result<()> {
    let text = stdout(&["doctor", "--device", "cpu", "--speed", "0.05"])?;
    for part in ["cpu-tiled", "cold start", "right", "TFLOP/s", "In a bug report"] {
        ensure!(text.contains(part), "no {part:?} in\n{text}");
    }
    ensure!(!text.contains('\x1b'), "colours in a pipe: {text:?}");
    Ok(())
}

#[test]
fn doctor_gives_json() -> Result<()> {
    let report: Value = serde_json::from_str(&stdout(&["doctor", "--json", "--speed", "0"])?)?;
    ensure!(report["version"] == env!("CARGO_PKG_VERSION") && report["is_well"] == true, "{report}");
    let devices = report["devices"].as_array().context("no devices")?;
    let cpu = devices.iter().find(|device| device["device"] == "cpu").context("no CPU")?;
    ensure!(cpu["kernels"] == serde_json::json!(["cpu-tiled"]) && cpu["why_not"].is_null(), "{cpu}");
    ensure!(cpu["check"]["right"].as_u64().is_some_and(|right| right > 0) && cpu["speed"].is_null(), "{cpu}");
    for device in devices {
        let is_absent = device["why_not"].is_string();
        ensure!(is_absent != device["adapter"].is_string(), "{device}");
    }
    Ok(())
}

#[test]
fn variables_are_in_the_report() -> Result<()> {
    let mut doctor = program(&["doctor", "--device", "cpu", "--speed", "0", "--json"]);
    let output = doctor.env("VARLEN_FA_CPU", "scalar").output()?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["variables"]["VARLEN_FA_CPU"] == "scalar", "{report}");
    let adapter = report["devices"][0]["adapter"].as_str().context("no adapter")?;
    ensure!(adapter.contains("scalar"), "{adapter}");
    Ok(())
}

#[test]
fn colours_are_there_if_forced_and_no_color_turns_them_off() -> Result<()> {
    let arguments = ["doctor", "--device", "cpu", "--speed", "0"];
    let forced = program(&arguments).env("CLICOLOR_FORCE", "1").output()?;
    ensure!(forced.stdout.contains(&0x1b), "no colours");
    let plain = program(&arguments).env("NO_COLOR", "1").output()?;
    ensure!(!plain.stdout.contains(&0x1b), "colours in spite of NO_COLOR");
    Ok(())
}

#[test]
fn calls_follow_from_their_seeds() -> Result<()> {
    let text = stdout(&["check", "--device", "cpu", "--calls", "40", "--seed", "7"])?;
    ensure!(text.contains("calls from seed 7 on") && text.contains("40 calls were right, 0 are none"), "{text}");
    let text = stdout(&["check", "--device", "cpu", "--calls", "10", "--dtype", "bf16", "--kernel", "cpu-tiled"])?;
    ensure!(text.contains("10 calls were right"), "{text}");
    Ok(())
}

#[test]
fn benches_run() -> Result<()> {
    for bench in ["attention", "key-mask", "metadata", "prepare-qk", "ranges", "regret", "segments"] {
        let mut arguments = vec!["bench", bench, "--smoke", "--json", "-"];
        if bench != "metadata" {
            arguments.extend(["--device", "cpu"]);
        }
        let lines = stdout(&arguments)?;
        ensure!(!lines.is_empty(), "{bench}");
        for line in lines.lines() {
            serde_json::from_str::<Value>(line).with_context(|| format!("{bench}: {line}"))?;
        }
    }
    Ok(())
}

#[test]
fn shells_get_completions() -> Result<()> {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let text = stdout(&["completions", shell])?;
        ensure!(text.contains("varlen-fa") && text.contains("doctor"), "{shell}");
    }
    Ok(())
}

/// As `varlen-fa … | head -c 1`: the program ends without a panic and without a failure.
#[test]
fn closed_pipes_are_no_failure() -> Result<()> {
    for arguments in [
        &["doctor", "--device", "cpu", "--speed", "0.05"][..],
        &["completions", "bash"],
        &["check", "--device", "cpu", "--calls", "20"],
        &["bench", "attention", "--smoke", "--device", "cpu"],
        &["--help"],
    ] {
        let mut child = program(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        // Closed before anything can be written, or after the first byte.
        drop(child.stdout.take());
        let mut said = String::new();
        child.stderr.take().context("no standard error")?.read_to_string(&mut said)?;
        let status = child.wait()?;
        ensure!(status.success(), "{arguments:?}: {status}\n{said}");
        ensure!(!said.contains("panicked"), "{arguments:?}: {said}");
    }
    Ok(())
}
