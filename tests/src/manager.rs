//! A service manager of our own: what is said to its NOTIFY_SOCKET, and in whose name.

#![forbid(unsafe_code)]

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    path::Path,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};

use crate::wait::{seconds, try_for};

/// Its socket.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
}

/// One datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Who said it, as the kernel has it.
    pub pid: i32,
    /// Its lines.
    pub words: Vec<String>,
}

impl Manager {
    /// With a file for a name.
    #[track_caller]
    pub fn at(path: &Path) -> Self {
        Self::of(UnixDatagram::bind(path).expect("make the manager's socket"))
    }

    /// With an abstract name.
    #[track_caller]
    pub fn called(name: &str) -> Self {
        let address = SocketAddr::from_abstract_name(name).expect("a name for the manager's socket");
        Self::of(UnixDatagram::bind_addr(&address).expect("make the manager's socket"))
    }

    #[track_caller]
    fn of(socket: UnixDatagram) -> Self {
        sockopt::set_socket_passcred(&socket, true).expect("ask for credentials");
        socket.set_nonblocking(true).expect("look without waiting");
        Self { socket }
    }

    /// What was said next, if anything was.
    pub fn hear(&self) -> Option<Said> {
        let mut words = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut words)];
        let length = recvmsg(&self.socket, &mut buffers, &mut control, RecvFlags::empty()).ok()?.bytes;
        let pid = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmCredentials(sender) => Some(sender.pid.as_raw_pid()),
            _ => None,
        });
        let text = String::from_utf8_lossy(&words[..length]).into_owned();
        Some(Said { pid: pid.unwrap_or(0), words: text.lines().map(str::to_owned).collect() })
    }

    /// Waits for this word, and gives all that was said until then.
    #[track_caller]
    pub fn wait_for(&self, word: &str) -> Vec<Said> {
        let mut heard = Vec::new();
        let found = try_for(seconds(20.0), || {
            while let Some(said) = self.hear() {
                let is_it = said.words.iter().any(|its| its == word);
                heard.push(said);
                if is_it {
                    return Some(());
                }
            }
            None
        });
        assert!(found.is_some(), "nobody said {word:?}, but: {heard:#?}");
        heard
    }
}
