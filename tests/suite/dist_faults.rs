//! Sequence parallelism when ranks fail or were given different things: an error on every rank, within the time-out, and the process
//! goes on.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use varlen_fa::dist::{
    Communicator, Exchange, Heads, HostCommunicator, MeetingPoint, Mode, Outgoing, ParallelRequest, Rendezvous,
    SequenceParallel, ShardedMeta, Shards, Transfer,
};
use varlen_fa::{DType, Device, Error, KeyMask, Tensor};

use super::dist::on_ranks;
use super::trials::Trials;

/// How soon errors must be there that need no time-out.
const SOON: Duration = Duration::from_secs(20);
const SEQ: usize = 30;
const HEADS: Heads = Heads { num_heads: 6, num_kv_heads: 6, head_dim: 8, dtype: DType::F32 };
const MODES: [Mode; 3] = [Mode::Gather, Mode::Ulysses, Mode::Ring];

pub fn register(trials: &mut Trials) {
    trials.once("dist/a_rank_that_dies", a_rank_that_dies);
    trials.once("dist/a_rank_that_is_silent", a_rank_that_is_silent);
    trials.once("dist/a_rank_with_another_shape", a_rank_with_another_shape);
    trials.once("dist/ranks_that_differ", ranks_that_differ);
    trials.once("dist/calls_in_another_order", calls_in_another_order);
    trials.once("dist/a_meeting_point", a_meeting_point);
    trials.once("dist/refusals", refusals);
}

/// A rank's request and its q, k and v.
struct Rank {
    communicator: HostCommunicator,
    parallel: SequenceParallel,
    request: ParallelRequest,
    tensors: [Tensor; 3],
}

impl Rank {
    fn new(device: &Device, mode: Mode, mut communicator: HostCommunicator) -> Result<Self> {
        let shards = Shards::equal(SEQ, communicator.world_size())?;
        let meta = ShardedMeta::new(&KeyMask::from_lengths(SEQ, &[SEQ - 3])?, &shards, communicator.rank())?;
        let parallel = SequenceParallel::new(device).with_mode(mode);
        let request = parallel.prepare(&mut communicator, &meta, &HEADS)?;
        let shape = [1, meta.query().seq(), HEADS.num_heads, HEADS.head_dim];
        let zeros = || Tensor::zeros(device, HEADS.dtype, &shape);
        Ok(Self { communicator, parallel, request, tensors: [zeros()?, zeros()?, zeros()?] })
    }

    fn forward(&mut self) -> Result<Tensor, Error> {
        let [q, k, v] = &self.tensors;
        self.parallel.forward(&mut self.communicator, &self.request, q, k, v)
    }
}

/// The process goes on: a new group computes.
fn goes_on(device: &Device) -> Result<()> {
    let ranks = on_ranks(HostCommunicator::threads(3)?, |communicator| {
        Ok(Rank::new(device, Mode::Gather, communicator)?.forward().map(drop)?)
    })?;
    ranks.into_iter().collect()
}

fn a_rank_that_dies(device: &Device) -> Result<()> {
    for mode in MODES {
        let started = Instant::now();
        let errors = on_ranks(HostCommunicator::threads(3)?, |communicator| {
            let mut rank = Rank::new(device, mode, communicator)?;
            rank.forward()?;
            if rank.communicator.rank() == 1 {
                return Ok(None);
            }
            let error = rank.forward().err();
            // It stays one.
            ensure!(rank.forward().is_err(), "a call after an error");
            Ok(error)
        })?;
        for (rank, error) in errors.into_iter().enumerate().filter(|&(rank, _)| rank != 1) {
            let error = error?;
            // Ranks that do not wait for rank 1 itself hear of it from one that did.
            ensure!(matches!(error, Some(Error::RankLost { .. })), "{mode}, rank {rank}: {error:?}");
        }
        ensure!(started.elapsed() < SOON, "{mode}: errors took {:?}", started.elapsed());
    }
    goes_on(device)
}

fn a_rank_that_is_silent(device: &Device) -> Result<()> {
    for mode in MODES {
        let limit = Duration::from_millis(300);
        let errors = on_ranks(HostCommunicator::threads(3)?, |communicator| {
            let mut rank = Rank::new(device, mode, communicator)?;
            rank.communicator = rank.communicator.with_time_out(limit);
            rank.communicator.barrier()?;
            if rank.communicator.rank() == 2 {
                thread::sleep(4 * limit);
                // What the others sent before they gave up still counts; what they did not send is missed.
                return Ok(rank.forward().and_then(|_| rank.forward()).err());
            }
            Ok(rank.forward().err())
        })?;
        let mut timed_out = 0;
        for (rank, error) in errors.into_iter().enumerate() {
            let error = error?;
            // In a ring ranks wait for the one before them, which waits in turn.
            let is_named = matches!(error, Some(Error::RankTimedOut { rank, .. }) if rank == 2 || mode == Mode::Ring);
            timed_out += usize::from(is_named);
            let is_told = matches!(error, Some(Error::RankTimedOut { .. } | Error::RankLost { .. }));
            ensure!(is_told, "{mode}, rank {rank}: {error:?}");
        }
        ensure!(timed_out > 0, "{mode}: no rank names the one that was silent");
    }
    goes_on(device)
}

fn a_rank_with_another_shape(device: &Device) -> Result<()> {
    for mode in MODES {
        let started = Instant::now();
        let errors = on_ranks(HostCommunicator::threads(3)?, |communicator| {
            let mut rank = match Rank::new(device, mode, communicator) {
                Ok(rank) => rank,
                // Rank 0 may give up before the others have all agreed.
                Err(error) => return Ok(Some(error.downcast::<Error>()?)),
            };
            if rank.communicator.rank() == 0 {
                rank.tensors[1] = Tensor::zeros(device, HEADS.dtype, &[1, 9, 6, 8])?;
            }
            Ok(rank.forward().err())
        })?;
        for (rank, error) in errors.into_iter().enumerate() {
            let error = error?;
            let is_right = match rank {
                0 => matches!(error, Some(Error::Shape { argument: "k", .. })),
                _ => {
                    matches!(&error, Some(Error::RankLost { rank: 0, why, .. }) if why.contains("`k`: expected shape"))
                }
            };
            ensure!(is_right, "{mode}, rank {rank}: {error:?}");
        }
        ensure!(started.elapsed() < SOON, "{mode}: errors took {:?}", started.elapsed());
    }
    goes_on(device)
}

/// What one rank of three is given, and the word for it on every rank.
fn ranks_that_differ(device: &Device) -> Result<()> {
    type Change = fn(&mut Given);
    struct Given {
        lengths: Vec<usize>,
        shards: Vec<usize>,
        heads: Heads,
        mode: Mode,
        is_causal: bool,
    }
    let changes: [(&str, Change); 6] = [
        ("masks or key ranges", |given| given.lengths = vec![SEQ - 4]),
        ("masks or key ranges", |given| given.is_causal = true),
        ("shards", |given| given.shards = vec![10, 11, 9]),
        ("heads or element types", |given| given.heads.num_kv_heads = 2),
        ("heads or element types", |given| given.heads.dtype = DType::F16),
        ("modes or settings", |given| given.mode = Mode::Ring),
    ];
    for (expected, change) in changes {
        let started = Instant::now();
        let errors = on_ranks(HostCommunicator::threads(3)?, |mut communicator| {
            let rank = communicator.rank();
            let (lengths, shards) = (vec![SEQ - 3], vec![10; 3]);
            let mut given = Given { lengths, shards, heads: HEADS, mode: Mode::Gather, is_causal: false };
            if rank == 1 {
                change(&mut given);
            }
            let mask = KeyMask::from_lengths(SEQ, &given.lengths)?;
            let mut meta = ShardedMeta::new(&mask, &Shards::from_lengths(&given.shards)?, rank)?;
            if given.is_causal {
                meta = meta.with_ranges(&varlen_fa::KeyRanges::causal([1, SEQ, SEQ])?)?;
            }
            let parallel = SequenceParallel::new(device).with_mode(given.mode);
            Ok(parallel.prepare(&mut communicator, &meta, &given.heads).err())
        })?;
        for (rank, error) in errors.into_iter().enumerate() {
            let error = error?;
            let is_right = match &error {
                Some(Error::RanksDiffer { what, own_rank, .. }) => what == expected && *own_rank == rank,
                // Another rank was quicker to give up, and says why.
                Some(Error::RankLost { why, .. }) => why.contains(expected),
                _ => false,
            };
            ensure!(is_right, "{expected}, rank {rank}: {error:?}");
        }
        ensure!(started.elapsed() < SOON, "{expected}: errors took {:?}", started.elapsed());
    }
    goes_on(device)
}

/// One rank prepares a request where the others attend; one sends too little.
fn calls_in_another_order(device: &Device) -> Result<()> {
    let errors = on_ranks(HostCommunicator::threads(3)?, |communicator| {
        let mut rank = Rank::new(device, Mode::Gather, communicator)?;
        if rank.communicator.rank() == 1 {
            let meta = rank.request.meta().clone();
            return Ok(rank.parallel.prepare(&mut rank.communicator, &meta, &HEADS).err());
        }
        Ok(rank.forward().err())
    })?;
    let errors = errors.into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(errors.iter().any(|error| matches!(error, Some(Error::RanksDiffer { .. }))), "{errors:?}");
    ensure!(errors.iter().all(Option::is_some), "{errors:?}");
    let errors = on_ranks(HostCommunicator::threads(2)?, |mut communicator| {
        let bytes = [0; 16];
        if communicator.rank() == 0 {
            let sends = vec![Outgoing { to: 1, from: Transfer::Host(&bytes[..9]) }];
            let exchange = Exchange { operation: "too little", tag: [0; 16], sends, receives: Vec::new() };
            return Ok(communicator.exchange(exchange, &mut || Ok(())).err());
        }
        Ok(communicator.all_gather_16("sixteen bytes", bytes).err())
    })?;
    let errors = errors.into_iter().collect::<Result<Vec<_>>>()?;
    let expected = "sixteen bytes: rank 0 has other shapes (9 bytes where 16 fit) than rank 1";
    ensure!(errors[0].is_none() && errors[1].as_ref().is_some_and(|error| error.to_string() == expected), "{errors:?}");
    goes_on(device)
}

/// Ranks that are told where rank 0 listens, and one that never comes.
fn a_meeting_point(device: &Device) -> Result<()> {
    let point = MeetingPoint::listen((Ipv4Addr::LOCALHOST, 0).into())?;
    let address = point.address()?;
    let (point, limit) = (&point, SOON);
    let ranks = on_ranks(vec![0, 1, 2], |rank| {
        let communicator = match rank {
            0 => HostCommunicator::lead(point, 3, limit)?,
            _ => HostCommunicator::connect(&Rendezvous::Tcp(address), rank, 3, limit)?,
        };
        Ok(Rank::new(device, Mode::Ring, communicator)?.forward().map(drop)?)
    })?;
    ranks.into_iter().collect::<Result<()>>()?;
    let alone = HostCommunicator::lead(point, 2, Duration::from_millis(50)).err();
    ensure!(matches!(alone, Some(Error::RankTimedOut { rank: 1, .. })), "{alone:?}");
    let none = HostCommunicator::lead(point, 0, limit).err();
    ensure!(matches!(none, Some(Error::Sharding { argument: "world_size", .. })), "{none:?}");
    ensure!(HostCommunicator::lead(point, 1, limit)?.world_size() == 1);
    Ok(())
}

fn refusals(device: &Device) -> Result<()> {
    ensure!(matches!(HostCommunicator::threads(0), Err(Error::Sharding { argument: "world_size", .. })));
    let alone = || Ok::<_, Error>(HostCommunicator::threads(1)?.remove(0));
    let mask = KeyMask::from_lengths(SEQ, &[SEQ])?;
    let meta = |ranks: usize| ShardedMeta::new(&mask, &Shards::equal(SEQ, ranks)?, 0);
    let parallel = SequenceParallel::new(device);
    let refused = |parallel: &SequenceParallel, meta: &ShardedMeta, heads: &Heads| -> Result<String> {
        let error = parallel.prepare(&mut alone()?, meta, heads).err();
        Ok(error.map_or("accepted".to_owned(), |error| error.to_string()))
    };
    let of_world = refused(&parallel, &meta(2)?, &HEADS)?;
    ensure!(of_world == "`meta`: expected metadata of rank 0 of 1, got metadata of rank 0 of 2", "{of_world}");
    let of_heads = refused(&parallel, &meta(1)?, &Heads { num_kv_heads: 4, ..HEADS })?;
    ensure!(of_heads.starts_with("`k`: num_kv_heads must divide num_heads = 6"), "{of_heads}");
    let of_dim = refused(&parallel, &meta(1)?, &Heads { head_dim: 513, ..HEADS })?;
    ensure!(of_dim.starts_with("`q`: head_dim must be"), "{of_dim}");
    let of_mode = refused(&parallel.clone().with_mode(Mode::UlyssesRing { ulysses: 2 }), &meta(1)?, &HEADS)?;
    ensure!(of_mode == "`mode`: ulysses-ring:2 cannot be forced here: groups of 2 do not divide 1 ranks", "{of_mode}");
    let of_chunks = refused(&parallel.clone().with_chunks(7), &meta(1)?, &HEADS)?;
    ensure!(of_chunks.ends_with("a rank's 6 key/value heads cannot be divided into 7 chunks"), "{of_chunks}");
    // A rank that is not there, or is this one.
    for to in [0, 1, usize::MAX] {
        let sends = vec![Outgoing { to, from: Transfer::Host(&[1]) }];
        let exchange = Exchange { operation: "test", tag: [0; 16], sends, receives: Vec::new() };
        let error = alone()?.exchange(exchange, &mut || Ok(())).err();
        ensure!(matches!(error, Some(Error::Sharding { argument: "peer", .. })), "{error:?}");
    }
    // A request of another world.
    let mut one = Rank::new(device, Mode::Gather, alone()?)?;
    one.forward()?;
    let mut two = HostCommunicator::threads(2)?;
    one.communicator = two.remove(1);
    ensure!(matches!(one.forward(), Err(Error::Sharding { argument: "communicator", .. })));
    Ok(())
}
