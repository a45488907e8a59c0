//! Where a rank finds what its peers sent, whichever thread puts it there.

use std::collections::VecDeque;
use std::hint;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::digest::Tag;
use crate::error::{Error, Result};

/// One message of a peer, whose body is of type `B`.
#[derive(Debug)]
pub(super) struct Message<B> {
    pub tag: Tag,
    pub body: B,
}

/// What peers sent and this rank has not taken yet, and what became of the peers.
#[derive(Debug)]
pub(super) struct Mailbox<B> {
    state: Mutex<State<B>>,
    changed: Condvar,
    /// Counts changes, for those who look without the lock.
    changes: AtomicU64,
    /// How long a rank looks before it sleeps: to be woken takes longer than what a GPU's rank waits for.
    looks: Duration,
    /// Whether it lets other threads run while it looks, which takes the system: where ranks share a core, the other one must run.
    yields: bool,
}

#[derive(Debug)]
struct State<B> {
    /// One queue for each rank.
    queues: Vec<VecDeque<Message<B>>>,
    /// Why nothing more comes from a rank.
    lost: Vec<Option<String>>,
    /// The rank that gave up first, and why.
    aborted: Option<(usize, String)>,
    /// How many threads sleep until something changes: where none does, none is woken, which would take the system.
    sleepers: usize,
}

impl<B> Mailbox<B> {
    pub(super) fn new(world: usize) -> Self {
        let state = State {
            queues: (0..world).map(|_| VecDeque::new()).collect(),
            lost: vec![None; world],
            aborted: None,
            sleepers: 0,
        };
        let (changed, changes) = (Condvar::new(), AtomicU64::new(0));
        Self { state: Mutex::new(state), changed, changes, looks: Duration::ZERO, yields: true }
    }

    /// A mailbox whose rank looks for so long before it sleeps.
    pub(super) fn looking(self, looks: Duration) -> Self {
        let world = self.lock().queues.len();
        let yields = thread::available_parallelism().map_or(true, |cores| cores.get() <= world);
        Self { looks, yields, ..self }
    }

    /// A message of a rank.
    pub(super) fn put(&self, from: usize, message: Message<B>) {
        self.change(|state| state.queues[from].push_back(message));
    }

    /// Makes the rank look again: something that it waits for has changed elsewhere.
    pub(super) fn wake(&self) {
        self.change(|_| ());
    }

    /// Nothing more comes from a rank. What it sent before still counts.
    pub(super) fn lose(&self, rank: usize, why: &str) {
        self.change(|state| _ = state.lost[rank].get_or_insert_with(|| why.to_owned()));
    }

    /// A rank has given up, and every other one shall.
    pub(super) fn abort(&self, rank: usize, why: &str) {
        self.change(|state| _ = state.aborted.get_or_insert_with(|| (rank, why.to_owned())));
    }

    /// The rank because of which others have given up, and why.
    pub(super) fn cause(&self) -> Option<(usize, String)> {
        self.lock().aborted.clone()
    }

    /// Why a rank has given up, or that one is lost.
    #[cfg(feature = "nccl")]
    pub(super) fn trouble(&self) -> Option<String> {
        let state = self.lock();
        let aborted = state.aborted.as_ref().map(|(rank, why)| format!("rank {rank}: {why}"));
        let lost = || {
            let lost = state.lost.iter().enumerate().find_map(|(rank, why)| Some((rank, why.as_ref()?)));
            lost.map(|(rank, why)| format!("rank {rank} is lost: {why}"))
        };
        aborted.or_else(lost)
    }

    /// Fails if a rank has given up. For what could not be sent to `rank`: it may have said why just before, so this waits for its
    /// last word.
    pub(super) fn check_last_word(&self, operation: &'static str, rank: usize, limit: Duration) -> Result<()> {
        let mut state = self.lock();
        let unknown = |state: &mut State<B>| state.aborted.is_none() && state.lost[rank].is_none();
        state.sleepers += 1;
        let waited = self.changed.wait_timeout_while(state, limit, unknown);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.sleepers -= 1;
        state.check(operation)
    }

    /// The next message of a rank; waits for it until `started` is `limit` ago.
    pub(super) fn take(&self, operation: &'static str, rank: usize, within: (Instant, Duration)) -> Result<Message<B>> {
        // What was sent counts, whatever became of the sender: on every rank the same call fails.
        self.wait(operation, rank, within, |state| state.queues[rank].pop_front())
    }

    /// Waits until `is_done`, which a rank makes true before it [wakes](Self::wake) this one.
    pub(super) fn wait_until(
        &self,
        operation: &'static str,
        rank: usize,
        within: (Instant, Duration),
        is_done: impl Fn() -> bool,
    ) -> Result<()> {
        self.wait(operation, rank, within, |_| is_done().then_some(()))
    }

    /// Waits until `look` finds something that comes from a rank.
    fn wait<T>(
        &self,
        operation: &'static str,
        rank: usize,
        (started, limit): (Instant, Duration),
        mut look: impl FnMut(&mut State<B>) -> Option<T>,
    ) -> Result<T> {
        let looks_until = Instant::now() + self.looks;
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return Ok(found);
            }
            state.check(operation)?;
            if let Some(why) = &state.lost[rank] {
                return Err(Error::RankLost { operation, rank, why: why.clone() });
            }
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(Error::RankTimedOut { operation, rank, limit });
            }
            let seen = self.changes.load(Ordering::Acquire);
            if Instant::now() < looks_until {
                drop(state);
                self.look_for_change(seen, looks_until);
                state = self.lock();
            } else {
                state.sleepers += 1;
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                state.sleepers -= 1;
            }
        }
    }

    /// Returns when there were other changes than `seen`, or at an instant.
    fn look_for_change(&self, seen: u64, until: Instant) {
        let mut looked = 0_u32;
        while self.changes.load(Ordering::Acquire) == seen && Instant::now() < until {
            looked += 1;
            if self.yields && looked.is_multiple_of(64) { thread::yield_now() } else { hint::spin_loop() }
        }
    }

    fn change(&self, change: impl FnOnce(&mut State<B>)) {
        let mut state = self.lock();
        change(&mut state);
        self.changes.fetch_add(1, Ordering::Release);
        let someone_sleeps = state.sleepers > 0;
        drop(state);
        if someone_sleeps {
            self.changed.notify_all();
        }
    }

    /// No change is left half done by a panic.
    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> State<B> {
    /// Fails if a rank has given up.
    fn check(&self, operation: &'static str) -> Result<()> {
        match &self.aborted {
            Some((rank, why)) => Err(Error::RankLost { operation, rank: *rank, why: why.clone() }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_a_rank_is_waited_for() {
        let (mailbox, long) = (Mailbox::<()>::new(2), Duration::from_secs(60));
        assert_eq!(mailbox.check_last_word("test", 1, Duration::ZERO), Ok(()));
        thread::scope(|scope| {
            let waits = scope.spawn(|| mailbox.check_last_word("test", 1, long));
            mailbox.abort(1, "it gave up");
            let error = Error::RankLost { operation: "test", rank: 1, why: "it gave up".to_owned() };
            assert_eq!(waits.join().unwrap(), Err(error));
        });
        // Its connection ended, and it said nothing.
        let mailbox = Mailbox::<()>::new(2);
        mailbox.lose(1, "its connection ended");
        assert_eq!(mailbox.check_last_word("test", 1, long), Ok(()));
    }

    #[test]
    fn a_rank_that_looks_finds_what_comes_before_and_after_it_sleeps() {
        for looks in [Duration::ZERO, Duration::from_millis(1), Duration::from_secs(5)] {
            let mailbox = Mailbox::new(2).looking(looks);
            let within = (Instant::now(), Duration::from_secs(60));
            thread::scope(|scope| {
                let takes = scope.spawn(|| mailbox.take("test", 1, within).map(|message| message.body));
                thread::sleep(Duration::from_millis(20));
                mailbox.put(1, Message { tag: [0; 16], body: 7 });
                assert_eq!(takes.join().unwrap(), Ok(7), "{looks:?}");
            });
            let timed_out = mailbox.take("test", 1, (Instant::now(), Duration::from_millis(5))).map(|_| ());
            assert!(matches!(timed_out, Err(Error::RankTimedOut { rank: 1, .. })), "{looks:?}");
        }
    }
}
