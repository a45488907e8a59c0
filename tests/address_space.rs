//! Masks and metadata where memory runs out: an error, never an abort. Each call runs in a process
//! with little address space, once for each of 20 sizes of what is left of it, so that every
//! allocation fails at some size.

use std::env;
use std::fs;
use std::hint::black_box;
use std::ops::Range;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use varlen_fa::{CuSeqlens, Device, DeviceChoice, DeviceVarlenMeta, Error, KeyMask, MaskView, VarlenMeta};

/// Set in the processes that this test starts, to the name of the call that they make.
const CHILD: &str = "VARLEN_FA_TEST_CHILD";
/// Address space of such a process, in KiB.
const LIMIT: u64 = 1 << 20;
/// Sizes of what is left of it.
const SIZES: usize = 20;
/// Batch rows of the calls; every other token is kept.
const BATCH: usize = 1 << 19;
/// Tokens of a batch row.
const SEQ: usize = 16;
/// The call that is not limited, since it must take nothing.
const ROWS_WITHOUT_TOKENS: &str = "rows_without_tokens";
/// Its batch rows.
const MANY_ROWS: usize = i32::MAX as usize;

/// A call, made of inputs that were there before memory was taken away.
struct Call {
    name: &'static str,
    /// Bytes that it allocates, at most.
    bytes: usize,
    run: fn(&Inputs) -> varlen_fa::Result<()>,
}

const CALLS: [Call; 13] = [
    Call { name: "from_bool", bytes: 8 << 20, run: |with| KeyMask::from_bool(BATCH, SEQ, &with.flags).map(drop) },
    Call {
        name: "from_integers",
        bytes: 8 << 20,
        run: |with| KeyMask::from_integers(BATCH, SEQ, &with.bytes).map(drop),
    },
    Call { name: "from_lengths", bytes: 8 << 20, run: |with| KeyMask::from_lengths(SEQ, &with.lengths).map(drop) },
    Call { name: "from_runs", bytes: 8 << 20, run: |with| KeyMask::from_runs(SEQ, &with.runs).map(drop) },
    Call {
        name: "from_row_runs",
        bytes: 8 << 20,
        run: |with| {
            KeyMask::from_row_runs(BATCH, SEQ, (0..BATCH).map(|row| (row, with.runs[row][0].clone()))).map(drop)
        },
    },
    Call { name: "all", bytes: 8 << 20, run: |_| KeyMask::all(BATCH, SEQ).map(drop) },
    Call { name: "metadata", bytes: 64 << 20, run: |with| VarlenMeta::from_key_mask(&with.mask).map(drop) },
    Call { name: "indices", bytes: 32 << 20, run: |with| fresh(&with.meta)?.indices().map(|_| ()) },
    Call { name: "inv_indices", bytes: 48 << 20, run: |with| fresh(&with.meta)?.inv_indices().map(|_| ()) },
    Call {
        name: "clones",
        bytes: 64 << 20,
        run: |with| {
            let meta = fresh(&with.meta)?;
            meta.indices()?;
            meta.inv_indices()?;
            drop(black_box((meta.clone(), meta.key_mask().clone(), meta.cu_seqlens().clone())));
            Ok(())
        },
    },
    Call {
        name: "cu_seqlens",
        bytes: 4 << 20,
        run: |with| CuSeqlens::new(with.meta.cu_seqlens().as_slice()).map(drop),
    },
    Call {
        name: "cu_seqlens_of_lengths",
        bytes: 4 << 20,
        run: |with| CuSeqlens::from_lengths(&with.lengths).map(drop),
    },
    Call {
        name: "device_metadata",
        bytes: 96 << 20,
        run: |with| {
            let mut meta = DeviceVarlenMeta::new(&with.device, BATCH, SEQ)?;
            meta.rebuild(MaskView::from_host(&with.bytes, BATCH, SEQ)?)
        },
    },
];

/// What calls are made of.
struct Inputs {
    device: Device,
    flags: Vec<bool>,
    bytes: Vec<u8>,
    lengths: Vec<usize>,
    runs: Vec<[Range<usize>; 2]>,
    mask: KeyMask,
    meta: VarlenMeta,
}

impl Inputs {
    fn new() -> Result<Self> {
        let flags: Vec<bool> = (0..BATCH * SEQ).map(|at| at % 2 == 0).collect();
        let mask = KeyMask::from_bool(BATCH, SEQ, &flags)?;
        // Half of the tokens in one run each, so that the metadata is small and its tables are large.
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(SEQ, &vec![SEQ / 2; BATCH])?)?;
        Ok(Self {
            device: Device::new(DeviceChoice::Cpu)?,
            bytes: flags.iter().map(|&flag| flag.into()).collect(),
            lengths: vec![SEQ / 2; BATCH],
            runs: vec![[0..SEQ / 4, SEQ / 2..SEQ]; BATCH],
            flags,
            mask,
            meta,
        })
    }
}

/// The same metadata, whose tables are still to be made.
fn fresh(meta: &VarlenMeta) -> varlen_fa::Result<VarlenMeta> {
    VarlenMeta::from_key_mask(meta.key_mask())
}

fn main() -> ExitCode {
    if let Ok(call) = env::var(CHILD) {
        return match child(&call) {
            Ok(report) => {
                println!("{report}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    // Only Linux has /proc and counts address space by `ulimit -v`.
    if !cfg!(target_os = "linux") {
        eprintln!("the trials are ignored: this system has no limit of address space to run them under");
    }
    let names = CALLS.iter().map(|call| call.name).chain([ROWS_WITHOUT_TOKENS]);
    let trials = names.map(|name| {
        let run = move || in_little_memory(name).map_err(|error| Failed::from(format!("{error:#}")));
        Trial::test(name, run).with_ignored_flag(!cfg!(target_os = "linux"))
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// Makes the call in a process of its own: some sizes are too small for it, and the largest is not.
fn in_little_memory(call: &str) -> Result<()> {
    let limit = if call == ROWS_WITHOUT_TOKENS { "unlimited".to_owned() } else { LIMIT.to_string() };
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {limit} && exec \"$0\"")]).arg(env::current_exe()?);
    // Two threads, whose stacks are address space too, and memory that is given back when it is freed.
    command.env(CHILD, call).env("RAYON_NUM_THREADS", "2").env("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536");
    let output = command.output().context("starting a process")?;
    let (said, printed) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "the process ended with {}: {said}", output.status);
    println!("{call}: {}", printed.trim());
    Ok(())
}

fn child(name: &str) -> Result<String> {
    if name == ROWS_WITHOUT_TOKENS {
        return rows_without_tokens();
    }
    let call = CALLS.iter().find(|call| call.name == name).context("a call of the list")?;
    let inputs = Inputs::new()?;
    let (mut refused, mut done) = (0, 0);
    for size in 0..SIZES {
        // A megabyte more for messages and the like; the last size is enough for the call.
        let left = (1 << 20) + call.bytes * size / (SIZES - 1);
        let taken = all_memory_but(left);
        let result = (call.run)(&inputs);
        drop(black_box(taken));
        match result {
            Ok(()) => done += 1,
            Err(Error::OutOfMemory { requested, .. }) if requested > 0 => refused += 1,
            Err(error) => bail!("{left} bytes left: {error:?}"),
        }
    }
    ensure!(refused > 0 && done > 0, "{refused} sizes were too small, {done} were enough");
    Ok(format!("{refused} sizes were too small, {done} were enough"))
}

/// Takes all address space but `left` bytes, in pieces that are never touched.
fn all_memory_but(left: usize) -> Vec<Vec<u8>> {
    const PIECE: usize = 1 << 17;
    let mut pieces = Vec::with_capacity(LIMIT as usize * 1024 / PIECE);
    loop {
        let mut piece = Vec::new();
        if piece.try_reserve_exact(PIECE).is_err() {
            break;
        }
        pieces.push(piece);
    }
    pieces.truncate(pieces.len().saturating_sub(left / PIECE));
    pieces
}

/// As many rows as there can be, without a token: nothing is taken, or the call is refused.
fn rows_without_tokens() -> Result<String> {
    let device = Device::new(DeviceChoice::Cpu)?;
    let before = resident_kib()?;
    let calls: [fn(&Device) -> varlen_fa::Result<()>; 3] = [
        |_| VarlenMeta::from_key_mask(&KeyMask::all(MANY_ROWS, 0)?).map(drop),
        |_| VarlenMeta::from_key_mask(&KeyMask::from_bool(MANY_ROWS, 0, &[])?).map(drop),
        |device| DeviceVarlenMeta::new(device, MANY_ROWS, 0).map(drop),
    ];
    for call in calls {
        match call(&device) {
            Ok(()) | Err(Error::OutOfMemory { .. }) => {}
            Err(error) => bail!("{error:?}"),
        }
    }
    let taken = resident_kib()?.saturating_sub(before);
    ensure!(taken < 64 << 10, "{taken} KiB of memory were used");
    Ok(format!("{taken} KiB were used"))
}

/// The most memory that the process has ever used.
fn resident_kib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
