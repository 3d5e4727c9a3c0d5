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

/// A distributor that ran this long was healthy: the one after it starts at once.
const HEALTHY_RUN: Duration = Duration::from_secs(10);

/// How long a distributor that was told to hurry may take before one more request replaces it.
/// It only has to kill and to remove; people press Ctrl-C more often than that.
const HURRY: Duration = Duration::from_secs(3);

/// How many deaths in a row end the attempt to stop cleanly. With the backoff: four seconds.
const DEATHS_WHILE_STOPPING: u32 = 6;

/// How many exits are kept that no distributor said `Forget` to. More means that it has a bug,
/// and the oldest are dropped.
const KEPT_EXITS: usize = 4096;

/// All that the monitor remembers. `F` is a descriptor; in tests it is a number.
pub(super) struct State<F> {
    pub(super) distributor: Distributor,
    /// How often in a row it died soon after its start.
    deaths: u32,
    /// Whether any distributor ever said that it works.
    ready: bool,
    wish: Wish,
    children: BTreeMap<u64, Child>,
    pub(super) held: BTreeMap<u64, Held<F>>,
    most_held: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Distributor {
    /// `kill_at`: when to lose patience with one that closed its channel and does not exit.
    Running {
        pid: u32,
        since: Instant,
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

struct Child {
    pid: u32,
    label: Vec<u8>,
    exit: Option<Exit>,
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
    Stop,
    Reload,
}

#[derive(Debug, PartialEq)]
pub(super) enum Action<F> {
    StartDistributor,
    StartServer { id: u64, label: Vec<u8>, stdin: F },
    Signal { pid: u32, signal: i32 },
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

    pub(super) fn step(&mut self, event: Event<F>, now: Instant) -> Vec<Action<F>> {
        use Distributor::{Done, Down, Running};
        match (self.distributor, event) {
            (Down { until }, Event::Time) if now >= until => vec![Action::StartDistributor],
            (Running { pid, since, kill_at }, Event::Time) if kill_at.is_some_and(|at| now >= at) => {
                let kill_at = None;
                self.distributor = Running { pid, since, kill_at };
                vec![
                    Action::Say(format!(
                        "the distributor (pid {pid}) closed its channel and does not exit: it is killed"
                    )),
                    Action::Signal { pid, signal: Signal::KILL.as_raw() },
                ]
            }
            (Running { .. } | Down { .. } | Done { .. }, Event::Time) => vec![],

            (_, Event::DistributorStarted(Ok(pid))) => {
                let (since, kill_at) = (now, None);
                self.distributor = Running { pid, since, kill_at };
                if let Wish::Hurry { since } = &mut self.wish {
                    *since = now;
                }
                self.greeting().map(Action::Tell).collect()
            }
            (_, Event::DistributorStarted(Err(error))) => {
                self.died(&format!("start the distributor: {error}"), None, now)
            }

            (Running { pid, since, .. }, Event::HungUp) => {
                let kill_at = Some(now + super::EXIT_TIME);
                self.distributor = Running { pid, since, kill_at };
                vec![]
            }
            (Down { .. } | Done { .. }, Event::HungUp) => vec![],

            (_, Event::Asked(message, descriptor)) => self.asked(message, descriptor),
            (_, Event::ServerStarted { id, label, result: Ok(pid) }) => {
                self.children.insert(id, Child { pid, label, exit: None });
                self.tell(FromMonitor::Started { id, pid })
            }
            (_, Event::ServerStarted { id, result: Err(errno), .. }) => {
                self.tell(FromMonitor::NotStarted { id, errno })
            }

            (Running { pid, since, .. }, Event::Exited { pid: gone, exit }) if gone == pid => {
                let ran = now - since;
                if ran >= HEALTHY_RUN {
                    self.deaths = 0;
                }
                let code = match exit {
                    Exit::Code(code) => u8::try_from(code).ok(),
                    Exit::Signal(_) | Exit::Unknown => None,
                };
                let how = format!("the distributor (pid {pid}) {exit} after {:.1}s", ran.as_secs_f32());
                self.died(&how, code, now)
            }
            (_, Event::Exited { pid, exit }) => self.exited(pid, exit),

            (_, Event::Stop) => self.stop(now),
            (_, Event::Reload) => self.tell(FromMonitor::Reload),
        }
    }

    /// What a new distributor is told first.
    fn greeting(&self) -> impl Iterator<Item = FromMonitor> + '_ {
        let children = self.children.iter().flat_map(|(&id, child)| {
            let (pid, label) = (child.pid, child.label.clone());
            let exited = child.exit.map(|exit| FromMonitor::Exited { id, pid, exit });
            [FromMonitor::Child { id, pid, label }].into_iter().chain(exited)
        });
        let held = self.held.iter().map(|(&key, held)| FromMonitor::Held { key, label: held.label.clone() });
        let stops = match self.wish {
            Wish::Run => 0,
            Wish::Stop => 1,
            Wish::Hurry { .. } => 2,
        };
        children.chain(held).chain([FromMonitor::Begin]).chain(std::iter::repeat_n(FromMonitor::Stop, stops))
    }

    fn asked(&mut self, message: ToMonitor, descriptor: Option<F>) -> Vec<Action<F>> {
        let no_descriptor = Errno::MFILE.raw_os_error();
        match (message, descriptor) {
            (ToMonitor::Start { id, .. }, _) if self.children.contains_key(&id) => {
                let errno = Errno::EXIST.raw_os_error();
                self.tell(FromMonitor::NotStarted { id, errno })
            }
            (ToMonitor::Start { id, .. }, None) => {
                let errno = no_descriptor;
                self.tell(FromMonitor::NotStarted { id, errno })
            }
            (ToMonitor::Start { id, label }, Some(stdin)) => {
                vec![Action::StartServer { id, label, stdin }]
            }
            (ToMonitor::Signal { id, signal }, _) => match self.children.get(&id) {
                // Not reaped, so the pid is still this child's.
                Some(&Child { pid, exit: None, .. }) => vec![Action::Signal { pid, signal }],
                Some(Child { exit: Some(_), .. }) | None => vec![],
            },
            (ToMonitor::Relabel { id, label }, _) => {
                if let Some(child) = self.children.get_mut(&id) {
                    child.label = label;
                }
                vec![]
            }
            (ToMonitor::Forget { id }, _) => {
                self.children.retain(|&other, child| other != id || child.exit.is_none());
                vec![]
            }
            (ToMonitor::Hold { key, label }, Some(descriptor))
                if self.held.len() < self.most_held || self.held.contains_key(&key) =>
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
            (ToMonitor::Watch { .. }, _) => vec![],
            (ToMonitor::Ready, _) => {
                self.ready = true;
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

    /// A process ended that is not the distributor.
    fn exited(&mut self, pid: u32, exit: Exit) -> Vec<Action<F>> {
        let mut living = self.children.iter_mut().filter(|(_, child)| child.exit.is_none());
        let Some((&id, child)) = living.find(|(_, child)| child.pid == pid) else {
            // Without a distributor this is lost: the next one looks for itself what of its
            // servers is still there.
            return self.tell(FromMonitor::Orphan { pid, exit });
        };
        child.exit = Some(exit);
        let mut kept = self.children.iter().filter(|(_, child)| child.exit.is_some());
        if let (Some((&oldest, _)), KEPT_EXITS) = (kept.next(), kept.count()) {
            self.children.remove(&oldest);
        }
        self.tell(FromMonitor::Exited { id, pid, exit })
    }

    /// The distributor ended without `Finished`, or could not be started. One that exited
    /// with a code has said why.
    fn died(&mut self, how: &str, code: Option<u8>, now: Instant) -> Vec<Action<F>> {
        self.deaths += 1;
        if !self.ready {
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
            (Distributor::Running { pid, .. }, Wish::Hurry { .. }) => vec![
                Action::Say(format!(
                    "asked to stop once more: the distributor (pid {pid}) is killed, \
                     and the next one finishes"
                )),
                Action::Signal { pid, signal: Signal::KILL.as_raw() },
            ],
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
        0 | 1 => Duration::ZERO,
        more => Duration::from_millis(100 << (more - 2).min(6)).min(Duration::from_secs(5)),
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
        let mut state = ready(now);
        let mut waits = vec![];
        for _ in 0..9 {
            dies(&mut state, 1, now);
            waits.push(wait(&state, now).as_millis());
            state.step(Event::DistributorStarted(Ok(1)), now);
        }
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }

    #[test]
    fn after_a_healthy_run_the_next_distributor_starts_at_once() {
        let now = Instant::now();
        let mut state = ready(now);
        dies(&mut state, 1, now);
        state.step(Event::DistributorStarted(Ok(2)), now);
        dies(&mut state, 2, now + Duration::from_secs(9));
        state.step(Event::DistributorStarted(Ok(3)), now);
        let later = now + Duration::from_secs(10);
        let said = dies(&mut state, 3, later);
        assert_eq!(wait(&state, later), Duration::ZERO);
        assert_eq!(
            said,
            [Action::Say(
                "the distributor (pid 3) was killed by SIGKILL after 10.0s: servers and kernel go on; the \
                 next distributor starts at once"
                    .into()
            )]
        );
    }

    #[test]
    fn nothing_starts_before_its_time() {
        let now = Instant::now();
        let mut state = ready(now);
        dies(&mut state, 1, now);
        state.step(Event::DistributorStarted(Ok(2)), now);
        dies(&mut state, 2, now);
        assert_eq!(state.deadline(), Some(now + Duration::from_millis(100)));
        assert_eq!(state.step(Event::Time, now + Duration::from_millis(99)), []);
        let due = now + Duration::from_millis(100);
        assert_eq!(state.step(Event::Time, due), [Action::StartDistributor]);
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
    fn one_that_is_killed_before_it_was_ready_ends_the_monitor_with_1_and_a_sentence() {
        let now = Instant::now();
        let mut state = Monitor::new(now, 100);
        state.step(Event::DistributorStarted(Ok(1)), now);
        let sentence = "the distributor (pid 1) was killed by SIGKILL after 0.0s, before it was ready: \
                        dist-ctl exits";
        assert_eq!(dies(&mut state, 1, now), [Action::Say(sentence.into()), Action::Finish(1)]);
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
        let mut state = ready(now);
        dies(&mut state, 1, now);
        state.step(Event::DistributorStarted(Ok(2)), now);
        dies(&mut state, 2, now);
        assert_eq!(wait(&state, now), Duration::from_millis(100));
        assert_eq!(state.step(Event::Stop, now), []);
        assert_eq!(state.step(Event::Time, now), [Action::StartDistributor]);
    }

    #[test]
    fn distributors_that_keep_dying_while_stopping_do_not_keep_it_up() {
        let now = Instant::now();
        let mut state = ready(now);
        state.step(Event::Stop, now);
        for pid in 2..=DEATHS_WHILE_STOPPING {
            dies(&mut state, pid - 1, now);
            state.step(Event::DistributorStarted(Ok(pid)), now);
        }
        let actions = dies(&mut state, DEATHS_WHILE_STOPPING, now);
        assert_eq!(actions.last(), Some(&Action::Finish(1)));
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

    /// What may happen to a monitor, in any order.
    #[derive(Clone, Debug)]
    enum Happening {
        Start(u64),
        Exit(u64),
        Forget(u64),
        Hold(u64),
        Drop(u64),
        DistributorDies,
        TimePasses(u64),
        Stop,
    }

    fn happening() -> impl Strategy<Value = Happening> {
        use Happening::*;
        prop_oneof![
            4 => (0..6u64).prop_map(Start),
            4 => (0..6u64).prop_map(Exit),
            2 => (0..6u64).prop_map(Forget),
            2 => (0..6u64).prop_map(Hold),
            1 => (0..6u64).prop_map(Drop),
            3 => Just(DistributorDies),
            3 => (0..12_000u64).prop_map(TimePasses),
            1 => Just(Stop),
        ]
    }

    proptest! {
        /// Whatever happens, every distributor is told exactly what there is, and every exit
        /// until one of them forgets it.
        #[test]
        fn nothing_is_ever_lost(story in proptest::collection::vec(happening(), 0..200)) {
            let mut now = Instant::now();
            let mut state = ready(now);
            let mut distributor = Some(1);
            let mut last_pid = 1;
            let mut stops = 0;
            // Id to pid and exit; key to descriptor: what a perfect memory would hold.
            let mut children = BTreeMap::<u64, (u32, Option<Exit>)>::new();
            let mut held = BTreeMap::<u64, u32>::new();
            for happens in story {
                let told = |message| if distributor.is_some() { vec![Action::Tell(message)] } else { vec![] };
                match happens {
                    Happening::Start(id) if distributor.is_some() && !children.contains_key(&id) => {
                        last_pid += 1;
                        server(&mut state, id, last_pid, now);
                        children.insert(id, (last_pid, None));
                    }
                    Happening::Exit(id) => {
                        if let Some((pid, exit @ None)) = children.get_mut(&id) {
                            *exit = Some(Exit::Code(3));
                            let actions = state.step(Event::Exited { pid: *pid, exit: Exit::Code(3) }, now);
                            prop_assert_eq!(
                                actions,
                                told(FromMonitor::Exited { id, pid: *pid, exit: Exit::Code(3) })
                            );
                        }
                    }
                    Happening::Forget(id) if distributor.is_some() => {
                        state.step(Event::Asked(ToMonitor::Forget { id }, None), now);
                        children.retain(|&other, (_, exit)| other != id || exit.is_none());
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
                    Happening::DistributorDies => {
                        if let Some(pid) = distributor.take() {
                            let actions = dies(&mut state, pid, now);
                            if matches!(actions.last(), Some(Action::Finish(1))) {
                                prop_assert!(stops > 0, "it gives up only while stopping");
                                return Ok(());
                            }
                            prop_assert!(wait(&state, now) <= Duration::from_secs(5));
                        }
                    }
                    Happening::TimePasses(milliseconds) => {
                        now += Duration::from_millis(milliseconds);
                        let due = distributor.is_none() && state.deadline().unwrap() <= now;
                        let actions = state.step(Event::Time, now);
                        if !due {
                            prop_assert_eq!(actions, vec![]);
                            continue;
                        }
                        prop_assert_eq!(actions, vec![Action::StartDistributor]);
                        last_pid += 1;
                        distributor = Some(last_pid);
                        let mut expected = vec![];
                        for (&id, &(pid, exit)) in &children {
                            let label = format!("shop/{id}").into_bytes();
                            expected.push(FromMonitor::Child { id, pid, label });
                            expected.extend(exit.map(|exit| FromMonitor::Exited { id, pid, exit }));
                        }
                        expected.extend(held.keys().map(|&key| FromMonitor::Held { key, label: vec![] }));
                        expected.push(FromMonitor::Begin);
                        expected.extend(vec![FromMonitor::Stop; stops]);
                        let told = state.step(Event::DistributorStarted(Ok(last_pid)), now);
                        prop_assert_eq!(told, expected.into_iter().map(Action::Tell).collect::<Vec<_>>());
                        let kept: BTreeMap<_, _> =
                            state.held.iter().map(|(&key, held)| (key, held.descriptor)).collect();
                        prop_assert_eq!(&kept, &held);
                    }
                    Happening::Stop if stops < 2 => {
                        stops += 1;
                        prop_assert_eq!(state.step(Event::Stop, now), told(FromMonitor::Stop));
                    }
                    // Not possible now, or the subject of another test.
                    Happening::Start(_)
                    | Happening::Forget(_)
                    | Happening::Hold(_)
                    | Happening::Drop(_)
                    | Happening::Stop => {}
                }
            }
        }
    }
}
