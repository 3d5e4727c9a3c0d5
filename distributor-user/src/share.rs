//! What share of the new connections each server of a service is to get: stalled servers, backup servers,
//! slow start, and load.
//!
//! Pure. A server that was just started again is slower than it will be (a JVM compiles, caches are
//! empty), so with `slow_start` its weight grows to its full value in that time, in equal steps. That
//! holds only while a server that is warm takes the rest: where all are new, nobody else could. What part of
//! it is left to one that is loaded more than the others, load.rs has decided.
#![forbid(unsafe_code)]

use std::time::Duration;

use distributor_ebpf::contract::WEIGHT_MAX;

/// A weight grows in so many steps. Each is a plan to write, and with source-hash moves some clients.
const STEPS: u32 = 20;

/// No step is shorter.
const SHORTEST_STEP: Duration = Duration::from_millis(20);

/// A weight of which nothing is taken for load, in percent.
pub const WHOLE: u32 = 100;

/// A server, ready or not.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// It is ready for connections.
    pub included: bool,
    /// It is to get none while another one is ready that is not a backup.
    pub backup: bool,
    /// It does not accept: it is to get none while another one is ready that does.
    pub stalled: bool,
    pub weight: u32,
    /// What its load leaves it of its weight, in percent.
    pub part: u32,
    /// How far it is with its slow start. `None`: it has none.
    pub warms: Option<Warming>,
}

/// A slow start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warming {
    /// Since it was ready.
    pub passed: Duration,
    pub of: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Gets connections.
    pub eligible: bool,
    /// As the configuration counts, at least 1; 0: it gets nothing.
    pub effective: u32,
    /// What the kernel is told: the shares of one service are as these numbers are.
    pub planned: u32,
    pub held_back: Option<HeldBack>,
}

/// Why a server that is ready does not get its whole share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldBack {
    /// Others serve.
    Backup,
    /// Others accept.
    Stalled,
    /// It has this part of its weight, in percent, and all of it in `left`. A part lasts for `step`.
    Warms { percent: u32, left: Duration, step: Duration },
}

/// The shares of these servers, in the same order.
pub fn shares(candidates: &[Candidate]) -> Vec<Share> {
    // The best that there are.
    let rank = candidates.iter().filter(|it| it.included).map(Candidate::rank).min();
    let is_eligible = |it: &Candidate| it.included && Some(it.rank()) == rank;
    let one_is_warm = candidates.iter().any(|it| is_eligible(it) && it.step() == STEPS);
    let step = |it: &Candidate| if one_is_warm { it.step() } else { STEPS };
    let one_has_less = candidates.iter().any(|it| is_eligible(it) && (step(it) < STEPS || it.part < WHOLE));
    // A part of a small weight is no whole number, so all are multiplied as far as the kernel counts.
    let largest = candidates.iter().map(|it| it.weight).max().unwrap_or(1).max(1);
    let scale = if one_has_less { (WEIGHT_MAX / largest).max(1) } else { 1 };
    let share = |it: &Candidate| {
        let (eligible, step) = (is_eligible(it), step(it));
        let part = |weight: u32| (weight * step * it.part / (STEPS * WHOLE)).max(1);
        let held_back = match it.warms {
            _ if it.included && !eligible && it.stalled => Some(HeldBack::Stalled),
            _ if it.included && !eligible => Some(HeldBack::Backup),
            Some(Warming { passed, of }) if eligible && step < STEPS => Some(HeldBack::Warms {
                percent: step * 100 / STEPS,
                left: of.saturating_sub(passed),
                step: (of / STEPS).max(SHORTEST_STEP),
            }),
            _ => None,
        };
        let effective = if eligible { part(it.weight) } else { 0 };
        Share { eligible, effective, planned: part(it.weight * scale), held_back }
    };
    candidates.iter().map(share).collect()
}

impl Candidate {
    /// Who comes before whom: a backup accepts at least, and of those that do not, none is better.
    fn rank(&self) -> u32 {
        match (self.stalled, self.backup) {
            (false, false) => 0,
            (false, true) => 1,
            (true, _) => 2,
        }
    }

    /// How many steps of its slow start it has come, from 1 to `STEPS`.
    fn step(&self) -> u32 {
        let Some(Warming { passed, of }) = self.warms else { return STEPS };
        let come = (passed.as_secs_f64() / of.as_secs_f64() * f64::from(STEPS)) as u32;
        // It begins with the first.
        come.saturating_add(1).min(STEPS)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OF: Duration = Duration::from_secs(20);

    fn warm(weight: u32) -> Candidate {
        Candidate { included: true, backup: false, stalled: false, weight, part: WHOLE, warms: None }
    }

    fn stalled(candidate: Candidate) -> Candidate {
        Candidate { stalled: true, ..candidate }
    }

    #[test]
    fn a_stalled_server_gets_nothing_while_another_one_accepts() {
        let eligible = |candidates: &[Candidate]| {
            shares(candidates).iter().map(|share| share.eligible).collect::<Vec<_>>()
        };
        let backup = |candidate: Candidate| Candidate { backup: true, ..candidate };
        let away = |candidate: Candidate| Candidate { included: false, ..candidate };
        let it = warm(100);
        for (candidates, expected) in [
            (vec![stalled(it), it], vec![false, true]),
            (vec![stalled(it), backup(it)], vec![false, true]),
            (vec![stalled(it), away(it), backup(away(it))], vec![true, false, false]),
            (vec![stalled(it), stalled(it)], vec![true, true]),
            (vec![stalled(it), backup(stalled(it))], vec![true, true]),
            (vec![it, backup(stalled(it))], vec![true, false]),
        ] {
            assert_eq!(eligible(&candidates), expected, "{candidates:?}");
        }
        let held_back = |candidates: &[Candidate]| shares(candidates)[0].held_back;
        assert_eq!(held_back(&[stalled(it), it]), Some(HeldBack::Stalled));
        assert_eq!(held_back(&[stalled(it), stalled(it)]), None);
    }

    fn warming(weight: u32, seconds: u64) -> Candidate {
        Candidate { warms: Some(Warming { passed: Duration::from_secs(seconds), of: OF }), ..warm(weight) }
    }

    fn loaded(weight: u32, part: u32) -> Candidate {
        Candidate { part, ..warm(weight) }
    }

    fn backup(candidate: Candidate) -> Candidate {
        Candidate { backup: true, ..candidate }
    }

    fn away(candidate: Candidate) -> Candidate {
        Candidate { included: false, ..candidate }
    }

    #[test]
    fn each_gets_its_share() {
        for (row, candidates, effective, planned) in [
            ("all warm", vec![warm(100), warm(50)], vec![100, 50], vec![100, 50]),
            ("just started", vec![warm(100), warming(100, 0)], vec![100, 5], vec![1000, 50]),
            ("half way", vec![warm(100), warming(100, 10)], vec![100, 55], vec![1000, 550]),
            ("nearly there", vec![warm(100), warming(100, 18)], vec![100, 95], vec![1000, 950]),
            ("there", vec![warm(100), warming(100, 19)], vec![100, 100], vec![100, 100]),
            ("long there", vec![warm(100), warming(100, 99)], vec![100, 100], vec![100, 100]),
            ("small weights", vec![warm(1), warming(1, 0)], vec![1, 1], vec![1000, 50]),
            ("large weights", vec![warm(1000), warming(1000, 0)], vec![1000, 50], vec![1000, 50]),
            ("all new", vec![warming(100, 3), warming(100, 0)], vec![100, 100], vec![100, 100]),
            ("the warm one is away", vec![away(warm(100)), warming(100, 0)], vec![0, 100], vec![100, 100]),
            ("a backup", vec![warm(100), backup(warm(100))], vec![100, 0], vec![100, 100]),
            ("a warm backup is not there", vec![warming(9, 0), backup(warm(9))], vec![9, 0], vec![9, 9]),
            ("in need", vec![away(warm(100)), backup(warm(100))], vec![0, 100], vec![100, 100]),
            ("only backups", vec![backup(warm(7)), backup(warm(9))], vec![7, 9], vec![7, 9]),
            ("loaded", vec![warm(100), loaded(100, 37)], vec![100, 37], vec![1000, 370]),
            ("loaded, of a small weight", vec![warm(1), loaded(1, 10)], vec![1, 1], vec![1000, 100]),
            ("loaded, of a large weight", vec![warm(1000), loaded(900, 10)], vec![1000, 90], vec![1000, 90]),
            (
                "loaded while it warms",
                vec![warm(100), Candidate { part: 50, ..warming(100, 10) }],
                vec![100, 27],
                vec![1000, 275],
            ),
            ("loaded and away", vec![warm(100), away(loaded(100, 10))], vec![100, 0], vec![100, 10]),
            (
                "loaded, and a backup that is not needed",
                vec![warm(9), backup(loaded(9, 10))],
                vec![9, 0],
                vec![9, 1],
            ),
            ("none", vec![away(warm(7)), away(backup(warm(9)))], vec![0, 0], vec![7, 9]),
        ] {
            let shares = shares(&candidates);
            assert_eq!(shares.iter().map(|share| share.effective).collect::<Vec<_>>(), effective, "{row}");
            assert_eq!(shares.iter().map(|share| share.planned).collect::<Vec<_>>(), planned, "{row}");
        }
    }

    #[test]
    fn whoever_is_held_back_is_told_why() {
        let shares = shares(&[warm(100), warming(100, 10), backup(warm(100)), away(backup(warm(100)))]);
        let left = Duration::from_secs(10);
        let warms = Some(HeldBack::Warms { percent: 55, left, step: Duration::from_secs(1) });
        let why: Vec<_> = shares.iter().map(|share| share.held_back).collect();
        assert_eq!(why, [None, warms, Some(HeldBack::Backup), None]);
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        let warms = prop::option::of((0_u64..30_000, 1_u64..30_000));
        let (included, backup, stalled) = (any::<bool>(), any::<bool>(), any::<bool>());
        let all = (included, backup, stalled, 1..=WEIGHT_MAX, 1..=WHOLE, warms);
        all.prop_map(|(included, backup, stalled, weight, part, warms)| {
            let warms = warms.map(|(passed, of)| Warming {
                passed: Duration::from_millis(passed),
                of: Duration::from_millis(of),
            });
            Candidate { included, backup, stalled, weight, part, warms }
        })
    }

    proptest! {
        #[test]
        fn somebody_serves_if_anybody_can_and_weights_are_possible(
            candidates in prop::collection::vec(candidate(), 0..20)
        ) {
            let shares = shares(&candidates);
            let serves = shares.iter().any(|share| share.eligible);
            prop_assert_eq!(serves, candidates.iter().any(|it| it.included));
            for (it, share) in candidates.iter().zip(&shares) {
                prop_assert!((1..=WEIGHT_MAX).contains(&share.planned));
                prop_assert!(share.effective <= it.weight);
                prop_assert_eq!(share.effective > 0, share.eligible);
                prop_assert!(!share.eligible || it.included);
            }
        }
    }
}
