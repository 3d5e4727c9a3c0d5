//! The configuration as it was written: what was given, and where.
//!
//! Takes TOML or the command-line form, gives the same [`Written`] for both. Checks the shape
//! only: known fields, and text where text belongs. What the text means is `meant`'s job.
//! Not derived with serde: serde stops at the first problem and forgets where values stood,
//! and an operator wants all problems at once, with their lines.
#![forbid(unsafe_code)]

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{CommandForm, Counts, Problems, nearest::nearest};

/// Where something was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// `service.shop.server.count`, or `--servers`.
    pub(super) field: String,
    /// Its line in the file, from 1.
    pub(super) line: Option<usize>,
}

/// A value and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given<T> {
    pub(super) place: Place,
    pub(super) value: T,
}

/// A field that may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Field<T> {
    #[default]
    Absent,
    /// It is there, but of another kind; the problem is already noted.
    Refused,
    Given(Given<T>),
}

/// A list, each of whose elements has its own line.
pub(super) type List<T> = Field<Vec<Given<T>>>;

/// The whole file.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) control: Control,
    pub(super) services: Vec<Service>,
}

/// `[control]`
#[derive(Debug, Default)]
pub(super) struct Control {
    pub(super) owner: Field<String>,
    pub(super) mode: Field<String>,
    pub(super) readers: Field<String>,
}

/// `[service.NAME]`
#[derive(Debug, Default)]
pub(super) struct Service {
    /// Where the service begins.
    pub(super) place: Place,
    pub(super) name: String,
    pub(super) listen: List<String>,
    pub(super) policy: Field<String>,
    pub(super) occupied: Field<String>,
    pub(super) waiting: Waiting,
    pub(super) scale: Option<Scale>,
    pub(super) check: Check,
    pub(super) roll: Roll,
    pub(super) limits: Limits,
    pub(super) load: Load,
    pub(super) server: Shared,
    pub(super) servers: Vec<Named>,
}

/// `[service.NAME.waiting]`
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) capacity: Field<i64>,
    pub(super) timeout: Field<String>,
    pub(super) reply: Field<String>,
    pub(super) reply_file: Field<String>,
    pub(super) order: Field<String>,
}

/// `[service.NAME.scale]`
#[derive(Debug, Default)]
pub(super) struct Scale {
    pub(super) place: Place,
    pub(super) min: Field<i64>,
    pub(super) max: Field<i64>,
    pub(super) up_at: Field<i64>,
    pub(super) up_after: Field<String>,
    pub(super) down_at: Field<i64>,
    pub(super) down_after: Field<String>,
}

/// `[service.NAME.check]`, or a server's own.
#[derive(Debug, Default)]
pub(super) struct Check {
    pub(super) place: Place,
    /// There is such a table.
    pub(super) is_given: bool,
    /// `type`
    pub(super) kind: Field<String>,
    pub(super) path: Field<String>,
    pub(super) host: Field<String>,
    pub(super) status: List<String>,
    pub(super) command: List<String>,
    pub(super) interval: Field<String>,
    pub(super) fast_interval: Field<String>,
    pub(super) timeout: Field<String>,
    pub(super) rise: Field<i64>,
    pub(super) fall: Field<i64>,
    pub(super) restart_after: Field<String>,
}

/// `[service.NAME.roll]`
#[derive(Debug, Default)]
pub(super) struct Roll {
    pub(super) place: Place,
    pub(super) max_surge: Field<i64>,
    pub(super) max_unavailable: Field<i64>,
}

/// `[service.NAME.limits]`
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) service: Ceiling,
    pub(super) over: Field<String>,
    /// `[service.NAME.limits.per_source]`
    pub(super) source: Ceiling,
    pub(super) prefix_ipv4: Field<i64>,
    pub(super) prefix_ipv6: Field<i64>,
    pub(super) exempt: List<String>,
}

/// What the service may have, or each source.
#[derive(Debug, Default)]
pub(super) struct Ceiling {
    pub(super) connections: Field<i64>,
    pub(super) rate: Field<i64>,
    pub(super) burst: Field<i64>,
}

/// `[service.NAME.load]`
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Where it begins; `None`: it is not there.
    pub(super) place: Option<Place>,
    pub(super) sources: List<String>,
    pub(super) strength: Field<i64>,
    pub(super) floor: Field<i64>,
}

/// `[service.NAME.server]`: what all its servers share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) place: Place,
    pub(super) particulars: Particulars,
    pub(super) count: Field<i64>,
    pub(super) socket: Field<String>,
    pub(super) readiness: Field<String>,
    pub(super) user: Field<String>,
    pub(super) group: Field<String>,
    pub(super) umask: Field<String>,
    pub(super) stop_signal: Field<String>,
    pub(super) stop_timeout: Field<String>,
    pub(super) start_timeout: Field<String>,
    pub(super) drain_timeout: Field<String>,
    pub(super) slow_start: Field<String>,
    pub(super) jitter: Field<String>,
    pub(super) limits: List<(String, String)>,
    pub(super) backlog: Field<i64>,
    pub(super) restart: Restart,
}

/// `[[service.NAME.servers]]`: one that differs.
#[derive(Debug, Default)]
pub(super) struct Named {
    pub(super) place: Place,
    pub(super) name: Field<String>,
    pub(super) particulars: Particulars,
    pub(super) check: Check,
}

/// What may differ between the servers of a service.
#[derive(Debug, Default)]
pub(super) struct Particulars {
    pub(super) command: List<String>,
    pub(super) weight: Field<i64>,
    pub(super) limit: Field<i64>,
    pub(super) cpus: Field<String>,
    pub(super) watchdog: Field<String>,
    pub(super) stall_after: Field<String>,
    pub(super) move_queue: Field<bool>,
    pub(super) hang_kill: Field<String>,
    pub(super) max_age: Field<String>,
    pub(super) max_connections: Field<i64>,
    pub(super) memory_limit: Field<String>,
    pub(super) backup: Field<bool>,
    pub(super) environment: List<(String, String)>,
    pub(super) directory: Field<String>,
    pub(super) output: Field<String>,
    pub(super) errors: Field<String>,
}

/// `[service.NAME.server.restart]`
#[derive(Debug, Default)]
pub(super) struct Restart {
    pub(super) delay: Field<String>,
    pub(super) max_delay: Field<String>,
    pub(super) healthy_after: Field<String>,
    pub(super) give_up_after: Field<i64>,
}

impl Written {
    /// Other numbers of servers than were written.
    pub(super) fn set_counts(&mut self, counts: &Counts) {
        for service in &mut self.services {
            let Some(&count) = counts.get(&service.name) else { continue };
            // No line says it.
            let place = Place { line: None, ..service.server.place.child("count") };
            let value = i64::try_from(count).unwrap_or(i64::MAX);
            service.server.count = Field::Given(Given { place, value });
        }
    }
}

impl Place {
    /// The place of a field that was left out.
    pub(super) fn child(&self, name: &str) -> Self {
        let bare = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        let name = match !name.is_empty() && name.bytes().all(bare) {
            true => name.to_owned(),
            false => format!("{name:?}"),
        };
        Self {
            field: match self.field.is_empty() {
                true => name,
                false => format!("{}.{name}", self.field),
            },
            line: self.line,
        }
    }
}

impl<T> Field<T> {
    /// What was given.
    pub(super) fn given(&self) -> Option<&Given<T>> {
        match self {
            Self::Absent | Self::Refused => None,
            Self::Given(given) => Some(given),
        }
    }

    /// This field, or the one that stands in for it when it is left out.
    pub(super) fn or<'f>(&'f self, other: &'f Self) -> &'f Self {
        match self {
            Self::Absent => other,
            Self::Refused | Self::Given(_) => self,
        }
    }
}

/// Reads a file's text. `None`: it is not TOML.
pub(super) fn read(text: &str, problems: &Problems) -> Option<Written> {
    match DeTable::parse(text) {
        Ok(table) => Some(written(Section {
            place: Place::default(),
            entries: Some(table.get_ref()),
            known: Vec::new(),
            text,
            problems,
        })),
        Err(error) => {
            let place =
                Place { field: "not TOML".to_owned(), line: error.span().map(|span| line(text, span.start)) };
            // Octal numbers are the usual reason, of which TOML's own message says nothing.
            let why = match error.message().contains("leading zero") {
                true => "a number begins with 0, write modes and masks as text: \"0600\"",
                false => error.message(),
            };
            problems.add(&place, why);
            None
        }
    }
}

/// The command-line form as if it had been written in a file.
pub(super) fn from_command(form: &CommandForm) -> Written {
    let place = |option: &str| Place { field: option.to_owned(), line: None };
    let text = |option, value: &Option<String>| match value {
        None => Field::Absent,
        Some(value) => Field::Given(Given { place: place(option), value: value.clone() }),
    };
    let number = |option, value: Option<i64>| match value {
        None => Field::Absent,
        Some(value) => Field::Given(Given { place: place(option), value }),
    };
    let list = |option, values: &[String]| {
        let values = values.iter().map(|value| Given { place: place(option), value: value.clone() });
        Field::Given(Given { place: place(option), value: values.collect() })
    };
    Written {
        control: Control::default(),
        services: vec![Service {
            place: place("--name"),
            name: form.name.clone(),
            listen: list("--listen", &form.listen),
            policy: text("--policy", &form.policy),
            occupied: Field::Absent,
            roll: Roll::default(),
            waiting: Waiting { capacity: number("--waiting", form.waiting), ..Waiting::default() },
            scale: None,
            check: Check::default(),
            limits: Limits::default(),
            load: Load::default(),
            server: Shared {
                particulars: Particulars {
                    command: list("COMMAND", &form.command),
                    weight: number("--weight", form.weight),
                    limit: number("--limit", form.limit),
                    ..Particulars::default()
                },
                count: number("--servers", Some(form.servers)),
                socket: text("--socket", &form.socket),
                user: text("--user", &form.user),
                ..Shared::default()
            },
            servers: Vec::new(),
        }],
    }
}

fn written(mut root: Section<'_>) -> Written {
    let mut section = root.table("control");
    let control = Control {
        owner: section.text_or_number("owner", "\"root\""),
        mode: section.text("mode", "\"0600\""),
        readers: section.text_or_number("readers", "\"adm\""),
    };
    section.finish();
    let services = root.tables_by_name("service");
    root.finish();
    Written {
        control,
        services: services.into_iter().map(|(name, section)| service(name, section)).collect(),
    }
}

fn service(name: String, mut section: Section<'_>) -> Service {
    let listen = section.texts("listen", "[\"[::]:8080\"]");
    let policy = section.text("policy", "\"least-connections\"");
    let occupied = section.text("occupied", "\"refuse\"");
    let waiting_section = section.table("waiting");
    let waiting_place = waiting_section.place.field.clone();
    let (waiting, waiting_fields) = waiting(waiting_section);
    let scale_section = section.table("scale");
    let scale_place = scale_section.place.field.clone();
    let (scale, scale_fields) = scale(scale_section);
    let check_section = section.table("check");
    let check_place = check_section.place.field.clone();
    let (check, check_fields) = checking(check_section);
    let roll_section = section.table("roll");
    let roll_place = roll_section.place.field.clone();
    let (roll, roll_fields) = roll(roll_section);
    let limits = limits(section.table("limits"));
    let load_section = section.table("load");
    let load_place = load_section.place.field.clone();
    let (load, load_fields) = load(load_section);
    let mut shared_section = section.table("server");
    let server = shared(&mut shared_section);
    // First, because what is refused here is known from here on, and so belongs to nobody else.
    let tables = [
        (&waiting_fields, &waiting_place),
        (&scale_fields, &scale_place),
        (&roll_fields, &roll_place),
        (&load_fields, &load_place),
    ];
    for (fields, place) in tables {
        section.belongs_elsewhere(fields, place);
        shared_section.belongs_elsewhere(fields, place);
    }
    shared_section.belongs_elsewhere(&section.known, &section.place.field);
    shared_section.belongs_elsewhere(&check_fields, &check_place);
    let server_place = shared_section.place.field.clone();
    let server_fields = shared_section.finish();
    let servers = section
        .list_of_tables("servers")
        .into_iter()
        .map(|mut section| {
            let name = section.text("name", "\"big\"");
            if let Field::Given(name) = &name {
                section.rename(&name.value);
            }
            let (check, its_fields) = checking(section.table("check"));
            let its_check = section.place.child("check").field;
            let particulars = particulars(&mut section);
            let named = Named { place: section.place.clone(), name, particulars, check };
            for (fields, place) in tables {
                section.belongs_elsewhere(fields, place);
            }
            section.belongs_elsewhere(&server_fields, &server_place);
            section.belongs_elsewhere(&its_fields, &its_check);
            section.finish();
            named
        })
        .collect();
    section.belongs_elsewhere(&server_fields, &server_place);
    section.belongs_elsewhere(&check_fields, &check_place);
    let place = section.place.clone();
    let service = Service {
        place,
        name,
        listen,
        policy,
        occupied,
        waiting,
        limits,
        load,
        scale,
        check,
        roll,
        server,
        servers,
    };
    section.finish();
    service
}

fn waiting(mut section: Section<'_>) -> (Waiting, Vec<&'static str>) {
    let waiting = Waiting {
        capacity: section.number("capacity", "1024"),
        timeout: section.duration("timeout"),
        reply: section.text("reply", "\"HTTP/1.1 503 Service Unavailable\\r\\n\\r\\n\""),
        reply_file: section.text("reply_file", "\"/etc/dist-ctl/busy.http\""),
        order: section.text("order", "\"first\""),
    };
    (waiting, section.finish())
}

fn scale(mut section: Section<'_>) -> (Option<Scale>, Vec<&'static str>) {
    let is_there = section.entries.is_some();
    let scale = Scale {
        place: section.place.clone(),
        min: section.number("min", "2"),
        max: section.number("max", "8"),
        up_at: section.number("up_at", "80"),
        up_after: section.duration("up_after"),
        down_at: section.number("down_at", "40"),
        down_after: section.duration("down_after"),
    };
    (is_there.then_some(scale), section.finish())
}

fn checking(mut section: Section<'_>) -> (Check, Vec<&'static str>) {
    let check = Check {
        place: section.place.clone(),
        is_given: section.entries.is_some(),
        kind: section.text("type", "\"http\""),
        path: section.text("path", "\"/health\""),
        host: section.text("host", "\"shop.example\""),
        status: section.list("status", "[\"200-399\"]", text_or_number),
        command: section.texts("command", "[\"/usr/bin/program\", \"argument\"]"),
        interval: section.duration("interval"),
        fast_interval: section.duration("fast_interval"),
        timeout: section.duration("timeout"),
        rise: section.number("rise", "2"),
        fall: section.number("fall", "3"),
        restart_after: section.duration("restart_after"),
    };
    (check, section.finish())
}

fn roll(mut section: Section<'_>) -> (Roll, Vec<&'static str>) {
    let roll = Roll {
        place: section.place.clone(),
        max_surge: section.number("max_surge", "1"),
        max_unavailable: section.number("max_unavailable", "0"),
    };
    (roll, section.finish())
}

fn limits(mut section: Section<'_>) -> Limits {
    let mut per_source = section.table("per_source");
    let source_place = per_source.place.field.clone();
    let source = ceiling(&mut per_source);
    let prefix_ipv4 = per_source.number("prefix_ipv4", "32");
    let prefix_ipv6 = per_source.number("prefix_ipv6", "64");
    let exempt = per_source.texts("exempt", "[\"10.0.0.0/8\"]");
    let limits = Limits {
        service: ceiling(&mut section),
        over: section.text("over", "\"refuse\""),
        source,
        prefix_ipv4,
        prefix_ipv6,
        exempt,
    };
    per_source.belongs_elsewhere(&["over"], &section.place.field);
    section.belongs_elsewhere(&per_source.finish(), &source_place);
    section.finish();
    limits
}

fn ceiling(section: &mut Section<'_>) -> Ceiling {
    Ceiling {
        connections: section.number("connections", "1000"),
        rate: section.number("rate", "500"),
        burst: section.number("burst", "1000"),
    }
}

fn load(mut section: Section<'_>) -> (Load, Vec<&'static str>) {
    let load = Load {
        place: section.entries.is_some().then(|| section.place.clone()),
        sources: section.texts("sources", "[\"reported\", \"accept-queue\"]"),
        strength: section.number("strength", "3"),
        floor: section.number("floor", "10"),
    };
    (load, section.finish())
}

fn shared(section: &mut Section<'_>) -> Shared {
    let restart_section = section.table("restart");
    let restart_place = restart_section.place.field.clone();
    let (restart, restart_fields) = restart(restart_section);
    let shared = Shared {
        place: section.place.clone(),
        particulars: particulars(section),
        count: section.number("count", "4"),
        socket: section.text("socket", "\"own\""),
        readiness: section.text("readiness", "\"listening\""),
        user: section.text_or_number("user", "\"www-data\""),
        group: section.text_or_number("group", "\"www-data\""),
        umask: section.text("umask", "\"0022\""),
        stop_signal: section.text("stop_signal", "\"TERM\""),
        stop_timeout: section.duration("stop_timeout"),
        start_timeout: section.duration("start_timeout"),
        drain_timeout: section.duration("drain_timeout"),
        slow_start: section.duration("slow_start"),
        jitter: section.field("jitter", "a fraction", "\"10%\"", fraction),
        limits: section.pairs("limits", "\"unlimited\"", text_or_number),
        backlog: section.number("backlog", "4096"),
        restart,
    };
    section.belongs_elsewhere(&restart_fields, &restart_place);
    shared
}

fn particulars(section: &mut Section<'_>) -> Particulars {
    Particulars {
        command: section.texts("command", "[\"/usr/bin/program\", \"argument\"]"),
        weight: section.number("weight", "100"),
        limit: section.number("limit", "200"),
        cpus: section.text("cpus", "\"0-3\""),
        watchdog: section.duration("watchdog"),
        stall_after: section.duration("stall_after"),
        move_queue: section.field("move_queue", "true or false", "true", |value| value.as_bool()),
        hang_kill: section.duration("hang_kill"),
        max_age: section.duration("max_age"),
        max_connections: section.number("max_connections", "100000"),
        memory_limit: section.text_or_number("memory_limit", "\"2GiB\""),
        backup: section.field("backup", "true or false", "true", |value| value.as_bool()),
        environment: section.pairs("environment", "\"value\"", text),
        directory: section.text("directory", "\"/srv/{name}\""),
        output: section.text("output", "\"inherit\""),
        errors: section.text("errors", "\"inherit\""),
    }
}

fn restart(mut section: Section<'_>) -> (Restart, Vec<&'static str>) {
    let restart = Restart {
        delay: section.duration("delay"),
        max_delay: section.duration("max_delay"),
        healthy_after: section.duration("healthy_after"),
        give_up_after: section.number("give_up_after", "10"),
    };
    (restart, section.finish())
}

/// One table of the file. Knows the fields it was asked for, so that `finish` can refuse the
/// others.
struct Section<'t> {
    place: Place,
    /// `None`: the table is not there, and neither is any of its fields.
    entries: Option<&'t DeTable<'t>>,
    known: Vec<&'static str>,
    text: &'t str,
    problems: &'t Problems,
}

type Entry<'t> = (&'t str, Place, &'t Spanned<DeValue<'t>>);

impl<'t> Section<'t> {
    fn text(&mut self, name: &'static str, example: &str) -> Field<String> {
        self.field(name, "text", example, text)
    }

    fn text_or_number(&mut self, name: &'static str, example: &str) -> Field<String> {
        self.field(name, "text", example, text_or_number)
    }

    fn number(&mut self, name: &'static str, example: &str) -> Field<i64> {
        let Some((_, place, value)) = self.entry(name) else {
            return Field::Absent;
        };
        let Some(integer) = value.get_ref().as_integer() else {
            return self.refuse(&place, name, value, "a number", example);
        };
        match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(value) => Field::Given(Given { place, value }),
            Err(_) => {
                let sentence = format!("{integer} is out of range, write for example {example}");
                self.problems.add(&place, sentence);
                Field::Refused
            }
        }
    }

    fn duration(&mut self, name: &'static str) -> Field<String> {
        if let Some((_, place, value)) = self.entry(name)
            && let Some(integer) = value.get_ref().as_integer()
        {
            let sentence = format!("{integer} has no unit, write \"{integer}s\"");
            self.problems.add(&place, sentence);
            return Field::Refused;
        }
        self.text(name, "\"30s\"")
    }

    fn texts(&mut self, name: &'static str, example: &str) -> List<String> {
        self.list(name, example, text)
    }

    /// A list of what `read` takes for text.
    fn list(
        &mut self,
        name: &'static str,
        example: &str,
        read: fn(&DeValue<'_>) -> Option<String>,
    ) -> List<String> {
        if let Some((_, place, value)) = self.entry(name)
            && let Some(text) = value.get_ref().as_str()
        {
            let words: Vec<&str> = text.split_whitespace().collect();
            let sentence = format!("{text:?} is not a list, write {name} = {words:?}");
            self.problems.add(&place, sentence);
            return Field::Refused;
        }
        let Some((_, place, value)) = self.entry(name) else {
            return Field::Absent;
        };
        let Some(array) = value.get_ref().as_array() else {
            return self.refuse(&place, name, value, "a list of texts", example);
        };
        let mut values = Vec::new();
        let mut refused = false;
        for element in array {
            let place =
                Place { field: place.field.clone(), line: Some(line(self.text, element.span().start)) };
            match read(element.get_ref()) {
                Some(value) => values.push(Given { place, value }),
                None => {
                    let source = self.source(element);
                    let kind = kind(element.get_ref());
                    let sentence = match element.get_ref() {
                        DeValue::Array(_) | DeValue::Table(_) => {
                            format!("{source} is {kind}, write texts only: {name} = {example}")
                        }
                        _ => format!("{source} is {kind}, write it as text: \"{source}\""),
                    };
                    self.problems.add(&place, sentence);
                    refused = true;
                }
            }
        }
        match refused {
            true => Field::Refused,
            false => Field::Given(Given { place, value: values }),
        }
    }

    /// A table whose names are the user's.
    fn pairs(
        &mut self,
        name: &'static str,
        example: &str,
        read: fn(&DeValue<'_>) -> Option<String>,
    ) -> List<(String, String)> {
        let Some((_, place, value)) = self.entry(name) else {
            return Field::Absent;
        };
        let Some(table) = value.get_ref().as_table() else {
            let example = format!("{{ NAME = {example} }}");
            return self.refuse(&place, name, value, "a table", &example);
        };
        let mut pairs = Vec::new();
        let mut refused = false;
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let place = Place { line: Some(line(self.text, key.span().start)), ..place.child(name) };
            match read(value.get_ref()) {
                Some(value) => pairs.push(Given { place, value: (name.to_owned(), value) }),
                None => {
                    let example = match value.get_ref() {
                        DeValue::Array(_) | DeValue::Table(_) => example.to_owned(),
                        _ => format!("\"{}\"", self.source(value)),
                    };
                    let _: Field<()> = self.refuse(&place, name, value, "text", &example);
                    refused = true;
                }
            }
        }
        match refused {
            true => Field::Refused,
            false => Field::Given(Given { place, value: pairs }),
        }
    }

    /// A table of this name; an empty one if there is none.
    fn table(&mut self, name: &'static str) -> Self {
        let (place, entries) = match self.entry(name) {
            None => (self.place.child(name), None),
            Some((_, place, value)) => {
                let entries = value.get_ref().as_table();
                if entries.is_none() {
                    let header = format!("[{}]", place.field);
                    self.refuse_table(&place, value, &header);
                }
                (place, entries)
            }
        };
        self.section(place, entries)
    }

    /// The tables in `[name.X]`, with X.
    fn tables_by_name(&mut self, name: &'static str) -> Vec<(String, Self)> {
        let Some((_, place, value)) = self.entry(name) else {
            return Vec::new();
        };
        let Some(entries) = value.get_ref().as_table() else {
            let header = format!("[{}.NAME]", place.field);
            self.refuse_table(&place, value, &header);
            return Vec::new();
        };
        let section = self.section(place, Some(entries));
        let mut tables = Vec::new();
        for (name, place, value) in section.entries() {
            match value.get_ref().as_table() {
                Some(entries) => {
                    tables.push((name.to_owned(), section.section(place, Some(entries))));
                }
                None => {
                    let header = format!("[{}]", place.field);
                    section.refuse_table(&place, value, &header);
                }
            }
        }
        tables
    }

    /// The tables in `[[name]]`.
    fn list_of_tables(&mut self, name: &'static str) -> Vec<Self> {
        let Some((_, place, value)) = self.entry(name) else {
            return Vec::new();
        };
        let header = format!("[[{}]]", place.field);
        let Some(array) = value.get_ref().as_array() else {
            self.refuse_table(&place, value, &header);
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (index, element) in array.iter().enumerate() {
            let place = Place {
                field: format!("{}[{}]", place.field, index + 1),
                line: Some(line(self.text, element.span().start)),
            };
            match element.get_ref().as_table() {
                Some(entries) => sections.push(self.section(place, Some(entries))),
                None => self.refuse_table(&place, element, &header),
            }
        }
        sections
    }

    /// Calls `servers[1]` by its name, if that can stand in a path.
    fn rename(&mut self, name: &str) {
        if super::is_name(name)
            && let Some((list, _)) = self.place.field.rsplit_once('[')
        {
            self.place.field = format!("{list}.{name}");
        }
    }

    /// Refuses fields that are known, but to another table.
    fn belongs_elsewhere(&mut self, fields: &[&'static str], table: &str) {
        for (name, place, _) in self.entries() {
            if let Some(field) = fields.iter().find(|field| **field == name)
                && !self.known.contains(field)
            {
                self.problems.add(&place, format_args!("belongs in [{table}], write it there"));
                self.known.push(field);
            }
        }
    }

    /// Refuses fields that nothing asked for, and gives those that something did.
    fn finish(self) -> Vec<&'static str> {
        for (name, place, _) in self.entries() {
            if self.known.contains(&name) {
                continue;
            }
            let sentence = match nearest(name, self.known.iter().copied()) {
                Some(nearest) => format!("unknown field, did you mean {nearest:?}?"),
                None => format!("unknown field, write one of {}", self.known.join(", ")),
            };
            self.problems.add(&place, sentence);
        }
        self.known
    }

    fn field<T>(
        &mut self,
        name: &'static str,
        wanted: &str,
        example: &str,
        read: impl Fn(&DeValue<'_>) -> Option<T>,
    ) -> Field<T> {
        let Some((_, place, value)) = self.entry(name) else {
            return Field::Absent;
        };
        match read(value.get_ref()) {
            Some(value) => Field::Given(Given { place, value }),
            None => self.refuse(&place, name, value, wanted, example),
        }
    }

    fn entry(&mut self, name: &'static str) -> Option<Entry<'t>> {
        if !self.known.contains(&name) {
            self.known.push(name);
        }
        self.entries().into_iter().find(|(key, _, _)| *key == name)
    }

    fn entries(&self) -> Vec<Entry<'t>> {
        let place = |start, name| Place { line: Some(line(self.text, start)), ..self.place.child(name) };
        self.entries
            .into_iter()
            .flat_map(DeTable::iter)
            .map(|(key, value)| {
                let name = key.get_ref().as_ref();
                (name, place(key.span().start, name), value)
            })
            .collect()
    }

    fn section(&self, place: Place, entries: Option<&'t DeTable<'t>>) -> Self {
        Self { place, entries, known: Vec::new(), text: self.text, problems: self.problems }
    }

    fn refuse<T>(
        &self,
        place: &Place,
        name: &str,
        value: &Spanned<DeValue<'_>>,
        wanted: &str,
        example: &str,
    ) -> Field<T> {
        let is = self.is(value);
        self.problems.add(place, format_args!("{is}, write {wanted}: {name} = {example}"));
        Field::Refused
    }

    fn refuse_table(&self, place: &Place, value: &Spanned<DeValue<'_>>, header: &str) {
        let is = self.is(value);
        self.problems.add(place, format_args!("{is}, write {header}"));
    }

    /// `3 is a number`
    fn is(&self, value: &Spanned<DeValue<'_>>) -> String {
        let kind = kind(value.get_ref());
        match value.get_ref() {
            // Their text may go on for many lines.
            DeValue::Table(_) => format!("is {kind}"),
            DeValue::Array(array) if array.iter().any(|element| element.get_ref().is_table()) => {
                format!("is {kind}")
            }
            _ => format!("{} is {kind}", self.source(value)),
        }
    }

    /// A value as it stands in the file, if it is short.
    fn source(&self, value: &Spanned<DeValue<'_>>) -> String {
        let source = self.text.get(value.span()).unwrap_or_default();
        let mut characters = source.chars();
        let start: String = characters.by_ref().take(40).take_while(|c| *c != '\n').collect();
        match start.len() == source.len() {
            true => start,
            false => format!("{start}..."),
        }
    }
}

fn text(value: &DeValue<'_>) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn text_or_number(value: &DeValue<'_>) -> Option<String> {
    text(value).or_else(|| value.as_integer().map(ToString::to_string))
}

/// 0.1, or "10%"
fn fraction(value: &DeValue<'_>) -> Option<String> {
    text_or_number(value).or_else(|| value.as_float().map(ToString::to_string))
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn line(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}
