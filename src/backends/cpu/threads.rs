//! The threads of the CPU device: the library's own pools, one for each number of threads that was
//! asked for, or a pool of the application's.
//!
//! rayon's global pool is never started here: if its threads cannot start, it stays unusable for the
//! whole process. A pool does not outlive a fork: in a child other pools take its place.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use rayon::prelude::*;
use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuilder};

use crate::config::Config;
use crate::process::{self, OfProcess};

/// Address space that is free before a thread is started, in bytes: its stack, what the standard
/// library and rayon take beside it in the new thread, where there is no way to fail, and what
/// the application needs. More than 32 MiB: a smaller block, once freed, makes glibc keep blocks
/// of its size for the thread that freed them.
const ROOM_OF_A_THREAD: usize = 36 << 20;

/// What is free beside that for each thread, in bytes: its tiles of a call of usual size. More
/// threads than have memory for their work are of no use.
const ROOM_OF_WORK: usize = 1 << 20;

/// Where a device's calls may run.
#[derive(Debug)]
pub(super) struct Threads {
    most: usize,
    /// Whether a caller that is a worker of a rayon pool brings that pool.
    follows_caller: bool,
    application: Option<OfProcess<ThreadPool>>,
}

impl Threads {
    /// The library's own.
    pub fn own(asked: Option<NonZeroUsize>) -> Self {
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let limit = processors.max(Config::MAX_THREADS);
        let most = asked.map_or(processors, NonZeroUsize::get);
        if most > limit {
            log::warn!("{most} threads were asked for; the CPU device takes {limit}");
        }
        Self { most: most.min(limit), follows_caller: asked.is_none(), application: None }
    }

    /// A pool of the application's; in a forked child, as many threads of the library's.
    pub fn of_application(pool: Arc<ThreadPool>) -> Self {
        let most = pool.current_num_threads();
        Self { most, follows_caller: false, application: Some(OfProcess::new(pool)) }
    }

    /// The number that a call may use.
    pub fn most(&self) -> usize {
        self.most
    }

    /// The threads for work that is worth `wanted` of them, at most. Few wake no other thread.
    pub fn team(&self, wanted: usize) -> Team<'_> {
        if wanted < 2 {
            return Team::CALLER;
        }
        if let Some(pool) = self.application.as_ref().filter(|pool| pool.is_own()) {
            return Team::of(Pool::Of(pool), wanted.min(self.most));
        }
        let is_worker = self.follows_caller && rayon::current_thread_index().is_some();
        if is_worker && !process::is_forked_thread() {
            return Team::of(Pool::Callers, wanted.min(rayon::current_num_threads()));
        }
        // To wait in a pool of this process is not for a worker of a pool of the parent's.
        if self.most < 2 || rayon::current_thread_index().is_some() && process::is_forked_thread() {
            return Team::CALLER;
        }
        match own_pool(self.most) {
            None => Team::CALLER,
            Some(pool) => Team::of(Pool::Of(pool), wanted.min(pool.current_num_threads())),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Pool<'a> {
    Of(&'a ThreadPool),
    /// The one whose worker the caller is.
    Callers,
}

/// The threads of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Team<'a> {
    /// Where there is none, the calling thread works alone.
    pool: Option<Pool<'a>>,
    count: usize,
}

impl<'a> Team<'a> {
    const CALLER: Self = Self { pool: None, count: 1 };

    fn of(pool: Pool<'a>, count: usize) -> Self {
        if count < 2 { Self::CALLER } else { Self { pool: Some(pool), count } }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Does `work` once on each thread.
    pub fn run(&self, work: impl Fn() + Sync) {
        let all = || (0..self.count).into_par_iter().with_max_len(1).for_each(|_| work());
        match self.pool {
            None => work(),
            Some(Pool::Callers) => all(),
            Some(Pool::Of(pool)) => pool.install(all),
        }
    }

    /// Does `work` for each of `items` numbers; a task takes `of_a_task` of them, at least.
    pub fn for_each(&self, items: usize, of_a_task: usize, work: impl Fn(usize) + Sync + Send) {
        let all = || (0..items).into_par_iter().with_min_len(of_a_task).for_each(&work);
        match self.pool {
            None => (0..items).for_each(&work),
            Some(Pool::Callers) => all(),
            Some(Pool::Of(pool)) => pool.install(all),
        }
    }
}

/// The library's pools of one process, by the number of threads. What could not be started is kept
/// too, so that not every call tries again.
struct Pools {
    process: usize,
    by_number: Mutex<Vec<(usize, Option<&'static ThreadPool>)>>,
}

impl Pools {
    /// Those of this process. They are never freed: a child may not touch its parent's, whose lock
    /// and threads are as the fork left them.
    fn get() -> &'static Self {
        static POOLS: AtomicPtr<Pools> = AtomicPtr::new(std::ptr::null_mut());
        let mut latest = POOLS.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or from `Box::leak` below and never freed or changed.
            let pools: Option<&'static Self> = unsafe { latest.as_ref() };
            if let Some(pools) = pools.filter(|pools| pools.process == process::current()) {
                return pools;
            }
            let made: *mut Self =
                Box::leak(Box::new(Self { process: process::current(), by_number: Mutex::default() }));
            // Another thread may be first; what was made here is then a few bytes that are lost.
            match POOLS.compare_exchange(latest, made, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => latest = made,
                Err(others) => latest = others,
            }
        }
    }
}

/// The library's pool of so many threads, or of as many as could be started; `None` for fewer
/// than 2, which the caller replaces.
fn own_pool(number: usize) -> Option<&'static ThreadPool> {
    let mut pools = Pools::get().by_number.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&(_, pool)) = pools.iter().find(|&&(of, _)| of == number) {
        return pool;
    }
    let pool = start(number).map(|pool| &*Box::leak(Box::new(pool)));
    pools.push((number, pool));
    pool
}

fn start(number: usize) -> Option<ThreadPool> {
    // Threads are started before the pool, which can only be built whole; they wait for their place.
    let mut waiting = Vec::with_capacity(number);
    while waiting.len() < number {
        match start_one(waiting.len()) {
            Ok(place) => waiting.push(place),
            Err(why) => {
                let started = waiting.len();
                log::warn!("{started} of {number} threads of the CPU device could be started: {why}");
                break;
            }
        }
    }
    if waiting.len() < 2 {
        return None;
    }
    let builder = ThreadPoolBuilder::new().num_threads(waiting.len());
    let mut places = waiting.into_iter();
    let pool = builder.spawn_handler(|worker| {
        let place = places.next().ok_or_else(|| std::io::Error::other("more workers than threads"))?;
        place.send(worker).map_err(|_| std::io::Error::other("a thread has ended"))
    });
    let pool = pool.build().inspect_err(|error| log::warn!("the CPU device works without threads: {error}")).ok()?;
    // What a worker takes as it begins, it takes without a way to fail: all have it before the
    // first of them takes memory for its work.
    pool.broadcast(|_| ());
    Some(pool)
}

/// A thread that waits to become a worker.
fn start_one(index: usize) -> std::io::Result<mpsc::Sender<ThreadBuilder>> {
    // A thread for which there is a stack but nothing beside it would end the process.
    let room = ROOM_OF_A_THREAD + (index + 1) * ROOM_OF_WORK;
    Vec::<u8>::new().try_reserve_exact(room).map_err(std::io::Error::other)?;
    let (place, given) = mpsc::channel::<ThreadBuilder>();
    let (is_up, up) = mpsc::channel();
    thread::Builder::new().name(format!("varlen-fa-{index}")).spawn(move || {
        // The one that waits for it is `start_one`.
        let _ = is_up.send(());
        if let Ok(worker) = given.recv() {
            worker.run();
        }
    })?;
    // One after another, so that each finds the room that was free for it.
    up.recv().map_err(std::io::Error::other)?;
    Ok(place)
}
