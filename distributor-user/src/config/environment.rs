//! What a server finds in its environment, and the machine that it comes from.
//!
//! Pure but for [`Machine::this`]: a server's environment is a function of ours, its user and
//! its configuration.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, fs};

use super::{User, cpus};
use crate::topology;

/// The facts a configuration is completed with and checked against.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Our own environment.
    pub environment: Vec<(String, String)>,
    /// The CPUs that may be plugged in, ascending: one that is offline now may be back later, and a
    /// server runs on others meanwhile. `None` where /sys does not tell.
    pub cpus_possible: Option<Vec<usize>>,
    /// The NUMA nodes that there may be, ascending.
    pub nodes_possible: Vec<usize>,
}

impl Machine {
    /// The machine this runs on.
    pub fn this() -> Self {
        let cpus_possible = fs::read_to_string("/sys/devices/system/cpu/possible")
            .ok()
            .and_then(|list| cpus::parse(&list).ok());
        Self {
            // A name or value that is not UTF-8 cannot stand in a job description.
            environment: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
            cpus_possible,
            nodes_possible: topology::nodes(),
        }
    }
}

/// What each server is told about itself.
pub(super) struct Facts<'a> {
    /// DIST_CTL_SERVICE
    pub(super) service: &'a str,
    /// DIST_CTL_SERVER: the name that `dist-ctl` takes, `shop/1`.
    pub(super) server: &'a str,
    /// DIST_CTL_INDEX
    pub(super) index: usize,
    /// DIST_CTL_LISTEN: addresses with a space between them.
    pub(super) listen: &'a str,
}

/// A server's whole environment, sorted by name.
///
/// `base` is ours, `written` the configuration's, shared before its own.
pub(super) fn environment(
    base: impl Iterator<Item = (String, String)>,
    user: Option<&User>,
    written: impl Iterator<Item = (String, String)>,
    facts: &Facts<'_>,
) -> Vec<(String, String)> {
    let mut environment: BTreeMap<String, String> = base.filter(|(name, _)| !stays_with_us(name)).collect();
    if let Some(user) = user {
        let home = user.home.to_string_lossy().into_owned();
        let shell = user.shell.to_string_lossy().into_owned();
        environment.extend([
            ("HOME".to_owned(), home),
            ("USER".to_owned(), user.name.clone()),
            ("LOGNAME".to_owned(), user.name.clone()),
            ("SHELL".to_owned(), shell),
        ]);
    }
    environment.extend(written);
    environment.extend(
        [
            ("DIST_CTL_SERVICE", facts.service.to_owned()),
            ("DIST_CTL_SERVER", facts.server.to_owned()),
            ("DIST_CTL_INDEX", facts.index.to_string()),
            ("DIST_CTL_LISTEN", facts.listen.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    environment.into_iter().collect()
}

/// Why this name may not be written into a server's environment.
pub(super) fn refusal(name: &str) -> Option<String> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Some(format!("{name:?} is no name of a variable, write one without = and not empty"));
    }
    let ours = name.starts_with("DIST_CTL_")
        || ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"]
            .contains(&name);
    ours.then(|| format!("{name:?} is set by dist-ctl itself, write another name"))
}

/// What was said to us, or to the shell that started us, and is wrong or misleading for a
/// server: a server that believed our NOTIFY_SOCKET would report itself to systemd as us.
fn stays_with_us(name: &str) -> bool {
    ["DIST_CTL_", "LISTEN_", "SUDO_", "WATCHDOG_"].iter().any(|prefix| name.starts_with(prefix))
        || name == "NOTIFY_SOCKET"
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const FACTS: Facts<'_> =
        Facts { service: "shop", server: "shop/1", index: 1, listen: "0.0.0.0:80 [::]:80" };

    fn pairs<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    #[test]
    fn a_server_learns_who_it_is_and_not_who_we_are() {
        let ours = pairs([
            ("PATH", "/bin"),
            ("HOME", "/root"),
            ("DIST_CTL_RUNTIME_DIR", "/run/x"),
            ("DIST_CTL_SERVER", "outer/1"),
            ("LISTEN_FDS", "1"),
            ("NOTIFY_SOCKET", "/run/systemd/notify"),
            ("SUDO_USER", "me"),
            ("WATCHDOG_USEC", "1"),
        ]);
        let written = pairs([("JAVA_HOME", "/java")]);
        assert_eq!(
            environment(ours.into_iter(), None, written.into_iter(), &FACTS),
            pairs([
                ("DIST_CTL_INDEX", "1"),
                ("DIST_CTL_LISTEN", "0.0.0.0:80 [::]:80"),
                ("DIST_CTL_SERVER", "shop/1"),
                ("DIST_CTL_SERVICE", "shop"),
                ("HOME", "/root"),
                ("JAVA_HOME", "/java"),
                ("PATH", "/bin"),
            ])
        );
    }

    #[test]
    fn a_users_home_comes_before_ours_and_after_what_is_written() {
        let user = User {
            uid: 1,
            gid: 1,
            groups: vec![1],
            name: "shop".to_owned(),
            home: PathBuf::from("/srv/shop"),
            shell: PathBuf::from("/bin/sh"),
        };
        let ours = pairs([("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root")]);
        let written = pairs([("SHELL", "/bin/false"), ("A", "shared"), ("A", "own")]);
        assert_eq!(
            environment(ours.into_iter(), Some(&user), written.into_iter(), &FACTS),
            pairs([
                ("A", "own"),
                ("DIST_CTL_INDEX", "1"),
                ("DIST_CTL_LISTEN", "0.0.0.0:80 [::]:80"),
                ("DIST_CTL_SERVER", "shop/1"),
                ("DIST_CTL_SERVICE", "shop"),
                ("HOME", "/srv/shop"),
                ("LOGNAME", "shop"),
                ("SHELL", "/bin/false"),
                ("USER", "shop"),
            ])
        );
    }
}
