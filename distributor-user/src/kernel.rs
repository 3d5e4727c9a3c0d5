//! The kernel objects of one service. The only file that imports aya.
//!
//! Loads the programs, pins the maps and links, attaches, and reads and writes the maps in the
//! contract's types. It decides nothing. Opening it again where pins are left finds the same
//! maps with their counts, and leaves the attached programs running.
#![forbid(unsafe_code)]

use std::{
    fs::{DirBuilder, File},
    io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, ReusePortSockArray, RingBuf, SkStorage},
    programs::{CgroupAttachMode, CgroupSockAddr, ProgramError, SkReuseport, SockOps, links::FdLink},
};
use aya_log::EbpfLogger;
use distributor_ebpf::contract::{
    Address, BUCKETS, Event, EventKind, Home, Load, Outcome, Plan, Tag, VERSION,
};
use tracing::debug;

use crate::{address::ListenAddress, watch::Watch};

mod object {
    include!(concat!(env!("OUT_DIR"), "/object.rs"));
}

/// Maps that outlive a distributor. TAG is among them: its entries live in the sockets.
const PINNED: [&str; 11] =
    ["PLAN", "ACTIVE", "HASH", "LOAD", "SOCKETS", "HOME", "MOVED", "ADDRESSES", "PORTS", "OUTCOMES", "TAG"];
const EVENTS: &str = "EVENTS";

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
        let ring = RingBuf::try_from(take(EVENTS)?)?;
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

    /// Makes a listener one of ours: its children count for `home`, and it can be selected by
    /// its index. In this order, so that nothing reaches it uncounted.
    pub fn adopt(&mut self, listener: &impl AsRawFd, cookie: u64, home: Home) -> anyhow::Result<()> {
        let tag = Tag { slot: home.slot, counted: 0 };
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
    }

    /// Every listener that is or was ours, by its cookie.
    pub fn homes(&self) -> anyhow::Result<Vec<(u64, Home)>> {
        self.home.iter().collect::<Result<_, _>>().context("read HOME")
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
    [
        EventKind::Listening,
        EventKind::ListenerClosed,
        EventKind::Misbound,
        EventKind::Waiting,
        EventKind::HandedOver,
        EventKind::Left,
        EventKind::Bound,
    ]
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
    for name in PINNED.into_iter().chain([EVENTS]) {
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
