//! The kernel objects of one service. The only file that imports aya.
//!
//! Loads the programs, pins the maps and links, attaches, and reads and writes the maps in the
//! contract's types. It decides nothing. Opening it again where pins are left finds the same
//! maps with their counts, and leaves the attached programs running.
#![forbid(unsafe_code)]

use std::{
    collections::HashSet,
    fs::{DirBuilder, File},
    io,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, ReusePortSockArray, RingBuf, SkStorage},
    programs::{CgroupAttachMode, CgroupSockAddr, ProgramError, SkReuseport, SockOps, links::FdLink},
};
use aya_log::EbpfLogger;
use distributor_ebpf::{
    contract::{
        Address, Attendant, BUCKETS, DISMISSED, Event, EventKind, FLAG_CLOSING, GROUPS, Home, Load, Outcome,
        Owner, Parked, Plan, RING, ROOM, Rooms, Run, SLOTS, SOCKETS, Server, State, Tag, VERSION,
    },
    word,
};
use tracing::debug;

use crate::{address::ListenAddress, room::Room, shared::Shared, watch::Watch};

mod object {
    include!(concat!(env!("OUT_DIR"), "/object.rs"));
}

/// Maps that outlive a distributor. TAG is among them: its entries live in the sockets.
const PINNED: [&str; 18] = [
    "PLAN",
    "ACTIVE",
    "HASH",
    "LOAD",
    "SOCKETS",
    "HOME",
    "OWNERS",
    "PARKED",
    "ROOMS",
    "STATES",
    "ATTENDANT",
    "BELLS",
    "ADDRESSES",
    "PORTS",
    "OUTCOMES",
    "TAG",
    "EVENTS",
    "WAKES",
];

/// What is read from the programs' log. A level above debug is never asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramLog {
    /// The log lines are dead code in the kernel.
    Off,
    On,
}

/// One service's programs and maps.
pub struct Kernel {
    plan: Array<MapData, Plan>,
    active: Array<MapData, u32>,
    hash: Array<MapData, [u16; BUCKETS]>,
    load: Array<MapData, Load>,
    sockets: ReusePortSockArray<MapData>,
    home: HashMap<MapData, u64, Home>,
    addresses: HashMap<MapData, Address, u32>,
    ports: HashMap<MapData, u32, u32>,
    parked: HashMap<MapData, u64, Parked>,
    counters: PerCpuArray<MapData, u64>,
    tag: SkStorage<MapData, Tag>,
    /// The loaded programs: one copy for each group, because `select` has its group built in.
    objects: Vec<Ebpf>,
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
    /// Loads everything for `groups` listening addresses, with its pins below `pins`, and
    /// attaches to `cgroup` what belongs there.
    ///
    /// # Errors
    /// What was tried and what the kernel said. Nothing stays attached that was not before;
    /// pins may stay, and are the caller's to remove.
    pub fn open(
        pins: &Path,
        cgroup: &Path,
        groups: usize,
        log: ProgramLog,
    ) -> anyhow::Result<(Self, Events, Logs)> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(pins);
        made.with_context(|| format!("create {} for the pins", pins.display()))?;
        let mut objects = Vec::new();
        for group in 0..groups {
            let mut object = load(pins, u32::try_from(group)?, log)?;
            load_select(&mut object)?;
            objects.push(object);
        }
        let first = objects.first_mut().context("a service has at least one address")?;
        attach_to_cgroup(first, pins, cgroup)?;

        let mut take = |name: &str| -> anyhow::Result<Map> {
            first.take_map(name).with_context(|| format!("the eBPF object has no {name} map"))
        };
        let ring = RingBuf::try_from(take("EVENTS")?)?;
        let events = Events { ready: Watch::new(ring.as_fd())?, ring };
        let mut kernel = Self {
            plan: take("PLAN")?.try_into()?,
            active: take("ACTIVE")?.try_into()?,
            hash: take("HASH")?.try_into()?,
            load: take("LOAD")?.try_into()?,
            sockets: take("SOCKETS")?.try_into()?,
            home: take("HOME")?.try_into()?,
            addresses: take("ADDRESSES")?.try_into()?,
            ports: take("PORTS")?.try_into()?,
            parked: take("PARKED")?.try_into()?,
            counters: take("OUTCOMES")?.try_into()?,
            tag: take("TAG")?.try_into()?,
            objects: Vec::new(),
        };
        let logs = match log {
            ProgramLog::Off => Vec::new(),
            ProgramLog::On => objects
                .iter_mut()
                .map(EbpfLogger::init)
                .collect::<Result<_, _>>()
                .context("read the programs' log")?,
        };
        kernel.objects = objects;
        Ok((kernel, events, Logs(logs)))
    }

    /// Puts `select` in charge of the group that `listener` is in.
    pub fn attach(&self, group: usize, listener: impl AsFd) -> anyhow::Result<()> {
        let object = self.objects.get(group).context("no such group")?;
        let program = object.program("select").context("the eBPF object has no select program")?;
        <&SkReuseport>::try_from(program)?
            .attach(listener)
            .map_err(said)
            .context("attach the select program to the listening address")
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
        Outcome::ALL
            .iter()
            .map(|&outcome| {
                let counts = self.counters.get(&(outcome as u32), 0).context("read OUTCOMES")?;
                Ok((outcome, counts.iter().sum()))
            })
            .collect()
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
        for name in ["HOME", "OWNERS", "PARKED", "STATES", "SOCKETS"] {
            loader.map_max_entries(name, 2);
        }
        let mut object =
            loader.load(object::object()).map_err(said_of_maps).context("create the eBPF maps")?;
        let program: &mut SkReuseport =
            object.program_mut("probe").context("the eBPF object has no probe program")?.try_into()?;
        program.load().map_err(said).context("load the probe program")?;
        Ok(Self { object })
    }

    /// Puts it in charge of the group that `listener` is in.
    pub fn attach(&mut self, listener: impl AsFd) -> anyhow::Result<()> {
        let program: &mut SkReuseport =
            self.object.program_mut("probe").context("the eBPF object has no probe program")?.try_into()?;
        program.attach(listener).map_err(said).context("attach the probe program")
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
        fn map(pins: &Path, name: &str) -> anyhow::Result<Map> {
            let data = MapData::from_pin(pins.join(name)).with_context(|| format!("open the {name} map"))?;
            Ok(Map::from_map_data(data)?)
        }
        fn shared<T>(pins: &Path, name: &str, entries: usize) -> anyhow::Result<Shared<T>> {
            let data = MapData::from_pin(pins.join(name)).with_context(|| format!("open the {name} map"))?;
            Shared::of(data.fd().as_fd(), entries).with_context(|| format!("map {name} into memory"))
        }
        Ok(Self {
            load: shared(pins, "LOAD", 1)?,
            plan: shared(pins, "PLAN", 2)?,
            active: shared(pins, "ACTIVE", 1)?,
            rooms: shared(pins, "ROOMS", GROUPS)?,
            states: shared(pins, "STATES", SOCKETS)?,
            attendant: shared(pins, "ATTENDANT", 1)?,
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

    /// Some server in the plan in force has a free place, and the service is not being stopped.
    pub fn has_place(&self, now: u64) -> bool {
        let active = self.active.word(0, 0).load(Ordering::Acquire) as usize & 1;
        let field = |offset: usize| self.plan.word(active, offset).load(Ordering::Relaxed);
        if field(offset_of!(Plan, flags)) & FLAG_CLOSING != 0 {
            return false;
        }
        let slots = (field(offset_of!(Plan, count)) as usize).min(SLOTS);
        (0..slots).any(|slot| {
            let server = offset_of!(Plan, servers) + slot * size_of::<Server>();
            let limit = field(server + offset_of!(Server, limit));
            let places = self.load.long(0, offset_of!(Load, word) + slot * 8).load(Ordering::SeqCst);
            word::used(word::roll(places, word::epoch(now))) < u64::from(limit)
        })
    }

    /// Rolls every slot's word to the present epoch, as whoever looks at it next would. Epochs
    /// repeat after 73 minutes, and a word that nobody touched for so long would pass for fresh.
    pub fn stamp_words(&self, now: u64) {
        for slot in 0..SLOTS {
            let places = self.load.long(0, offset_of!(Load, word) + slot * 8);
            let seen = places.load(Ordering::SeqCst);
            let rolled = word::roll(seen, word::epoch(now));
            // If a program was faster, it has rolled it.
            let _ = places.compare_exchange(seen, rolled, Ordering::SeqCst, Ordering::SeqCst);
        }
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
    /// our side, and as such.
    pub fn dismiss(&mut self, connection: BorrowedFd<'_>, index: u32) -> anyhow::Result<()> {
        let tag = Tag { slot: DISMISSED, counted: 1, index, group: 0 };
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
    /// Passes the programs' log lines on to `log`, as long as the runtime runs.
    pub fn follow(self) {
        for mut logger in self.0 {
            tokio::task::spawn_local(async move {
                let ready = Watch::new(logger.as_fd())?;
                loop {
                    ready.readable(|| logger.flush()).await?;
                }
                #[expect(unreachable_code, reason = "tells the type of the error")]
                io::Result::Ok(())
            });
        }
    }
}

/// The directory of one service's pins.
pub fn pins(root: &Path, service: &str) -> PathBuf {
    root.join(format!("{service}-v{VERSION}"))
}

/// An address as the programs know it: the IP in network byte order.
fn key(address: &ListenAddress) -> Address {
    let port = u32::from(address.socket.port());
    match address.socket.ip() {
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

fn load(pins: &Path, group: u32, log: ProgramLog) -> anyhow::Result<Ebpf> {
    let level: u8 = match log {
        ProgramLog::Off => 0,
        ProgramLog::On => aya_log::Level::Debug as u8,
    };
    let mut loader = EbpfLoader::new();
    loader.override_global("GROUP", &group, true).override_global(aya_log::LEVEL, &level, true);
    for name in PINNED {
        loader.map_pin_path(name, pins.join(name));
    }
    loader.load(object::object()).map_err(said_of_maps).context("create the eBPF maps")
}

fn load_select(object: &mut Ebpf) -> anyhow::Result<()> {
    let program: &mut SkReuseport =
        object.program_mut("select").context("the eBPF object has no select program")?.try_into()?;
    program.load().map_err(said).context("load the select program")
}

/// Attaches `track` and the bind hooks, unless a pinned link shows that they are.
fn attach_to_cgroup(object: &mut Ebpf, pins: &Path, cgroup: &Path) -> anyhow::Result<()> {
    let directory = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
    let pin = pins.join("track_link");
    if !pin.exists() {
        let program: &mut SockOps =
            object.program_mut("track").context("the eBPF object has no track program")?.try_into()?;
        program.load().map_err(said).context("load the track program")?;
        // Single, and several may attach all the same: it is a link. AllowMultiple is EINVAL here.
        let id = program.attach(&directory, CgroupAttachMode::Single).map_err(said);
        let id = id.with_context(|| format!("attach track to {}", cgroup.display()))?;
        keep(program.take_link(id)?.try_into()?, &pin)?;
    }
    for name in ["bind4", "bind6"] {
        let pin = pins.join(format!("{name}_link"));
        if pin.exists() {
            continue;
        }
        let program: &mut CgroupSockAddr = object
            .program_mut(name)
            .with_context(|| format!("the eBPF object has no {name} program"))?
            .try_into()?;
        program.load().map_err(said).with_context(|| format!("load the {name} program"))?;
        let id = program.attach(&directory, CgroupAttachMode::Single).map_err(said);
        let id = id.with_context(|| format!("attach {name} to {}", cgroup.display()))?;
        keep(program.take_link(id)?.try_into()?, &pin)?;
    }
    Ok(())
}

/// Pins a link, so that the program stays attached when this process is gone.
fn keep(link: FdLink, pin: &Path) -> anyhow::Result<()> {
    link.pin(pin).with_context(|| format!("pin {}", pin.display()))?;
    Ok(())
}

/// What a process needs to load programs, as an operator reads it who is root already.
const RIGHTS: &str = "needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, which root in a container may lack";

/// What the kernel said when maps were to be made.
fn said_of_maps(error: EbpfError) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    match error.root_cause().downcast_ref::<io::Error>() {
        Some(said) if said.kind() == io::ErrorKind::PermissionDenied => {
            anyhow!("the kernel refused it: {said} ({RIGHTS})")
        }
        _ => error,
    }
}

/// What the kernel said, in a sentence, with what to do where that is known.
fn said(error: ProgramError) -> anyhow::Error {
    let (io_error, last_line) = match &error {
        ProgramError::LoadError { io_error, verifier_log } => {
            (io_error, verifier_log.to_string().lines().last().map(str::to_owned).unwrap_or_default())
        }
        _ => return anyhow::Error::from(error),
    };
    match io_error.kind() {
        io::ErrorKind::PermissionDenied if last_line.is_empty() => {
            anyhow!("the kernel refused it: {io_error} ({RIGHTS})")
        }
        io::ErrorKind::InvalidInput if last_line.is_empty() => {
            anyhow!("the kernel refused it: {io_error} (needs Linux 5.15 or later)")
        }
        _ => anyhow!("the kernel refused it: {io_error}: {last_line}"),
    }
}

/// Has the kernel load every program, with maps that are gone with them: whether it takes them.
pub fn trial() -> anyhow::Result<()> {
    let mut loader = EbpfLoader::new();
    loader.override_global("GROUP", &0u32, true).override_global(aya_log::LEVEL, &0u8, true);
    let mut object = loader.load(object::object()).map_err(said_of_maps).context("create the eBPF maps")?;
    load_select(&mut object)?;
    let track: &mut SockOps =
        object.program_mut("track").context("the eBPF object has no track program")?.try_into()?;
    track.load().map_err(said).context("load the track program")?;
    for name in ["bind4", "bind6"] {
        let bind: &mut CgroupSockAddr = object
            .program_mut(name)
            .with_context(|| format!("the eBPF object has no {name} program"))?
            .try_into()?;
        bind.load().map_err(said).with_context(|| format!("load the {name} program"))?;
    }
    Ok(())
}
