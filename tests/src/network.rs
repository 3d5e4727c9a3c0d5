//! Network namespaces: where a test's servers and clients live.
//!
//! A host's own namespace is entered by the test's thread, and with it by every thread and
//! process that it starts. A client that needs an address of its own lives in a second one,
//! joined to the first by a wire; the wire can be cut for one client, so that what the
//! server sends to it is lost on the way.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread,
};

use rustix::{
    fs::{Mode, OFlags, fstat, open},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use crate::netlink::{self, Hardware};

/// A network namespace, alive as long as this value.
#[derive(Debug)]
pub struct Network {
    descriptor: OwnedFd,
}

impl Network {
    /// A new namespace with its loopback up. The calling thread stays where it is.
    pub fn new() -> io::Result<Self> {
        let made = thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(UnshareFlags::NEWNET)?;
                    netlink::bring_up("lo")?;
                    Self::current()
                })
                .join()
        });
        made.expect("making a namespace does not panic")
    }

    /// The descriptor by which others may be joined to it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let descriptor = open("/proc/thread-self/ns/net", flags, Mode::empty())?;
        Ok(Self { descriptor })
    }

    /// The number by which the kernel knows it.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(fstat(&self.descriptor)?.st_ino)
    }

    /// Moves the calling thread there.
    pub fn enter(&self) -> io::Result<()> {
        let kind = Some(LinkNameSpaceType::Network);
        Ok(move_into_link_name_space(self.descriptor.as_fd(), kind)?)
    }

    /// Runs something in a thread that lives there. Sockets it makes stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let done = thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter().expect("enter a network namespace");
                    work()
                })
                .join()
        });
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A network of clients, joined by a wire to the namespace in which it was made.
#[derive(Debug)]
pub struct Clients {
    /// Where they live.
    pub network: Network,
    link: String,
    number: u8,
}

impl Clients {
    /// How many addresses of each family the clients have: `.10` and up.
    pub const ADDRESSES: u8 = 64;
    const FIRST: u8 = 10;

    const SERVER: Hardware = [2, 0, 0, 0, 0, 1];
    const CLIENT: Hardware = [2, 0, 0, 0, 0, 2];
    /// Nobody's: what is sent to it is dropped at the other end of the wire.
    const NOBODY: Hardware = [2, 0, 0, 0, 0, 3];

    /// Clients number `number` (1 to 250) of the calling thread's namespace.
    pub fn join(number: u8) -> io::Result<Self> {
        let network = Network::new()?;
        let link = format!("clients{number}");
        let near = (link.as_str(), Self::SERVER);
        let far = ("server", Self::CLIENT);
        netlink::join(near, far, network.descriptor.as_fd())?;
        netlink::bring_up(&link)?;
        let clients = Self { network, link, number };
        netlink::add_address(&clients.link, clients.server_v4(), 24)?;
        netlink::add_address(&clients.link, clients.server_v6(), 64)?;
        clients.network.run(|| {
            netlink::bring_up("server")?;
            for client in 0..Self::ADDRESSES {
                netlink::add_address("server", clients.v4(client), 24)?;
                netlink::add_address("server", clients.v6(client), 64)?;
            }
            netlink::set_neighbour("server", clients.server_v4(), Self::SERVER)?;
            netlink::set_neighbour("server", clients.server_v6(), Self::SERVER)?;
            // Whatever is behind the servers' end of the wire is reached as well.
            for gateway in [clients.server_v4(), clients.server_v6()] {
                netlink::add_default_route("server", gateway)?;
            }
            Ok::<_, io::Error>(())
        })?;
        for client in 0..Self::ADDRESSES {
            clients.mend(client)?;
        }
        Ok(clients)
    }

    /// The servers' IPv4 address on this wire.
    pub fn server_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, 77, self.number, 1).into()
    }

    /// The servers' IPv6 address on this wire.
    pub fn server_v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd77, 0, 0, self.number.into(), 0, 0, 0, 1).into()
    }

    /// The IPv4 address of one client.
    pub fn v4(&self, client: u8) -> IpAddr {
        Ipv4Addr::new(10, 77, self.number, Self::FIRST + client).into()
    }

    /// The IPv6 address of one client.
    pub fn v6(&self, client: u8) -> IpAddr {
        let host = u16::from(Self::FIRST + client);
        Ipv6Addr::new(0xfd77, 0, 0, self.number.into(), 0, 0, 0, host).into()
    }

    /// From now on nothing reaches this client, though what it sends arrives.
    pub fn cut(&self, client: u8) -> io::Result<()> {
        self.set_client(client, Self::NOBODY)
    }

    /// The client is reached again.
    pub fn mend(&self, client: u8) -> io::Result<()> {
        self.set_client(client, Self::CLIENT)
    }

    fn set_client(&self, client: u8, hardware: Hardware) -> io::Result<()> {
        netlink::set_neighbour(&self.link, self.v4(client), hardware)?;
        netlink::set_neighbour(&self.link, self.v6(client), hardware)
    }
}

/// How many SYNs had to be sent again in the calling thread's namespace.
#[track_caller]
pub fn syns_sent_again() -> u64 {
    counter("netstat", "TcpExt", "TCPSynRetrans")
}

/// How often the calling thread's namespace was told over IPv4 and IPv6 that a packet does not
/// reach its destination; over IPv6, that it is too big.
#[track_caller]
pub fn told_of_the_mtu() -> [u64; 2] {
    let text = fs::read_to_string("/proc/thread-self/net/snmp6").expect("read the counters of IPv6");
    let v6 = text.lines().find_map(|line| line.strip_prefix("Icmp6InPktTooBigs"));
    let v6 = v6.expect("a counter of packets that are too big").trim().parse().expect("a number");
    [counter("snmp", "Icmp", "InDestUnreachs"), v6]
}

/// A counter of a file that has a line of names for each line of numbers.
#[track_caller]
fn counter(file: &str, protocol: &str, name: &str) -> u64 {
    let path = format!("/proc/thread-self/net/{file}");
    let text = fs::read_to_string(path).expect("read the network's counters");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
    let names = lines.next().expect("a line of names").split(' ');
    let mut counters = names.zip(lines.next().expect("a line of numbers").split(' '));
    let (_, counter) =
        counters.find(|(its, _)| *its == name).unwrap_or_else(|| panic!("{file} has no counter {name}"));
    counter.parse().expect("a number")
}

/// How many connections to port 8080 the calling thread's network has, accepted or not, where
/// the servers listen on `[::]`.
#[track_caller]
pub fn connections() -> usize {
    const PORT: &str = ":1F90";
    const LISTEN: &str = "0A";
    const TIME_WAIT: &str = "06";
    let sockets = fs::read_to_string("/proc/thread-self/net/tcp6").expect("list the sockets");
    let is_connection = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next(), words.nth(1));
        local.is_some_and(|local| local.ends_with(PORT)) && state != Some(LISTEN) && state != Some(TIME_WAIT)
    };
    sockets.lines().filter(is_connection).count()
}

/// Moves the calling thread into new namespaces of these kinds.
pub fn unshare(kinds: UnshareFlags) -> io::Result<()> {
    assert!(!kinds.contains(UnshareFlags::FILES), "descriptors are shared by all threads of a test");
    // SAFETY: the descriptor table stays shared, as the line above makes sure.
    Ok(unsafe { unshare_unsafe(kinds) }?)
}
