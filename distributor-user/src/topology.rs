//! Which CPUs there are, and which of them share a core or a NUMA node.
//!
//! Reads /sys, and what we may use of it. A CPU that is offline is not there.
#![forbid(unsafe_code)]

use std::{fs, io, path::Path};

use rustix::thread::{CpuSet, sched_getaffinity};

use crate::{cgroup::Cgroup, config, spread::Cpu};

/// The CPUs that are online and that servers in this cgroup may use: those of our own mask, and of the
/// cpuset of the cgroup, where there is one.
///
/// # Errors
/// /sys does not tell which CPUs are online, or the kernel not what our mask is.
pub fn usable(cgroup: &Cgroup) -> io::Result<Vec<Cpu>> {
    let ours = sched_getaffinity(None)?;
    let cpuset = cgroup.cpuset().map(|text| list(&text));
    let mut cpus = online(Path::new("/sys/devices/system"))?;
    let may = |number: usize| number < CpuSet::MAX_CPU && ours.is_set(number);
    cpus.retain(|cpu| may(cpu.number) && cpuset.as_ref().is_none_or(|its| its.contains(&cpu.number)));
    Ok(cpus)
}

/// The numbers of the nodes that may be there. A kernel without NUMA has one, which it does not show.
pub fn nodes() -> Vec<usize> {
    let possible = fs::read_to_string("/sys/devices/system/node/possible").map(|text| list(&text));
    possible.ok().filter(|nodes| !nodes.is_empty()).unwrap_or_else(|| vec![0])
}

/// Those of `system`, which is /sys/devices/system.
fn online(system: &Path) -> io::Result<Vec<Cpu>> {
    let read = |file: String| fs::read_to_string(system.join(file)).map(|text| list(&text));
    let nodes: Vec<(usize, Vec<usize>)> = read("node/online".to_owned())
        .unwrap_or_default()
        .into_iter()
        .map(|node| (node, read(format!("node/node{node}/cpulist")).unwrap_or_default()))
        .collect();
    let cpu = |number: usize| {
        let siblings = read(format!("cpu/cpu{number}/topology/thread_siblings_list")).unwrap_or_default();
        let node = nodes.iter().find(|(_, cpus)| cpus.contains(&number)).map_or(0, |(node, _)| *node);
        Cpu { number, node, core: siblings.first().copied().unwrap_or(number) }
    };
    Ok(read("cpu/online".to_owned())?.into_iter().map(cpu).collect())
}

/// An empty one is written as an empty line.
fn list(text: &str) -> Vec<usize> {
    config::cpus_of_list(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_siblings_and_two_nodes_is_read() {
        let system = std::env::temp_dir().join(format!("dist-ctl-topology-{}", std::process::id()));
        let write = |file: &str, text: &str| {
            let file = system.join(file);
            fs::create_dir_all(file.parent().unwrap()).and_then(|()| fs::write(file, text)).unwrap();
        };
        write("cpu/online", "0-2,5\n");
        for (number, siblings) in [(0, "0,2"), (1, "1"), (2, "0,2"), (5, "5")] {
            write(&format!("cpu/cpu{number}/topology/thread_siblings_list"), siblings);
        }
        write("node/online", "0,2\n");
        write("node/node0/cpulist", "0-2\n");
        write("node/node2/cpulist", "5\n");
        let cpus = online(&system);
        fs::remove_file(system.join("node/online")).unwrap();
        let without_nodes = online(&system);
        fs::remove_dir_all(&system).unwrap();
        let cpu = |number, node, core| Cpu { number, node, core };
        assert_eq!(cpus.unwrap(), [cpu(0, 0, 0), cpu(1, 0, 1), cpu(2, 0, 0), cpu(5, 2, 5)]);
        assert_eq!(without_nodes.unwrap(), [cpu(0, 0, 0), cpu(1, 0, 1), cpu(2, 0, 0), cpu(5, 0, 5)]);
        assert!(online(&system).is_err(), "nothing is known of no machine");
    }

    #[test]
    fn this_machine_has_the_cpus_that_we_may_use() {
        let ours = sched_getaffinity(None).unwrap();
        let usable = usable(&Cgroup::at("/nowhere")).unwrap();
        assert_eq!(usable.len(), ours.count() as usize);
        assert!(usable.iter().all(|cpu| ours.is_set(cpu.number) && nodes().contains(&cpu.node)));
    }
}
