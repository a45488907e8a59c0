//! Error scopes that are closed. A browser reports what they caught only after the thread has
//! returned to it.

use std::mem;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// An error scope that is closed and has not reported yet.
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

/// Scopes that have not reported yet.
#[derive(Default)]
pub(super) struct ClosedScopes(Mutex<Vec<Closed>>);

impl std::fmt::Debug for ClosedScopes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} closed scopes", self.lock().len())
    }
}

impl ClosedScopes {
    /// Closes a scope. One of the functions below returns what it caught.
    pub fn close(&self, scope: wgpu::ErrorScopeGuard, operation: &'static str, requested: u64) {
        self.lock().push(Closed { error: Box::pin(scope.pop()), operation, requested });
    }

    /// Drops the scopes that have reported, and returns their first error.
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

    /// Waits until every scope has reported, and returns the first error.
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
