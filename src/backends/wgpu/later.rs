//! What a browser tells only after the thread went back to it: errors of scopes that are closed, and values of callbacks.

use std::future::poll_fn;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// An error scope that is closed and has not said yet what it caught.
struct Closed {
    error: Pin<Box<dyn Future<Output = Option<wgpu::Error>> + Send>>,
    operation: &'static str,
    requested: u64,
}

/// What a scope caught, and what was being done.
pub(super) struct Caught {
    pub error: wgpu::Error,
    pub operation: &'static str,
    pub requested: u64,
}

/// Scopes that have not said yet what they caught.
#[derive(Default)]
pub(super) struct ClosedScopes(Mutex<Vec<Closed>>);

impl std::fmt::Debug for ClosedScopes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} closed scopes", self.lock().len())
    }
}

impl ClosedScopes {
    /// Closes a scope; what it caught comes out of one of the functions below.
    pub fn close(&self, scope: wgpu::ErrorScopeGuard, operation: &'static str, requested: u64) {
        self.lock().push(Closed { error: Box::pin(scope.pop()), operation, requested });
    }

    /// Drops the scopes that have said what they caught, and gives the first error of theirs.
    pub fn first_caught(&self) -> Option<Caught> {
        let mut caught = None;
        self.lock().retain_mut(|Closed { error, operation, requested }| {
            match error.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => true,
                Poll::Ready(error) => {
                    let (operation, requested) = (*operation, *requested);
                    caught = caught.take().or_else(|| error.map(|error| Caught { error, operation, requested }));
                    false
                }
            }
        });
        caught
    }

    /// Waits until every scope has said what it caught, and gives the first error.
    pub async fn settle(&self) -> Option<Caught> {
        let mut caught = None;
        let scopes = mem::take(&mut *self.lock());
        for Closed { error, operation, requested } in scopes {
            let error = error.await;
            caught = caught.or_else(|| error.map(|error| Caught { error, operation, requested }));
        }
        caught
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Closed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A callback, and the value that it will be called with.
pub(super) fn signal<T: Send + 'static>() -> (impl FnOnce(T) + Send + 'static, impl Future<Output = T> + Send) {
    let state = Arc::new(Mutex::new((None, None::<Waker>)));
    let sent = Arc::clone(&state);
    let send = move |value| {
        let mut state = sent.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = Some(value);
        let waker = state.1.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    };
    let receive = poll_fn(move |context| {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.0.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    });
    (send, receive)
}
