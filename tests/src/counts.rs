//! Making a count of the kernel's wrong, as a program that was missed would have done.
//!
//! Writes the pinned LOAD map of an instance, in the contract's own layout. The whole map is read
//! and written, so nothing may come or go meanwhile.

#![forbid(unsafe_code)]

use aya::maps::{Array, Map, MapData};
use distributor_ebpf::{
    contract::{self, VERSION},
    word,
};

use crate::{host::Up, leftover};

/// The counts of the service `app`.
pub struct Counts(Array<MapData, contract::Load>);

impl Counts {
    /// Those of a running instance.
    #[track_caller]
    pub fn of(up: &Up<'_>) -> Self {
        let pins = leftover::pins(up.runtime()).expect("it runs, so it has pins");
        let pin = pins.join(format!("app-v{VERSION}/LOAD"));
        let data = MapData::from_pin(&pin).unwrap_or_else(|error| panic!("open {}: {error}", pin.display()));
        let map = Map::from_map_data(data).expect("LOAD is a map");
        Self(map.try_into().expect("LOAD is an array of one Load"))
    }

    /// Adds to the connections of the only slot that has exactly so many.
    #[track_caller]
    pub fn add_to_slot_with(&mut self, connections: u64, by: i64) {
        self.change(|load| {
            let mut slots = load.word.iter_mut().filter(|word| word::active(**word) == connections);
            let word = slots.next().expect("a slot has so many");
            *word = word::corrected(*word, -by);
            assert!(slots.next().is_none(), "several slots have {connections} connections");
        });
    }

    /// Adds to the connections that count for the limit of the service.
    #[track_caller]
    pub fn add_to_service(&mut self, by: i64) {
        self.change(|load| load.places = word::corrected(load.places, -by));
    }

    /// Adds to the number of those who wait.
    #[track_caller]
    pub fn add_to_waiting(&mut self, by: i64) {
        self.change(|load| load.waiting = load.waiting.wrapping_add_signed(by));
    }

    #[track_caller]
    fn change(&mut self, change: impl FnOnce(&mut contract::Load)) {
        let mut load = self.0.get(&0, 0).expect("read LOAD");
        change(&mut load);
        self.0.set(0, load, 0).expect("write LOAD");
    }
}
