//! A small cache that evicts the oldest value, unless a captured graph may use it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;

/// Values that are not pinned at most. A request has one or two kinds of keys and one head
/// dimension; only queries that are used with many keys, one after the other, come to more.
const CAPACITY: usize = 16;

/// Values by their keys, the oldest first. A new value evicts the oldest that is not pinned; a hit
/// does not make a value younger. Pinned values stay as long as the cache.
#[derive(Debug)]
pub(crate) struct FifoCache<Key, Value>(Mutex<Vec<Entry<Key, Value>>>);

#[derive(Debug)]
struct Entry<Key, Value> {
    key: Key,
    value: Arc<Value>,
    is_pinned: bool,
}

impl<Key, Value> Default for FifoCache<Key, Value> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<Key: PartialEq, Value> FifoCache<Key, Value> {
    /// The value of a key, made by `make` if there is none yet. `pin` keeps it from being evicted,
    /// now and later: a captured graph may hold its addresses.
    pub(crate) fn get_or_make(&self, key: Key, pin: bool, make: impl FnOnce() -> Result<Value>) -> Result<Arc<Value>> {
        // Held while the value is made, so that two threads never upload the same. A panic leaves
        // the entries as they were: they are only pushed whole.
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = entries.iter_mut().find(|entry| entry.key == key) {
            found.is_pinned |= pin;
            return Ok(Arc::clone(&found.value));
        }
        let value = Arc::new(make()?);
        if entries.len() >= CAPACITY
            && let Some(oldest) = entries.iter().position(|entry| !entry.is_pinned)
        {
            entries.remove(oldest);
        }
        entries.push(Entry { key, value: Arc::clone(&value), is_pinned: pin });
        Ok(value)
    }

    /// The value of a key, if there is one.
    #[cfg_attr(
        any(not(feature = "cuda"), target_arch = "wasm32"),
        allow(dead_code, reason = "CUDA devices alone look without making")
    )]
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Value>> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().find(|entry| entry.key == *key).map(|entry| Arc::clone(&entry.value))
    }

    /// All values that some keys have.
    #[cfg_attr(
        any(not(feature = "cuda"), target_arch = "wasm32"),
        allow(dead_code, reason = "CUDA devices alone make them anew")
    )]
    pub(crate) fn values_of(&self, is_one: impl Fn(&Key) -> bool) -> Vec<Arc<Value>> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().filter(|entry| is_one(&entry.key)).map(|entry| Arc::clone(&entry.value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn the_oldest_is_evicted_unless_it_is_pinned() -> Result<()> {
        let cache = FifoCache::<usize, usize>::default();
        for key in 0..CAPACITY {
            // The first is pinned later, the third as it is made.
            assert_eq!(*cache.get_or_make(key, key == 2, || Ok(key))?, key);
        }
        cache.get_or_make(0, true, || Err(Error::HeadDim { got: 0 }))?;
        for key in 100..100 + 2 * CAPACITY {
            cache.get_or_make(key, false, || Ok(key))?;
        }
        for key in [0, 2] {
            assert_eq!(*cache.get_or_make(key, false, || Ok(999))?, key);
        }
        assert_eq!((cache.get(&1), cache.get(&2).as_deref()), (None, Some(&2)));
        assert_eq!(*cache.get_or_make(1, false, || Ok(999))?, 999);
        let values: Vec<_> = cache.values_of(|&key| key < 3).iter().map(|value| **value).collect();
        assert_eq!(values, [0, 2, 999]);
        assert_eq!(cache.0.lock().unwrap_or_else(PoisonError::into_inner).len(), CAPACITY);
        Ok(())
    }
}
