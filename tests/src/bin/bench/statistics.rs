//! Medians and how far to trust them.
//!
//! Pure. Nothing here assumes how the values are distributed: on a machine that others use as
//! well, a few of them are always far off, and a mean would follow those.
#![forbid(unsafe_code)]

/// What is said of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    /// A quarter of the values is below the first, a quarter above the second.
    pub(crate) quartiles: (f64, f64),
    /// Where the true median is with 95 % confidence, by rank (a sign test turned round).
    pub(crate) interval: (f64, f64),
}

impl Spread {
    /// Of at least one value.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let rank = trusted_rank(values.len());
        Self {
            median: quantile(&values, 0.5),
            quartiles: (quantile(&values, 0.25), quantile(&values, 0.75)),
            interval: (values[rank], values[values.len() - 1 - rank]),
        }
    }

    /// The three as a table shows them.
    pub(crate) fn cells(&self) -> [String; 3] {
        let Self { median, quartiles, interval } = self;
        [
            format!("{median:.3}"),
            format!("{:.3} to {:.3}", quartiles.0, quartiles.1),
            format!("{:.3} to {:.3}", interval.0, interval.1),
        ]
    }
}

/// The value below which a part of the sorted values lies; between two, in proportion.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// How many values from each end the interval for the median may leave out: fewer than `rank`
/// of `count` fair coins show heads with a probability of at most 2.5 %. With less than six
/// values there is no such rank, and the interval is all there is.
fn trusted_rank(count: usize) -> usize {
    let mut chance = 0.5f64.powi(count as i32);
    let mut at_most = 0.0;
    for rank in 0..count / 2 {
        at_most += chance;
        if at_most > 0.025 {
            return rank.saturating_sub(1);
        }
        chance *= (count - rank) as f64 / (rank + 1) as f64;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_stand_between_values() {
        let spread = Spread::of(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!((spread.median, spread.quartiles), (2.5, (1.75, 3.25)));
    }

    #[test]
    fn the_interval_has_the_ranks_of_the_tables() {
        // Of the sign test: the largest r with P(X < r) <= 0.025, counted from 1.
        for (count, rank) in [(1, 1), (5, 1), (6, 1), (9, 2), (12, 3), (20, 6), (40, 14), (100, 40)] {
            assert_eq!(trusted_rank(count) + 1, rank, "{count} values");
        }
    }

    #[test]
    fn one_wild_value_moves_nothing() {
        let mut values = vec![1.0; 20];
        values.push(1000.0);
        let spread = Spread::of(values);
        assert_eq!(spread, Spread { median: 1.0, quartiles: (1.0, 1.0), interval: (1.0, 1.0) });
    }
}
