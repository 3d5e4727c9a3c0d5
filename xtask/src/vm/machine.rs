//! One guest, from its start to its end: qemu, the directories it shares, and what it says.
//!
//! A guest says on its first serial line whatever its tests print, and in a last line how they
//! went. Nothing else counts as success: not qemu's exit code, and not that nothing failed.
//!
//! Emulated (TCG), although that is many times slower: /dev/kvm can be opened on machines on which
//! no guest ever boots.

#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    exec::{find, say},
    interrupt,
};

pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// Debian has had it at both places, and PATH leads to neither.
const SHARING: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// What a guest has; a JVM is in there with dist-ctl and the tests.
pub(crate) const MEMORY: u64 = 2048;

pub(crate) const CPUS: u32 = 2;

/// Old, and so without AVX and five levels of page tables: with `max`, which has them, a guest takes a
/// third longer. A JVM runs on it.
const CPU: &str = "Nehalem";

/// How many of its last lines are shown of a guest that failed.
const LAST_LINES: usize = 60;

/// What a kernel says that is about to end, or should be.
const ENDS: [&str; 3] = ["Kernel panic - not syncing", "BUG: ", "Oops: "];

/// What a kernel says when an emulated CPU ran into the breakpoint by which the kernel replaces its own
/// instructions, after that was taken away: qemu's CPUs may be late to see that they were. Seen while
/// the host was busy.
const LATE: &str = "Oops: int3";
const LATE_TRIES: usize = 3;

/// A directory of this machine that the guest sees.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    pub(crate) tag: &'static str,
    pub(crate) source: PathBuf,
    /// Where the guest has it.
    pub(crate) directory: &'static str,
    pub(crate) access: Access,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

pub(crate) struct Machine<'m> {
    /// Stands before each line that it says.
    pub(crate) name: &'m str,
    pub(crate) kernel: &'m Path,
    pub(crate) initramfs: &'m Path,
    pub(crate) shares: &'m [Share],
    /// Everything that it says, for later.
    pub(crate) log: &'m Path,
    /// How long it may say nothing.
    pub(crate) silence: Duration,
    /// How long it may take, whatever it says.
    pub(crate) limit: Duration,
}

/// How a guest's tests went, in its own words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) missing: usize,
}

/// What became of a guest.
pub(crate) struct Ended {
    pub(crate) verdict: Option<Verdict>,
    /// What `dist-ctl doctor --json` said.
    pub(crate) doctor: Option<String>,
    /// Why it failed whatever its verdict is.
    pub(crate) problem: Option<String>,
    pub(crate) last_lines: Vec<String>,
    pub(crate) took: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Console {
    Quiet,
    /// From the first moment, for a kernel that does not come as far as PID 1.
    Early,
}

impl Machine<'_> {
    pub(crate) fn run(&self) -> Result<Ended> {
        let mut ended = self.boot(Console::Quiet)?;
        if ended.last_lines.is_empty() {
            say(&format!("{}: it said nothing: once more, with all that its kernel says", self.name));
            return self.boot(Console::Early);
        }
        for _ in 0..LATE_TRIES {
            if !ended.problem.as_ref().is_some_and(|problem| problem.contains(LATE)) {
                break;
            }
            say(&format!("{}: qemu was late to see what its kernel replaced: once more", self.name));
            ended = self.boot(Console::Quiet)?;
        }
        Ok(ended)
    }

    fn boot(&self, console: Console) -> Result<Ended> {
        let start = Instant::now();
        let mut sharing = Vec::new();
        for share in self.shares {
            sharing.push(self.share(share)?);
        }
        let complaints =
            File::create(self.log.with_extension("qemu")).context("make a file for qemu's words")?;
        // It does not outlive us, even if we are killed.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", QEMU])
            .args(["-M", "pc", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", &CPUS.to_string()])
            .args(["-m", &MEMORY.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-monitor", "none", "-serial", "stdio", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", &command_line(console)]);
        if !self.shares.is_empty() {
            // The daemon reads and writes the guest's memory.
            qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={MEMORY}M,share=on")]);
            qemu.args(["-numa", "node,memdev=memory"]);
        }
        for share in self.shares {
            let socket = self.socket(share);
            qemu.args(["-chardev", &format!("socket,id={},path={}", share.tag, socket.display())]);
            qemu.args(["-device", &format!("vhost-user-fs-pci,chardev={0},tag={0}", share.tag)]);
        }
        let qemu = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(complaints);
        let mut qemu = Running(qemu.spawn().with_context(|| format!("run {QEMU}"))?);
        let mut ended = self.listen(&mut qemu, start)?;
        if ended.last_lines.is_empty() {
            let complaints = fs::read_to_string(self.log.with_extension("qemu")).unwrap_or_default();
            if !complaints.trim().is_empty() {
                bail!("{}: {QEMU} ended: {}", self.name, complaints.trim());
            }
        }
        ended.took = start.elapsed();
        Ok(ended)
    }

    /// Until qemu has ended, or has to be ended.
    fn listen(&self, qemu: &mut Running, start: Instant) -> Result<Ended> {
        let mut log = File::create(self.log).with_context(|| format!("create {}", self.log.display()))?;
        let output = BufReader::new(qemu.0.stdout.take().context("it was asked for")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                    return;
                }
            }
        });
        let (mut verdict, mut doctor) = (None, None);
        let (mut problem, mut last_lines) = (None, VecDeque::new());
        let mut heard = start;
        loop {
            match lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) => {
                    writeln!(log, "{line}").with_context(|| format!("write {}", self.log.display()))?;
                    heard = Instant::now();
                    if let Some(document) = line.strip_prefix("guest: doctor: ") {
                        doctor = Some(document.to_owned());
                        continue;
                    }
                    say(&format!("{} {:4} s: {line}", self.name, start.elapsed().as_secs()));
                    verdict = Verdict::parse(&line).or(verdict);
                    if ENDS.iter().any(|words| line.contains(words)) {
                        problem.get_or_insert(format!("its kernel said: {line}"));
                    }
                    last_lines.push_back(line);
                    if last_lines.len() > LAST_LINES {
                        last_lines.pop_front();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if heard.elapsed() > self.silence {
                problem.get_or_insert(format!("it said nothing for {:?}", self.silence));
                break;
            }
            if start.elapsed() > self.limit {
                problem.get_or_insert(format!("it has not ended in {:?}", self.limit));
                break;
            }
            if interrupt::asked() {
                break;
            }
        }
        // Ctrl-C ends qemu as well.
        if interrupt::asked() {
            bail!("interrupted");
        }
        let status = qemu.end()?;
        if !status.success() {
            problem.get_or_insert(format!("{QEMU} ended with {status}"));
        }
        Ok(Ended { verdict, doctor, problem, last_lines: last_lines.into(), took: start.elapsed() })
    }

    fn socket(&self, share: &Share) -> PathBuf {
        self.log.with_extension(share.tag)
    }

    fn share(&self, share: &Share) -> Result<Running> {
        let program = sharing().with_context(|| format!("there is no {}", SHARING.join(", and no ")))?;
        let socket = self.socket(share);
        let _ = fs::remove_file(&socket);
        let words = File::create(socket.with_extension(format!("{}.log", share.tag)))
            .context("make a file for what the sharing daemon says")?;
        // The daemon is root, and a guest too: what a guest must not write, the daemon cannot.
        let mut source = share.source.clone();
        let mut daemon = match share.access {
            Access::Write => Command::new(program),
            Access::Read => {
                // Elsewhere, because the daemon's socket may lie below it.
                source = socket.with_extension(format!("{}.ro", share.tag));
                fs::create_dir_all(&source).context("make a directory to share")?;
                let script = "mount --rbind \"$1\" \"$2\" && mount --options remount,bind,ro \"$2\" && \
                              shift 2 && exec \"$@\"";
                let mut daemon = Command::new("unshare");
                daemon.args(["--mount", "sh", "-c", script, "share"]);
                daemon.arg(&share.source).arg(&source).arg(program);
                daemon
            }
        };
        let daemon = daemon
            .arg(format!("--socket-path={}", socket.display()))
            .args(["-o", &format!("source={}", source.display()), "-o", "cache=always"])
            .stdin(Stdio::null())
            .stdout(words.try_clone().context("duplicate a descriptor")?)
            .stderr(words)
            .spawn();
        let mut daemon = Running(daemon.with_context(|| format!("run {program}"))?);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            if Instant::now() > deadline || daemon.0.try_wait().context("look at the daemon")?.is_some() {
                bail!("{program} does not share {}", share.source.display());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(daemon)
    }
}

impl Verdict {
    /// `guest: verdict: 12 passed, 0 failed, 0 missing`
    fn parse(line: &str) -> Option<Self> {
        let mut counts = line.strip_prefix("guest: verdict: ")?.split(", ");
        let mut count = |what: &str| counts.next()?.strip_suffix(what)?.trim().parse().ok();
        let (passed, failed, missing) = (count("passed")?, count("failed")?, count("missing")?);
        Some(Self { passed, failed, missing })
    }
}

/// A process that is not left behind.
struct Running(Child);

impl Running {
    fn end(&mut self) -> Result<ExitStatus> {
        // Its output has ended, so it is about to; or it has to.
        for _ in 0..100 {
            if let Some(status) = self.0.try_wait().context("look at a process")? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.0.kill().context("end a process")?;
        self.0.wait().context("wait for a process")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, or is to.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The daemon that shares directories, if it is here.
pub(crate) fn sharing() -> Option<&'static str> {
    SHARING.into_iter().find(|program| Path::new(program).exists())
}

/// Whether qemu is here.
pub(crate) fn is_here() -> bool {
    find(QEMU).is_some() && sharing().is_some()
}

/// A panic resets the machine at once, and with -no-reboot that ends qemu.
fn command_line(console: Console) -> String {
    let loud = match console {
        Console::Quiet => "quiet",
        Console::Early => "earlyprintk=ttyS0",
    };
    format!("console=ttyS0 {loud} panic=-1 reboot=t mitigations=off")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_whole_line_or_none() {
        let verdict = Some(Verdict { passed: 12, failed: 0, missing: 3 });
        for (line, expected) in [
            ("guest: verdict: 12 passed, 0 failed, 3 missing", verdict),
            ("guest: verdict: 12 passed, 0 failed", None),
            ("test a_verdict ... ok", None),
        ] {
            assert_eq!(Verdict::parse(line), expected, "{line}");
        }
    }
}
