//! Dividing CPUs among the servers of a service.
//!
//! Pure. Takes the CPUs there are, with their cores and NUMA nodes, and what each server has now; gives
//! each server its CPUs. As few change hands as can be, so that it may be asked again at any time.
#![forbid(unsafe_code)]

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// A CPU that may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpu {
    pub number: usize,
    /// Its NUMA node.
    pub node: usize,
    /// The lowest number among its SMT siblings, itself included: who has the same one shares a core.
    pub core: usize,
}

/// What a server gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Portion {
    /// Its part of all CPUs.
    Cpus,
    /// All CPUs of one NUMA node.
    Node,
}

/// Divides `cpus` among as many servers as `before` tells of, each with the CPUs that it has now (none, if it
/// is new). Gives the CPUs of each, ascending; nothing if there are no CPUs.
///
/// A server gets whole nodes while there are enough of them, else whole cores of one node, else CPUs of one
/// core, else a CPU that it shares with others. Who is in a node, core or CPU stays there, unless it would
/// have more elsewhere.
pub fn divide(cpus: &[Cpu], before: &[Vec<usize>], portion: Portion) -> Vec<Vec<usize>> {
    let mut given = vec![Vec::new(); before.len()];
    let all: Vec<usize> = (0..before.len()).collect();
    match portion {
        Portion::Cpus => {
            place(cpus, &all, before, &[|cpu| cpu.node, |cpu| cpu.core, |cpu| cpu.number], &mut given)
        }
        Portion::Node => {
            let nodes = groups(cpus, |cpu| cpu.node);
            for (node, servers) in nodes.iter().zip(settle(&nodes, &all, before)) {
                servers.iter().for_each(|server| given[*server] = numbers(node));
            }
        }
    }
    given
}

/// What CPUs have in common that are near each other.
type Level = fn(&Cpu) -> usize;

/// Gives each of these servers its part of these CPUs.
fn place(cpus: &[Cpu], servers: &[usize], before: &[Vec<usize>], levels: &[Level], given: &mut [Vec<usize>]) {
    let Some((level, finer)) = levels.split_first() else {
        servers.iter().for_each(|server| given[*server] = numbers(cpus));
        return;
    };
    let groups = groups(cpus, *level);
    if servers.len() <= groups.len() {
        return hand_out(&groups, servers, before, given);
    }
    for (group, its) in groups.iter().zip(settle(&groups, servers, before)) {
        place(group, &its, before, finer, given);
    }
}

/// In the order of what they have in common.
fn groups(cpus: &[Cpu], level: Level) -> Vec<Vec<Cpu>> {
    let mut groups: BTreeMap<usize, BTreeSet<Cpu>> = BTreeMap::new();
    for cpu in cpus {
        groups.entry(level(cpu)).or_default().insert(*cpu);
    }
    groups.into_values().map(|group| group.into_iter().collect()).collect()
}

fn numbers(cpus: &[Cpu]) -> Vec<usize> {
    let mut numbers: Vec<usize> = cpus.iter().map(|cpu| cpu.number).collect();
    numbers.sort_unstable();
    numbers
}

/// How many CPUs of the group a server has now.
fn has(group: &[Cpu], its: &[usize]) -> usize {
    group.iter().filter(|cpu| its.contains(&cpu.number)).count()
}

/// More servers than groups: which of them share which group. Each group's servers in their order.
///
/// A newcomer goes where he has most to himself (as d'Hondt's method gives seats to parties), and whoever is
/// somewhere moves only if he has more in the other place. Of those that could, the last one does.
fn settle(groups: &[Vec<Cpu>], servers: &[usize], before: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut settled = vec![Vec::new(); groups.len()];
    if groups.is_empty() {
        return settled;
    }
    let mut newcomers = Vec::new();
    for &server in servers {
        let own = |group: &usize| has(&groups[*group], &before[server]);
        // The first of those in which it has most.
        match (0..groups.len()).rev().max_by_key(own).filter(|group| own(group) > 0) {
            Some(group) => settled[group].push(server),
            None => newcomers.push(server),
        }
    }
    // CPUs for each, if so many more came. As fractions, to be compared exactly.
    let portion = |settled: &[Vec<usize>], group: usize, more: usize| {
        (groups[group].len(), settled[group].len() + more)
    };
    let is_more = |left: (usize, usize), right: (usize, usize)| left.0 * right.1 > right.0 * left.1;
    // Of those that are as good, the emptier one: there he shares with fewer.
    let is_better = |settled: &[Vec<usize>], group: usize, best: usize| {
        let (its, of_best) = (portion(settled, group, 1), portion(settled, best, 1));
        is_more(its, of_best) || !is_more(of_best, its) && settled[group].len() < settled[best].len()
    };
    let best = |settled: &[Vec<usize>]| {
        (1..groups.len()).fold(0, |best, group| if is_better(settled, group, best) { group } else { best })
    };
    for server in newcomers {
        let group = best(&settled);
        settled[group].push(server);
    }
    loop {
        let to = best(&settled);
        let crowded =
            (0..groups.len()).filter(|group| !settled[*group].is_empty()).reduce(|crowded, group| {
                if is_more(portion(&settled, crowded, 0), portion(&settled, group, 0)) {
                    group
                } else {
                    crowded
                }
            });
        let Some(from) =
            crowded.filter(|from| is_more(portion(&settled, to, 1), portion(&settled, *from, 0)))
        else {
            break;
        };
        let mover = settled[from].pop();
        settled[to].extend(mover);
    }
    settled.iter_mut().for_each(|group| group.sort_unstable());
    settled
}

/// At least as many groups as servers: each gets some for itself, as equal in CPUs as they can be.
fn hand_out(groups: &[Vec<Cpu>], servers: &[usize], before: &[Vec<usize>], given: &mut [Vec<usize>]) {
    let Some(last) = servers.len().checked_sub(1) else { return };
    // By group: whose it is, as a place in `servers`.
    let mut owners: Vec<Option<usize>> = groups
        .iter()
        .map(|group| {
            let own = |place: &usize| has(group, &before[servers[*place]]);
            (0..servers.len()).rev().max_by_key(own).filter(|place| own(place) > 0)
        })
        .collect();
    let cpus = |owners: &[Option<usize>], place: usize| -> usize {
        groups
            .iter()
            .zip(owners)
            .filter(|(_, owner)| **owner == Some(place))
            .map(|(group, _)| group.len())
            .sum()
    };
    if owners.iter().all(Option::is_none) {
        // Neighbours to the same one: whose part of the whole the middle of the group lies in.
        let all: usize = groups.iter().map(Vec::len).sum();
        let mut passed = 0;
        for (group, owner) in groups.iter().zip(&mut owners) {
            *owner = Some(((2 * passed + group.len()) * servers.len() / (2 * all)).min(last));
            passed += group.len();
        }
    }
    // What nobody has goes to whoever has least.
    for group in 0..groups.len() {
        if owners[group].is_none() {
            owners[group] = (0..=last).min_by_key(|place| cpus(&owners, *place));
        }
    }
    // Nobody goes without: there are enough.
    while let Some(without) = (0..=last).find(|place| !owners.contains(&Some(*place))) {
        let several = |owner: &Option<usize>| owners.iter().filter(|other| *other == owner).count() > 1;
        let spare = (0..groups.len()).rev().filter(|group| several(&owners[*group]));
        let owned = |group: &usize| owners[*group].map_or(0, |owner| cpus(&owners, owner));
        match spare.min_by_key(|group| (Reverse(owned(group)), groups[*group].len())) {
            Some(group) => owners[group] = Some(without),
            None => break,
        }
    }
    // From whoever has most to whoever has least, while that brings them nearer to each other.
    loop {
        let most = (0..=last).max_by_key(|place| cpus(&owners, *place)).unwrap_or(0);
        let least = (0..=last).min_by_key(|place| cpus(&owners, *place)).unwrap_or(0);
        let apart = cpus(&owners, most) - cpus(&owners, least);
        let movable = (0..groups.len())
            .rev()
            .filter(|group| owners[*group] == Some(most) && groups[*group].len() < apart);
        match movable.min_by_key(|group| (2 * groups[*group].len()).abs_diff(apart)) {
            Some(group) => owners[group] = Some(least),
            None => break,
        }
    }
    for (place, server) in servers.iter().enumerate() {
        let its = groups.iter().zip(&owners).filter(|(_, owner)| **owner == Some(place));
        let its: Vec<Cpu> = its.flat_map(|(group, _)| group.clone()).collect();
        given[*server] = numbers(&its);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `n0 0+4 1+5 n1 2+6`: nodes, and cores with their CPUs.
    fn topology(text: &str) -> Vec<Cpu> {
        let mut node = 0;
        let mut cpus = Vec::new();
        for word in text.split_whitespace() {
            if let Some(number) = word.strip_prefix('n') {
                node = number.parse().unwrap();
                continue;
            }
            let siblings: Vec<usize> = word.split('+').map(|number| number.parse().unwrap()).collect();
            cpus.extend(siblings.iter().map(|number| Cpu { number: *number, node, core: siblings[0] }));
        }
        cpus
    }

    /// `0,1 2 - 3`: what each server has.
    fn sets(text: &str) -> Vec<Vec<usize>> {
        let set = |word: &str| word.split(',').filter_map(|number| number.parse().ok()).collect();
        text.split_whitespace().map(set).collect()
    }

    const SMT: &str = "n0 0+4 1+5 2+6 3+7";
    const NODES: &str = "n0 0 1 2 3 n1 4 5 6 7";

    #[test]
    fn cpus_are_divided_as_equally_as_can_be_and_neighbours_stay_together() {
        for (row, cpus, before, after) in [
            ("one has all", "n0 0 1 2 3", "-", "0,1,2,3"),
            ("one for each", "n0 0 1", "- -", "0 1"),
            ("halves", "n0 0 1 2 3", "- -", "0,1 2,3"),
            ("no whole parts", "n0 0 1 2 3 4 5 6 7", "- - -", "0,1,2 3,4 5,6,7"),
            ("siblings together", SMT, "- -", "0,1,4,5 2,3,6,7"),
            ("a core for each", SMT, "- - - -", "0,4 1,5 2,6 3,7"),
            ("whole cores, though uneven", SMT, "- - -", "0,4 1,2,5,6 3,7"),
            ("some cores shared by two", SMT, "- - - - - -", "0 1 2,6 3,7 4 5"),
            ("a CPU for each", SMT, "- - - - - - - -", "0 1 2 3 4 5 6 7"),
            ("more servers than CPUs", "n0 0 1", "- - - - -", "0 1 0 1 0"),
            ("one CPU", "n0 0", "- - -", "0 0 0"),
            ("one over all nodes", NODES, "-", "0,1,2,3,4,5,6,7"),
            ("a node for each", NODES, "- -", "0,1,2,3 4,5,6,7"),
            ("within a node", NODES, "- - -", "0,1 4,5,6,7 2,3"),
            ("within nodes", NODES, "- - - -", "0,1 4,5 2,3 6,7"),
            ("three nodes", "n0 0 1 n1 2 3 n2 4 5", "- -", "0,1 2,3,4,5"),
            ("a node for itself would be less", "n0 0 1 2 3 n1 4", "- - -", "0 1,2 3"),
            ("only some CPUs of a cpuset", "n0 2 3 n1 6", "- -", "2,3 6"),
            ("no CPUs", "", "- -", "- -"),
        ] {
            assert_eq!(divide(&topology(cpus), &sets(before), Portion::Cpus), sets(after), "{row}");
        }
    }

    #[test]
    fn as_few_cpus_change_hands_as_can_be() {
        for (row, cpus, before, after) in [
            ("nothing has changed", "n0 0 1 2 3", "0,1 2,3", "0,1 2,3"),
            ("nor in another order", "n0 0 1 2 3", "1,3 0,2", "1,3 0,2"),
            ("one more", "n0 0 1 2 3 4 5 6 7", "0,1,2,3 4,5,6,7 -", "0,1,2 4,5,6 3,7"),
            ("one less", "n0 0 1 2 3 4 5 6 7", "4,5,6 3,7", "1,4,5,6 0,2,3,7"),
            ("one more of SMT", SMT, "0,1,4,5 2,3,6,7 -", "0,1,4,5 2,6 3,7"),
            ("a CPU is gone", "n0 0 1 2", "0,1 2,3", "0,1 2"),
            ("two are gone", "n0 0 1", "0,1 2,3", "0 1"),
            ("its only CPU is gone", "n0 0 1 2", "0 1 2 3", "0 1 2 0"),
            ("half a core is gone", "n0 0+4 1", "0,4 1,5", "0,4 1"),
            ("a node is gone", "n0 0 1 2 3", "0,1 2,3 4,5 6,7", "0 2 3 1"),
            ("another one comes and there is none for it", "n0 0 1", "0 1 -", "0 1 0"),
            ("one that shared goes", "n0 0 1", "0 0", "0 1"),
            ("the crowd divides", "n0 0 1", "0 0 0 0", "0 0 1 1"),
            ("it stays in its node", NODES, "4,5,6,7 -", "4,5,6,7 0,1,2,3"),
        ] {
            assert_eq!(divide(&topology(cpus), &sets(before), Portion::Cpus), sets(after), "{row}");
        }
    }

    #[test]
    fn each_gets_a_node() {
        for (row, cpus, before, after) in [
            ("one", NODES, "-", "0,1,2,3"),
            ("two", NODES, "- -", "0,1,2,3 4,5,6,7"),
            ("three", NODES, "- - -", "0,1,2,3 4,5,6,7 0,1,2,3"),
            ("the first one is gone", NODES, "4,5,6,7 -", "4,5,6,7 0,1,2,3"),
            ("a node is gone", "n1 4 5 6 7", "0,1,2,3 4,5,6,7", "4,5,6,7 4,5,6,7"),
            ("some of its CPUs are gone", "n0 0 1 n1 4 5 6 7", "0,1,2,3 4,5,6,7", "0,1 4,5,6,7"),
            ("one node", SMT, "- -", "0,1,2,3,4,5,6,7 0,1,2,3,4,5,6,7"),
        ] {
            assert_eq!(divide(&topology(cpus), &sets(before), Portion::Node), sets(after), "{row}");
        }
    }

    fn machine() -> impl Strategy<Value = Vec<Cpu>> {
        // Of up to 3 nodes with 4 cores each of 2 threads, some.
        let all: Vec<Cpu> =
            (0..24).map(|number| Cpu { number, node: number / 8, core: number - number % 2 }).collect();
        prop::sample::subsequence(all, 1..=24)
    }

    fn servers() -> impl Strategy<Value = Vec<Vec<usize>>> {
        prop::collection::vec(prop::collection::btree_set(0_usize..24, 0..5), 1..40)
            .prop_map(|servers| servers.into_iter().map(|its| its.into_iter().collect()).collect())
    }

    proptest! {
        #[test]
        fn whatever_they_had_each_gets_what_is_there_and_asking_again_changes_nothing(
            cpus in machine(),
            before in servers(),
            portion in prop::sample::select(vec![Portion::Cpus, Portion::Node]),
        ) {
            let given = divide(&cpus, &before, portion);
            prop_assert_eq!(given.len(), before.len());
            for its in &given {
                prop_assert!(!its.is_empty() && its.is_sorted());
                prop_assert!(its.iter().all(|number| cpus.iter().any(|cpu| cpu.number == *number)));
            }
            prop_assert_eq!(&divide(&cpus, &given, portion), &given);
        }

        #[test]
        fn of_equal_cores_nobody_has_two_more_than_another(cores in 1_usize..30, before in servers()) {
            let cpus: Vec<Cpu> = (0..cores).map(|number| Cpu { number, node: 0, core: number }).collect();
            let given = divide(&cpus, &before, Portion::Cpus);
            let count = |cpu: usize| given.iter().filter(|its| its.contains(&cpu)).count();
            let counts: Vec<usize> = if before.len() <= cores {
                given.iter().map(Vec::len).collect()
            } else {
                (0..cores).map(count).collect()
            };
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{:?}", given);
            prop_assert!((0..cores).all(|cpu| count(cpu) > 0), "{:?}", given);
        }

        #[test]
        fn a_newcomer_takes_no_more_than_his_part(cores in 2_usize..30, servers in 1_usize..12) {
            let cpus: Vec<Cpu> = (0..cores).map(|number| Cpu { number, node: 0, core: number }).collect();
            let mut before = divide(&cpus, &vec![Vec::new(); servers], Portion::Cpus);
            before.push(Vec::new());
            let after = divide(&cpus, &before, Portion::Cpus);
            let newcomers = after[servers].len();
            let lost: usize = before.iter().zip(&after)
                .map(|(before, after)| before.iter().filter(|cpu| !after.contains(cpu)).count())
                .sum();
            prop_assert!(lost <= newcomers, "{:?} -> {:?}", before, after);
        }
    }
}
