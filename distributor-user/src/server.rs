//! What one server does next.
//!
//! A server is one entry of the configuration; it has one instance after another. `step`
//! takes what is wanted of it or was seen of its instance, and gives its next state and the
//! actions that lead there, in order. Total: every state answers every event. Nothing here
//! acts, reads a clock or draws luck: the caller performs each action and tells what came of
//! it, and tells `Tick` at the `deadline`.
#![forbid(unsafe_code)]

mod step;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fmt,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tracing::Level;

use self::step::Step;
use crate::{
    address::ListenAddress,
    backoff::Backoff,
    config::{self, Readiness},
    message::Exit,
    moment::{self, Moment},
    status::{self, ServerState},
};

/// One server and what has become of it. What is written of it is what the next distributor goes
/// on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    state: State,
    history: History,
}

/// The number of an instance. A server's first is 1; none is used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Instance(pub u32);

impl Instance {
    /// The one after it.
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// The part of the configuration that decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supervision {
    /// Reports name these by their place in this list.
    pub listen: Vec<ListenAddress>,
    pub readiness: Readiness,
    /// How long an instance may take to be ready.
    pub start_timeout: Duration,
    /// How long its connections may go on after it is out of the plan.
    pub drain_timeout: Duration,
    pub stop_signal: Signal,
    /// How long after that signal it is killed.
    pub stop_timeout: Duration,
    /// How often one that is ready has to say that it is well.
    pub watchdog: Option<Duration>,
    pub remedies: Remedies,
    pub backoff: Backoff,
    /// It has one try: if its instance fails, there is another one that serves.
    pub once: bool,
}

/// What is done about a server that is ready and not well, beside giving it nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remedies {
    /// It is started again when its checks have been bad for so long.
    pub restart_after: Option<Duration>,
    /// What is in the accept queue of one that is stalled goes to the others, and it is started again.
    pub move_queue: bool,
    /// It is killed when it has been stalled for so long.
    pub hang_kill: Option<Duration>,
}

/// Where a server is. Each state owns what it needs to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Nothing runs, and nothing is wanted to.
    Stopped {
        #[serde(with = "moment")]
        since: Instant,
    },
    /// An instance runs, or is about to, and is not in the plan.
    Starting {
        #[serde(with = "moment")]
        since: Instant,
        #[serde(with = "moment")]
        deadline: Instant,
        run: Run,
    },
    /// It is in the plan, unless it is unhealthy. The only state in which it is.
    Ready {
        #[serde(with = "moment")]
        since: Instant,
        run: Run,
    },
    /// It is out of the plan and finishes its connections.
    Draining {
        #[serde(with = "moment")]
        since: Instant,
        #[serde(with = "moment")]
        deadline: Instant,
        run: Run,
        then: Then,
    },
    /// It was told to end. What is left of it at the deadline is killed, as often as needed.
    Stopping {
        #[serde(with = "moment")]
        since: Instant,
        #[serde(with = "moment")]
        deadline: Instant,
        stage: Stage,
        run: Run,
        then: Then,
    },
    /// Nothing runs until the wait is over.
    Backoff {
        #[serde(with = "moment")]
        since: Instant,
        #[serde(with = "moment")]
        until: Instant,
        attempt: u32,
        why: String,
    },
    /// Nothing runs until a person resumes it.
    Failed {
        #[serde(with = "moment")]
        since: Instant,
        fault: Fault,
    },
}

/// What is known of the instance that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    #[serde(with = "moment")]
    started: Instant,
    main: Main,
    /// The service's addresses on which it has a listener that was adopted.
    listening: BTreeSet<usize>,
    /// Where else it listens. Only ever said, so a few are enough.
    elsewhere: Vec<String>,
    /// It said READY=1.
    notified: bool,
    /// It has been ready, so it may have connections.
    served: bool,
    /// When it became ready, or well again.
    #[serde(default)]
    ready: Option<Moment>,
    /// It has been ready long enough to forgive the failures before it.
    healthy: bool,
    /// It has to say that it is well while it is ready.
    #[serde(default)]
    watchdog: Option<Watchdog>,
    /// A check of it was good.
    #[serde(default)]
    checked: bool,
    /// Its checks are bad. Of meaning only while it is ready, and so is the next.
    #[serde(default)]
    unhealthy: Option<Ailment>,
    /// Its accept queue does not move.
    #[serde(default)]
    stalled: Option<Ailment>,
    /// Why it is not ready yet, if it waits for a good check.
    #[serde(default)]
    unchecked: Option<String>,
}

/// What a server that is ready suffers from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ailment {
    #[serde(with = "moment")]
    since: Instant,
    why: String,
    /// From here on it counts: somebody has looked all the time.
    #[serde(with = "moment")]
    seen_since: Instant,
}

/// What is left of a server's time to say that it is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Watchdog {
    interval: Duration,
    /// Of no meaning before it is ready.
    #[serde(with = "moment")]
    until: Instant,
}

/// The process that was launched, or the one that the server has named since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Main {
    /// It does not run the server's command yet.
    Launching,
    Running {
        pid: u32,
    },
    /// It exited as daemons do; the other processes of its cgroup are the server.
    Background,
    /// It is gone, and what else is in its cgroup has to follow.
    Ended,
}

/// How far an end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// The stop signal was sent.
    Asked,
    /// SIGABRT was.
    Aborted,
    /// So many times everything in the cgroup was killed.
    Killed { times: u32 },
}

/// What follows when an instance has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Then {
    Stopped,
    /// A new instance at once: wanted, not a failure.
    Start,
    /// It stops by itself, and said so: how it ends decides.
    ByItself,
    /// A new instance after the delay: the last one failed.
    Restart {
        why: String,
        delay: Duration,
    },
    Failed(Fault),
}

/// Why starting it again would be of no use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// It failed too often in a row.
    CrashLoop { failures: u32, why: String },
    /// It does what its service cannot have, and would do so again.
    Misconfigured { sentence: String },
    /// It had one try.
    OnlyTry { why: String },
}

/// What a server is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is wanted.
    Start,
    /// It is no longer wanted. Said again, it hurries: first over the rest of the drain, then
    /// over the rest of the time to stop.
    Stop,
    /// A person wants it tried again, now.
    Resume,
    /// Time has passed. Only needed at the deadline; harmless at any time.
    Tick,
    /// Something was seen of an instance.
    Of(Instance, Report),
}

/// What was seen of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The launcher's exec succeeded: the process runs the server's command.
    Launched { pid: u32 },
    /// The distributor that launched it died before it knew what came of that, and its launcher
    /// has not run the command.
    LaunchInterrupted,
    /// There is no process, or it will end without having run the command.
    LaunchFailed { sentence: String },
    /// The same, and it is the machine that lacks something for it.
    LaunchLacked { sentence: String },
    /// It has a listener on this address of the service, and it was adopted.
    ListenerAdopted { address: usize },
    /// It has no listener on this address of the service any more.
    ListenerGone { address: usize },
    /// It listens somewhere that does not concern the service.
    ListensElsewhere { address: String },
    /// It listens where it takes the service's connections uncontrolled, or in a way that
    /// cannot be steered. The sentence says what it does and what to change.
    Misbound { sentence: String },
    /// READY=1
    NotifyReady,
    /// STATUS=
    NotifyStatus(String),
    /// STOPPING=1
    NotifyStopping,
    /// MAINPID=: this process of its cgroup is the main one, and is watched as such.
    MainPid { pid: u32 },
    /// WATCHDOG=1
    NotifyWatchdog,
    /// Nobody could hear it or look at it for a while.
    Unobserved,
    /// WATCHDOG=trigger
    NotifyWatchdogTrigger,
    /// WATCHDOG_USEC=
    NotifyWatchdogInterval(Option<Duration>),
    /// EXTEND_TIMEOUT_USEC=
    NotifyExtendTimeout(Duration),
    /// Its checks have become good, or it is the first of all and good.
    Well,
    /// Its checks have become bad.
    Unwell { why: String },
    /// Its accept queue has not moved for too long.
    QueueStands { why: String },
    /// It moves again, or is empty.
    QueueMoves,
    /// After `Exclude`: it has no connections. Told at once where it has none.
    DrainDone,
    /// The main process has ended. `others_left`: its cgroup is not empty now.
    MainExited { exit: Exit, others_left: bool },
    /// No process is left in its cgroup. Also told, at once, after a `KillCgroup` that finds
    /// none.
    CgroupEmpty,
}

/// What the caller has to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start an instance with this number.
    Launch { instance: Instance },
    /// Put it into the plan.
    Include { instance: Instance },
    /// Take it out of the plan, and tell `DrainDone` once it has no connections. Comes before
    /// any signal: in the other order a connection could still be steered to a listener that
    /// nobody will accept from.
    Exclude { instance: Instance },
    /// Take it out of the plan; it goes on otherwise.
    Withhold { instance: Instance },
    /// Have the kernel move what is in its accept queues to the others, which ends its listeners.
    /// Comes after `Exclude`.
    MoveQueue { instance: Instance },
    /// Send it a signal.
    Signal { instance: Instance, signal: Signal, to: Recipient },
    /// Kill every process of its cgroup.
    KillCgroup { instance: Instance },
    /// It has no process any more: its cgroup can be removed now, and its slot be used again
    /// when its count is 0.
    RemoveInstance { instance: Instance },
    /// Say this, after `server NAME `.
    Log { level: Level, sentence: String },
}

/// Whom a signal goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipient {
    /// The process that was launched, also while it is still the launcher.
    Main,
    /// Every process in the cgroup.
    Everyone,
}

/// What outlives an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct History {
    /// The newest instance.
    instance: Instance,
    /// Up to here the numbers are taken, by others of the same name.
    #[serde(default)]
    taken: Instance,
    /// In a row, since the last healthy run.
    failures: u32,
    /// In a row, starts for which the machine lacked something.
    #[serde(default)]
    lacked: u32,
    restarts: u64,
    /// How the newest instance that ended did so.
    last_end: Option<String>,
    /// The STATUS= of the instance that runs. Empty: none.
    says: String,
}

impl History {
    fn next_number(&self) -> Instance {
        self.instance.max(self.taken).next()
    }
}

impl Supervision {
    /// What the configuration says of a server.
    pub fn of(service: &config::Service, server: &config::Server) -> anyhow::Result<Self> {
        Ok(Self {
            listen: service.listen.clone(),
            readiness: service.readiness,
            start_timeout: server.start_timeout,
            drain_timeout: server.drain_timeout,
            stop_signal: server.stop_signal,
            stop_timeout: server.stop_timeout,
            watchdog: server.watchdog,
            remedies: Remedies {
                restart_after: server.check.as_ref().and_then(|check| check.restart_after),
                move_queue: server.stall.is_some_and(|stall| stall.move_queue),
                hang_kill: server.stall.and_then(|stall| stall.kill_after),
            },
            backoff: Backoff::try_new(server.restart)?,
            once: false,
        })
    }
}

impl Server {
    /// A server whose instance runs, though nothing was written down of it.
    pub fn found(instance: Instance, run: Run, now: Instant, policy: &Supervision) -> Self {
        let mut found = Self::new(instance, now);
        found.state = State::Starting { since: now, deadline: now + policy.start_timeout, run };
        found
    }

    /// A server of which nothing runs. `newest` is the last instance number that was used by
    /// an earlier distributor, or 0.
    pub fn new(newest: Instance, now: Instant) -> Self {
        Self {
            state: State::Stopped { since: now },
            history: History {
                instance: newest,
                taken: newest,
                failures: 0,
                lacked: 0,
                restarts: 0,
                last_end: None,
                says: String::new(),
            },
        }
    }

    /// The next state, and what to do.
    pub fn step(self, event: Event, now: Instant, random: u32, policy: &Supervision) -> (Self, Vec<Action>) {
        match event {
            // No instance is launched before the one before it has left its cgroup, so this is
            // only late, for instance a datagram that was read last.
            Event::Of(instance, _) if instance != self.history.instance => (self, Vec::new()),
            event => {
                let mut step = Step { history: self.history, actions: Vec::new(), now, random, policy };
                let state = step.next(self.state, event);
                let history = step.history;
                (Self { state, history }, step.actions)
            }
        }
    }

    /// As it goes on under a new monitor: how often it failed is forgotten, and so is that it was to
    /// be stopped; what runs goes on, and what is being ended is started again.
    pub fn afresh(self, now: Instant) -> Self {
        let Self { state, mut history } = self;
        (history.failures, history.lacked) = (0, 0);
        let state = match state {
            State::Stopped { .. } | State::Backoff { .. } | State::Failed { .. } => {
                State::Stopped { since: now }
            }
            State::Draining { since, deadline, run, .. } => {
                State::Draining { since, deadline, run, then: Then::Start }
            }
            State::Stopping { since, deadline, stage, run, .. } => {
                State::Stopping { since, deadline, stage, run, then: Then::Start }
            }
            running @ (State::Starting { .. } | State::Ready { .. }) => running,
        };
        Self { state, history }
    }

    /// This number is somebody else's: its next instance gets a higher one.
    pub fn take_number(&mut self, taken: Instance) {
        self.history.taken = self.history.taken.max(taken);
    }

    /// That of its next instance.
    pub fn next_number(&self) -> Instance {
        self.history.next_number()
    }

    /// It takes the place of this one: what is said of both together goes on.
    pub fn succeed(&mut self, before: &Self) {
        self.history.restarts = self.history.restarts.saturating_add(before.history.restarts);
    }

    /// What was known of its instance has come to nothing; the next one has a number of its own.
    pub fn interrupted(self, newest: Instance, now: Instant) -> Self {
        let mut history = self.history;
        history.instance = history.instance.max(newest);
        Self { state: State::Stopped { since: now }, history }
    }

    /// The instance that runs, or is about to.
    pub fn run(&self) -> Option<&Run> {
        match &self.state {
            State::Starting { run, .. }
            | State::Ready { run, .. }
            | State::Draining { run, .. }
            | State::Stopping { run, .. } => Some(run),
            State::Stopped { .. } | State::Backoff { .. } | State::Failed { .. } => None,
        }
    }

    /// It is in the plan.
    pub fn is_included(&self) -> bool {
        matches!(&self.state, State::Ready { run, .. } if run.unhealthy.is_none())
    }

    /// It is out of the plan, and not because it starts or ends.
    pub fn is_withheld(&self) -> bool {
        matches!(&self.state, State::Ready { run, .. } if run.unhealthy.is_some())
    }

    /// It is in the plan for when no other one is.
    pub fn is_stalled(&self) -> bool {
        matches!(&self.state, State::Ready { run, .. } if run.stalled.is_some())
    }

    /// It has all that it needs to serve, whether or not it is well.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// It does not run and will not, or is on its way there.
    pub fn is_ending(&self) -> bool {
        match &self.state {
            State::Stopped { .. } | State::Failed { .. } => true,
            State::Draining { then, .. } | State::Stopping { then, .. } => {
                matches!(then, Then::Stopped | Then::Failed(_))
            }
            State::Starting { .. } | State::Ready { .. } | State::Backoff { .. } => false,
        }
    }

    /// What checks come to is to be told.
    pub fn is_to_be_checked(&self, policy: &Supervision) -> bool {
        match &self.state {
            State::Ready { .. } => true,
            State::Starting { run, .. } => run.waits_for_check(policy),
            State::Stopped { .. }
            | State::Draining { .. }
            | State::Stopping { .. }
            | State::Backoff { .. }
            | State::Failed { .. } => false,
        }
    }

    /// `DrainDone` is to be told.
    pub fn awaits_drain(&self) -> bool {
        matches!(self.state, State::Draining { .. })
    }

    /// `CgroupEmpty` is to be told.
    pub fn awaits_empty(&self) -> bool {
        let killed = matches!(self.state, State::Stopping { stage: Stage::Killed { .. }, .. });
        killed || self.run().is_some_and(|run| matches!(run.main, Main::Background | Main::Ended))
    }

    /// Since when it is ready, and well as far as its checks are concerned; or was so last.
    pub fn ready_since(&self) -> Option<Instant> {
        match &self.state {
            State::Ready { run, .. } => Some(run.ready.map_or(run.started, |Moment(ready)| ready)),
            _ => None,
        }
    }

    /// When `Tick` is to be told.
    pub fn deadline(&self, policy: &Supervision) -> Option<Instant> {
        match self.state {
            State::Stopped { .. } | State::Failed { .. } => None,
            State::Ready { ref run, .. } => run.due(policy.remedies),
            State::Starting { deadline, .. }
            | State::Draining { deadline, .. }
            | State::Stopping { deadline, .. } => Some(deadline),
            State::Backoff { until, .. } => Some(until),
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// The state as operators know it. An instance that is being ended is shown as what it is
    /// being ended for.
    pub fn status(&self) -> ServerState {
        match &self.state {
            State::Stopped { .. } => ServerState::Stopped,
            State::Starting { .. } => ServerState::Starting,
            State::Ready { run, .. } if run.unhealthy.is_some() => ServerState::Unhealthy,
            State::Ready { run, .. } if run.stalled.is_some() => ServerState::Stalled,
            State::Ready { .. } => ServerState::Ready,
            State::Draining { .. } => ServerState::Draining,
            State::Stopping { then, .. } => match then {
                Then::Stopped | Then::Start | Then::ByItself => ServerState::Draining,
                Then::Restart { .. } => ServerState::Backoff,
                Then::Failed(_) => ServerState::Failed,
            },
            State::Backoff { .. } => ServerState::Backoff,
            State::Failed { .. } => ServerState::Failed,
        }
    }

    /// When it entered its state.
    pub fn since(&self) -> Instant {
        match self.state {
            State::Ready { since, ref run } => run.ailment().map_or(since, |ailment| ailment.since),
            State::Stopped { since }
            | State::Starting { since, .. }
            | State::Draining { since, .. }
            | State::Stopping { since, .. }
            | State::Backoff { since, .. }
            | State::Failed { since, .. } => since,
        }
    }

    /// Why it is in this state and what happens next, where that is not plain, and what it
    /// says of itself.
    pub fn reason(&self, now: Instant, policy: &Supervision) -> Option<String> {
        let left = |deadline: Instant| span(deadline.saturating_duration_since(now));
        let reason = match &self.state {
            State::Stopped { .. } => self.history.last_end.clone(),
            State::Starting { run, .. } => Some(run.awaits(policy)),
            State::Ready { run, .. } if run.ailment().is_some() => run.suffers(now, policy.remedies),
            State::Ready { .. } => self.history.last_end.as_ref().map(|end| format!("the one before {end}")),
            State::Draining { deadline, then, .. } => {
                Some(format!("{}; its connections have {} to end", then.why(), left(*deadline)))
            }
            State::Stopping { deadline, stage: Stage::Asked, then: then @ Then::ByItself, .. } => {
                Some(format!("{}; killed in {} unless it is done", then.why(), left(*deadline)))
            }
            State::Stopping { deadline, stage: Stage::Asked, then, .. } => {
                Some(format!("{}; asked to stop, killed in {}", then.why(), left(*deadline)))
            }
            State::Stopping { deadline, stage: Stage::Aborted, then, .. } => {
                Some(format!("{}; got SIGABRT, killed in {}", then.why(), left(*deadline)))
            }
            State::Stopping { stage: Stage::Killed { .. }, then, .. } => {
                Some(format!("{}; killed, still has processes", then.why()))
            }
            State::Backoff { until, attempt, why, .. } => {
                Some(format!("{why}; next start in {} (attempt {attempt})", left(*until)))
            }
            State::Failed { fault, .. } => Some(format!("{fault}; resume it to try again")),
        };
        match (reason, self.history.says.as_str()) {
            (reason, "") => reason,
            (None, says) => Some(format!("says: {says}")),
            (Some(reason), says) => Some(format!("{reason}; says: {says}")),
        }
    }

    /// The newest instance, whether or not it still runs.
    pub fn instance(&self) -> Instance {
        self.history.instance
    }

    /// The main process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        match self.run()?.main {
            Main::Running { pid } => Some(pid),
            Main::Launching | Main::Background | Main::Ended => None,
        }
    }

    /// How often it was started again after a failure.
    pub fn restarts(&self) -> u64 {
        self.history.restarts
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.history.failures
    }

    /// Why it cannot be started now, if it is the machine that lacks something for it.
    pub fn lacks(&self) -> Option<&str> {
        let is_wanted = matches!(
            self.state,
            State::Starting { .. }
                | State::Backoff { .. }
                | State::Stopping { then: Then::Restart { .. }, .. }
        );
        self.last_end().filter(|_| is_wanted && self.history.lacked > 0)
    }

    /// How the newest instance that ended did so: `exited with 101 after 0.4s`.
    pub fn last_end(&self) -> Option<&str> {
        self.history.last_end.as_deref()
    }
}

impl Ailment {
    fn new(why: String, now: Instant) -> Self {
        Self { since: now, why, seen_since: now }
    }

    /// When something is done about it, if that is done after so long.
    fn due(&self, after: Option<Duration>) -> Option<Instant> {
        after.map(|after| self.seen_since + after)
    }

    fn is_due(&self, after: Option<Duration>, now: Instant) -> bool {
        self.due(after).is_some_and(|due| due <= now)
    }
}

impl Run {
    /// The process that was launched.
    pub fn main(&self) -> Main {
        self.main
    }

    /// When it was launched.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// An instance of which nothing was written down: it runs, and may have served.
    pub fn found(pid: u32, started: Instant) -> Self {
        Self {
            main: Main::Running { pid },
            notified: true,
            checked: true,
            served: true,
            ..Self::new(started)
        }
    }

    fn new(started: Instant) -> Self {
        Self {
            started,
            main: Main::Launching,
            listening: BTreeSet::new(),
            elsewhere: Vec::new(),
            notified: false,
            served: false,
            ready: None,
            healthy: false,
            watchdog: None,
            checked: false,
            unhealthy: None,
            stalled: None,
            unchecked: None,
        }
    }

    /// The worse one of what it suffers from.
    fn ailment(&self) -> Option<&Ailment> {
        self.unhealthy.as_ref().or(self.stalled.as_ref())
    }

    /// When something is to be done while it is ready.
    fn due(&self, remedies: Remedies) -> Option<Instant> {
        let watchdog = self.watchdog.map(|watchdog| watchdog.until);
        let unhealthy = self.unhealthy.as_ref().and_then(|it| it.due(remedies.restart_after));
        let stalled = self.stalled.as_ref().and_then(|it| it.due(remedies.hang_kill));
        [watchdog, unhealthy, stalled].into_iter().flatten().min()
    }

    /// What it suffers from, and what comes next.
    fn suffers(&self, now: Instant, remedies: Remedies) -> Option<String> {
        let told = |ailment: &Ailment, gets: &str, then: &str, after| match ailment.due(after) {
            Some(due) => {
                let left = span(due.saturating_duration_since(now));
                format!("{}; {gets}, {then} in {left}", ailment.why)
            }
            None => format!("{}; {gets}", ailment.why),
        };
        let unhealthy = self.unhealthy.as_ref();
        let unhealthy = unhealthy.map(|it| told(it, UNHEALTHY, "started again", remedies.restart_after));
        let stalled = self.stalled.as_ref().map(|it| told(it, STALLED, "killed", remedies.hang_kill));
        let parts: Vec<String> = unhealthy.into_iter().chain(stalled).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// Nothing is held against it any more: it becomes ready, or ceases to be.
    fn recover(&mut self) {
        (self.unhealthy, self.stalled, self.unchecked) = (None, None, None);
    }

    /// Nothing is missing but a good check.
    fn waits_for_check(&self, policy: &Supervision) -> bool {
        policy.readiness == Readiness::Check
            && self.main != Main::Launching
            && self.missing(policy).is_empty()
    }

    /// The service's addresses on which it does not listen.
    fn missing<'a>(&self, policy: &'a Supervision) -> Vec<&'a ListenAddress> {
        let addresses = policy.listen.iter().enumerate();
        addresses.filter(|(place, _)| !self.listening.contains(place)).map(|(_, address)| address).collect()
    }

    fn is_ready(&self, policy: &Supervision) -> bool {
        // With inherited sockets the listeners are there before the command runs, which may
        // fail yet.
        self.main != Main::Launching
            && self.missing(policy).is_empty()
            && match policy.readiness {
                Readiness::Listening => true,
                Readiness::Notify => self.notified,
                Readiness::Check => self.checked,
            }
    }

    /// What keeps it from being ready.
    fn awaits(&self, policy: &Supervision) -> String {
        let missing = self.missing(policy);
        let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
        let missing = missing.join(" and ");
        if self.main == Main::Launching {
            "is being launched".to_owned()
        } else if missing.is_empty() && policy.readiness == Readiness::Check {
            match &self.unchecked {
                Some(why) => format!("listens, waits for a good check: {why}"),
                None => "listens, waits for a good check".to_owned(),
            }
        } else if missing.is_empty() {
            "listens, waits for READY=1".to_owned()
        } else if !self.elsewhere.is_empty() {
            format!("listens on {}, not on {missing}", self.elsewhere.join(" and "))
        } else if self.served {
            format!("has no listener on {missing} now, waits for one")
        } else {
            format!("waits for a listener on {missing}")
        }
    }

    fn listens_elsewhere(&mut self, address: String) {
        if self.elsewhere.len() < MOST_ELSEWHERE && !self.elsewhere.contains(&address) {
            self.elsewhere.push(address);
        }
    }

    fn recipient(&self) -> Recipient {
        match self.main {
            Main::Launching | Main::Running { .. } => Recipient::Main,
            Main::Background | Main::Ended => Recipient::Everyone,
        }
    }
}

impl Then {
    fn why(&self) -> String {
        match self {
            Self::Stopped => "is to be stopped".to_owned(),
            Self::Start => "is to be stopped and started again".to_owned(),
            Self::ByItself => STOPS_BY_ITSELF.to_owned(),
            Self::Restart { why, .. } => why.clone(),
            Self::Failed(fault) => fault.to_string(),
        }
    }

    /// Gives a failure the better of two explanations: the launcher's exit may be reported
    /// before what it said of its failure.
    fn explained(self, why: String) -> Self {
        match self {
            Self::Restart { delay, .. } => Self::Restart { why, delay },
            Self::Failed(fault) => Self::Failed(fault.explained(why)),
            wanted @ (Self::Stopped | Self::Start | Self::ByItself) => wanted,
        }
    }
}

impl Fault {
    /// As `Then::explained`.
    fn explained(self, why: String) -> Self {
        match self {
            Self::CrashLoop { failures, .. } => Self::CrashLoop { failures, why },
            Self::OnlyTry { .. } => Self::OnlyTry { why },
            misconfigured @ Self::Misconfigured { .. } => misconfigured,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CrashLoop { failures: 1, why } => write!(f, "{why}; given up at once"),
            Self::CrashLoop { failures, why } => {
                write!(f, "{why}; given up after {failures} failures in a row")
            }
            Self::Misconfigured { sentence } => f.write_str(sentence),
            Self::OnlyTry { why } => f.write_str(why),
        }
    }
}

/// The number as it stands in the name of the instance's cgroup.
impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

const STOPS_BY_ITSELF: &str = "stops by itself";

/// What becomes of a server whose checks are bad...
const UNHEALTHY: &str = "gets no connections until its checks are good";
/// ...and of one that does not accept.
const STALLED: &str = "gets none while another server can take them, until its queue moves";

/// Where else a server listens is for a person to read.
const MOST_ELSEWHERE: usize = 4;

/// A length of time as short as a sentence wants it: `37ms`, `0.4s`, `2s`, `3m12s`.
pub fn span(length: Duration) -> String {
    if length < Duration::from_millis(100) {
        return format!("{}ms", length.as_millis());
    }
    if length >= Duration::from_secs(10) {
        return status::age(length);
    }
    match (length.as_secs(), length.subsec_millis() / 100) {
        (seconds, 0) => format!("{seconds}s"),
        (seconds, tenths) => format!("{seconds}.{tenths}s"),
    }
}
