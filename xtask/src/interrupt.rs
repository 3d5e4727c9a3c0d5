//! Ctrl-C, and a TERM or HUP from whoever runs us: noted, instead of ending us at once.
//!
//! `cargo xtask up` has to outlive the demo that it started, to say how that ended. The
//! terminal sends Ctrl-C to the demo as well, which stops by itself.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

const HUP: i32 = 1;
const INT: i32 = 2;
const TERM: i32 = 15;

// libc's; the standard library links it but has no words for it. A program that we start
// gets the default back, as execve does with every handler.
// SAFETY: this is signal(2) as POSIX declares it; a pointer to the old handler fits usize.
unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
}

/// From now on we are told, and not ended.
pub(crate) fn note() {
    for number in [HUP, INT, TERM] {
        // SAFETY: `noted` only stores an atomic, which a signal handler may do, and the
        // three signals can be caught.
        unsafe { signal(number, noted) };
    }
}

/// Whether somebody wants us to stop.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

extern "C" fn noted(_number: i32) {
    ASKED.store(true, Ordering::Relaxed);
}
