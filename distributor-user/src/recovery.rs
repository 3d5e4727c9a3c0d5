//! What becomes of what an earlier `dist-ctl up` left running.
//!
//! Pure. A monitor that was killed has left servers that are not the next one's children. What
//! was recorded of each may be out of date, or missing; what its cgroup holds is true. `decide`
//! takes both for one server and says what to do, so that nothing is taken for a server that is
//! not one, nothing that serves is ended, and nothing is left that nobody watches.
#![forbid(unsafe_code)]

use crate::server::Main;

/// What was recorded of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Nothing can be read of it.
    Nothing,
    /// No instance of it ran.
    Idle,
    /// An instance with this main process. `main_lives`: a process of that number runs, and it
    /// is the same one: it started when the recorded one did, in the instance's cgroup.
    Running { main: Main, main_lives: bool },
}

/// What is in the cgroup of the instance now: that of the record, or the newest there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// It has processes.
    pub populated: bool,
    /// The first of them that is not a launcher still.
    pub first: Option<u32>,
}

/// What to do with one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Have the monitor watch this process, and go on with it as the server's main one.
    Watch { pid: u32 },
    /// Go on with it; its cgroup tells when it ends.
    GoOn,
    /// Its main process ended while nobody watched. `others_left`: others of its processes live.
    MainEnded { others_left: bool },
    /// End what is left in its cgroup, which serves nobody, and start another instance.
    StartAfresh,
    /// Nothing runs: start one.
    Start,
}

/// What to do with a server that the configuration wants.
pub fn decide(recorded: Recorded, seen: Seen) -> Decision {
    match (recorded, seen) {
        (Recorded::Running { main: Main::Running { pid }, main_lives: true }, _) => Decision::Watch { pid },
        (Recorded::Running { main: Main::Running { .. }, main_lives: false }, Seen { populated, .. }) => {
            Decision::MainEnded { others_left: populated }
        }
        (Recorded::Running { main: Main::Background | Main::Ended, .. }, _) => Decision::GoOn,
        // Whatever was written of it was written before it was launched, or could not be.
        (
            Recorded::Running { main: Main::Launching, .. } | Recorded::Nothing | Recorded::Idle,
            Seen { first: Some(pid), .. },
        ) => Decision::Watch { pid },
        (
            Recorded::Running { main: Main::Launching, .. } | Recorded::Nothing | Recorded::Idle,
            Seen { populated: true, first: None },
        ) => Decision::StartAfresh,
        (Recorded::Running { main: Main::Launching, .. } | Recorded::Nothing | Recorded::Idle, _) => {
            Decision::Start
        }
    }
}
