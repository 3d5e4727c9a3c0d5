//! The attendant: a thread that hands waiting connections over, in order.
//!
//! It does what cannot wait for the rest of the distributor: as soon as a server has a place
//! and somebody waits, it empties the room of whoever is first; it turns away who waited too
//! long; it keeps rooms ready, which a process of its own makes (keeper.rs). It goes by what
//! the kernel's maps say, which it reads as memory. In what order rooms are emptied is
//! corridor.rs's to say; which server gets whom is decided in the kernel.
#![forbid(unsafe_code)]

use std::{
    collections::{HashMap, HashSet, VecDeque},
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    process::Child,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use distributor_ebpf::contract::{ROOMS, SERVERS_END, room_of};
use rustix::{
    event::{
        EventfdFlags, Timespec,
        epoll::{self, EventData, EventFlags},
        eventfd,
    },
    io::Errno,
    net::{SocketFlags, sockopt},
    time::{ClockId, clock_gettime},
};
use tracing::{debug, warn};

use crate::{
    accept_queue,
    address::ListenAddress,
    bell,
    config::Waiting,
    corridor::Corridor,
    dismiss::{self, Dismissed},
    error::{advised, lacking},
    keeper::{Heard, Keeper, Silent},
    kernel::Desk,
    room::Room,
};

/// Rooms of a group while nobody waits. A burst of so many finds a room for each; by then there
/// are more.
pub const IDLE_ROOMS: usize = 64;
/// As many of them are spare.
const SPARES: usize = 32;
/// Fewer ready ones are too few.
const FEW: usize = 24;
/// Ready ones while somebody waits: as many as a fast machine uses up in 20 ms.
const BUSY_ROOMS: usize = 256;
/// New rooms are asked for by so many at least, unless there are few.
const BATCH: usize = 64;

/// What cannot be done is tried again after so many nanoseconds.
const PAUSE: u64 = 1_000_000_000;
/// Why rooms that were made did not arrive.
const NO_DESCRIPTORS: &str = "no descriptors are left: raise the limit of open files";
/// What the trouble is called that there is no keeper.
const KEEPER_NAME: &str = "keeper";

/// As long as handshakes on the same machine take, and the next one of those that come together
/// from another, in nanoseconds: see `await_handshakes`.
const UNDER_WAY: u64 = 300_000;
/// As long as all that come together may take, in nanoseconds.
const TOGETHER: u64 = 10_000_000;

/// The bound of a room that is emptied out of turn: everybody in it comes behind that.
const NOBODY: u64 = 0;

/// What has woken it.
const WAKES: u64 = 0;
const POKE: u64 = 1;
const KEEPER: u64 = 2;
/// SYNs that a room is given, at most: see `crowd` in `distributor_ebpf::contract::Rooms`.
const CROWD: u32 = 80;

/// How often the attendant looks around: while somebody waits, places become free without a
/// word when reservations expire, and rooms are used up, the last of which would soon be full...
const WATCHFUL: Duration = Duration::from_millis(20);
/// ...and otherwise it only shows that it is there, well within `distributor_ebpf::contract::UNATTENDED`.
const IDLE: Duration = Duration::from_millis(250);
/// When a place is free and nobody could be handed over to it.
const STUCK: Duration = Duration::from_millis(20);
/// How often it does what does not matter to anybody who waits.
const TENDING: u64 = SOON.as_nanos() as u64;
/// How often the words are stamped, far more often than their epochs repeat.
const STAMPING: u64 = 60_000_000_000;
/// When it was left for later.
const SOON: Duration = Duration::from_millis(5);
/// Rooms to which nobody came are closed so often, in nanoseconds. Who is still on his way to one
/// is sent to the current one.
const DESERTED: u64 = 1_000_000_000;

/// Above everything that does not ask for more: a place that is free costs every client behind.
const NICE: i32 = -10;

/// What the attendant has to know of the service.
pub struct Duty {
    /// For sentences.
    pub service: String,
    /// By group.
    pub listen: Vec<ListenAddress>,
    /// Who owns all sockets of the groups.
    pub uid: u32,
    /// The directory of the cgroup in which rooms are made, and its number.
    pub cgroup: PathBuf,
    pub cgroup_id: u64,
    /// Where the keeper listens.
    pub keeper: PathBuf,
    /// Who may wait, how long, and what he is told then.
    pub waiting: Waiting,
    /// Somebody else listens, and his clients come. Until `select` is in charge, the kernel sends
    /// some of them to rooms by its hash: so there is only one, the current one.
    pub in_use: bool,
    /// Rooms that a group may have.
    pub most_rooms: usize,
    /// The kernel does not wake a server to which it moves a connection.
    pub bell: bool,
}

/// What the attendant tells the loop.
#[derive(Debug)]
pub enum Says {
    /// This client was turned away and has not closed yet.
    Dismissed(Dismissed),
    /// Something of this name cannot be done now, and why; `None`: it can again.
    Trouble(String, Option<String>),
    /// It cannot go on.
    Failed,
}

/// What the loop tells the attendant.
enum Told {
    /// Something has changed: look.
    Look,
    /// This holds from now on, also for who waits already.
    Change(Waiting),
    /// Turn everybody away.
    DismissAll,
    Stop,
    /// The same, and the keeper is not needed any more.
    End,
}

/// The loop's end.
pub struct Handle {
    tell: Sender<Told>,
    poke: Arc<OwnedFd>,
    oldest: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// The plan has changed.
    pub fn look(&self) {
        self.tell(Told::Look);
    }

    /// How long who waits may do so, and what he is told then, is another from now on.
    pub fn change(&self, waiting: Waiting) {
        self.tell(Told::Change(waiting));
    }

    /// Turns away everybody who waits, as if his time was up.
    pub fn dismiss_all(&self) {
        self.tell(Told::DismissAll);
    }

    /// Ends the thread and the keeper: nobody is to wait here again.
    pub fn end(self) {
        self.tell(Told::End);
    }

    /// Since when the first in line waits (CLOCK_MONOTONIC, nanoseconds); `None` if nobody waits.
    pub fn oldest(&self) -> Option<u64> {
        Some(self.oldest.load(Ordering::Relaxed)).filter(|&oldest| oldest != 0)
    }

    fn tell(&self, told: Told) {
        // If it is gone, the loop is told so.
        let _ = self.tell.send(told);
        let _ = rustix::io::write(&*self.poke, &1u64.to_ne_bytes());
    }
}

/// Ends the thread. The keeper stays a while, and the rooms with it.
impl Drop for Handle {
    fn drop(&mut self) {
        self.tell(Told::Stop);
        if let Some(thread) = self.thread.take() {
            // What it had to say of its end, it has said.
            let _ = thread.join();
        }
    }
}

/// The rooms of one group.
struct Group {
    corridor: Corridor,
    /// Closed rooms, to be cleared away.
    closed: Vec<Room>,
    /// Indices that no room has. The one that was given up first is used first: whoever looked
    /// for a room there must have found none before there is another.
    free: VecDeque<u32>,
    /// Rooms that were asked for and have not come.
    asked: usize,
    /// When they may be asked for.
    ask_at: u64,
    /// They could not be made the last time.
    short: bool,
    /// When the deserted rooms were looked at.
    deserted_since: u64,
}

pub struct Attendant {
    duty: Duty,
    desk: Desk,
    keeper: Keeper,
    groups: Vec<Group>,
    /// By index.
    rooms: HashMap<u32, Room>,
    /// Cookies of rooms that the keeper may close.
    done: Vec<u64>,
    /// Rooms from which the one who came first was accepted. When the others came is not known:
    /// they must be parked before another one can be turned away.
    opened: HashSet<u32>,
    /// Connections that were moved to each listener, when the bell was rung.
    rung: HashMap<u32, u64>,
    heard: Receiver<Told>,
    tell: Arc<dyn Fn(Says) + Send + Sync>,
    poke: Arc<OwnedFd>,
    /// Of what wakes it.
    epoll: OwnedFd,
    hears_keeper: bool,
    oldest: Arc<AtomicU64>,
    tended: u64,
    stamped: u64,
    /// When a keeper that is gone may be replaced again.
    replace_at: u64,
    /// It could not be replaced the last time.
    keeperless: bool,
    /// Keepers that are gone, or will be soon, to be waited for.
    ended: Vec<Child>,
    /// The service is being stopped: everybody who waits is turned away.
    dismissing: bool,
}

impl Group {
    /// The next ones that come have to share a room, or nobody can be parked.
    fn lacks_rooms(&self) -> bool {
        self.corridor.ready_len() < FEW || self.corridor.spare_len() < FEW
    }
}

impl Attendant {
    /// Takes over the rooms that the keeper has, gets each group as many as it needs at rest,
    /// and writes them where the programs look for them.
    pub fn new(
        duty: Duty,
        desk: Desk,
        keeper: Keeper,
        tell: Arc<dyn Fn(Says) + Send + Sync>,
    ) -> anyhow::Result<(Self, Handle)> {
        let poke = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("make an eventfd")?;
        let (poke, oldest) = (Arc::new(poke), Arc::new(AtomicU64::new(0)));
        let (sender, heard) = mpsc::channel();
        let handle =
            Handle { tell: sender, poke: Arc::clone(&poke), oldest: Arc::clone(&oldest), thread: None };
        let mut attendant = Self {
            groups: Vec::new(),
            rooms: HashMap::new(),
            done: Vec::new(),
            opened: HashSet::new(),
            rung: HashMap::new(),
            duty,
            desk,
            keeper,
            heard,
            tell,
            poke,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).context("make an epoll")?,
            hears_keeper: false,
            oldest,
            tended: 0,
            stamped: 0,
            replace_at: 0,
            keeperless: false,
            ended: Vec::new(),
            dismissing: false,
        };
        attendant.desk.attend(now());
        attendant.desk.set_cgroup(attendant.duty.cgroup_id);
        epoll::add(&attendant.epoll, &attendant.keeper, EventData::new_u64(KEEPER), EventFlags::empty())
            .context("watch the keeper")?;
        attendant.recover()?;
        for group in 0..attendant.duty.listen.len() {
            attendant.furnish(group)?;
        }
        let Self { epoll, desk, poke, .. } = &attendant;
        epoll::add(epoll, desk.wakes(), EventData::new_u64(WAKES), EventFlags::IN)
            .and_then(|()| epoll::add(epoll, poke, EventData::new_u64(POKE), EventFlags::IN))
            .context("watch what wakes the attendant")?;
        Ok((attendant, handle))
    }

    /// Finds the rooms of an earlier attendant again, by what the kernel's maps say of them.
    fn recover(&mut self) -> anyhow::Result<()> {
        let all = match self.keeper.all() {
            Ok(all) => all,
            // It has just died, and so did the rooms; or it is stopped, and they are taken from it.
            Err(error) if error.is::<Silent>() => {
                self.replace_keeper(&error);
                self.keeper.all()?
            }
            Err(error) => return Err(error),
        };
        for (address, fd) in all {
            let cookie = sockopt::socket_cookie(&fd).context("read a room's cookie")?;
            let group = self.duty.listen.iter().position(|listen| listen.socket == address.socket);
            // One that does not listen was never opened, or is closed.
            let listens = sockopt::socket_acceptconn(&fd).unwrap_or(false);
            match (group, self.desk.index_of(cookie).filter(|_| listens)) {
                (Some(group), Some(index)) => {
                    self.rooms.insert(index, Room { fd, cookie, group, index });
                }
                _ => self.done.push(cookie),
            }
        }
        let cookies = self.rooms.values().map(|room| room.cookie).collect();
        self.desk.forget_rooms_except(&cookies)
    }

    /// Sets a group up: the rooms that were recovered, and new ones.
    fn furnish(&mut self, number: usize) -> anyhow::Result<()> {
        let (ring, spares) = recorded(&self.desk, number);
        let mut used: Vec<u32> =
            self.rooms.values().filter(|room| room.group == number).map(|room| room.index).collect();
        used.retain(|index| !ring.contains(index) && !spares.contains(index));
        // Where the programs expect a room there must be one.
        let lost: Vec<u32> =
            ring.iter().chain(&spares).copied().filter(|index| !self.rooms.contains_key(index)).collect();
        let (current, taken) = (self.desk.current(number), self.desk.spares_taken(number));
        let desk = &self.desk;
        let corridor =
            Corridor::recovered(current, ring, taken, spares, used, |index| desk.state(index).first);
        let first = SERVERS_END + number * self.duty.most_rooms;
        let free = (first as u32..(first + self.duty.most_rooms) as u32)
            .filter(|index| !self.rooms.contains_key(index) && !lost.contains(index))
            .collect();
        let wanted = if self.duty.in_use { 1 } else { IDLE_ROOMS };
        let missing = wanted.saturating_sub(corridor.len() - lost.len()).max(lost.len());
        self.groups.push(Group {
            corridor,
            closed: Vec::new(),
            free,
            asked: 0,
            ask_at: 0,
            short: false,
            deserted_since: now(),
        });
        self.desk.chunk(number).store(1, Ordering::Relaxed);
        self.desk.share(number).store(1, Ordering::Relaxed);
        self.ask(number, missing);
        let mut lost = lost.into_iter();
        while self.groups[number].asked > 0 {
            self.keeper.wait()?;
            match self.keeper.hear()? {
                Some(Heard::Made { sockets, lost: dropped, .. }) => {
                    let group = &mut self.groups[number];
                    group.asked = group.asked.saturating_sub(sockets.len() + dropped.len());
                    for fd in sockets {
                        match lost.next() {
                            Some(index) => drop(self.admit(number, fd, index)?),
                            None => self.take_in(number, fd)?,
                        }
                    }
                    if !dropped.is_empty() {
                        self.done.extend(dropped);
                        self.some_room(number, NO_DESCRIPTORS)?;
                    }
                }
                Some(Heard::NotMade(_, why)) => {
                    self.groups[number].asked = 0;
                    self.some_room(number, &why)?;
                }
                None => {}
            }
        }
        let backlog =
            accept_queue::backlog(self.any_room(number)?.as_fd()).context("read a room's backlog")?;
        let syns = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_max_syn_backlog");
        let syns = syns.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(128u32);
        // Without SYN cookies, the last quarter is for clients that the kernel knows.
        self.desk.crowd(number).store(CROWD.min(backlog / 2).min(syns / 8 * 5).max(1), Ordering::Relaxed);
        self.desk.full(number).store(backlog - backlog / 16, Ordering::Relaxed);
        Ok(())
    }

    /// A room of a group, through which a program can be attached.
    pub fn any_room(&self, group: usize) -> anyhow::Result<&Room> {
        self.rooms.values().find(|room| room.group == group).context("a group needs a room")
    }

    /// Lets it run. `handle` ends it.
    pub fn start(self, handle: &mut Handle) -> anyhow::Result<()> {
        let thread = thread::Builder::new().name("attendant".to_owned()).spawn(move || self.run());
        handle.thread = Some(thread.context("start a thread")?);
        Ok(())
    }

    fn run(mut self) {
        /// The loop must not go on without us, also if we panic.
        struct Failed(Arc<dyn Fn(Says) + Send + Sync>);
        impl Drop for Failed {
            fn drop(&mut self) {
                (self.0)(Says::Failed);
            }
        }
        let failed = Failed(Arc::clone(&self.tell));
        // Without the right to it, it is as nice as the others.
        let _ = rustix::process::setpriority_process(None, NICE);
        while self.work() {}
        std::mem::forget(failed);
    }

    /// Does what there is to do, then sleeps until there is more. Whether to go on.
    fn work(&mut self) -> bool {
        self.desk.set_asleep(false);
        self.desk.drain_wakes();
        while let Ok(told) = self.heard.try_recv() {
            match told {
                Told::Look => {}
                Told::Change(waiting) => self.duty.waiting = waiting,
                Told::DismissAll => {
                    self.dismissing = true;
                    self.dismiss_all();
                }
                Told::Stop => return false,
                Told::End => {
                    self.keeper.end();
                    return false;
                }
            }
        }
        let served = self.serve();
        let now = now();
        let tends = now.saturating_sub(self.tended) >= TENDING;
        if tends {
            self.tended = now;
            self.turn_away_the_late(now);
            self.tend(now);
            self.reap();
            if self.dismissing {
                self.dismiss_all();
            }
            self.note_oldest();
            if now.saturating_sub(self.stamped) > STAMPING {
                self.stamped = now;
                self.desk.stamp_words(now);
            }
        }
        if self.duty.bell {
            self.ring();
        }
        // Not at once: whoever was woken may have to wait for this CPU.
        if tends || self.groups.iter().any(Group::lacks_rooms) {
            self.clear_away();
            self.hear();
            for group in 0..self.groups.len() {
                self.provide(group);
            }
        }
        self.desk.set_asleep(true);
        if served && self.desk.waiting() > 0 && self.desk.has_place(crate::attendant::now()) {
            return true;
        }
        self.sleep(served);
        true
    }

    fn sleep(&mut self, served: bool) {
        let busy = self.groups.iter().any(|group| {
            group.corridor.occupied().next().is_some()
                || !group.corridor.deserted().is_empty()
                || !group.closed.is_empty()
        });
        let within = match (served, busy || self.desk.waiting() > 0) {
            (false, _) => STUCK,
            (true, true) if self.groups.iter().any(|group| !group.closed.is_empty()) => SOON,
            (true, true) => WATCHFUL.min(self.duty.waiting.timeout / 4).max(SOON),
            (true, false) => IDLE,
        };
        // What the keeper brings can wait as long as there are rooms.
        let is_urgent = self.groups.iter().any(|group| group.asked > 0 && group.lacks_rooms());
        if is_urgent != self.hears_keeper {
            let events = if is_urgent { EventFlags::IN } else { EventFlags::empty() };
            let changed = epoll::modify(&self.epoll, &self.keeper, EventData::new_u64(KEEPER), events);
            self.hears_keeper = is_urgent && changed.is_ok();
        }
        let within = Timespec::try_from(within).expect("a fraction of a second fits");
        let mut events = [const { MaybeUninit::uninit() }; 3];
        match epoll::wait(&self.epoll, &mut events, Some(&within)) {
            Ok((events, _)) => {
                if events.iter().any(|event| event.data.u64() == POKE) {
                    // It is only a reason to wake.
                    let _ = rustix::io::read(&*self.poke, &mut [0; 8]);
                }
            }
            Err(Errno::INTR) => {}
            // Then it would spin; it looks as often as it would without being woken.
            Err(error) => {
                warn!("wait for somebody to wait: {error}");
                thread::sleep(WATCHFUL);
            }
        }
    }

    // Who waits gets a place.

    /// Hands over as long as somebody waits and a server has a place. False if that does not
    /// get on: what looked like a place is none.
    fn serve(&mut self) -> bool {
        let mut last = None;
        // Not without end: closed rooms are to be cleared away, and new ones taken in.
        for _ in 0..FEW {
            let now = now();
            self.desk.attend(now);
            self.catch_up();
            if self.desk.waiting() == 0 || !self.desk.has_place(now) {
                return true;
            }
            let Some((front, bound)) = self.front() else { return false };
            // The same one again: he was parked, and not handed over.
            let (order, ..) = front;
            if last.replace(order) == Some(order) || !self.empty(front, bound) {
                return false;
            }
        }
        true
    }

    fn catch_up(&mut self) {
        let desk = &self.desk;
        for (number, group) in self.groups.iter_mut().enumerate() {
            let (current, taken) = (desk.current(number), desk.spares_taken(number));
            group.corridor.catch_up(current, taken, |index| desk.state(index).first);
        }
    }

    /// The room to be emptied next, over all groups: its place in the order, its group, itself;
    /// and the place in the order of the one after it.
    fn front(&self) -> Option<((u64, usize, u32), u64)> {
        let order = |room| self.desk.state(room).first;
        let (mut first, mut bound): (Option<(u64, usize, u32)>, u64) = (None, u64::MAX);
        for (number, group) in self.groups.iter().enumerate() {
            for (place, room) in group.corridor.fronts(order) {
                let front = (place, number, room);
                match first {
                    Some(before) if before < front => bound = bound.min(place),
                    Some((place, ..)) => (first, bound) = (Some(front), place),
                    None => first = Some(front),
                }
            }
        }
        Some((first?, bound))
    }

    /// Empties a room: the kernel hands over those for whom there is a place, but nobody who comes
    /// behind `bound` in the order, and parks the others. False if that cannot be done now.
    fn empty(&mut self, (order, number, index): (u64, usize, u32), bound: u64) -> bool {
        // For those who are parked there must be a room in front of all others.
        if self.groups[number].corridor.spare_len() == 0 {
            self.hear();
        }
        let spares = self.groups[number].corridor.spare_len();
        let state = self.desk.state(index);
        let waiting = state.entered.saturating_sub(state.gone);
        // Without a spare room, only where nobody will need one: that makes room again.
        if spares == 0 && waiting > u64::from(bound != NOBODY) {
            return false;
        }
        let Some(room) = self.rooms.remove(&index) else {
            self.groups[number].corridor.remove(order, index);
            return true;
        };
        let waiting = usize::try_from(waiting).unwrap_or(usize::MAX).max(1);
        if self.desk.bound(number).load(Ordering::Relaxed) != bound {
            self.desk.bound(number).store(bound, Ordering::SeqCst);
        }
        // Evenly, so that each of them is parked a few times at most, however many share a room.
        let chunk = u32::try_from(waiting.div_ceil(spares.max(1))).unwrap_or(u32::MAX);
        if self.desk.chunk(number).load(Ordering::Relaxed) != chunk {
            self.desk.chunk(number).store(chunk, Ordering::SeqCst);
        }
        if let Some(current) = self.groups[number].corridor.remove(order, index) {
            // Before it is closed: from here on it is nobody's current room.
            self.desk.least(number).store(current, Ordering::SeqCst);
        }
        if bound != NOBODY {
            self.await_handshakes(index);
        }
        let taken = self.desk.spares_taken(number);
        if let Err(error) = room.empty() {
            // It was closed before.
            debug!("empty room {index}: {error}");
        }
        if self.desk.spares_taken(number) != taken {
            // The next time it closes, it starts afresh.
            self.desk.forget_parked(room.cookie);
        }
        self.groups[number].closed.push(room);
        true
    }

    /// Lets handshakes that are under way in a room be completed, if they soon are, and as long as one
    /// follows the other: those whose SYNs came together are completed together as well, a round trip
    /// later. The kernel resets a connection whose listener closes in the very microseconds in which it
    /// is made (`inet_csk_reqsk_queue_add`, Linux 6.18: by then it is too late to choose another
    /// listener).
    fn await_handshakes(&self, index: u32) {
        let start = now();
        let (mut completed, mut since) = (0, start);
        loop {
            let state = self.desk.state(index);
            let now = now();
            if state.completed != completed {
                (completed, since) = (state.completed, now);
            }
            let is_over = now.saturating_sub(since) >= UNDER_WAY || now.saturating_sub(start) >= TOGETHER;
            if state.completed >= state.offered || self.desk.has_cookies() || is_over {
                return;
            }
            thread::sleep(Duration::from_micros(20));
        }
    }

    // Who has waited too long is turned away.

    fn turn_away_the_late(&mut self, now: u64) {
        let timeout = u64::try_from(self.duty.waiting.timeout.as_nanos()).unwrap_or(u64::MAX);
        let is_late = |since: u64| since != 0 && since.saturating_add(timeout) <= now;
        self.catch_up();
        for number in 0..self.groups.len() {
            // In order, and so, but for those who come from dead servers, in the order of time.
            let corridor = &self.groups[number].corridor;
            let current = corridor.current().map(|index| (0, index));
            let late: Vec<(u64, u32)> = corridor
                .occupied()
                .chain(current)
                .filter(|&(_, index)| {
                    let state = self.desk.state(index);
                    state.entered > state.gone && is_late(state.since)
                })
                .collect();
            for (order, index) in late {
                if self.opened.insert(index) {
                    self.turn_away_first(index);
                }
                // Those behind him came later, and when exactly is known only of the first in a
                // room: so they are parked in others, and the next one is the first of his.
                let corridor = &self.groups[number].corridor;
                let must_stay = corridor.current() == Some(index) && corridor.ready_len() == 0;
                if !must_stay && self.empty((order, number, index), NOBODY) {
                    self.opened.remove(&index);
                }
            }
        }
    }

    /// Turns the first one in a room away. False if there was nobody.
    fn turn_away_first(&mut self, index: u32) -> bool {
        let Some(room) = self.rooms.get(&index) else { return false };
        let Ok(connection) = rustix::net::accept_with(&room.fd, SocketFlags::CLOEXEC) else { return false };
        let waits = sockopt::socket_cookie(&connection)
            .ok()
            .and_then(|cookie| self.desk.owner(cookie))
            .is_some_and(|owner| room_of(owner.owner).is_some());
        if waits {
            if let Err(error) = self.desk.dismiss(connection.as_fd(), index) {
                debug!("a client that waited too long is counted as one that left: {error:#}");
            }
            if let Some(dismissed) = dismiss::dismiss(connection, &self.duty.waiting.reply) {
                (self.tell)(Says::Dismissed(dismissed));
            }
        }
        // Otherwise he has left, and nobody but us knew of the socket.
        true
    }

    fn dismiss_all(&mut self) {
        self.catch_up();
        for number in 0..self.groups.len() {
            let corridor = &self.groups[number].corridor;
            let rooms: Vec<u32> =
                corridor.occupied().map(|(_, index)| index).chain(corridor.current()).collect();
            for index in rooms {
                while self.turn_away_first(index) {}
            }
        }
    }

    // There are always rooms.

    /// Closes rooms that are of no use any more: everybody has left, or nobody came.
    fn tend(&mut self, now: u64) {
        self.catch_up();
        for number in 0..self.groups.len() {
            let group = &mut self.groups[number];
            let left: Vec<(u64, u32)> = group
                .corridor
                .occupied()
                .filter(|&(_, index)| {
                    let state = self.desk.state(index);
                    state.entered == state.gone
                })
                .collect();
            let has_few = group.corridor.ready_len() < FEW;
            let mut deserted = Vec::new();
            if has_few || now.saturating_sub(group.deserted_since) > DESERTED {
                group.deserted_since = now;
                deserted.extend(group.corridor.deserted().iter().map(|&index| (0, index)));
            }
            // Somebody may have come to a room that was not current any more, or not yet.
            let current = group.corridor.current_sequence();
            let mut early: Vec<(u64, u32)> = (current + 1..)
                .zip(group.corridor.ready())
                .filter(|&(_, index)| {
                    let state = self.desk.state(index);
                    state.entered > state.gone
                })
                .collect();
            // Looked at last: so it was not current when somebody had come.
            early.retain(|&(sequence, _)| sequence > self.desk.current(number));
            for (order, index) in left.into_iter().chain(deserted) {
                if !self.empty((order, number, index), NOBODY) {
                    break;
                }
            }
            for (_, index) in early {
                // It stays in the ring, where the programs pass over it: it cannot be selected.
                if let Some(room) = self.rooms.get(&index)
                    && self.groups[number].corridor.spare_len() > 0
                {
                    self.desk.bound(number).store(NOBODY, Ordering::SeqCst);
                    let _ = room.empty();
                    self.desk.forget_parked(room.cookie);
                }
            }
        }
    }

    /// Gives up rooms that are closed.
    fn clear_away(&mut self) {
        for group in &mut self.groups {
            for room in std::mem::take(&mut group.closed) {
                let state = self.desk.state(room.index);
                if state.entered > state.gone {
                    // Turned away, and not closed yet: when he is, it is counted here.
                    group.closed.push(room);
                    continue;
                }
                self.desk.forget(room.cookie);
                group.free.push_back(room.index);
                self.done.push(room.cookie);
            }
        }
        self.keeper.drop(&mut self.done);
    }

    /// Takes what the keeper brings. If it is gone, another one keeps what we have.
    fn hear(&mut self) {
        loop {
            match self.keeper.hear() {
                Ok(None) => return,
                Ok(Some(Heard::Made { address, sockets, lost })) => {
                    let Some(number) = self.duty.listen.iter().position(|listen| *listen == address) else {
                        continue;
                    };
                    let group = &mut self.groups[number];
                    group.asked = group.asked.saturating_sub(sockets.len() + lost.len());
                    let mut failure = (!lost.is_empty()).then(|| anyhow!(NO_DESCRIPTORS));
                    self.done.extend(lost);
                    for fd in sockets {
                        failure = self.take_in(number, fd).err().or(failure);
                    }
                    match failure {
                        Some(error) => self.rest(number, &format!("{error:#}")),
                        None => self.rested(number),
                    }
                }
                Ok(Some(Heard::NotMade(address, why))) => {
                    if let Some(number) = self.duty.listen.iter().position(|listen| *listen == address) {
                        self.groups[number].asked = 0;
                        self.rest(number, &why);
                    }
                }
                Err(error) => return self.replace_keeper(&error),
            }
        }
    }

    /// Rooms cannot be had while a group is set up. With one it works, without one it does not.
    fn some_room(&mut self, number: usize, why: &str) -> anyhow::Result<()> {
        if self.any_room(number).is_err() {
            bail!("make a room for {}: {why}", self.duty.listen[number]);
        }
        self.rest(number, why);
        Ok(())
    }

    /// Rooms cannot be had now.
    fn rest(&mut self, number: usize, why: &str) {
        let group = &mut self.groups[number];
        group.ask_at = now() + PAUSE;
        group.short = true;
        let (service, address) = (&self.duty.service, self.duty.listen[number]);
        let why = advised(format!("service {service}: make a room for {address}: {why}"));
        let what = format!("{why}; those that wait share the rooms there are until there are more");
        (self.tell)(Says::Trouble(format!("rooms for {address}"), Some(what)));
    }

    /// They can be had again.
    fn rested(&mut self, number: usize) {
        if std::mem::take(&mut self.groups[number].short) {
            let address = self.duty.listen[number];
            (self.tell)(Says::Trouble(format!("rooms for {address}"), None));
        }
    }

    fn replace_keeper(&mut self, why: &anyhow::Error) {
        // It is gone, which its socket would tell again and again.
        let _ = epoll::delete(&self.epoll, &self.keeper);
        self.ended.extend(self.keeper.leave());
        if now() < self.replace_at {
            return;
        }
        self.replace_at = now() + PAUSE;
        if !self.keeperless {
            warn!("service {}: {why:#}; another one is started", self.duty.service);
        }
        let replaced = Keeper::start(&self.duty.cgroup, &self.duty.keeper).and_then(|mut keeper| {
            match self.hand_rooms_to(&keeper) {
                Ok(()) => Ok(keeper),
                Err(error) => {
                    // The next one takes its place.
                    self.ended.extend(keeper.leave());
                    Err(error)
                }
            }
        });
        match replaced {
            Ok(keeper) => {
                // The old one leaves the epoll when it is closed.
                self.keeper = keeper;
                self.hears_keeper = false;
                if std::mem::take(&mut self.keeperless) {
                    (self.tell)(Says::Trouble(KEEPER_NAME.to_owned(), None));
                }
            }
            Err(error) => {
                self.keeperless = true;
                let why = format!("service {}: start a keeper: {error:#}", self.duty.service);
                let what = format!(
                    "{}; until there is one, those that wait share the rooms there are, and are lost if dist-ctl \
                     dies; tries every second",
                    lacking(&why).unwrap_or(why)
                );
                (self.tell)(Says::Trouble(KEEPER_NAME.to_owned(), Some(what)));
            }
        }
        for group in &mut self.groups {
            group.asked = 0;
            group.ask_at = now() + PAUSE / 10;
        }
    }

    /// Has a new keeper keep what we have, and listens to it.
    fn hand_rooms_to(&self, keeper: &Keeper) -> anyhow::Result<()> {
        for (group, address) in self.duty.listen.iter().enumerate() {
            let rooms = self.rooms.values().filter(|room| room.group == group);
            keeper.keep(*address, &rooms.map(Room::as_fd).collect::<Vec<_>>())?;
        }
        epoll::add(&self.epoll, keeper, EventData::new_u64(KEEPER), EventFlags::empty())
            .context("watch the keeper")
    }

    /// Waits for keepers that have ended.
    fn reap(&mut self) {
        self.ended.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    fn ask(&mut self, number: usize, count: usize) {
        let group = &mut self.groups[number];
        if group.asked == 0 && count > 0 && self.keeper.make(self.duty.listen[number], self.duty.uid, count) {
            group.asked = count;
        }
    }

    /// A new room of a group.
    fn take_in(&mut self, number: usize, fd: OwnedFd) -> anyhow::Result<()> {
        let cookie = sockopt::socket_cookie(&fd).context("read a room's cookie")?;
        // There are as many as a group may have rooms, and no more are asked for.
        let Some(index) = self.groups[number].free.pop_front() else {
            self.done.push(cookie);
            bail!("every index has a room");
        };
        if let Err(error) = self.admit(number, fd, index) {
            self.groups[number].free.push_back(index);
            self.desk.forget(cookie);
            self.done.push(cookie);
            return Err(error);
        }
        self.add(number, index);
        Ok(())
    }

    fn admit(&mut self, group: usize, fd: OwnedFd, index: u32) -> anyhow::Result<u64> {
        let cookie = sockopt::socket_cookie(&fd).context("read a room's cookie")?;
        let room = Room { fd, cookie, group, index };
        self.desk.admit(&room)?;
        self.rooms.insert(index, room);
        Ok(cookie)
    }

    /// A room can be used: as a spare one as long as there are few.
    fn add(&mut self, number: usize, index: u32) {
        let corridor = &mut self.groups[number].corridor;
        let spares = SPARES.max((corridor.len() / 4).min(ROOMS / 4));
        if corridor.spare_len() < spares && corridor.ready_len() > 0 {
            let sequence = corridor.add_spare(index);
            self.desk.spare(number, sequence).store(index, Ordering::Relaxed);
            self.desk.spares(number).store(sequence + 1, Ordering::SeqCst);
        } else {
            let sequence = corridor.add_ready(index);
            self.desk.ring(number, sequence).store(index, Ordering::Relaxed);
            self.desk.made(number).store(sequence + 1, Ordering::SeqCst);
        }
    }

    /// Asks for rooms where there are few, and has them shared where there cannot be more.
    fn provide(&mut self, number: usize) {
        let waiting = self.desk.waiting();
        let group = &self.groups[number];
        let (ready, all) = (group.corridor.ready_len(), group.corridor.len() + group.closed.len());
        let most = self.duty.most_rooms;
        // While somebody waits, as many as may be used up before there are more.
        let least = if waiting > 0 { BUSY_ROOMS } else { IDLE_ROOMS - SPARES };
        let wanted = least.max(usize::try_from(waiting).unwrap_or(usize::MAX) / 4);
        let lacks = wanted.saturating_sub(ready) + SPARES.saturating_sub(group.corridor.spare_len());
        // In batches, which is cheaper.
        if now() >= group.ask_at && (lacks >= BATCH || lacks > 0 && group.lacks_rooms()) {
            self.ask(number, lacks.min(most - all));
        }
        // A room for each as long as there may be many; then so that those who may still come find
        // a place, and a quarter more for rooms that are left early.
        let available = ready + most.saturating_sub(all);
        let share = if available > most / 2 {
            1
        } else {
            let may_come = u64::from(self.duty.waiting.capacity).saturating_sub(waiting) * 5 / 4;
            u32::try_from(may_come.div_ceil(available.max(1) as u64)).unwrap_or(u32::MAX).max(1)
        };
        if self.desk.share(number).load(Ordering::Relaxed) != share {
            self.desk.share(number).store(share, Ordering::Relaxed);
        }
    }

    fn note_oldest(&self) {
        let oldest = match self.desk.waiting() {
            0 => 0,
            _ => {
                let since = |index: u32| {
                    let state = self.desk.state(index);
                    (state.entered > state.gone).then_some(state.since)
                };
                let first = |group: &Group| {
                    let corridor = &group.corridor;
                    let mut rooms = corridor.occupied().map(|(_, index)| index).chain(corridor.current());
                    rooms.find_map(since)
                };
                self.groups.iter().filter_map(first).min().unwrap_or(0)
            }
        };
        self.oldest.store(oldest, Ordering::Relaxed);
    }

    // The bell.

    /// Wakes every server to whose listener something was moved since the last time.
    fn ring(&mut self) {
        for (group, index) in self.desk.listeners() {
            let moved = self.desk.state(index).moved;
            let rung = self.rung.insert(index, moved).unwrap_or(0);
            // Fewer: another listener has got this index.
            if moved <= rung {
                continue;
            }
            if let Err(error) = self.ring_at(group, index) {
                debug!("ring the bell of listener {index}: {error:#}; again soon");
                self.rung.insert(index, rung);
            }
            // It may have taken its time, and whoever waits is attended to all the same.
            self.desk.attend(now());
        }
    }

    fn ring_at(&mut self, group: usize, index: u32) -> anyhow::Result<()> {
        let bell = bell::prepare(&self.duty.listen[group]).context("make a bell")?;
        let client = bell.key();
        self.desk.expect_bell(client, index)?;
        let rung = bell.ring();
        self.desk.forget_bell(client);
        rung.context("ring it")
    }
}

/// The ring from the current room on, and the spare rooms, as they were written.
fn recorded(desk: &Desk, group: usize) -> (Vec<u32>, Vec<u32>) {
    let made = desk.made(group).load(Ordering::SeqCst);
    let ring = (desk.current(group)..made).map(|sequence| desk.ring(group, sequence).load(Ordering::Relaxed));
    let spares = desk.spares(group).load(Ordering::SeqCst);
    let spares = (desk.spares_taken(group)..spares)
        .map(|sequence| desk.spare(group, sequence).load(Ordering::Relaxed));
    (ring.collect(), spares.collect())
}

/// CLOCK_MONOTONIC, which is what `bpf_ktime_get_ns` gives, in nanoseconds.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
