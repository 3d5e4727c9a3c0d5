//! The programs on trial: the real ones with the real maps, of which nothing is pinned.
//!
//! For an upgrade, whether the kernel takes them; for `dist-ctl doctor`, whether they then do what
//! they should, with sockets and a cgroup of its own. What runs has no part in it, and all is gone
//! when it is dropped.
#![forbid(unsafe_code)]

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, PerCpuArray, ReusePortSockArray, RingBuf, SkStorage},
    programs::SkReuseport,
};
use distributor_ebpf::{
    contract::{Address, Event, Load, Outcome, Plan, SLOTS, Tag},
    word,
};

use super::{decode, key, links::HOOKS, object, programs, syscall};
use crate::address::ListenAddress;

/// Every program that a service needs.
const PROGRAMS: [&str; 4] = ["select", "track", "bind4", "bind6"];

/// Programs and maps as a service has them, and no service.
pub struct Trial {
    object: Ebpf,
    /// By their place in [`HOOKS`].
    links: [Option<OwnedFd>; HOOKS.len()],
}

/// Has the kernel load every program, with maps that are gone with them: whether it takes them.
pub fn trial() -> anyhow::Result<()> {
    let mut trial = Trial::new()?;
    PROGRAMS.iter().try_for_each(|program| trial.load(program))
}

impl Trial {
    /// Makes every map, each as large as a service's.
    pub fn new() -> anyhow::Result<Self> {
        let mut loader = EbpfLoader::new();
        loader.btf(None).override_global("GROUP", &0u32, true);
        loader.override_global(aya_log::LEVEL, &0u8, true);
        let object = loader.load(object::object()).map_err(programs::said_of_maps);
        Ok(Self { object: object.context("create the eBPF maps")?, links: [const { None }; HOOKS.len()] })
    }

    /// Has the kernel take a program.
    pub fn load(&mut self, program: &str) -> anyhow::Result<()> {
        match program {
            "select" => programs::load_select(&mut self.object).map(drop),
            "track" => programs::load_track(&mut self.object).map(drop),
            bind => programs::load_bind(&mut self.object, bind).map(drop),
        }
    }

    /// Puts `select` in charge of the group that `listener` is in.
    pub fn attach_select(&mut self, listener: impl AsFd) -> anyhow::Result<()> {
        let select: &mut SkReuseport =
            self.object.program_mut("select").context("the eBPF object has no select program")?.try_into()?;
        select.attach(listener).map_err(programs::said).context("attach the select program to a listener")
    }

    /// Has a program run for a cgroup: `track`, `bind4` or `bind6`.
    pub fn attach(&mut self, program: &str, cgroup: &Path) -> anyhow::Result<()> {
        let place = place(program)?;
        let directory = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
        let link = syscall::create_link(self.fd(program)?, directory.as_fd(), HOOKS[place].kind);
        let link = link.with_context(|| format!("attach {program} to {}", cgroup.display()))?;
        self.links[place] = Some(link);
        Ok(())
    }

    /// Puts a program that is attached in the place of itself, as one of another build would be.
    pub fn replace(&self, program: &str) -> anyhow::Result<()> {
        let link = self.links[place(program)?].as_ref().with_context(|| format!("attach {program} first"))?;
        syscall::update_link(link.as_fd(), self.fd(program)?).with_context(|| format!("replace {program}"))
    }

    fn fd(&self, program: &str) -> anyhow::Result<BorrowedFd<'_>> {
        let loaded = self.object.program(program);
        Ok(loaded.with_context(|| format!("the eBPF object has no {program} program"))?.fd()?.as_fd())
    }

    fn map(&self, name: &str) -> anyhow::Result<&Map> {
        self.object.map(name).with_context(|| format!("the eBPF object has no {name} map"))
    }

    fn map_mut(&mut self, name: &str) -> anyhow::Result<&mut Map> {
        self.object.map_mut(name).with_context(|| format!("the eBPF object has no {name} map"))
    }

    /// Makes this an address of the service.
    pub fn serve(&mut self, address: &ListenAddress) -> anyhow::Result<()> {
        let key = key(address);
        let mut addresses: HashMap<_, Address, u32> = self.map_mut("ADDRESSES")?.try_into()?;
        addresses.insert(key, 0, 0).context("write ADDRESSES")?;
        let mut ports: HashMap<_, u32, u32> = self.map_mut("PORTS")?.try_into()?;
        ports.insert(key.port, 1, 0).context("write PORTS")
    }

    /// Says whose the connections of a listener are to be.
    pub fn tag(&mut self, listener: &impl AsRawFd, slot: u32) -> anyhow::Result<()> {
        let mut tags: SkStorage<_, Tag> = self.map_mut("TAG")?.try_into()?;
        tags.insert(listener, Tag { slot, ..Tag::default() }, 0).context("tag a listener")
    }

    /// Whose a connection is.
    pub fn slot_of(&self, connection: &impl AsRawFd) -> anyhow::Result<u32> {
        let tags: SkStorage<_, Tag> = self.map("TAG")?.try_into()?;
        Ok(tags.get(connection, 0).context("read a connection's tag")?.slot)
    }

    /// Where the tags are, for who asks the kernel for sockets.
    pub fn tags(&self) -> anyhow::Result<BorrowedFd<'_>> {
        match self.map("TAG")? {
            Map::SkStorage(data) => Ok(data.fd().as_fd()),
            _ => bail!("TAG is no socket storage"),
        }
    }

    /// Lets `select` choose this listener.
    pub fn place(&mut self, listener: &impl AsRawFd, index: u32) -> anyhow::Result<()> {
        let mut sockets: ReusePortSockArray<_> = self.map_mut("SOCKETS")?.try_into()?;
        sockets.set(index, listener, 0).context("put a listener into SOCKETS")
    }

    /// Puts a plan into force.
    pub fn write_plan(&mut self, plan: &Plan) -> anyhow::Result<()> {
        // The first one is, as long as ACTIVE is zero.
        let mut plans: Array<_, Plan> = self.map_mut("PLAN")?.try_into()?;
        plans.set(0, plan, 0).context("write PLAN")
    }

    /// Connections of a slot, as they are counted now.
    pub fn connections(&self, slot: u32) -> anyhow::Result<u64> {
        let load: Array<_, Load> = self.map("LOAD")?.try_into()?;
        let load = Box::new(load.get(&0, 0).context("read LOAD")?);
        Ok(word::active(load.word[slot as usize % SLOTS]))
    }

    /// How often the programs ended in this way.
    pub fn count(&self, outcome: Outcome) -> anyhow::Result<u64> {
        let outcomes: PerCpuArray<_, u64> = self.map("OUTCOMES")?.try_into()?;
        let counts = outcomes.get(&(outcome as u32), 0).context("read OUTCOMES")?;
        Ok(counts.iter().sum())
    }

    /// What was told since the last time.
    pub fn events(&mut self) -> anyhow::Result<Vec<Event>> {
        let mut ring = RingBuf::try_from(self.map_mut("EVENTS")?).context("open EVENTS")?;
        let mut events = Vec::new();
        while let Some(record) = ring.next() {
            events.extend(decode(&record));
        }
        Ok(events)
    }
}

/// The place in [`HOOKS`] of a program that is attached to a cgroup.
fn place(program: &str) -> anyhow::Result<usize> {
    let place = HOOKS.iter().position(|hook| hook.program == program);
    place.with_context(|| format!("{program} is attached to no cgroup"))
}
