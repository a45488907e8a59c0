//! Waiting by giving up the thread: in a browser.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use crate::error::{Error, Result};

use super::super::context::Context;
use super::calls::Blocking;

/// An error: the thread of a page cannot block.
pub fn now<T>(device: &str, call: Blocking, _work: impl Future<Output = Result<T>>) -> Result<T> {
    let Blocking { operation, instead } = call;
    Err(Error::WouldBlock { device: device.to_owned(), operation, instead })
}

/// Waits for all work submitted so far, and for what error scopes caught.
pub async fn for_work(context: &Context) -> Result<()> {
    context.faults.check_lost()?;
    let (done, is_done) = signal();
    context.queue.on_submitted_work_done(move || done(()));
    is_done.received(context).await.map(drop)
}

#[derive(Debug)]
struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

/// The value that a callback will be called with.
pub struct Signal<T>(Arc<Mutex<State<T>>>);

/// A callback, and the value that it will be called with.
pub fn signal<T: Send + 'static>() -> (impl FnOnce(T) + Send + 'static, Signal<T>) {
    let state = Arc::new(Mutex::new(State { value: None, waker: None }));
    let sent = Arc::clone(&state);
    let callback = move |value| {
        let mut state = sent.lock().unwrap_or_else(PoisonError::into_inner);
        state.value = Some(value);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    };
    (callback, Signal(state))
}

impl<T> Signal<T> {
    /// Waits until the callback has run, then for what error scopes caught: where a launch failed
    /// or the device was lost, that is the answer.
    pub async fn received(self, context: &Context) -> Result<Option<T>> {
        let value = poll_fn(|task| {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match state.value.take() {
                Some(value) => Poll::Ready(value),
                None => {
                    state.waker = Some(task.waker().clone());
                    Poll::Pending
                }
            }
        });
        let value = value.await;
        context.faults.settle().await?;
        Ok(Some(value))
    }
}
