//! Sequence parallelism between processes of this machine: this program starts itself once for each rank.

#![allow(clippy::single_range_in_vec_init, reason = "one run of tokens is meant")]

use std::env;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{self, Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use varlen_fa::dist::{
    Communicator, Heads, HostCommunicator, Mode, ParallelRequest, Rendezvous, SequenceParallel, ShardedMeta, Shards,
};
use varlen_fa::{AttentionMask, DType, Device, DeviceChoice, Error, KeyMask, MaskedAttention, Tensor, VarlenMeta};
use varlen_fa_testkit::random;

/// Set in the processes that this program starts: what the rank does.
const PART: &str = "VARLEN_FA_TEST_PART";
const RANK: &str = "VARLEN_FA_TEST_RANK";
const WORLD: &str = "VARLEN_FA_TEST_WORLD";
/// An address, or the path of a file.
const MEETING: &str = "VARLEN_FA_TEST_MEETING";

/// For ranks that shall meet and answer, on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(60);
/// For ranks that shall not.
const SHORT: Duration = Duration::from_millis(500);
/// When a process counts as one that hangs.
const HANGS: Duration = Duration::from_secs(150);

const BATCH: usize = 2;
const SHARDED: usize = 301;
const PREFIX: usize = 20;
/// More bytes than sockets hold.
const HEADS: Heads = Heads { num_heads: 8, num_kv_heads: 4, head_dim: 64, dtype: DType::F32 };

/// What a rank does.
type Part = fn(&Meeting) -> Result<()>;

const PARTS: [(&str, Part); 6] = [
    ("attends", attends),
    ("one_dies", one_dies),
    ("one_is_silent", one_is_silent),
    ("one_has_another_mask", one_has_another_mask),
    ("one_has_another_shape", one_has_another_shape),
    ("one_knows_another_world", one_knows_another_world),
];

fn main() -> ExitCode {
    if let Ok(part) = env::var(PART) {
        return match play(&part) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("rank {}: {error:#}", env::var(RANK).unwrap_or_default());
                ExitCode::FAILURE
            }
        };
    }
    let trial = |name: &str, run: fn() -> Result<()>| {
        Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
    };
    let trials = vec![
        trial("attends/tcp", || all_play("attends", 3, &Meeting::tcp()?)),
        trial("attends/file", || all_play("attends", 4, &Meeting::file("attends"))),
        trial("one_dies", || all_play("one_dies", 3, &Meeting::file("one_dies"))),
        trial("one_is_silent", || all_play("one_is_silent", 3, &Meeting::file("one_is_silent"))),
        trial("one_has_another_mask", || all_play("one_has_another_mask", 3, &Meeting::file("another_mask"))),
        trial("one_has_another_shape", || all_play("one_has_another_shape", 3, &Meeting::file("another_shape"))),
        trial("one_knows_another_world", || all_play("one_knows_another_world", 3, &Meeting::file("another_world"))),
        trial("nobody_comes", nobody_comes),
        trial("strangers", strangers),
        trial("files_of_earlier_runs", files_of_earlier_runs),
        trial("two_are_the_same_rank", two_are_the_same_rank),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Where ranks meet, and which of them this process is.
#[derive(Debug, Clone)]
struct Meeting {
    rendezvous: Rendezvous,
    rank: usize,
    world: usize,
}

impl Meeting {
    fn tcp() -> Result<Self> {
        // A port that was free a moment ago.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        Ok(Self { rendezvous: Rendezvous::Tcp(address), rank: 0, world: 0 })
    }

    fn file(name: &str) -> Self {
        Self { rendezvous: Rendezvous::File(path(name)), rank: 0, world: 0 }
    }

    fn text(&self) -> Result<String> {
        match &self.rendezvous {
            Rendezvous::Tcp(address) => Ok(address.to_string()),
            Rendezvous::File(path) => Ok(path.display().to_string()),
            other => bail!("{other:?}"),
        }
    }

    /// Of a process that was started.
    fn of_environment() -> Result<Self> {
        let text = env::var(MEETING)?;
        let rendezvous = match text.parse::<SocketAddr>() {
            Ok(address) => Rendezvous::Tcp(address),
            Err(_) => Rendezvous::File(text.into()),
        };
        Ok(Self { rendezvous, rank: env::var(RANK)?.parse()?, world: env::var(WORLD)?.parse()? })
    }

    fn connect(&self, limit: Duration) -> Result<HostCommunicator, Error> {
        HostCommunicator::connect(&self.rendezvous, self.rank, self.world, limit)
    }
}

/// A path of this run.
fn path(name: &str) -> PathBuf {
    env::temp_dir().join(format!("varlen-fa-{}-{name}", process::id()))
}

fn play(part: &str) -> Result<()> {
    let (_, run) = PARTS.iter().find(|(name, _)| *name == part).context("no such part")?;
    run(&Meeting::of_environment()?)
}

/// Starts a process.
fn start(part: &str, rank: usize, world: usize, meeting: &Meeting) -> Result<Child> {
    let mut command = Command::new(env::current_exe()?);
    command.env(PART, part).env(RANK, rank.to_string()).env(WORLD, world.to_string());
    Ok(command.env(MEETING, meeting.text()?).stderr(Stdio::piped()).spawn()?)
}

/// Waits for the processes, each of which says by its exit whether it found what it expects.
fn expect_success(mut ranks: Vec<Child>) -> Result<()> {
    let started = Instant::now();
    while ranks.iter_mut().any(|rank| matches!(rank.try_wait(), Ok(None))) {
        if started.elapsed() > HANGS {
            ranks.iter_mut().for_each(|rank| _ = rank.kill());
            bail!("a rank hangs");
        }
        thread::sleep(Duration::from_millis(20));
    }
    let mut faults = Vec::new();
    for rank in ranks {
        let output = rank.wait_with_output()?;
        if !output.status.success() {
            faults.push(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

fn all_play(part: &str, world: usize, meeting: &Meeting) -> Result<()> {
    // The last one first: the others wait for rank 0.
    let ranks = (0..world).rev().map(|rank| start(part, rank, world, meeting)).collect::<Result<Vec<_>>>()?;
    expect_success(ranks)
}

/// One rank's part of a call that every process knows as a whole.
struct Layer {
    device: Device,
    shards: Shards,
    mask: KeyMask,
    /// Global q, k and v.
    whole: [Vec<f32>; 3],
}

const WIDTHS: [usize; 3] = [HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads];

impl Layer {
    fn new(world: usize) -> Result<Self> {
        let device = Device::new(DeviceChoice::Cpu)?;
        let shards = Shards::equal(SHARDED, world)?.with_prefix(PREFIX)?;
        let seq = shards.seq();
        let mask = KeyMask::from_runs(seq, &[vec![0..7, 20..200, 230..seq], vec![3..seq - 40]])?;
        let mut stream = 0;
        let whole = WIDTHS.map(|heads| {
            stream += 1;
            random::normal_stream(5, stream, BATCH * seq * heads * HEADS.head_dim)
        });
        Ok(Self { device, shards, mask, whole })
    }

    fn local(&self, rank: usize) -> Vec<usize> {
        (0..PREFIX).chain(self.shards.shard(rank)).collect()
    }

    /// Rows of some tokens of a global `[B, S, heads, D]`.
    fn rows(&self, whole: &[f32], heads: usize, tokens: &[usize]) -> Vec<f32> {
        let (seq, width) = (self.shards.seq(), heads * HEADS.head_dim);
        let rows = (0..BATCH).flat_map(|b| tokens.iter().map(move |token| b * seq + token));
        rows.flat_map(|row| &whole[row * width..][..width]).copied().collect()
    }

    fn inputs(&self, rank: usize) -> Result<[Tensor; 3]> {
        let tokens = self.local(rank);
        let tensor = |at: usize| {
            let rows = self.rows(&self.whole[at], WIDTHS[at], &tokens);
            Tensor::from_slice(&self.device, &rows, &[BATCH, tokens.len(), WIDTHS[at], HEADS.head_dim])
        };
        Ok([tensor(0)?, tensor(1)?, tensor(2)?])
    }

    /// This rank's rows of the output of one device.
    fn expected(&self, rank: usize) -> Result<Vec<f32>> {
        let seq = self.shards.seq();
        let tensor =
            |at: usize| Tensor::from_slice(&self.device, &self.whole[at], &[BATCH, seq, WIDTHS[at], HEADS.head_dim]);
        let meta = VarlenMeta::from_key_mask(&self.mask)?;
        let (q, k, v) = (tensor(0)?, tensor(1)?, tensor(2)?);
        let attended = MaskedAttention::new(&self.device).forward(&q, &k, &v, AttentionMask::varlen(&meta))?;
        Ok(self.rows(&attended.out.to_vec::<f32>()?, HEADS.num_heads, &self.local(rank)))
    }

    fn prepare(
        &self,
        communicator: &mut HostCommunicator,
        mode: Mode,
    ) -> Result<(SequenceParallel, ParallelRequest), Error> {
        let meta = ShardedMeta::new(&self.mask, &self.shards, communicator.rank())?;
        let parallel = SequenceParallel::new(&self.device).with_mode(mode);
        let request = parallel.prepare(communicator, &meta, &HEADS)?;
        Ok((parallel, request))
    }

    /// Prepares a request and attends.
    fn forward(&self, communicator: &mut HostCommunicator, mode: Mode) -> Result<Vec<f32>> {
        let (parallel, request) = self.prepare(communicator, mode)?;
        let [q, k, v] = self.inputs(communicator.rank())?;
        Ok(parallel.forward(communicator, &request, &q, &k, &v)?.to_vec()?)
    }

    fn check(&self, communicator: &mut HostCommunicator) -> Result<()> {
        let expected = self.expected(communicator.rank())?;
        let mut modes = vec![Mode::Gather, Mode::Ring];
        match communicator.world_size() {
            2 => modes.push(Mode::Ulysses),
            4 => modes.extend([Mode::Ulysses, Mode::UlyssesGather { ulysses: 2 }, Mode::UlyssesRing { ulysses: 2 }]),
            _ => {}
        }
        for mode in modes {
            let out = self.forward(communicator, mode).with_context(|| mode.to_string())?;
            let is_merged = matches!(mode, Mode::Ring | Mode::UlyssesRing { .. });
            let limit = if is_merged { 1e-5 } else { 0.0 };
            let furthest = out.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            ensure!(out.len() == expected.len() && furthest <= limit, "{mode}: {furthest} from one device");
            ensure!(out.iter().all(|value| value.is_finite()), "{mode}: NaN");
        }
        Ok(())
    }
}

fn attends(meeting: &Meeting) -> Result<()> {
    Layer::new(meeting.world)?.check(&mut meeting.connect(LIMIT)?)
}

/// What a call gave that must fail.
fn error_of<T>(result: Result<T>) -> Result<Error> {
    match result {
        Ok(_) => bail!("a call succeeded"),
        Err(error) => Ok(error.downcast::<Error>()?),
    }
}

/// Rank 1 ends without a word. The others notice long before the time-out, and go on without it.
fn one_dies(meeting: &Meeting) -> Result<()> {
    let layer = Layer::new(meeting.world)?;
    let mut communicator = meeting.connect(LIMIT)?;
    layer.forward(&mut communicator, Mode::Gather)?;
    if meeting.rank == 1 {
        // As after a crash: nothing is closed in order. The parent takes this exit for success.
        process::exit(0);
    }
    let started = Instant::now();
    let error = error_of(layer.forward(&mut communicator, Mode::Ring))?;
    ensure!(matches!(error, Error::RankLost { .. }), "{error:?}");
    ensure!(started.elapsed() < LIMIT / 2, "it took {:?}", started.elapsed());
    let rendezvous = Rendezvous::File(PathBuf::from(format!("{}-later", meeting.text()?)));
    let rest = Meeting { rendezvous, rank: meeting.rank / 2, world: 2 };
    Layer::new(2)?.check(&mut rest.connect(LIMIT)?)
}

/// Rank 1 is there but says nothing.
fn one_is_silent(meeting: &Meeting) -> Result<()> {
    let layer = Layer::new(meeting.world)?;
    let mut communicator = meeting.connect(LIMIT)?.with_time_out(LIMIT);
    layer.forward(&mut communicator, Mode::Gather)?;
    let mut communicator = communicator.with_time_out(SHORT);
    if meeting.rank == 1 {
        thread::sleep(6 * SHORT);
        let error = error_of(layer.forward(&mut communicator, Mode::Gather))?;
        ensure!(matches!(error, Error::RankLost { .. } | Error::RankTimedOut { .. }), "{error:?}");
        return Ok(());
    }
    let started = Instant::now();
    let error = error_of(layer.forward(&mut communicator, Mode::Gather))?;
    let is_right = match &error {
        Error::RankTimedOut { rank, limit, .. } => *rank == 1 && *limit == SHORT,
        // The other one was quicker to give up, and says why.
        Error::RankLost { why, .. } => why.contains("rank 1 did not answer"),
        _ => false,
    };
    ensure!(is_right && started.elapsed() < 5 * SHORT, "{error:?} after {:?}", started.elapsed());
    Ok(())
}

fn one_has_another_mask(meeting: &Meeting) -> Result<()> {
    let mut layer = Layer::new(meeting.world)?;
    if meeting.rank == 1 {
        layer.mask = KeyMask::from_lengths(layer.shards.seq(), &[9, 10])?;
    }
    let mut communicator = meeting.connect(LIMIT)?;
    let error = error_of(layer.forward(&mut communicator, Mode::Gather))?;
    ensure!(error.to_string().contains("masks or key ranges"), "{error}");
    Ok(())
}

fn one_has_another_shape(meeting: &Meeting) -> Result<()> {
    let layer = Layer::new(meeting.world)?;
    let mut communicator = meeting.connect(LIMIT)?;
    let [mut q, k, v] = layer.inputs(meeting.rank)?;
    if meeting.rank == 1 {
        q = Tensor::zeros(&layer.device, DType::F32, &[1, 3, 8, 64])?;
    }
    // Rank 1 may give up before the others have all agreed.
    let prepared = layer.prepare(&mut communicator, Mode::Ring);
    let done = prepared.and_then(|(parallel, request)| parallel.forward(&mut communicator, &request, &q, &k, &v));
    let error = error_of(done.map_err(Into::into))?;
    let is_right = match (&error, meeting.rank) {
        (Error::Shape { argument, .. }, 1) => *argument == "q",
        (Error::RankLost { why, .. }, rank) => rank != 1 && why.contains("`q`: expected shape"),
        _ => false,
    };
    ensure!(is_right, "{error:?}");
    Ok(())
}

fn one_knows_another_world(meeting: &Meeting) -> Result<()> {
    let world = if meeting.rank == 2 { 7 } else { meeting.world };
    let Err(error) = (Meeting { world, ..meeting.clone() }).connect(Duration::from_secs(10)) else {
        bail!("rank {} of {world} is connected", meeting.rank);
    };
    let is_right = match meeting.rank {
        0 => error.to_string() == "connecting the ranks: rank 2 has other world size, 7, than rank 0",
        // Rank 2 is told; rank 1 is told or sees that rank 0 has gone.
        _ => matches!(error, Error::RankLost { rank: 0, .. } | Error::RankTimedOut { rank: 0, .. }),
    };
    ensure!(is_right, "{error:?}");
    Ok(())
}

/// Ranks that wait for others in vain name the first of them.
fn nobody_comes() -> Result<()> {
    let cases = [
        (Meeting::tcp()?, 0, 1),
        (Meeting::file("nobody"), 0, 1),
        (Meeting::tcp()?, 1, 0),
        (Meeting::file("nobody-2"), 2, 0),
    ];
    for (meeting, rank, missing) in cases {
        let started = Instant::now();
        let meeting = Meeting { rank, world: 3, ..meeting };
        let error = meeting.connect(SHORT).err();
        let is_right = matches!(error, Some(Error::RankTimedOut { rank, limit: SHORT, .. }) if rank == missing);
        ensure!(is_right && started.elapsed() < 10 * SHORT, "{meeting:?}: {error:?} after {:?}", started.elapsed());
        if let Rendezvous::File(path) = &meeting.rendezvous {
            ensure!(!path.exists(), "{} is left", path.display());
        }
    }
    let error = Meeting { rank: 2, world: 2, ..Meeting::file("nobody-3") }.connect(SHORT).err();
    ensure!(matches!(error, Some(Error::Sharding { argument: "rank", .. })), "{error:?}");
    let gone = Meeting { rank: 0, world: 2, ..Meeting::file("no-such-folder/file") }.connect(SHORT).err();
    ensure!(matches!(gone, Some(Error::Backend { .. })), "{gone:?}");
    Ok(())
}

/// Whoever else connects to rank 0 does no harm: one says something else, one claims a frame of 2⁶³ bytes, one says nothing.
fn strangers() -> Result<()> {
    let meeting = Meeting::tcp()?;
    let Rendezvous::Tcp(address) = meeting.rendezvous else { bail!("{meeting:?}") };
    let first = start("attends", 0, 2, &meeting)?;
    let started = Instant::now();
    let say = |bytes: &[u8]| -> Result<TcpStream> {
        loop {
            match TcpStream::connect(address) {
                Ok(mut socket) => {
                    socket.write_all(bytes)?;
                    return Ok(socket);
                }
                Err(_) if started.elapsed() < LIMIT => thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error.into()),
            }
        }
    };
    let large = [&[1; 17][..], &(1_u64 << 63).to_le_bytes()].concat();
    let _open = [say(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")?, say(&large)?, say(b"")?];
    let second = start("attends", 1, 2, &meeting)?;
    expect_success(vec![first, second])
}

/// A file whose rank 0 is gone, one that names a stranger, one that is no address: each is replaced.
fn files_of_earlier_runs() -> Result<()> {
    let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let texts = [
        format!("{} 77\n", TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?),
        format!("{} 78\n", stranger.local_addr()?),
        "no address".to_owned(),
    ];
    for (at, text) in texts.into_iter().enumerate() {
        let meeting = Meeting::file(&format!("earlier-{at}"));
        fs::write(meeting.text()?, text)?;
        let second = start("attends", 1, 2, &meeting)?;
        thread::sleep(Duration::from_millis(100));
        expect_success(vec![start("attends", 0, 2, &meeting)?, second])?;
        ensure!(!PathBuf::from(meeting.text()?).exists(), "the file is left");
    }
    Ok(())
}

/// The second one is turned away; the others go on.
fn two_are_the_same_rank() -> Result<()> {
    let meeting = Meeting::file("same");
    let ranks = vec![start("attends", 0, 3, &meeting)?, start("attends", 1, 3, &meeting)?];
    // Until rank 1 has been welcomed: it has no way to say so.
    thread::sleep(Duration::from_secs(2));
    let again = Meeting { rank: 0, world: 3, ..meeting.clone() };
    let error = Meeting { rank: 1, ..again }.connect(Duration::from_secs(20)).err();
    ensure!(
        matches!(&error, Some(Error::RankLost { rank: 0, why, .. }) if why.contains("rank 1 is there")),
        "{error:?}"
    );
    let last = start("attends", 2, 3, &meeting)?;
    expect_success(ranks.into_iter().chain([last]).collect())
}
