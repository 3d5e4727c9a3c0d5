//! What part of its weight a server gets that has more to do than the others of its service.
//!
//! Pure. Each source says of each server how loaded it is: what the server reports, how much it waits for a
//! CPU, how long its accept queue takes. Servers are compared with the one in the middle, so when all are
//! loaded alike nobody loses anything. Once a second whoever is well above the middle loses a little of his
//! part, and whoever is not gets a little back; in between it stays as it is, so that nothing swings. That
//! goes on until the loads are alike, wherever the parts are then: no model of a server is needed.
#![forbid(unsafe_code)]

use std::{
    fmt,
    time::{Duration, Instant},
};

/// A part is lowered only while the load is so much above the middle...
const ABOVE: f64 = 0.2;

/// ...and raised while it is no more than this. A band, in which measurements may waver.
const NEAR: f64 = 0.1;

/// A part changes by no more than this, of itself, in a second: what comes of a change is only seen later,
/// with PSI ten seconds later.
const LARGEST_STEP: f64 = 0.2;

/// Measurements are smoothed: what was so long ago counts a third. But for PSI, which the kernel smooths.
const SMOOTHING: Duration = Duration::from_secs(3);

/// Nobody minds if an accept queue takes less than this, in seconds.
const SHORT: f64 = 0.001;

/// A server that accepts nothing has an accept queue that takes for ever, or so many seconds.
const LONGEST: f64 = 60.0;

/// An accept queue that has less than this in it on average is empty, and says nothing of its server.
const EMPTY: f64 = 0.05;

/// After a longer pause a part changes as after this.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Where it is seen how loaded a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// X_LOAD= by sd_notify.
    Reported,
    /// PSI of its cgroup.
    CpuPressure,
    /// How long a connection lies in its accept queue.
    AcceptQueue,
}

impl Source {
    pub const ALL: [Self; 3] = [Self::Reported, Self::CpuPressure, Self::AcceptQueue];

    /// The name an operator writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reported => "reported",
            Self::CpuPressure => "cpu-pressure",
            Self::AcceptQueue => "accept-queue",
        }
    }

    /// By how much a server's load is above the middle's: up to 1, and below 0 if it is less.
    fn above(self, its: f64, middle: f64) -> f64 {
        match self {
            Self::Reported | Self::CpuPressure => its - middle,
            // A time has no upper end, so it is the ratio that counts.
            Self::AcceptQueue => {
                let (its, middle) = (its.max(SHORT), middle.max(SHORT));
                if its > middle { 1.0 - middle / its } else { its / middle - 1.0 }
            }
        }
    }
}

/// How weights follow load, as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// At least one.
    pub sources: Vec<Source>,
    /// How fast: in percent of a part, in a second, for each tenth of load.
    pub strength: u32,
    /// A part is never less than so many percent.
    pub floor: u32,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sources: Vec<&str> = self.sources.iter().map(|source| source.name()).collect();
        write!(f, "by {}, strength {}, floor {} %", sources.join(" and "), self.strength, self.floor)
    }
}

/// What is known of a server that may get connections.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// 0 to 1, smoothed.
    pub reported: Option<f64>,
    /// 0 to 1.
    pub pressure: Option<f64>,
    /// How long a connection lies in its accept queue, in seconds, smoothed.
    pub queue: Option<f64>,
}

impl Measured {
    fn by(&self, source: Source) -> Option<f64> {
        match source {
            Source::Reported => self.reported,
            Source::CpuPressure => self.pressure,
            Source::AcceptQueue => self.queue,
        }
    }
}

/// By how much a server is above the middle, and by which source: that by which it is most.
pub type Excess = Option<(f64, Source)>;

/// The excess of each of these servers. The middle is that of the servers of which a source says something;
/// of an even number the less loaded of the two. `None`: no source says anything of it.
pub fn excesses(servers: &[Measured], sources: &[Source]) -> Vec<Excess> {
    let mut excesses = vec![None; servers.len()];
    for &source in sources {
        let mut loads: Vec<f64> = servers.iter().filter_map(|server| server.by(source)).collect();
        loads.sort_by(f64::total_cmp);
        let Some(middle) = loads.len().checked_sub(1).map(|last| loads[last / 2]) else { continue };
        for (server, excess) in servers.iter().zip(&mut excesses) {
            let Some(its) = server.by(source) else { continue };
            let above = source.above(its, middle);
            if excess.is_none_or(|(most, _)| above > most) {
                *excess = Some((above, source));
            }
        }
    }
    excesses
}

/// A server's part, from 0 to 1, `passed` later. One of which nothing is known gets back what it lost.
pub fn part(part: f64, excess: Excess, passed: Duration, rule: &Rule) -> f64 {
    let above = excess.map_or(0.0, |(above, _)| above);
    // From the nearer edge of the band.
    let beyond = (above - ABOVE).max(0.0) + (above - NEAR).min(0.0);
    let step = (f64::from(rule.strength) / 100.0 * beyond * 10.0).clamp(-LARGEST_STEP, LARGEST_STEP);
    let seconds = passed.min(LONGEST_PAUSE).as_secs_f64();
    (part * (1.0 - step).powf(seconds)).clamp(f64::from(rule.floor) / 100.0, 1.0)
}

/// A measurement, and what it was before.
pub fn smoothed(before: Option<f64>, now: f64, passed: Duration) -> f64 {
    let Some(before) = before else { return now };
    let weight = 1.0 - (-passed.as_secs_f64() / SMOOTHING.as_secs_f64()).exp();
    before + (now - before) * weight
}

/// How long connections lie in an accept queue: how many do, by how many leave it in a second (Little's law).
#[derive(Clone, Copy, Debug, Default)]
pub struct Throughput {
    last: Option<Seen>,
    length: Option<f64>,
    /// Connections accepted in a second.
    rate: Option<f64>,
}

/// What was seen of an accept queue.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: Instant,
    length: u32,
    /// Connections that ever came.
    total: u64,
}

impl Throughput {
    pub fn observe(&mut self, at: Instant, length: u32, total: u64) {
        let seen = Seen { at, length, total };
        let Some(last) = self.last.replace(seen) else { return };
        let passed = at.saturating_duration_since(last.at);
        if passed.is_zero() {
            return;
        }
        let came = total.saturating_sub(last.total) + u64::from(last.length);
        let rate = came.saturating_sub(u64::from(length)) as f64 / passed.as_secs_f64();
        self.rate = Some(smoothed(self.rate, rate, passed));
        self.length = Some(smoothed(self.length, f64::from(length), passed));
    }

    /// In seconds; `None` before it was seen twice.
    pub fn delay(&self) -> Option<f64> {
        let (length, rate) = (self.length?, self.rate?);
        if length < EMPTY {
            return Some(0.0);
        }
        Some((length / rate).min(LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rule() -> Rule {
        Rule { sources: Source::ALL.to_vec(), strength: 3, floor: 10 }
    }

    fn reported(load: f64) -> Measured {
        Measured { reported: Some(load), ..Measured::default() }
    }

    fn pressed(load: f64) -> Measured {
        Measured { pressure: Some(load), ..Measured::default() }
    }

    fn queued(seconds: f64) -> Measured {
        Measured { queue: Some(seconds), ..Measured::default() }
    }

    #[test]
    fn a_server_is_compared_with_the_one_in_the_middle() {
        let silent = Measured::default();
        for (row, servers, above) in [
            ("alone", vec![reported(0.9)], vec![Some(0.0)]),
            ("all alike", vec![reported(0.9); 3], vec![Some(0.0); 3]),
            ("two", vec![reported(0.75), reported(0.25)], vec![Some(0.5), Some(0.0)]),
            (
                "one above",
                vec![reported(0.75), reported(0.25), reported(0.0)],
                vec![Some(0.5), Some(0.0), Some(-0.25)],
            ),
            (
                "as many above as not",
                vec![pressed(1.0), pressed(1.0), pressed(0.5), pressed(0.5)],
                vec![Some(0.5), Some(0.5), Some(0.0), Some(0.0)],
            ),
            (
                "most are loaded",
                vec![pressed(0.5), pressed(0.5), pressed(0.0)],
                vec![Some(0.0), Some(0.0), Some(-0.5)],
            ),
            (
                "queues",
                vec![queued(0.04), queued(0.01), queued(0.005)],
                vec![Some(0.75), Some(0.0), Some(-0.5)],
            ),
            ("short queues are alike", vec![queued(0.001), queued(0.0), queued(0.0005)], vec![Some(0.0); 3]),
            (
                "who says nothing is not compared",
                vec![reported(0.5), silent, reported(0.25)],
                vec![Some(0.25), None, Some(0.0)],
            ),
            (
                "the worst counts",
                vec![
                    Measured { pressure: Some(0.5), ..reported(0.25) },
                    Measured { pressure: Some(0.0), ..reported(0.25) },
                ],
                vec![Some(0.5), Some(0.0)],
            ),
            ("each by what is known of it", vec![reported(0.5), pressed(0.5)], vec![Some(0.0), Some(0.0)]),
            ("nothing is known", vec![silent; 2], vec![None; 2]),
        ] {
            let excesses = excesses(&servers, &Source::ALL);
            assert_eq!(
                excesses.iter().map(|it| it.map(|(above, _)| above)).collect::<Vec<_>>(),
                above,
                "{row}"
            );
        }
    }

    #[test]
    fn only_the_sources_that_were_chosen_count() {
        let servers = [
            Measured { pressure: Some(0.75), ..reported(0.25) },
            Measured { pressure: Some(0.5), ..reported(0.25) },
        ];
        assert_eq!(excesses(&servers, &[Source::Reported])[0], Some((0.0, Source::Reported)));
        assert_eq!(excesses(&servers, &[Source::CpuPressure])[0], Some((0.25, Source::CpuPressure)));
        assert_eq!(excesses(&servers, &[Source::AcceptQueue]), [None, None]);
    }

    #[test]
    fn a_part_takes_small_steps() {
        let percent = |before: f64, above: f64, rule: &Rule| {
            (100.0 * part(before, Some((above, Source::Reported)), SECOND, rule) * 100.0).round() / 100.0
        };
        let strong = Rule { strength: 10, floor: 25, ..rule() };
        for (row, before, above, after, of_strong) in [
            ("far above: the largest step", 1.0, 1.0, 80.0, 80.0),
            ("above", 1.0, 0.3, 97.0, 90.0),
            ("in the band, from above", 0.5, 0.2, 50.0, 50.0),
            ("in the band", 0.5, 0.15, 50.0, 50.0),
            ("in the band, from below", 0.5, 0.1, 50.0, 50.0),
            ("at the middle", 0.5, 0.0, 51.5, 55.0),
            ("far below: the largest step", 0.5, -0.9, 60.0, 60.0),
            ("all is all", 1.0, -0.9, 100.0, 100.0),
            ("at the floor", 0.1, 1.0, 10.0, 25.0),
        ] {
            assert_eq!(percent(before, above, &rule()), after, "{row}");
            assert_eq!(percent(before, above, &strong), of_strong, "{row}, strong");
        }
        assert!((part(0.5, None, SECOND, &rule()) - 0.515).abs() < 1e-9, "nothing is known of it");
        let hour = part(1.0, Some((1.0, Source::Reported)), 3600 * SECOND, &rule());
        assert!((hour - 0.64).abs() < 1e-9, "after a pause it is two steps: {hour}");
        assert_eq!(part(0.5, Some((1.0, Source::Reported)), Duration::ZERO, &rule()), 0.5);
    }

    #[test]
    fn a_queue_takes_as_long_as_it_takes_to_empty() {
        let start = Instant::now();
        let after = |rows: &[(u32, u64)]| {
            let mut queue = Throughput::default();
            for (second, (length, total)) in (0..).zip(rows) {
                queue.observe(start + second * SECOND, *length, *total);
            }
            queue.delay()
        };
        for (row, rows, delay) in [
            ("seen once", vec![(5, 100)], None),
            ("nobody waits", vec![(0, 100), (0, 900)], Some(0.0)),
            (
                "ten wait, a hundred are accepted in a second",
                vec![(10, 100), (10, 200), (10, 300)],
                Some(0.1),
            ),
            ("it grows", vec![(0, 0), (50, 100)], Some(1.0)),
            ("nobody is accepted", vec![(10, 100), (10, 100)], Some(LONGEST)),
            ("it was emptied by others", vec![(10, 100), (0, 90)], Some(0.0)),
        ] {
            assert_eq!(after(&rows), delay, "{row}");
        }
    }

    /// Servers with one thread each behind weighted least-connections: so many requests are always open.
    struct Model {
        /// How long each takes for a request, in seconds.
        request: Vec<f64>,
        parts: Vec<f64>,
        queues: Vec<Throughput>,
        totals: Vec<f64>,
        /// What is left of a length that is no whole number.
        rests: Vec<f64>,
        now: Instant,
    }

    impl Model {
        const OPEN: f64 = 64.0;

        fn of(request: &[f64]) -> Self {
            let count = request.len();
            Self {
                request: request.to_vec(),
                parts: vec![1.0; count],
                queues: vec![Throughput::default(); count],
                totals: vec![0.0; count],
                rests: vec![0.0; count],
                now: Instant::now(),
            }
        }

        fn second(&mut self) {
            self.now += SECOND;
            let all: f64 = self.parts.iter().sum();
            let mut servers = Vec::new();
            for server in 0..self.parts.len() {
                let open = Self::OPEN * self.parts[server] / all;
                // It works all the time if it has always something to do.
                self.totals[server] += open.min(1.0) / self.request[server];
                let length = (open - 1.0).max(0.0) + self.rests[server];
                self.rests[server] = length.fract();
                self.queues[server].observe(self.now, length as u32, self.totals[server] as u64);
                servers.push(Measured { queue: self.queues[server].delay(), ..Measured::default() });
            }
            for (its, excess) in self.parts.iter_mut().zip(excesses(&servers, &[Source::AcceptQueue])) {
                *its = part(*its, excess, SECOND, &rule());
            }
        }
    }

    #[test]
    fn a_slow_server_is_relieved_and_nothing_swings_and_a_recovered_one_gets_all_back() {
        let mut model = Model::of(&[0.002, 0.002, 0.002, 0.02]);
        (0..60).for_each(|_| model.second());
        assert_eq!(model.parts[..3], [1.0; 3]);
        let mut seen = Vec::new();
        for _ in 0..200 {
            model.second();
            seen.push(model.parts[3]);
        }
        let (least, most) =
            (seen.iter().copied().fold(1.0, f64::min), seen.iter().copied().fold(0.0, f64::max));
        assert!(
            least >= 0.1 && most <= 0.18,
            "ten times slower, so a little more than a tenth: {least} to {most}"
        );
        // The kernel is told whole percents.
        let percents: Vec<f64> = seen.iter().map(|part| (100.0 * part).round()).collect();
        let steps = percents.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(steps <= 4, "it changed {steps} times in 200 seconds");
        model.request[3] = 0.002;
        (0..60).for_each(|_| model.second());
        assert_eq!(model.parts, [1.0; 4]);
    }

    #[test]
    fn what_is_told_ten_seconds_late_makes_nothing_swing_for_ever() {
        // Its load is what it gets, and others take twice as much of its CPU's time as it does.
        let (mut its, mut pressure) = (1.0, 0.0);
        let mut seen = Vec::new();
        for second in 0..600 {
            pressure += (0.9 * its - pressure) * (1.0 - (-0.1_f64).exp());
            let servers = [pressed(0.1), pressed(0.1), pressed(pressure)];
            its = part(its, excesses(&servers, &[Source::CpuPressure])[2], SECOND, &rule());
            if second >= 300 {
                seen.push(its);
            }
        }
        assert!(seen.iter().all(|part| *part == seen[0]), "it settles: {seen:?}");
        assert!((0.2..0.4).contains(&seen[0]), "where its load is near the others': {}", seen[0]);
    }

    fn measured() -> impl Strategy<Value = Measured> {
        let share = || prop::option::of(0.0..=1.0_f64);
        (share(), share(), prop::option::of(0.0..=LONGEST)).prop_map(|(reported, pressure, queue)| Measured {
            reported,
            pressure,
            queue,
        })
    }

    proptest! {
        #[test]
        fn parts_stay_in_bounds_and_take_bounded_steps(
            servers in prop::collection::vec((measured(), 0.0..=1.0_f64), 1..20),
            strength in 1_u32..=10,
            floor in 1_u32..=100,
        ) {
            let rule = Rule { strength, floor, ..rule() };
            let least = f64::from(floor) / 100.0;
            let loads: Vec<Measured> = servers.iter().map(|(load, _)| *load).collect();
            for ((_, before), excess) in servers.iter().zip(excesses(&loads, &rule.sources)) {
                let before = before.max(least);
                let after = part(before, excess, SECOND, &rule);
                prop_assert!((least..=1.0).contains(&after));
                prop_assert!(after >= before * 0.799 && after <= before * 1.201, "{} -> {}", before, after);
            }
        }

        #[test]
        fn by_one_source_at_least_half_lose_nothing(
            servers in prop::collection::vec(measured(), 1..20),
            source in prop::sample::select(Source::ALL.to_vec()),
        ) {
            let lose = excesses(&servers, &[source]).iter().flatten().filter(|(above, _)| *above > 0.0).count();
            prop_assert!(2 * lose <= servers.len(), "{} of {}", lose, servers.len());
        }

        #[test]
        fn when_all_are_alike_nobody_loses_anything(load in measured(), count in 1_usize..20) {
            let excesses = excesses(&vec![load; count], &Source::ALL);
            prop_assert!(excesses.iter().flatten().all(|(above, _)| *above == 0.0));
        }

        #[test]
        fn who_is_no_more_loaded_gets_all_back_in_time(before in 0.0..=1.0_f64, above in -1.0..=0.0_f64) {
            let mut its = before;
            for _ in 0..120 {
                its = part(its, Some((above, Source::Reported)), SECOND, &rule());
            }
            prop_assert_eq!(its, 1.0);
        }
    }
}
