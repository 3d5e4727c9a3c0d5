//! A server that somebody else started, for `adopt`.

#![forbid(unsafe_code)]

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
};

use crate::{
    client::Client,
    host::{Host, V4},
    process::Process,
    wait::{seconds, wait_for},
};

/// A server of somebody else's: nobody's, in nobody's cgroup, and without SO_REUSEPORT.
pub struct Own(pub Child);

impl Own {
    /// One that serves, called old.
    #[track_caller]
    pub fn start(host: &Host) -> Self {
        let program = host.test_server_for_all();
        let child = Command::new(program)
            .args(["--name", "old", "--listen", "[::]:8080"])
            .stdin(Stdio::null())
            .uid(65_534)
            .spawn()
            .expect("start a server");
        wait_for("the server", seconds(10.0), || Client::open(V4).ok().map(drop));
        Self(child)
    }

    pub fn pid(&self) -> String {
        self.0.id().to_string()
    }

    pub fn runs(&self) -> bool {
        Process::find(self.0.id() as i32).is_some_and(Process::runs)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
