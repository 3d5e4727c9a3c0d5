//! From the pins of an older contract to ours, while everything runs.
//!
//! What is the same in both is shared: the same kernel map is pinned in both directories. A map
//! whose values have grown is made anew and its entries are copied. The old programs write
//! meanwhile, so the counts of the two are joined by differences: what the old map gained since
//! it was copied is added to the new one.
//!
//! Each step may be done again, and dying after any of them leaves what the next distributor
//! finishes or begins anew:
//!
//! 1. *share*: pin the same maps in the new directory, and make the others. (Dying before step 4:
//!    the old pins are in force, and the next one removes the new ones and begins again.)
//! 2. load the new programs.
//! 3. *copy* the entries.
//! 4. *commit*: pin BASE, which holds what was copied. From here on there is no way back: the new
//!    maps are never copied to again, only the differences to BASE are brought.
//! 5. *switch* the programs, `select` of each group and what is attached to the cgroup.
//! 6. *settle*: bring what the old maps gained until then.
//! 7. *clear*: remove the old pins, LOAD last, and then BASE.
//!
//! Counts are exact but for what runs in the microseconds of a switch, and for one count if we
//! die between the two instructions that bring it.
#![forbid(unsafe_code)]

use std::{
    collections::{HashMap, HashSet},
    mem::offset_of,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use distributor_ebpf::{
    contract::{Load, SOCKETS, State, VERSION},
    word,
};
use tracing::info;

use super::{
    links::HOOKS,
    pins::{self, Shape},
    syscall::{self, Entries},
};
use crate::shared::Shared;

/// The mark of a move that cannot go back, and LOAD as it was copied. The name is the same in
/// all versions to come.
const BASE: &str = "BASE";
/// STATES as it was copied, if it has grown.
const BASE_OF_STATES: &str = "BASE_OF_STATES";

// enum bpf_map_type (include/uapi/linux/bpf.h)
const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;
const RINGBUF: u32 = 27;
/// BPF_F_MMAPABLE
const MMAPABLE: u32 = 1 << 10;

/// Maps with keys that the programs write.
const WRITTEN_BY_PROGRAMS: [&str; 2] = ["OWNERS", "PARKED"];

/// Pins of one version of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) version: u32,
    /// It has a BASE: its programs may be in charge already.
    pub(super) committed: bool,
}

/// What is to be done about the pins that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Those of our version are in force, or there are none. All others are of no use.
    Ours,
    Move {
        from: u32,
        committed: bool,
    },
    /// Only this version can go on with them.
    Refuse {
        version: u32,
    },
}

/// What a map's entries have to go through to be the new version's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Shared,
    /// Its values have more at their end, or an array more entries; the rest is zero.
    Grown,
    /// Nothing in it outlives its reader.
    Dropped,
    Impossible,
}

/// How what the old programs changed since the copy is brought to a number that the new programs
/// change at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    /// A slot's word: see [`word::join`].
    Places,
    /// Changed by additions.
    Sum,
    /// Never becomes smaller.
    Most,
    /// Written once, where it is zero.
    First,
}

/// The fields of [`Load`] by their offsets, each up to the next one. What a later version appends
/// comes here too.
const LOAD_FIELDS: &[(usize, Field)] = &[
    (offset_of!(Load, word), Field::Places),
    (offset_of!(Load, turn), Field::Most),
    (offset_of!(Load, total), Field::Sum),
    (offset_of!(Load, most), Field::Most),
    (offset_of!(Load, waiting), Field::Sum),
    (offset_of!(Load, waiting_most), Field::Most),
    (offset_of!(Load, clock), Field::Most),
    (offset_of!(Load, owned), Field::Sum),
    (offset_of!(Load, current), Field::Most),
    (offset_of!(Load, spares_taken), Field::Most),
    (offset_of!(Load, suspicious_until), Field::Most),
    (offset_of!(Load, orphans), Field::Sum),
    (offset_of!(Load, waits), Field::Sum),
    (offset_of!(Load, waited), Field::Sum),
    (offset_of!(Load, places), Field::Places),
    (offset_of!(Load, due), Field::Most),
    (offset_of!(Load, over), Field::Most),
    #[cfg(feature = "next-contract")]
    (offset_of!(Load, closed), Field::Sum),
];

/// The same of [`State`].
const STATE_FIELDS: &[(usize, Field)] = &[
    (offset_of!(State, completed), Field::Sum),
    (offset_of!(State, first), Field::First),
    (offset_of!(State, moved), Field::Sum),
];

/// What to do about these pins.
///
/// The lowest version is in force, as long as no higher one has committed: a move removes the
/// old pins last.
pub(super) fn decide(found: &[Found], ours: u32) -> Decision {
    let Some(lowest) = found.iter().map(|found| found.version).min() else { return Decision::Ours };
    match found.iter().find(|found| found.committed && found.version > lowest) {
        Some(found) if found.version == ours => Decision::Move { from: lowest, committed: true },
        Some(found) => Decision::Refuse { version: found.version },
        None if lowest == ours => Decision::Ours,
        None if lowest < ours => Decision::Move { from: lowest, committed: false },
        None => Decision::Refuse { version: lowest },
    }
}

/// Looks for pins of other versions; removes those that are of no use.
///
/// # Errors
/// There are pins that only another version can read.
pub(super) fn find(new: &Path) -> anyhow::Result<Option<Moving>> {
    let others = pins::other_versions(new)?;
    let all: HashMap<u32, &Path> = others
        .iter()
        .map(|(version, path)| (*version, path.as_path()))
        .chain([(VERSION, new)])
        // Without its LOAD it is the rest of something that was being made or removed.
        .filter(|(_, path)| path.join("LOAD").exists())
        .collect();
    let found: Vec<Found> =
        all.iter().map(|(&version, path)| Found { version, committed: path.join(BASE).exists() }).collect();
    let decision = decide(&found, VERSION);
    let from = match decision {
        Decision::Refuse { version } => bail!(
            "{} was made by a dist-ctl whose kernel objects have version {version}, and this one has version \
             {VERSION} and cannot read them: start that dist-ctl again, or stop everything with its \
             dist-ctl down first",
            all.get(&version).map_or_else(|| new.display(), |path| path.display())
        ),
        Decision::Ours => None,
        Decision::Move { from, .. } => Some(from),
    };
    for (version, path) in &others {
        if Some(*version) != from {
            pins::remove(path, Some("LOAD"))?;
        }
    }
    let Decision::Move { from, committed } = decision else {
        // The last step of a move that was cut short there.
        clear_marks(new)?;
        return Ok(None);
    };
    if !committed {
        pins::remove(new, None)?;
    }
    pins::create(new)?;
    let old = all.get(&from).context("it was found")?.to_path_buf();
    Ok(Some(Moving {
        from,
        old,
        new: new.to_owned(),
        committed,
        load: None,
        states: None,
        kept: Kept::default(),
    }))
}

fn clear_marks(new: &Path) -> anyhow::Result<()> {
    pins::remove_pin(&new.join(BASE_OF_STATES))?;
    pins::remove_pin(&new.join(BASE))
}

/// A move under way.
pub(super) struct Moving {
    from: u32,
    old: PathBuf,
    new: PathBuf,
    committed: bool,
    /// LOAD and STATES as they were copied, until these are pinned.
    load: Option<OwnedFd>,
    states: Option<OwnedFd>,
    kept: Kept,
}

/// Of maps that are not memory, what was in them when they were copied last.
#[derive(Default)]
struct Kept {
    keys: HashMap<&'static str, HashSet<Vec<u8>>>,
    outcomes: Option<Vec<Vec<u64>>>,
}

/// A map of the old version and the one of the new version.
struct Pair {
    old: OwnedFd,
    new: OwnedFd,
    old_shape: Shape,
    new_shape: Shape,
}

impl Moving {
    /// Step 1, as far as it is ours: the loader makes what is not there.
    pub(super) fn share(&self, shapes: &HashMap<String, Shape>) -> anyhow::Result<()> {
        if self.committed {
            return Ok(());
        }
        info!("the kernel objects have version {}; moves them to version {VERSION}", self.from);
        let mut shared = Vec::new();
        for name in pins::MAPS {
            let wanted = *shapes.get(name).with_context(|| format!("the eBPF object has no {name} map"))?;
            let Some((found, _)) = pins::map(&self.old.join(name))? else { continue };
            match fate(name, found, wanted) {
                Fate::Shared => shared.push(name),
                Fate::Grown | Fate::Dropped => {}
                Fate::Impossible => bail!(
                    "the map {name} of version {} is {found:?}, and of version {VERSION} {wanted:?}: one \
                     cannot become the other while it is in use: stop with the dist-ctl that made it \
                     (dist-ctl down), then start this one",
                    self.from
                ),
            }
        }
        for name in shared {
            let map = open(&self.old.join(name))?;
            let pin = self.new.join(name);
            syscall::pin(map.as_fd(), &pin).with_context(|| format!("pin {}", pin.display()))?;
        }
        step(Step::Share)
    }

    /// Step 3.
    pub(super) fn copy(&mut self) -> anyhow::Result<()> {
        step(Step::Load)?;
        if self.committed {
            return Ok(());
        }
        for name in pins::MAPS {
            let Some(pair) = self.pair(name)? else { continue };
            match pair.new_shape.kind {
                RINGBUF => {}
                ARRAY if name == "LOAD" || name == "STATES" => {}
                _ => pair.copy().with_context(|| format!("copy the map {name}"))?,
            }
        }
        let base = |value: usize, entries: usize| {
            let (value, entries) = (value as u32, entries as u32);
            syscall::create_map(Shape { kind: ARRAY, key: 4, value, entries, flags: MMAPABLE })
        };
        self.load = Some(base(size_of::<Load>(), 1).context("make the map BASE")?);
        self.states = Some(base(size_of::<State>(), SOCKETS).context("make the map BASE_OF_STATES")?);
        // The bases are zero, and so are the maps: all that the old ones have is a difference.
        self.join()?;
        step(Step::Copy)
    }

    /// Step 4.
    pub(super) fn commit(&mut self) -> anyhow::Result<()> {
        if self.committed {
            return Ok(());
        }
        // As near to the switch as can be. Nobody but us writes to the new ones yet.
        self.join()?;
        self.mirror()?;
        let (load, states) = self.load.take().zip(self.states.take()).context("copy comes before commit")?;
        syscall::pin(states.as_fd(), &self.new.join(BASE_OF_STATES)).context("pin BASE_OF_STATES")?;
        // Critical section. Dying before it leaves the old pins in force, and after it the new.
        syscall::pin(load.as_fd(), &self.new.join(BASE)).context("pin BASE")?;
        self.committed = true;
        step(Step::Commit)
    }

    /// A part of step 5: the links of the old directory are the new one's too.
    pub(super) fn take_links(&self) -> anyhow::Result<()> {
        for pin in pins::list(&self.old)? {
            let Some(name) = pin.file_name().and_then(|name| name.to_str()) else { continue };
            let is_link = HOOKS.iter().any(|hook| name.starts_with(&format!("{}_link", hook.program)));
            let new = self.new.join(name);
            if is_link && !new.exists() {
                let link = open(&pin)?;
                syscall::pin(link.as_fd(), &new).with_context(|| format!("pin {}", new.display()))?;
            }
        }
        Ok(())
    }

    /// Step 6.
    pub(super) fn settle(&self) -> anyhow::Result<()> {
        step(Step::Switch)?;
        self.join()?;
        for (name, before) in &self.kept.keys {
            if let Some(pair) = self.pair(name)? {
                pair.bring_keys(before).with_context(|| format!("bring what {name} gained"))?;
            }
        }
        if let (Some(before), Some(pair)) = (&self.kept.outcomes, self.pair("OUTCOMES")?) {
            pair.bring_sums(before).context("bring what OUTCOMES gained")?;
        }
        step(Step::Settle)
    }

    /// Step 7.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        pins::remove(&self.old, Some("LOAD"))?;
        step(Step::Clear)?;
        clear_marks(&self.new)?;
        info!("the kernel objects have version {VERSION} now; counts and connections are kept");
        Ok(())
    }

    /// Adds to LOAD and STATES what the old ones gained since the bases, and to the bases.
    fn join(&self) -> anyhow::Result<()> {
        let (load, states);
        let (load, states) = match (&self.load, &self.states) {
            (Some(load), Some(states)) => (load.as_fd(), states.as_fd()),
            _ => {
                (load, states) = (open(&self.new.join(BASE))?, open(&self.new.join(BASE_OF_STATES))?);
                (load.as_fd(), states.as_fd())
            }
        };
        if let Some(pair) = self.pair("LOAD")? {
            pair.join::<Load>(load, 1, LOAD_FIELDS).context("bring what LOAD gained")?;
        }
        if let Some(pair) = self.pair("STATES")? {
            pair.join::<State>(states, SOCKETS, STATE_FIELDS).context("bring what STATES gained")?;
        }
        Ok(())
    }

    /// Makes the other maps that the programs write equal to the old ones, and remembers them.
    fn mirror(&mut self) -> anyhow::Result<()> {
        for name in WRITTEN_BY_PROGRAMS {
            if let Some(pair) = self.pair(name)? {
                self.kept.keys.insert(name, pair.mirror().with_context(|| format!("copy the map {name}"))?);
            }
        }
        if let Some(pair) = self.pair("OUTCOMES")? {
            self.kept.outcomes = Some(pair.mirror_sums().context("copy the map OUTCOMES")?);
        }
        Ok(())
    }

    /// The two maps of this name; `None` if they are one and the same, or the old version has none.
    fn pair(&self, name: &str) -> anyhow::Result<Option<Pair>> {
        let (old, new) = (self.old.join(name), self.new.join(name));
        let Some((old_shape, old_id)) = pins::map(&old)? else { return Ok(None) };
        let (new_shape, new_id) =
            pins::map(&new)?.with_context(|| format!("{} is not there", new.display()))?;
        if old_id == new_id {
            return Ok(None);
        }
        Ok(Some(Pair { old: open(&old)?, new: open(&new)?, old_shape, new_shape }))
    }
}

impl Pair {
    fn old_entries(&self) -> anyhow::Result<Entries<'_>> {
        entries(self.old.as_fd(), self.old_shape)
    }

    fn new_entries(&self) -> anyhow::Result<Entries<'_>> {
        entries(self.new.as_fd(), self.new_shape)
    }

    /// Copies all entries.
    fn copy(&self) -> anyhow::Result<()> {
        for key in self.old_entries()?.keys()? {
            self.copy_one(&key)?;
        }
        Ok(())
    }

    fn copy_one(&self, key: &[u8]) -> anyhow::Result<()> {
        let new = self.new_entries()?;
        if let Some(mut value) = self.old_entries()?.get(key)? {
            value.resize(new.value_size, 0);
            new.set(key, &value)?;
        }
        Ok(())
    }

    /// Makes the new map what the old one is. The keys that there are.
    fn mirror(&self) -> anyhow::Result<HashSet<Vec<u8>>> {
        let keys: HashSet<Vec<u8>> = self.old_entries()?.keys()?.into_iter().collect();
        for key in self.new_entries()?.keys()? {
            if !keys.contains(&key) {
                self.new_entries()?.remove(&key)?;
            }
        }
        for key in &keys {
            self.copy_one(key)?;
        }
        Ok(keys)
    }

    /// Brings what came and went in the old map since it had these keys.
    fn bring_keys(&self, before: &HashSet<Vec<u8>>) -> anyhow::Result<()> {
        let now: HashSet<Vec<u8>> = self.old_entries()?.keys()?.into_iter().collect();
        for key in now.difference(before) {
            if self.new_entries()?.get(key)?.is_none() {
                self.copy_one(key)?;
            }
        }
        for key in before.difference(&now) {
            self.new_entries()?.remove(key)?;
        }
        Ok(())
    }

    /// Copies the counters of each CPU. What they are, by entry.
    fn mirror_sums(&self) -> anyhow::Result<Vec<Vec<u64>>> {
        self.copy()?;
        self.sums()
    }

    fn sums(&self) -> anyhow::Result<Vec<Vec<u64>>> {
        let old = self.old_entries()?;
        let keys = old.keys()?;
        keys.iter().map(|key| Ok(longs(&old.get(key)?.unwrap_or_default()))).collect()
    }

    /// Adds what each CPU's counters gained. What a program counts between the two system calls is
    /// lost; it is a counter of outcomes and not of connections.
    fn bring_sums(&self, before: &[Vec<u64>]) -> anyhow::Result<()> {
        let (keys, now, new) = (self.old_entries()?.keys()?, self.sums()?, self.new_entries()?);
        for ((key, before), now) in keys.iter().zip(before).zip(&now) {
            if before == now {
                continue;
            }
            let counters = longs(&new.get(key)?.unwrap_or_default());
            let sums = counters.iter().zip(now).zip(before).map(|((new, now), before)| new + (now - before));
            new.set(key, &sums.flat_map(u64::to_ne_bytes).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Brings the differences of a map that is memory.
    fn join<T>(&self, base: BorrowedFd<'_>, entries: usize, fields: &[(usize, Field)]) -> anyhow::Result<()> {
        let size = self.old_shape.value as usize;
        ensure!(size.is_multiple_of(8) && size <= size_of::<T>(), "its values have {size} bytes");
        let old = Shared::<T>::of_smaller(self.old.as_fd(), self.old_shape.entries as usize, size)?;
        let new = Shared::<T>::of(self.new.as_fd(), entries)?;
        let base = Shared::<T>::of(base, entries)?;
        for entry in 0..entries.min(self.old_shape.entries as usize) {
            for offset in (0..size).step_by(8) {
                let field = field_at(fields, offset);
                let now = old.long(entry, offset).load(Ordering::SeqCst);
                let before = base.long(entry, offset).load(Ordering::SeqCst);
                if now != before {
                    bring(field, new.long(entry, offset), before, now);
                    base.long(entry, offset).store(now, Ordering::SeqCst);
                }
            }
        }
        Ok(())
    }
}

/// Changes one number by what its old one gained.
fn bring(field: Field, number: &AtomicU64, before: u64, now: u64) {
    let changed =
        number.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |new| Some(join(field, new, before, now)));
    // It always has a new value.
    let _ = changed;
}

/// A number after what its old one gained between `before` and `now` was brought to it.
fn join(field: Field, new: u64, before: u64, now: u64) -> u64 {
    match field {
        Field::Places => word::join(new, before, now),
        Field::Sum => new.wrapping_add(now.wrapping_sub(before)),
        Field::Most => new.max(now),
        Field::First if new == 0 => now,
        Field::First => new,
    }
}

fn field_at(fields: &[(usize, Field)], offset: usize) -> Field {
    fields.iter().rev().find(|(from, _)| *from <= offset).map_or(Field::Sum, |(_, field)| *field)
}

/// What becomes of a map.
fn fate(name: &str, old: Shape, new: Shape) -> Fate {
    if old == new {
        return Fate::Shared;
    }
    let same = old.kind == new.kind && old.key == new.key && old.flags == new.flags;
    match old.kind {
        // Its entries live in sockets, and a socket can be in one SOCKETS only.
        _ if name == "TAG" || name == "SOCKETS" => Fate::Impossible,
        RINGBUF if same => Fate::Dropped,
        ARRAY if same && old.value <= new.value && old.entries <= new.entries => Fate::Grown,
        HASH if same && old.value <= new.value && old.entries <= new.entries => Fate::Grown,
        PERCPU_ARRAY if same && old.value == new.value && old.entries <= new.entries => Fate::Grown,
        _ => Fate::Impossible,
    }
}

fn entries(map: BorrowedFd<'_>, shape: Shape) -> anyhow::Result<Entries<'_>> {
    let cpus = match shape.kind {
        PERCPU_ARRAY => aya::util::nr_cpus().map_err(|(what, error)| anyhow!("read {what}: {error}"))?,
        _ => 1,
    };
    let value_size = match cpus {
        1 if shape.kind != PERCPU_ARRAY => shape.value as usize,
        // The kernel puts each CPU's at a multiple of 8 bytes.
        cpus => (shape.value as usize).next_multiple_of(8) * cpus,
    };
    Ok(Entries { map, key_size: shape.key as usize, value_size, most: shape.entries as usize })
}

fn longs(bytes: &[u8]) -> Vec<u64> {
    let (longs, _) = bytes.as_chunks::<8>();
    longs.iter().map(|&long| u64::from_ne_bytes(long)).collect()
}

fn open(pin: &Path) -> anyhow::Result<OwnedFd> {
    syscall::open_pin(pin).with_context(|| format!("open {}", pin.display()))
}

/// What is done, for tests that die after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Share,
    Load,
    Copy,
    Commit,
    Switch,
    Settle,
    Clear,
}

#[cfg(not(test))]
fn step(_: Step) -> anyhow::Result<()> {
    Ok(())
}

#[cfg(test)]
use tests::step;

#[cfg(test)]
mod tests;
