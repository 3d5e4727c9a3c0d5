//! Finding the listening sockets of processes, and judging whether they can be steered.
//!
//! Takes process numbers, gives duplicates of their listening sockets with what the kernel says
//! of them (pidfd_getfd, Linux 5.6); and takes what was found and the service's addresses, and
//! gives a verdict. It changes nothing: adopting is the caller's.
#![forbid(unsafe_code)]

use std::{
    collections::HashSet,
    fs, io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    net::{AddressFamily, getsockname, sockopt},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use crate::address::ListenAddress;

/// A listening TCP socket of some process.
#[derive(Debug)]
pub struct Found {
    /// A duplicate. Drop it soon: while it is open, the listener outlives its process.
    pub fd: OwnedFd,
    /// SO_COOKIE.
    pub cookie: u64,
    pub facts: Facts,
}

/// What the kernel says of a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    pub address: SocketAddr,
    pub v6only: bool,
    pub mptcp: bool,
    /// SO_REUSEPORT: it can be in a group.
    pub shared: bool,
    /// The uid of the socket: all sockets of a group have the same.
    pub uid: u32,
}

/// What to do with a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It belongs into the group of this address of the service.
    Adopt { address: usize },
    /// It is none of the service's business.
    Elsewhere,
    /// It is on a port of the service, and cannot be steered. The sentence says what to change.
    Misbound { sentence: String },
}

/// All listening TCP sockets of these processes, each once. A process that ends meanwhile, or a
/// descriptor that closes, is passed over.
///
/// # Errors
/// What it takes to look is lacking, descriptors for example.
pub fn find(processes: &[u32]) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    each_socket(processes, |socket| found.extend(listening(socket)))?;
    Ok(found)
}

/// A duplicate of every socket of these processes, each once. Likewise.
pub fn each_socket(processes: &[u32], mut each: impl FnMut(OwnedFd)) -> io::Result<()> {
    let mut seen = HashSet::new();
    for &process in processes {
        let Some(pid) = i32::try_from(process).ok().and_then(Pid::from_raw) else { continue };
        let Some(entries) = unless_lacking(fs::read_dir(format!("/proc/{process}/fd")))? else { continue };
        let sockets: Vec<i32> = entries
            .flatten()
            .filter(|entry| {
                fs::read_link(entry.path()).is_ok_and(|target| {
                    let target = target.into_os_string();
                    target.as_encoded_bytes().starts_with(b"socket:") && seen.insert(target)
                })
            })
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        if sockets.is_empty() {
            continue;
        }
        let Some(pidfd) = unless_lacking(pidfd_open(pid, PidfdFlags::empty()))? else { continue };
        for number in sockets {
            let fd = pidfd_getfd(pidfd.as_fd(), number, PidfdGetfdFlags::empty());
            if let Some(fd) = unless_lacking(fd)? {
                each(fd);
            }
        }
    }
    Ok(())
}

/// Passes on what says nothing about the process.
fn unless_lacking<T>(result: Result<T, impl Into<io::Error>>) -> io::Result<Option<T>> {
    match result.map_err(Into::into) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
            Err(error)
        }
        other => Ok(other.ok()),
    }
}

/// The socket, if it listens for TCP connections.
fn listening(fd: OwnedFd) -> Option<Found> {
    if !sockopt::socket_acceptconn(&fd).ok()? {
        return None;
    }
    let domain = sockopt::socket_domain(&fd).ok()?;
    if domain != AddressFamily::INET && domain != AddressFamily::INET6 {
        return None;
    }
    let address = SocketAddr::try_from(getsockname(&fd).ok()?).ok()?;
    // IPPROTO_MPTCP (262) has no name in rustix's list on every version: it is what is not TCP.
    let mptcp = sockopt::socket_protocol(&fd).ok()? != Some(rustix::net::ipproto::TCP);
    Some(Found {
        cookie: sockopt::socket_cookie(&fd).ok()?,
        facts: Facts {
            address,
            v6only: domain == AddressFamily::INET6 && sockopt::ipv6_v6only(&fd).ok()?,
            mptcp,
            shared: sockopt::socket_reuseport(&fd).ok()?,
            uid: rustix::fs::fstat(&fd).ok()?.st_uid,
        },
        fd,
    })
}

/// Whether a listener can be steered for a service that listens on `listen` with sockets of
/// `uid`.
pub fn judge(facts: &Facts, listen: &[ListenAddress], uid: u32) -> Verdict {
    let port = facts.address.port();
    if !listen.iter().any(|address| address.socket.port() == port) {
        return Verdict::Elsewhere;
    }
    let misbound = |sentence: String| Verdict::Misbound { sentence };
    let Some(address) = listen.iter().position(|address| address.socket == facts.address) else {
        return misbound(wrong_address(facts.address, listen));
    };
    if facts.mptcp {
        return misbound(format!(
            "listens on {} with MPTCP, which cannot be shared between servers: turn it off \
             (Go: GODEBUG=multipathtcp=0)",
            facts.address
        ));
    }
    // One IPv6 address is for IPv6 only, whatever was asked (__inet6_bind, Linux 6.18).
    let for_all = facts.address.is_ipv6() && facts.address.ip().is_unspecified();
    if for_all && facts.v6only != listen[address].v6only {
        return misbound(if facts.v6only {
            format!(
                "listens on {0} for IPv6 only, the service for IPv4 too: turn IPV6_V6ONLY off in the \
                 server (nginx: listen {0} ipv6only=off), or add 0.0.0.0:{port} to listen",
                facts.address
            )
        } else {
            format!(
                "listens on {0} for IPv4 too, the service for IPv6 only: let it bind 0.0.0.0:{port} and {0} \
                 separately, or take 0.0.0.0:{port} out of listen",
                facts.address
            )
        });
    }
    if !facts.shared {
        return misbound(format!(
            "listens on {} without SO_REUSEPORT, so that the kernel cannot share the address: start it under \
             dist-ctl, or set SO_REUSEPORT in the server",
            facts.address
        ));
    }
    if facts.uid != uid {
        return misbound(format!(
            "its socket on {} belongs to user {}, the service's sockets to user {uid}: all servers of a \
             service need one user, set it with user",
            facts.address, facts.uid
        ));
    }
    Verdict::Adopt { address }
}

/// What is wrong with an address on the service's port that the service does not listen on.
pub fn wrong_address(bound: SocketAddr, listen: &[ListenAddress]) -> String {
    let same_port: Vec<String> = listen
        .iter()
        .filter(|address| address.socket.port() == bound.port())
        .map(ToString::to_string)
        .collect();
    let served = same_port.join(" and ");
    let families = listen
        .iter()
        .any(|address| address.socket.port() == bound.port() && address.socket.is_ipv4() != bound.is_ipv4());
    let java = if families && bound.is_ipv6() { " (Java: -Djava.net.preferIPv4Stack=true)" } else { "" };
    format!(
        "binds {bound}, the service listens on {served}: make the server bind {served}{java}, or change listen"
    )
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn listen(addresses: &[&str]) -> Vec<ListenAddress> {
        let mut addresses: Vec<ListenAddress> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        crate::address::divide_families(&mut addresses);
        addresses
    }

    fn facts(address: &str) -> Facts {
        Facts { address: address.parse().unwrap(), v6only: false, mptcp: false, shared: true, uid: 7 }
    }

    fn sentence(facts: Facts, addresses: &[&str]) -> String {
        match judge(&facts, &listen(addresses), 7) {
            Verdict::Misbound { sentence } => sentence,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_listeners_of_this_very_process_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let found = find(&[std::process::id()]).unwrap();
        let it = found.iter().find(|found| found.facts.address == address).unwrap();
        assert!(!it.facts.mptcp && !it.facts.shared && !it.facts.v6only);
        assert_eq!(it.cookie, sockopt::socket_cookie(&listener).unwrap());
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        assert!(find(&[0x7fff_fff0]).unwrap().is_empty());
    }

    #[test]
    fn the_right_address_is_adopted_into_its_group() {
        let listen = listen(&["0.0.0.0:80", "127.0.0.1:81"]);
        assert_eq!(judge(&facts("127.0.0.1:81"), &listen, 7), Verdict::Adopt { address: 1 });
    }

    #[test]
    fn another_port_is_nobodys_business() {
        assert_eq!(judge(&facts("0.0.0.0:9090"), &listen(&["[::]:80"]), 7), Verdict::Elsewhere);
    }

    #[test]
    fn another_family_is_told_with_what_to_change() {
        assert_eq!(
            sentence(facts("0.0.0.0:80"), &["[::]:80"]),
            "binds 0.0.0.0:80, the service listens on [::]:80: make the server bind [::]:80, or change listen"
        );
        assert_eq!(
            sentence(facts("[::]:80"), &["0.0.0.0:80"]),
            "binds [::]:80, the service listens on 0.0.0.0:80: make the server bind 0.0.0.0:80 \
             (Java: -Djava.net.preferIPv4Stack=true), or change listen"
        );
    }

    #[test]
    fn half_of_a_dual_stack_address_is_refused() {
        let only = Facts { v6only: true, ..facts("[::]:80") };
        assert!(sentence(only, &["[::]:80"]).contains("for IPv6 only, the service for IPv4 too"));
        assert!(sentence(facts("[::]:80"), &["0.0.0.0:80", "[::]:80"]).contains("the service for IPv6 only"));
        assert_eq!(judge(&only, &listen(&["0.0.0.0:80", "[::]:80"]), 7), Verdict::Adopt { address: 1 });
    }

    #[test]
    fn one_ipv6_address_is_for_ipv6_only_and_that_is_right() {
        let one = Facts { v6only: true, ..facts("[::1]:80") };
        assert_eq!(judge(&one, &listen(&["[::1]:80"]), 7), Verdict::Adopt { address: 0 });
    }

    #[test]
    fn mptcp_is_refused_by_name() {
        let mptcp = Facts { mptcp: true, ..facts("[::]:80") };
        assert!(sentence(mptcp, &["[::]:80"]).contains("GODEBUG=multipathtcp=0"));
    }

    #[test]
    fn an_unshared_socket_and_a_foreign_one_are_refused() {
        let unshared = Facts { shared: false, ..facts("[::]:80") };
        assert!(sentence(unshared, &["[::]:80"]).contains("without SO_REUSEPORT"));
        let foreign = Facts { uid: 8, ..facts("[::]:80") };
        assert!(sentence(foreign, &["[::]:80"]).contains("belongs to user 8"));
    }
}
