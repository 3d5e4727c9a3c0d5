//! Clients that come and go for as long as something else happens.

#![forbid(unsafe_code)]

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use crate::{
    client::Client,
    host::V4,
    wait::{seconds, wait_for},
};

/// How it goes.
#[derive(Default)]
pub struct Load {
    over: AtomicBool,
    served: AtomicU64,
}

impl Load {
    /// How many were served until now.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Waits until so many more were served.
    #[track_caller]
    pub fn serves(&self, more: u64) {
        let wanted = self.served() + more;
        wait_for("more clients to be served", seconds(20.0), || (self.served() >= wanted).then_some(()));
    }
}

/// Runs `work` while clients come one after the other in each of so many threads. Gives what it
/// gave, and how many were served; fails if any was not.
#[track_caller]
pub fn under_load<T>(threads: usize, work: impl FnOnce(&Load) -> T) -> (T, u64) {
    under_load_of(threads, || Client::open(V4).map(drop), work)
}

/// The same with other clients.
#[track_caller]
pub fn under_load_of<T>(
    threads: usize,
    client: impl Fn() -> io::Result<()> + Sync,
    work: impl FnOnce(&Load) -> T,
) -> (T, u64) {
    let load = Load::default();
    let done = thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !load.over.load(Ordering::Relaxed) {
                    client().expect("every client is served");
                    load.served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Also when `work` panics, or the threads would not end.
        let _over = Over(&load.over);
        work(&load)
    });
    (done, load.served())
}

struct Over<'l>(&'l AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
