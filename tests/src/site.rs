//! Several hosts and the clients of all of them, joined by a router.
//!
//! Each host, the clients and the router have a network namespace of their own, so whatever a
//! client sends crosses two links and a router as between machines, and no packet leaves this
//! one. The link number 0 is the clients', 1 that of the first host, and so on.

#![forbid(unsafe_code)]

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use crate::{
    host::Host,
    netlink::{self, Hardware, Route},
    network::Network,
    wire::Wire,
};

/// The hosts, the clients and what joins them.
#[derive(Debug)]
pub struct Site {
    pub hosts: Vec<Host>,
    /// Where the clients live, with one address of each family.
    pub clients: Network,
    pub router: Network,
}

/// The number of the clients' link.
pub const CLIENTS: u8 = 0;

/// What an ordinary link takes, in bytes.
pub const ETHERNET: u32 = 1500;

/// The port of the hosts' services.
const PORT: u16 = 8080;

impl Site {
    /// So many hosts. No link takes packets that are longer than `mtu` bytes.
    #[track_caller]
    pub fn new(hosts: u8, mtu: u32) -> Self {
        let site = Self::without_clients(hosts, mtu);
        site.join(CLIENTS, &site.clients, mtu).expect("join the clients to the router");
        site
    }

    /// The same, with clients who are joined to the others by a wire that takes so long.
    #[track_caller]
    pub fn far(hosts: u8, delay: Duration) -> (Self, Wire) {
        let site = Self::without_clients(hosts, ETHERNET);
        let wire = Wire::join((&site.router, &link(CLIENTS)), (&site.clients, FAR), delay)
            .expect("join the clients to the router by a wire");
        site.settle(CLIENTS, &site.clients, ETHERNET).expect("settle the clients");
        (site, wire)
    }

    #[track_caller]
    fn without_clients(hosts: u8, mtu: u32) -> Self {
        let make = || Network::new().expect("make a network namespace");
        // Hosts first, so that they say what is missing where tests cannot run.
        let hosts = (0..hosts).map(|_| Host::apart()).collect();
        let site = Self { hosts, clients: make(), router: make() };
        site.router.run(set_up_router).expect("let the router forward");
        for (number, host) in (1..).zip(&site.hosts) {
            site.join(number, host.network(), mtu).expect("join a host to the router");
        }
        site
    }

    /// Joins a network to the router by a pair of links.
    fn join(&self, number: u8, network: &Network, mtu: u32) -> io::Result<()> {
        let link = link(number);
        let (near, far) = ((link.as_str(), hardware(1)), (FAR, hardware(2)));
        self.router.run(|| netlink::join(near, far, network.descriptor()))?;
        self.settle(number, network, mtu)
    }

    /// Gives both ends of a link what they need beside each other.
    fn settle(&self, number: u8, network: &Network, mtu: u32) -> io::Result<()> {
        let ends = [(&self.router, &*link(number), ROUTER), (network, FAR, MEMBER)];
        for (network, link, member) in ends {
            network.run(|| {
                // Or the link's own address cannot be used for its first second, and until then nobody
                // can ask who has another one.
                fs::write(format!("/proc/sys/net/ipv6/conf/{link}/accept_dad"), "0")?;
                netlink::set_mtu(link, mtu)?;
                netlink::bring_up(link)?;
                netlink::add_address(link, v4(number, member), 24)?;
                netlink::add_address(link, v6(number, member), 64)
            })?;
        }
        network.run(|| {
            netlink::add_default_route(FAR, v4(number, ROUTER))?;
            netlink::add_default_route(FAR, v6(number, ROUTER))
        })
    }

    /// The addresses of a host's service, over IPv4 and IPv6. Hosts count from 1.
    pub fn service(&self, host: u8) -> [SocketAddr; 2] {
        addresses(host).map(|address| SocketAddr::new(address, PORT))
    }

    /// Sets the MTU of a link, at both of its ends.
    pub fn set_mtu(&self, number: u8, mtu: u32) -> io::Result<()> {
        let member = match number {
            CLIENTS => &self.clients,
            host => self.hosts[usize::from(host) - 1].network(),
        };
        member.run(|| netlink::set_mtu(FAR, mtu))?;
        self.router.run(|| netlink::set_mtu(&link(number), mtu))
    }

    /// From now on the way to this member takes no packets that are longer, over IPv4 and IPv6,
    /// though no link says so.
    pub fn narrow(&self, number: u8, [v4, v6]: [u32; 2]) -> io::Result<()> {
        let [to_v4, to_v6] = addresses(number);
        let link = link(number);
        let route = |to, prefix, mtu| Route { to, prefix, link: &link, gateway: None, mtu: Some(mtu) };
        self.router.run(|| {
            netlink::add_route(route(to_v4, 32, v4))?;
            netlink::add_route(route(to_v6, 128, v6))
        })
    }

    /// Pulls the plug of a link at the router.
    pub fn unplug(&self, number: u8) -> io::Result<()> {
        self.router.run(|| netlink::bring_down(&link(number)))
    }

    /// Plugs it in again.
    pub fn plug(&self, number: u8) -> io::Result<()> {
        self.router.run(|| netlink::bring_up(&link(number)))
    }
}

/// The addresses of a member, over IPv4 and IPv6.
pub fn addresses(number: u8) -> [IpAddr; 2] {
    [v4(number, MEMBER), v6(number, MEMBER)]
}

/// What a member calls its link.
const FAR: &str = "router";

const MEMBER: u8 = 1;
const ROUTER: u8 = 254;

/// What the router calls a member's link.
fn link(number: u8) -> String {
    format!("member{number}")
}

fn v4(number: u8, member: u8) -> IpAddr {
    Ipv4Addr::new(10, 78, number, member).into()
}

fn v6(number: u8, member: u8) -> IpAddr {
    Ipv6Addr::new(0xfd78, 0, 0, number.into(), 0, 0, 0, member.into()).into()
}

fn hardware(end: u8) -> Hardware {
    [2, 0, 0, 0, 1, end]
}

fn set_up_router() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
    // As over IPv4, a link that was down has its addresses again.
    fs::write("/proc/sys/net/ipv6/conf/all/keep_addr_on_down", "1")
}
