//! Asking the kernel which TCP sockets there are, and to close some (netlink, sock_diag).
//!
//! Takes a family, a port and states, gives each socket of the caller's network namespace with
//! its cookie, its cgroup and, if asked for, its entry in the TAG map (Linux 5.8). Only `destroy`
//! changes anything. A dump takes about a microsecond for each socket, so ask from a thread that
//! nobody waits for.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use distributor_ebpf::contract::Tag;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recv, send, socket_with,
    },
};

use crate::address::ListenAddress;

// From linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_ACK: u16 = 0x4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_CGROUP_ID: u16 = 21;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;
/// What is left of a connection after its socket is gone: TIME_WAIT, whatever state it shows.
const TIMER_TIME_WAIT: u8 = 3;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const NETLINK_HEADER: usize = 16;
const SOCKET: usize = 72;
/// The kernel sends at most 32 KiB at a time, unless one socket needs more (netlink_dump, Linux
/// 6.18).
const BUFFER: usize = 64 << 10;

/// Which sockets are asked for: a bit for each state (include/net/tcp_states.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum States {
    /// ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK and CLOSING: what `track` counts.
    Connections = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11,
    /// LISTEN
    Listeners = 1 << 10,
}

/// One socket, as it was when the kernel came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// SO_COOKIE.
    pub cookie: u64,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// The device it is bound to; 0: none.
    pub device: u32,
    /// Of a listener: connections that nobody has accepted yet. Of another: bytes that nobody has read.
    pub queue: u32,
    /// The cgroup (inode number) in which it was made, or its listener; `None` if the kernel does
    /// not tell (before Linux 5.7).
    pub cgroup: Option<u64>,
    /// If tags were asked for and it has one.
    pub tag: Option<Tag>,
}

/// All sockets in these states on the ports of these addresses, in the family of each. A port
/// is that of our side, so clients on the same machine are not among them. With the TAG map,
/// their tags are read too.
///
/// A socket that is there all the time is given once or, rarely, twice; one that comes or goes
/// meanwhile may be given or not.
pub fn sockets(
    addresses: &[ListenAddress],
    states: States,
    tags: Option<BorrowedFd<'_>>,
    mut each: impl FnMut(Socket),
) -> io::Result<()> {
    // An IPv4 client of a dual-stack listener has an IPv6 socket.
    let places: BTreeSet<(u8, u16)> = addresses
        .iter()
        .map(|address| (if address.socket.is_ipv4() { AF_INET } else { AF_INET6 }, address.socket.port()))
        .collect();
    let netlink = open()?;
    let mut buffer = vec![0; BUFFER];
    for (family, port) in places {
        send(&netlink, &request(family, port, states, tags), SendFlags::empty())?;
        loop {
            let (filled, whole) = recv(&netlink, &mut buffer[..], RecvFlags::TRUNC)?;
            if whole > filled {
                return Err(io::Error::other("the kernel tells more at a time than it does"));
            }
            if !read(&buffer[..filled], &mut each)? {
                break;
            }
        }
    }
    Ok(())
}

/// Closes connections, as a reset to both ends (Linux 4.5, CONFIG_INET_DIAG_DESTROY). Gives how many
/// were there still.
///
/// # Errors
/// EOPNOTSUPP: the kernel cannot. EPERM: we may not (CAP_NET_ADMIN).
pub fn destroy(connections: &[Socket]) -> io::Result<usize> {
    let netlink = open()?;
    let mut buffer = vec![0; BUFFER];
    let mut destroyed = 0;
    for connection in connections {
        send(&netlink, &destruction(connection), SendFlags::empty())?;
        let (filled, _) = recv(&netlink, &mut buffer[..], RecvFlags::empty())?;
        match read(&buffer[..filled], &mut |_| {}) {
            Ok(_) => destroyed += 1,
            // It has closed meanwhile.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(destroyed)
}

/// A `struct nlmsghdr` and a `struct inet_diag_req_v2` that names one connection. By its cookie too,
/// so that it is never another one.
fn destruction(connection: &Socket) -> Vec<u8> {
    let Socket { cookie, local, remote, device, .. } = *connection;
    let octets = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&ip.octets());
            octets
        }
        IpAddr::V6(ip) => ip.octets(),
    };
    let mut bytes = Vec::with_capacity(NETLINK_HEADER + 56);
    bytes.extend(72u32.to_ne_bytes());
    bytes.extend(SOCK_DESTROY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    bytes.extend([0; 8]); // sequence number and port
    bytes.extend([if local.is_ipv4() { AF_INET } else { AF_INET6 }, IPPROTO_TCP, 0, 0]);
    bytes.extend((States::Connections as u32).to_ne_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(remote.port().to_be_bytes());
    bytes.extend(octets(local));
    bytes.extend(octets(remote));
    bytes.extend(device.to_ne_bytes());
    bytes.extend((cookie as u32).to_ne_bytes());
    bytes.extend(((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

fn open() -> io::Result<OwnedFd> {
    let kind = Some(netlink::SOCK_DIAG);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, kind)?;
    bind(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
    Ok(socket)
}

/// A `struct nlmsghdr`, a `struct inet_diag_req_v2`, and the map whose entries are wanted.
fn request(family: u8, port: u16, states: States, tags: Option<BorrowedFd<'_>>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(96);
    bytes.extend([0; 4]); // the length, known at the end
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend([0; 8]); // sequence number and port, which one request does not need
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend((states as u32).to_ne_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend([0; 38]); // any remote port, any addresses, any device
    bytes.extend([0xff; 8]); // any cookie
    if let Some(map) = tags {
        for (kind, length) in [(INET_DIAG_REQ_SK_BPF_STORAGES, 12u16), (SK_DIAG_BPF_STORAGE_REQ_MAP_FD, 8)] {
            bytes.extend(length.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
        }
        bytes.extend(map.as_raw_fd().to_ne_bytes());
    }
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

/// Reads what the kernel sent at a time. False: that was the end.
fn read(mut bytes: &[u8], each: &mut impl FnMut(Socket)) -> io::Result<bool> {
    while let Some(length) = word(bytes, 0).map(|length| length as usize) {
        let Some(message) = bytes.get(NETLINK_HEADER..length) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let error = || match word(message, 0).unwrap_or(0) as i32 {
            0 => Ok(false),
            error => Err(io::Error::from_raw_os_error(-error)),
        };
        match half(bytes, 4) {
            Some(NLMSG_ERROR | NLMSG_DONE) => return error(),
            Some(SOCK_DIAG_BY_FAMILY) => {
                if let Some(socket) = socket(message) {
                    each(socket);
                }
            }
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// The socket in a `struct inet_diag_msg` and its attributes. `None` for TIME_WAIT, which is no
/// socket any more, also where it stands for FIN_WAIT2.
fn socket(message: &[u8]) -> Option<Socket> {
    let (fixed, attributes) = message.split_at_checked(SOCKET)?;
    if fixed[2] == TIMER_TIME_WAIT {
        return None;
    }
    let address = |port: usize, ip: usize| {
        let port = u16::from_be_bytes([fixed[port], fixed[port + 1]]);
        let octets: [u8; 16] = fixed[ip..ip + 16].try_into().ok()?;
        let ip = match fixed[0] {
            AF_INET => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
            _ => IpAddr::V6(Ipv6Addr::from(octets)),
        };
        Some(SocketAddr::new(ip, port))
    };
    let mut found = Socket {
        local: address(4, 8)?,
        remote: address(6, 24)?,
        device: word(fixed, 40)?,
        queue: word(fixed, 56)?,
        cookie: u64::from(word(fixed, 44)?) | u64::from(word(fixed, 48)?) << 32,
        cgroup: None,
        tag: None,
    };
    for (kind, value) in Attributes(attributes) {
        match kind {
            INET_DIAG_CGROUP_ID => found.cgroup = value.try_into().ok().map(u64::from_ne_bytes),
            INET_DIAG_SK_BPF_STORAGES => found.tag = tag(value),
            _ => {}
        }
    }
    Some(found)
}

/// The value of the only map that was asked for.
fn tag(storages: &[u8]) -> Option<Tag> {
    let (_, storage) = Attributes(storages).find(|(kind, _)| *kind == SK_DIAG_BPF_STORAGE)?;
    let (_, value) = Attributes(storage).find(|(kind, _)| *kind == SK_DIAG_BPF_STORAGE_MAP_VALUE)?;
    Some(Tag {
        slot: word(value, 0)?,
        counted: word(value, 4)?,
        index: word(value, 8)?,
        group: word(value, 12)?,
    })
}

/// Netlink attributes one after the other: their kind and their value.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        /// Two bits of the kind are flags.
        const KIND: u16 = 0x3fff;
        let length = usize::from(half(self.0, 0)?);
        let kind = half(self.0, 2)? & KIND;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    use proptest::prelude::*;
    use rustix::net::sockopt;

    use super::*;

    fn all(address: SocketAddr, states: States) -> Vec<Socket> {
        let mut found = Vec::new();
        let address = ListenAddress { socket: address, v6only: false };
        sockets(&[address], states, None, |socket| found.push(socket)).unwrap();
        found
    }

    #[test]
    fn a_listener_and_the_server_side_of_its_connections_are_found_in_both_families() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let address = listener.local_addr().unwrap();
            let client = TcpStream::connect(address).unwrap();
            let (server, _) = listener.accept().unwrap();
            // In nobody's accept queue any more, and here another one is.
            let _queued = TcpStream::connect(address).unwrap();

            let listening = all(address, States::Listeners);
            assert_eq!(listening.len(), 1);
            assert_eq!(listening[0].cookie, sockopt::socket_cookie(&listener).unwrap());
            assert_eq!(listening[0].local, address);
            assert!(listening[0].cgroup.is_some());
            assert_eq!(listening[0].queue, 1);

            let connected = all(address, States::Connections);
            assert_eq!(connected.len(), 2);
            let cookie = sockopt::socket_cookie(&server).unwrap();
            let it = connected.iter().find(|socket| socket.cookie == cookie).unwrap();
            assert_eq!((it.local, it.remote), (address, client.local_addr().unwrap()));
            assert_eq!(it.tag, None);
        }
    }

    #[test]
    fn what_is_left_of_a_connection_is_no_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        // The server closes first, so its side stays in TIME_WAIT.
        drop(server);
        drop(client);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !all(address, States::Connections).is_empty() {
            assert!(std::time::Instant::now() < deadline, "TIME_WAIT is taken for a connection");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    #[test]
    fn a_connection_is_closed_at_both_ends_and_no_other_is() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: not root, so the kernel closes nothing for us");
            return;
        }
        for (address, connect) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")]
        {
            let listener = TcpListener::bind(address).unwrap();
            let address = listener.local_addr().unwrap();
            let connect = SocketAddr::new(connect.parse().unwrap(), address.port());
            let mut clients = [(); 2].map(|()| TcpStream::connect(connect).unwrap());
            let mut servers = [(); 2].map(|()| listener.accept().unwrap().0);
            let port = clients[0].local_addr().unwrap().port();
            let mut found = all(address, States::Connections);
            found.retain(|socket| socket.remote.port() == port);
            assert_eq!(found.len(), 1);
            match destroy(&found) {
                Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
                    eprintln!("SKIPPED: this kernel has no CONFIG_INET_DIAG_DESTROY");
                    return;
                }
                destroyed => assert_eq!(destroyed.unwrap(), 1, "{address}"),
            }
            assert_eq!(clients[0].read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            assert!(servers[0].read(&mut [0]).is_err());
            assert_eq!(destroy(&found).unwrap(), 0, "it is gone");
            servers[1].write_all(b"x").unwrap();
            assert_eq!(clients[1].read(&mut [0]).unwrap(), 1);
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = ListenAddress { socket: listener.local_addr().unwrap(), v6only: false };
        // Not a map.
        let refused = sockets(&[address], States::Connections, Some(listener.as_fd()), |_| {});
        assert!(refused.is_err());
    }

    proptest! {
        #[test]
        fn whatever_bytes_come_they_give_sockets_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes, &mut |_| {});
            let _ = socket(&bytes);
            let _ = tag(&bytes);
        }

        #[test]
        fn a_cut_message_gives_no_half_a_socket(cut in 0usize..SOCKET) {
            prop_assert_eq!(socket(&[0; SOCKET][..cut]), None);
        }
    }
}
