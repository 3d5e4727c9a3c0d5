//! The few questions to the kernel's network configuration that a test needs.
//!
//! Bring a link up or down, set its MTU, join two namespaces by a pair of links, give an
//! address, add a route, fix a neighbour. Written by hand, so that the tests run where no `ip` is installed. Everything
//! happens in the network namespace of the calling thread.

#![forbid(unsafe_code)]

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netdevice,
    netlink::SocketAddrNetlink, recv, send, socket_with,
};

/// A link's hardware address.
pub type Hardware = [u8; 6];

// From linux/rtnetlink.h, linux/netlink.h, linux/if_link.h and linux/veth.h.
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_METRICS: u16 = 8;
const RTAX_MTU: u16 = 2;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Brings a link up.
pub fn bring_up(link: &str) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, 0);
    message.put_link(index(link)?, IFF_UP, IFF_UP);
    message.send()
}

/// Takes a link down. The other end of a pair sees its carrier go.
pub fn bring_down(link: &str) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, 0);
    message.put_link(index(link)?, 0, IFF_UP);
    message.send()
}

/// Sets the longest packet that a link takes, in bytes.
pub fn set_mtu(link: &str, mtu: u32) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, 0);
    message.put_link(index(link)?, 0, 0);
    message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
    message.send()
}

/// Makes a pair of joined links: `near` here, `far` in the namespace of the descriptor.
pub fn join(near: (&str, Hardware), far: (&str, Hardware), namespace: BorrowedFd<'_>) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL);
    message.put_link(0, 0, 0);
    message.attribute(IFLA_IFNAME, near.0.as_bytes());
    message.attribute(IFLA_ADDRESS, &near.1);
    message.nest(IFLA_LINKINFO, |info| {
        info.attribute(IFLA_INFO_KIND, b"veth");
        info.nest(IFLA_INFO_DATA, |data| {
            data.nest(VETH_INFO_PEER, |peer| {
                peer.put_link(0, 0, 0);
                peer.attribute(IFLA_IFNAME, far.0.as_bytes());
                peer.attribute(IFLA_ADDRESS, &far.1);
                peer.attribute(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes());
            });
        });
    });
    message.send()
}

/// Gives a link an address.
pub fn add_address(link: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL);
    let (family, bytes) = family_and_bytes(address);
    // Without NODAD an IPv6 address cannot be used for its first second.
    message.put(&[family, prefix, IFA_F_NODAD, 0]);
    message.put(&index(link)?.to_ne_bytes());
    message.attribute(IFA_LOCAL, &bytes);
    message.attribute(IFA_ADDRESS, &bytes);
    message.send()
}

/// Where packets go: to the destinations that begin with these bits, over a link.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    pub to: IpAddr,
    /// How many bits of `to` count: with 0, everything goes there.
    pub prefix: u8,
    pub link: &'a str,
    /// The router on that link, if the destinations are not on it themselves.
    pub gateway: Option<IpAddr>,
    /// The longest packet that this way takes, in bytes, if not the link's.
    pub mtu: Option<u32>,
}

/// Adds a route.
pub fn add_route(route: Route<'_>) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL);
    let (family, bytes) = family_and_bytes(route.to);
    let scope = if route.gateway.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
    message.put(&[family, route.prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST]);
    message.put(&[0; 4]);
    if route.prefix > 0 {
        message.attribute(RTA_DST, &bytes);
    }
    message.attribute(RTA_OIF, &index(route.link)?.to_ne_bytes());
    if let Some(gateway) = route.gateway {
        message.attribute(RTA_GATEWAY, &family_and_bytes(gateway).1);
    }
    if let Some(mtu) = route.mtu {
        message.nest(RTA_METRICS, |metrics| metrics.attribute(RTAX_MTU, &mtu.to_ne_bytes()));
    }
    message.send()
}

/// Sends whatever has no other way to a router on a link.
pub fn add_default_route(link: &str, gateway: IpAddr) -> io::Result<()> {
    add_route(Route { to: gateway, prefix: 0, link, gateway: Some(gateway), mtu: None })
}

/// Says once and for all which hardware address an address has on a link.
pub fn set_neighbour(link: &str, address: IpAddr, hardware: Hardware) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE);
    let (family, bytes) = family_and_bytes(address);
    message.put(&[family, 0, 0, 0]);
    message.put(&index(link)?.to_ne_bytes());
    message.put(&NUD_PERMANENT.to_ne_bytes());
    message.put(&[0, 0]);
    message.attribute(NDA_DST, &bytes);
    message.attribute(NDA_LLADDR, &hardware);
    message.send()
}

/// One request: a header, a fixed part, and attributes that may nest.
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4]; // the length, known when it is sent
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend([0; 8]); // sequence number and port, which one request does not need
        Self { bytes }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// A `struct ifinfomsg`: which link, its flags, and which of them to change.
    fn put_link(&mut self, index: u32, flags: u32, change: u32) {
        self.put(&[0; 4]);
        self.put(&index.to_ne_bytes());
        self.put(&flags.to_ne_bytes());
        self.put(&change.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nest(kind, |message| message.put(value));
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.put(&[0; 2]);
        self.put(&kind.to_ne_bytes());
        fill(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn send(mut self) -> io::Result<()> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let socket = route_socket()?;
        send(&socket, &self.bytes, SendFlags::empty())?;
        let mut answer = [0; 4096];
        let (filled, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
        let answer = &answer[..filled];
        let kind = u16::from_ne_bytes([answer[4], answer[5]]);
        if kind != NLMSG_ERROR {
            return Err(io::Error::other(format!("unexpected answer of kind {kind}")));
        }
        match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }
}

fn route_socket() -> io::Result<OwnedFd> {
    // Protocol 0 of this family is the route protocol.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    Ok(socket)
}

fn index(link: &str) -> io::Result<u32> {
    Ok(netdevice::name_to_index(route_socket()?, link)?)
}

fn family_and_bytes(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    }
}
