//! What the monitor remembers, and what it does about what happens.
//!
//! Pure: [`State::step`] takes an event and the time, and gives actions; it touches no process
//! and no descriptor. Whatever the next distributor must be told is in the tables here, never
//! only in a message: a message that a distributor did not live to read costs nothing.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use rustix::{io::Errno, process::Signal};

use crate::message::{Exit, FromMonitor, ToMonitor};

/// A distributor that ran this long was healthy: its death is the first in a row.
const HEALTHY_RUN: Duration = Duration::from_secs(10);

/// How long a distributor that was told to hurry may take before one more request replaces it.
/// It only has to kill and to remove; people press Ctrl-C more often than that.
const HURRY: Duration = Duration::from_secs(3);

/// How long the first distributor of a new program may take until it is ready.
const REPLACE_TIME: Duration = Duration::from_secs(30);

/// How many deaths in a row end the attempt to stop cleanly. With the backoff: three seconds.
const DEATHS_WHILE_STOPPING: u32 = 8;

/// How many exits are kept that no distributor said `Forget` to. More means that it has a bug,
/// and the oldest are dropped.
const KEPT_EXITS: usize = 4096;

/// All that the monitor remembers. `F` is a descriptor; in tests it is a number.
pub(super) struct State<F> {
    pub(super) distributor: Distributor,
    /// How often in a row it died by its own fault, or before it was ready.
    deaths: u32,
    /// Whether any distributor ever said that it works.
    ready: bool,
    wish: Wish,
    children: BTreeMap<u64, Child<F>>,
    pub(super) held: BTreeMap<u64, Held<F>>,
    /// How many descriptors there may be: held ones, and those of watched processes.
    most_held: usize,
    /// The program that distributors and launchers are; `None` is our own.
    pub(super) program: Option<F>,
    /// The one that the next distributor is to be, and launchers from then on.
    next: Option<F>,
    /// The one before, while no distributor of the program is ready yet.
    before: Option<Option<F>>,
    /// How the program ended that was to replace this one, until a distributor knows.
    not_replaced: Option<Exit>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Distributor {
    /// `sound`: it said that it is ready, and we have not killed it ourselves since; whatever
    /// kills it came from outside. `kill_at`: when to lose patience with one that closed its
    /// channel and does not exit, or is the first of its program and does not get ready.
    Running {
        pid: u32,
        since: Instant,
        sound: bool,
        kill_at: Option<Instant>,
    },
    Down {
        until: Instant,
    },
    /// It has cleaned up and may still exit by itself, or there is nothing more that it could
    /// do.
    Done {
        leaving: Option<u32>,
    },
}

/// What the operator wants.
#[derive(Clone, Copy, PartialEq)]
enum Wish {
    Run,
    Stop,
    /// `since`: when the distributor that runs was told.
    Hurry {
        since: Instant,
    },
}

struct Child<F> {
    pid: u32,
    label: Vec<u8>,
    is: Is<F>,
}

enum Is<F> {
    /// Our child, and not reaped: so the pid is nobody else's.
    Started,
    /// Somebody else's child, known by its pidfd: its pid may be another's at any time.
    Watched(F),
    Ended(Exit),
}

pub(super) struct Held<F> {
    label: Vec<u8>,
    pub(super) descriptor: F,
}

pub(super) enum Event<F> {
    Time,
    DistributorStarted(Result<u32, io::Error>),
    HungUp,
    Asked(ToMonitor, Option<F>),
    ServerStarted { id: u64, label: Vec<u8>, result: Result<u32, i32> },
    Exited { pid: u32, exit: Exit },
    WatchedEnded { id: u64 },
    Stop,
    Reload,
}

#[derive(Debug, PartialEq)]
pub(super) enum Action<F> {
    StartDistributor,
    StartServer { id: u64, label: Vec<u8>, stdin: F },
    Signal { pid: u32, signal: i32 },
    SignalWatched { id: u64, signal: i32 },
    Tell(FromMonitor),
    Say(String),
    Finish(u8),
}

impl<F> State<F> {
    pub(super) fn new(now: Instant, most_held: usize) -> Self {
        Self {
            distributor: Distributor::Down { until: now },
            deaths: 0,
            ready: false,
            wish: Wish::Run,
            children: BTreeMap::new(),
            held: BTreeMap::new(),
            most_held,
            program: None,
            next: None,
            before: None,
            not_replaced: None,
        }
    }

    /// When to step with `Event::Time`, if nothing else happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.distributor {
            Distributor::Running { kill_at, .. } => kill_at,
            Distributor::Down { until } => Some(until),
            Distributor::Done { .. } => None,
        }
    }

    /// The processes that are somebody else's children, and live as far as we know.
    pub(super) fn watched(&self) -> impl Iterator<Item = (u64, &F)> {
        self.children.iter().filter_map(|(&id, child)| match &child.is {
            Is::Watched(pidfd) => Some((id, pidfd)),
            Is::Started | Is::Ended(_) => None,
        })
    }

    pub(super) fn step(&mut self, event: Event<F>, now: Instant) -> Vec<Action<F>> {
        use Distributor::{Done, Down, Running};
        match (self.distributor, event) {
            (Down { until }, Event::Time) if now >= until => {
                if let Some(next) = self.next.take() {
                    self.before = Some(self.program.replace(next));
                }
                vec![Action::StartDistributor]
            }
            (Running { pid, since, kill_at, .. }, Event::Time) if kill_at.is_some_and(|at| now >= at) => {
                self.distributor = Running { pid, since, sound: false, kill_at: None };
                vec![
                    Action::Say(format!(
                        "the distributor (pid {pid}) does not get ready, or closed its channel and does not \
                         exit: it is killed"
                    )),
                    Action::Signal { pid, signal: Signal::KILL.as_raw() },
                ]
            }
            (Running { .. } | Down { .. } | Done { .. }, Event::Time) => vec![],

            (_, Event::DistributorStarted(Ok(pid))) => {
                let kill_at = self.before.is_some().then(|| now + REPLACE_TIME);
                self.distributor = Running { pid, since: now, sound: false, kill_at };
                if let Wish::Hurry { since } = &mut self.wish {
                    *since = now;
                }
                self.greeting().map(Action::Tell).collect()
            }
            (_, Event::DistributorStarted(Err(error))) => {
                let how = format!("start the distributor: {error}");
                if self.before.is_some() {
                    return self.go_back(&how, Exit::Unknown, now);
                }
                self.deaths += 1;
                self.died(&how, None, false, now)
            }

            (Running { pid, since, sound, .. }, Event::HungUp) => {
                let kill_at = Some(now + super::EXIT_TIME);
                self.distributor = Running { pid, since, sound, kill_at };
                vec![]
            }
            (Down { .. } | Done { .. }, Event::HungUp) => vec![],

            (_, Event::Asked(message, descriptor)) => self.asked(message, descriptor),
            (_, Event::ServerStarted { id, label, result: Ok(pid) }) => {
                self.children.insert(id, Child { pid, label, is: Is::Started });
                self.tell(FromMonitor::Started { id, pid })
            }
            (_, Event::ServerStarted { id, result: Err(errno), .. }) => {
                self.tell(FromMonitor::NotStarted { id, errno })
            }

            (Running { pid, since, sound, .. }, Event::Exited { pid: gone, exit }) if gone == pid => {
                let ran = now - since;
                let how = format!("the distributor (pid {pid}) {exit} after {:.1}s", ran.as_secs_f32());
                if self.before.is_some() {
                    return self.go_back(&how, exit, now);
                }
                if self.next.is_some() {
                    self.deaths = 0;
                    self.distributor = Down { until: now };
                    return vec![Action::Say(format!(
                        "the distributor (pid {pid}) makes room for another program, which starts at once"
                    ))];
                }
                let by_kill = exit == Exit::Signal(Signal::KILL.as_raw());
                // While stopping every death counts, or it might never end.
                let from_outside = sound && by_kill && self.wish == Wish::Run;
                if from_outside || ran >= HEALTHY_RUN {
                    self.deaths = 0;
                }
                if !from_outside {
                    self.deaths += 1;
                }
                let code = match exit {
                    Exit::Code(code) => u8::try_from(code).ok(),
                    Exit::Signal(_) | Exit::Unknown => None,
                };
                self.died(&how, code, by_kill, now)
            }
            (_, Event::Exited { pid, exit }) => self.exited(pid, exit),
            (_, Event::WatchedEnded { id }) => self.ended(id, Exit::Unknown),

            (_, Event::Stop) => self.stop(now),
            (_, Event::Reload) => self.tell(FromMonitor::Reload),
        }
    }

    /// What a new distributor is told first.
    fn greeting(&self) -> impl Iterator<Item = FromMonitor> + '_ {
        let children = self.children.iter().flat_map(|(&id, child)| {
            let (pid, label) = (child.pid, child.label.clone());
            let exited = match child.is {
                Is::Started | Is::Watched(_) => None,
                Is::Ended(exit) => Some(FromMonitor::Exited { id, pid, exit }),
            };
            [FromMonitor::Child { id, pid, label }].into_iter().chain(exited)
        });
        let held = self.held.iter().map(|(&key, held)| FromMonitor::Held { key, label: held.label.clone() });
        let stops = match self.wish {
            Wish::Run => 0,
            Wish::Stop => 1,
            Wish::Hurry { .. } => 2,
        };
        let not_replaced = self.not_replaced.map(|exit| FromMonitor::NotReplaced { exit });
        let before = children.chain(held).chain(not_replaced);
        before.chain([FromMonitor::Begin]).chain(std::iter::repeat_n(FromMonitor::Stop, stops))
    }

    fn asked(&mut self, message: ToMonitor, descriptor: Option<F>) -> Vec<Action<F>> {
        let no_descriptor = Errno::MFILE.raw_os_error();
        match (message, descriptor) {
            (ToMonitor::Start { id, .. } | ToMonitor::Watch { id, .. }, _)
                if self.children.contains_key(&id) =>
            {
                let errno = Errno::EXIST.raw_os_error();
                self.tell(FromMonitor::NotStarted { id, errno })
            }
            (ToMonitor::Start { id, .. } | ToMonitor::Watch { id, .. }, None) => {
                let errno = no_descriptor;
                self.tell(FromMonitor::NotStarted { id, errno })
            }
            (ToMonitor::Start { id, label }, Some(stdin)) => {
                vec![Action::StartServer { id, label, stdin }]
            }
            (ToMonitor::Watch { id, pid, label }, Some(pidfd)) => {
                if self.is_full() {
                    let errno = no_descriptor;
                    return self.tell(FromMonitor::NotStarted { id, errno });
                }
                self.children.insert(id, Child { pid, label, is: Is::Watched(pidfd) });
                vec![]
            }
            (ToMonitor::Signal { id, signal }, _) => match self.children.get(&id) {
                Some(&Child { pid, is: Is::Started, .. }) => vec![Action::Signal { pid, signal }],
                Some(Child { is: Is::Watched(_), .. }) => vec![Action::SignalWatched { id, signal }],
                Some(Child { is: Is::Ended(_), .. }) | None => vec![],
            },
            (ToMonitor::Relabel { id, label }, _) => {
                if let Some(child) = self.children.get_mut(&id) {
                    child.label = label;
                }
                vec![]
            }
            (ToMonitor::Forget { id }, _) => {
                self.children.retain(|&other, child| other != id || !matches!(child.is, Is::Ended(_)));
                vec![]
            }
            (ToMonitor::Hold { key, label }, Some(descriptor))
                if !self.is_full() || self.held.contains_key(&key) =>
            {
                self.held.insert(key, Held { label, descriptor });
                vec![]
            }
            (ToMonitor::Hold { key, .. }, _) => {
                let errno = no_descriptor;
                self.tell(FromMonitor::NotHeld { key, errno })
            }
            (ToMonitor::Drop { key }, _) => {
                self.held.remove(&key);
                vec![]
            }
            (ToMonitor::Ready, _) => {
                self.ready = true;
                self.before = None;
                self.not_replaced = None;
                if let Distributor::Running { sound, kill_at, .. } = &mut self.distributor {
                    (*sound, *kill_at) = (true, None);
                }
                vec![]
            }
            (ToMonitor::Replace, Some(program)) => {
                self.next = Some(program);
                vec![]
            }
            (ToMonitor::Replace, None) => {
                self.not_replaced = Some(Exit::Unknown);
                vec![Action::Say("the other program got lost on the way: too many files are open".into())]
            }
            (ToMonitor::Stopping, _) => {
                if self.wish == Wish::Run {
                    self.wish = Wish::Stop;
                }
                vec![]
            }
            (ToMonitor::Finished { code }, _) => {
                let leaving = match self.distributor {
                    Distributor::Running { pid, .. } => Some(pid),
                    Distributor::Down { .. } | Distributor::Done { .. } => None,
                };
                self.distributor = Distributor::Done { leaving };
                vec![Action::Finish(code)]
            }
        }
    }

    /// A child of ours ended that is not the distributor.
    fn exited(&mut self, pid: u32, exit: Exit) -> Vec<Action<F>> {
        let of = |is: fn(&Is<F>) -> bool| {
            let mut its = self.children.iter().filter(|(_, child)| child.pid == pid && is(&child.is));
            its.next().map(|(&id, _)| id)
        };
        // One that is watched was left to us by its parent. If its number is another's by now it has
        // ended all the same, and only how would be wrong.
        match of(|is| matches!(is, Is::Started)).or_else(|| of(|is| matches!(is, Is::Watched(_)))) {
            Some(id) => self.ended(id, exit),
            // Without a distributor this is lost: the next one looks for itself what of its
            // servers is still there.
            None => self.tell(FromMonitor::Orphan { pid, exit }),
        }
    }

    fn ended(&mut self, id: u64, exit: Exit) -> Vec<Action<F>> {
        let pid = match self.children.get_mut(&id) {
            Some(child @ Child { is: Is::Started | Is::Watched(_), .. }) => {
                child.is = Is::Ended(exit);
                child.pid
            }
            Some(Child { is: Is::Ended(_), .. }) | None => return vec![],
        };
        let mut kept = self.children.iter().filter(|(_, child)| matches!(child.is, Is::Ended(_)));
        if let (Some((&oldest, _)), KEPT_EXITS) = (kept.next(), kept.count()) {
            self.children.remove(&oldest);
        }
        self.tell(FromMonitor::Exited { id, pid, exit })
    }

    fn is_full(&self) -> bool {
        self.held.len() + self.watched().count() >= self.most_held
    }

    /// The distributor ended without `Finished`, or could not be started. One that exited
    /// with a code has said why; one that somebody killed might have got ready.
    fn died(&mut self, how: &str, code: Option<u8>, by_kill: bool, now: Instant) -> Vec<Action<F>> {
        if !self.ready && !by_kill {
            self.distributor = Distributor::Done { leaving: None };
            return match code {
                Some(code) => vec![Action::Finish(code)],
                None => {
                    let how = format!("{how}, before it was ready: dist-ctl exits");
                    vec![Action::Say(how), Action::Finish(1)]
                }
            };
        }
        if self.wish != Wish::Run && self.deaths >= DEATHS_WHILE_STOPPING {
            self.distributor = Distributor::Done { leaving: None };
            let how = format!(
                "{how}, for the {DEATHS_WHILE_STOPPING}th time while stopping: the servers are \
                 killed, its cgroups and pins stay until the next `dist-ctl up`"
            );
            return vec![Action::Say(how), Action::Finish(1)];
        }
        let wait = delay(self.deaths);
        self.distributor = Distributor::Down { until: now + wait };
        let when = match wait {
            Duration::ZERO => "at once".to_owned(),
            wait => format!("in {wait:?} (attempt {})", self.deaths),
        };
        vec![Action::Say(format!("{how}: servers and kernel go on; the next distributor starts {when}"))]
    }

    /// The first distributor of a new program ended before it was ready, or did not start.
    fn go_back(&mut self, how: &str, exit: Exit, now: Instant) -> Vec<Action<F>> {
        if let Some(before) = self.before.take() {
            self.program = before;
        }
        self.next = None;
        self.not_replaced = Some(exit);
        self.distributor = Distributor::Down { until: now };
        vec![Action::Say(format!(
            "{how}, before it was ready: the program before goes on, and its distributor starts at once"
        ))]
    }

    fn stop(&mut self, now: Instant) -> Vec<Action<F>> {
        let wished = self.wish;
        self.wish = match wished {
            Wish::Run => Wish::Stop,
            Wish::Stop => Wish::Hurry { since: now },
            Wish::Hurry { since } => Wish::Hurry { since },
        };
        match (self.distributor, wished) {
            (Distributor::Running { .. }, Wish::Run | Wish::Stop) => self.tell(FromMonitor::Stop),
            (Distributor::Running { .. }, Wish::Hurry { since }) if now - since < HURRY => {
                self.tell(FromMonitor::Stop)
            }
            // It may hang: the next one may not.
            (Distributor::Running { pid, since, kill_at, .. }, Wish::Hurry { .. }) => {
                self.distributor = Distributor::Running { pid, since, sound: false, kill_at };
                vec![
                    Action::Say(format!(
                        "asked to stop once more: the distributor (pid {pid}) is killed, \
                         and the next one finishes"
                    )),
                    Action::Signal { pid, signal: Signal::KILL.as_raw() },
                ]
            }
            (Distributor::Down { .. }, _) => {
                self.distributor = Distributor::Down { until: now };
                vec![]
            }
            (Distributor::Done { .. }, _) => vec![],
        }
    }

    /// Only to one that is there: the next one's greeting says all that matters by then.
    fn tell(&self, message: FromMonitor) -> Vec<Action<F>> {
        match self.distributor {
            Distributor::Running { .. } => vec![Action::Tell(message)],
            Distributor::Down { .. } | Distributor::Done { .. } => vec![],
        }
    }
}

/// How long the next distributor waits after so many deaths in a row.
fn delay(deaths: u32) -> Duration {
    match deaths {
        0..=2 => Duration::ZERO,
        more => Duration::from_millis(100 << (more - 3).min(6)).min(Duration::from_secs(5)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Monitor = State<u32>;

    /// A monitor whose distributor, pid 1, runs and said that it is ready.
    fn ready(now: Instant) -> Monitor {
        let mut state = State::new(now, 100);
        assert_eq!(state.step(Event::Time, now), [Action::StartDistributor]);
        state.step(Event::DistributorStarted(Ok(1)), now);
        state.step(Event::Asked(ToMonitor::Ready, None), now);
        state
    }

    fn server(state: &mut Monitor, id: u64, pid: u32, now: Instant) {
        let label = format!("shop/{id}").into_bytes();
        let start = ToMonitor::Start { id, label: label.clone() };
        let started = state.step(Event::Asked(start, Some(7)), now);
        assert_eq!(started, [Action::StartServer { id, label: label.clone(), stdin: 7 }]);
        let told = state.step(Event::ServerStarted { id, label, result: Ok(pid) }, now);
        assert_eq!(told, [Action::Tell(FromMonitor::Started { id, pid })]);
    }

    fn dies(state: &mut Monitor, pid: u32, now: Instant) -> Vec<Action<u32>> {
        state.step(Event::Exited { pid, exit: Exit::Signal(9) }, now)
    }

    /// The next distributor starts and says that it is ready.
    fn starts(state: &mut Monitor, pid: u32, now: Instant) {
        state.step(Event::DistributorStarted(Ok(pid)), now);
        state.step(Event::Asked(ToMonitor::Ready, None), now);
    }

    fn watch(state: &mut Monitor, id: u64, pid: u32, pidfd: u32, now: Instant) {
        let watch = ToMonitor::Watch { id, pid, label: format!("shop/{id}").into_bytes() };
        assert_eq!(state.step(Event::Asked(watch, Some(pidfd)), now), []);
    }

    /// How long the next distributor waits.
    fn wait(state: &Monitor, now: Instant) -> Duration {
        match state.distributor {
            Distributor::Down { until } => until - now,
            other => panic!("it is not down: {other:?}"),
        }
    }

    #[test]
    fn each_death_in_a_row_makes_the_next_distributor_wait_longer_up_to_five_seconds() {
        let now = Instant::now();
        // Before it was ready, and by its own fault after it was.
        for (says, exit) in
            [(None, Exit::Signal(9)), (None, Exit::Code(1)), (Some(ToMonitor::Ready), Exit::Signal(11))]
        {
            let mut state = ready(now);
            state.step(Event::Exited { pid: 1, exit: Exit::Code(101) }, now);
            let mut waits = vec![wait(&state, now).as_millis()];
            for _ in 0..9 {
                state.step(Event::DistributorStarted(Ok(2)), now);
                says.iter().for_each(|says| _ = state.step(Event::Asked(says.clone(), None), now));
                state.step(Event::HungUp, now);
                state.step(Event::Exited { pid: 2, exit }, now);
                waits.push(wait(&state, now).as_millis());
            }
            assert_eq!(waits, [0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        }
    }

    #[test]
    fn one_that_is_killed_from_outside_is_followed_at_once_however_often() {
        let now = Instant::now();
        let mut state = ready(now);
        for pid in 1..=500 {
            // Its channel is seen closed before it is seen dead, or the other way round.
            if pid % 2 == 0 {
                state.step(Event::HungUp, now);
            }
            let said = dies(&mut state, pid, now);
            assert_eq!(
                said,
                [Action::Say(format!(
                    "the distributor (pid {pid}) was killed by SIGKILL after 0.0s: servers and kernel go on; \
                     the next distributor starts at once"
                ))]
            );
            assert_eq!(state.step(Event::Time, now), [Action::StartDistributor]);
            starts(&mut state, pid + 1, now);
        }
    }

    #[test]
    fn one_that_hangs_and_is_killed_for_it_counts() {
        let mut now = Instant::now();
        let mut state = ready(now);
        for (pid, then) in [(1, 0), (2, 0), (3, 100)] {
            state.step(Event::HungUp, now);
            // Longer than it has, and shorter than a healthy run.
            now += Duration::from_secs(5);
            assert_eq!(state.step(Event::Time, now).last(), Some(&Action::Signal { pid, signal: 9 }));
            dies(&mut state, pid, now);
            assert_eq!(wait(&state, now), Duration::from_millis(then));
            starts(&mut state, pid + 1, now);
        }
    }

    #[test]
    fn after_a_healthy_run_or_a_kill_from_outside_deaths_are_counted_anew() {
        let now = Instant::now();
        let later = now + Duration::from_secs(10);
        for (exit, then) in [(Exit::Code(1), later), (Exit::Signal(9), now)] {
            let mut state = ready(now);
            for pid in 1..=3 {
                state.step(Event::Exited { pid, exit: Exit::Code(1) }, now);
                starts(&mut state, pid + 1, now);
            }
            state.step(Event::Exited { pid: 4, exit }, then);
            assert_eq!(wait(&state, then), Duration::ZERO);
        }
    }

    /// A monitor whose distributor has exited three times in a row.
    fn down_for_100_ms(now: Instant) -> Monitor {
        let mut state = ready(now);
        for pid in 1..=3 {
            state.step(Event::Exited { pid, exit: Exit::Code(1) }, now);
            if pid < 3 {
                starts(&mut state, pid + 1, now);
            }
        }
        assert_eq!(wait(&state, now), Duration::from_millis(100));
        state
    }

    #[test]
    fn nothing_starts_before_its_time() {
        let now = Instant::now();
        let mut state = down_for_100_ms(now);
        assert_eq!(state.deadline(), Some(now + Duration::from_millis(100)));
        assert_eq!(state.step(Event::Time, now + Duration::from_millis(99)), []);
        let due = now + Duration::from_millis(100);
        assert_eq!(state.step(Event::Time, due), [Action::StartDistributor]);
    }

    #[test]
    fn what_a_distributor_was_asked_the_next_one_is_told() {
        let now = Instant::now();
        let mut state = ready(now);
        assert_eq!(state.step(Event::Asked(ToMonitor::Stopping, None), now), []);
        dies(&mut state, 1, now);
        let told = state.step(Event::DistributorStarted(Ok(2)), now);
        assert_eq!(told, [Action::Tell(FromMonitor::Begin), Action::Tell(FromMonitor::Stop)]);
    }

    #[test]
    fn a_distributor_that_was_never_ready_ends_the_monitor_with_its_own_code() {
        let now = Instant::now();
        let mut state = Monitor::new(now, 100);
        state.step(Event::DistributorStarted(Ok(1)), now);
        let actions = state.step(Event::Exited { pid: 1, exit: Exit::Code(2) }, now);
        assert_eq!(actions, [Action::Finish(2)]);
    }

    #[test]
    fn one_that_crashes_before_it_was_ready_ends_the_monitor_with_1_and_a_sentence() {
        let now = Instant::now();
        let mut state = Monitor::new(now, 100);
        state.step(Event::DistributorStarted(Ok(1)), now);
        let crash = Exit::Signal(Signal::SEGV.as_raw());
        let sentence = "the distributor (pid 1) was killed by SIGSEGV after 0.0s, before it was ready: \
                        dist-ctl exits";
        let actions = state.step(Event::Exited { pid: 1, exit: crash }, now);
        assert_eq!(actions, [Action::Say(sentence.into()), Action::Finish(1)]);
    }

    #[test]
    fn one_that_somebody_kills_before_it_was_ready_is_followed_more_and_more_slowly() {
        let now = Instant::now();
        let mut state = Monitor::new(now, 100);
        let waits = (1..=4).map(|pid| {
            state.step(Event::DistributorStarted(Ok(pid)), now);
            dies(&mut state, pid, now);
            state.deadline().map(|deadline| deadline - now)
        });
        let expected = [0, 0, 100, 200].map(|wait| Some(Duration::from_millis(wait)));
        assert_eq!(waits.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_next_distributor_is_told_of_children_exits_and_held_descriptors() {
        let now = Instant::now();
        let mut state = ready(now);
        server(&mut state, 10, 110, now);
        server(&mut state, 11, 111, now);
        server(&mut state, 12, 112, now);
        let hold = ToMonitor::Hold { key: 5, label: b"room".to_vec() };
        state.step(Event::Asked(hold, Some(77)), now);
        let relabel = ToMonitor::Relabel { id: 12, label: b"shop/12 ready".to_vec() };
        state.step(Event::Asked(relabel, None), now);
        for pid in [110, 111] {
            state.step(Event::Exited { pid, exit: Exit::Code(0) }, now);
        }
        state.step(Event::Asked(ToMonitor::Forget { id: 10 }, None), now);
        dies(&mut state, 1, now);

        let told = state.step(Event::DistributorStarted(Ok(2)), now);
        assert_eq!(
            told,
            [
                Action::Tell(FromMonitor::Child { id: 11, pid: 111, label: b"shop/11".to_vec() }),
                Action::Tell(FromMonitor::Exited { id: 11, pid: 111, exit: Exit::Code(0) }),
                Action::Tell(FromMonitor::Child { id: 12, pid: 112, label: b"shop/12 ready".to_vec() }),
                Action::Tell(FromMonitor::Held { key: 5, label: b"room".to_vec() }),
                Action::Tell(FromMonitor::Begin),
            ]
        );
    }

    #[test]
    fn a_distributor_that_dies_while_stopping_is_followed_by_one_that_is_told_to_stop() {
        let now = Instant::now();
        let mut state = ready(now);
        assert_eq!(state.step(Event::Stop, now), [Action::Tell(FromMonitor::Stop)]);
        assert_eq!(state.step(Event::Stop, now), [Action::Tell(FromMonitor::Stop)]);
        dies(&mut state, 1, now);
        assert_eq!(wait(&state, now), Duration::ZERO);
        let told = state.step(Event::DistributorStarted(Ok(2)), now);
        assert_eq!(told, [FromMonitor::Begin, FromMonitor::Stop, FromMonitor::Stop].map(Action::Tell));
    }

    #[test]
    fn being_asked_to_stop_ends_the_wait_for_the_next_distributor() {
        let now = Instant::now();
        let mut state = down_for_100_ms(now);
        assert_eq!(state.step(Event::Stop, now), []);
        assert_eq!(state.step(Event::Time, now), [Action::StartDistributor]);
    }

    #[test]
    fn distributors_that_keep_dying_while_stopping_do_not_keep_it_up() {
        let now = Instant::now();
        for are_ready in [false, true] {
            let mut state = ready(now);
            state.step(Event::Stop, now);
            for pid in 2..=DEATHS_WHILE_STOPPING {
                dies(&mut state, pid - 1, now);
                assert!(wait(&state, now) < Duration::from_secs(2));
                state.step(Event::DistributorStarted(Ok(pid)), now);
                if are_ready {
                    state.step(Event::Asked(ToMonitor::Ready, None), now);
                }
            }
            let actions = dies(&mut state, DEATHS_WHILE_STOPPING, now);
            assert_eq!(actions.last(), Some(&Action::Finish(1)));
        }
    }

    #[test]
    fn a_further_request_to_stop_replaces_a_distributor_that_had_its_time() {
        let now = Instant::now();
        let mut state = ready(now);
        state.step(Event::Stop, now);
        state.step(Event::Stop, now);
        let soon = now + Duration::from_millis(2999);
        assert_eq!(state.step(Event::Stop, soon), [Action::Tell(FromMonitor::Stop)]);
        let late = now + Duration::from_secs(3);
        let actions = state.step(Event::Stop, late);
        assert_eq!(actions.last(), Some(&Action::Signal { pid: 1, signal: 9 }));
        dies(&mut state, 1, late);
        state.step(Event::DistributorStarted(Ok(2)), late);
        assert_eq!(state.step(Event::Stop, late), [Action::Tell(FromMonitor::Stop)], "so has the next one");
    }

    #[test]
    fn one_that_closes_its_channel_may_still_exit_by_itself_for_five_seconds() {
        let now = Instant::now();
        let mut state = ready(now);
        state.step(Event::HungUp, now);
        assert_eq!(state.step(Event::Time, now + Duration::from_millis(4999)), []);
        let due = now + Duration::from_secs(5);
        assert_eq!(state.deadline(), Some(due));
        assert_eq!(state.step(Event::Time, due).last(), Some(&Action::Signal { pid: 1, signal: 9 }));
        assert_eq!(state.step(Event::Time, due), []);
    }

    #[test]
    fn an_exited_child_gets_no_signal() {
        let now = Instant::now();
        let mut state = ready(now);
        server(&mut state, 10, 110, now);
        let signal = || Event::Asked(ToMonitor::Signal { id: 10, signal: 15 }, None);
        assert_eq!(state.step(signal(), now), [Action::Signal { pid: 110, signal: 15 }]);
        state.step(Event::Exited { pid: 110, exit: Exit::Code(0) }, now);
        assert_eq!(state.step(signal(), now), []);
    }

    #[test]
    fn a_watched_process_is_signalled_by_its_descriptor_and_never_by_its_pid() {
        let now = Instant::now();
        let mut state = ready(now);
        watch(&mut state, 10, 110, 7, now);
        let signal = || Event::Asked(ToMonitor::Signal { id: 10, signal: 15 }, None);
        assert_eq!(state.step(signal(), now), [Action::SignalWatched { id: 10, signal: 15 }]);
        assert_eq!(state.watched().collect::<Vec<_>>(), [(10, &7)]);

        // A child of ours that got the number of one that is gone is another process.
        server(&mut state, 11, 110, now);
        let exited = FromMonitor::Exited { id: 11, pid: 110, exit: Exit::Code(0) };
        let told = state.step(Event::Exited { pid: 110, exit: Exit::Code(0) }, now);
        assert_eq!(told, [Action::Tell(exited)]);

        let ended = FromMonitor::Exited { id: 10, pid: 110, exit: Exit::Unknown };
        assert_eq!(state.step(Event::WatchedEnded { id: 10 }, now), [Action::Tell(ended)]);
        assert_eq!(state.watched().count(), 0, "the descriptor is still there");
        assert_eq!(state.step(signal(), now), []);
    }

    #[test]
    fn a_watched_process_that_was_left_to_us_is_known_to_have_ended_so() {
        let now = Instant::now();
        let mut state = ready(now);
        watch(&mut state, 10, 110, 7, now);
        let told = state.step(Event::Exited { pid: 110, exit: Exit::Signal(11) }, now);
        let ended = FromMonitor::Exited { id: 10, pid: 110, exit: Exit::Signal(11) };
        assert_eq!(told, [Action::Tell(ended)]);
        assert_eq!(state.step(Event::WatchedEnded { id: 10 }, now), [], "told twice");
    }

    #[test]
    fn what_cannot_be_watched_is_answered() {
        let now = Instant::now();
        let mut state = ready(now);
        let watch_it = |id| ToMonitor::Watch { id, pid: 110, label: vec![] };
        let refused = |id, errno| [Action::Tell(FromMonitor::NotStarted { id, errno })];
        assert_eq!(state.step(Event::Asked(watch_it(1), None), now), refused(1, 24));
        for id in 1..=60 {
            watch(&mut state, id, 110, 7, now);
        }
        assert_eq!(state.step(Event::Asked(watch_it(1), Some(7)), now), refused(1, 17));
        for key in 0..40 {
            let hold = ToMonitor::Hold { key, label: vec![] };
            assert_eq!(state.step(Event::Asked(hold, Some(7)), now), []);
        }
        assert_eq!(state.step(Event::Asked(watch_it(61), Some(7)), now), refused(61, 24));
        state.step(Event::WatchedEnded { id: 1 }, now);
        assert_eq!(state.step(Event::Asked(watch_it(61), Some(7)), now), []);
    }

    #[test]
    fn what_cannot_be_done_for_lack_of_a_descriptor_is_answered() {
        let now = Instant::now();
        let mut state = ready(now);
        let start = ToMonitor::Start { id: 10, label: vec![] };
        assert_eq!(
            state.step(Event::Asked(start, None), now),
            [Action::Tell(FromMonitor::NotStarted { id: 10, errno: 24 })]
        );
        let hold = |key| ToMonitor::Hold { key, label: vec![] };
        assert_eq!(
            state.step(Event::Asked(hold(5), None), now),
            [Action::Tell(FromMonitor::NotHeld { key: 5, errno: 24 })]
        );
        for key in 0..100 {
            assert_eq!(state.step(Event::Asked(hold(key), Some(7)), now), []);
        }
        assert_eq!(state.step(Event::Asked(hold(99), Some(8)), now), [], "it takes the place of the old");
        assert_eq!(
            state.step(Event::Asked(hold(100), Some(7)), now),
            [Action::Tell(FromMonitor::NotHeld { key: 100, errno: 24 })]
        );
    }

    #[test]
    fn an_id_that_is_taken_is_refused() {
        let now = Instant::now();
        let mut state = ready(now);
        server(&mut state, 10, 110, now);
        let start = ToMonitor::Start { id: 10, label: vec![] };
        assert_eq!(
            state.step(Event::Asked(start, Some(7)), now),
            [Action::Tell(FromMonitor::NotStarted { id: 10, errno: 17 })]
        );
    }

    #[test]
    fn exits_that_nobody_forgets_do_not_grow_without_end() {
        let now = Instant::now();
        let mut state = ready(now);
        for id in 0..KEPT_EXITS as u64 + 3 {
            server(&mut state, id, 1000, now);
            state.step(Event::Exited { pid: 1000, exit: Exit::Code(0) }, now);
        }
        assert_eq!(state.children.keys().next(), Some(&3));
        assert_eq!(state.children.len(), KEPT_EXITS);
    }

    fn replace(state: &mut Monitor, pid: u32, program: u32, now: Instant) {
        assert_eq!(state.step(Event::Asked(ToMonitor::Replace, Some(program)), now), []);
        let actions = state.step(Event::Exited { pid, exit: Exit::Code(0) }, now);
        let sentence =
            format!("the distributor (pid {pid}) makes room for another program, which starts at once");
        assert_eq!(actions, [Action::Say(sentence)]);
        assert_eq!(state.step(Event::Time, now), [Action::StartDistributor]);
        assert_eq!(state.program, Some(program));
    }

    #[test]
    fn another_program_takes_over_and_the_one_before_is_dropped_once_it_is_ready() {
        let now = Instant::now();
        let mut state = ready(now);
        for (pid, program) in [(1, 70), (2, 71)] {
            replace(&mut state, pid, program, now);
            assert_eq!(
                state.step(Event::DistributorStarted(Ok(pid + 1)), now),
                [Action::Tell(FromMonitor::Begin)]
            );
            assert!(state.before.is_some(), "nothing to go back to");
            state.step(Event::Asked(ToMonitor::Ready, None), now);
            assert!(state.before.is_none(), "it is still there");
            assert_eq!(state.deadline(), None, "it has all the time that it wants");
        }
        // From now on a death is like any other.
        state.step(Event::Exited { pid: 3, exit: Exit::Code(1) }, now);
        assert_eq!(state.program, Some(71));
    }

    #[test]
    fn a_program_whose_distributor_ends_before_it_is_ready_is_taken_back_and_the_next_one_is_told() {
        let now = Instant::now();
        for exit in [Exit::Code(1), Exit::Code(0), Exit::Signal(9), Exit::Signal(11)] {
            let mut state = ready(now);
            replace(&mut state, 1, 70, now);
            starts(&mut state, 2, now);
            replace(&mut state, 2, 71, now);
            state.step(Event::DistributorStarted(Ok(3)), now);
            state.step(Event::HungUp, now);
            let actions = state.step(Event::Exited { pid: 3, exit }, now);
            assert_eq!(
                actions,
                [Action::Say(format!(
                    "the distributor (pid 3) {exit} after 0.0s, before it was ready: the program before goes on, \
                     and its distributor starts at once"
                ))]
            );
            assert_eq!(wait(&state, now), Duration::ZERO);
            assert_eq!(state.program, Some(70), "the last one that was ready");
            let told = [FromMonitor::NotReplaced { exit }, FromMonitor::Begin].map(Action::Tell);
            assert_eq!(state.step(Event::DistributorStarted(Ok(4)), now), told);
            // Killed before it was ready, it has told nobody: so the next one hears of it, too.
            dies(&mut state, 4, now);
            assert_eq!(state.step(Event::DistributorStarted(Ok(5)), now), told);
            state.step(Event::Asked(ToMonitor::Ready, None), now);
            dies(&mut state, 5, now);
            let told = state.step(Event::DistributorStarted(Ok(6)), now);
            assert_eq!(told, [Action::Tell(FromMonitor::Begin)]);
        }
    }

    #[test]
    fn a_program_that_cannot_be_started_or_does_not_get_ready_is_taken_back() {
        let now = Instant::now();
        let mut state = ready(now);
        replace(&mut state, 1, 70, now);
        state.step(Event::DistributorStarted(Err(io::ErrorKind::PermissionDenied.into())), now);
        assert_eq!(state.program, None, "our own");
        starts(&mut state, 2, now);

        replace(&mut state, 2, 70, now);
        state.step(Event::DistributorStarted(Ok(3)), now);
        let late = now + REPLACE_TIME;
        assert_eq!(state.deadline(), Some(late));
        assert_eq!(state.step(Event::Time, late).last(), Some(&Action::Signal { pid: 3, signal: 9 }));
        dies(&mut state, 3, late);
        assert_eq!(state.program, None);
    }

    #[test]
    fn nothing_that_one_distributor_says_makes_a_program_the_one_to_stay() {
        let now = Instant::now();
        let mut state = ready(now);
        // Ready is its own, and not the other's. Of several programs the last one counts.
        for program in [70, 71] {
            state.step(Event::Asked(ToMonitor::Replace, Some(program)), now);
            state.step(Event::Asked(ToMonitor::Ready, None), now);
            assert_eq!(state.program, None, "launchers are still what they were");
        }
        dies(&mut state, 1, now);
        state.step(Event::Time, now);
        state.step(Event::DistributorStarted(Ok(2)), now);
        // One that asks before it is ready has not earned it.
        state.step(Event::Asked(ToMonitor::Replace, Some(72)), now);
        dies(&mut state, 2, now);
        state.step(Event::Time, now);
        assert_eq!((state.program, state.next), (None, None));
    }

    #[test]
    fn a_program_that_got_lost_on_the_way_changes_nothing_and_the_next_distributor_is_told() {
        let now = Instant::now();
        let mut state = ready(now);
        state.step(Event::Asked(ToMonitor::Replace, None), now);
        state.step(Event::Exited { pid: 1, exit: Exit::Code(0) }, now);
        assert_eq!((wait(&state, now), state.program), (Duration::ZERO, None));
        let told = [FromMonitor::NotReplaced { exit: Exit::Unknown }, FromMonitor::Begin].map(Action::Tell);
        assert_eq!(state.step(Event::DistributorStarted(Ok(2)), now), told);
    }

    /// What may happen to a monitor, in any order.
    #[derive(Clone, Debug)]
    enum Happening {
        Start(u64),
        Watch(u64),
        Ends(u64),
        Forget(u64),
        Hold(u64),
        Drop(u64),
        Ready,
        /// The distributor asks for another program, and exits.
        Replace,
        DistributorDies(Exit),
        TimePasses(u64),
        Stop,
    }

    fn happening() -> impl Strategy<Value = Happening> {
        use Happening::*;
        prop_oneof![
            4 => (0..6u64).prop_map(Start),
            3 => (0..6u64).prop_map(Watch),
            4 => (0..6u64).prop_map(Ends),
            2 => (0..6u64).prop_map(Forget),
            2 => (0..6u64).prop_map(Hold),
            1 => (0..6u64).prop_map(Drop),
            3 => Just(Ready),
            1 => Just(Replace),
            2 => Just(DistributorDies(Exit::Signal(9))),
            1 => Just(DistributorDies(Exit::Code(1))),
            3 => (0..12_000u64).prop_map(TimePasses),
            1 => Just(Stop),
        ]
    }

    proptest! {
        /// Whatever happens, every distributor is told exactly what there is, and every exit
        /// until one of them forgets it; and the one after a killed one starts at once.
        #[test]
        fn nothing_is_ever_lost(story in proptest::collection::vec(happening(), 0..200)) {
            let mut now = Instant::now();
            let mut state = ready(now);
            let mut distributor = Some(1);
            let mut last_pid = 1;
            let (mut is_ready, mut deaths, mut stops) = (true, 0, 0);
            // The last program that was ready, and the one that is to be.
            let (mut sure, mut program) = (None, None);
            let mut not_replaced = None;
            // Id to pid, whether it is watched, and exit; key to descriptor: what a perfect
            // memory would hold.
            let mut children = BTreeMap::<u64, (u32, bool, Option<Exit>)>::new();
            let mut held = BTreeMap::<u64, u32>::new();
            for happens in story {
                let told = |message| if distributor.is_some() { vec![Action::Tell(message)] } else { vec![] };
                match happens {
                    Happening::Start(id) if distributor.is_some() && !children.contains_key(&id) => {
                        last_pid += 1;
                        server(&mut state, id, last_pid, now);
                        children.insert(id, (last_pid, false, None));
                    }
                    Happening::Watch(id) if distributor.is_some() && !children.contains_key(&id) => {
                        last_pid += 1;
                        watch(&mut state, id, last_pid, last_pid, now);
                        children.insert(id, (last_pid, true, None));
                    }
                    Happening::Ends(id) => {
                        if let Some(&mut (pid, watched, ref mut exit @ None)) = children.get_mut(&id) {
                            let (event, how) = match watched {
                                true => (Event::WatchedEnded { id }, Exit::Unknown),
                                false => (Event::Exited { pid, exit: Exit::Code(3) }, Exit::Code(3)),
                            };
                            *exit = Some(how);
                            let actions = state.step(event, now);
                            prop_assert_eq!(actions, told(FromMonitor::Exited { id, pid, exit: how }));
                        }
                    }
                    Happening::Forget(id) if distributor.is_some() => {
                        state.step(Event::Asked(ToMonitor::Forget { id }, None), now);
                        children.retain(|&other, (_, _, exit)| other != id || exit.is_none());
                    }
                    Happening::Hold(key) if distributor.is_some() => {
                        last_pid += 1;
                        let hold = ToMonitor::Hold { key, label: vec![] };
                        prop_assert_eq!(state.step(Event::Asked(hold, Some(last_pid)), now), vec![]);
                        held.insert(key, last_pid);
                    }
                    Happening::Drop(key) if distributor.is_some() => {
                        state.step(Event::Asked(ToMonitor::Drop { key }, None), now);
                        held.remove(&key);
                    }
                    Happening::Ready if distributor.is_some() => {
                        prop_assert_eq!(state.step(Event::Asked(ToMonitor::Ready, None), now), vec![]);
                        is_ready = true;
                        sure = program;
                        not_replaced = None;
                    }
                    Happening::Replace if distributor.is_some() && is_ready => {
                        last_pid += 1;
                        program = Some(last_pid);
                        let actions = state.step(Event::Asked(ToMonitor::Replace, Some(last_pid)), now);
                        prop_assert_eq!(actions, vec![]);
                        state.step(Event::Exited { pid: distributor.take().unwrap(), exit: Exit::Code(0) }, now);
                        prop_assert_eq!(wait(&state, now), Duration::ZERO);
                        deaths = 0;
                    }
                    Happening::DistributorDies(exit) => {
                        if let Some(pid) = distributor.take() {
                            let actions = state.step(Event::Exited { pid, exit }, now);
                            if matches!(actions.last(), Some(Action::Finish(1))) {
                                prop_assert!(stops > 0, "it gives up only while stopping");
                                return Ok(());
                            }
                            if program != sure {
                                program = sure;
                                not_replaced = Some(exit);
                                prop_assert_eq!(wait(&state, now), Duration::ZERO);
                                continue;
                            }
                            let from_outside = is_ready && exit == Exit::Signal(9) && stops == 0;
                            deaths = if from_outside { 0 } else { deaths + 1 };
                            let wait = wait(&state, now);
                            // A healthy run makes it shorter.
                            prop_assert!(wait == Duration::ZERO || deaths > 2, "{wait:?} after {deaths}");
                            prop_assert!(wait <= Duration::from_secs(5));
                        }
                    }
                    Happening::TimePasses(milliseconds) => {
                        now += Duration::from_millis(milliseconds);
                        let due = distributor.is_none() && state.deadline().unwrap() <= now;
                        let actions = state.step(Event::Time, now);
                        if !due {
                            // Maybe a new program's time is up, and it is killed; that it dies
                            // of it is another happening.
                            prop_assert!(actions.is_empty() || (distributor.is_some() && program != sure));
                            continue;
                        }
                        prop_assert_eq!(actions, vec![Action::StartDistributor]);
                        last_pid += 1;
                        distributor = Some(last_pid);
                        is_ready = false;
                        let mut expected = vec![];
                        for (&id, &(pid, _, exit)) in &children {
                            let label = format!("shop/{id}").into_bytes();
                            expected.push(FromMonitor::Child { id, pid, label });
                            expected.extend(exit.map(|exit| FromMonitor::Exited { id, pid, exit }));
                        }
                        expected.extend(held.keys().map(|&key| FromMonitor::Held { key, label: vec![] }));
                        expected.extend(not_replaced.map(|exit| FromMonitor::NotReplaced { exit }));
                        expected.push(FromMonitor::Begin);
                        prop_assert_eq!(state.program, program);
                        expected.extend(vec![FromMonitor::Stop; stops]);
                        let told = state.step(Event::DistributorStarted(Ok(last_pid)), now);
                        prop_assert_eq!(told, expected.into_iter().map(Action::Tell).collect::<Vec<_>>());
                        let kept: BTreeMap<_, _> =
                            state.held.iter().map(|(&key, held)| (key, held.descriptor)).collect();
                        prop_assert_eq!(&kept, &held);
                        let watched: Vec<_> = state.watched().map(|(id, &pidfd)| (id, pidfd)).collect();
                        let living = children.iter().filter(|(_, (_, watched, exit))| *watched && exit.is_none());
                        prop_assert_eq!(watched, living.map(|(&id, &(pid, ..))| (id, pid)).collect::<Vec<_>>());
                    }
                    Happening::Stop if stops < 2 => {
                        stops += 1;
                        prop_assert_eq!(state.step(Event::Stop, now), told(FromMonitor::Stop));
                    }
                    // Not possible now, or the subject of another test.
                    Happening::Start(_)
                    | Happening::Watch(_)
                    | Happening::Ready
                    | Happening::Replace
                    | Happening::Forget(_)
                    | Happening::Hold(_)
                    | Happening::Drop(_)
                    | Happening::Stop => {}
                }
            }
        }
    }
}
