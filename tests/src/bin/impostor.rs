//! A dist-ctl that passes its trial and fails in earnest.
//!
//! On trial it is the program that DIST_CTL_TEST_REAL names; or it does not come to an end, if that
//! is "hang". As a distributor it says a sentence and exits with 1 before it is ready.
#![forbid(unsafe_code)]

use std::{
    env,
    os::unix::process::CommandExt as _,
    process::{Command, exit},
    thread,
    time::Duration,
};

fn main() {
    if env::args().nth(1).is_some_and(|verb| verb == "trial") {
        let real = env::var_os("DIST_CTL_TEST_REAL").expect("the test names the real one");
        if real == "hang" {
            thread::sleep(Duration::from_secs(60));
            exit(3)
        }
        let error = Command::new(real).args(env::args_os().skip(1)).exec();
        eprintln!("impostor: become the real one: {error}");
        exit(3)
    }
    eprintln!("impostor: this does not work after all");
    exit(1)
}
