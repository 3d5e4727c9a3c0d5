//! Which CPUs a server may use: lists in the format of cpuset(7) (`0-3,8`), NUMA nodes, or its part of all.
#![forbid(unsafe_code)]

use std::fmt;

use crate::spread::Portion;

/// The highest number a list may name (CONFIG_NR_CPUS is 8,192 at most), so that a typing
/// error cannot ask for a list of four billion.
const HIGHEST: usize = 8_191;

/// The CPUs that a server may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// All that dist-ctl itself may use.
    All,
    /// These, ascending.
    List(Vec<usize>),
    /// Those of these NUMA nodes, ascending.
    Nodes(Vec<usize>),
    /// Its part of them, among the servers of its service that say the same.
    Spread(Portion),
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::List(list) => f.write_str(&write(list)),
            Self::Nodes(nodes) => write!(f, "node{}", write(nodes)),
            Self::Spread(Portion::Cpus) => f.write_str("spread"),
            Self::Spread(Portion::Node) => f.write_str("spread:nodes"),
        }
    }
}

/// What was written; or a sentence that begins with the text.
pub(super) fn meant(text: &str) -> Result<Cpus, String> {
    match text {
        "spread" => return Ok(Cpus::Spread(Portion::Cpus)),
        "spread:nodes" => return Ok(Cpus::Spread(Portion::Node)),
        _ => {}
    }
    match text.strip_prefix("node") {
        Some(nodes) => parse(nodes).map(Cpus::Nodes).map_err(|_| {
            format!("{text:?} is no list of NUMA nodes, write for example \"node0\" or \"node0-1\"")
        }),
        None => parse(text).map(Cpus::List),
    }
}

/// The CPUs of a list, ascending and each once; or a sentence that begins with the text.
pub fn parse(text: &str) -> Result<Vec<usize>, String> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => cpus.extend(first..=last),
            (Some(first), Some(last)) => {
                return Err(format!("{text:?} counts backwards, write \"{last}-{first}\""));
            }
            _ => {
                return Err(format!(
                    "{text:?} is no list of CPUs, write for example \"0-3\" or \"0-3,8\", or \"node0\", \
                     \"spread\" or \"spread:nodes\""
                ));
            }
        }
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// The shortest list of these ascending CPUs.
pub fn write(cpus: &[usize]) -> String {
    let ranges = cpus.chunk_by(|left, right| left + 1 == *right);
    let texts: Vec<String> = ranges
        .map(|range| match range {
            [first, .., last] => format!("{first}-{last}"),
            single => format!("{}", single[0]),
        })
        .collect();
    texts.join(",")
}

fn number(text: &str) -> Option<usize> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|cpu| digits && *cpu <= HIGHEST)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_read() {
        for (text, cpus) in [
            ("0", vec![0]),
            ("0-3", vec![0, 1, 2, 3]),
            ("0-1,8", vec![0, 1, 8]),
            ("8,0-1,1-2", vec![0, 1, 2, 8]),
            // As /sys/devices/system/cpu/online ends.
            ("0-1\n", vec![0, 1]),
        ] {
            assert_eq!(parse(text), Ok(cpus), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_list_is_refused() {
        let unclear = |text| {
            format!(
                "{text:?} is no list of CPUs, write for example \"0-3\" or \"0-3,8\", or \"node0\", \"spread\" or \
                 \"spread:nodes\""
            )
        };
        for (text, sentence) in [
            ("3-0", "\"3-0\" counts backwards, write \"0-3\"".to_owned()),
            ("", unclear("")),
            ("all", unclear("all")),
            ("0,", unclear("0,")),
            ("-1", unclear("-1")),
            ("+1", unclear("+1")),
            ("0 1", unclear("0 1")),
            ("0-4294967295", unclear("0-4294967295")),
        ] {
            assert_eq!(parse(text), Err(sentence), "{text}");
        }
    }

    #[test]
    fn words_are_understood() {
        for (text, cpus) in [
            ("0-1", Cpus::List(vec![0, 1])),
            ("node0", Cpus::Nodes(vec![0])),
            ("node0-1,3", Cpus::Nodes(vec![0, 1, 3])),
            ("spread", Cpus::Spread(Portion::Cpus)),
            ("spread:nodes", Cpus::Spread(Portion::Node)),
        ] {
            assert_eq!(cpus.to_string(), text);
            assert_eq!(meant(text), Ok(cpus), "{text}");
        }
        for text in ["node", "node1-0", "nodes", "spread:", "spread:cores", "Spread", "spread "] {
            assert!(meant(text).is_err_and(|sentence| sentence.starts_with(&format!("{text:?} "))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_written_list_reads_back(cpus in prop::collection::btree_set(0_usize..=HIGHEST, 1..40)) {
            let cpus: Vec<usize> = BTreeSet::into_iter(cpus).collect();
            prop_assert_eq!(parse(&write(&cpus)), Ok(cpus));
        }
    }
}
