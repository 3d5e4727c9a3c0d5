//! DIRECTED: connections of ours that go to one server, and count for nobody.
//!
//! Before it connects, whoever checks a server says from which address and port, and to which slot.
//! That holds until what it was given is dropped. Nothing outlives a distributor here: the next one
//! begins with an empty map.
#![forbid(unsafe_code)]

use std::{cell::RefCell, net::SocketAddr, path::Path, rc::Rc};

use anyhow::Context as _;
use aya::maps::{HashMap, MapData};
use distributor_ebpf::contract::{Address, Directed};

use super::{address_of, open_map};

/// Which connections are directed, of one service.
pub struct Directions {
    map: RefCell<HashMap<MapData, Address, Directed>>,
}

/// As long as it is there, connections from this client are directed.
pub struct Direction {
    of: Rc<Directions>,
    client: Address,
}

impl Directions {
    /// Opens the map that [`super::Kernel::open`] has pinned, and empties it.
    pub fn open(pins: &Path) -> anyhow::Result<Rc<Self>> {
        let mut map: HashMap<MapData, Address, Directed> = open_map(pins, "DIRECTED")?.try_into()?;
        let left: Vec<Address> = map.keys().collect::<Result<_, _>>().context("read DIRECTED")?;
        for client in left {
            map.remove(&client).context("empty DIRECTED")?;
        }
        Ok(Rc::new(Self { map: RefCell::new(map) }))
    }

    /// From now on connections from this address and port go to that server.
    ///
    /// # Errors
    /// The map is full: thousands of checks are under way.
    pub fn direct(self: &Rc<Self>, client: SocketAddr, to: Directed) -> anyhow::Result<Direction> {
        let client = address_of(client);
        self.map.borrow_mut().insert(client, to, 0).context("write DIRECTED")?;
        Ok(Direction { of: Rc::clone(self), client })
    }
}

impl Drop for Direction {
    fn drop(&mut self) {
        // It is there, unless somebody else has removed it.
        let _ = self.of.map.borrow_mut().remove(&self.client);
    }
}
