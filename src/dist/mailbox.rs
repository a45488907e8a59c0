//! Where a rank finds what its peers sent, whichever thread puts it there.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::digest::Tag;
use crate::error::{Error, Result};

/// One message of a peer.
#[derive(Debug)]
pub(super) struct Message {
    pub tag: Tag,
    pub bytes: Vec<u8>,
}

/// What peers sent and this rank has not taken yet, and what became of the peers.
#[derive(Debug)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// One queue for each rank.
    queues: Vec<VecDeque<Message>>,
    /// Why nothing more comes from a rank.
    lost: Vec<Option<String>>,
    /// The rank that gave up first, and why.
    aborted: Option<(usize, String)>,
}

impl Mailbox {
    pub(super) fn new(world: usize) -> Self {
        let state =
            State { queues: (0..world).map(|_| VecDeque::new()).collect(), lost: vec![None; world], aborted: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// A message of a rank.
    pub(super) fn put(&self, from: usize, message: Message) {
        self.change(|state| state.queues[from].push_back(message));
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

    /// Fails if a rank has given up.
    pub(super) fn check(&self, operation: &'static str) -> Result<()> {
        self.lock().check(operation)
    }

    /// The next message of a rank; waits for it until `started` is `limit` ago.
    pub(super) fn take(
        &self,
        operation: &'static str,
        rank: usize,
        (started, limit): (Instant, Duration),
    ) -> Result<Message> {
        let mut state = self.lock();
        loop {
            // What was sent counts, whatever became of the sender: on every rank the same call fails.
            if let Some(message) = state.queues[rank].pop_front() {
                return Ok(message);
            }
            state.check(operation)?;
            if let Some(why) = &state.lost[rank] {
                return Err(Error::RankLost { operation, rank, why: why.clone() });
            }
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(Error::RankTimedOut { operation, rank, limit });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// No change is left half done by a panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check(&self, operation: &'static str) -> Result<()> {
        match &self.aborted {
            Some((rank, why)) => Err(Error::RankLost { operation, rank: *rank, why: why.clone() }),
            None => Ok(()),
        }
    }
}
