//! How many connections a listener's accept queue takes.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// The longest accept queue: what listen() was told, capped by net.core.somaxconn. Of a listening socket
/// TCP_INFO has that (tcp_get_info, Linux 6.18).
pub fn backlog(listener: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: `tcp_info` is a struct of integers, for which all zeros are a value.
    let mut facts: libc::tcp_info = unsafe { mem::zeroed() };
    let mut size = size_of_val(&facts) as libc::socklen_t;
    let (fd, into) = (listener.as_raw_fd(), (&raw mut facts).cast());
    // SAFETY: the kernel writes at most `size` bytes to `facts`, which has that many.
    let result = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, into, &raw mut size) };
    if result == 0 { Ok(facts.tcpi_sacked) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsFd as _};

    use super::*;

    #[test]
    fn is_what_listen_was_told() {
        let listener = socket2::Socket::from(TcpListener::bind("127.0.0.1:0").unwrap());
        listener.listen(7).unwrap();
        assert_eq!(backlog(listener.as_fd()).unwrap(), 7);
    }
}
