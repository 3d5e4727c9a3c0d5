//! `cargo xtask vm`: the integration tests on other kernels, each in a virtual machine.
//!
//! Fetches kernels as Debian's packages without installing them, packs the tests' programs into an
//! initramfs, boots each kernel under qemu, and gives a verdict for each. What it needs of the
//! host, beside what building takes, is qemu, which it installs, and root, to share /usr with the guests.
//!
//! A guest that hangs, panics, has not run each test that it was given, or whose doctor does not say of
//! its kernel what is known of it, has failed.

#![forbid(unsafe_code)]

mod archive;
mod kernels;
mod machine;
mod modules;
mod plan;
mod programs;
mod table;

use std::{
    fs::{self, File},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    slice,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{
    exec::{is_root, say, target},
    interrupt,
    packages::{self, Package},
    setup,
};
use archive::Archive;
use kernels::{KNOWN, Kernel, Known, Role};
use machine::{Access, Ended, Machine, Share, Verdict};
use plan::{Choice, LIMIT, Layout, Run, Wanted};
use programs::Program;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Which: 5.10, 6.1, 6.12, 7, no-wake (one that moves connections without waking servers), all,
    /// or the path of one that can be booted or of unpacked packages. What was fetched once is used
    /// again: remove target/vm/kernels to fetch newer ones
    #[arg(long, value_name = "6.1|6.12|7|all|PATH", default_value = "all", value_parser = which)]
    kernel: Which,
    /// The kernel at PATH moves connections without waking servers (it lacks "tcp: call
    /// sk_data_ready() after listener migration")
    #[arg(long)]
    no_wake: bool,
    /// Only tests that have this in PROGRAM::TEST, such as `waiting::` or `crash`; may be given again
    #[arg(long, value_name = "FILTER", conflicts_with = "core")]
    test: Vec<String>,
    /// Only the tests that tell in a few minutes whether a kernel will do
    #[arg(long)]
    core: bool,
    /// Only with this layout of cgroups
    #[arg(long, value_enum)]
    cgroups: Option<Layout>,
    /// Write docs/kernels.md: what dist-ctl doctor says on each kernel
    #[arg(long, conflicts_with_all = ["test", "cgroups"])]
    write: bool,
    /// How many guests at a time [default: as CPUs and memory allow]
    #[arg(long, value_name = "NUMBER")]
    jobs: Option<NonZeroUsize>,
}

/// Which kernels are meant.
#[derive(Clone)]
enum Which {
    All,
    One(&'static Known),
    At(Kernel),
}

/// A path is looked at once, and made absolute, because the directory is changed later.
fn which(text: &str) -> Result<Which, String> {
    if text == "all" {
        return Ok(Which::All);
    }
    if let Some(known) = Known::named(text) {
        return Ok(Which::One(known));
    }
    let names: Vec<_> = KNOWN.iter().map(|known| known.name).collect();
    let path = Path::new(text)
        .canonicalize()
        .map_err(|error| format!("neither all nor one of {}, nor a path: {error}", names.join(", ")))?;
    Kernel::at(&path).map(Which::At).map_err(|error| format!("{error:#}"))
}

/// One guest to boot.
struct Guest<'g> {
    kernel: &'g Kernel,
    layout: Layout,
    choice: Choice<'g>,
}

/// A row of the table.
struct Row {
    name: String,
    release: String,
    verdict: Verdict,
    /// What `dist-ctl doctor --json` said.
    doctor: Option<String>,
    left_out: usize,
    took: Duration,
    failure: Option<String>,
}

impl Row {
    fn of(name: &str, release: &str) -> Self {
        Self {
            name: name.to_owned(),
            release: release.to_owned(),
            verdict: Verdict::default(),
            doctor: None,
            left_out: 0,
            took: Duration::ZERO,
            failure: None,
        }
    }
}

pub(crate) fn run(workspace: &Path, arguments: &Arguments) -> Result<()> {
    let wanted = match (&arguments.test[..], arguments.core) {
        ([], true) => Wanted::Core,
        ([], false) => Wanted::All,
        (filters, _) => Wanted::Containing(filters),
    };
    let mut which = arguments.kernel.clone();
    ensure!(
        !arguments.write || matches!(which, Which::All),
        "--write writes of all kernels, and --kernel names one: leave that out"
    );
    if arguments.no_wake {
        let Which::At(kernel) = &mut which else {
            bail!("--no-wake says of the kernel at a path what nobody else knows: give --kernel PATH");
        };
        kernel.role = Role::NeverWakes;
    }
    let rows = boot_all(workspace, &which, wanted, arguments.cgroups, arguments.jobs)?;
    succeeded(&rows)?;
    if arguments.write {
        let file = workspace.join("docs/kernels.md");
        fs::write(&file, kernels_page(&rows)?).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// docs/kernels.md. Of each kernel one guest is enough: its cgroups make no difference to the doctor.
fn kernels_page(rows: &[Row]) -> Result<String> {
    let mut documents = Vec::new();
    let mut releases = Vec::new();
    for row in rows {
        if !releases.contains(&&row.release) {
            releases.push(&row.release);
            documents
                .push(row.doctor.as_ref().with_context(|| format!("{}: its doctor said nothing", row.name))?);
        }
    }
    Ok(format!(
        "# Kernels\n\nWhat [`dist-ctl doctor`](doctor.md) says on Debian's kernels, each in a virtual machine: written by \
         `cargo xtask vm --core --write`.\n\n{}",
        table::table(&documents)?
    ))
}

/// One kernel with the core tests, for CI; how many of them passed.
pub(crate) fn core(workspace: &Path) -> Result<usize> {
    let oldest = Known::named("6.1").context("it is one of those that are known")?;
    succeeded(&boot_all(workspace, &Which::One(oldest), Wanted::Core, Some(Layout::Unified), None)?)
}

fn boot_all(
    workspace: &Path,
    which: &Which,
    wanted: Wanted<'_>,
    layout: Option<Layout>,
    jobs: Option<NonZeroUsize>,
) -> Result<Vec<Row>> {
    prepare()?;
    let directory = target()?.join("vm");
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    // Until we end. Two runs would write the same files.
    let lock = File::create(directory.join("lock")).context("create a lock")?;
    ensure!(lock.try_lock().is_ok(), "another cargo xtask vm is running in {}", directory.display());
    // So that nothing has to be built to learn that a kernel is not to be had.
    let Found { kernels, skipped, mut rows } = find_kernels(which, &directory)?;
    setup::run(workspace)?;
    let programs = programs::build()?;

    let guests = guests(&kernels, &programs, wanted, layout);
    ensure!(!guests.is_empty(), "no test is left that could be run");
    let runs = || guests.iter().flat_map(|guest| guest.choice.boots.iter().flatten());
    let packed: Vec<&Program> =
        programs.iter().filter(|program| runs().any(|run| run.program.name == program.name)).collect();
    let common = programs::pack(workspace, &directory, &packed)?.finish()?;

    let at_once = jobs.map_or_else(at_once, |jobs| Ok(jobs.get()))?;
    interrupt::note();
    rows.extend(boot_guests(&guests, &common, &directory, at_once.min(guests.len())));
    show(&rows, &skipped);
    ensure!(!interrupt::asked(), "interrupted");
    Ok(rows)
}

/// How many tests passed, if all did.
fn succeeded(rows: &[Row]) -> Result<usize> {
    let failed: Vec<_> =
        rows.iter().filter(|row| row.failure.is_some()).map(|row| row.name.as_str()).collect();
    ensure!(failed.is_empty(), "{} of {} guests failed: {}", failed.len(), rows.len(), failed.join(", "));
    Ok(rows.iter().map(|row| row.verdict.passed).sum())
}

/// Sees that guests can be booted: installs qemu and what shares directories with a guest.
pub(crate) fn prepare() -> Result<()> {
    ensure!(is_root()?, "boot a kernel: virtiofsd shares /usr with the guest as root only: run this as root");
    if !machine::is_here() && packages::here() {
        // Without which a package that holds the daemon alone is not asked for.
        let why = "a guest runs in it";
        packages::install("vm", vec![Package::new("qemu-system-x86", why)])?;
        if machine::sharing().is_none() {
            packages::install("vm", vec![Package::new("virtiofsd", "a guest sees the host's /usr by it")])?;
        }
    }
    ensure!(
        machine::is_here(),
        "boot a kernel: there is no {} or no virtiofsd here, and no Debian package to install: install qemu and \
         virtiofsd, then run this again",
        machine::QEMU
    );
    Ok(())
}

/// What became of the search for kernels.
#[derive(Default)]
struct Found {
    kernels: Vec<Kernel>,
    /// A line for each that is not to be had, and need not be.
    skipped: Vec<String>,
    /// Of those that should have been found.
    rows: Vec<Row>,
}

fn find_kernels(which: &Which, directory: &Path) -> Result<Found> {
    let mut found = Found::default();
    let known = match which {
        Which::At(kernel) => return Ok(Found { kernels: vec![kernel.clone()], ..found }),
        Which::One(known) => slice::from_ref(*known),
        Which::All => {
            found.skipped.push(kernels::ABSENT.to_owned());
            &KNOWN[..]
        }
    };
    for known in known {
        match known.fetch(directory) {
            Ok(Some(kernel)) => found.kernels.push(kernel),
            Ok(None) => found.skipped.push(format!(
                "{}: SKIPPED: it is not offered any more, or its lists of packages could not be fetched",
                known.name
            )),
            Err(error) if matches!(which, Which::All) => {
                let failure = format!("{error:#}");
                say(&format!("{}: FAILED: {failure}", known.name));
                found.rows.push(Row { failure: Some(failure), ..Row::of(known.name, "") });
            }
            Err(error) => return Err(error),
        }
    }
    for line in &found.skipped {
        say(&format!("vm: {line}"));
    }
    ensure!(!found.kernels.is_empty(), "there is no kernel to boot: see above why");
    Ok(found)
}

fn guests<'g>(
    kernels: &'g [Kernel],
    programs: &'g [Program],
    wanted: Wanted<'_>,
    layout: Option<Layout>,
) -> Vec<Guest<'g>> {
    let mut guests = Vec::new();
    for kernel in kernels {
        for one in [Layout::Unified, Layout::Hybrid] {
            if layout.is_some_and(|only| only != one) {
                continue;
            }
            let choice = plan::choose(programs, wanted, kernel.role, one);
            for line in &choice.reasons {
                say(&format!("{} {one}: LEFT OUT: {line}", kernel.name));
            }
            if !choice.boots.is_empty() {
                guests.push(Guest { kernel, layout: one, choice });
            }
        }
    }
    guests
}

/// A row for each guest, unless we are interrupted.
fn boot_guests(guests: &[Guest<'_>], common: &[u8], directory: &Path, at_once: usize) -> Vec<Row> {
    say(&format!("vm: guests: {}, of which {at_once} at a time", guests.len()));
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while !interrupt::asked() {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(guest) = guests.get(number) else {
                        break;
                    };
                    let row = boot_guest(guest, common, directory);
                    rows.lock().expect("nobody panics with it").push((number, row));
                }
            });
        }
    });
    let mut rows = rows.into_inner().expect("nobody panics with it");
    rows.sort_by_key(|(number, _)| *number);
    rows.into_iter().map(|(_, row)| row).collect()
}

/// Boots it; what keeps it from that is its row's failure, and no other's.
fn boot_guest(guest: &Guest<'_>, common: &[u8], directory: &Path) -> Row {
    let Guest { kernel, layout, choice } = guest;
    let name = format!("{} {layout}", kernel.name);
    let mut row = Row { left_out: choice.left_out, ..Row::of(&name, &kernel.release) };
    let booted = boot_all_of(guest, common, directory, &mut row);
    let failure = match (booted, &row.doctor) {
        (Err(error), _) => Some(format!("{error:#}")),
        (Ok(()), None) => Some("its doctor said nothing".to_owned()),
        (Ok(()), Some(said)) => table::objection(said, kernel.role),
    };
    if let Some(failure) = failure {
        say(&format!("{}: FAILED: {failure}", row.name));
        row.failure.get_or_insert(failure);
    }
    row
}

/// As many as memory and CPUs allow.
fn at_once() -> Result<usize> {
    let cpus = thread::available_parallelism().context("count the CPUs")?.get();
    let memory = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let available = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .ok_or_else(|| anyhow!("/proc/meminfo does not say what is available"))?;
    // Its initramfs is in memory twice.
    let guests = available / 1024 / (machine::MEMORY + 512);
    Ok(usize::try_from(guests).unwrap_or(usize::MAX).min(cpus / machine::CPUS as usize).max(1))
}

/// Boots it as often as its plan says, and adds up.
fn boot_all_of(guest: &Guest<'_>, common: &[u8], directory: &Path, row: &mut Row) -> Result<()> {
    let Guest { kernel, layout, choice } = guest;
    let name = row.name.clone();
    let file = |end: &str| directory.join(format!("{}-{layout}.{end}", kernel.name));
    let kept = file("kept");
    if kept.exists() {
        fs::remove_dir_all(&kept).context("remove what the last run kept")?;
    }
    fs::create_dir_all(&kept).context("make a directory for what boots have in common")?;
    let shares = [
        Share { tag: "usr", source: "/usr".into(), directory: "/usr", access: Access::Read },
        Share { tag: "kept", source: kept, directory: "/kept", access: Access::Write },
    ];
    for (number, runs) in choice.boots.iter().enumerate() {
        let log = file(&format!("{}.log", number + 1));
        let initramfs = log.with_extension("cpio");
        let own = own_part(guest, &shares, runs)?;
        // Large, and not to stay whatever happens.
        let initramfs = Temporary(initramfs);
        fs::write(&initramfs.0, [common, &own].concat())
            .with_context(|| format!("write {}", initramfs.0.display()))?;
        let around = Duration::from_secs(120);
        let machine = Machine {
            name: &name,
            kernel: &kernel.image,
            initramfs: &initramfs.0,
            shares: &shares,
            log: &log,
            silence: LIMIT + around,
            limit: LIMIT * u32::try_from(runs.len())? + around,
        };
        let Ended { verdict, doctor, problem, last_lines, took } = machine.run()?;
        row.took += took;
        row.doctor = row.doctor.take().or(doctor);
        if let Some(Verdict { passed, failed, missing }) = verdict {
            row.verdict.passed += passed;
            row.verdict.failed += failed;
            row.verdict.missing += missing;
        }
        let wanted = runs.iter().map(|run| run.tests.len()).sum();
        if let Some(failure) = problem.or_else(|| judged(verdict, wanted)) {
            say(&format!("{name}: FAILED: {failure}; its last lines, of {}:", log.display()));
            for line in last_lines {
                say(&format!("{name}: | {line}"));
            }
            row.failure.get_or_insert(failure);
        }
    }
    Ok(())
}

/// A file that goes with this.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may not even be there.
        let _ = fs::remove_file(&self.0);
    }
}

/// What only this boot has: modules and a plan.
fn own_part(guest: &Guest<'_>, shares: &[Share], runs: &[Run<'_>]) -> Result<Vec<u8>> {
    let modules = match guest.kernel.modules()? {
        Some(all) => {
            let (modules, absent) = all.in_order(&modules::WANTED)?;
            for module in absent {
                say(&format!("vm: {} has no module {module}, nor is it built in", guest.kernel.release));
            }
            modules
        }
        None => {
            say(&format!(
                "vm: {} came without modules, and has to have {} built in: otherwise give the directory into which \
                 its packages were unpacked",
                guest.kernel.name,
                modules::WANTED.join(", ")
            ));
            Vec::new()
        }
    };
    let mut archive = Archive::new()?;
    let mut files = Vec::new();
    for module in &modules {
        let file = format!("/modules/{}.ko", module.name);
        archive.bytes(Path::new(&file), 0o644, &module.bytes)?;
        files.push(file);
    }
    archive.text(Path::new("/plan"), &plan::text(guest.layout, &files, shares, runs))?;
    archive.finish()
}

/// Why a verdict is not a success.
fn judged(verdict: Option<Verdict>, wanted: usize) -> Option<String> {
    match verdict {
        None => Some("it ended without a verdict".to_owned()),
        Some(Verdict { passed, failed: 0, missing: 0 }) if passed == wanted => None,
        Some(Verdict { passed, failed, missing }) => Some(format!(
            "of {wanted} tests {passed} passed, {failed} failed and {missing} were not heard of"
        )),
    }
}

fn show(rows: &[Row], skipped: &[String]) {
    say("");
    say(&format!(
        "{:16} {:26} {:>6} {:>6} {:>7} {:>8} {:>7}",
        "guest", "kernel", "passed", "failed", "missing", "left out", "seconds"
    ));
    for row in rows {
        let Row {
            name, release, verdict: Verdict { passed, failed, missing }, left_out, took, failure, ..
        } = row;
        let seconds = took.as_secs();
        let failure = failure.as_ref().map_or("ok".to_owned(), |failure| format!("FAILED: {failure}"));
        say(&format!(
            "{name:16} {release:26} {passed:6} {failed:6} {missing:7} {left_out:8} {seconds:7} {failure}"
        ));
    }
    for line in skipped {
        say(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_all_tests_passing_is_a_success() {
        let verdict = |passed, failed, missing| Some(Verdict { passed, failed, missing });
        for (row, verdict, success) in [
            ("all passed", verdict(3, 0, 0), true),
            ("one failed", verdict(2, 1, 0), false),
            ("one is missing", verdict(2, 0, 1), false),
            ("fewer than wanted", verdict(2, 0, 0), false),
            ("no verdict", None, false),
        ] {
            assert_eq!(judged(verdict, 3).is_none(), success, "{row}");
        }
    }
}
