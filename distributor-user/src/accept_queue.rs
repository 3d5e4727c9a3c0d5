//! A listener's accept queue: how many connections are in there, and how many may be.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// The length of the accept queue, dead connections included.
pub fn length(listener: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(facts(listener)?.tcpi_unacked)
}

/// The longest accept queue: what listen() was told, capped by net.core.somaxconn.
pub fn backlog(listener: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(facts(listener)?.tcpi_sacked)
}

/// TCP_INFO, which for a listening socket has both numbers (tcp_get_info, Linux 6.18).
fn facts(listener: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    // SAFETY: `tcp_info` is a struct of integers, for which all zeros are a value.
    let mut facts: libc::tcp_info = unsafe { mem::zeroed() };
    let mut size = size_of_val(&facts) as libc::socklen_t;
    let (fd, into) = (listener.as_raw_fd(), (&raw mut facts).cast());
    // SAFETY: the kernel writes at most `size` bytes to `facts`, which has that many.
    let result = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, into, &raw mut size) };
    if result == 0 { Ok(facts) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    use super::*;

    #[test]
    fn counts_what_was_not_accepted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _clients: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert_eq!(length(listener.as_fd()).unwrap(), 3);
        let _accepted = listener.accept().unwrap();
        assert_eq!(length(listener.as_fd()).unwrap(), 2);
        let listener = socket2::Socket::from(listener);
        listener.listen(7).unwrap();
        assert_eq!(backlog(listener.as_fd()).unwrap(), 7);
    }
}
