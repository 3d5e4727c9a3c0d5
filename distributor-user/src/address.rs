//! An address that a service listens on: how it is written, and what it covers.
//!
//! Takes text such as `:8080`, `0.0.0.0:80` or `[::1]:80`, gives a socket address and whether
//! an IPv6 one leaves IPv4 alone. The kernel keeps a separate reuseport group for every
//! combination of the two, so they travel together. Nothing here opens a socket or asks a
//! resolver.
#![forbid(unsafe_code)]

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// Where clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ListenAddress {
    /// Address and port; the port is never 0.
    pub socket: SocketAddr,
    /// IPV6_V6ONLY of its listeners. False for IPv4.
    pub v6only: bool,
}

impl ListenAddress {
    /// Where a client on this machine connects to: the loopback, if it is every address.
    pub fn reached_at(&self) -> SocketAddr {
        let ip = match self.socket.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from(Ipv4Addr::LOCALHOST),
            IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::from(Ipv6Addr::LOCALHOST),
            ip => ip,
        };
        let mut address = self.socket;
        address.set_ip(ip);
        address
    }

    /// Its listeners take clients over IPv4.
    pub fn takes_ipv4(&self) -> bool {
        match self.socket.ip() {
            IpAddr::V4(_) => true,
            IpAddr::V6(ip) => ip.is_unspecified() && !self.v6only,
        }
    }

    /// True if a client of `other` could as well be a client of `self`.
    pub fn covers(&self, other: &Self) -> bool {
        self.socket.port() == other.socket.port()
            && match (self.socket.ip(), other.socket.ip()) {
                (IpAddr::V4(mine), IpAddr::V4(theirs)) => mine.is_unspecified() || mine == theirs,
                (IpAddr::V6(mine), IpAddr::V6(_)) => mine.is_unspecified() || self.socket == other.socket,
                (IpAddr::V6(mine), IpAddr::V4(_)) => mine.is_unspecified() && !self.v6only,
                (IpAddr::V4(_), IpAddr::V6(_)) => false,
            }
    }
}

/// Gives `[::]:P` the meaning "IPv6 only" where `0.0.0.0:P` is listed beside it.
///
/// Alone, `[::]:P` serves both families. Beside `0.0.0.0:P` that would mean two groups for
/// the same IPv4 clients, which servers that list both (nginx, for one) do not mean.
pub fn divide_families(addresses: &mut [ListenAddress]) {
    let anywhere_v4: Vec<u16> = addresses
        .iter()
        .filter(|address| address.socket.ip() == Ipv4Addr::UNSPECIFIED)
        .map(|address| address.socket.port())
        .collect();
    for address in addresses {
        if address.socket.ip() == Ipv6Addr::UNSPECIFIED && anywhere_v4.contains(&address.socket.port()) {
            address.v6only = true;
        }
    }
}

/// As servers and people write it. "v6only" is left out: `divide_families` finds it again.
impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket.fmt(f)
    }
}

/// The lossless form, for job descriptions: `[::]:80 v6only`.
impl From<ListenAddress> for String {
    fn from(address: ListenAddress) -> Self {
        match address.v6only {
            true => format!("{} v6only", address.socket),
            false => address.socket.to_string(),
        }
    }
}

impl TryFrom<String> for ListenAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for ListenAddress {
    /// A sentence that begins with the refused text.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (place, v6only) = match text.split_once(' ') {
            None => (text, false),
            Some((place, "v6only")) => (place, true),
            Some((place, _)) => {
                return Err(format!(
                    "{text:?} has something behind the address, write {place:?} or \"{place} v6only\""
                ));
            }
        };
        let socket = socket(place)?;
        match socket {
            SocketAddr::V4(_) if v6only => {
                Err(format!("{text:?} is an IPv4 address, which cannot be v6only, write {place:?}"))
            }
            SocketAddr::V4(v4) => check_v4(text, v4),
            SocketAddr::V6(v6) => check_v6(text, v6),
        }?;
        Ok(Self { socket, v6only })
    }
}

fn socket(text: &str) -> Result<SocketAddr, String> {
    let anywhere = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let digits = text.strip_prefix(':').unwrap_or(text);
    if let (false, Ok(port)) = (digits.starts_with('+'), digits.parse()) {
        return Ok(anywhere(port));
    }
    if let Ok(socket) = text.parse() {
        return Ok(socket);
    }
    // What follows only finds the most helpful sentence.
    if let Ok(ip) = text.parse::<IpAddr>() {
        let with_port = SocketAddr::from((ip, 8080));
        return Err(format!("{text:?} has no port, write \"{with_port}\""));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!("{text:?} is no address, write \"[::]:8080\", \"0.0.0.0:8080\" or \":8080\""));
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let host_is_address = host.is_empty() || bare.parse::<IpAddr>().is_ok();
    if host_is_address && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{text:?} has port {port}, write a port from 1 to 65535"));
    }
    Err(format!(
        "{text:?} is no numeric address with a port, write for example \"127.0.0.1:8080\", \"[::1]:8080\" or \":8080\""
    ))
}

fn check_port(text: &str, socket: SocketAddr) -> Result<(), String> {
    match socket.port() {
        0 => Err(format!("{text:?} has port 0, write a port from 1 to 65535")),
        _ => Ok(()),
    }
}

fn check_v4(text: &str, v4: SocketAddrV4) -> Result<(), String> {
    if v4.ip().is_multicast() || v4.ip().is_broadcast() {
        return Err(format!(
            "{text:?} is a multicast or broadcast address, write an address of this machine"
        ));
    }
    check_port(text, v4.into())
}

fn check_v6(text: &str, v6: SocketAddrV6) -> Result<(), String> {
    if let Some(v4) = v6.ip().to_ipv4_mapped() {
        let plain = SocketAddr::from((v4, v6.port()));
        return Err(format!("{text:?} is an IPv4 address written as IPv6, write \"{plain}\""));
    }
    if v6.ip().is_multicast() {
        return Err(format!(
            "{text:?} is a multicast or broadcast address, write an address of this machine"
        ));
    }
    if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 {
        return Err(format!(
            "{text:?} is link-local and names no interface, write \"[{}%2]:{}\" with the number of the interface",
            v6.ip(),
            v6.port()
        ));
    }
    check_port(text, v6.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> ListenAddress {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_alone_means_every_address_of_both_families() {
        let anywhere = ListenAddress { socket: "[::]:8080".parse().unwrap(), v6only: false };
        for text in ["8080", ":8080", "[::]:8080"] {
            assert_eq!(address(text), anywhere, "{text}");
        }
    }

    #[test]
    fn serde_keeps_v6only_and_display_leaves_it_out() {
        for (text, shown) in [
            ("[::]:80 v6only", "[::]:80"),
            ("[::]:80", "[::]:80"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[fe80::1%3]:80", "[fe80::1%3]:80"),
        ] {
            let json = serde_json::to_string(&address(text)).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            let back: ListenAddress = serde_json::from_str(&json).unwrap();
            assert_eq!(back, address(text));
            assert_eq!(back.to_string(), shown);
        }
    }

    #[test]
    fn wrong_addresses_are_refused_with_what_to_write() {
        for (text, sentence) in [
            ("127.0.0.1", r#""127.0.0.1" has no port, write "127.0.0.1:8080""#),
            ("::1", r#""::1" has no port, write "[::1]:8080""#),
            ("[::]:70000", r#""[::]:70000" has port 70000, write a port from 1 to 65535"#),
            (":0", r#"":0" has port 0, write a port from 1 to 65535"#),
            ("http", r#""http" is no address, write "[::]:8080", "0.0.0.0:8080" or ":8080""#),
            (
                "localhost:80",
                r#""localhost:80" is no numeric address with a port, write for example "127.0.0.1:8080", "[::1]:8080" or ":8080""#,
            ),
            (
                "[::ffff:10.0.0.1]:80",
                r#""[::ffff:10.0.0.1]:80" is an IPv4 address written as IPv6, write "10.0.0.1:80""#,
            ),
            (
                "0.0.0.0:80 v6only",
                r#""0.0.0.0:80 v6only" is an IPv4 address, which cannot be v6only, write "0.0.0.0:80""#,
            ),
            (
                "[::]:80 v4only",
                r#""[::]:80 v4only" has something behind the address, write "[::]:80" or "[::]:80 v6only""#,
            ),
            (
                "224.0.0.1:80",
                r#""224.0.0.1:80" is a multicast or broadcast address, write an address of this machine"#,
            ),
            (
                "[fe80::1]:80",
                r#""[fe80::1]:80" is link-local and names no interface, write "[fe80::1%2]:80" with the number of the interface"#,
            ),
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap_err(), sentence);
        }
    }

    #[test]
    fn an_address_covers_the_clients_it_would_take() {
        for (mine, theirs, covers) in [
            ("[::]:80", "0.0.0.0:80", true),
            ("[::]:80", "10.0.0.1:80", true),
            ("[::]:80 v6only", "0.0.0.0:80", false),
            ("[::]:80 v6only", "[::1]:80", true),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("0.0.0.0:80", "[::]:80", false),
            ("127.0.0.1:80", "0.0.0.0:80", false),
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("[::1]:80", "127.0.0.1:80", false),
        ] {
            assert_eq!(address(mine).covers(&address(theirs)), covers, "{mine} {theirs}");
        }
    }

    #[test]
    fn both_wildcards_of_one_port_divide_the_families() {
        let mut addresses = ["[::]:80", "0.0.0.0:80", "[::]:81", "[::1]:80"].map(address);
        divide_families(&mut addresses);
        assert_eq!(addresses, ["[::]:80 v6only", "0.0.0.0:80", "[::]:81", "[::1]:80"].map(address));
    }
}
