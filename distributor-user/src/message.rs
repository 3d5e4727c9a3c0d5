//! What monitor and distributor say to each other, and how it crosses the socket.
//!
//! A message is one packet of at most [`MAX_MESSAGE`] bytes with at most one descriptor. The
//! codec is written by hand, because the monitor has to trust it: decoding is total, and
//! whatever bytes arrive give a message or a sentence. Numbers are little-endian; a label is
//! the rest of the packet, and means nothing here. A kind is never used again for something
//! else: a monitor may be older than the distributor that it starts after an upgrade.
#![forbid(unsafe_code)]

use std::{
    fmt,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::{
    fs::{Mode, OFlags},
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    },
};

/// No packet is longer. The sockets' buffers hold at least three of them by default.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// What the longest header, that of `Child` and `Watch`, leaves. The same for every message, so that a
/// label that was accepted once can always be told again.
pub const MAX_LABEL: usize = MAX_MESSAGE - 13;

/// What the distributor asks of the monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToMonitor {
    /// Start the launcher with the descriptor as its standard input; the server takes its
    /// place. Answered by `Started` or `NotStarted`. Ids are the distributor's to choose, and
    /// each is used once.
    Start { id: u64, label: Vec<u8> },
    /// Send a signal to a child. Ignored if it has exited: `Exited` is under way then.
    Signal { id: u64, signal: i32 },
    /// From now on `Child` says this of it.
    Relabel { id: u64, label: Vec<u8> },
    /// The exit of this child has been dealt with. Until then every new distributor is told
    /// of it, so that one that dies between reading of an exit and acting on it loses none.
    Forget { id: u64 },
    /// Keep the descriptor for the next distributor, in the place of one with the same key.
    Hold { key: u64, label: Vec<u8> },
    /// Close a held descriptor.
    Drop { key: u64 },
    /// It works. Before this, the distributor's exit is the monitor's.
    Ready,
    /// Everything is stopped and cleaned up: exit with this.
    Finished { code: u8 },
    /// Treat this process as a child from now on, though somebody else started it. The
    /// descriptor is its pidfd; the pid is only told on. Its end is told as `Exited`, with
    /// [`Exit::Unknown`] unless its parent has left it to the monitor. Answered only if it cannot
    /// be watched: by `NotStarted`, with `EEXIST` if the id is taken, `EMFILE` if the descriptor got
    /// lost on the way or there is no room for it.
    Watch { id: u64, pid: u32, label: Vec<u8> },
    /// The distributor exits now. The next one, and launchers from then on, are the program
    /// behind the descriptor, with the same arguments. Its first distributor has to say
    /// `Ready`: if it ends before, the program before goes on, and is told `NotReplaced`.
    Replace,
    /// Somebody has asked the distributor to stop: whoever follows it is to go on with that.
    Stopping,
}

/// What the monitor tells the distributor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromMonitor {
    /// Before `Begin`: a child that an earlier distributor started, or had watched. `Exited`
    /// follows at once if it has ended and nobody said `Forget`.
    Child { id: u64, pid: u32, label: Vec<u8> },
    /// Before `Begin`, with the descriptor: what an earlier distributor gave to hold.
    Held { key: u64, label: Vec<u8> },
    /// That was all there is from earlier.
    Begin,
    /// Before `Begin`: the program that was to replace this one ended so before it was ready.
    NotReplaced { exit: Exit },
    /// The launcher runs. Whether it became the server, it says on its own socket.
    Started { id: u64, pid: u32 },
    /// It could not be started or watched: `EEXIST` if the id is taken, `EMFILE` if the descriptor got
    /// lost on the way.
    NotStarted { id: u64, errno: i32 },
    /// The descriptor is not held: it got lost on the way because the monitor has no room for
    /// more (`EMFILE`).
    NotHeld { key: u64, errno: i32 },
    /// A child is gone. Say `Forget` when it has been dealt with.
    Exited { id: u64, pid: u32, exit: Exit },
    /// A process is gone that some child left behind. Nobody is told twice.
    Orphan { pid: u32, exit: Exit },
    /// Stop everything, then say `Finished`. The second time: in a hurry.
    Stop,
    /// Read the configuration again.
    Reload,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// It exited by itself.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It has ended, and only its parent, which we are not, was told how.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exited with {code}"),
            Self::Signal(signal) => match signal_hook::low_level::signal_name(signal) {
                Some(name) => write!(f, "was killed by {name}"),
                None => write!(f, "was killed by signal {signal}"),
            },
            Self::Unknown => write!(f, "ended (how is not known)"),
        }
    }
}

/// One direction of the conversation.
pub trait Message: Sized {
    /// The packet, or why there is none: the label is too long.
    fn encode(&self) -> io::Result<Vec<u8>>;

    /// The message in a packet, or a sentence of kind `InvalidData`.
    fn decode(packet: &[u8]) -> io::Result<Self>;
}

impl Message for ToMonitor {
    fn encode(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Start { id, label } => Packet::new(1).u64(*id).label(label),
            Self::Signal { id, signal } => Packet::new(2).u64(*id).i32(*signal).end(),
            Self::Relabel { id, label } => Packet::new(3).u64(*id).label(label),
            Self::Forget { id } => Packet::new(4).u64(*id).end(),
            Self::Hold { key, label } => Packet::new(5).u64(*key).label(label),
            Self::Drop { key } => Packet::new(6).u64(*key).end(),
            Self::Ready => Packet::new(7).end(),
            Self::Finished { code } => Packet::new(8).u8(*code).end(),
            Self::Replace => Packet::new(10).end(),
            Self::Stopping => Packet::new(11).end(),
            Self::Watch { id, pid, label } => Packet::new(9).u64(*id).u32(*pid).label(label),
        }
    }

    fn decode(packet: &[u8]) -> io::Result<Self> {
        let mut fields = Fields::of(packet)?;
        let message = match fields.kind {
            1 => Self::Start { id: fields.u64()?, label: fields.label()? },
            2 => Self::Signal { id: fields.u64()?, signal: fields.i32()? },
            3 => Self::Relabel { id: fields.u64()?, label: fields.label()? },
            4 => Self::Forget { id: fields.u64()? },
            5 => Self::Hold { key: fields.u64()?, label: fields.label()? },
            6 => Self::Drop { key: fields.u64()? },
            7 => Self::Ready,
            8 => Self::Finished { code: fields.u8()? },
            9 => Self::Watch { id: fields.u64()?, pid: fields.u32()?, label: fields.label()? },
            10 => Self::Replace,
            11 => Self::Stopping,
            _ => return Err(fields.unknown("the distributor")),
        };
        fields.end()?;
        Ok(message)
    }
}

/// The kinds begin at 65, so that a packet that went to the wrong end is noticed.
impl Message for FromMonitor {
    fn encode(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Child { id, pid, label } => Packet::new(65).u64(*id).u32(*pid).label(label),
            Self::Held { key, label } => Packet::new(66).u64(*key).label(label),
            Self::Begin => Packet::new(67).end(),
            Self::Started { id, pid } => Packet::new(68).u64(*id).u32(*pid).end(),
            Self::NotStarted { id, errno } => Packet::new(69).u64(*id).i32(*errno).end(),
            Self::NotHeld { key, errno } => Packet::new(70).u64(*key).i32(*errno).end(),
            Self::Exited { id, pid, exit } => Packet::new(71).u64(*id).u32(*pid).exit(*exit).end(),
            Self::Orphan { pid, exit } => Packet::new(72).u32(*pid).exit(*exit).end(),
            Self::Stop => Packet::new(73).end(),
            Self::Reload => Packet::new(74).end(),
            Self::NotReplaced { exit } => Packet::new(75).exit(*exit).end(),
        }
    }

    fn decode(packet: &[u8]) -> io::Result<Self> {
        let mut fields = Fields::of(packet)?;
        let message = match fields.kind {
            65 => Self::Child { id: fields.u64()?, pid: fields.u32()?, label: fields.label()? },
            66 => Self::Held { key: fields.u64()?, label: fields.label()? },
            67 => Self::Begin,
            68 => Self::Started { id: fields.u64()?, pid: fields.u32()? },
            69 => Self::NotStarted { id: fields.u64()?, errno: fields.i32()? },
            70 => Self::NotHeld { key: fields.u64()?, errno: fields.i32()? },
            71 => Self::Exited { id: fields.u64()?, pid: fields.u32()?, exit: fields.exit()? },
            72 => Self::Orphan { pid: fields.u32()?, exit: fields.exit()? },
            73 => Self::Stop,
            74 => Self::Reload,
            75 => Self::NotReplaced { exit: fields.exit()? },
            _ => return Err(fields.unknown("the monitor")),
        };
        fields.end()?;
        Ok(message)
    }
}

/// One end of the socket between the two. It blocks, or answers `WouldBlock`, as the
/// descriptor is set.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends, blocking, closed on exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    /// The distributor's end, which it finds as its standard input. It moves to a descriptor
    /// that is closed on exec, and /dev/null takes its place: nothing that the distributor
    /// starts may hold it open, or the monitor would not notice the distributor's death.
    pub fn from_stdin() -> io::Result<Self> {
        let stdin = rustix::stdio::stdin();
        if rustix::net::sockopt::socket_type(stdin)? != SocketType::SEQPACKET {
            return Err(io::Error::other("it is not a packet socket"));
        }
        let channel = rustix::io::fcntl_dupfd_cloexec(stdin, 3)?;
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        rustix::stdio::dup2_stdin(null)?;
        Ok(Self(channel))
    }

    /// From now on a full or an empty socket is `WouldBlock`. The other end is not affected.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.0, true)?)
    }

    /// Sends one message, whole or not at all.
    pub fn send<M: Message>(&self, message: &M, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send_packet(&message.encode()?, fd)
    }

    /// The next message and the descriptor that came with it; `None` if the other end is gone
    /// and all that it said has been read.
    ///
    /// Of several descriptors the first is given, and the others are closed. If this process
    /// can have no more descriptors, the message arrives without: the kernel drops it then.
    pub fn receive<M: Message>(&self) -> io::Result<Option<(M, Option<OwnedFd>)>> {
        let mut packet = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut receive = || {
            retry_on_intr(|| {
                rustix::net::recvmsg(
                    &self.0,
                    &mut [IoSliceMut::new(&mut packet)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )
            })
        };
        // A peer that died with unread messages leaves an ECONNRESET, once, ahead of what it
        // had sent: https://github.com/torvalds/linux/blob/v6.18/net/unix/af_unix.c (unix_release_sock).
        let received = match receive() {
            Err(Errno::CONNRESET) => receive()?,
            received => received?,
        };
        let mut descriptor = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                for extra in descriptors {
                    descriptor.get_or_insert(extra);
                }
            }
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(invalid(format!("a message is longer than {MAX_MESSAGE} bytes")));
        }
        match received.bytes {
            0 => Ok(None),
            bytes => Ok(Some((M::decode(&packet[..bytes])?, descriptor))),
        }
    }

    fn send_packet(&self, packet: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let descriptors: &[_] = &fd.map_or(vec![], |fd| vec![fd]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if fd.is_some() {
            let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
            assert!(fits, "the space is that of one descriptor");
        }
        retry_on_intr(|| {
            rustix::net::sendmsg(&self.0, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

/// A packet in the making.
struct Packet(Vec<u8>);

impl Packet {
    fn new(kind: u8) -> Self {
        Self(vec![kind])
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn i32(self, value: i32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn exit(self, exit: Exit) -> Self {
        match exit {
            Exit::Code(code) => self.u8(0).i32(code),
            Exit::Signal(signal) => self.u8(1).i32(signal),
            // No number follows, so that there is none that could be taken for a code.
            Exit::Unknown => self.u8(2),
        }
    }

    fn label(self, label: &[u8]) -> io::Result<Vec<u8>> {
        if label.len() > MAX_LABEL {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a label of {} bytes is over {MAX_LABEL}", label.len()),
            ));
        }
        self.bytes(label).end()
    }

    fn end(self) -> io::Result<Vec<u8>> {
        Ok(self.0)
    }
}

/// What is left to read of a packet.
struct Fields<'a> {
    kind: u8,
    length: usize,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn of(packet: &'a [u8]) -> io::Result<Self> {
        match packet {
            [kind, rest @ ..] => Ok(Self { kind: *kind, length: packet.len(), rest }),
            [] => Err(invalid("an empty message".into())),
        }
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let Some((field, rest)) = self.rest.split_first_chunk() else {
            let (kind, length) = (self.kind, self.length);
            return Err(invalid(format!(
                "a message of kind {kind} ends after {length} bytes, in the middle of a field"
            )));
        };
        self.rest = rest;
        Ok(*field)
    }

    fn u8(&mut self) -> io::Result<u8> {
        let [value] = self.array()?;
        Ok(value)
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn i32(&mut self) -> io::Result<i32> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn exit(&mut self) -> io::Result<Exit> {
        match self.u8()? {
            0 => Ok(Exit::Code(self.i32()?)),
            1 => Ok(Exit::Signal(self.i32()?)),
            2 => Ok(Exit::Unknown),
            other => Err(invalid(format!(
                "a message of kind {} says {other} for how a process ended: 0 to 2 are known",
                self.kind
            ))),
        }
    }

    fn label(&mut self) -> io::Result<Vec<u8>> {
        let label = std::mem::take(&mut self.rest);
        if label.len() > MAX_LABEL {
            return Err(invalid(format!("a label of {} bytes is over {MAX_LABEL}", label.len())));
        }
        Ok(label.to_vec())
    }

    fn end(&self) -> io::Result<()> {
        match self.rest.len() {
            0 => Ok(()),
            more => {
                Err(invalid(format!("a message of kind {} has {more} bytes more than its fields", self.kind)))
            }
        }
    }

    fn unknown(&self, sender: &str) -> io::Error {
        invalid(format!("a message of kind {}, which is none of {sender}'s", self.kind))
    }
}

fn invalid(sentence: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, sentence)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use proptest::prelude::*;

    use super::*;

    fn label() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..80)
    }

    fn exit() -> impl Strategy<Value = Exit> {
        prop_oneof![
            any::<i32>().prop_map(Exit::Code),
            any::<i32>().prop_map(Exit::Signal),
            Just(Exit::Unknown)
        ]
    }

    fn to_monitor() -> impl Strategy<Value = ToMonitor> {
        use ToMonitor::*;
        prop_oneof![
            (any::<u64>(), label()).prop_map(|(id, label)| Start { id, label }),
            (any::<u64>(), any::<i32>()).prop_map(|(id, signal)| Signal { id, signal }),
            (any::<u64>(), label()).prop_map(|(id, label)| Relabel { id, label }),
            any::<u64>().prop_map(|id| Forget { id }),
            (any::<u64>(), label()).prop_map(|(key, label)| Hold { key, label }),
            any::<u64>().prop_map(|key| Drop { key }),
            Just(Ready),
            any::<u8>().prop_map(|code| Finished { code }),
            (any::<u64>(), any::<u32>(), label()).prop_map(|(id, pid, label)| Watch { id, pid, label }),
            Just(Replace),
            Just(Stopping),
        ]
    }

    fn from_monitor() -> impl Strategy<Value = FromMonitor> {
        use FromMonitor::*;
        prop_oneof![
            (any::<u64>(), any::<u32>(), label()).prop_map(|(id, pid, label)| Child { id, pid, label }),
            (any::<u64>(), label()).prop_map(|(key, label)| Held { key, label }),
            Just(Begin),
            (any::<u64>(), any::<u32>()).prop_map(|(id, pid)| Started { id, pid }),
            (any::<u64>(), any::<i32>()).prop_map(|(id, errno)| NotStarted { id, errno }),
            (any::<u64>(), any::<i32>()).prop_map(|(key, errno)| NotHeld { key, errno }),
            (any::<u64>(), any::<u32>(), exit()).prop_map(|(id, pid, exit)| Exited { id, pid, exit }),
            (any::<u32>(), exit()).prop_map(|(pid, exit)| Orphan { pid, exit }),
            Just(Stop),
            Just(Reload),
            exit().prop_map(|exit| NotReplaced { exit }),
        ]
    }

    /// Without the label, every shorter packet must be refused; with one it is another label.
    fn header_of(packet: &[u8]) -> usize {
        match packet[0] {
            1 | 3 | 5 | 66 => 9,
            9 | 65 => 13,
            _ => packet.len(),
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_is_what_arrives(message in to_monitor()) {
            prop_assert_eq!(ToMonitor::decode(&message.encode()?)?, message);
        }

        #[test]
        fn what_is_told_is_what_arrives(message in from_monitor()) {
            prop_assert_eq!(FromMonitor::decode(&message.encode()?)?, message);
        }

        #[test]
        fn any_bytes_give_a_message_or_a_sentence(
            packet in proptest::collection::vec(any::<u8>(), 0..200),
            kind in 0..80u8,
        ) {
            let mut likely = packet.clone();
            likely.insert(0, kind);
            for bytes in [packet, likely] {
                // What decodes must encode to the very same bytes: no two packets mean one thing.
                match ToMonitor::decode(&bytes) {
                    Ok(message) => prop_assert_eq!(message.encode()?, bytes.clone()),
                    Err(error) => prop_assert!(error.to_string().contains("message")),
                }
                match FromMonitor::decode(&bytes) {
                    Ok(message) => prop_assert_eq!(message.encode()?, bytes),
                    Err(error) => prop_assert!(error.to_string().contains("message")),
                }
            }
        }

        #[test]
        fn a_truncated_message_is_refused(to in to_monitor(), from in from_monitor()) {
            let packet = to.encode()?;
            for length in 0..header_of(&packet) {
                prop_assert!(ToMonitor::decode(&packet[..length]).is_err());
            }
            let packet = from.encode()?;
            for length in 0..header_of(&packet) {
                prop_assert!(FromMonitor::decode(&packet[..length]).is_err());
            }
        }
    }

    #[test]
    fn a_message_at_the_wrong_end_is_refused() {
        let packet = FromMonitor::Begin.encode().unwrap();
        assert_eq!(
            ToMonitor::decode(&packet).unwrap_err().to_string(),
            "a message of kind 67, which is none of the distributor's"
        );
    }

    #[test]
    fn bytes_after_the_last_field_are_refused() {
        assert_eq!(
            ToMonitor::decode(&[7, 0, 0]).unwrap_err().to_string(),
            "a message of kind 7 has 2 bytes more than its fields"
        );
    }

    #[test]
    fn the_longest_label_passes_in_every_message_and_a_longer_one_in_none() {
        let (here, there) = Channel::pair().unwrap();
        for excess in [0, 1] {
            let label = || vec![7; MAX_LABEL + excess];
            let start = ToMonitor::Start { id: 1, label: label() };
            let watch = ToMonitor::Watch { id: 1, pid: 2, label: label() };
            let child = FromMonitor::Child { id: 1, pid: 2, label: label() };
            match excess {
                0 => {
                    for message in [&start, &watch] {
                        here.send(message, None).unwrap();
                        assert_eq!(there.receive::<ToMonitor>().unwrap().unwrap().0, *message);
                    }
                    here.send(&child, None).unwrap();
                    assert_eq!(there.receive::<FromMonitor>().unwrap().unwrap().0, child);
                }
                _ => {
                    here.send(&start, None).unwrap_err();
                    here.send(&watch, None).unwrap_err();
                    here.send(&child, None).unwrap_err();
                }
            }
        }
    }

    #[test]
    fn a_packet_over_the_limit_is_refused_and_the_next_one_is_read() {
        let (here, there) = Channel::pair().unwrap();
        let mut packet = vec![0; MAX_MESSAGE + 1];
        packet[0] = 1;
        here.send_packet(&packet, None).unwrap();
        here.send(&ToMonitor::Ready, None).unwrap();

        let error = there.receive::<ToMonitor>().unwrap_err();
        assert_eq!(error.to_string(), "a message is longer than 65536 bytes");
        let (next, _) = there.receive::<ToMonitor>().unwrap().unwrap();
        assert_eq!(next, ToMonitor::Ready);
    }

    #[test]
    fn a_descriptor_arrives_and_is_closed_on_exec() {
        let (here, there) = Channel::pair().unwrap();
        let (file, _) = Channel::pair().unwrap();
        let hold = ToMonitor::Hold { key: 7, label: b"room".to_vec() };
        here.send(&hold, Some(file.as_fd())).unwrap();

        let (message, descriptor) = there.receive::<ToMonitor>().unwrap().unwrap();
        assert_eq!(message, hold);
        let descriptor = descriptor.unwrap();
        assert_eq!(inode(&descriptor), inode(&file));
        let flags = rustix::io::fcntl_getfd(&descriptor).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn of_several_descriptors_the_first_is_kept_and_the_others_are_closed() {
        let (here, there) = Channel::pair().unwrap();
        let (first, _other_end) = Channel::pair().unwrap();
        let (second, other_end) = Channel::pair().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let both = [first.as_fd(), second.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&both)));
        let packet = ToMonitor::Ready.encode().unwrap();
        rustix::net::sendmsg(&here, &[IoSlice::new(&packet)], &mut control, SendFlags::empty()).unwrap();
        drop(second);

        let (_, descriptor) = there.receive::<ToMonitor>().unwrap().unwrap();
        assert_eq!(inode(descriptor.unwrap()), inode(&first));
        // End of file: nobody holds the second any more.
        assert!(other_end.receive::<ToMonitor>().unwrap().is_none());
    }

    #[test]
    fn what_a_peer_said_before_it_died_is_read_even_if_it_left_messages_unread() {
        let (here, there) = Channel::pair().unwrap();
        there.send(&FromMonitor::Begin, None).unwrap();
        here.send(&ToMonitor::Ready, None).unwrap();
        here.send(&ToMonitor::Finished { code: 3 }, None).unwrap();
        drop(here);

        let mut said = vec![];
        while let Some((message, None)) = there.receive::<ToMonitor>().unwrap() {
            said.push(message);
        }
        assert_eq!(said, [ToMonitor::Ready, ToMonitor::Finished { code: 3 }]);
    }

    #[test]
    fn a_full_socket_and_an_empty_one_would_block() {
        let (here, there) = Channel::pair().unwrap();
        here.set_nonblocking().unwrap();
        assert_eq!(here.receive::<FromMonitor>().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut sent = 0;
        let error = loop {
            match here.send(&ToMonitor::Drop { key: sent }, None) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        for key in 0..sent {
            let (message, _) = there.receive::<ToMonitor>().unwrap().unwrap();
            assert_eq!(message, ToMonitor::Drop { key });
        }
    }

    #[test]
    fn an_exit_reads_as_the_end_of_a_sentence() {
        assert_eq!(Exit::Code(101).to_string(), "exited with 101");
        assert_eq!(Exit::Signal(9).to_string(), "was killed by SIGKILL");
        assert_eq!(Exit::Signal(34).to_string(), "was killed by signal 34");
        assert_eq!(Exit::Unknown.to_string(), "ended (how is not known)");
    }

    fn inode(descriptor: impl AsFd) -> u64 {
        rustix::fs::fstat(descriptor).unwrap().st_ino
    }
}
