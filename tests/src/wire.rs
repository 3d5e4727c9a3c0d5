//! A wire between two networks that is slow, and loses what a test says.
//!
//! Each end is a TAP device, and a thread carries the frames from one to the other: so the delay
//! and the loss are the same on every kernel, with or without netem, and a test can say exactly
//! which segments are lost. The devices do no work for the kernel, so what is carried are frames
//! as they would be on a cable: no longer than the MTU, each with its checksums.

use std::{
    collections::VecDeque,
    fmt,
    fs::File,
    io::{self, PipeWriter, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, open},
    io::retry_on_intr,
    ioctl::{Setter, ioctl},
    process::setpriority_process,
};

use crate::network::Network;

/// A wire. Its ends go with it.
pub struct Wire {
    loses: Arc<Mutex<Loses>>,
    /// Closed to end the thread.
    end: Option<PipeWriter>,
    carrying: Option<JoinHandle<()>>,
}

type Loses = Box<dyn FnMut(Segment) -> bool + Send>;

/// A TCP segment on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// See [`crate::client::flag`].
    pub flags: u8,
}

impl Wire {
    /// Makes a link of this name in each of the networks, and joins them. A frame takes `delay`
    /// to the other end, and frames stay in order.
    pub fn join(near: (&Network, &str), far: (&Network, &str), delay: Duration) -> io::Result<Self> {
        let taps = [near.0.run(|| tap(near.1))?, far.0.run(|| tap(far.1))?];
        let (ended, end) = io::pipe()?;
        let loses: Arc<Mutex<Loses>> = Arc::new(Mutex::new(Box::new(|_| false)));
        let rule = Arc::clone(&loses);
        let carrying = thread::spawn(move || {
            // No cable waits for a CPU. (If we may not, it waits like the others.)
            let _ = setpriority_process(None, -20);
            if let Err(error) = carry(&taps, &ended, delay, &rule) {
                panic!("carry frames: {error}");
            }
        });
        Ok(Self { loses, end: Some(end), carrying: Some(carrying) })
    }

    /// From now on loses the segments for which this is true.
    pub fn loses(&self, rule: impl FnMut(Segment) -> bool + Send + 'static) {
        *self.loses.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(rule);
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        drop(self.end.take());
        let carried = self.carrying.take().map(JoinHandle::join);
        if !thread::panicking() {
            carried.expect("it is joined once").expect("the wire carried frames to its end");
        }
    }
}

impl Segment {
    /// Of an Ethernet frame, if it holds one behind plain headers.
    fn read(frame: &[u8]) -> Option<Self> {
        const TCP: u8 = 6;
        let packet = frame.get(14..)?;
        let (addresses, segment): ([IpAddr; 2], &[u8]) = match frame.get(12..14)? {
            [0x08, 0x00] if *packet.get(9)? == TCP => {
                let address = |at: usize| Some(Ipv4Addr::from(*packet[at..].first_chunk::<4>()?).into());
                let header = usize::from(packet[0] & 0xf) * 4;
                ([address(12)?, address(16)?], packet.get(header..)?)
            }
            [0x86, 0xdd] if *packet.get(6)? == TCP => {
                let address = |at: usize| Some(Ipv6Addr::from(*packet[at..].first_chunk::<16>()?).into());
                ([address(8)?, address(24)?], packet.get(40..)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(*segment.get(at..)?.first_chunk()?));
        let [from, to] = addresses;
        Some(Self {
            from: SocketAddr::new(from, port(0)?),
            to: SocketAddr::new(to, port(2)?),
            flags: *segment.get(13)?,
        })
    }
}

/// Carries frames until the writer of the pipe is closed.
fn carry(taps: &[File; 2], ended: &io::PipeReader, delay: Duration, loses: &Mutex<Loses>) -> io::Result<()> {
    // The delay is the same for all, so who comes first is due first.
    let mut under_way: VecDeque<(Instant, usize, Vec<u8>)> = VecDeque::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let next = under_way.front().map(|(due, ..)| due.saturating_duration_since(Instant::now()));
        let next = next.map(|next| Timespec::try_from(next).expect("a delay is short"));
        let mut wanted = [
            PollFd::new(&taps[0], PollFlags::IN),
            PollFd::new(&taps[1], PollFlags::IN),
            PollFd::new(ended, PollFlags::IN),
        ];
        retry_on_intr(|| poll(&mut wanted, next.as_ref()))?;
        if !wanted[2].revents().is_empty() {
            return Ok(());
        }
        for (to, from) in [(1, &taps[0]), (0, &taps[1])] {
            while let Some(length) = receive(from, &mut buffer)? {
                let frame = &buffer[..length];
                let mut loses = loses.lock().unwrap_or_else(PoisonError::into_inner);
                if !Segment::read(frame).is_some_and(&mut *loses) {
                    under_way.push_back((Instant::now() + delay, to, frame.to_vec()));
                }
            }
        }
        while under_way.front().is_some_and(|(due, ..)| *due <= Instant::now()) {
            let (_, to, frame) = under_way.pop_front().expect("it has a first one");
            // A link that is down takes nothing, and neither does a cable that is not plugged in.
            let _ = (&taps[to]).write(&frame);
        }
    }
}

/// The next frame, if there is one.
fn receive(mut tap: &File, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match tap.read(buffer) {
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a TAP device in the calling thread's network, which lives as long as the file.
fn tap(name: &str) -> io::Result<File> {
    // From linux/if_tun.h.
    const TUNSETIFF: u32 = 0x4004_54ca;
    const IFF_TAP: libc::c_short = 2;
    const IFF_NO_PI: libc::c_short = 0x1000;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: IFF_TAP | IFF_NO_PI },
    };
    assert!(name.len() < libc::IFNAMSIZ, "{name} is too long for a link");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let file = open("/dev/net/tun", OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: TUNSETIFF reads a struct ifreq, and writes one back to the same place, which is
    // the setter's own copy.
    unsafe { ioctl(&file, Setter::<TUNSETIFF, libc::ifreq>::new(request)) }?;
    Ok(file.into())
}
