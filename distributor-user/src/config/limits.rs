//! Limits of a service as a whole, and of each source of its clients.
//!
//! What they are, how a prefix of addresses is read, and how `check` shows them. What may be written
//! where is meant.rs's to say, and what the kernel does by them limits.rs's.
#![forbid(unsafe_code)]

use std::{fmt, net::IpAddr, str::FromStr};

/// Limits beside those of the servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// What the service as a whole may have.
    pub service: Ceiling,
    /// What becomes of who comes above it.
    pub over: Over,
    /// What each source may have. Who comes above it is refused.
    pub source: Ceiling,
    /// The bits of an IPv4 address that tell its source, 1 to 32.
    pub prefix_ipv4: u32,
    /// The bits of an IPv6 address that tell its source, 1 to 128.
    pub prefix_ipv6: u32,
    /// Clients that belong to no source. At most `EXEMPT`.
    pub exempt: Vec<Prefix>,
}

/// Connections at a time, and new ones per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ceiling {
    /// `None`: any number.
    pub connections: Option<u32>,
    /// `None`: as fast as they come.
    pub rate: Option<Rate>,
}

/// New connections per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub per_second: u32,
    /// So many may come at once, after a pause.
    pub burst: u32,
}

/// What becomes of a connection that comes when the service has all it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    Refuse,
    /// It waits, like one for which no server has a place.
    Wait,
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub ip: IpAddr,
    pub bits: u32,
}

impl Limits {
    /// There are none.
    pub const NONE: Self = Self {
        service: Ceiling { connections: None, rate: None },
        over: Over::Refuse,
        source: Ceiling { connections: None, rate: None },
        prefix_ipv4: 32,
        prefix_ipv6: 64,
        exempt: Vec::new(),
    };
}

impl Ceiling {
    pub fn is_none(&self) -> bool {
        self.connections.is_none() && self.rate.is_none()
    }
}

impl Over {
    pub const ALL: [Self; 2] = [Self::Refuse, Self::Wait];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Wait => "wait",
        }
    }
}

impl Prefix {
    /// The same with 0 for all bits but the first ones.
    fn whole(self) -> Self {
        let ip = match self.ip {
            IpAddr::V4(ip) => {
                IpAddr::from((ip.to_bits() & u32::MAX.checked_shl(32 - self.bits).unwrap_or(0)).to_be_bytes())
            }
            IpAddr::V6(ip) => IpAddr::from(
                (ip.to_bits() & u128::MAX.checked_shl(128 - self.bits).unwrap_or(0)).to_be_bytes(),
            ),
        };
        Self { ip, bits: self.bits }
    }
}

/// `10.0.0.0/8`, `2001:db8::/32`, or an address alone.
impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let no_prefix =
            || format!("{text:?} is no prefix, write for example \"10.0.0.0/8\" or \"2001:db8::/32\"");
        let (ip, bits) = match text.split_once('/') {
            Some((ip, bits)) => (ip, Some(bits)),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| no_prefix())?;
        let ip = ip.to_canonical();
        let all = if ip.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => all,
            Some(bits) => bits.parse().ok().filter(|bits| (1..=all).contains(bits)).ok_or_else(no_prefix)?,
        };
        let prefix = Self { ip, bits };
        if prefix != prefix.whole() {
            return Err(format!("{text:?} has bits behind its prefix, write \"{}\"", prefix.whole()));
        }
        Ok(prefix)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.bits)
    }
}

/// `100 connections, 20 per second (burst 40)`
impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.connections.is_some() && self.rate.is_some() { ", " } else { "" };
        if let Some(connections) = self.connections {
            let plural = if connections == 1 { "" } else { "s" };
            write!(f, "{connections} connection{plural}{between}")?;
        }
        match self.rate {
            Some(Rate { per_second, burst }) => write!(f, "{per_second} per second (burst {burst})"),
            None => Ok(()),
        }
    }
}

/// `service 10000 connections, then wait; source 20 per second (burst 40) by /32 and /64, 1 exempt`
impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.service.is_none() {
            write!(f, "service {}, then {}", self.service, self.over.name())?;
        }
        if self.source.is_none() {
            return Ok(());
        }
        let between = if self.service.is_none() { "" } else { "; " };
        write!(f, "{between}source {} by /{} and /{}", self.source, self.prefix_ipv4, self.prefix_ipv6)?;
        match self.exempt.len() {
            0 => Ok(()),
            count => write!(f, ", {count} exempt"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_what_it_says() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("192.0.2.1", "192.0.2.1/32"),
            ("::ffff:192.0.2.1", "192.0.2.1/32"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::1", "::1/128"),
            ("128.0.0.0/1", "128.0.0.0/1"),
        ] {
            assert_eq!(
                text.parse::<Prefix>().map(|prefix| prefix.to_string()),
                Ok(shown.to_owned()),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_prefix_is_refused_with_what_to_write() {
        for (text, words) in [
            ("10.0.0.1/8", "write \"10.0.0.0/8\""),
            ("2001:db8::1/32", "write \"2001:db8::/32\""),
            ("10.0.0.0/0", "is no prefix"),
            ("10.0.0.0/33", "is no prefix"),
            ("::/129", "is no prefix"),
            ("10.0.0.0/", "is no prefix"),
            ("ten/8", "is no prefix"),
            ("", "is no prefix"),
        ] {
            let sentence = text.parse::<Prefix>().unwrap_err();
            assert!(sentence.contains(words), "{sentence}");
        }
    }
}
