//! Counts that are right or wrong, and a kernel that is asked while connections come and go.

use distributor_ebpf::contract::{COUNTED, DISMISSED, IN_SERVICE, Owner, ROOM, Tag, in_room, marked};
use proptest::prelude::*;

use super::*;

fn counts(slot: i64, waiting: i64) -> Counts {
    let mut counts = Counts { waiting, ..Counts::none() };
    counts.slots[0] = slot;
    counts
}

fn passed(opened: u64, left: u64, ended: u64) -> Passed {
    let mut all = Passed { opened: vec![0; SLOTS], left, ended };
    all.opened[0] = opened;
    all
}

/// Nothing happens while the kernel is asked.
fn quiet(counted: i64, there: i64) -> Seen {
    Seen {
        passed_before: passed(7, 0, 3),
        before: counts(counted, 0),
        sockets: counts(there, 0),
        after: counts(counted, 0),
        passed_after: passed(7, 0, 3),
    }
}

#[test]
fn only_what_the_connections_of_the_meantime_cannot_explain_is_certain() {
    // before, after, opened, ended, sockets -> difference
    for (name, before, after, opened, ended, sockets, expected) in [
        ("quiet and right", 5, 5, 0, 0, 5, 0),
        ("quiet and too many", 5, 5, 0, 0, 3, 2),
        ("quiet and too few", 5, 5, 0, 0, 6, -1),
        ("opened, not seen", 5, 7, 2, 0, 5, 0),
        ("opened, seen", 5, 7, 2, 0, 7, 0),
        ("closed, seen", 5, 3, 0, 2, 5, 0),
        ("closed, not seen", 5, 3, 0, 2, 3, 0),
        ("as many opened as closed", 5, 5, 2, 2, 3, 0),
        ("more than these are missing", 5, 5, 2, 2, 1, 2),
        ("more than these are there", 5, 5, 2, 2, 9, -2),
        ("a word at 0 hides a close", 0, 0, 0, 1, 1, 0),
        ("and no more than that", 0, 0, 0, 1, 3, -2),
    ] {
        let seen = Seen {
            passed_before: passed(10, 0, 10),
            before: counts(before, 0),
            sockets: counts(sockets, 0),
            after: counts(after, 0),
            passed_after: passed(10 + opened, 0, 10 + ended),
        };
        assert_eq!(seen.certain(Count::Slot(0)), expected, "{name}");
    }
}

#[test]
fn those_who_wait_are_bounded_by_those_who_left() {
    for (name, before, after, left, sockets, expected) in [
        ("quiet and right", 5, 5, 0, 5, 0),
        ("quiet and too many", 5, 5, 0, 1, 4),
        ("two came", 5, 7, 0, 5, 0),
        ("two left", 5, 3, 2, 5, 0),
        ("two came, two left", 5, 5, 2, 3, 0),
        ("below 0", -2, -2, 0, 0, -2),
    ] {
        let seen = Seen {
            passed_before: passed(0, 4, 0),
            before: counts(0, before),
            sockets: counts(0, sockets),
            after: counts(0, after),
            passed_after: passed(0, 4 + left, 0),
        };
        assert_eq!(seen.certain(Count::Waiting), expected, "{name}");
    }
}

#[test]
fn a_difference_stays_after_three_checks_and_the_least_is_repaired() {
    let mut drift = Drift::default();
    assert_eq!(drift.note(&quiet(9, 4)), []);
    assert_eq!(drift.note(&quiet(9, 6)), []);
    let found = drift.note(&quiet(9, 5));
    assert_eq!(found, [Difference { count: Count::Slot(0), by: 3, counted: 9 }]);
    assert_eq!(found[0].there(), 6);
    // And then it begins anew.
    assert!(!drift.is_suspected());
}

#[test]
fn a_difference_that_goes_or_turns_around_does_not_stay() {
    for between in [quiet(5, 5), quiet(5, 6)] {
        let mut drift = Drift::default();
        for _ in 0..2 {
            for _ in 0..CHECKS - 1 {
                assert_eq!(drift.note(&quiet(5, 4)), []);
            }
            assert_eq!(drift.note(&between), []);
        }
    }
}

#[test]
fn a_connection_is_whose_owners_says_or_else_its_tag() {
    let told = |cookie, slot, counted, owner: Option<u32>| Told {
        cookie,
        tag: Tag { slot, counted, index: 9, group: 0 },
        owner: owner.map(|owner| owned(owner, 0)),
    };
    let told = vec![
        told(1, 0, 1, None),
        told(1, 0, 1, None),       // told twice
        told(2, 0, 0, None),       // its handshake is not complete
        told(3, ROOM, 1, Some(0)), // handed over
        told(4, ROOM, 1, Some(in_room(9))),
        told(5, ROOM, 1, None),          // OWNERS was full
        told(6, DISMISSED, 1, None),     // is being turned away
        told(7, DISMISSED, 0, None),     // was
        told(8, 0, 1, Some(in_room(8))), // parked
        told(9, SLOTS as u32, 1, None),  // of a listener that was never adopted
        told(10, ROOM, 1, None),         // closed before OWNERS was asked
    ];
    assert_eq!(tally(told.clone(), Some((1..10).collect())), counts(2, 4));
    assert_eq!(tally(told, None), counts(2, 5));
}

fn owned(owner: u32, marks: u32) -> Owner {
    Owner { owner, marks, since: 0, order: 0 }
}

#[test]
fn a_connection_is_the_services_as_its_tag_says_or_owners() {
    let told = |cookie, counted, owner: Option<Owner>| Told {
        cookie,
        tag: Tag { slot: 0, counted, index: 9, group: 0 },
        owner,
    };
    let told = vec![
        told(1, COUNTED, None), // of before there was a limit
        told(2, COUNTED | IN_SERVICE | marked(128), None),
        told(3, COUNTED | marked(64), Some(owned(in_room(9), 8))), // waits
        told(4, COUNTED | marked(64), Some(owned(0, IN_SERVICE))), // handed over
        told(5, COUNTED | IN_SERVICE, Some(owned(in_room(9), 0))), // a dead server left it
        told(6, IN_SERVICE, None),                                 // closed
    ];
    assert_eq!(tally(told, None), Counts { service: 3, ..counts(3, 2) });
}

/// A service with two servers, whose words may be wrong.
#[derive(Clone, Debug, Default)]
struct Model {
    sockets: Vec<Told>,
    next: u64,
    words: [i64; 2],
    waiting: i64,
    service: i64,
    opened: [u64; 2],
    left: u64,
    ended: u64,
}

/// What happens between two looks.
#[derive(Clone, Copy, Debug)]
enum Step {
    Open(u32),
    Wait,
    Close(usize),
    Move(usize, u32),
    Park(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u32..2).prop_map(Step::Open),
        Just(Step::Wait),
        (0usize..64).prop_map(Step::Close),
        (0usize..64, 0u32..2).prop_map(|(which, slot)| Step::Move(which, slot)),
        (0usize..64).prop_map(Step::Park),
    ]
}

/// What happens at each point of a check; after the last, nothing.
type Steps = Vec<Option<Step>>;

impl Model {
    fn owner(told: &Told) -> u32 {
        told.owner.map_or_else(|| owner_by(&told.tag), |owner| owner.owner)
    }

    fn is_in_service(told: &Told) -> bool {
        (told.tag.counted | told.owner.map_or(0, |owner| owner.marks)) & IN_SERVICE != 0
    }

    fn leave(&mut self, owner: u32) {
        if room_of(owner).is_some() {
            self.waiting -= 1;
            self.left += 1;
        } else {
            let word = &mut self.words[owner as usize];
            *word = (*word - 1).max(0);
            self.ended += 1;
        }
    }

    fn happen(&mut self, step: Option<Step>) {
        let len = self.sockets.len();
        match step {
            Some(Step::Open(slot)) => {
                self.words[slot as usize] += 1;
                self.service += 1;
                self.opened[slot as usize] += 1;
                self.add(slot, None);
            }
            Some(Step::Wait) => {
                self.waiting += 1;
                self.add(ROOM, Some(in_room(0)));
            }
            Some(Step::Close(which)) if len > 0 => {
                let gone = self.sockets.remove(which % len);
                if Self::is_in_service(&gone) {
                    self.service = (self.service - 1).max(0);
                }
                self.leave(Self::owner(&gone));
            }
            Some(Step::Move(which, slot)) if len > 0 => {
                self.words[slot as usize] += 1;
                self.opened[slot as usize] += 1;
                let told = &mut self.sockets[which % len];
                let old = Self::owner(told);
                self.service += i64::from(!Self::is_in_service(told));
                let marks = if Self::is_in_service(told) {
                    told.owner.map_or(0, |owner| owner.marks)
                } else {
                    IN_SERVICE
                };
                told.owner = Some(owned(slot, marks));
                self.leave(old);
            }
            Some(Step::Park(which)) if len > 0 => {
                self.waiting += 1;
                let told = &mut self.sockets[which % len];
                let old = Self::owner(told);
                told.owner = Some(owned(in_room(1), told.owner.map_or(0, |owner| owner.marks)));
                self.leave(old);
            }
            _ => {}
        }
    }

    fn add(&mut self, slot: u32, owner: Option<u32>) {
        self.next += 1;
        let counted = if owner.is_none() { COUNTED | IN_SERVICE } else { COUNTED };
        let tag = Tag { slot, counted, index: 0, group: 0 };
        self.sockets.push(Told { cookie: self.next, tag, owner: owner.map(|owner| owned(owner, 0)) });
    }

    fn passed(&self) -> Passed {
        let mut passed = passed(self.opened[0], self.left, self.ended);
        passed.opened[1] = self.opened[1];
        passed
    }

    fn counted(&self) -> Counts {
        let mut counted = counts(self.words[0], self.waiting);
        counted.slots[1] = self.words[1];
        counted.service = self.service;
        counted
    }

    fn there(&self) -> Counts {
        tally(self.sockets.clone(), None)
    }

    /// How wrong each count is.
    fn drift(&self) -> [i64; 4] {
        let (counted, there) = (self.counted(), self.there());
        [
            counted.slots[0] - there.slots[0],
            counted.slots[1] - there.slots[1],
            counted.waiting - there.waiting,
            counted.service - there.service,
        ]
    }

    /// The kernel goes through its table bucket by bucket.
    fn dump(&mut self, steps: &mut impl Iterator<Item = Option<Step>>) -> Vec<Told> {
        let mut told = Vec::new();
        for bucket in 0..4 {
            let here = self.sockets.iter().filter(|told| told.cookie % 4 == bucket);
            told.extend(here.map(|told| Told { owner: None, ..*told }));
            self.happen(steps.next().flatten());
        }
        told
    }

    /// As the auditor does it.
    fn check(&mut self, steps: Steps) -> Seen {
        let mut steps = steps.into_iter();
        let passed_before = self.passed();
        self.happen(steps.next().flatten());
        let before = self.counted();
        let owned = self.sockets.iter().any(|told| told.owner.is_some());
        self.happen(steps.next().flatten());
        let mut told = self.dump(&mut steps);
        let still = owned.then(|| {
            for told in &mut told {
                let now = self.sockets.iter().find(|now| now.cookie == told.cookie);
                told.owner = now.and_then(|now| now.owner);
                self.happen(steps.next().flatten());
            }
            self.dump(&mut steps).iter().map(|told| told.cookie).collect()
        });
        self.happen(steps.next().flatten());
        let after = self.counted();
        self.happen(steps.next().flatten());
        let sockets = tally(told, still);
        Seen { passed_before, before, sockets, after, passed_after: self.passed() }
    }

    fn repair(&mut self, difference: Difference) {
        match difference.count {
            Count::Slot(slot) => self.words[slot as usize] -= difference.by,
            Count::Waiting => self.waiting -= difference.by,
            Count::Service => self.service -= difference.by,
        }
    }
}

/// Where [`Model::drift`] has it.
fn place(count: Count) -> usize {
    match count {
        Count::Slot(slot) => slot as usize,
        Count::Waiting => 2,
        Count::Service => 3,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// However wrong the counts are, and whatever happens, a repair goes in the right direction
    /// and not too far; so a right count is never touched. And when less happens, all is right.
    #[test]
    fn a_right_count_is_never_touched_and_a_wrong_one_is_repaired_in_time(
        beginning in prop::collection::vec(step(), 0..30),
        injected in prop::array::uniform4(prop_oneof![Just(0i64), -4i64..5]),
        checks in prop::collection::vec(prop::collection::vec(prop::option::weighted(0.3, step()), 0..25), 0..12),
    ) {
        let mut model = Model::default();
        for step in beginning {
            model.happen(Some(step));
        }
        model.words[0] = (model.words[0] + injected[0]).max(0);
        model.words[1] = (model.words[1] + injected[1]).max(0);
        model.waiting += injected[2];
        model.service = (model.service + injected[3]).max(0);
        let mut drift = Drift::default();
        for steps in checks {
            let found = drift.note(&model.check(steps));
            let wrong = model.drift();
            for difference in found {
                let wrong = wrong[place(difference.count)];
                prop_assert_eq!(difference.by.signum(), wrong.signum());
                prop_assert!(difference.by.abs() <= wrong.abs(), "{:?} of {}", difference, wrong);
                model.repair(difference);
            }
        }
        // Checks before may have been certain of a part only.
        for _ in 0..2 * CHECKS {
            for difference in drift.note(&model.check(Vec::new())) {
                model.repair(difference);
            }
        }
        prop_assert_eq!(model.drift(), [0; 4]);
    }
}
