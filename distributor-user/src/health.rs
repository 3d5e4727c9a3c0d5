//! Whether a server is well, by what its checks have come to.
//!
//! Pure. Takes one result after the other, and tells when the verdict turns: a single bad check says
//! little, and neither does a single good one after many bad ones. The first good one of all counts at
//! once, because until then nothing is known. What becomes of the server is the business of `server`.
#![forbid(unsafe_code)]

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::{config::Check, moment};

/// What is known of a server. The next distributor goes on with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    verdict: Verdict,
    /// Checks in a row that speak against the verdict, or are bad while there is none.
    against: u32,
    last: Option<Last>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Verdict {
    /// No check was good, and not enough of them were bad.
    #[default]
    Open,
    Well,
    Unwell,
}

/// What the last check came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Last {
    pub good: bool,
    /// `200 OK`, `connection refused`.
    pub what: String,
    /// Since when checks are all good, or all bad.
    #[serde(with = "moment")]
    pub since: Instant,
}

/// A verdict that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    Well,
    Unwell {
        why: String,
    },
    /// It is as unwell as before, for another reason.
    Otherwise {
        why: String,
    },
}

impl Health {
    /// Takes in what a check came to: what is good, or what is bad.
    pub fn note(&mut self, result: Result<String, String>, now: Instant, check: &Check) -> Option<Turn> {
        let good = result.is_ok();
        let what = result.unwrap_or_else(|bad| bad);
        let before = self.last.take();
        let is_new = before.as_ref().is_none_or(|last| last.what != what);
        let since = before.filter(|last| last.good == good).map_or(now, |last| last.since);
        self.last = Some(Last { good, what: what.clone(), since });
        self.against = match (self.verdict, good) {
            (Verdict::Well, true) | (Verdict::Unwell, false) => 0,
            _ => self.against.saturating_add(1),
        };
        let enough = match self.verdict {
            Verdict::Open if good => 1,
            Verdict::Open | Verdict::Well => check.fall,
            Verdict::Unwell => check.rise,
        };
        if self.against < enough {
            let why = in_a_row(check.fall, &what);
            return (self.verdict == Verdict::Unwell && !good && is_new).then_some(Turn::Otherwise { why });
        }
        self.against = 0;
        self.verdict = if good { Verdict::Well } else { Verdict::Unwell };
        Some(match good {
            true => Turn::Well,
            false => Turn::Unwell { why: in_a_row(check.fall, &what) },
        })
    }

    /// What is to be said again of one that is treated otherwise than the verdict is.
    pub fn insists(&self, is_withheld: bool, check: &Check) -> Option<Turn> {
        let last = self.last.as_ref()?;
        match (self.verdict, is_withheld, last.good) {
            (Verdict::Unwell, false, false) => Some(Turn::Unwell { why: in_a_row(check.fall, &last.what) }),
            (Verdict::Well, true, true) => Some(Turn::Well),
            _ => None,
        }
    }

    /// From here on both judge alike, whatever the last checks were.
    pub fn is_as(&self, other: &Self) -> bool {
        (self.verdict, self.against) == (other.verdict, other.against)
    }

    /// It is not known how it is, or the last checks speak against what was known.
    pub fn is_undecided(&self) -> bool {
        self.verdict == Verdict::Open || self.against > 0
    }

    pub fn last(&self) -> Option<&Last> {
        self.last.as_ref()
    }

    /// What is to be said of one that passes for well, or of which nothing is known.
    pub fn doubt(&self, check: &Check) -> Option<String> {
        let last = self.last.as_ref().filter(|last| !last.good && self.verdict != Verdict::Unwell)?;
        Some(format!("the last check was bad ({} of {}): {}", self.against, check.fall, last.what))
    }
}

fn in_a_row(fall: u32, what: &str) -> String {
    match fall {
        1 => format!("its check is bad: {what}"),
        fall => format!("{fall} checks in a row were bad: {what}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::CheckKind;

    fn check(rise: u32, fall: u32) -> Check {
        Check {
            kind: CheckKind::Tcp,
            interval: Duration::from_secs(2),
            fast_interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            rise,
            fall,
            restart_after: None,
        }
    }

    /// `+` is a good check, `-` a bad one and `x` one that is bad for another reason. What each leads
    /// to: `W`, `U`, `O`therwise, or nothing; and in small letters where it is undecided after that.
    fn turns(rise: u32, fall: u32, checks: &str) -> String {
        let mut health = Health::default();
        let turn = |result: char| {
            let result = match result {
                '+' => Ok("fine".to_owned()),
                '-' => Err("refused".to_owned()),
                _ => Err("late".to_owned()),
            };
            let turn = match health.note(result, Instant::now(), &check(rise, fall)) {
                None => '.',
                Some(Turn::Well) => 'W',
                Some(Turn::Unwell { .. }) => 'U',
                Some(Turn::Otherwise { .. }) => 'O',
            };
            // As the next distributor has it.
            health = serde_json::from_str(&serde_json::to_string(&health).unwrap()).unwrap();
            if health.is_undecided() && turn == '.' { '?' } else { turn }
        };
        checks.chars().map(turn).collect()
    }

    #[test]
    fn a_verdict_turns_when_enough_checks_in_a_row_say_so() {
        for (rise, fall, checks, expected) in [
            (2, 3, "+", "W"),
            (2, 3, "+++", "W.."),
            (2, 3, "+-+--+---", "W?.??.??U"),
            (2, 3, "+---+-++", "W??U?O?W"),
            (2, 3, "+---+++---", "W??U?W.??U"),
            // At first one good check is enough, whatever came before it.
            (2, 3, "--+", "??W"),
            (5, 3, "---", "??U"),
            (5, 3, "---+++++", "??U????W"),
            (1, 1, "-+-+", "UWUW"),
            // It is said when it is bad in another way, or again.
            (2, 2, "+--xx-", "W?UO.O"),
        ] {
            assert_eq!(turns(rise, fall, checks), expected, "{rise} {fall} {checks}");
        }
    }

    #[test]
    fn what_the_last_check_came_to_is_told_and_since_when() {
        let begun = Instant::now();
        let later = |seconds| begun + Duration::from_secs(seconds);
        let (mut health, check) = (Health::default(), check(2, 3));
        assert_eq!((health.last(), health.doubt(&check)), (None, None));
        health.note(Ok("200 OK".to_owned()), later(1), &check);
        health.note(Ok("204 No Content".to_owned()), later(2), &check);
        let last = |good, what: &str, since| Last { good, what: what.to_owned(), since };
        assert_eq!(health.last(), Some(&last(true, "204 No Content", later(1))));
        assert_eq!(health.doubt(&check), None);
        health.note(Err("503".to_owned()), later(3), &check);
        health.note(Err("refused".to_owned()), later(4), &check);
        assert_eq!(health.last(), Some(&last(false, "refused", later(3))));
        assert_eq!(health.doubt(&check).unwrap(), "the last check was bad (2 of 3): refused");
        let turn = health.note(Err("refused".to_owned()), later(5), &check);
        assert_eq!(turn, Some(Turn::Unwell { why: "3 checks in a row were bad: refused".to_owned() }));
        // Then the state says it.
        assert_eq!(health.doubt(&check), None);
    }
}
