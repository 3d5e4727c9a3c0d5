//! Which pins are in force, and dying after every step of a move.
#![forbid(unsafe_code)]

use super::*;

thread_local! {
    static DIES_AFTER: std::cell::Cell<Option<Step>> = const { std::cell::Cell::new(None) };
}

/// The step that is done: dies after it, if a test wants that.
pub(super) fn step(step: Step) -> anyhow::Result<()> {
    ensure!(DIES_AFTER.get() != Some(step), "died after {step:?}");
    Ok(())
}
