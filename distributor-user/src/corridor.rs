//! The rooms of one group, and the order in which they are used and emptied.
//!
//! Pure. Rooms are known by their index in SOCKETS. A room is ready (its turn to be current
//! comes, in the order of the ring), spare (for parking), or was used: then somebody waits in
//! it, or nobody came. This file keeps in step with the kernel, which goes through ring and
//! spares by itself, and tells which rooms are to be emptied next. What it reads of the kernel is
//! given to it; what it wants written is returned.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, VecDeque};

/// One group's rooms.
#[derive(Clone, Debug, Default)]
pub struct Corridor {
    /// The current room and those after it.
    ring: VecDeque<u32>,
    /// The sequence number of the current room.
    current: u64,
    spares: VecDeque<u32>,
    /// Spare rooms that were ever taken.
    taken: u64,
    /// Rooms in which somebody waits, by the order of the first that came.
    occupied: BTreeSet<(u64, u32)>,
    /// Rooms that were used, and nobody had come when we last looked.
    deserted: Vec<u32>,
}

impl Corridor {
    /// The corridor that an earlier distributor left. `ring` begins with the current room, whose
    /// sequence number is `current`; `used` are all others in which somebody may wait.
    pub fn recovered(
        current: u64,
        ring: Vec<u32>,
        taken: u64,
        spares: Vec<u32>,
        used: Vec<u32>,
        order: impl Fn(u32) -> u64,
    ) -> Self {
        let mut corridor = Self {
            ring: ring.into(),
            current,
            spares: spares.into(),
            taken,
            deserted: used,
            ..Self::default()
        };
        corridor.settle(order);
        corridor
    }

    /// Adds a room that becomes current when those before it were. Returns its sequence number.
    pub fn add_ready(&mut self, room: u32) -> u64 {
        self.ring.push_back(room);
        self.current + self.ring.len() as u64 - 1
    }

    /// Adds a room for parking. Returns its sequence number.
    pub fn add_spare(&mut self, room: u32) -> u64 {
        self.spares.push_back(room);
        self.taken + self.spares.len() as u64 - 1
    }

    /// Catches up with the kernel, which made the room with the sequence number `current`
    /// current, and took so many spare rooms in all. `order` is a room's place in the order: that
    /// of the first that came, or 0 if nobody came.
    pub fn catch_up(&mut self, current: u64, taken: u64, order: impl Fn(u32) -> u64) {
        while self.current < current
            && let Some(room) = self.ring.pop_front()
        {
            self.current += 1;
            self.deserted.push(room);
        }
        while self.taken < taken
            && let Some(room) = self.spares.pop_front()
        {
            self.taken += 1;
            self.deserted.push(room);
        }
        self.settle(order);
    }

    /// Somebody may have come to a room that was deserted: his handshake was slow.
    fn settle(&mut self, order: impl Fn(u32) -> u64) {
        self.deserted.retain(|&room| match order(room) {
            0 => true,
            order => {
                self.occupied.insert((order, room));
                false
            }
        });
    }

    /// The two rooms that are to be emptied next, with their places in the order. The current
    /// room is among them only if there is another to become current.
    pub fn fronts(&self, order: impl Fn(u32) -> u64) -> impl Iterator<Item = (u64, u32)> {
        let current = self.ring.front().filter(|_| self.ring.len() > 1);
        let current = current.map(|&room| (order(room), room)).filter(|(order, _)| *order != 0);
        self.occupied.iter().take(2).copied().chain(current)
    }

    /// Takes a room out that was used or is current, because it is being closed. `order` is the
    /// place that it has here, 0 if it is deserted. Returns the sequence number that is current
    /// from now on, if that changes.
    pub fn remove(&mut self, order: u64, room: u32) -> Option<u64> {
        if !self.occupied.remove(&(order, room)) {
            self.deserted.retain(|&other| other != room);
        }
        if self.ring.front() == Some(&room) {
            self.ring.pop_front();
            self.current += 1;
            return Some(self.current);
        }
        None
    }

    /// Rooms in which somebody waits, in order, with their place in it; the current one is not
    /// among them.
    pub fn occupied(&self) -> impl Iterator<Item = (u64, u32)> {
        self.occupied.iter().copied()
    }

    /// Rooms that were used without anybody having come.
    pub fn deserted(&self) -> &[u32] {
        &self.deserted
    }

    /// The room that new arrivals go to.
    pub fn current(&self) -> Option<u32> {
        self.ring.front().copied()
    }

    /// Its sequence number.
    pub fn current_sequence(&self) -> u64 {
        self.current
    }

    /// Rooms whose turn to be current has not come.
    pub fn ready(&self) -> impl Iterator<Item = u32> {
        self.ring.iter().skip(1).copied()
    }

    /// How many are ready.
    pub fn ready_len(&self) -> usize {
        self.ring.len().saturating_sub(1)
    }

    /// How many are spare.
    pub fn spare_len(&self) -> usize {
        self.spares.len()
    }

    /// All of them.
    pub fn len(&self) -> usize {
        self.ring.len() + self.spares.len() + self.occupied.len() + self.deserted.len()
    }

    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A client: when its SYN came, and when its handshake was complete.
    #[derive(Clone, Copy, Debug)]
    struct Client {
        syn: u64,
        complete: u64,
    }

    /// One group: what the kernel does with rooms, and what the attendant does with a corridor.
    #[derive(Default)]
    struct Group {
        corridor: Corridor,
        /// What the programs see: the rooms of the ring and the spares, by sequence number.
        ring: Vec<u32>,
        spares: Vec<u32>,
        current: usize,
        taken: usize,
        /// The open rooms: the first one's place in the order, and who is in there.
        open: BTreeMap<u32, (u64, VecDeque<Client>)>,
        /// Clients whose SYN was given to a room.
        half_open: Vec<(u32, u64)>,
        next_room: u32,
    }

    impl Group {
        fn with(rooms: usize) -> Self {
            let mut group = Self::default();
            (0..rooms).for_each(|_| group.add());
            group
        }

        fn add(&mut self) {
            let room = self.next_room;
            self.next_room += 1;
            self.open.insert(room, (0, VecDeque::new()));
            if self.corridor.spare_len() < 2 && self.corridor.ready_len() > 0 {
                assert_eq!(self.corridor.add_spare(room), self.spares.len() as u64);
                self.spares.push(room);
            } else {
                assert_eq!(self.corridor.add_ready(room), self.ring.len() as u64);
                self.ring.push(room);
            }
        }

        fn order(&self) -> impl Fn(u32) -> u64 + '_ {
            |room| self.open.get(&room).map_or(0, |(order, _)| *order)
        }

        fn syn(&mut self, now: u64) {
            self.half_open.push((self.ring[self.current], now));
        }

        /// The handshake is completed in the room it was begun in, or where it was moved to.
        fn complete(&mut self, place: usize, now: u64) {
            let (room, syn) = self.half_open.swap_remove(place);
            let current = self.ring[self.current];
            let room = if self.open.contains_key(&room) { room } else { current };
            let (order, clients) = self.open.get_mut(&room).expect("it is open");
            if *order == 0 {
                *order = now;
            }
            clients.push_back(Client { syn, complete: now });
            if room == current && self.current + 1 < self.ring.len() {
                self.current += 1;
            }
        }

        fn catch_up(&mut self) {
            let mut corridor = std::mem::take(&mut self.corridor);
            corridor.catch_up(self.current as u64, self.taken as u64, self.order());
            self.corridor = corridor;
        }

        /// Empties a room when there are so many places; gives who gets them: nobody who comes
        /// behind `bound`.
        fn empty(&mut self, order: u64, room: u32, places: usize, bound: u64) -> Vec<Client> {
            if let Some(current) = self.corridor.remove(order, room) {
                self.current = self.current.max(current as usize);
            }
            let (_, mut clients) = self.open.remove(&room).expect("it is open");
            let before = clients.iter().take(places).take_while(|client| client.complete <= bound).count();
            let served = clients.drain(..before).collect();
            let spares = self.spares.len() - self.taken;
            let chunk = clients.len().div_ceil(spares.max(1)).max(1);
            let clients: Vec<Client> = clients.into();
            for chunk in clients.chunks(chunk) {
                let spare = self.spares[self.taken];
                self.taken += 1;
                self.open.insert(spare, (chunk[0].complete, chunk.iter().copied().collect()));
            }
            served
        }
    }

    proptest! {
        /// Whoever completed the handshake before another's SYN came is served before it, over
        /// all groups, however few rooms there are.
        #[test]
        fn first_come_first_served(
            rooms in 4usize..9,
            steps in prop::collection::vec((0u8..7, 0usize..2, any::<usize>()), 1..300),
        ) {
            let mut groups = [Group::with(rooms), Group::with(rooms)];
            let mut served: Vec<Client> = Vec::new();
            let mut came = 0;
            let mut now = 0;
            // In the end everybody completes and is served.
            let last = std::iter::repeat_n((3, 0, 0), 1000);
            let all = steps.into_iter().chain(last);
            for (step, number, which) in all {
                now += 1;
                match step {
                    0 | 1 => {
                        groups[number].syn(now);
                        came += 1;
                    }
                    2 | 3 => for group in &mut groups {
                        if !group.half_open.is_empty() {
                            let place = which % group.half_open.len();
                            group.complete(place, now);
                            now += 1;
                        }
                        if step == 3 && group.half_open.is_empty() {
                            group.add();
                        }
                    },
                    _ => {}
                }
                if step < 3 || step == 6 {
                    continue;
                }
                groups.iter_mut().for_each(Group::catch_up);
                let mut fronts: Vec<(u64, usize, u32)> = groups.iter().enumerate().flat_map(|(number, group)| {
                    let fronts: Vec<_> = group.corridor.fronts(group.order()).collect();
                    fronts.into_iter().map(move |(order, room)| (order, number, room))
                }).collect();
                fronts.sort_unstable();
                let Some(&(order, number, room)) = fronts.first() else { continue };
                let bound = fronts.get(1).map_or(u64::MAX, |&(order, ..)| order);
                let group = &mut groups[number];
                while group.corridor.spare_len() == 0 {
                    group.add();
                }
                served.extend(group.empty(order, room, 1 + which % 2, bound));
                group.catch_up();
                group.add();
            }
            prop_assert_eq!(served.len(), came);
            for (place, earlier) in served.iter().enumerate() {
                for later in &served[place + 1..] {
                    prop_assert!(later.complete >= earlier.syn, "{:?} was served before {:?}", earlier, later);
                }
            }
        }
    }

    #[test]
    fn the_current_room_is_emptied_only_if_another_becomes_current() {
        let mut corridor = Corridor::default();
        corridor.add_ready(7);
        assert_eq!(corridor.fronts(|_| 5).next(), None);
        corridor.add_ready(8);
        assert_eq!(corridor.fronts(|room| if room == 7 { 5 } else { 0 }).next(), Some((5, 7)));
        assert_eq!(corridor.remove(5, 7), Some(1));
        assert_eq!(corridor.current(), Some(8));
    }

    #[test]
    fn whoever_comes_late_to_a_deserted_room_is_found() {
        let mut corridor = Corridor::default();
        for room in 1..=3 {
            corridor.add_ready(room);
        }
        corridor.catch_up(2, 0, |_| 0);
        assert_eq!(corridor.deserted(), [1, 2]);
        corridor.catch_up(2, 0, |room| if room == 2 { 9 } else { 0 });
        assert_eq!((corridor.deserted(), corridor.occupied().collect::<Vec<_>>()), (&[1][..], vec![(9, 2)]));
    }

    #[test]
    fn what_an_earlier_distributor_left_is_in_order() {
        let order = |room: u32| [0, 0, 0, 30, 10, 0][room as usize];
        let corridor = Corridor::recovered(40, vec![1, 2], 3, vec![], vec![3, 4, 5], order);
        assert_eq!(corridor.occupied().collect::<Vec<_>>(), [(10, 4), (30, 3)]);
        assert_eq!(
            (corridor.current(), corridor.current_sequence(), corridor.deserted()),
            (Some(1), 40, &[5][..])
        );
    }
}
