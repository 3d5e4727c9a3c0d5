//! The kernel objects of one service. Only this file and those in `kernel/` import aya.
//!
//! Loads the programs, pins them with the maps and links, attaches, and reads and writes the maps
//! in the contract's types. It decides nothing. Opening it again where pins are left finds the
//! same maps with their counts and the same programs; another build's programs take the place of
//! those that run in one step, once everything that can fail is done.

mod counters;
mod directions;
mod foreign;
mod gate;
mod ledger;
mod links;
mod moving;
mod pins;
mod programs;
mod syscall;
mod trial;

use std::{
    collections::HashSet,
    io,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
    time::Instant,
};

use anyhow::{Context as _, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, ReusePortSockArray, RingBuf, SkStorage},
    programs::SkReuseport,
};
use aya_log::EbpfLogger;
use distributor_ebpf::contract::{
    Address, Attendant, BUCKETS, BUCKETS_OF_SOURCES, Bucket, COUNTED, DISMISSED, Event, EventKind,
    FLAG_COOKIES, GROUPS, Home, Load, Outcome, Owner, Parked, Plan, RING, ROOM, Rooms, Run, SLOTS, SOCKETS,
    State, Tag, VERSION,
};
use tokio::task::JoinSet;
use tracing::debug;

use self::{
    counters::Counters,
    links::HOOKS,
    moving::Moving,
    pins::Held,
    programs::{Programs, Stamp},
};
use crate::{address::ListenAddress, cgroup::Cgroup, error, room::Room, shared::Shared, watch::Watch};

pub use self::{
    directions::{Direction, Directions},
    foreign::detach,
    gate::Gate,
    ledger::Ledger,
    trial::{Trial, trial},
};

mod object {
    include!(concat!(env!("OUT_DIR"), "/object.rs"));
}

/// What is read from the programs' log. A level above debug is never asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramLog {
    /// The log lines are dead code in the kernel.
    Off,
    On,
}

/// Which programs are attached to the cgroup.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Only {
    /// Those without a link to it.
    Missing,
    /// All, in place of those that are.
    All,
}

/// One service's programs and maps.
pub struct Kernel {
    plan: Array<MapData, Plan>,
    active: Array<MapData, u32>,
    hash: Array<MapData, [u16; BUCKETS]>,
    sources: Shared<Bucket>,
    load: Array<MapData, Load>,
    sockets: ReusePortSockArray<MapData>,
    home: HashMap<MapData, u64, Home>,
    addresses: HashMap<MapData, Address, u32>,
    ports: HashMap<MapData, u32, u32>,
    parked: HashMap<MapData, u64, Parked>,
    counters: Counters,
    tag: SkStorage<MapData, Tag>,
    pins: PathBuf,
    cgroup: PathBuf,
    /// One `select` for each group, because it has its group built in.
    programs: Programs,
    stamp: Stamp,
    /// From an older version's pins, until the programs are switched.
    moving: Option<Moving>,
    /// Everything that is pinned, once it is in charge.
    held: Option<Held>,
    /// Events that had been lost when it was last asked.
    lost: u64,
}

/// What the kernel tells while the distributor runs.
pub struct Events {
    ring: RingBuf<MapData>,
    ready: Watch,
}

/// What the attendant works with: its own handles on the maps, so that it waits for nobody. All
/// that is read and written often is memory; what the integers mean is the contract's to say.
pub struct Desk {
    load: Shared<Load>,
    plan: Shared<Plan>,
    active: Shared<u32>,
    rooms: Shared<Rooms>,
    states: Shared<State>,
    sources: Shared<Bucket>,
    attendant: Shared<Attendant>,
    sockets: ReusePortSockArray<MapData>,
    tag: SkStorage<MapData, Tag>,
    home: HashMap<MapData, u64, Home>,
    owners: HashMap<MapData, u64, Owner>,
    parked: HashMap<MapData, u64, Parked>,
    bells: HashMap<MapData, u64, u32>,
    wakes: RingBuf<MapData>,
}

/// A program and two listeners, to try what the kernel does. Nothing of it is pinned, and all
/// is gone when it is dropped.
pub struct Probe {
    object: Ebpf,
}

/// The programs' log lines, one reader per loaded object.
pub struct Logs(Vec<EbpfLogger<&'static dyn log::Log>>);

impl Kernel {
    /// Makes or finds everything for `groups` listening addresses, with its pins in `pins`, and
    /// attaches to `cgroup` what is not attached there. What runs already is left as it is until
    /// [`Kernel::take_charge`], and all that is likely to fail is done before.
    ///
    /// # Errors
    /// What was tried and what the kernel said. Nothing is replaced then; pins may stay, and are
    /// the caller's to remove.
    pub fn open(
        pins: &Path,
        cgroup: &Path,
        groups: usize,
        log: ProgramLog,
    ) -> anyhow::Result<(Self, Events, Logs)> {
        ensure!(groups > 0, "a service has at least one address");
        let begun = Instant::now();
        let stamp = Stamp::of(log);
        let mut moving = moving::find(pins)?;
        pins::create(pins)?;
        if moving.is_none() {
            programs::restore_maps(pins)?;
        }
        let are_ready = moving.is_none() && programs::are_ready(pins, groups, stamp)?;
        if !are_ready {
            let shapes = programs::shapes()?;
            if let Some(moving) = &moving {
                moving.share(&shapes)?;
            } else {
                pins::check_shapes(pins, &shapes)?;
            }
            programs::load(pins, groups, log, stamp).map_err(error::unfit)?;
        }
        if let Some(moving) = &mut moving {
            moving.copy()?;
        }
        let programs = programs::open(pins, groups, stamp)?;
        let logs = match log {
            ProgramLog::Off => Vec::new(),
            ProgramLog::On => programs.logs()?,
        };

        let map = |name: &str| open_map(pins, name);
        let ring = RingBuf::try_from(map("EVENTS")?)?;
        let events = Events { ready: Watch::new(ring.as_fd())?, ring };
        let mut kernel = Self {
            plan: map("PLAN")?.try_into()?,
            active: map("ACTIVE")?.try_into()?,
            hash: map("HASH")?.try_into()?,
            sources: memory(pins, "SOURCES", BUCKETS_OF_SOURCES)?,
            load: map("LOAD")?.try_into()?,
            sockets: map("SOCKETS")?.try_into()?,
            home: map("HOME")?.try_into()?,
            addresses: map("ADDRESSES")?.try_into()?,
            ports: map("PORTS")?.try_into()?,
            parked: map("PARKED")?.try_into()?,
            counters: Counters::open(pins)?,
            tag: map("TAG")?.try_into()?,
            pins: pins.to_owned(),
            cgroup: cgroup.to_owned(),
            programs,
            stamp,
            moving,
            held: None,
            lost: 0,
        };
        // Of those before us somebody else was to know; we look at everything.
        kernel.has_lost_events()?;
        if kernel.moving.is_none() {
            kernel.attach_hooks(Only::Missing)?;
        }
        let how = if are_ready { "found" } else { "loaded" };
        debug!("{} is open after {:?}; its programs were {how}", pins.display(), begun.elapsed());
        Ok((kernel, events, Logs(logs)))
    }

    /// Puts our programs in charge, in place of those that are: `select` of each group through one
    /// of its listeners, in the order of the groups, and the others on the cgroup.
    pub fn take_charge(&mut self, listeners: &[impl AsFd]) -> anyhow::Result<()> {
        ensure!(listeners.len() == self.programs.selects.len(), "each group needs a listener");
        if let Some(moving) = &mut self.moving {
            moving.commit()?;
        }
        // Critical section. Each of these is one step of its own, which may be done again.
        for (select, listener) in self.programs.selects.iter().zip(listeners) {
            select
                .attach(listener)
                .map_err(programs::said)
                .context("attach the select program to the listening address")?;
        }
        if let Some(moving) = &self.moving {
            moving.take_links()?;
        }
        self.attach_hooks(Only::All)?;
        if let Some(moving) = self.moving.take() {
            moving.settle()?;
            moving.clear()?;
        }
        programs::remove_others(&self.pins, self.programs.selects.len(), self.stamp)?;
        self.held = Some(Held::open(&self.pins)?);
        Ok(())
    }

    /// Looks whether what is pinned and attached still is, and makes it so again: somebody may have
    /// removed the pins, and with them a next distributor's way to what runs; or the cgroup, which
    /// ends what is attached to it. A sentence if there was something to do.
    ///
    /// `mount` sees that there is a bpffs, where that is ours to do.
    pub fn heal(&mut self, mount: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Option<String>> {
        mount().and_then(|()| self.make_whole())
    }

    fn make_whole(&mut self) -> anyhow::Result<Option<String>> {
        let Some(held) = &self.held else { return Ok(None) };
        let restored = held.restore()?;
        let mut done = Vec::new();
        if restored > 0 {
            done.push(format!("{restored} pins in {} were gone and are there again", self.pins.display()));
        }
        Cgroup::at(&self.cgroup).create()?;
        let attached = self.attach_hooks(Only::Missing)?;
        if !attached.is_empty() {
            done.push(format!(
                "{} was removed and made anew; {} attached to it",
                self.cgroup.display(),
                attached.join(", ")
            ));
            self.held = Some(Held::open(&self.pins)?);
        }
        Ok((!done.is_empty()).then(|| done.join("; ")))
    }

    /// Attaches what belongs to the cgroup. What had to be attached.
    fn attach_hooks(&self, only: Only) -> anyhow::Result<Vec<&'static str>> {
        let mut attached = Vec::new();
        let cgroup = links::number(&self.cgroup)?;
        for (hook, program) in HOOKS.iter().zip(&self.programs.hooked) {
            if only == Only::Missing && hook.link(&self.pins, cgroup)?.is_some() {
                continue;
            }
            if hook.attach(&self.pins, program.fd.as_fd(), program.id, &self.cgroup)? == links::Done::Attached
            {
                attached.push(hook.program);
            }
            hook.tend_aside(&self.pins, program.fd.as_fd())?;
        }
        Ok(attached)
    }

    /// Tells the bind hooks which addresses servers share.
    pub fn set_addresses(&mut self, listen: &[ListenAddress]) -> anyhow::Result<()> {
        for (group, address) in listen.iter().enumerate() {
            let key = key(address);
            self.addresses.insert(key, u32::try_from(group)?, 0).context("write ADDRESSES")?;
            self.ports.insert(key.port, 1, 0).context("write PORTS")?;
        }
        Ok(())
    }

    /// The plan in force.
    pub fn plan(&self) -> anyhow::Result<Box<Plan>> {
        let active = self.active.get(&0, 0).context("read ACTIVE")? & 1;
        Ok(Box::new(self.plan.get(&active, 0).context("read PLAN")?))
    }

    /// Puts a plan, and its consistent-hash table where it has one, into force at once: both
    /// are written beside the ones in force, and then one word changes.
    pub fn write_plan(&mut self, plan: &Plan, hash: Option<&[u16; BUCKETS]>) -> anyhow::Result<()> {
        let next = (self.active.get(&0, 0).context("read ACTIVE")? & 1) ^ 1;
        if let Some(hash) = hash {
            self.hash.set(next, hash, 0).context("write HASH")?;
        }
        self.plan.set(next, plan, 0).context("write PLAN")?;
        // Critical section. Dying before it leaves the old plan in force, and after it the new.
        self.active.set(0, next, 0).context("write ACTIVE")
    }

    /// The counts, as they are now.
    pub fn load(&self) -> anyhow::Result<Box<Load>> {
        Ok(Box::new(self.load.get(&0, 0).context("read LOAD")?))
    }

    /// How often each way out of the programs was taken, over all CPUs.
    pub fn outcomes(&self) -> anyhow::Result<Vec<(Outcome, u64)>> {
        Outcome::ALL.iter().map(|&outcome| Ok((outcome, self.counters.of(outcome)?))).collect()
    }

    /// The same of one of them.
    pub fn outcome(&self, outcome: Outcome) -> anyhow::Result<u64> {
        self.counters.of(outcome)
    }

    /// Whether EVENTS was full since this was last asked, so that something happened of which nobody
    /// was told.
    pub fn has_lost_events(&mut self) -> anyhow::Result<bool> {
        let lost = self.counters.of(Outcome::EventLost)?;
        Ok(std::mem::replace(&mut self.lost, lost) != lost)
    }

    /// Makes a listener in a group one of ours: its children count for `home`, and it can be
    /// selected by its index. In this order, so that nothing reaches it uncounted.
    pub fn adopt(
        &mut self,
        listener: &impl AsRawFd,
        cookie: u64,
        home: Home,
        group: usize,
    ) -> anyhow::Result<()> {
        let tag = Tag { slot: home.slot, counted: 0, index: home.index, group: u32::try_from(group)? };
        self.tag.insert(listener, tag, 0).context("tag the listener")?;
        self.home.insert(cookie, home, 0).context("write HOME")?;
        self.sockets.set(home.index, listener, 0).context("put the listener into SOCKETS")
    }

    /// Has nothing selected by this index any more. The entry may be gone by itself: the kernel
    /// takes closing sockets out.
    pub fn vacate(&mut self, index: u32) {
        if let Err(error) = self.sockets.clear_index(&index) {
            debug!("SOCKETS[{index}] was empty already: {error}");
        }
    }

    /// Forgets whose a listener was. Not before it is closed and its queue is moved, or what
    /// moves then stays counted where it was.
    pub fn forget(&mut self, cookie: u64) {
        if let Err(error) = self.home.remove(&cookie) {
            debug!("HOME had no listener {cookie}: {error}");
        }
        // It is there only if a connection had to be parked.
        let _ = self.parked.remove(&cookie);
    }

    /// Every listener that is or was ours, by its cookie.
    pub fn homes(&self) -> anyhow::Result<Vec<(u64, Home)>> {
        self.home.iter().collect::<Result<_, _>>().context("read HOME")
    }
}

impl Probe {
    /// Loads it.
    pub fn load() -> anyhow::Result<Self> {
        let mut loader = EbpfLoader::new();
        // Only two sockets are put into one of them.
        for name in ["HOME", "OWNERS", "PARKED", "STATES", "SOCKETS", "SOURCES"] {
            loader.map_max_entries(name, 2);
        }
        let object = loader.load(object::object()).map_err(programs::said_of_maps);
        let mut object = object.context("create the eBPF maps")?;
        let program: &mut SkReuseport =
            object.program_mut("probe").context("the eBPF object has no probe program")?.try_into()?;
        program.load().map_err(programs::said).context("load the probe program")?;
        Ok(Self { object })
    }

    /// Puts it in charge of the group that `listener` is in.
    pub fn attach(&mut self, listener: impl AsFd) -> anyhow::Result<()> {
        let program: &mut SkReuseport =
            self.object.program_mut("probe").context("the eBPF object has no probe program")?.try_into()?;
        program.attach(listener).map_err(programs::said).context("attach the probe program")
    }

    /// Which listeners it chooses: the first one, as long as it is there, and then the second.
    pub fn choose(&mut self, listeners: [BorrowedFd<'_>; 2]) -> anyhow::Result<()> {
        let map = self.object.map_mut("SOCKETS").context("the eBPF object has no SOCKETS map")?;
        let mut sockets = ReusePortSockArray::try_from(map)?;
        for (index, listener) in (0..).zip(listeners) {
            sockets.set(index, &listener, 0).context("put a listener into SOCKETS")?;
        }
        Ok(())
    }
}

impl Desk {
    /// Opens the maps that [`Kernel::open`] has pinned.
    pub fn open(pins: &Path) -> anyhow::Result<Self> {
        let map = open_map;
        Ok(Self {
            load: memory(pins, "LOAD", 1)?,
            plan: memory(pins, "PLAN", 2)?,
            active: memory(pins, "ACTIVE", 1)?,
            rooms: memory(pins, "ROOMS", GROUPS)?,
            states: memory(pins, "STATES", SOCKETS)?,
            sources: memory(pins, "SOURCES", BUCKETS_OF_SOURCES)?,
            attendant: memory(pins, "ATTENDANT", 1)?,
            sockets: map(pins, "SOCKETS")?.try_into()?,
            tag: map(pins, "TAG")?.try_into()?,
            home: map(pins, "HOME")?.try_into()?,
            owners: map(pins, "OWNERS")?.try_into()?,
            parked: map(pins, "PARKED")?.try_into()?,
            bells: map(pins, "BELLS")?.try_into()?,
            wakes: map(pins, "WAKES")?.try_into()?,
        })
    }

    /// Connections that wait.
    pub fn waiting(&self) -> u64 {
        self.load.long(0, offset_of!(Load, waiting)).load(Ordering::SeqCst)
    }

    /// A SYN leaves nothing behind, and its connection is made with the ACK of a cookie.
    pub fn has_cookies(&self) -> bool {
        let active = self.active.word(0, 0).load(Ordering::Acquire) as usize & 1;
        self.plan.word(active, offset_of!(Plan, flags)).load(Ordering::Relaxed) & FLAG_COOKIES != 0
    }

    /// The sequence number of the group's current room.
    pub fn current(&self, group: usize) -> u64 {
        let current = self.load.long(0, offset_of!(Load, current) + group * 8).load(Ordering::SeqCst) >> 16;
        current.max(self.least(group).load(Ordering::Relaxed))
    }

    /// Spare rooms of the group that were ever taken.
    pub fn spares_taken(&self, group: usize) -> u64 {
        self.load.long(0, offset_of!(Load, spares_taken) + group * 8).load(Ordering::SeqCst)
    }

    /// [`Rooms::least`]
    pub fn least(&self, group: usize) -> &AtomicU64 {
        self.rooms.long(group, offset_of!(Rooms, least))
    }

    /// [`Rooms::made`]
    pub fn made(&self, group: usize) -> &AtomicU64 {
        self.rooms.long(group, offset_of!(Rooms, made))
    }

    /// [`Rooms::spares`]
    pub fn spares(&self, group: usize) -> &AtomicU64 {
        self.rooms.long(group, offset_of!(Rooms, spares))
    }

    /// [`Rooms::bound`]
    pub fn bound(&self, group: usize) -> &AtomicU64 {
        self.rooms.long(group, offset_of!(Rooms, bound))
    }

    /// [`Rooms::share`]
    pub fn share(&self, group: usize) -> &AtomicU32 {
        self.rooms.word(group, offset_of!(Rooms, share))
    }

    /// [`Rooms::chunk`]
    pub fn chunk(&self, group: usize) -> &AtomicU32 {
        self.rooms.word(group, offset_of!(Rooms, chunk))
    }

    /// [`Rooms::crowd`]
    pub fn crowd(&self, group: usize) -> &AtomicU32 {
        self.rooms.word(group, offset_of!(Rooms, crowd))
    }

    /// [`Rooms::full`]
    pub fn full(&self, group: usize) -> &AtomicU32 {
        self.rooms.word(group, offset_of!(Rooms, full))
    }

    /// The entry of [`Rooms::ring`] for this sequence number.
    pub fn ring(&self, group: usize, sequence: u64) -> &AtomicU32 {
        self.rooms.word(group, offset_of!(Rooms, ring) + sequence as usize % RING * 4)
    }

    /// The entry of [`Rooms::spare`] for this sequence number.
    pub fn spare(&self, group: usize, sequence: u64) -> &AtomicU32 {
        self.rooms.word(group, offset_of!(Rooms, spare) + sequence as usize % RING * 4)
    }

    /// What came of the listener at this index.
    pub fn state(&self, index: u32) -> State {
        let field = |offset: usize| self.states.long(index as usize, offset).load(Ordering::SeqCst);
        State {
            completed: field(offset_of!(State, completed)),
            gone: field(offset_of!(State, gone)),
            entered: field(offset_of!(State, entered)),
            first: field(offset_of!(State, first)),
            since: field(offset_of!(State, since)),
            moved: field(offset_of!(State, moved)),
            offered: field(offset_of!(State, offered)),
        }
    }

    /// Makes a room of a socket that is bound and does not listen yet, by letting it listen once
    /// its connections will be counted; then it can be selected by its index.
    pub fn admit(&mut self, room: &Room) -> anyhow::Result<()> {
        for field in 0..size_of::<State>() / 8 {
            self.states.long(room.index as usize, field * 8).store(0, Ordering::SeqCst);
        }
        let tag = Tag { slot: ROOM, counted: 0, index: room.index, group: u32::try_from(room.group)? };
        self.tag.insert(room, tag, 0).context("tag a room")?;
        self.home.insert(room.cookie, Home { slot: ROOM, index: room.index }, 0).context("write HOME")?;
        room.open().context("listen")?;
        self.sockets.set(room.index, room, 0).context("put a room into SOCKETS")
    }

    /// The index of a room, by its cookie.
    pub fn index_of(&self, cookie: u64) -> Option<u32> {
        self.home.get(&cookie, 0).ok().filter(|home| home.slot == ROOM).map(|home| home.index)
    }

    /// Forgets a room that has closed.
    pub fn forget(&mut self, cookie: u64) {
        // Nobody else removes it.
        let _ = self.home.remove(&cookie);
    }

    /// Forgets all rooms but these.
    pub fn forget_rooms_except(&mut self, cookies: &HashSet<u64>) -> anyhow::Result<()> {
        let homes: Vec<(u64, Home)> = self.home.iter().collect::<Result<_, _>>().context("read HOME")?;
        for (cookie, home) in homes {
            if home.slot == ROOM && !cookies.contains(&cookie) {
                self.forget(cookie);
            }
        }
        Ok(())
    }

    /// Whose a connection is that waits.
    pub fn owner(&self, cookie: u64) -> Option<Owner> {
        self.owners.get(&cookie, 0).ok()
    }

    /// Marks a connection as one that is turned away: it is counted down when it is closed from
    /// our side, and as such, everywhere it is counted.
    pub fn dismiss(&mut self, connection: BorrowedFd<'_>, index: u32) -> anyhow::Result<()> {
        let counted = self.tag.get(&connection, 0).map_or(COUNTED, |tag| tag.counted);
        let tag = Tag { slot: DISMISSED, counted, index, group: 0 };
        self.tag.insert(&connection, tag, 0).context("tag a connection")
    }

    /// A closing listener has closed: forgets where its connections are parked.
    pub fn forget_parked(&mut self, cookie: u64) {
        // It is there only if a connection had to be parked.
        let _ = self.parked.remove(&cookie);
    }

    /// All listeners of servers in the plan in force: their group, and their index in SOCKETS.
    pub fn listeners(&self) -> Vec<(usize, u32)> {
        let active = self.active.word(0, 0).load(Ordering::Acquire) as usize & 1;
        let field = |offset: usize| self.plan.word(active, offset).load(Ordering::Relaxed);
        let slots = (field(offset_of!(Plan, count)) as usize).min(SLOTS);
        let runs = (0..GROUPS).flat_map(|group| (0..slots).map(move |slot| (group, slot)));
        runs.flat_map(|(group, slot)| {
            let run = field(offset_of!(Plan, runs) + (group * SLOTS + slot) * size_of::<Run>());
            let [first, len] = [run as u16, (run >> 16) as u16].map(u32::from);
            (first..first + len).map(move |index| (group, index))
        })
        .collect()
    }

    /// From now on a connection of this client is a bell for the listener at this index.
    pub fn expect_bell(&mut self, client: u64, index: u32) -> anyhow::Result<()> {
        self.bells.insert(client, index, 0).context("write BELLS")
    }

    /// That bell was rung.
    pub fn forget_bell(&mut self, client: u64) {
        // Nobody else removes it.
        let _ = self.bells.remove(&client);
    }

    /// In which cgroup rooms are made.
    pub fn set_cgroup(&self, id: u64) {
        self.attendant.long(0, offset_of!(Attendant, cgroup)).store(id, Ordering::SeqCst);
    }

    /// The attendant is at work.
    pub fn attend(&self, now: u64) {
        self.attendant.long(0, offset_of!(Attendant, seen)).store(now, Ordering::Relaxed);
    }

    /// Whether the programs have to wake the attendant. It must look once more between saying
    /// so and sleeping.
    pub fn set_asleep(&self, asleep: bool) {
        self.attendant.long(0, offset_of!(Attendant, asleep)).store(u64::from(asleep), Ordering::SeqCst);
        // A program first changes a count, then reads this; we first write this, then read counts.
        fence(Ordering::SeqCst);
    }

    /// Forgets what woke the attendant.
    pub fn drain_wakes(&mut self) {
        while self.wakes.next().is_some() {}
    }

    /// What can be read when the attendant is to wake.
    pub fn wakes(&self) -> BorrowedFd<'_> {
        self.wakes.as_fd()
    }
}

impl Events {
    /// Waits until something happened, and returns all of it in order.
    pub async fn next(&mut self) -> io::Result<Vec<Event>> {
        loop {
            let Self { ring, ready } = self;
            let events = ready
                .readable(|| {
                    let mut events = Vec::new();
                    while let Some(item) = ring.next() {
                        events.extend(decode(&item));
                    }
                    events
                })
                .await?;
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }
}

impl Logs {
    /// Passes the programs' log lines on to `log`, as long as `tasks` is there.
    pub fn follow(self, tasks: &mut JoinSet<()>) {
        for mut logger in self.0 {
            tasks.spawn_local(async move {
                let Ok(ready) = Watch::new(logger.as_fd()) else { return };
                while ready.readable(|| logger.flush()).await.is_ok() {}
            });
        }
    }
}

/// The directory of one service's pins.
pub fn pins(root: &Path, service: &str) -> PathBuf {
    root.join(pins::directory(service, VERSION))
}

/// The addresses of a service whose pins are there, of whatever version, and their groups. `None`
/// if there are none.
pub fn addresses(pins: &Path) -> anyhow::Result<Option<Vec<(Address, u32)>>> {
    let others = pins::other_versions(pins)?.into_iter().rev().map(|(_, directory)| directory);
    let mut directories = [pins.to_owned()].into_iter().chain(others);
    let Some(directory) = directories.find(|directory| directory.join("ADDRESSES").exists()) else {
        return Ok(None);
    };
    let addresses: HashMap<MapData, Address, u32> = open_map(&directory, "ADDRESSES")?.try_into()?;
    Ok(Some(addresses.iter().collect::<Result<_, _>>().context("read ADDRESSES")?))
}

/// Whether these addresses and groups are those of a service that listens on `listen`.
pub fn are(addresses: &[(Address, u32)], listen: &[ListenAddress]) -> bool {
    addresses.len() == listen.len()
        && listen.iter().zip(0..).all(|(address, group)| addresses.contains(&(key(address), group)))
}

/// What [`remember_wakes`] was told, if it was told anything.
pub fn remembered_wakes(root: &Path) -> Option<bool> {
    let map = open_map(&root.join(PROBED), "WAKES").ok()?;
    let answer: Array<MapData, u32> = map.try_into().ok()?;
    Some(answer.get(&0, 0).ok()? != 0)
}

/// Has the kernel remember whether it wakes whoever it moves a connection to.
pub fn remember_wakes(root: &Path, wakes: bool) -> anyhow::Result<()> {
    let directory = root.join(PROBED);
    pins::create(&directory)?;
    let mut answer = Array::<MapData, u32>::create(1, 0).context("make a map for what was found out")?;
    answer.set(0, u32::from(wakes), 0).context("write what was found out")?;
    answer.pin(directory.join("WAKES")).context("pin what was found out")
}

/// The directory of what was found out about the kernel. No service's: those end with a version.
const PROBED: &str = "probed";

fn key(address: &ListenAddress) -> Address {
    address_of(address.socket)
}

/// An address as the programs know it: the IP in network byte order.
fn address_of(socket: SocketAddr) -> Address {
    let port = u32::from(socket.port());
    match socket.ip() {
        IpAddr::V4(ip) => Address { ip: [u32::from_ne_bytes(ip.octets()), 0, 0, 0], family: AF_INET, port },
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            let word =
                |at: usize| u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
            Address { ip: [word(0), word(4), word(8), word(12)], family: AF_INET6, port }
        }
    }
}

/// The address in an event; the inverse of `key`. `None` for a family that is neither.
pub fn address(key: &Address) -> Option<SocketAddr> {
    let port = u16::try_from(key.port).ok()?;
    match key.family {
        AF_INET => Some(SocketAddr::from((key.ip[0].to_ne_bytes(), port))),
        AF_INET6 => {
            let mut octets = [0u8; 16];
            for (bytes, word) in octets.chunks_exact_mut(4).zip(key.ip) {
                bytes.copy_from_slice(&word.to_ne_bytes());
            }
            Some(SocketAddr::from((octets, port)))
        }
        _ => None,
    }
}

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// The event in the bytes of a record. `None` for what is no event of this version.
fn decode(bytes: &[u8]) -> Option<Event> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    Some(Event {
        kind: word(0)?,
        reserved: word(4)?,
        cookie: long(8)?,
        cgroup: long(16)?,
        time: long(24)?,
        address: Address {
            ip: [word(32)?, word(36)?, word(40)?, word(44)?],
            family: word(48)?,
            port: word(52)?,
        },
    })
}

/// The kind of an event. `None` for one of another version.
pub fn kind(event: &Event) -> Option<EventKind> {
    [EventKind::Listening, EventKind::ListenerClosed, EventKind::Misbound, EventKind::Bound]
        .into_iter()
        .find(|&kind| kind as u32 == event.kind)
}

/// Maps a map that is pinned, with so many entries, into memory.
fn memory<T>(pins: &Path, name: &str, entries: usize) -> anyhow::Result<Shared<T>> {
    let data = MapData::from_pin(pins.join(name)).with_context(|| format!("open the {name} map"))?;
    Shared::of(data.fd().as_fd(), entries).with_context(|| format!("map {name} into memory"))
}

/// Opens a map that is pinned.
fn open_map(pins: &Path, name: &str) -> anyhow::Result<Map> {
    let data = MapData::from_pin(pins.join(name)).with_context(|| format!("open the {name} map"))?;
    Ok(Map::from_map_data(data)?)
}
