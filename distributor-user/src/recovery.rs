//! What becomes of what an earlier `dist-ctl up` left running.
//!
//! Pure. A monitor that was killed has left servers that are not the next one's children. What
//! was recorded of each may be out of date, or missing; what its cgroups hold is true. `examine`
//! takes both for one server, says which of its instances counts, and has `decide` say what to do,
//! so that nothing is taken for a server that is not one, nothing that serves is ended, and nothing
//! is left that nobody watches.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use crate::server::{Instance, Main, Server};

/// The cgroup of an instance, and who is in it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub instance: Instance,
    pub processes: Vec<u32>,
    /// The first of them that is not a launcher still.
    pub first: Option<u32>,
}

/// A server of the record.
#[derive(Clone, Copy, Debug)]
pub struct Past<'a> {
    pub machine: &'a Server,
    /// When its main process started. `None`: that could not be read.
    pub start_time: Option<u64>,
    /// When the process started that has the main one's number now. `None`: there is none.
    pub start_time_now: Option<u64>,
}

/// What comes of looking at one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The instance that counts. What is in the cgroups of others is nobody's.
    pub instance: Instance,
    pub decision: Decision,
    /// What was recorded is of this instance, and it runs, or has just ended.
    pub goes_by_record: bool,
}

/// What was recorded of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recorded {
    /// Nothing can be read of it.
    Nothing,
    /// No instance of it ran.
    Idle,
    /// An instance with this main process. `main_lives`: a process of that number runs, and it
    /// is the same one: it started when the recorded one did, in the instance's cgroup.
    Running { main: Main, main_lives: bool },
}

/// What is in the cgroup of the instance now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// It has processes.
    populated: bool,
    /// The first of them that is not a launcher still.
    first: Option<u32>,
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

/// Which instance of a server counts, and what to do with it. `groups`: all cgroups of it there are.
pub fn examine(past: Option<Past<'_>>, groups: &[Group]) -> Finding {
    let group = |instance| groups.iter().find(|group| group.instance == instance);
    let newest = groups.iter().map(|group| group.instance).max().unwrap_or(Instance(0));
    let populated = groups.iter().filter(|group| !group.processes.is_empty());
    let running = populated.map(|group| group.instance).max();
    let known = past.map_or(Instance(0), |past| past.machine.instance());
    let main_lives = past.is_some_and(|past| {
        let is_the_same = match past.start_time {
            Some(start_time) => past.start_time_now == Some(start_time),
            // Whoever is in the cgroup is of the server all the same.
            None => past.start_time_now.is_some(),
        };
        let its = past.machine.pid().zip(group(known));
        is_the_same && its.is_some_and(|(pid, group)| group.processes.contains(&pid))
    });
    // A cgroup is made only when the instance before has ended: then the record is out of date, for
    // want of room on the disk.
    let is_out_of_date = newest > known && !main_lives;
    let run = past.and_then(|past| past.machine.run()).filter(|_| !is_out_of_date);
    let instance = match (run, running) {
        (Some(_), _) => known,
        (None, Some(running)) => running,
        (None, None) => newest.max(known),
    };
    let recorded = match (past, run) {
        (None, _) => Recorded::Nothing,
        (Some(_), None) => Recorded::Idle,
        (Some(_), Some(run)) => Recorded::Running { main: run.main(), main_lives },
    };
    let seen = group(instance).map_or(Seen { populated: false, first: None }, |group| Seen {
        populated: !group.processes.is_empty(),
        first: group.first,
    });
    Finding { instance, decision: decide(recorded, seen), goes_by_record: run.is_some() }
}

/// What to do with a server that the configuration wants.
fn decide(recorded: Recorded, seen: Seen) -> Decision {
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
