//! How a server goes from one state to the next.
//!
//! One `match` answers every pair of state and event; below it stand the moves it is made of,
//! from a launch to an end. Every way out of `Ready` begins with `leave_ready`, which takes
//! the server out of the plan before anything is signalled. Must act on nothing: it only
//! notes actions.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use rustix::process::Signal;
use tracing::Level;

use super::{
    Action, Ailment, Event, Fault, History, Main, Recipient, Remedies, Report, Run, STALLED, Stage, State,
    Supervision, Then, UNHEALTHY, Watchdog, span,
};
use crate::{message::Exit, moment::Moment};

/// One event on its way through.
pub(super) struct Step<'a> {
    pub(super) history: History,
    pub(super) actions: Vec<Action>,
    pub(super) now: Instant,
    pub(super) random: u32,
    pub(super) policy: &'a Supervision,
}

impl Step<'_> {
    pub(super) fn next(&mut self, state: State, event: Event) -> State {
        use Event::{Of, Resume, Start, Stop, Tick};
        use Report::{
            CgroupEmpty, DrainDone, LaunchFailed, LaunchInterrupted, LaunchLacked, Launched, ListenerAdopted,
            ListenerGone, ListensElsewhere, MainExited, MainPid, Misbound, NotifyExtendTimeout, NotifyReady,
            NotifyStatus, NotifyStopping, NotifyWatchdog, NotifyWatchdogInterval, NotifyWatchdogTrigger,
            QueueMoves, QueueStands, Unobserved, Unwell, Well,
        };
        use State::{Backoff, Draining, Failed, Ready, Starting, Stopped, Stopping};

        match (state, event) {
            // -- Stopped
            (Stopped { .. }, Start) => self.launch_afresh(),
            // It is stopped already; it has not failed; it waits for no time.
            (state @ Stopped { .. }, Stop | Resume | Tick) => state,

            // -- Starting
            (Starting { run, .. }, Stop) => {
                if run.served {
                    // It is not in the plan. This asks for `DrainDone`.
                    self.exclude();
                    self.drain(run, Then::Stopped)
                } else {
                    self.ask_to_stop(run, Then::Stopped)
                }
            }
            (Starting { since, deadline, run }, Tick) => {
                if self.now < deadline {
                    return Starting { since, deadline, run };
                }
                let why =
                    format!("was not ready after {}: {}", self.span_since(since), run.awaits(self.policy));
                let served = run.served;
                let then = self.failed(why, &run);
                if served {
                    self.exclude();
                    self.drain(run, then)
                } else {
                    self.ask_to_stop(run, then)
                }
            }
            // It is being started; nothing has failed.
            (state @ Starting { .. }, Start | Resume) => state,
            (Starting { since, deadline, mut run }, Of(_, Launched { pid })) => {
                self.history.lacked = 0;
                // Its exit may have been reported first, if it went to the background.
                if run.main == Main::Launching {
                    run.main = Main::Running { pid };
                }
                self.settle(since, deadline, run)
            }
            (Starting { mut run, .. }, Of(_, LaunchFailed { sentence })) => {
                let why = could_not_be_started(&sentence);
                self.history.last_end = Some(why.clone());
                let then = self.failed(why, &run);
                run.main = Main::Ended;
                self.kill(self.now, run, then, 0)
            }
            (Starting { mut run, .. }, Of(_, LaunchLacked { sentence })) => {
                let then = self.lacked(could_not_be_started(&sentence));
                run.main = Main::Ended;
                self.kill(self.now, run, then, 0)
            }
            (Starting { since, deadline, run }, Of(_, LaunchInterrupted)) => match run.main {
                Main::Launching => self.kill(self.now, run, Then::Start, 0),
                Main::Running { .. } | Main::Background | Main::Ended => Starting { since, deadline, run },
            },
            (Starting { since, deadline, mut run }, Of(_, ListenerAdopted { address })) => {
                run.listening.insert(address);
                self.settle(since, deadline, run)
            }
            (Starting { since, deadline, mut run }, Of(_, ListenerGone { address })) => {
                run.listening.remove(&address);
                Starting { since, deadline, run }
            }
            (Starting { since, deadline, mut run }, Of(_, ListensElsewhere { address })) => {
                run.listens_elsewhere(address);
                Starting { since, deadline, run }
            }
            (Starting { run, .. }, Of(_, Misbound { sentence })) => self.misbound(run, sentence),
            (Starting { since, deadline, mut run }, Of(_, NotifyReady)) => {
                run.notified = true;
                self.settle(since, deadline, run)
            }
            (Starting { run, .. }, Of(_, NotifyStopping)) => {
                // It is not in the plan. This asks for `DrainDone`.
                self.exclude();
                self.drain(run, Then::ByItself)
            }
            (Starting { run, .. }, Of(_, NotifyWatchdogTrigger)) => {
                let then = self.failed(TRIGGERED.to_owned(), &run);
                self.abort(run, then)
            }
            (Starting { since, deadline, run }, Of(_, NotifyExtendTimeout(by))) => {
                Starting { since, deadline: deadline.max(self.after(by)), run }
            }
            (Starting { since, deadline, mut run }, Of(_, MainExited { exit, others_left })) => {
                if is_daemon(exit, others_left) {
                    run.main = Main::Background;
                    return self.settle(since, deadline, run);
                }
                let why = self.ended(&run, &exit.to_string());
                let then = self.failed(why, &run);
                self.finish(run, others_left, then)
            }
            (Starting { since, deadline, run }, Of(_, CgroupEmpty)) => match run.main {
                Main::Background => {
                    let why = self.ended(&run, LAST_PROCESS_ENDED);
                    let then = self.failed(why, &run);
                    self.end(then)
                }
                // Nothing has entered it yet, or the exit of what did is reported separately
                // and says the same.
                Main::Launching | Main::Running { .. } | Main::Ended => Starting { since, deadline, run },
            },
            (Starting { since, deadline, mut run }, Of(_, Well)) => {
                (run.checked, run.unchecked) = (true, None);
                self.settle(since, deadline, run)
            }
            (Starting { since, deadline, mut run }, Of(_, Unwell { why })) => {
                run.unchecked = Some(why);
                Starting { since, deadline, run }
            }
            // It is not in the plan, so nobody asked, and its queue does not count yet.
            (state @ Starting { .. }, Of(_, DrainDone | QueueStands { .. } | QueueMoves)) => state,

            // -- Ready
            (Ready { since, mut run }, Stop) => {
                self.leave_ready(since, &mut run);
                self.drain(run, Then::Stopped)
            }
            (Ready { since, run }, Tick) => self.look(since, run),
            // It runs; nothing has failed.
            (state @ Ready { .. }, Start | Resume) => state,
            (Ready { since, mut run }, Of(_, ListenerAdopted { address })) => {
                run.listening.insert(address);
                Ready { since, run }
            }
            (Ready { since, mut run }, Of(_, ListenerGone { address })) => {
                run.listening.remove(&address);
                if run.is_ready(self.policy) {
                    return Ready { since, run };
                }
                self.leave_ready(since, &mut run);
                // Not louder: the listeners of a process that dies go before it.
                let sentence = format!(
                    "{}; gets no connections and is stopped unless it does so within {}",
                    run.awaits(self.policy),
                    span(self.policy.start_timeout)
                );
                self.log(Level::DEBUG, sentence);
                run.recover();
                Starting { since: self.now, deadline: self.after(self.policy.start_timeout), run }
            }
            (Ready { since, mut run }, Of(_, Misbound { sentence })) => {
                self.leave_ready(since, &mut run);
                self.misbound(run, sentence)
            }
            (Ready { since, mut run }, Of(_, NotifyReady)) => {
                // Not needed for this, but the next distributor is told.
                run.notified = true;
                Ready { since, run }
            }
            (Ready { since, mut run }, Of(_, NotifyStopping)) => {
                self.leave_ready(since, &mut run);
                self.drain(run, Then::ByItself)
            }
            (Ready { since, mut run }, Of(_, NotifyWatchdog)) => {
                self.feed(&mut run);
                Ready { since, run }
            }
            (Ready { since, mut run }, Of(_, Unobserved)) => {
                self.feed(&mut run);
                for ailment in run.stalled.iter_mut().chain(&mut run.unhealthy) {
                    ailment.seen_since = self.now;
                }
                Ready { since, run }
            }
            (Ready { since, mut run }, Of(_, NotifyWatchdogTrigger)) => {
                self.leave_ready(since, &mut run);
                let then = self.failed(TRIGGERED.to_owned(), &run);
                self.abort(run, then)
            }
            (Ready { since, mut run }, Of(_, NotifyExtendTimeout(by))) => {
                let until = self.after(by);
                if let Some(watchdog) = &mut run.watchdog {
                    watchdog.until = watchdog.until.max(until);
                }
                Ready { since, run }
            }
            (Ready { since, mut run }, Of(_, MainExited { exit, others_left })) => {
                if is_daemon(exit, others_left) {
                    run.main = Main::Background;
                    return Ready { since, run };
                }
                self.leave_ready(since, &mut run);
                let why = self.ended(&run, &exit.to_string());
                let then = self.failed(why, &run);
                self.finish(run, others_left, then)
            }
            (Ready { since, mut run }, Of(_, CgroupEmpty)) => match run.main {
                Main::Background => {
                    self.leave_ready(since, &mut run);
                    let why = self.ended(&run, LAST_PROCESS_ENDED);
                    let then = self.failed(why, &run);
                    self.end(then)
                }
                // The exit of its main process is reported separately and says the same.
                Main::Launching | Main::Running { .. } | Main::Ended => Ready { since, run },
            },
            (Ready { since, run }, Of(_, Well)) => self.well(since, run),
            (Ready { since, run }, Of(_, Unwell { why })) => self.unwell(since, run, why),
            (Ready { since, run }, Of(_, QueueStands { why })) => self.queue_stands(since, run, why),
            (Ready { since, run }, Of(_, QueueMoves)) => self.queue_moves(since, run),
            // Being ready includes having been launched; other listeners are its own affair
            // once the service's are there; it is in the plan, so nobody asked for its drain.
            (
                state @ Ready { .. },
                Of(
                    _,
                    Launched { .. }
                    | LaunchFailed { .. }
                    | LaunchLacked { .. }
                    | LaunchInterrupted
                    | ListensElsewhere { .. }
                    | DrainDone,
                ),
            ) => state,

            // -- Draining
            (Draining { since, deadline, run, then }, Stop) => match then {
                Then::Stopped => self.ask_to_stop(run, Then::Stopped),
                Then::Start | Then::ByItself | Then::Restart { .. } | Then::Failed(_) => {
                    Draining { since, deadline, run, then: Then::Stopped }
                }
            },
            // Its server may be about to exit by itself, so what is begun is finished.
            (Draining { since, deadline, run, then: Then::Stopped }, Start) => {
                Draining { since, deadline, run, then: Then::Start }
            }
            (Draining { since, deadline, run, then }, Tick) => {
                if self.now < deadline {
                    return Draining { since, deadline, run, then };
                }
                let next = match then {
                    Then::ByItself => "it has its time to stop now",
                    Then::Stopped | Then::Start | Then::Restart { .. } | Then::Failed(_) => {
                        "asked to stop now"
                    }
                };
                let sentence = format!(
                    "still has connections {} after it was taken out; {next}",
                    self.span_since(since)
                );
                self.log(Level::INFO, sentence);
                self.ask_to_stop(run, then)
            }
            (Draining { run, then, .. }, Of(_, DrainDone)) => self.ask_to_stop(run, then),
            (Draining { run, then, .. }, Of(_, Misbound { sentence })) => match then {
                Then::Stopped => self.ask_to_stop(run, Then::Stopped),
                Then::Start | Then::ByItself | Then::Restart { .. } | Then::Failed(_) => {
                    self.misbound(run, sentence)
                }
            },
            (Draining { since, deadline, mut run, then }, Of(_, MainExited { exit, others_left })) => {
                if is_daemon(exit, others_left) {
                    run.main = Main::Background;
                    return Draining { since, deadline, run, then };
                }
                let why = self.ended(&run, &exit.to_string());
                let then = self.judged(then, why, is_good(exit), &run);
                self.finish(run, others_left, then)
            }
            (Draining { run, then, .. }, Of(_, NotifyWatchdogTrigger)) => {
                let then = self.judged(then, TRIGGERED.to_owned(), false, &run);
                self.abort(run, then)
            }
            (Draining { since, deadline, run, then }, Of(_, CgroupEmpty)) => match run.main {
                Main::Background => {
                    let why = self.ended(&run, LAST_PROCESS_ENDED);
                    let then = self.judged(then, why, true, &run);
                    self.end(then)
                }
                // The exit of its main process is reported separately and says the same.
                Main::Launching | Main::Running { .. } | Main::Ended => {
                    Draining { since, deadline, run, then }
                }
            },
            // It starts again anyway, or has to be resumed (Start); nothing has failed for
            // good (Resume).
            (state @ Draining { .. }, Start | Resume) => state,
            // It was launched, or it would not have been ready. Its listeners, its health and its
            // readiness no longer matter; that it stops is known. How long its connections may
            // go on is not for it to say.
            (
                state @ Draining { .. },
                Of(
                    _,
                    Launched { .. }
                    | LaunchFailed { .. }
                    | LaunchLacked { .. }
                    | LaunchInterrupted
                    | ListenerAdopted { .. }
                    | ListenerGone { .. }
                    | ListensElsewhere { .. }
                    | NotifyReady
                    | NotifyStopping
                    | NotifyExtendTimeout(_)
                    | Well
                    | Unwell { .. }
                    | QueueStands { .. }
                    | QueueMoves,
                ),
            ) => state,

            // -- Stopping
            (Stopping { since, stage, run, then: Then::Stopped, .. }, Stop) => {
                let times = match stage {
                    Stage::Asked | Stage::Aborted => 0,
                    Stage::Killed { times } => times,
                };
                self.log(Level::INFO, "is killed now".to_owned());
                self.kill(since, run, Then::Stopped, times)
            }
            (Stopping { since, deadline, stage, run, .. }, Stop) => {
                Stopping { since, deadline, stage, run, then: Then::Stopped }
            }
            (Stopping { since, deadline, stage, run, then: Then::Stopped }, Start) => {
                Stopping { since, deadline, stage, run, then: Then::Start }
            }
            // It starts again anyway, or has to be resumed.
            (state @ Stopping { .. }, Start) => state,
            (
                Stopping { since, deadline, stage, run, then: Then::Restart { .. } | Then::Failed(_) },
                Resume,
            ) => Stopping { since, deadline, stage, run, then: Then::Start },
            // It has not failed.
            (state @ Stopping { .. }, Resume) => state,
            (Stopping { since, deadline, stage, run, then }, Tick) => {
                if self.now < deadline {
                    return Stopping { since, deadline, stage, run, then };
                }
                let times = match stage {
                    Stage::Asked | Stage::Aborted => {
                        let sentence =
                            format!("did not stop within {}; killed", span(self.policy.stop_timeout));
                        self.log(Level::WARN, sentence);
                        0
                    }
                    Stage::Killed { times } => {
                        let sentence = format!(
                            "has processes that survive SIGKILL, {} after it was to stop; killed again, and not started before they are gone",
                            self.span_since(since)
                        );
                        self.log(Level::WARN, sentence);
                        times
                    }
                };
                self.kill(since, run, then, times)
            }
            (Stopping { since, deadline, stage, mut run, then }, Of(_, Launched { pid })) => {
                if run.main == Main::Launching {
                    run.main = Main::Running { pid };
                }
                Stopping { since, deadline, stage, run, then }
            }
            (
                Stopping { since, mut run, then, .. },
                Of(_, LaunchFailed { sentence } | LaunchLacked { sentence }),
            ) => {
                let why = could_not_be_started(&sentence);
                self.history.last_end = Some(why.clone());
                run.main = Main::Ended;
                let then = self.judged(then.explained(why.clone()), why, false, &run);
                // Asks for `CgroupEmpty`, which nothing else may lead to.
                self.kill(since, run, then, 0)
            }
            (Stopping { since, deadline, stage, mut run, then }, Of(_, MainExited { exit, others_left })) => {
                let how = match &then {
                    // The next one's reason has to say more than that somebody killed this one.
                    Then::Restart { why, .. } if run.main != Main::Ended => format!("{why}, {exit}"),
                    _ => exit.to_string(),
                };
                let why = match run.main {
                    // It was only the launcher, which had said why there is nothing to be run.
                    Main::Ended => how,
                    Main::Launching | Main::Running { .. } | Main::Background => self.ended(&run, &how),
                };
                let then = self.judged(then, why, is_good(exit), &run);
                if !others_left {
                    return self.end(then);
                }
                run.main = Main::Ended;
                match stage {
                    // They have not been asked yet.
                    Stage::Asked | Stage::Aborted => self.actions.push(Action::Signal {
                        instance: self.history.instance,
                        signal: self.policy.stop_signal,
                        to: Recipient::Everyone,
                    }),
                    Stage::Killed { .. } => {
                        self.actions.push(Action::KillCgroup { instance: self.history.instance })
                    }
                }
                Stopping { since, deadline, stage, run, then }
            }
            (
                Stopping { since, deadline, stage: stage @ (Stage::Asked | Stage::Aborted), run, then },
                Of(_, NotifyExtendTimeout(by)),
            ) => Stopping { since, deadline: deadline.max(self.after(by)), stage, run, then },
            (Stopping { since, deadline, stage, run, then }, Of(_, CgroupEmpty)) => {
                match run.main {
                    Main::Background => {
                        let why = self.ended(&run, LAST_PROCESS_ENDED);
                        let then = self.judged(then, why, stage == Stage::Asked, &run);
                        self.end(then)
                    }
                    Main::Ended => self.end(then),
                    // The launcher is yet to come, or its exit is reported separately and
                    // says the same.
                    Main::Launching | Main::Running { .. } => Stopping { since, deadline, stage, run, then },
                }
            }
            // It is being ended: what it listens on, how it is and what it says changes nothing.
            (
                state @ Stopping { .. },
                Of(
                    _,
                    NotifyExtendTimeout(_)
                    | NotifyWatchdogTrigger
                    | LaunchInterrupted
                    | ListenerAdopted { .. }
                    | ListenerGone { .. }
                    | ListensElsewhere { .. }
                    | Misbound { .. }
                    | NotifyReady
                    | NotifyStopping
                    | DrainDone
                    | Well
                    | Unwell { .. }
                    | QueueStands { .. }
                    | QueueMoves,
                ),
            ) => state,

            // -- Backoff
            (Backoff { since, until, attempt, why }, Tick) => {
                if self.now < until {
                    return Backoff { since, until, attempt, why };
                }
                self.launch_again()
            }
            (Backoff { .. }, Resume) => self.launch_afresh(),
            (Backoff { .. }, Stop) => {
                self.log(Level::INFO, "is stopped; it is not started again".to_owned());
                Stopped { since: self.now }
            }
            (
                Backoff { since, until, attempt, .. },
                Of(_, LaunchFailed { sentence } | LaunchLacked { sentence }),
            ) => {
                let why = could_not_be_started(&sentence);
                self.history.last_end = Some(why.clone());
                Backoff { since, until, attempt, why }
            }
            // It starts at the end of the wait.
            (state @ Backoff { .. }, Start) => state,

            // -- Failed
            (Failed { .. }, Resume) => self.launch_afresh(),
            (Failed { .. }, Stop) => {
                self.log(Level::INFO, "is stopped; it is not started again".to_owned());
                Stopped { since: self.now }
            }
            (Failed { since, fault }, Of(_, LaunchFailed { sentence } | LaunchLacked { sentence })) => {
                let why = could_not_be_started(&sentence);
                self.history.last_end = Some(why.clone());
                Failed { since, fault: fault.explained(why) }
            }
            // Only a person knows that the cause is mended (Start); it waits for no time.
            (state @ Failed { .. }, Start | Tick) => state,

            // -- Several states
            (
                state @ (Starting { .. } | Ready { .. } | Draining { .. } | Stopping { .. }),
                Of(_, NotifyStatus(says)),
            ) => {
                self.history.says = says;
                state
            }
            (
                mut state @ (Starting { .. } | Ready { .. } | Draining { .. } | Stopping { .. }),
                Of(_, MainPid { pid }),
            ) => {
                let (Starting { run, .. } | Ready { run, .. } | Draining { run, .. } | Stopping { run, .. }) =
                    &mut state
                else {
                    return state;
                };
                match run.main {
                    Main::Running { .. } | Main::Background => run.main = Main::Running { pid },
                    // Nobody of it could have said so yet; it is being ended with all it has.
                    Main::Launching | Main::Ended => {}
                }
                state
            }
            (state, Of(_, NotifyWatchdogInterval(interval))) => self.watch(state, interval),
            // It has to say it only while it is ready.
            (
                state @ (Stopped { .. }
                | Starting { .. }
                | Draining { .. }
                | Stopping { .. }
                | Backoff { .. }
                | Failed { .. }),
                Of(_, NotifyWatchdog | Unobserved),
            ) => state,
            // The instance has ended, and this was on its way.
            (state @ Stopped { .. }, Of(_, LaunchFailed { .. } | LaunchLacked { .. }))
            | (
                state @ (Stopped { .. } | Backoff { .. } | Failed { .. }),
                Of(
                    _,
                    Launched { .. }
                    | LaunchInterrupted
                    | ListenerAdopted { .. }
                    | ListenerGone { .. }
                    | ListensElsewhere { .. }
                    | Misbound { .. }
                    | NotifyReady
                    | NotifyStatus(_)
                    | NotifyStopping
                    | MainPid { .. }
                    | NotifyWatchdogTrigger
                    | NotifyExtendTimeout(_)
                    | DrainDone
                    | Well
                    | Unwell { .. }
                    | QueueStands { .. }
                    | QueueMoves
                    | MainExited { .. }
                    | CgroupEmpty,
                ),
            ) => state,
        }
    }

    /// A start that somebody wants: earlier failures are forgotten.
    fn launch_afresh(&mut self) -> State {
        (self.history.failures, self.history.lacked) = (0, 0);
        self.launch()
    }

    /// A start after a failure. One that is only tried again was counted the first time.
    fn launch_again(&mut self) -> State {
        if self.history.lacked == 0 {
            self.history.restarts += 1;
        }
        self.launch()
    }

    fn launch(&mut self) -> State {
        let instance = self.history.next_number();
        self.history.instance = instance;
        self.actions.push(Action::Launch { instance });
        State::Starting {
            since: self.now,
            deadline: self.after(self.policy.start_timeout),
            run: Run {
                watchdog: self.policy.watchdog.map(|interval| Watchdog { interval, until: self.now }),
                ..Run::new(self.now)
            },
        }
    }

    /// Starting, or ready if nothing is missing any more.
    fn settle(&mut self, since: Instant, deadline: Instant, mut run: Run) -> State {
        if !run.is_ready(self.policy) {
            return State::Starting { since, deadline, run };
        }
        run.served = true;
        run.ready = Some(Moment(self.now));
        run.recover();
        self.feed(&mut run);
        self.actions.push(Action::Include { instance: self.history.instance });
        let sentence = format!("is ready after {}; gets connections now", self.span_since(since));
        self.log(Level::INFO, sentence);
        State::Ready { since: self.now, run }
    }

    /// What has to be done first whenever `Ready` ends.
    fn leave_ready(&mut self, since: Instant, run: &mut Run) {
        self.exclude();
        self.note_health(since, run);
    }

    /// It was ready and well since then. If that was long enough, the failures before it are forgiven.
    fn note_health(&mut self, since: Instant, run: &mut Run) {
        let ready_for = self.now.saturating_duration_since(since);
        if run.ailment().is_none() && self.policy.backoff.is_healthy(ready_for) {
            run.healthy = true;
            self.history.failures = 0;
        }
    }

    // Of one that is ready: how it is.

    /// Does what is due.
    fn look(&mut self, since: Instant, mut run: Run) -> State {
        let Remedies { hang_kill, restart_after, .. } = self.policy.remedies;
        let stalled = run.stalled.clone().filter(|it| it.is_due(hang_kill, self.now));
        let unhealthy = run.unhealthy.clone().filter(|it| it.is_due(restart_after, self.now));
        if let Some(Watchdog { interval, .. }) = run.watchdog.filter(|its| its.until <= self.now) {
            self.leave_ready(since, &mut run);
            let then = self.failed(format!("said no WATCHDOG=1 for {}", span(interval)), &run);
            self.abort(run, then)
        } else if let Some(Ailment { since: stalled, why, .. }) = stalled {
            self.leave_ready(since, &mut run);
            let then = self.failed(format!("was stalled for {}: {why}", self.span_since(stalled)), &run);
            self.abort(run, then)
        } else if let Some(Ailment { since: unhealthy, why, .. }) = unhealthy {
            self.leave_ready(since, &mut run);
            let then = self.failed(format!("was unhealthy for {}: {why}", self.span_since(unhealthy)), &run);
            self.drain(run, then)
        } else {
            State::Ready { since, run }
        }
    }

    fn well(&mut self, since: Instant, mut run: Run) -> State {
        run.checked = true;
        let Some(Ailment { since: unhealthy, .. }) = run.unhealthy.take() else {
            return State::Ready { since, run };
        };
        self.actions.push(Action::Include { instance: self.history.instance });
        run.ready = Some(Moment(self.now));
        let sentence = format!("is well again after {}; gets connections now", self.span_since(unhealthy));
        self.log(Level::INFO, sentence);
        State::Ready { since: self.now, run }
    }

    fn unwell(&mut self, since: Instant, mut run: Run, why: String) -> State {
        if let Some(unhealthy) = &mut run.unhealthy {
            unhealthy.why = why;
            return State::Ready { since, run };
        }
        self.note_health(since, &mut run);
        self.actions.push(Action::Withhold { instance: self.history.instance });
        let after = self.policy.remedies.restart_after;
        let then = after
            .map_or(String::new(), |after| format!(", started again in {} if they are not", span(after)));
        self.log(Level::WARN, format!("is unhealthy: {why}; {UNHEALTHY}{then}"));
        run.unhealthy = Some(Ailment::new(why, self.now));
        State::Ready { since, run }
    }

    fn queue_stands(&mut self, since: Instant, mut run: Run, why: String) -> State {
        if run.stalled.is_some() {
            return State::Ready { since, run };
        }
        self.note_health(since, &mut run);
        if self.policy.remedies.move_queue {
            self.exclude();
            self.log(Level::WARN, format!("is stalled: {why}; what is in there goes to the others"));
            self.actions.push(Action::MoveQueue { instance: self.history.instance });
            let then = self.failed(why, &run);
            return self.drain(run, then);
        }
        let after = self.policy.remedies.hang_kill;
        let then = after.map_or(String::new(), |after| format!(", killed in {} if it does not", span(after)));
        self.log(Level::WARN, format!("is stalled: {why}; {STALLED}{then}"));
        run.stalled = Some(Ailment::new(why, self.now));
        State::Ready { since, run }
    }

    fn queue_moves(&mut self, since: Instant, mut run: Run) -> State {
        let Some(Ailment { since: stalled, .. }) = run.stalled.take() else {
            return State::Ready { since, run };
        };
        let sentence =
            format!("is stalled no more: its accept queue moves after {}", self.span_since(stalled));
        self.log(Level::INFO, sentence);
        State::Ready { since: self.now, run }
    }

    /// It is well, and has the whole time again to say so.
    fn feed(&self, run: &mut Run) {
        if let Some(watchdog) = &mut run.watchdog {
            watchdog.until = self.after(watchdog.interval);
        }
    }

    /// From now on it has to say so often that it is well; an instance that runs, that is.
    fn watch(&self, mut state: State, interval: Option<Duration>) -> State {
        if let State::Starting { run, .. } | State::Ready { run, .. } = &mut state {
            run.watchdog = interval.map(|interval| Watchdog { interval, until: self.after(interval) });
        }
        state
    }

    fn exclude(&mut self) {
        self.actions.push(Action::Exclude { instance: self.history.instance });
    }

    /// What a failure leads to, once the instance has ended.
    fn failed(&mut self, why: String, run: &Run) -> Then {
        self.history.lacked = 0;
        if !run.healthy {
            self.history.failures = self.history.failures.saturating_add(1);
        }
        if self.policy.once {
            return Then::Failed(Fault::OnlyTry { why });
        }
        let failures = self.history.failures;
        let backoff = &self.policy.backoff;
        if failures > 0 && backoff.gives_up(failures) {
            return Then::Failed(Fault::CrashLoop { failures, why });
        }
        // The first failure of a server that worked is a loss of capacity rather than a loop,
        // so it costs no wait.
        let delay = match (failures, run.served) {
            (1, true) => Duration::ZERO,
            _ => backoff.delay(failures.saturating_add(1), self.random),
        };
        Then::Restart { why, delay }
    }

    /// What follows when an instance has ended. One that said it would stop has not failed by that: only
    /// if it ends badly, or if it had not been healthy for long enough, or it would be started again
    /// and again without a pause.
    fn judged(&mut self, then: Then, why: String, is_good: bool, run: &Run) -> Then {
        match then {
            Then::ByItself if is_good && run.healthy => Then::Start,
            Then::ByItself => self.failed(format!("stopped by itself: {why}"), run),
            Then::Stopped | Then::Start | Then::Restart { .. } | Then::Failed(_) => then,
        }
    }

    /// What follows a start for which the machine lacked something. That is not the server's
    /// fault, so it counts as no failure, and it is never given up.
    fn lacked(&mut self, why: String) -> Then {
        self.history.last_end = Some(why.clone());
        if self.policy.once {
            return Then::Failed(Fault::OnlyTry { why });
        }
        self.history.lacked = self.history.lacked.saturating_add(1);
        let delay = self.policy.backoff.delay(self.history.lacked.saturating_add(1), self.random);
        Then::Restart { why, delay: delay.min(LACKING) }
    }

    fn misbound(&mut self, run: Run, sentence: String) -> State {
        self.ask_to_stop(run, Then::Failed(Fault::Misconfigured { sentence }))
    }

    /// It is out of the plan; its connections get their time.
    fn drain(&mut self, run: Run, then: Then) -> State {
        if self.policy.drain_timeout.is_zero() {
            return self.ask_to_stop(run, then);
        }
        let sentence =
            format!("{}; its connections have {} to end", then.why(), span(self.policy.drain_timeout));
        self.log(Level::INFO, sentence);
        State::Draining { since: self.now, deadline: self.after(self.policy.drain_timeout), run, then }
    }

    /// One that stops by itself need not be asked, and a second request would make some hurry.
    fn ask_to_stop(&mut self, run: Run, then: Then) -> State {
        let asked = match then {
            Then::ByItself => "",
            Then::Stopped | Then::Start | Then::Restart { .. } | Then::Failed(_) => {
                self.signal(self.policy.stop_signal, &run);
                "asked to stop, "
            }
        };
        let sentence =
            format!("{}; {asked}killed in {} unless it does", then.why(), span(self.policy.stop_timeout));
        self.log(Level::DEBUG, sentence);
        self.stopping(Stage::Asked, run, then)
    }

    /// Ends one that hangs, so that it leaves a core dump where these are wanted.
    fn abort(&mut self, run: Run, then: Then) -> State {
        self.signal(Signal::ABORT, &run);
        let sentence = format!(
            "{}; gets SIGABRT, killed in {} unless it ends",
            then.why(),
            span(self.policy.stop_timeout)
        );
        self.log(Level::WARN, sentence);
        self.stopping(Stage::Aborted, run, then)
    }

    fn signal(&mut self, signal: Signal, run: &Run) {
        let instance = self.history.instance;
        self.actions.push(Action::Signal { instance, signal, to: run.recipient() });
    }

    fn stopping(&self, stage: Stage, run: Run, then: Then) -> State {
        State::Stopping { since: self.now, deadline: self.after(self.policy.stop_timeout), stage, run, then }
    }

    /// `times`: how often this was done before.
    fn kill(&mut self, since: Instant, run: Run, then: Then, times: u32) -> State {
        let instance = self.history.instance;
        // A launcher may not have entered the cgroup yet.
        if run.recipient() == Recipient::Main {
            self.actions.push(Action::Signal { instance, signal: Signal::KILL, to: Recipient::Main });
        }
        self.actions.push(Action::KillCgroup { instance });
        State::Stopping {
            since,
            deadline: self.after(KILL_AGAIN_AFTER * 2_u32.pow(times.min(5))),
            stage: Stage::Killed { times: times.saturating_add(1) },
            run,
            then,
        }
    }

    /// Its main process is dead; what is left follows.
    fn finish(&mut self, mut run: Run, others_left: bool, then: Then) -> State {
        run.main = Main::Ended;
        if others_left {
            self.log(Level::DEBUG, format!("{}; its other processes are killed", then.why()));
            self.kill(self.now, run, then, 0)
        } else {
            self.end(then)
        }
    }

    /// No process of the instance is left.
    fn end(&mut self, then: Then) -> State {
        self.history.says.clear();
        self.actions.push(Action::RemoveInstance { instance: self.history.instance });
        let since = self.now;
        match then {
            Then::Stopped => {
                self.log(Level::INFO, "is stopped".to_owned());
                State::Stopped { since }
            }
            // How it ended was judged before, so it is never the latter here.
            Then::Start | Then::ByItself => {
                self.log(Level::INFO, "is stopped; started again now".to_owned());
                self.launch_afresh()
            }
            Then::Restart { why, delay } if delay.is_zero() => {
                self.log(Level::WARN, format!("{why}; started again now"));
                self.launch_again()
            }
            Then::Restart { why, delay } => {
                let History { failures, lacked, .. } = self.history;
                let attempt = failures.saturating_add(lacked).saturating_add(1);
                let sentence = format!("{why}; next start in {} (attempt {attempt})", span(delay));
                // How long that goes on, and that it is over, is said of the machine.
                self.log(if lacked > 1 { Level::DEBUG } else { Level::WARN }, sentence);
                State::Backoff { since, until: self.after(delay), attempt, why }
            }
            Then::Failed(fault) => {
                // Whoever wanted it says what follows.
                if !self.policy.once {
                    self.log(Level::ERROR, format!("{fault}; not started again until it is resumed"));
                }
                State::Failed { since, fault }
            }
        }
    }

    /// Notes how the instance ended, and says it.
    fn ended(&mut self, run: &Run, how: &str) -> String {
        let why = format!("{how} after {}", self.span_since(run.started));
        self.history.last_end = Some(why.clone());
        why
    }

    fn log(&mut self, level: Level, sentence: String) {
        self.actions.push(Action::Log { level, sentence });
    }

    /// A deadline, always in the future, and one that can be reached by a clock.
    fn after(&self, timeout: Duration) -> Instant {
        self.now + timeout.clamp(SHORTEST_TIMEOUT, LONGEST_TIMEOUT)
    }

    fn span_since(&self, then: Instant) -> String {
        span(self.now.saturating_duration_since(then))
    }
}

/// A process that survives SIGKILL waits for a disk or a network; it ends when they answer.
/// So it is killed again after this, which doubles up to 32 times: no log is filled by it.
const KILL_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// What the machine lacks may be there again at any time, and to try costs one process.
const LACKING: Duration = Duration::from_secs(5);

/// What a timer can tell from now.
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(1);

/// A century is as good as never, and no clock overflows by it.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

const TRIGGERED: &str = "said WATCHDOG=trigger";

const LAST_PROCESS_ENDED: &str = "ended with its last process";

/// A server that forks and lets its first process exit well goes on in the background. Any
/// other end of the main process is the server's, whatever it leaves behind.
fn is_daemon(exit: Exit, others_left: bool) -> bool {
    exit == Exit::Code(0) && others_left
}

/// As far as is known.
fn is_good(exit: Exit) -> bool {
    matches!(exit, Exit::Code(0) | Exit::Unknown)
}

fn could_not_be_started(sentence: &str) -> String {
    format!("could not be started: {sentence}")
}
