//! The threads a backend works on: the host's rayon pool, one of its own, or none.
//!
//! *Helps* hosts that must not have a second set of threads fight the first. *Hurts* if a host hands over a
//! pool that is busy with something else: a step then waits for it.

use crate::error::DeviceError;
use std::sync::Arc;

/// A rayon pool, or the calling thread alone.
#[derive(Clone, Debug)]
pub struct Pool(Option<Arc<rayon::ThreadPool>>);

impl Pool {
    /// Work on the calling thread only (or on the rayon pool the caller already runs in).
    pub fn current() -> Self {
        Self(None)
    }

    /// Work on the host's pool.
    pub fn host(pool: Arc<rayon::ThreadPool>) -> Self {
        Self(Some(pool))
    }

    /// A pool of the library's own. 0 threads means one per core.
    ///
    /// # Errors
    /// [`DeviceError::Threads`] if the system refuses the threads.
    pub fn with_threads(threads: usize) -> Result<Self, DeviceError> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("kvsieve-{i}"))
            .build()
            .map(|pool| Self(Some(Arc::new(pool))))
            .map_err(|e| DeviceError::Threads { threads, reason: e.to_string() })
    }

    /// Threads that work at once.
    pub fn threads(&self) -> usize {
        match &self.0 {
            Some(pool) => pool.current_num_threads(),
            None if rayon::current_thread_index().is_some() => rayon::current_num_threads(),
            None => 1,
        }
    }

    /// Runs `work` inside the pool; on the calling thread if there is none.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}
