//! What is to be done so that a newer configuration holds.
//!
//! Pure: two configurations in, a list out, which can be shown before anything of it is done. Each
//! difference is put down for the least that it needs: a number is set, a server is replaced by a
//! new instance beside the old one, a service is stopped and begun anew.
#![forbid(unsafe_code)]

use std::fmt;

use crate::{
    config::{self, Check, CheckKind, Config, Server, Service, Stall},
    lifetime::{self, Lifetime},
};

/// In the order in which it is done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Who may talk to the control socket.
    pub control: bool,
    pub services: Vec<ServiceChange>,
}

/// What becomes of a service.
#[derive(Clone, Debug, PartialEq)]
pub enum ServiceChange {
    /// It is not configured any more.
    Remove(String),
    /// It cannot be changed while it runs, for this reason.
    BeginAnew {
        service: Service,
        why: &'static str,
    },
    Update(Update),
    Add(Service),
}

/// A service that goes on, with changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// As it is to be.
    pub service: Service,
    pub settings: Vec<Setting>,
    pub servers: Vec<ServerChange>,
}

/// What becomes of a server.
#[derive(Clone, Debug, PartialEq)]
pub enum ServerChange {
    /// Nothing has to be started for it.
    Set {
        name: String,
        settings: Vec<Setting>,
    },
    /// What it is started with has changed, in these fields; and what else.
    Replace {
        name: String,
        why: Vec<&'static str>,
        settings: Vec<Setting>,
    },
    /// It was to be replaced, and runs as it is configured now.
    Keep {
        name: String,
        settings: Vec<Setting>,
    },
    Add {
        name: String,
    },
    Remove {
        name: String,
    },
}

/// What runs may not be what is configured, because to replace it has failed or is not over.
pub struct Running<'a> {
    /// Servers that run as they were configured even before: they are replaced too, if they go on.
    pub outdated: Vec<String>,
    /// Whether a server runs as this says already.
    pub runs_as: &'a dyn Fn(&Service, &Server) -> bool,
}

impl Running<'_> {
    /// Everything runs as it was configured last.
    pub const AS_CONFIGURED: Self = Self { outdated: Vec::new(), runs_as: &|_, _| false };
}

/// A value that is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub field: &'static str,
    pub from: String,
    pub to: String,
}

impl Changes {
    /// From the one configuration to the other, while what runs is like this.
    pub fn between(old: &Config, new: &Config, running: &Running<'_>) -> Self {
        let removed = old.services.iter().filter(|service| new.service(&service.name).is_none());
        let mut services: Vec<ServiceChange> =
            removed.map(|service| ServiceChange::Remove(service.name.clone())).collect();
        let (mut changed, mut added) = (Vec::new(), Vec::new());
        for service in &new.services {
            match old.service(&service.name) {
                None => added.push(ServiceChange::Add(service.clone())),
                Some(before) => changed.extend(service_change(before, service, running)),
            }
        }
        // What is removed may have the address of what is begun.
        services.extend(changed);
        services.extend(added);
        Self { control: old.control != new.control, services }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// A line for each thing that is done.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.control {
            lines.push("control: owner, mode and readers of the control socket are set".to_owned());
        }
        for change in &self.services {
            match change {
                ServiceChange::Remove(name) => {
                    lines.push(format!("service {name}: drained, stopped and removed"))
                }
                ServiceChange::BeginAnew { service, why } => lines.push(format!(
                    "service {}: drained, stopped and begun anew, because its {why} changed; connections are \
                     refused meanwhile",
                    service.name
                )),
                ServiceChange::Update(update) => lines.extend(update.lines()),
                ServiceChange::Add(service) => {
                    let count = service.servers.len();
                    let plural = if count == 1 { "" } else { "s" };
                    lines.push(format!("service {}: added, with {count} server{plural}", service.name));
                }
            }
        }
        lines
    }
}

impl Update {
    fn lines(&self) -> Vec<String> {
        let name = &self.service.name;
        let mut lines: Vec<String> =
            self.settings.iter().map(|setting| format!("service {name}: {setting}")).collect();
        // Servers usually change together, and then are told together.
        let mut told: Vec<(String, Vec<&str>)> = Vec::new();
        for (server, sentence) in self.servers.iter().flat_map(ServerChange::sentences) {
            match told.iter_mut().find(|(other, _)| *other == sentence) {
                Some((_, servers)) => servers.push(server),
                None => told.push((sentence, vec![server])),
            }
        }
        lines.extend(told.into_iter().map(|(sentence, servers)| format!("{}: {sentence}", list(&servers))));
        lines
    }
}

impl ServerChange {
    pub fn name(&self) -> &str {
        match self {
            Self::Set { name, .. }
            | Self::Replace { name, .. }
            | Self::Keep { name, .. }
            | Self::Add { name }
            | Self::Remove { name } => name,
        }
    }

    /// Why it is replaced, by the fields that have changed.
    pub fn reason(why: &[&str]) -> String {
        match why {
            // It was to be before, and that has failed.
            [] => "it runs as it was configured before".to_owned(),
            fields => format!("{} changed", fields.join(", ")),
        }
    }

    fn sentences(&self) -> Vec<(&str, String)> {
        let mut sentences: Vec<String> = match self {
            Self::Set { settings, .. } | Self::Replace { settings, .. } | Self::Keep { settings, .. } => {
                settings.iter().map(ToString::to_string).collect()
            }
            Self::Add { .. } => vec!["added and started".to_owned()],
            Self::Remove { .. } => vec!["drained, stopped and removed".to_owned()],
        };
        match self {
            Self::Replace { why, .. } => {
                sentences.push(format!("replaced by a new instance ({})", Self::reason(why)));
            }
            Self::Keep { .. } => {
                sentences.push("not replaced, because what runs is like that already".to_owned())
            }
            Self::Set { .. } | Self::Add { .. } | Self::Remove { .. } => {}
        }
        sentences.into_iter().map(|sentence| (self.name(), sentence)).collect()
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}", self.field, self.from, self.to)
    }
}

/// So many servers are told by their names.
const NAMED: usize = 4;

fn list(names: &[&str]) -> String {
    match names {
        [only] => format!("server {only}"),
        [first, .., last] if names.len() > NAMED => {
            format!("servers {first} to {last} ({} of them)", names.len())
        }
        _ => format!("servers {}", names.join(", ")),
    }
}

fn service_change(old: &Service, new: &Service, running: &Running<'_>) -> Option<ServiceChange> {
    let begun_anew = [
        ("addresses", !same_addresses(old, new)),
        ("user", old.user != new.user),
        ("socket", old.socket != new.socket),
    ];
    if let Some((why, _)) = begun_anew.iter().find(|(_, differs)| *differs) {
        return Some(ServiceChange::BeginAnew { service: new.clone(), why });
    }
    let update = Update {
        settings: service_settings(old, new),
        servers: server_changes(old, new, running),
        // In the order that it has now, which groups are numbered by.
        service: Service { listen: old.listen.clone(), ..new.clone() },
    };
    // What matters at the start only is taken over without a word.
    (!update.settings.is_empty() || !update.servers.is_empty() || update.service != *old)
        .then_some(ServiceChange::Update(update))
}

fn same_addresses(old: &Service, new: &Service) -> bool {
    old.listen.len() == new.listen.len() && old.listen.iter().all(|address| new.listen.contains(address))
}

fn service_settings(old: &Service, new: &Service) -> Vec<Setting> {
    // Named one by one, so that no new one is forgotten.
    let Service {
        name: _,
        listen: _,
        policy,
        occupied,
        waiting,
        limits,
        load,
        scale,
        roll,
        user: _,
        socket: _,
        readiness,
        backlog: _,
        servers: _,
    } = new;
    let mut settings = Settings::default();
    settings.note("policy", old.policy.name(), policy.name());
    settings.note("occupied", old.occupied.name(), occupied.name());
    settings.note("readiness", old.readiness.name(), readiness.name());
    settings.note("waiting.capacity", old.waiting.capacity, waiting.capacity);
    settings.note("waiting.timeout", span(old.waiting.timeout), span(waiting.timeout));
    let ceilings = |limits: &config::Limits| match limits.to_string() {
        none if none.is_empty() => "none".to_owned(),
        some => some,
    };
    settings.note_if(old.limits != *limits, "limits", ceilings(&old.limits), ceilings(limits));
    settings.note("load", or_none(old.load.as_ref()), or_none(load.as_ref()));
    settings.note("roll", old.roll, *roll);
    settings.note("scale", or_none(old.scale), or_none(*scale));
    let reply = |waiting: &config::Waiting| match waiting.reply.len() {
        0 => "none".to_owned(),
        bytes => format!("{bytes} bytes"),
    };
    let (from, to) = (reply(&old.waiting), reply(waiting));
    let to = if from == to { format!("{to}, which differ") } else { to };
    settings.note_if(old.waiting.reply != waiting.reply, "waiting.reply", from, to);
    settings.0
}

fn server_changes(old: &Service, new: &Service, running: &Running<'_>) -> Vec<ServerChange> {
    let find = |servers: &[Server], name: &str| servers.iter().find(|server| server.name == name).cloned();
    let mut changes = Vec::new();
    for server in &new.servers {
        let name = server.name.clone();
        let Some(before) = find(&old.servers, &name) else {
            changes.push(ServerChange::Add { name });
            continue;
        };
        let settings = server_settings(&before, server);
        let mut why = started_with(&before, server);
        if old.backlog != new.backlog {
            why.push("backlog");
        }
        if !why.is_empty() && (running.runs_as)(new, server) {
            changes.push(ServerChange::Keep { name, settings });
        } else if !why.is_empty() || running.outdated.contains(&name) {
            changes.push(ServerChange::Replace { name, why, settings });
        } else if !settings.is_empty() {
            changes.push(ServerChange::Set { name, settings });
        }
    }
    // Last: whoever takes their share is there by then.
    let removed = old.servers.iter().filter(|server| find(&new.servers, &server.name).is_none());
    changes.extend(removed.map(|server| ServerChange::Remove { name: server.name.clone() }));
    changes
}

/// What can be set while it runs.
fn server_settings(old: &Server, new: &Server) -> Vec<Setting> {
    let mut settings = Settings::default();
    settings.note("weight", old.weight, new.weight);
    settings.note("limit", or_none(old.limit), or_none(new.limit));
    settings.note("cpus", &old.cpus, &new.cpus);
    settings.note("backup", old.backup, new.backup);
    settings.note("slow_start", span(old.slow_start), span(new.slow_start));
    settings.note("check", check(&old.check), check(&new.check));
    settings.note("stall_after", stall(old.stall), stall(new.stall));
    let (was, is) = (old.lifetime, new.lifetime);
    settings.note("max_age", or_none(was.max_age.map(span)), or_none(is.max_age.map(span)));
    settings.note("max_connections", or_none(was.max_connections), or_none(is.max_connections));
    let memory = |lifetime: Lifetime| or_none(lifetime.memory_limit.map(lifetime::size));
    settings.note_if(was.memory_limit != is.memory_limit, "memory_limit", memory(was), memory(is));
    let percent = |thousandths: u32| format!("{}%", f64::from(thousandths) / 10.0);
    settings.note("jitter", percent(was.jitter), percent(is.jitter));
    settings.note("start_timeout", span(old.start_timeout), span(new.start_timeout));
    settings.note("drain_timeout", span(old.drain_timeout), span(new.drain_timeout));
    settings.note("stop_timeout", span(old.stop_timeout), span(new.stop_timeout));
    settings.note("stop_signal", signal(old.stop_signal), signal(new.stop_signal));
    let give_up = |after: Option<u32>| after.map_or("never".to_owned(), |failures| failures.to_string());
    settings.note("restart.delay", span(old.restart.delay), span(new.restart.delay));
    settings.note("restart.max_delay", span(old.restart.max_delay), span(new.restart.max_delay));
    settings.note("restart.healthy_after", span(old.restart.healthy_after), span(new.restart.healthy_after));
    settings.note(
        "restart.give_up_after",
        give_up(old.restart.give_up_after),
        give_up(new.restart.give_up_after),
    );
    settings.0
}

/// The fields of what it is started with that differ.
fn started_with(old: &Server, new: &Server) -> Vec<&'static str> {
    // Named one by one, so that no new one is forgotten here or above.
    let Server {
        name: _,
        short_name: _,
        // It is in the command or in the environment if it matters.
        index: _,
        command,
        // It differs from shell to shell.
        environment: _,
        own_environment,
        directory,
        weight: _,
        limit: _,
        cpus: _,
        limits,
        umask,
        output,
        errors,
        stop_signal: _,
        stop_timeout: _,
        start_timeout: _,
        drain_timeout: _,
        backup: _,
        slow_start: _,
        watchdog,
        check: _,
        stall: _,
        lifetime: _,
        restart: _,
    } = new;
    let fields = [
        ("command", old.command != *command),
        ("environment", old.own_environment != *own_environment),
        ("directory", old.directory != *directory),
        ("limits", old.limits != *limits),
        ("umask", old.umask != *umask),
        ("output", old.output != *output),
        ("errors", old.errors != *errors),
        ("watchdog", old.watchdog != *watchdog),
    ];
    fields.into_iter().filter(|(_, differs)| *differs).map(|(field, _)| field).collect()
}

fn or_none(value: Option<impl fmt::Display>) -> String {
    value.map_or("none".to_owned(), |value| value.to_string())
}

/// All of how a server is checked, so that two texts differ if two checks do.
fn check(check: &Option<Check>) -> String {
    let Some(Check { kind, interval, fast_interval, timeout, rise, fall, restart_after }) = check else {
        return "none".to_owned();
    };
    let kind = match kind {
        CheckKind::Tcp => "tcp".to_owned(),
        CheckKind::Http { path, host, statuses } => {
            let statuses: Vec<String> =
                statuses.iter().map(|range| format!("{}-{}", range.start(), range.end())).collect();
            format!("http {path} of {host} with {}", statuses.join(" or "))
        }
        CheckKind::Command { command } => format!("command {command:?}"),
    };
    let after = restart_after.map_or("never".to_owned(), |after| format!("after {}", span(after)));
    format!(
        "{kind} within {}, every {} or {}, rise {rise}, fall {fall}, started again {after}",
        span(*timeout),
        span(*interval),
        span(*fast_interval)
    )
}

/// Likewise.
fn stall(stall: Option<Stall>) -> String {
    match stall {
        None => "never".to_owned(),
        Some(Stall { after, move_queue: true, .. }) => format!("{}, moved", span(after)),
        Some(Stall { after, kill_after: Some(kill), .. }) => {
            format!("{}, killed after {}", span(after), span(kill))
        }
        Some(Stall { after, .. }) => span(after),
    }
}

#[derive(Default)]
struct Settings(Vec<Setting>);

impl Settings {
    fn note<T: fmt::Display + PartialEq>(&mut self, field: &'static str, from: T, to: T) {
        let differs = from != to;
        self.note_if(differs, field, from, to);
    }

    fn note_if(
        &mut self,
        differs: bool,
        field: &'static str,
        from: impl fmt::Display,
        to: impl fmt::Display,
    ) {
        if differs {
            self.0.push(Setting { field, from: from.to_string(), to: to.to_string() });
        }
    }
}

fn span(length: std::time::Duration) -> String {
    config::duration::write(length)
}

fn signal(signal: rustix::process::Signal) -> String {
    config::signal_name(signal).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = r#"
[service.shop]
listen = ["127.0.0.1:8080", "[::1]:8080"]
[service.shop.server]
command = ["/bin/server", "{name}"]
count = 3
"#;

    const WEB: &str = r#"
[service.web]
listen = ["127.0.0.1:8081"]
[service.web.server]
command = ["/bin/web"]
"#;

    fn config(text: &str) -> Config {
        Config::parse(text, "shop.toml").unwrap()
    }

    fn lines(old: &str, new: &str) -> Vec<String> {
        Changes::between(&config(old), &config(new), &Running::AS_CONFIGURED).lines()
    }

    #[test]
    fn each_difference_is_put_down_for_the_least_that_it_needs() {
        let with = |line: &str| format!("{SHOP}{line}\n");
        let service =
            |line: &str| SHOP.replace("[service.shop.server]", &format!("{line}\n[service.shop.server]"));
        let all = "servers shop/1, shop/2, shop/3";
        for (new, expected) in [
            (SHOP.to_owned(), vec![]),
            (with("weight = 50"), vec![format!("{all}: weight 100 -> 50")]),
            (with("limit = 7"), vec![format!("{all}: limit none -> 7")]),
            (
                service("[service.shop.check]\ntype = \"http\"\nrestart_after = \"9s\""),
                vec![format!(
                    "{all}: check none -> http / of localhost with 200-399 within 1s, every 2s or 500ms, rise 2, \
                     fall 3, started again after 9s"
                )],
            ),
            (
                with("stall_after = \"5s\"\nhang_kill = \"1m\""),
                vec![format!("{all}: stall_after never -> 5s, killed after 1m")],
            ),
            (with("cpus = \"0\""), vec![format!("{all}: cpus all -> 0")]),
            (with("backup = true"), vec![format!("{all}: backup false -> true")]),
            (with("slow_start = \"1m\""), vec![format!("{all}: slow_start 0s -> 1m")]),
            (with("start_timeout = \"2s\""), vec![format!("{all}: start_timeout 1m -> 2s")]),
            (with("stop_signal = \"QUIT\""), vec![format!("{all}: stop_signal TERM -> QUIT")]),
            (with("restart = { delay = \"1s\" }"), vec![format!("{all}: restart.delay 100ms -> 1s")]),
            (with("readiness = \"notify\""), vec!["service shop: readiness listening -> notify".to_owned()]),
            (service("policy = \"first\""), vec!["service shop: policy least-connections -> first".to_owned()]),
            (
                service("waiting = { capacity = 5, timeout = \"1s\", reply = \"no\" }"),
                vec![
                    "service shop: waiting.capacity 1024 -> 5".to_owned(),
                    "service shop: waiting.timeout 30s -> 1s".to_owned(),
                    "service shop: waiting.reply none -> 2 bytes".to_owned(),
                ],
            ),
            (
                with("umask = \"0077\"\nenvironment = { A = \"b\" }\nweight = 50"),
                vec![
                    format!("{all}: weight 100 -> 50"),
                    format!("{all}: replaced by a new instance (environment, umask changed)"),
                ],
            ),
            (with("backlog = 77"), vec![format!("{all}: replaced by a new instance (backlog changed)")]),
            (
                SHOP.replace("count = 3", "count = 5"),
                vec!["servers shop/4, shop/5: added and started".to_owned()],
            ),
            (
                SHOP.replace("count = 3", "count = 1"),
                vec!["servers shop/2, shop/3: drained, stopped and removed".to_owned()],
            ),
            (
                SHOP.replace("count = 3", "count = 9"),
                vec!["servers shop/4 to shop/9 (6 of them): added and started".to_owned()],
            ),
            (
                format!("{SHOP}[[service.shop.servers]]\nname = \"big\"\n"),
                vec!["server shop/big: added and started".to_owned()],
            ),
            // In which order they are written says nothing.
            (SHOP.replace(r#""127.0.0.1:8080", "[::1]:8080""#, r#""[::1]:8080", "127.0.0.1:8080""#), vec![]),
            (
                SHOP.replace(r#", "[::1]:8080""#, ""),
                vec![
                    "service shop: drained, stopped and begun anew, because its addresses changed; connections \
                     are refused meanwhile"
                        .to_owned(),
                ],
            ),
            (
                with("socket = \"systemd\""),
                vec![
                    "service shop: drained, stopped and begun anew, because its socket changed; connections are \
                     refused meanwhile"
                        .to_owned(),
                ],
            ),
            (format!("{SHOP}{WEB}"), vec!["service web: added, with 1 server".to_owned()]),
            (WEB.to_owned(), vec![
                "service shop: drained, stopped and removed".to_owned(),
                "service web: added, with 1 server".to_owned(),
            ]),
            (
                format!("[control]\nmode = \"0660\"\n{SHOP}"),
                vec!["control: owner, mode and readers of the control socket are set".to_owned()],
            ),
        ] {
            assert_eq!(lines(SHOP, &new), expected, "{new}");
        }
    }

    #[test]
    fn nothing_is_to_be_done_where_nothing_differs() {
        assert!(Changes::between(&config(SHOP), &config(SHOP), &Running::AS_CONFIGURED).is_empty());
        assert!(!Changes::between(&config(SHOP), &config(WEB), &Running::AS_CONFIGURED).is_empty());
    }

    #[test]
    fn who_runs_as_configured_before_is_replaced_if_he_goes_on() {
        let outdated = vec!["shop/2".to_owned(), "shop/3".to_owned()];
        let running = Running { outdated, ..Running::AS_CONFIGURED };
        for (new, expected) in [
            (
                SHOP.to_owned(),
                vec![
                    "servers shop/2, shop/3: replaced by a new instance (it runs as it was \
                                    configured before)",
                ],
            ),
            (
                format!("{SHOP}weight = 50\n"),
                vec![
                    "servers shop/1, shop/2, shop/3: weight 100 -> 50",
                    "servers shop/2, shop/3: replaced by a new instance (it runs as it was configured before)",
                ],
            ),
            (
                SHOP.replace("count = 3", "count = 2"),
                vec![
                    "server shop/2: replaced by a new instance (it runs as it was configured before)",
                    "server shop/3: drained, stopped and removed",
                ],
            ),
            (
                WEB.to_owned(),
                vec!["service shop: drained, stopped and removed", "service web: added, with 1 server"],
            ),
        ] {
            let changes = Changes::between(&config(SHOP), &config(&new), &running);
            assert_eq!(changes.lines(), expected, "{new}");
        }
    }

    #[test]
    fn who_runs_as_configured_now_goes_on() {
        let old = SHOP.replace("count = 3", "count = 3\numask = \"0027\"");
        let runs_as = |_: &Service, server: &Server| server.name != "shop/2";
        let running = Running { runs_as: &runs_as, ..Running::AS_CONFIGURED };
        let changes = Changes::between(&config(&old), &config(SHOP), &running);
        assert_eq!(
            changes.lines(),
            [
                "servers shop/1, shop/3: not replaced, because what runs is like that already",
                "server shop/2: replaced by a new instance (umask changed)",
            ]
        );
        assert!(Changes::between(&config(SHOP), &config(SHOP), &running).is_empty());
    }

    #[test]
    fn what_is_set_is_said_as_it_is_written() {
        let with = |line: &str| format!("{SHOP}{line}\n");
        for (old, new, expected) in [
            ("cpus = \"0\"", "cpus = \"spread:nodes\"", "cpus 0 -> spread:nodes"),
            ("memory_limit = \"512MiB\"", "memory_limit = \"2GiB\"", "memory_limit 512.0 MiB -> 2.0 GiB"),
            ("jitter = \"2.5%\"", "jitter = \"20%\"", "jitter 2.5% -> 20%"),
            ("max_age = \"90m\"", "max_connections = 7", "max_age 1h30m -> none, max_connections none -> 7"),
        ] {
            let lines: Vec<String> = lines(&with(old), &with(new))
                .iter()
                .map(|line| line.trim_start_matches("servers shop/1, shop/2, shop/3: ").to_owned())
                .collect();
            assert_eq!(lines.join(", "), expected);
        }
        let replying = |text: &str| {
            SHOP.replace(
                "[service.shop.server]",
                &format!("waiting = {{ reply = \"{text}\" }}\n[service.shop.server]"),
            )
        };
        assert_eq!(
            lines(&replying("ab"), &replying("cd")),
            ["service shop: waiting.reply 2 bytes -> 2 bytes, which differ"]
        );
    }

    #[test]
    fn what_is_stopped_comes_before_what_is_begun() {
        // It may have the address.
        let moved = WEB.replace("8081", "8080");
        let changes = Changes::between(&config(SHOP), &config(&moved), &Running::AS_CONFIGURED);
        assert!(
            matches!(changes.services[..], [ServiceChange::Remove(_), ServiceChange::Add(_)]),
            "{changes:?}"
        );
    }

    #[test]
    fn what_is_added_comes_before_what_is_removed() {
        let other = SHOP.replace("count = 3", "count = 1") + "[[service.shop.servers]]\nname = \"big\"\n";
        let changes = Changes::between(&config(SHOP), &config(&other), &Running::AS_CONFIGURED);
        let [ServiceChange::Update(update)] = &changes.services[..] else { panic!("{changes:?}") };
        let names: Vec<&str> = update.servers.iter().map(ServerChange::name).collect();
        assert_eq!(names, ["shop/big", "shop/2", "shop/3"]);
    }
}
