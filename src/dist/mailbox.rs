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

    /// Fails if a rank has given up. For what could not be sent to `rank`: it may have said why just before, so this waits for its
    /// last word.
    pub(super) fn check_last_word(&self, operation: &'static str, rank: usize, limit: Duration) -> Result<()> {
        let state = self.lock();
        let unknown = |state: &mut State| state.aborted.is_none() && state.lost[rank].is_none();
        let waited = self.changed.wait_timeout_while(state, limit, unknown);
        waited.unwrap_or_else(PoisonError::into_inner).0.check(operation)
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
        let (mailbox, long) = (Mailbox::new(2), Duration::from_secs(60));
        assert_eq!(mailbox.check_last_word("test", 1, Duration::ZERO), Ok(()));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| mailbox.check_last_word("test", 1, long));
            mailbox.abort(1, "it gave up");
            let error = Error::RankLost { operation: "test", rank: 1, why: "it gave up".to_owned() };
            assert_eq!(waits.join().unwrap(), Err(error));
        });
        // Its connection ended, and it said nothing.
        let mailbox = Mailbox::new(2);
        mailbox.lose(1, "its connection ended");
        assert_eq!(mailbox.check_last_word("test", 1, long), Ok(()));
    }
}
