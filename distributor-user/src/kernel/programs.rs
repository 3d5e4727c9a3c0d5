//! The programs: from the object to pins that the next distributor finds.
//!
//! The verifier takes a fifth of a second for them. So loaded programs are pinned under the stamp
//! of the object they come from, and a distributor of the same build takes them from there;
//! only another build's are loaded, beside those that run, and nothing is switched here.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, MapInfo},
    programs::{
        CgroupSockAddr, ProgramError, ProgramInfo, SkReuseport, SockOps, sk_reuseport::SkReuseportAttachType,
    },
};

use aya_log::EbpfLogger;

use super::{ProgramLog, links::HOOKS, object, pins, pins::Shape, syscall};
use crate::error;

/// Which object programs come from, and what was built into them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(u64);

/// A program that is attached to a cgroup.
pub(super) struct Hooked {
    pub(super) fd: OwnedFd,
    pub(super) id: u32,
}

/// What a service needs, loaded.
pub(super) struct Programs {
    /// By group: each has its group built in.
    pub(super) selects: Vec<SkReuseport>,
    /// By their place in [`HOOKS`].
    pub(super) hooked: Vec<Hooked>,
}

impl Stamp {
    pub(super) fn of(log: ProgramLog) -> Self {
        // Its keys are fixed. Another standard library may hash otherwise; then the same programs
        // are loaded once more.
        let mut hasher = DefaultHasher::new();
        object::object().hash(&mut hasher);
        (log == ProgramLog::On).hash(&mut hasher);
        Self(hasher.finish())
    }

    fn pin(self, pins: &Path, program: &str) -> PathBuf {
        pins.join(format!("{program}-{:016x}", self.0))
    }

    fn select(self, pins: &Path, group: usize) -> PathBuf {
        self.pin(pins, &format!("select{group}"))
    }

    /// Every program of a service with so many groups.
    fn all(self, pins: &Path, groups: usize) -> Vec<PathBuf> {
        let hooks = HOOKS.iter().map(|hook| self.pin(pins, hook.program));
        (0..groups).map(|group| self.select(pins, group)).chain(hooks).collect()
    }
}

impl Programs {
    /// Readers of what they log.
    pub(super) fn logs(&self) -> anyhow::Result<Vec<EbpfLogger<&'static dyn log::Log>>> {
        // `track` and the others of the first object have their log in common with its `select`.
        let logs = self
            .selects
            .iter()
            .map(|select| EbpfLogger::init_from_id(select.info()?.id()).map_err(anyhow::Error::from));
        logs.collect::<Result<_, _>>().context("read the programs' log")
    }
}

/// Whether everything is pinned, programs and maps, and these programs use those maps.
pub(super) fn are_ready(pins: &Path, groups: usize, stamp: Stamp) -> anyhow::Result<bool> {
    let mut maps = Vec::new();
    for name in pins::MAPS {
        let Some((_, id)) = pins::map(&pins.join(name))? else { return Ok(false) };
        maps.push(id);
    }
    for pin in stamp.all(pins, groups) {
        if !pin.exists() {
            return Ok(false);
        }
        // It also has maps of its own, which are not pinned.
        let others = map_ids(&pin)?.into_iter().filter(|id| !maps.contains(id));
        if others.filter_map(name_of).any(|name| pins::MAPS.contains(&name.as_str())) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Pins maps again whose pin is gone, though programs that are pinned still use them.
pub(super) fn restore_maps(pins: &Path) -> anyhow::Result<()> {
    let missing: Vec<&str> = pins::MAPS.into_iter().filter(|name| !pins.join(name).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut used = HashMap::new();
    for program in pins::list(pins)?.iter().filter(|pin| is_program(pin)) {
        for id in map_ids(program)? {
            used.extend(name_of(id).map(|name| (name, id)));
        }
    }
    for name in missing {
        if let Some(&id) = used.get(name) {
            MapData::from_id(id)?.pin(pins.join(name)).with_context(|| format!("pin {name} again"))?;
        }
    }
    Ok(())
}

/// The shapes of the maps that the programs expect.
pub(super) fn shapes() -> anyhow::Result<HashMap<String, Shape>> {
    let object = aya_obj::Object::parse(object::object()).context("read the eBPF object")?;
    let shape = |map: &aya_obj::Map| Shape {
        kind: map.map_type(),
        key: map.key_size(),
        value: map.value_size(),
        entries: map.max_entries(),
        flags: map.map_flags(),
    };
    Ok(object.maps.iter().map(|(name, map)| (name.clone(), shape(map))).collect())
}

/// Loads and pins everything for so many groups, with the maps that are pinned; makes and pins
/// those that are not.
pub(super) fn load(pins: &Path, groups: usize, log: ProgramLog, stamp: Stamp) -> anyhow::Result<()> {
    // Of an attempt that was cut short, or with other maps.
    for pin in stamp.all(pins, groups) {
        pins::remove_pin(&pin)?;
    }
    let level: u8 = match log {
        ProgramLog::Off => 0,
        ProgramLog::On => aya_log::Level::Debug as u8,
    };
    // One loader for all: it reads the types of the whole kernel when it is made, and the
    // programs need none of them.
    let mut loader = EbpfLoader::new();
    loader.btf(None).override_global(aya_log::LEVEL, &level, true);
    for name in pins::MAPS {
        loader.map_pin_path(name, pins.join(name));
    }
    let groups_: Vec<u32> = (0..groups).map(u32::try_from).collect::<Result<_, _>>()?;
    for (group, number) in groups_.iter().enumerate() {
        loader.override_global("GROUP", number, true);
        let mut object =
            loader.load(object::object()).map_err(said_of_maps).context("create the eBPF maps")?;
        load_select(&mut object)?.pin(stamp.select(pins, group)).context("pin the select program")?;
        if group == 0 {
            load_hooked(&mut object, pins, stamp)?;
        }
    }
    Ok(())
}

pub(super) fn load_select(object: &mut Ebpf) -> anyhow::Result<&mut SkReuseport> {
    let select: &mut SkReuseport =
        object.program_mut("select").context("the eBPF object has no select program")?.try_into()?;
    select.load().map_err(said).context("load the select program")?;
    Ok(select)
}

pub(super) fn load_track(object: &mut Ebpf) -> anyhow::Result<&mut SockOps> {
    let track: &mut SockOps =
        object.program_mut("track").context("the eBPF object has no track program")?.try_into()?;
    track.load().map_err(said).context("load the track program")?;
    Ok(track)
}

pub(super) fn load_bind<'a>(object: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut CgroupSockAddr> {
    let bind: &mut CgroupSockAddr = object
        .program_mut(name)
        .with_context(|| format!("the eBPF object has no {name} program"))?
        .try_into()?;
    bind.load().map_err(said).with_context(|| format!("load the {name} program"))?;
    Ok(bind)
}

/// `track` and the bind hooks, which do not depend on the group.
fn load_hooked(object: &mut Ebpf, pins: &Path, stamp: Stamp) -> anyhow::Result<()> {
    load_track(object)?.pin(stamp.pin(pins, "track")).context("pin the track program")?;
    for name in ["bind4", "bind6"] {
        let pinned = load_bind(object, name)?.pin(stamp.pin(pins, name));
        pinned.with_context(|| format!("pin the {name} program"))?;
    }
    Ok(())
}

/// Opens what [`load`] has pinned.
pub(super) fn open(pins: &Path, groups: usize, stamp: Stamp) -> anyhow::Result<Programs> {
    let selects = (0..groups)
        .map(|group| SkReuseport::from_pin(stamp.select(pins, group), SkReuseportAttachType::SelectOrMigrate))
        .collect::<Result<_, _>>()
        .context("open the select program")?;
    let hooked = HOOKS
        .iter()
        .map(|hook| {
            let pin = stamp.pin(pins, hook.program);
            let fd = syscall::open_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
            anyhow::Ok(Hooked { fd, id: ProgramInfo::from_pin(&pin)?.id() })
        })
        .collect::<Result<_, _>>()?;
    Ok(Programs { selects, hooked })
}

/// Removes the pins of all programs but these.
pub(super) fn remove_others(pins: &Path, groups: usize, stamp: Stamp) -> anyhow::Result<()> {
    let ours = stamp.all(pins, groups);
    for pin in pins::list(pins)? {
        if is_program(&pin) && !ours.contains(&pin) {
            pins::remove_pin(&pin)?;
        }
    }
    Ok(())
}

fn is_program(pin: &Path) -> bool {
    pin.file_name().is_some_and(|name| name.to_string_lossy().contains('-'))
}

fn map_ids(program: &Path) -> anyhow::Result<Vec<u32>> {
    let info = ProgramInfo::from_pin(program).with_context(|| format!("open {}", program.display()))?;
    Ok(info.map_ids()?.unwrap_or_default())
}

/// The name of a map, if it is still there.
fn name_of(id: u32) -> Option<String> {
    MapInfo::from_id(id).ok()?.name_as_str().map(str::to_owned)
}

/// What a process needs to load programs, as an operator reads it who is root already.
const RIGHTS: &str = "needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, which root in a container may lack";

/// What the kernel said when maps were to be made.
pub(super) fn said_of_maps(error: EbpfError) -> anyhow::Error {
    let name = match &error {
        EbpfError::MapError(MapError::CreateError { name, .. }) => name.clone(),
        _ => String::new(),
    };
    let error = anyhow::Error::from(error);
    match error.root_cause().downcast_ref::<io::Error>() {
        Some(said) => match why(said, &name) {
            Some(sentence) => anyhow!(sentence),
            None => error,
        },
        None => error,
    }
}

/// What the kernel said, in a sentence, with what to do where that is known.
pub(super) fn said(error: ProgramError) -> anyhow::Error {
    let (io_error, log) = match &error {
        ProgramError::LoadError { io_error, verifier_log } => (io_error, verifier_log.to_string()),
        _ => return anyhow::Error::from(error),
    };
    if let Some(line) = verifiers_reason(&log) {
        return anyhow!("the kernel refused it: {io_error}: {line}");
    }
    match why(io_error, "") {
        Some(sentence) => anyhow!(sentence),
        None if io_error.kind() == io::ErrorKind::InvalidInput => {
            anyhow!("the kernel refused it: {io_error} (needs Linux 6.1 or later)")
        }
        None => anyhow!("the kernel refused it: {io_error}"),
    }
}

/// The last line of the verifier's log that says what was wrong. After it come counts of its own work.
fn verifiers_reason(log: &str) -> Option<&str> {
    let counts = |line: &&str| {
        ["processed ", "verification time ", "stack depth "].iter().any(|count| line.starts_with(count))
    };
    log.lines().rev().map(str::trim).find(|line| !line.is_empty() && !counts(line))
}

/// Why the kernel made no map (by its name) or program, and what to do.
fn why(said: &io::Error, name: &str) -> Option<String> {
    let what = if name.is_empty() { String::new() } else { format!("the map {name}: ") };
    let to_do = match said.raw_os_error()? {
        libc::EPERM | libc::EACCES => RIGHTS,
        // No disk is meant.
        libc::ENOSPC => return None,
        other => error::advice(other)?,
    };
    Some(format!("the kernel refused it: {what}{said} ({to_do})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_lacks_is_said_with_what_to_do() {
        for (errno, name, words) in [
            (libc::EPERM, "", "CAP_BPF"),
            (libc::ENOMEM, "OWNERS", "the map OWNERS: "),
            (libc::ENOMEM, "LOAD", "memory.max"),
            (libc::E2BIG, "LOAD", "free some memory"),
            (libc::EMFILE, "PLAN", "LimitNOFILE"),
            (libc::ENFILE, "PLAN", "fs.file-max"),
        ] {
            let sentence = why(&io::Error::from_raw_os_error(errno), name).unwrap();
            assert!(
                sentence.starts_with("the kernel refused it: ") && sentence.contains(words),
                "{sentence}"
            );
        }
        assert_eq!(why(&io::Error::from_raw_os_error(libc::EBUSY), "PLAN"), None);
    }

    #[test]
    fn the_verifiers_reason_stands_before_its_counts() {
        let counts =
            "verification time 91 usec\nstack depth 0\nprocessed 12 insns (limit 1000000) total_states 0\n";
        let reason = "12: (85) call unknown#999\ninvalid func unknown#999\n";
        assert_eq!(verifiers_reason(&format!("{reason}{counts}")), Some("invalid func unknown#999"));
        assert_eq!(verifiers_reason(""), None);
        assert_eq!(verifiers_reason("processed 12 insns (limit 1000000) total_states 0\n"), None);
    }
}
