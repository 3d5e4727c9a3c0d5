//! From the configuration as written to the configuration as meant.
//!
//! Takes what was given and the machine, and gives the [`Config`]. A value that is refused is
//! noted and replaced by any valid one, so that the rest is checked as well; the caller
//! throws the result away when there is a problem.
#![forbid(unsafe_code)]

mod check;
mod limits;

use std::{
    fs::{self, File},
    io::{self, Read as _},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use distributor_ebpf::contract::{CAPACITY_MAX, GROUPS, LIMIT_MAX, SLOTS, WEIGHT_MAX};
use rustix::process::{Resource, Signal};

use super::{
    Config, Control, Cpus, Machine, Occupied, Output, Policy, Problems, Readiness, Restart, Server, Service,
    SocketMode, User, Waiting, cpus, duration,
    environment::{self, Facts},
    expand::{Names, expand},
    is_name,
    nearest::nearest,
    size, user,
    written::{self, Field, Given, List, Place, Written},
};
use crate::{
    address::{ListenAddress, divide_families},
    lifetime::{self, Lifetime},
    load::{Rule, Source},
    roll::Bounds,
    scale::Scale,
};

const WEIGHT: u32 = 100;
/// What most programs ask for by themselves, or more. The kernel caps it at
/// net.core.somaxconn, which is 4096 by default.
const BACKLOG: u32 = 4096;
const UMASK: u32 = 0o022;
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Java servers with much to load need most of it.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
const RESTART_DELAY: Duration = Duration::from_millis(100);
const RESTART_MAX_DELAY: Duration = Duration::from_secs(30);
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
const GIVE_UP_AFTER: u32 = 10;
const CAPACITY: u32 = 1024;
/// One more for a while costs memory, and one fewer costs clients.
const MAX_SURGE: u32 = 1;
const MAX_UNAVAILABLE: u32 = 0;
/// By then people have gone, and a program had better be told to try again.
const WAITING_TIMEOUT: Duration = Duration::from_secs(30);

/// Most of the places are taken: more servers are wanted...
const UP_AT: u32 = 80;
/// ...soon, as somebody will have to wait...
const UP_AFTER: Duration = Duration::from_secs(2);
/// ...and fewer when less than half of the others' would be...
const DOWN_AT: u32 = 40;
/// ...later, as a server costs more to start than to keep for a while.
const DOWN_AFTER: Duration = Duration::from_secs(300);
/// Percent of a part in a second, for each tenth of load: from all to half in some ten seconds where there
/// is four times as much to do as elsewhere.
const STRENGTH: u32 = 3;
/// A server ten times slower than the others can have just what it can serve.
const FLOOR: u32 = 10;

/// A server that dies at once is started a hundred times a second at most.
const SHORTEST_DELAY: Duration = Duration::from_millis(10);
const INSTANT: Duration = Duration::from_millis(1);
/// Who wants less than this wants nobody to wait, which a capacity of 0 says.
const SHORTEST_WAIT: Duration = Duration::from_millis(10);
/// It has to become ready in it.
const SHORTEST_LIFE: Duration = Duration::from_secs(1);
/// In thousandths.
const JITTER: u32 = 100;
/// A server that is busy for a moment is not to be taken for one that hangs.
const SHORTEST_WATCHDOG: Duration = Duration::from_millis(100);
/// More than a page that says "come back later" needs. It is sent to up to `CAPACITY_MAX`
/// clients at once, and lies in the kernel's memory until they have taken it.
const REPLY_BYTES: usize = 65_536;

/// The signals a program may take as a request to stop.
const SIGNALS: [(&str, Signal); 9] = [
    ("TERM", Signal::TERM),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("HUP", Signal::HUP),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
    ("WINCH", Signal::WINCH),
    ("ABRT", Signal::ABORT),
    ("KILL", Signal::KILL),
];

/// The name of one of them.
pub(crate) fn signal_name(signal: Signal) -> &'static str {
    SIGNALS.iter().find(|(_, known)| *known == signal).map_or("?", |(name, _)| name)
}

/// The resources of setrlimit(2).
const RESOURCES: [(&str, Resource); 16] = [
    ("as", Resource::As),
    ("core", Resource::Core),
    ("cpu", Resource::Cpu),
    ("data", Resource::Data),
    ("fsize", Resource::Fsize),
    ("locks", Resource::Locks),
    ("memlock", Resource::Memlock),
    ("msgqueue", Resource::Msgqueue),
    ("nice", Resource::Nice),
    ("nofile", Resource::Nofile),
    ("nproc", Resource::Nproc),
    ("rss", Resource::Rss),
    ("rtprio", Resource::Rtprio),
    ("rttime", Resource::Rttime),
    ("sigpending", Resource::Sigpending),
    ("stack", Resource::Stack),
];

/// Who of those that wait is served first.
#[derive(Clone, Copy)]
enum Order {
    /// Who came first.
    First,
}

/// The configuration that was meant, if no problem was added.
pub(super) fn config(written: &Written, machine: &Machine, problems: &Problems) -> Config {
    // With a problem already noted, the services are probably there, in other words.
    if written.services.is_empty() && problems.is_empty() {
        problems.add(
            &Place::default().child("service"),
            "there is none, write [service.NAME] with listen, and [service.NAME.server] with command",
        );
    }
    let reading = Reading { machine, problems };
    let mut taken = Vec::new();
    let services = written.services.iter().map(|service| reading.service(service, &mut taken)).collect();
    Config { control: reading.control(&written.control), services }
}

struct Reading<'r> {
    machine: &'r Machine,
    problems: &'r Problems,
}

/// A listening address that is in use, as typed and by which service.
struct Taken<'w> {
    address: ListenAddress,
    typed: &'w str,
    service: &'w str,
}

impl<'r> Reading<'r> {
    fn control(&self, written: &written::Control) -> Control {
        let readers = self.looked_up(&written.readers, user::gid);
        let owner = self.looked_up(&written.owner, user::uid).unwrap_or(0);
        let default = if readers.is_some() { 0o660 } else { 0o600 };
        let mode = self.octal(&written.mode, default);
        if let Some(given) = written.mode.given() {
            // Connecting to a socket takes the permission to write to it.
            let typed = &given.value;
            if mode & 0o600 != 0o600 {
                self.refuse(
                    &given.place,
                    format!("{typed:?} keeps its owner out, write \"0600\" or \"0660\""),
                );
            } else if readers.is_some() && mode & 0o020 == 0 {
                self.refuse(&given.place, format!("{typed:?} keeps the readers' group out, write \"0660\""));
            }
        }
        Control { owner, mode, readers }
    }

    fn service<'w>(&self, written: &'w written::Service, taken: &mut Vec<Taken<'w>>) -> Service {
        if !is_name(&written.name) {
            self.refuse(&written.place, not_a_name(&written.name));
        }
        let listen = self.listen(written, taken);
        let shared = &written.server;
        let socket = self.choice(&shared.socket, &SocketMode::ALL, SocketMode::name, SocketMode::Own);
        if let (SocketMode::Stdin, Some(given)) = (socket, shared.socket.given())
            && listen.len() > 1
        {
            let sentence = format!(
                "\"stdin\" hands over one listener, but {} addresses are listed, write \"systemd\" or list one",
                listen.len()
            );
            self.refuse(&given.place, sentence);
        }
        let user = self.user(shared);
        let policy = self.choice(&written.policy, &Policy::ALL, Policy::name, Policy::default());
        if policy == Policy::First
            && let Some(given) = shared.slow_start.given()
        {
            let sentence = format!(
                "{:?} stands beside policy \"first\", which goes by the order and not by weights, leave it out",
                given.value
            );
            self.refuse(&given.place, sentence);
        }
        let readiness =
            self.choice(&shared.readiness, &Readiness::ALL, Readiness::name, Readiness::Listening);
        let occupied = self.choice(&written.occupied, &Occupied::ALL, Occupied::name, Occupied::Refuse);
        let waiting = self.waiting(&written.waiting);
        let servers = self.servers(written, &listen, user.as_ref());
        if let (Readiness::Check, Some(given)) = (readiness, shared.readiness.given())
            && !written.check.is_given
        {
            let place = &written.check.place.field;
            self.refuse(
                &given.place,
                format!("\"check\" needs to know how to check, write [{place}] as well"),
            );
        }
        Service {
            name: written.name.clone(),
            policy,
            occupied,
            waiting,
            scale: written.scale.as_ref().and_then(|scale| self.scale(scale, written)),
            roll: self.roll(&written.roll),
            limits: self.service_limits(&written.limits, &written.waiting),
            load: self.load(&written.load, policy),
            socket,
            readiness,
            backlog: self.number(&shared.backlog, 1..=65_535, BACKLOG),
            servers,
            listen,
            user,
        }
    }

    fn listen<'w>(&self, written: &'w written::Service, taken: &mut Vec<Taken<'w>>) -> Vec<ListenAddress> {
        let list = match &written.listen {
            Field::Refused => return Vec::new(),
            Field::Absent => {
                self.refuse(
                    &written.place.child("listen"),
                    "is missing, write the addresses clients connect to: listen = [\"[::]:8080\"]",
                );
                return Vec::new();
            }
            Field::Given(list) => list,
        };
        match list.value.len() {
            0 => self.refuse(&list.place, "[] lists no address, write one: listen = [\"[::]:8080\"]"),
            count if count > GROUPS => {
                self.refuse(&list.place, format!("{count} addresses are too many, write {GROUPS} at most"))
            }
            _ => {}
        }
        let mut typed: Vec<&Given<String>> = Vec::new();
        let mut addresses: Vec<ListenAddress> = Vec::new();
        for given in &list.value {
            match given.value.parse() {
                Ok(address) => {
                    typed.push(given);
                    addresses.push(address);
                }
                Err(sentence) => self.refuse(&given.place, sentence),
            }
        }
        // Before they are compared: it decides whether the two wildcards overlap.
        divide_families(&mut addresses);
        for (given, address) in typed.into_iter().zip(&addresses) {
            let other =
                taken.iter().find(|other| address.covers(&other.address) || other.address.covers(address));
            if let Some(other) = other {
                self.refuse(&given.place, overlap(&given.value, &written.name, other));
            }
            taken.push(Taken { address: *address, typed: &given.value, service: &written.name });
        }
        addresses
    }

    fn waiting(&self, written: &written::Waiting) -> Waiting {
        // The only one there is: another word is refused, and nothing has to be remembered.
        let Order::First = self.choice(&written.order, &Order::ALL, Order::name, Order::First);
        Waiting {
            capacity: self.number(&written.capacity, 0..=CAPACITY_MAX, CAPACITY),
            timeout: self.duration(&written.timeout, SHORTEST_WAIT, WAITING_TIMEOUT),
            reply: self.reply(written).into(),
        }
    }

    fn scale(&self, scale: &written::Scale, service: &written::Service) -> Option<Scale> {
        let most = u32::try_from(SLOTS).expect("the contract has few slots");
        let bound = |field: &Field<i64>, name: &str, least| {
            if let Field::Absent = field {
                let example = if name == "min" { 1 } else { 4 };
                let sentence =
                    format!("is missing, write how many servers there are to be: {name} = {example}");
                self.refuse(&scale.place.child(name), sentence);
            }
            self.number(field, least..=most, least) as usize
        };
        let (min, max) = (bound(&scale.min, "min", 1), bound(&scale.max, "max", 1));
        let up_at = self.number(&scale.up_at, 1..=100, UP_AT);
        let down_at = self.number(&scale.down_at, 0..=99, DOWN_AT.min(up_at / 2));
        if let Some(given) = scale.max.given()
            && max < min
        {
            self.refuse(&given.place, format!("{max} is less than min, write {min} or more"));
        }
        if let Some(given) = scale.down_at.given()
            && down_at >= up_at
        {
            let sentence = format!("{down_at} is not below up_at ({up_at}), write for example {}", up_at / 2);
            self.refuse(&given.place, sentence);
        }
        let shared = &service.server;
        if let Some(given) = shared.count.given()
            && let Ok(count) = usize::try_from(given.value)
            && !(min..=max).contains(&count)
            && min <= max
        {
            let sentence =
                format!("{count} is not between the service's scale.min and scale.max, write {min} to {max}");
            self.refuse(&given.place, sentence);
        }
        if let Field::Absent = shared.particulars.limit {
            let sentence = "stands without a limit for its servers, by which places are counted, write limit in \
                            [service.NAME.server]";
            self.refuse(&scale.place, sentence.replace("NAME", &service.name));
        }
        Some(Scale {
            min,
            max,
            up_at,
            up_after: self.duration(&scale.up_after, Duration::ZERO, UP_AFTER),
            down_at,
            down_after: self.duration(&scale.down_after, Duration::ZERO, DOWN_AFTER),
        })
    }

    fn roll(&self, written: &written::Roll) -> Bounds {
        let most = u32::try_from(SLOTS).expect("the contract has few slots");
        let bounds = Bounds {
            max_surge: self.number(&written.max_surge, 0..=most, MAX_SURGE),
            max_unavailable: self.number(&written.max_unavailable, 0..=most, MAX_UNAVAILABLE),
        };
        if (bounds.max_surge, bounds.max_unavailable) == (0, 0) {
            let given = written.max_surge.given().map(|given| &given.place);
            let sentence = "0 leaves nothing that may be restarted, because max_unavailable is 0 too, write 1 or \
                            more for one of them";
            self.refuse(given.unwrap_or(&written.place), sentence);
        }
        bounds
    }

    fn load(&self, written: &written::Load, policy: Policy) -> Option<Rule> {
        let place = written.place.as_ref()?;
        if policy == Policy::First {
            let sentence =
                "stands beside policy \"first\", which goes by the order and not by weights, leave it out";
            self.refuse(place, sentence);
        }
        let example = "sources = [\"reported\", \"accept-queue\"]";
        let sources = match &written.sources {
            Field::Refused => Vec::new(),
            Field::Absent => {
                let sentence = format!("is missing, write what tells a server's load: {example}");
                self.refuse(&place.child("sources"), sentence);
                Vec::new()
            }
            Field::Given(list) => {
                if list.value.is_empty() {
                    self.refuse(&list.place, format!("[] names no source, write for example {example}"));
                }
                self.sources(&list.value)
            }
        };
        Some(Rule {
            sources,
            strength: self.number(&written.strength, 1..=10, STRENGTH),
            floor: self.number(&written.floor, 1..=100, FLOOR),
        })
    }

    fn sources(&self, list: &[Given<String>]) -> Vec<Source> {
        let mut sources = Vec::new();
        for given in list {
            match Source::ALL.iter().find(|source| source.name() == given.value) {
                Some(source) if sources.contains(source) => {
                    self.refuse(&given.place, format!("{:?} is listed twice, write it once", given.value));
                }
                Some(source) => sources.push(*source),
                None => self.refuse(&given.place, unknown(&given.value, Source::ALL.map(Source::name))),
            }
        }
        sources
    }

    fn reply(&self, written: &written::Waiting) -> Vec<u8> {
        let (place, reply) = match (written.reply.given(), written.reply_file.given()) {
            (None, None) => return Vec::new(),
            // One of them will be deleted, so nothing else is said of either.
            (Some(_), Some(file)) => {
                let sentence =
                    format!("{:?} stands beside reply, write only one of reply and reply_file", file.value);
                self.refuse(&file.place, sentence);
                return Vec::new();
            }
            (Some(text), None) => (&text.place, reply_text(&text.value)),
            (None, Some(file)) => (&file.place, reply_file(&file.value)),
        };
        reply.unwrap_or_else(|sentence| {
            self.refuse(place, sentence);
            Vec::new()
        })
    }

    fn user(&self, shared: &written::Shared) -> Option<User> {
        let gid = self.looked_up(&shared.group, user::gid);
        if let (Field::Absent, Some(group)) = (&shared.user, shared.group.given()) {
            let sentence = format!("{:?} is set without a user, write user as well", group.value);
            self.refuse(&group.place, sentence);
        }
        self.looked_up(&shared.user, |text| user::user(text, gid))
    }

    fn servers(
        &self,
        written: &written::Service,
        listen: &[ListenAddress],
        user: Option<&User>,
    ) -> Vec<Server> {
        let shared = &written.server;
        let named = &written.servers;
        let count = self.count(written);
        let common = Common {
            service: &written.name,
            listen: &listen.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            user,
            shared,
            limits: self.limits(&shared.limits),
            umask: self.octal(&shared.umask, UMASK),
            stop_signal: self.signal(&shared.stop_signal),
            stop_timeout: self.duration(&shared.stop_timeout, Duration::ZERO, STOP_TIMEOUT),
            start_timeout: self.duration(&shared.start_timeout, INSTANT, START_TIMEOUT),
            drain_timeout: self.duration(&shared.drain_timeout, Duration::ZERO, DRAIN_TIMEOUT),
            slow_start: self.duration(&shared.slow_start, Duration::ZERO, Duration::ZERO),
            jitter: self.jitter(&shared.jitter),
            restart: self.restart(&shared.restart),
            check: &written.check,
        };
        let none = (written::Particulars::default(), written::Check::default());
        let numbered =
            (1..=count).map(|index| self.server(&common, index.to_string(), index, (&none.0, &none.1)));
        let mut servers: Vec<Server> = numbered.collect();
        for (at, named) in named.iter().enumerate() {
            let name = self.server_name(named, &written.servers[..at]);
            let own = (&named.particulars, &named.check);
            servers.push(self.server(&common, name, count + at + 1, own));
        }
        servers
    }

    /// How many numbered servers there are.
    fn count(&self, written: &written::Service) -> usize {
        let named = written.servers.len();
        let most = u32::try_from(SLOTS).expect("the contract has few slots");
        let field = &written.server.count;
        let least = written.scale.as_ref().and_then(|scale| u32::try_from(scale.min.given()?.value).ok());
        let default = least.filter(|least| *least <= most).unwrap_or(u32::from(named == 0));
        let count = self.number(field, 0..=most, default) as usize;
        match (field.given(), count + named) {
            (Some(given), 0) => {
                let sentence = "0 leaves no server to run, write 1 or more, or name some servers";
                self.refuse(&given.place, sentence);
                // One, so that what it would have been is checked as well.
                return 1;
            }
            (_, all) if all <= SLOTS => {}
            (Some(given), all) => {
                let sentence = format!(
                    "{count} numbered and {named} named servers are {all}, write {SLOTS} at most in all"
                );
                self.refuse(&given.place, sentence);
            }
            (None, _) => {
                let place = written.place.child("servers");
                let sentence = format!("{named} named servers are too many, write {SLOTS} at most");
                self.refuse(&place, sentence);
            }
        }
        count
    }

    fn server_name(&self, named: &written::Named, before: &[written::Named]) -> String {
        let given = match &named.name {
            Field::Refused => return String::new(),
            Field::Absent => {
                self.refuse(
                    &named.place.child("name"),
                    "is missing, write what this server is called: name = \"big\"",
                );
                return String::new();
            }
            Field::Given(given) => given,
        };
        let name = &given.value;
        let is_taken = before.iter().filter_map(|other| other.name.given()).any(|other| other.value == *name);
        if !is_name(name) {
            self.refuse(&given.place, not_a_name(name));
        } else if name.bytes().all(|byte| byte.is_ascii_digit()) {
            let sentence = format!(
                "{name:?} is a number, as the servers without a name have, write for example \"server-{name}\""
            );
            self.refuse(&given.place, sentence);
        } else if is_taken {
            self.refuse(&given.place, format!("{name:?} is the name of two servers, write another"));
        }
        name.clone()
    }

    fn server(
        &self,
        common: &Common<'_>,
        short_name: String,
        index: usize,
        (own, own_check): (&written::Particulars, &written::Check),
    ) -> Server {
        let shared = &common.shared.particulars;
        let names = Names { service: common.service, name: &short_name, index };
        let name = format!("{}/{short_name}", common.service);
        let output = self.output(own.output.or(&shared.output), &names, Output::Inherit);
        let directory = own.directory.or(&shared.directory).given();
        let lists = [&shared.environment, &own.environment];
        let own_environment: Vec<_> =
            lists.into_iter().flat_map(|list| self.variables(list, &names)).collect();
        Server {
            command: self.command(own.command.or(&shared.command), &common.shared.place, &names),
            environment: environment::environment(
                self.machine.environment.iter().cloned(),
                common.user,
                own_environment.iter().cloned(),
                &Facts { service: common.service, server: &name, index, listen: common.listen },
            ),
            own_environment,
            directory: directory.map(|given| self.absolute(given, &names, "write")),
            weight: self.number(own.weight.or(&shared.weight), 1..=WEIGHT_MAX, WEIGHT),
            limit: self.limit(own.limit.or(&shared.limit)),
            cpus: self.cpus(own.cpus.or(&shared.cpus)),
            limits: common.limits.clone(),
            umask: common.umask,
            errors: self.output(own.errors.or(&shared.errors), &names, output.clone()),
            output,
            stop_signal: common.stop_signal,
            stop_timeout: common.stop_timeout,
            start_timeout: common.start_timeout,
            drain_timeout: common.drain_timeout,
            backup: own.backup.or(&shared.backup).given().is_some_and(|backup| backup.value),
            slow_start: common.slow_start,
            watchdog: self.watchdog(own.watchdog.or(&shared.watchdog)),
            check: self.check(own_check, common.check, &names),
            stall: self.stall(own, shared),
            lifetime: Lifetime {
                max_age: self.bound(own.max_age.or(&shared.max_age)),
                max_connections: self.most(own.max_connections.or(&shared.max_connections)),
                memory_limit: self.size(own.memory_limit.or(&shared.memory_limit)),
                jitter: common.jitter,
            },
            restart: common.restart,
            index,
            name,
            short_name,
        }
    }

    fn command(&self, list: &List<String>, server: &Place, names: &Names<'_>) -> Vec<String> {
        let example = "[\"/usr/bin/program\", \"argument\"]";
        let list = match list {
            Field::Refused => return Vec::new(),
            Field::Absent => {
                let sentence =
                    format!("is missing, write the program and its arguments: command = {example}");
                self.refuse(&server.child("command"), sentence);
                return Vec::new();
            }
            Field::Given(list) => list,
        };
        if list.value.first().is_none_or(|program| program.value.is_empty()) {
            let sentence = format!("names no program, write for example {example}");
            self.refuse(&list.place, sentence);
        }
        let words = list.value.iter().map(|word| self.expanded(&word.place, &word.value, names));
        words.collect()
    }

    fn variables(&self, list: &List<(String, String)>, names: &Names<'_>) -> Vec<(String, String)> {
        let Some(list) = list.given() else {
            return Vec::new();
        };
        let mut variables = Vec::new();
        for Given { place, value: (name, value) } in &list.value {
            match environment::refusal(name) {
                Some(sentence) => self.refuse(place, sentence),
                None => variables.push((name.clone(), self.expanded(place, value, names))),
            }
        }
        variables
    }

    fn output(&self, field: &Field<String>, names: &Names<'_>, default: Output) -> Output {
        match field.given() {
            None => default,
            Some(given) if given.value == "inherit" => Output::Inherit,
            Some(given) => Output::File(self.absolute(given, names, "write \"inherit\" or")),
        }
    }

    fn absolute(&self, given: &Given<String>, names: &Names<'_>, write: &str) -> PathBuf {
        let path = PathBuf::from(self.expanded(&given.place, &given.value, names));
        if !path.is_absolute() {
            self.refuse(&given.place, not_absolute(&given.value, write));
        }
        path
    }

    fn expanded(&self, place: &Place, text: &str, names: &Names<'_>) -> String {
        if text.contains('\0') {
            let sentence = format!("{text:?} contains a NUL character, write it without");
            self.refuse(place, sentence);
        }
        expand(text, names).unwrap_or_else(|sentence| {
            self.refuse(place, sentence);
            // Absolute, so that nothing else is said of it.
            "/".to_owned()
        })
    }

    fn limit(&self, field: &Field<i64>) -> Option<u32> {
        field.given()?;
        Some(self.number(field, 1..=LIMIT_MAX, LIMIT_MAX))
    }

    fn cpus(&self, field: &Field<String>) -> Cpus {
        let Some(given) = field.given() else {
            return Cpus::All;
        };
        let wanted = cpus::meant(&given.value).unwrap_or_else(|sentence| {
            self.refuse(&given.place, sentence);
            Cpus::All
        });
        let (kind, named, possible) = match &wanted {
            Cpus::List(cpus) => ("CPU", cpus, self.machine.cpus_possible.as_ref()),
            Cpus::Nodes(nodes) => ("NUMA node", nodes, Some(&self.machine.nodes_possible)),
            Cpus::All | Cpus::Spread(_) => return wanted,
        };
        if let Some(possible) = possible {
            let mut missing = named.clone();
            missing.retain(|number| !possible.contains(number));
            if !missing.is_empty() {
                let sentence = format!(
                    "{:?} names {kind} {}, which this machine does not have, write {kind}s of {:?}",
                    given.value,
                    cpus::write(&missing),
                    cpus::write(possible)
                );
                self.refuse(&given.place, sentence);
            }
        }
        wanted
    }

    fn limits(&self, list: &List<(String, String)>) -> Vec<(Resource, Option<u64>)> {
        let Some(list) = list.given() else {
            return Vec::new();
        };
        let mut limits = Vec::new();
        for Given { place, value: (name, value) } in &list.value {
            let resource = RESOURCES.iter().find(|(known, _)| known == name);
            if resource.is_none() {
                self.refuse(place, unknown(name, RESOURCES.map(|(known, _)| known)));
            }
            let limit = match value.as_str() {
                "unlimited" => Some(None),
                // The highest number is the kernel's own sign for unlimited.
                number => number.parse().ok().filter(|limit| *limit != u64::MAX).map(Some),
            };
            if limit.is_none() {
                self.refuse(place, format!("{value:?} is no limit, write a number or \"unlimited\""));
            }
            if let (Some((_, resource)), Some(limit)) = (resource, limit) {
                limits.push((*resource, limit));
            }
        }
        limits
    }

    fn restart(&self, written: &written::Restart) -> Restart {
        let delay = self.duration(&written.delay, SHORTEST_DELAY, RESTART_DELAY);
        let max_delay = self.duration(&written.max_delay, SHORTEST_DELAY, RESTART_MAX_DELAY);
        // The one that was written is the one to correct; the file may have only one of them.
        if delay > max_delay
            && let Some(given) = written.max_delay.given().or(written.delay.given())
        {
            let sentence = format!(
                "{:?} makes delay ({delay:?}) longer than max_delay ({max_delay:?}), write a delay of at most max_delay",
                given.value
            );
            self.refuse(&given.place, sentence);
        }
        let give_up_after = self.number(&written.give_up_after, 0..=1_000_000, GIVE_UP_AFTER);
        Restart {
            delay,
            max_delay,
            healthy_after: self.duration(&written.healthy_after, INSTANT, HEALTHY_AFTER),
            give_up_after: (give_up_after > 0).then_some(give_up_after),
        }
    }

    fn signal(&self, field: &Field<String>) -> Signal {
        let Some(given) = field.given() else {
            return Signal::TERM;
        };
        let name = given.value.strip_prefix("SIG").unwrap_or(&given.value);
        match SIGNALS.iter().find(|(known, _)| *known == name) {
            Some((_, signal)) => *signal,
            None => {
                self.refuse(&given.place, unknown(name, SIGNALS.map(|(known, _)| known)));
                Signal::TERM
            }
        }
    }

    fn number(&self, field: &Field<i64>, range: RangeInclusive<u32>, default: u32) -> u32 {
        let Some(given) = field.given() else {
            return default;
        };
        match u32::try_from(given.value) {
            Ok(number) if range.contains(&number) => number,
            _ => {
                let sentence = format!(
                    "{} is out of range, write a number from {} to {}",
                    given.value,
                    range.start(),
                    range.end()
                );
                self.refuse(&given.place, sentence);
                default
            }
        }
    }

    fn duration(&self, field: &Field<String>, least: Duration, default: Duration) -> Duration {
        let Some(given) = field.given() else {
            return default;
        };
        match duration::parse(&given.value) {
            Ok(duration) if duration >= least => duration,
            Ok(_) => {
                let sentence = format!("{:?} is too short, write at least \"{least:?}\"", given.value);
                self.refuse(&given.place, sentence);
                default
            }
            Err(sentence) => {
                self.refuse(&given.place, sentence);
                default
            }
        }
    }

    /// How old it may be. What was refused is none.
    fn bound(&self, field: &Field<String>) -> Option<Duration> {
        let age = self.duration(field, SHORTEST_LIFE, Duration::ZERO);
        (!age.is_zero()).then_some(age)
    }

    /// How many connections it may have in its life.
    fn most(&self, field: &Field<i64>) -> Option<u32> {
        field.given()?;
        Some(self.number(field, 1..=u32::MAX, u32::MAX))
    }

    /// Bytes.
    fn size(&self, field: &Field<String>) -> Option<u64> {
        self.looked_up(field, size::parse)
    }

    /// Thousandths.
    fn jitter(&self, field: &Field<String>) -> u32 {
        self.looked_up(field, fraction).unwrap_or(JITTER)
    }

    /// How often it says that it is well. What was refused is none.
    fn watchdog(&self, field: &Field<String>) -> Option<Duration> {
        let interval = self.duration(field, SHORTEST_WATCHDOG, Duration::ZERO);
        (!interval.is_zero()).then_some(interval)
    }

    fn octal(&self, field: &Field<String>, default: u32) -> u32 {
        let Some(given) = field.given() else {
            return default;
        };
        let digits = given.value.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(&given.value, 8) {
            Ok(mode) if digits && mode <= 0o777 => mode,
            _ => {
                let sentence = format!(
                    "{:?} is no file mode, write octal digits from \"0000\" to \"0777\"",
                    given.value
                );
                self.refuse(&given.place, sentence);
                default
            }
        }
    }

    fn choice<T: Copy>(
        &self,
        field: &Field<String>,
        all: &[T],
        name: fn(T) -> &'static str,
        default: T,
    ) -> T {
        let Some(given) = field.given() else {
            return default;
        };
        let chosen = all.iter().find(|choice| name(**choice) == given.value);
        chosen.copied().unwrap_or_else(|| {
            let names = all.iter().map(|choice| name(*choice));
            self.refuse(&given.place, unknown(&given.value, names));
            default
        })
    }

    fn looked_up<T>(
        &self,
        field: &Field<String>,
        look_up: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let given = field.given()?;
        look_up(&given.value).map_err(|sentence| self.refuse(&given.place, sentence)).ok()
    }

    fn refuse(&self, place: &Place, sentence: impl AsRef<str>) {
        self.problems.add(place, sentence.as_ref());
    }
}

impl Order {
    /// Every order.
    const ALL: [Self; 1] = [Self::First];

    /// The name an operator writes.
    const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
        }
    }
}

/// What all servers of a service have in common.
struct Common<'a> {
    service: &'a str,
    listen: &'a str,
    user: Option<&'a User>,
    shared: &'a written::Shared,
    limits: Vec<(Resource, Option<u64>)>,
    umask: u32,
    stop_signal: Signal,
    stop_timeout: Duration,
    start_timeout: Duration,
    drain_timeout: Duration,
    slow_start: Duration,
    jitter: u32,
    restart: Restart,
    check: &'a written::Check,
}

fn overlap(typed: &str, service: &str, other: &Taken<'_>) -> String {
    let other_typed = other.typed;
    if other.service != service {
        let other_service = other.service;
        format!(
            "{typed:?} has clients in common with {other_typed:?} of service {other_service}, write another address or port"
        )
    } else if typed == other_typed {
        format!("{typed:?} is listed twice, write it once")
    } else {
        format!("{typed:?} has clients in common with {other_typed:?}, write only one of them")
    }
}

fn unknown(typed: &str, known: impl IntoIterator<Item = &'static str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    match (nearest(typed, known.iter().copied()), known.as_slice()) {
        (Some(nearest), _) => format!("{typed:?} is unknown, did you mean {nearest:?}?"),
        (None, [only]) => format!("{typed:?} is unknown, write {only:?}"),
        (None, _) => {
            let known: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
            format!("{typed:?} is unknown, write one of {}", known.join(", "))
        }
    }
}

/// A fraction in thousandths, written as percents or a number, or a sentence.
fn fraction(text: &str) -> Result<u32, String> {
    let (number, whole) = match text.strip_suffix('%') {
        Some(percents) => (percents.trim_end(), 100.0),
        None => (text, 1.0),
    };
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    match number.parse::<f64>() {
        Ok(number) if plain && number <= whole => {
            Ok((number / whole * f64::from(lifetime::WHOLE)).round() as u32)
        }
        _ => Err(format!("{text:?} is no fraction, write for example \"10%\", at most \"100%\"")),
    }
}

/// The reply that was written, or a sentence.
fn reply_text(text: &str) -> Result<Vec<u8>, String> {
    match text.len() {
        0 => {
            Err("is empty, write what a client is to be told, or leave it out to reset the connection"
                .to_owned())
        }
        length if length > REPLY_BYTES => {
            Err(format!("has {length} bytes, which is too long, write {REPLY_BYTES} at most"))
        }
        _ => Ok(text.into()),
    }
}

/// The reply that lies in this file, or a sentence.
fn reply_file(path: &str) -> Result<Vec<u8>, String> {
    if !Path::new(path).is_absolute() {
        return Err(not_absolute(path, "write"));
    }
    let unreadable = |error: io::Error| {
        format!("{path:?} cannot be read: {error}; write the path of a file that holds the reply")
    };
    // Before it is opened: a pipe would be waited for, and some devices never end.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(format!("{path:?} is no regular file, write the path of one that holds the reply"));
    }
    let mut reply = Vec::new();
    let one_too_many = REPLY_BYTES as u64 + 1;
    File::open(path).and_then(|file| file.take(one_too_many).read_to_end(&mut reply)).map_err(unreadable)?;
    match reply.len() {
        0 => Err(format!(
            "{path:?} is empty, fill it with what a client is to be told, or leave it out to reset the connection"
        )),
        length if length > REPLY_BYTES => {
            Err(format!("{path:?} is too long, write the path of a file with {REPLY_BYTES} bytes at most"))
        }
        _ => Ok(reply),
    }
}

fn not_absolute(typed: &str, write: &str) -> String {
    format!("{typed:?} is not an absolute path, {write} one that begins with /")
}

fn not_a_name(typed: &str) -> String {
    format!("{typed:?} is no name, write 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or a digit")
}
