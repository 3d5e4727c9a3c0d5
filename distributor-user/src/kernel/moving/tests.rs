//! Which pins are in force, and dying after every step of a move.
#![forbid(unsafe_code)]

use std::{
    cell::Cell,
    fs,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use proptest::prelude::*;
use rustix::mount::{MountFlags, UnmountFlags};
use socket2::{Domain, Socket, Type};

use super::*;
use crate::{
    cgroup::{self, Cgroup},
    kernel::{Kernel, ProgramLog},
    record,
};

thread_local! {
    static DIES_AFTER: Cell<Option<Step>> = const { Cell::new(None) };
}

/// The step that is done: dies after it, if a test wants that.
pub(super) fn step(step: Step) -> anyhow::Result<()> {
    ensure!(DIES_AFTER.get() != Some(step), "died after {step:?}");
    Ok(())
}

const STEPS: [Step; 7] =
    [Step::Share, Step::Load, Step::Copy, Step::Commit, Step::Switch, Step::Settle, Step::Clear];

fn found(version: u32) -> Found {
    Found { version, committed: false }
}

fn committed(version: u32) -> Found {
    Found { version, committed: true }
}

#[test]
fn the_lowest_version_is_in_force_until_a_higher_one_has_committed() {
    let moves = |from, committed| Decision::Move { from, committed };
    for (what, there, decision) in [
        ("nothing", vec![], Decision::Ours),
        ("ours", vec![found(5)], Decision::Ours),
        ("ours, and the mark of a move that is over", vec![committed(5)], Decision::Ours),
        ("an older one", vec![found(3)], moves(3, false)),
        ("a move that had begun", vec![found(5), found(3)], moves(3, false)),
        ("a move that has committed", vec![found(3), committed(5)], moves(3, true)),
        ("another's move that had begun", vec![found(3), found(4)], moves(3, false)),
        ("another's move that has committed", vec![found(3), committed(4)], Decision::Refuse { version: 4 }),
        ("a newer one", vec![found(6)], Decision::Refuse { version: 6 }),
        ("a newer one's move that had begun", vec![found(5), found(6)], Decision::Ours),
        (
            "a newer one's move that has committed",
            vec![found(5), committed(6)],
            Decision::Refuse { version: 6 },
        ),
        ("one that had begun from an older one", vec![found(4), found(6)], moves(4, false)),
    ] {
        assert_eq!(decide(&there, 5), decision, "{what}");
    }
}

#[test]
fn what_becomes_of_a_map_is_told_by_its_shape() {
    let shape = |kind, value, entries| Shape { kind, key: 4, value, entries, flags: 0 };
    let other_flags = Shape { flags: 1, ..shape(ARRAY, 8, 1) };
    for (what, name, old, new, expected) in [
        ("the same", "PLAN", shape(ARRAY, 8, 1), shape(ARRAY, 8, 1), Fate::Shared),
        ("a longer value", "LOAD", shape(ARRAY, 8, 1), shape(ARRAY, 16, 1), Fate::Grown),
        ("more entries", "HASH", shape(ARRAY, 8, 1), shape(ARRAY, 8, 2), Fate::Grown),
        ("a shorter value", "LOAD", shape(ARRAY, 16, 1), shape(ARRAY, 8, 1), Fate::Impossible),
        ("fewer entries", "HOME", shape(HASH, 8, 9), shape(HASH, 8, 8), Fate::Impossible),
        ("another type", "HOME", shape(HASH, 8, 9), shape(ARRAY, 8, 9), Fate::Impossible),
        ("other flags", "PLAN", shape(ARRAY, 8, 1), other_flags, Fate::Impossible),
        ("more outcomes", "OUTCOMES", shape(PERCPU_ARRAY, 8, 9), shape(PERCPU_ARRAY, 8, 10), Fate::Grown),
        ("a longer ring", "EVENTS", shape(RINGBUF, 0, 4096), shape(RINGBUF, 0, 8192), Fate::Dropped),
        ("a longer tag", "TAG", shape(24, 16, 0), shape(24, 24, 0), Fate::Impossible),
        ("more sockets", "SOCKETS", shape(20, 4, 9), shape(20, 4, 10), Fate::Impossible),
    ] {
        assert_eq!(fate(name, old, new), expected, "{what}");
    }
}

#[test]
fn every_field_that_the_programs_count_has_its_way() {
    let starts = |fields: &[(usize, Field)]| fields.iter().map(|(at, _)| *at).collect::<Vec<_>>();
    for fields in [LOAD_FIELDS, STATE_FIELDS] {
        assert!(starts(fields).is_sorted() && fields[0].0 == 0, "{fields:?}");
    }
    assert_eq!(field_at(LOAD_FIELDS, offset_of!(Load, word) + 8 * 255), Field::Places);
    assert_eq!(field_at(LOAD_FIELDS, offset_of!(Load, turn)), Field::Most);
    assert_eq!(field_at(LOAD_FIELDS, offset_of!(Load, waiting)), Field::Sum);
    assert_eq!(field_at(STATE_FIELDS, offset_of!(State, gone)), Field::Sum);
    assert_eq!(field_at(STATE_FIELDS, offset_of!(State, since)), Field::First);
}

proptest! {
    /// Both programs count, each in its map; joined as often as one likes, the sum is what it
    /// would be in one.
    #[test]
    fn sums_that_are_counted_in_two_maps_are_joined_exactly(
        steps in prop::collection::vec((0..3u8, -5..5i64), 0..100),
        start in any::<u64>(),
    ) {
        let (mut old, mut new, mut base, mut sum) = (start, start, start, start);
        for (step, change) in steps {
            match step {
                0 => (old, sum) = (old.wrapping_add_signed(change), sum.wrapping_add_signed(change)),
                1 => (new, sum) = (new.wrapping_add_signed(change), sum.wrapping_add_signed(change)),
                _ => (new, base) = (join(Field::Sum, new, base, old), old),
            }
        }
        prop_assert_eq!(join(Field::Sum, new, base, old), sum);
    }

    #[test]
    fn what_never_becomes_smaller_does_not(old in any::<u64>(), new in any::<u64>(), base in any::<u64>()) {
        prop_assert!(join(Field::Most, new, base, old) >= new.max(old));
    }
}

/// What the names of worlds begin with. They end in pid and start time of the test's process.
const PREFIX: &str = "dist-ctl-moving-";

/// Whether the process that made what has this name lives.
fn is_in_use(name: &str) -> bool {
    let mut parts = name.rsplit('-');
    let (started, pid) = (parts.next(), parts.next());
    let number = |part: Option<&str>| part.and_then(|part| part.parse().ok());
    match (number(pid), number(started)) {
        (Some(pid), Some(started)) => {
            u32::try_from(pid).is_ok_and(|pid| record::start_time(pid) == Some(started))
        }
        _ => false,
    }
}

/// Removes the worlds of tests that were killed and so could not do it themselves.
fn remove_leftovers() {
    let cgroups = cgroup::mount_point().unwrap();
    for place in [std::env::temp_dir(), cgroups] {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(PREFIX) && !is_in_use(&name) {
                remove_world(&entry.path());
            }
        }
    }
}

/// A bpffs, or a cgroup. If it is neither any more, another test has just removed it.
fn remove_world(path: &Path) {
    // A link whose pin is gone lets go of the cgroup.
    let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
    let deadline = Instant::now() + Duration::from_secs(5);
    while path.exists() && fs::remove_dir(path).is_err() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A bpffs, a cgroup and a listener of this test's own.
struct World {
    bpffs: PathBuf,
    cgroup: Cgroup,
    listener: Socket,
}

impl World {
    /// `None` without the rights to it.
    fn new(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("left out: only root can load programs");
            return None;
        }
        remove_leftovers();
        let me = std::process::id();
        let started = record::start_time(me).unwrap();
        let name = format!("{PREFIX}{name}-{me}-{started}");
        let bpffs = std::env::temp_dir().join(&name);
        fs::create_dir_all(&bpffs).unwrap();
        rustix::mount::mount("bpf", &bpffs, "bpf", MountFlags::empty(), Some(c"mode=0700")).unwrap();
        let cgroup = Cgroup::at(cgroup::mount_point().unwrap().join(&name));
        cgroup.create().unwrap();
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.set_reuse_port(true).unwrap();
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(1).unwrap();
        Some(Self { bpffs, cgroup, listener })
    }

    fn pins(&self, version: u32) -> PathBuf {
        self.bpffs.join(pins::directory("app", version))
    }

    /// What a distributor does that takes over.
    fn take_over(&self) -> anyhow::Result<Kernel> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _context = runtime.enter();
        let (mut kernel, ..) = Kernel::open(&self.pins(VERSION), self.cgroup.path(), 1, ProgramLog::Off)?;
        kernel.take_charge(&[&self.listener])?;
        Ok(kernel)
    }

    /// Makes what is there the older version's: with shorter values, and fewer outcomes.
    fn age(&self) {
        let old = self.pins(VERSION - 1);
        fs::rename(self.pins(VERSION), &old).unwrap();
        for (name, cut, fewer) in [
            ("LOAD", 8, 0),
            ("STATES", 8, 0),
            ("OWNERS", 8, 0),
            ("PARKED", 4, 0),
            ("HOME", 4, 0),
            ("OUTCOMES", 0, 1),
            ("PLAN", 8, 0),
        ] {
            let pin = old.join(name);
            let (shape, _) = pins::map(&pin).unwrap().unwrap();
            let shape = Shape { value: shape.value - cut, entries: shape.entries - fewer, ..shape };
            fs::remove_file(&pin).unwrap();
            syscall::pin(syscall::create_map(shape).unwrap().as_fd(), &pin).unwrap();
        }
    }

    /// The old programs count.
    fn count(&self) {
        let old = self.pins(VERSION - 1);
        let Some((shape, _)) = pins::map(&old.join("LOAD")).unwrap() else { return };
        let load = open(&old.join("LOAD")).unwrap();
        let load = Shared::<Load>::of_smaller(load.as_fd(), 1, shape.value as usize).unwrap();
        load.long(0, offset_of!(Load, total)).fetch_add(1, Ordering::SeqCst);
        load.long(0, offset_of!(Load, word)).fetch_add(1, Ordering::SeqCst);
        let states = open(&old.join("STATES")).unwrap();
        let states = Shared::<State>::of_smaller(states.as_fd(), SOCKETS, size_of::<State>() - 8).unwrap();
        states.long(7, offset_of!(State, completed)).fetch_add(1, Ordering::SeqCst);
        states.long(7, offset_of!(State, first)).store(77, Ordering::SeqCst);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        remove_world(&self.bpffs);
        remove_world(self.cgroup.path());
    }
}

#[test]
fn what_a_killed_test_left_is_removed_by_the_next_one_and_nothing_else() {
    let Some(world) = World::new("kept") else { return };
    // Of a process that is gone: no process has this number.
    let name = format!("{PREFIX}left-4194999-1");
    let (bpffs, cgroup) = (std::env::temp_dir().join(&name), cgroup::mount_point().unwrap().join(&name));
    fs::create_dir_all(&bpffs).unwrap();
    rustix::mount::mount("bpf", &bpffs, "bpf", MountFlags::empty(), Some(c"mode=0700")).unwrap();
    fs::create_dir_all(&cgroup).unwrap();
    remove_leftovers();
    assert!(!bpffs.exists() && !cgroup.exists());
    assert!(world.bpffs.exists() && world.cgroup.exists());
}

#[test]
fn dying_after_any_step_leaves_what_the_next_one_finishes() {
    let Some(world) = World::new("steps") else { return };
    for dies_after in STEPS {
        drop(world.take_over().unwrap());
        world.age();
        let [owner, home] = [("OWNERS", 16), ("HOME", 4)].map(|(name, size)| {
            let map = open(&world.pins(VERSION - 1).join(name)).unwrap();
            let key = 5u64.to_ne_bytes();
            let entries = Entries { map: map.as_fd(), key_size: 8, value_size: size, most: 9 };
            entries.set(&key, &vec![9; size]).unwrap();
            key
        });
        world.count();
        DIES_AFTER.set(Some(dies_after));
        let error = world.take_over().map(drop).unwrap_err();
        assert_eq!(error.to_string(), format!("died after {dies_after:?}"));
        // What still runs, or ran in the instant of the switch.
        let counts = if world.pins(VERSION - 1).exists() { 2 } else { 1 };
        world.count();
        DIES_AFTER.set(None);
        let kernel = world.take_over().unwrap_or_else(|error| panic!("after {dies_after:?}: {error:#}"));

        let load = kernel.load().unwrap();
        assert_eq!((load.total[0], word::active(load.word[0])), (counts, counts), "after {dies_after:?}");
        let new = world.pins(VERSION);
        let map = open(&new.join("STATES")).unwrap();
        let states = Shared::<State>::of(map.as_fd(), SOCKETS).unwrap();
        assert_eq!(states.long(7, offset_of!(State, completed)).load(Ordering::SeqCst), counts);
        assert_eq!(states.long(7, offset_of!(State, first)).load(Ordering::SeqCst), 77);
        for (name, key, kept, size) in [("OWNERS", owner, 16, 24), ("HOME", home, 4, 8)] {
            let map = open(&new.join(name)).unwrap();
            let entries = Entries { map: map.as_fd(), key_size: 8, value_size: size, most: 9 };
            let mut expected = vec![9; kept];
            expected.resize(size, 0);
            assert_eq!(entries.get(&key).unwrap(), Some(expected), "{name} after {dies_after:?}");
            entries.remove(&key).unwrap();
        }
        assert!(!world.pins(VERSION - 1).exists() && !new.join(BASE).exists(), "after {dies_after:?}");
        assert!(!new.join(BASE_OF_STATES).exists(), "after {dies_after:?}");
        // Ours are attached.
        let number = super::super::links::number(world.cgroup.path()).unwrap();
        for hook in HOOKS {
            let link = hook.link(&new, number).unwrap().expect("a link to the cgroup");
            let info = syscall::link_info(link.as_fd()).unwrap();
            assert!(kernel.programs.hooked.iter().any(|ours| ours.id == info.program), "{hook:?}");
        }
        drop(kernel);
        pins::remove(&new, None).unwrap();
    }
}

#[test]
fn a_move_that_cannot_be_changes_nothing() {
    let Some(world) = World::new("impossible") else { return };
    drop(world.take_over().unwrap());
    fs::rename(world.pins(VERSION), world.pins(VERSION - 1)).unwrap();
    let old = world.pins(VERSION - 1);
    let pin = old.join("HOME");
    let (shape, _) = pins::map(&pin).unwrap().unwrap();
    fs::remove_file(&pin).unwrap();
    let longer = Shape { value: shape.value + 8, ..shape };
    syscall::pin(syscall::create_map(longer).unwrap().as_fd(), &pin).unwrap();
    let before = pins::list(&old).unwrap().len();
    let error = world.take_over().map(drop).unwrap_err().to_string();
    assert!(error.starts_with("the map HOME of version ") && error.contains("dist-ctl down"), "{error}");
    assert_eq!(pins::list(&old).unwrap().len(), before);
}

#[test]
fn a_newer_versions_pins_are_refused_with_what_to_do() {
    let Some(world) = World::new("newer") else { return };
    drop(world.take_over().unwrap());
    fs::rename(world.pins(VERSION), world.pins(VERSION + 1)).unwrap();
    let error = world.take_over().map(drop).unwrap_err().to_string();
    let sentence = format!("have version {}, and this one has version {VERSION}", VERSION + 1);
    assert!(error.contains(&sentence) && error.contains("start that dist-ctl again"), "{error}");
    assert!(!world.pins(VERSION).exists());
}

#[test]
fn pins_that_were_removed_are_made_again_and_are_the_same() {
    let Some(world) = World::new("heal") else { return };
    let mut kernel = world.take_over().unwrap();
    assert_eq!(kernel.heal(|| Ok(())).unwrap(), None);
    let pins = world.pins(VERSION);
    let all = pins::list(&pins).unwrap().len();
    let before = pins::map(&pins.join("LOAD")).unwrap();
    pins::remove(&pins, None).unwrap();
    let said = kernel.heal(|| Ok(())).unwrap().expect("it was healed");
    assert!(said.starts_with(&format!("{all} pins in ")), "{said}");
    assert_eq!(pins::map(&pins.join("LOAD")).unwrap(), before);
    assert_eq!(kernel.heal(|| Ok(())).unwrap(), None);
    // Another one finds all of it.
    let another = world.take_over().unwrap();
    assert_eq!(another.programs.hooked[0].id, kernel.programs.hooked[0].id);
}

#[test]
fn a_map_whose_pin_is_gone_is_found_by_the_programs_that_use_it() {
    let Some(world) = World::new("restore") else { return };
    drop(world.take_over().unwrap());
    let pin = world.pins(VERSION).join("LOAD");
    let before = pins::map(&pin).unwrap();
    fs::remove_file(&pin).unwrap();
    drop(world.take_over().unwrap());
    assert_eq!(pins::map(&pin).unwrap(), before);
}

#[test]
fn a_cgroup_that_was_made_anew_is_attached_to() {
    let Some(world) = World::new("cgroup") else { return };
    let mut kernel = world.take_over().unwrap();
    let before = super::super::links::number(world.cgroup.path()).unwrap();
    world.cgroup.remove().unwrap();
    let said = kernel.heal(|| Ok(())).unwrap().expect("it was healed");
    assert!(said.ends_with("was removed and made anew; track, bind4, bind6 attached to it"), "{said}");
    let after = super::super::links::number(world.cgroup.path()).unwrap();
    assert_ne!(before, after);
    for hook in HOOKS {
        assert!(hook.link(&world.pins(VERSION), after).unwrap().is_some(), "{hook:?}");
    }
    assert_eq!(kernel.heal(|| Ok(())).unwrap(), None);
}
