//! Waiting for a condition with a deadline, and running something with one.
//!
//! No test sleeps: it names what it waits for, and says how long that may take at most. All
//! deadlines grow together where everything is slower, as in an emulated machine, and what is repeated
//! many times can be repeated less often.

#![forbid(unsafe_code)]

use std::{
    fmt::Debug,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// `TESTS_PATIENCE=10` makes every deadline ten times as long.
const PATIENCE: &str = "TESTS_PATIENCE";

/// So many seconds on an ordinary machine.
pub fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds * patience())
}

/// The same as a configuration has it: `1000ms`.
pub fn lasting(seconds: f64) -> String {
    format!("{}ms", self::seconds(seconds).as_millis())
}

/// So many on an ordinary machine, fewer where everything is slower, but at least `least`: with those
/// the test still shows what it is about.
pub fn fewer(many: usize, least: usize) -> usize {
    ((many as f64 / patience()) as usize).max(least)
}

/// How many times slower than an ordinary machine this one may be.
pub fn patience() -> f64 {
    static PATIENCE_FACTOR: OnceLock<f64> = OnceLock::new();
    *PATIENCE_FACTOR.get_or_init(|| match std::env::var(PATIENCE) {
        Ok(factor) => match factor.parse() {
            Ok(factor) if factor >= 1.0 => factor,
            _ => panic!("{PATIENCE}={factor}: expected a number of at least 1"),
        },
        Err(_) => 1.0,
    })
}

/// Asks until `probe` has an answer. `None` when that takes longer than `within`.
pub fn try_for<T>(within: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        if start.elapsed() >= within {
            return None;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Asks until `probe` has an answer, and panics with `what` when it takes longer than `within`.
#[track_caller]
pub fn wait_for<T>(what: &str, within: Duration, probe: impl FnMut() -> Option<T>) -> T {
    try_for(within, probe).unwrap_or_else(|| panic!("waited {within:?} for {what}"))
}

/// Asks until the answer is `wanted`, and panics with the last one when it takes too long.
#[track_caller]
pub fn wait_until_eq<T: Debug + PartialEq>(
    what: &str,
    within: Duration,
    wanted: T,
    mut probe: impl FnMut() -> T,
) {
    let mut last = None;
    let found = try_for(within, || {
        let seen = probe();
        let found = seen == wanted;
        last = Some(seen);
        found.then_some(())
    });
    assert!(found.is_some(), "waited {within:?} for {what} to be {wanted:?}, and it is {last:?}");
}

/// Asks again and again for as long as `during`, and panics as soon as an answer is not `wanted`.
#[track_caller]
pub fn stays<T: Debug + PartialEq>(what: &str, during: Duration, wanted: T, mut probe: impl FnMut() -> T) {
    let start = Instant::now();
    while start.elapsed() < during {
        let seen = probe();
        assert!(
            seen == wanted,
            "{what} should stay {wanted:?}, and became {seen:?} after {:?}",
            start.elapsed()
        );
        thread::sleep(Duration::from_millis(5));
    }
}
