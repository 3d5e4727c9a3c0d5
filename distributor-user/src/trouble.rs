//! What is wrong with the machine now, and since when: said once, and shown until it is over.
//!
//! Whoever sees whether something is so notes it under a name, as often as it looks. The log has a
//! line when it begins and one when it ends; in between the status has it. Only for what would be
//! well again if the machine were: what a server does wrong is said of that server. Nothing here
//! looks for itself, reads a clock or does anything about it.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, time::SystemTime};

use tracing::{info, warn};

use crate::status::{Timestamp, Trouble, age};

/// The troubles there are, by their names.
#[derive(Debug, Default)]
pub struct Troubles(BTreeMap<String, Standing>);

/// One that is not over.
#[derive(Debug)]
struct Standing {
    what: String,
    since: SystemTime,
}

impl Troubles {
    /// Notes what is wrong, with what to do about it; `None` if nothing is, or not any more.
    pub fn note(&mut self, name: &str, what: Option<String>, now: SystemTime) {
        match (self.0.get_mut(name), what) {
            (None, None) => {}
            (None, Some(what)) => {
                warn!("{what}");
                self.0.insert(name.to_owned(), Standing { what, since: now });
            }
            // In other words, but not for another time.
            (Some(standing), Some(what)) => standing.what = what,
            (Some(_), None) => {
                if let Some(Standing { what, since }) = self.0.remove(name) {
                    info!("over after {}: {what}", age(now.duration_since(since).unwrap_or_default()));
                }
            }
        }
    }

    /// Whether this is wrong.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// All of them, as the status has them.
    pub fn all(&self) -> impl Iterator<Item = Trouble> {
        self.0
            .values()
            .map(|standing| Trouble { what: standing.what.clone(), since: Timestamp::from(standing.since) })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
        time::{Duration, UNIX_EPOCH},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that are logged meanwhile.
    fn logged(work: impl FnOnce()) -> Vec<String> {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| line.trim().to_owned()).collect()
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn all(troubles: &Troubles) -> Vec<(String, Timestamp)> {
        troubles.all().map(|trouble| (trouble.what, trouble.since)).collect()
    }

    #[test]
    fn it_is_said_when_it_begins_and_when_it_ends_however_often_it_is_noted() {
        let mut troubles = Troubles::default();
        let lines = logged(|| {
            troubles.note("record", None, at(1));
            for second in 2..10 {
                troubles.note("record", Some(format!("the disk is full, {second}")), at(second));
            }
            assert_eq!(all(&troubles), [("the disk is full, 9".to_owned(), at(2).into())]);
            assert!(troubles.has("record"));
            for second in 10..20 {
                troubles.note("record", None, at(second));
            }
        });
        assert_eq!(lines, ["WARN the disk is full, 2", "INFO over after 8s: the disk is full, 9"]);
        assert!(all(&troubles).is_empty() && !troubles.has("record"));
    }

    #[test]
    fn each_has_its_own_beginning_and_one_that_comes_back_begins_anew() {
        let mut troubles = Troubles::default();
        let lines = logged(|| {
            troubles.note("plan", Some("a".into()), at(1));
            troubles.note("record", Some("b".into()), at(2));
            troubles.note("plan", None, at(3));
            assert_eq!(all(&troubles), [("b".to_owned(), at(2).into())]);
            troubles.note("plan", Some("a".into()), at(4));
        });
        assert_eq!(all(&troubles), [("a".to_owned(), at(4).into()), ("b".to_owned(), at(2).into())]);
        assert_eq!(lines, ["WARN a", "WARN b", "INFO over after 2s: a", "WARN a"]);
    }

    #[test]
    fn a_clock_that_is_set_back_is_no_failure() {
        let mut troubles = Troubles::default();
        let lines = logged(|| {
            troubles.note("plan", Some("a".into()), at(100));
            troubles.note("plan", None, at(1));
        });
        assert_eq!(lines, ["WARN a", "INFO over after 0s: a"]);
    }
}
