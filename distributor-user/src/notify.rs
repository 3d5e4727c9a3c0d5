//! What a server says of itself by sd_notify.
//!
//! One datagram socket for each instance of a server, at a path that only the server's user
//! and root can send to. Takes datagrams, gives their words and the pid of the sender, which
//! the kernel vouches for. Whether that pid belongs to the instance is for the caller to
//! check, and what a word leads to is the business of `server`: nothing is believed here.
//! The monitor holds a duplicate of each socket, so that nothing is lost that a server says while
//! no distributor runs, and one that has connected its own socket need not notice.

use std::{
    collections::HashMap,
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::{FileTypeExt as _, chown},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use distributor_ebpf::contract::LIMIT_MAX;
use nix::libc;
use rustix::fs::{Mode, fchmod};
use socket2::{Domain, MaybeUninitSlice, MsgHdrMut, SockAddr, SockRef, Socket, Type};
use tokio::{io::Interest, net::UnixDatagram};

use crate::link;

/// Where one instance of a server sends its notifications: its NOTIFY_SOCKET.
#[derive(Debug)]
pub struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

/// One datagram.
#[derive(Debug)]
pub struct Message {
    /// The sender, as the kernel knows it; it may have ended since. `None` if it has no pid
    /// among ours, so that it cannot be one of the server's processes.
    pub sender: Option<u32>,
    /// What it said, in its order.
    pub notifications: Vec<Notification>,
    // A sender that waits until it has been heard (BARRIER=1) passes a descriptor and waits
    // for it to close. So it is kept until the caller is done with this message, and thereby
    // with those before it.
    _barrier: Vec<OwnedFd>,
}

/// One assignment of a datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// `READY=1`
    Ready,
    /// `STOPPING=1`
    Stopping,
    /// `STATUS=...`: one line for people, without control characters; empty takes it back.
    Status(String),
    /// `MAINPID=...`
    MainPid(u32),
    /// `WATCHDOG=1`: it is well.
    Watchdog,
    /// `WATCHDOG=trigger`: it is not, and wants to be treated as one that hangs.
    WatchdogTrigger,
    /// `WATCHDOG_USEC=...`: how often it says from now on that it is well; `None`: no more.
    WatchdogInterval(Option<Duration>),
    /// `EXTEND_TIMEOUT_USEC=...`: how much longer it takes to start or to stop.
    ExtendTimeout(Duration),
    /// `X_LOAD=...`: how loaded it is, in thousandths.
    Load(u32),
    /// `X_CAPACITY=...`: how many connections it can serve at once.
    Capacity(u32),
    /// One of these two with a value that it cannot have: all of it.
    Wrong(String),
    /// A word that means nothing to us, or another one with a value that it cannot have.
    Other,
}

impl NotifySocket {
    /// Makes the socket. The directory must exist and be ours alone to write to; a socket
    /// left there by an earlier instance is replaced. Needs a tokio runtime.
    pub fn bind(path: PathBuf, uid: u32) -> anyhow::Result<Self> {
        let context = || format!("make notify socket: {}", path.display());
        let socket = bind(&path, uid).with_context(context)?;
        let socket = UnixDatagram::from_std(socket.into()).with_context(context)?;
        Ok(Self { socket, path })
    }

    /// The socket that an earlier distributor had made at this path. What was sent meanwhile is in it.
    pub fn inherited(socket: OwnedFd, path: PathBuf) -> io::Result<Self> {
        let socket = Socket::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixDatagram::from_std(socket.into())?, path })
    }

    /// For somebody to hold.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What NOTIFY_SOCKET of the server is set to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next datagram. Cancelling the wait loses none.
    pub async fn receive(&self) -> io::Result<Message> {
        let receive = || receive(&SockRef::from(&self.socket));
        self.socket.async_io(Interest::READABLE, receive).await
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        // If this fails, `bind` replaces what is left; there is nothing better to do here.
        let _ = fs::remove_file(&self.path);
    }
}

/// The assignments of a datagram, in their order. Total: whatever was sent, it means
/// something or `Other`.
pub fn parse(datagram: &[u8]) -> Vec<Notification> {
    if datagram.len() > LONGEST_DATAGRAM {
        // Cut anywhere, half a word could mean something else.
        return vec![Notification::Other];
    }
    datagram.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(parse_line).collect()
}

/// Sockets that an earlier distributor had the monitor hold, by the names of their files.
pub type Held = HashMap<String, link::Held>;

/// Takes them out of what is held.
pub fn held(held: &mut Vec<link::Held>) -> Held {
    let its = |held: &link::Held| String::from_utf8(held.label.strip_prefix(LABEL)?.to_vec()).ok();
    held.extract_if(.., |held| its(held).is_some()).filter_map(|held| Some((its(&held)?, held))).collect()
}

/// What the monitor has with the socket of this path.
pub fn label(path: &Path) -> Vec<u8> {
    [LABEL, name(path).unwrap_or_default().as_bytes()].concat()
}

/// What the socket of this path is filed under.
pub fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

const LABEL: &[u8] = b"notify ";

/// What systemd accepts, too; longer ones are ignored there as here.
const LONGEST_DATAGRAM: usize = 4096;

/// A status is shown in a table; what is longer is cut.
const LONGEST_STATUS: usize = 200;

/// The kernel passes up to this many descriptors with one message (SCM_MAX_FD).
const MOST_DESCRIPTORS: usize = 253;

/// A control message is a header, its payload, and a gap up to the next word.
const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();

/// Room for the descriptors and the credentials.
const CONTROL_SPACE: usize =
    control_space(size_of::<libc::ucred>()) + control_space(size_of::<RawFd>() * MOST_DESCRIPTORS);

/// What a payload of this size occupies.
const fn control_space(payload: usize) -> usize {
    CONTROL_HEADER + payload.next_multiple_of(size_of::<usize>())
}

fn parse_line(line: &[u8]) -> Notification {
    match line {
        b"READY=1" => return Notification::Ready,
        b"STOPPING=1" => return Notification::Stopping,
        b"WATCHDOG=1" => return Notification::Watchdog,
        b"WATCHDOG=trigger" => return Notification::WatchdogTrigger,
        _ => {}
    }
    if let Some(text) = line.strip_prefix(b"STATUS=") {
        return Notification::Status(printable(text));
    }
    for (word, meaning) in [(&b"X_LOAD="[..], load as fn(&str) -> _), (b"X_CAPACITY=", capacity)] {
        if let Some(value) = line.strip_prefix(word) {
            let meant = str::from_utf8(value).ok().and_then(meaning);
            return meant.unwrap_or_else(|| Notification::Wrong(printable(line)));
        }
    }
    number(line).unwrap_or(Notification::Other)
}

/// From `0.0` to `1.0`.
fn load(value: &str) -> Option<Notification> {
    let load: f64 = value.parse().ok()?;
    (0.0..=1.0).contains(&load).then_some(Notification::Load((load * 1000.0).round() as u32))
}

/// More than can be counted is as much as can be.
fn capacity(value: &str) -> Option<Notification> {
    let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    is_number
        .then(|| Notification::Capacity(value.parse().map_or(LIMIT_MAX, |most: u32| most.min(LIMIT_MAX))))
}

/// A word whose value is a number.
fn number(line: &[u8]) -> Option<Notification> {
    let (word, value) = str::from_utf8(line).ok()?.split_once('=')?;
    // What `parse` takes beside digits.
    let value: u64 = (!value.starts_with('+')).then(|| value.parse().ok())??;
    let duration = Duration::from_micros(value);
    match word {
        "MAINPID" => u32::try_from(value).ok().filter(|pid| *pid != 0).map(Notification::MainPid),
        // As systemd has it: the largest number is as good as never.
        "WATCHDOG_USEC" => {
            let interval = (value != 0 && value != u64::MAX).then_some(duration);
            Some(Notification::WatchdogInterval(interval))
        }
        "EXTEND_TIMEOUT_USEC" => (value != 0).then_some(Notification::ExtendTimeout(duration)),
        _ => None,
    }
}

fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .chars()
        .filter(|character| !character.is_control())
        .take(LONGEST_STATUS)
        .collect()
}

fn bind(path: &Path, uid: u32) -> anyhow::Result<Socket> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).context("remove the one that is left there")?;
        }
        Ok(_) => bail!("something that is no socket is there: remove it"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let socket = Socket::new(Domain::UNIX, Type::DGRAM.nonblocking(), None)?;
    // Before bind: a datagram sent without it would arrive without its sender's pid.
    socket.set_passcred(true)?;
    // Before bind as well, which gives the file the mode of the socket. A chmod afterwards
    // would leave a moment in which anybody can send.
    // https://github.com/torvalds/linux/blob/v6.12/net/unix/af_unix.c (unix_bind_bsd)
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    chown(path, Some(uid), None).with_context(|| format!("give it to uid {uid}"))?;
    Ok(socket)
}

fn receive(socket: &Socket) -> io::Result<Message> {
    // One more than is accepted, so that what is too long shows.
    let mut datagram = [MaybeUninit::new(0); LONGEST_DATAGRAM + 1];
    let mut control = [MaybeUninit::new(0); CONTROL_SPACE];
    let (length, control_length) = {
        let mut buffers = [MaybeUninitSlice::new(&mut datagram)];
        let mut message = MsgHdrMut::new().with_buffers(&mut buffers).with_control(&mut control);
        let length = socket.recvmsg(&mut message, libc::MSG_CMSG_CLOEXEC)?;
        (length, message.control_len())
    };
    let (sender, descriptors) = read_control(initialised(&control[..control_length]));
    // SAFETY: the kernel has just put these descriptors into our table by this very message,
    // each is named once, and nobody else has been told of them.
    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(Message {
        sender,
        notifications: parse(initialised(&datagram[..length])),
        _barrier: descriptors.into_iter().map(own).collect(),
    })
}

fn initialised(bytes: &[MaybeUninit<u8>]) -> &[u8] {
    // SAFETY: the only caller, `receive`, fills its buffers with zeros before the kernel
    // writes to them, so every byte of them is initialised.
    unsafe { bytes.assume_init_ref() }
}

/// The sender's pid and the descriptors, from the control messages of one datagram.
///
/// By hand, because rustix gives the pid a type that cannot be 0, and 0 is what the kernel
/// says of a sender outside our pid namespace; and nix gives up, and with it the descriptors
/// that did arrive, where our table had no room for all of them.
fn read_control(mut control: &[u8]) -> (Option<u32>, Vec<RawFd>) {
    let mut sender = None;
    let mut descriptors = Vec::new();
    while let Some((length, rest)) = control.split_first_chunk() {
        let length = usize::from_ne_bytes(*length);
        let Some(payload) = length
            .checked_sub(CONTROL_HEADER)
            .and_then(|length| rest.get(2 * size_of::<i32>()..)?.get(..length))
        else {
            break;
        };
        let mut kind = words(rest);
        match (kind.next(), kind.next()) {
            (Some(libc::SOL_SOCKET), Some(libc::SCM_CREDENTIALS)) => {
                // The pid is the first of the three words.
                let pid = words(payload).next().and_then(|pid| pid.try_into().ok());
                sender = pid.filter(|pid| *pid != 0);
            }
            (Some(libc::SOL_SOCKET), Some(libc::SCM_RIGHTS)) => descriptors.extend(words(payload)),
            _ => {}
        }
        let used = control_space(length - CONTROL_HEADER);
        control = control.get(used..).unwrap_or_default();
    }
    (sender, descriptors)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = i32> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|word| i32::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IoSlice, PipeReader, Read as _, pipe},
        os::unix::{fs::MetadataExt as _, net},
        process::{self, Command},
    };

    use proptest::prelude::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use tokio::time::timeout;

    use super::{Notification::*, *};

    /// A directory of its own, removed at the end.
    struct Directory(PathBuf);

    impl Directory {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("notify-{}-{test}", process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("socket")
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn own_uid() -> u32 {
        rustix::process::getuid().as_raw()
    }

    async fn next(socket: &NotifySocket) -> Message {
        timeout(Duration::from_secs(10), socket.receive())
            .await
            .expect("a datagram within 10 seconds")
            .unwrap()
    }

    /// Sends a datagram with descriptors that the sender has no longer.
    fn send_with(path: &Path, datagram: &[u8], descriptors: &[OwnedFd]) {
        let sender = net::UnixDatagram::unbound().unwrap();
        sender.connect(path).unwrap();
        let borrowed: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        let datagram = [IoSlice::new(datagram)];
        sendmsg(&sender, &datagram, &mut control, SendFlags::empty()).unwrap();
    }

    /// True once no descriptor of the pipe's other end is open any more.
    fn is_closed(pipe: &mut PipeReader) -> bool {
        rustix::io::ioctl_fionbio(&*pipe, true).unwrap();
        matches!(pipe.read(&mut [0]), Ok(0))
    }

    #[test]
    fn words_of_sd_notify_are_understood() {
        for (datagram, expected) in [
            ("READY=1", vec![Ready]),
            ("READY=1\n", vec![Ready]),
            ("STOPPING=1", vec![Stopping]),
            (
                "READY=1\nSTATUS=4 workers up\nMAINPID=4711\n",
                vec![Ready, Status("4 workers up".to_owned()), MainPid(4711)],
            ),
            ("STATUS=", vec![Status(String::new())]),
            ("STATUS=\u{1b}[2Jcle\tared", vec![Status("[2Jcleared".to_owned())]),
            ("WATCHDOG=1\nX_LOAD=0.5", vec![Watchdog, Load(500)]),
            (
                "X_LOAD=0\nX_LOAD=1\nX_LOAD=0.9996\nX_LOAD=1e-1",
                vec![Load(0), Load(1000), Load(1000), Load(100)],
            ),
            ("X_LOAD=1.01", vec![Wrong("X_LOAD=1.01".to_owned())]),
            ("X_LOAD=-0.5", vec![Wrong("X_LOAD=-0.5".to_owned())]),
            ("X_LOAD=NaN", vec![Wrong("X_LOAD=NaN".to_owned())]),
            ("X_LOAD=inf", vec![Wrong("X_LOAD=inf".to_owned())]),
            ("X_LOAD=50%", vec![Wrong("X_LOAD=50%".to_owned())]),
            ("X_LOAD=", vec![Wrong("X_LOAD=".to_owned())]),
            ("X_LOAD", vec![Other]),
            ("X_CAPACITY=0\nX_CAPACITY=25", vec![Capacity(0), Capacity(25)]),
            ("X_CAPACITY=18446744073709551616", vec![Capacity(LIMIT_MAX)]),
            ("X_CAPACITY=-1", vec![Wrong("X_CAPACITY=-1".to_owned())]),
            ("X_CAPACITY=+1", vec![Wrong("X_CAPACITY=+1".to_owned())]),
            ("X_CAPACITY=2.5", vec![Wrong("X_CAPACITY=2.5".to_owned())]),
            ("X_CAPACITY=", vec![Wrong("X_CAPACITY=".to_owned())]),
            ("WATCHDOG=trigger", vec![WatchdogTrigger]),
            ("WATCHDOG=2", vec![Other]),
            ("WATCHDOG_USEC=20000000", vec![WatchdogInterval(Some(Duration::from_secs(20)))]),
            ("WATCHDOG_USEC=0", vec![WatchdogInterval(None)]),
            ("WATCHDOG_USEC=18446744073709551615", vec![WatchdogInterval(None)]),
            ("WATCHDOG_USEC=18446744073709551616", vec![Other]),
            ("WATCHDOG_USEC=1s", vec![Other]),
            ("EXTEND_TIMEOUT_USEC=1500000", vec![ExtendTimeout(Duration::from_millis(1500))]),
            ("EXTEND_TIMEOUT_USEC=0", vec![Other]),
            ("EXTEND_TIMEOUT_USEC=-1", vec![Other]),
            ("EXTEND_TIMEOUT_USEC=+1", vec![Other]),
            ("BARRIER=1", vec![Other]),
            ("READY=0", vec![Other]),
            ("READY=11", vec![Other]),
            ("ready=1", vec![Other]),
            ("READY", vec![Other]),
            ("MAINPID=0", vec![Other]),
            ("MAINPID=-1", vec![Other]),
            ("MAINPID=4294967296", vec![Other]),
            ("MAINPID=", vec![Other]),
            ("", vec![]),
            ("\n\n", vec![]),
        ] {
            assert_eq!(parse(datagram.as_bytes()), expected, "{datagram:?}");
        }
    }

    #[test]
    fn status_is_cut_to_what_a_table_can_show() {
        let datagram = format!("STATUS={}", "ü".repeat(300));
        assert_eq!(parse(datagram.as_bytes()), [Status("ü".repeat(LONGEST_STATUS))]);
    }

    #[test]
    fn too_long_a_datagram_means_nothing() {
        let mut datagram = b"READY=1\nX=".to_vec();
        datagram.resize(LONGEST_DATAGRAM, b'x');
        assert_eq!(parse(&datagram), [Ready, Other]);
        datagram.push(b'x');
        assert_eq!(parse(&datagram), [Other]);
    }

    #[tokio::test]
    async fn what_a_process_sends_arrives_with_its_pid() {
        let directory = Directory::new("pid");
        let socket = NotifySocket::bind(directory.socket(), own_uid()).unwrap();
        let sender = net::UnixDatagram::unbound().unwrap();
        sender.send_to(b"READY=1\nSTATUS=here", socket.path()).unwrap();
        sender.send_to(b"STOPPING=1", socket.path()).unwrap();

        let first = next(&socket).await;
        assert_eq!(first.sender, Some(process::id()));
        assert_eq!(first.notifications, [Ready, Status("here".to_owned())]);
        let second = next(&socket).await;
        assert_eq!(second.notifications, [Stopping]);
    }

    #[tokio::test]
    async fn what_is_said_while_nobody_listens_is_heard_by_the_next_one() {
        let directory = Directory::new("inherited");
        let first = NotifySocket::bind(directory.socket(), own_uid()).unwrap();
        let held = first.descriptor().try_clone_to_owned().unwrap();
        let sender = net::UnixDatagram::unbound().unwrap();
        sender.connect(first.path()).unwrap();
        // As a distributor ends that is killed: the file stays.
        let (socket, path) = (first.descriptor().try_clone_to_owned().unwrap(), first.path().to_owned());
        std::mem::forget(first);
        drop(socket);
        sender.send(b"READY=1").unwrap();

        let next = NotifySocket::inherited(held, path).unwrap();
        sender.send(b"STOPPING=1").unwrap();
        assert_eq!(self::next(&next).await.notifications, [Ready]);
        assert_eq!(self::next(&next).await.notifications, [Stopping]);
    }

    #[tokio::test]
    async fn empty_and_too_long_datagrams_do_not_end_the_receiving() {
        let directory = Directory::new("lengths");
        let socket = NotifySocket::bind(directory.socket(), own_uid()).unwrap();
        let sender = net::UnixDatagram::unbound().unwrap();
        sender.send_to(b"", socket.path()).unwrap();
        sender.send_to(&[b'x'; LONGEST_DATAGRAM + 1], socket.path()).unwrap();
        sender.send_to(b"READY=1", socket.path()).unwrap();

        assert_eq!(next(&socket).await.notifications, []);
        assert_eq!(next(&socket).await.notifications, [Other]);
        assert_eq!(next(&socket).await.notifications, [Ready]);
    }

    #[tokio::test]
    async fn barrier_opens_when_the_message_has_been_dealt_with() {
        let directory = Directory::new("barrier");
        let socket = NotifySocket::bind(directory.socket(), own_uid()).unwrap();
        let (mut waiting, passed) = pipe().unwrap();
        send_with(socket.path(), b"BARRIER=1", &[passed.into()]);

        let message = next(&socket).await;
        assert_eq!(message.notifications, [Other]);
        assert!(!is_closed(&mut waiting));
        drop(message);
        assert!(is_closed(&mut waiting));
    }

    #[tokio::test]
    async fn every_descriptor_that_is_passed_is_closed() {
        let directory = Directory::new("descriptors");
        let socket = NotifySocket::bind(directory.socket(), own_uid()).unwrap();
        let (mut waiting, passed) = pipe().unwrap();
        let passed = OwnedFd::from(passed);
        let all: Vec<_> = (0..MOST_DESCRIPTORS).map(|_| passed.try_clone().unwrap()).collect();
        drop(passed);
        send_with(socket.path(), b"READY=1", &all);
        drop(all);

        let message = next(&socket).await;
        assert_eq!(message.sender, Some(process::id()));
        assert_eq!(message._barrier.len(), MOST_DESCRIPTORS);
        drop(message);
        assert!(is_closed(&mut waiting));
    }

    #[tokio::test]
    async fn only_the_servers_user_and_root_can_send() {
        if own_uid() != 0 {
            println!("skipped: only root can give a socket to another user");
            return;
        }
        let directory = Directory::new("user");
        // Everybody may pass through the directory, as through the one of a running instance.
        fchmod(fs::File::open(&directory.0).unwrap(), Mode::from_raw_mode(0o711)).unwrap();
        let socket = NotifySocket::bind(directory.socket(), 12_345).unwrap();
        let file = fs::metadata(socket.path()).unwrap();
        assert_eq!((file.uid(), file.mode() & 0o777), (12_345, 0o600));

        let send_as = |uid: &str| {
            let script = "import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', sys.argv[2])";
            let mut python = Command::new("python3");
            python.args(["-c", script, uid]).arg(socket.path()).stderr(process::Stdio::null());
            python.status().expect("python3 is installed").success()
        };
        assert!(send_as("12345"));
        assert!(!send_as("12346"));
        assert!(send_as("0"));
    }

    #[tokio::test]
    async fn socket_left_by_an_earlier_instance_is_replaced() {
        let directory = Directory::new("left");
        let left = net::UnixDatagram::bind(directory.socket()).unwrap();
        drop(left);
        let socket = NotifySocket::bind(directory.socket(), own_uid()).unwrap();
        let sender = net::UnixDatagram::unbound().unwrap();
        sender.send_to(b"READY=1", socket.path()).unwrap();
        assert_eq!(next(&socket).await.notifications, [Ready]);
    }

    #[tokio::test]
    async fn file_of_somebody_else_is_not_removed() {
        let directory = Directory::new("file");
        fs::write(directory.socket(), "precious").unwrap();
        let error = NotifySocket::bind(directory.socket(), own_uid()).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            format!(
                "make notify socket: {}: something that is no socket is there: remove it",
                directory.socket().display()
            )
        );
        assert_eq!(fs::read(directory.socket()).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn dropped_socket_leaves_no_file() {
        let directory = Directory::new("drop");
        drop(NotifySocket::bind(directory.socket(), own_uid()).unwrap());
        assert!(!directory.socket().exists());
    }

    #[tokio::test]
    async fn systemd_notify_is_heard_and_not_kept_waiting() {
        let directory = Directory::new("systemd");
        let socket = NotifySocket::bind(directory.socket(), own_uid()).unwrap();
        let mut command = tokio::process::Command::new("systemd-notify");
        command.args(["--ready", "--status=warm"]).env("NOTIFY_SOCKET", socket.path());
        let mut command = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: systemd-notify does not run here: {error}");
                return;
            }
        };
        let message = next(&socket).await;
        assert!(message.notifications.contains(&Ready));
        assert!(message.notifications.contains(&Status("warm".to_owned())));
        // systemd-notify speaks in the name of the process that called it, if it may.
        assert!(message.sender == Some(process::id()) || message.sender == command.id());

        // It waits at its barrier until that message, too, has been dropped.
        let hear = async {
            loop {
                drop(next(&socket).await);
            }
        };
        let exit = tokio::select! {
            exit = command.wait() => exit.unwrap(),
            () = hear => unreachable!("hearing never ends"),
        };
        assert!(exit.success());
    }

    fn control_message(kind: i32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (CONTROL_HEADER + payload.len()).to_ne_bytes().to_vec();
        bytes.extend(libc::SOL_SOCKET.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(control_space(payload.len()), 0);
        bytes
    }

    fn bytes(words: &[i32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn control_messages_are_read_one_after_the_other() {
        let mut control = control_message(libc::SCM_RIGHTS, &bytes(&[7, 8, 9]));
        control.extend(control_message(libc::SCM_CREDENTIALS, &bytes(&[42, 0, 0])));
        assert_eq!(read_control(&control), (Some(42), vec![7, 8, 9]));
    }

    #[test]
    fn sender_outside_our_pid_namespace_has_no_pid() {
        let control = control_message(libc::SCM_CREDENTIALS, &bytes(&[0, 0, 0]));
        assert_eq!(read_control(&control), (None, vec![]));
    }

    proptest! {
        #[test]
        fn random_bytes_are_parsed_to_bounded_words(
            datagram in prop::collection::vec(any::<u8>(), 0..5000),
        ) {
            for notification in parse(&datagram) {
                if let Status(text) = notification {
                    prop_assert!(text.chars().count() <= LONGEST_STATUS);
                    prop_assert!(!text.contains(char::is_control));
                }
            }
        }

        #[test]
        fn every_status_is_one_printable_line(text in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut datagram = b"STATUS=".to_vec();
            datagram.extend(text.iter().filter(|byte| **byte != b'\n'));
            let notifications = parse(&datagram);
            prop_assert!(matches!(
                notifications.as_slice(),
                [Status(text)] if text.chars().count() <= LONGEST_STATUS
                    && !text.contains(char::is_control)
            ));
        }

        #[test]
        fn random_control_bytes_are_read_to_the_end(
            control in prop::collection::vec(any::<u8>(), 0..200),
            length in 0..300_usize,
        ) {
            // A plausible length now and then, or nearly every case would end at the first.
            let mut control = control;
            control.splice(..0, length.to_ne_bytes());
            let (_, descriptors) = read_control(&control);
            prop_assert!(descriptors.len() <= control.len() / size_of::<RawFd>());
        }
    }
}
