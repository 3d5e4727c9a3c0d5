//! What right configurations mean.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use toml::{Table, Value};

use super::*;
use crate::{load::Source, spread::Portion};

/// Every option, for people; and for these tests.
const EXAMPLE: &str = include_str!("../../../docs/dist-ctl.toml");

/// The reply in the example.
const BUSY: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

const LEAST: &str = r#"
[service.shop]
listen = [":8080"]
[service.shop.server]
command = ["shop"]
"#;

fn machine() -> Machine {
    Machine {
        environment: vec![("PATH".to_owned(), "/bin".to_owned())],
        cpus_possible: Some(vec![0, 1, 2, 3]),
        nodes_possible: vec![0],
    }
}

fn parse(text: &str) -> Config {
    Config::parse_for(text, "shop.toml", &Counts::new(), &machine()).unwrap()
}

fn strings<const N: usize>(texts: [&str; N]) -> Vec<String> {
    texts.map(str::to_owned).to_vec()
}

fn facts<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}

#[test]
fn what_is_left_out_has_its_default() {
    let server = Server {
        name: "shop/1".to_owned(),
        short_name: "1".to_owned(),
        index: 1,
        command: strings(["shop"]),
        environment: facts([
            ("DIST_CTL_INDEX", "1"),
            ("DIST_CTL_LISTEN", "[::]:8080"),
            ("DIST_CTL_SERVER", "shop/1"),
            ("DIST_CTL_SERVICE", "shop"),
            ("PATH", "/bin"),
        ]),
        own_environment: Vec::new(),
        directory: None,
        weight: 100,
        limit: None,
        cpus: Cpus::All,
        limits: Vec::new(),
        umask: 0o022,
        output: Output::Inherit,
        errors: Output::Inherit,
        stop_signal: Signal::TERM,
        stop_timeout: Duration::from_secs(10),
        start_timeout: Duration::from_secs(60),
        drain_timeout: Duration::from_secs(5),
        backup: false,
        slow_start: Duration::ZERO,
        watchdog: None,
        check: None,
        stall: None,
        lifetime: Lifetime { jitter: 100, ..Lifetime::default() },
        restart: Restart {
            delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(30),
            healthy_after: Duration::from_secs(10),
            give_up_after: Some(10),
        },
    };
    let config = Config {
        control: Control { owner: 0, mode: 0o600, readers: None },
        services: vec![Service {
            occupied: Occupied::Refuse,
            name: "shop".to_owned(),
            listen: vec!["[::]:8080".parse().unwrap()],
            policy: Policy::LeastConnections,
            waiting: Waiting { capacity: 1024, timeout: Duration::from_secs(30), reply: [].into() },
            scale: None,
            roll: Bounds { max_surge: 1, max_unavailable: 0 },
            limits: Limits::NONE,
            load: None,
            user: None,
            socket: SocketMode::Own,
            readiness: Readiness::Listening,
            backlog: 4096,
            servers: vec![server],
        }],
    };
    assert_eq!(parse(LEAST), config);
}

#[test]
fn the_example_means_what_it_says() {
    let config = parse(EXAMPLE);
    let service = &config.services[0];
    let (first, big) = (&service.servers[0], &service.servers[4]);
    let (uid, gid) = service.user.as_ref().map(|user| (user.uid, user.gid)).unwrap();

    assert_eq!(config.control.mode, 0o660);
    assert_eq!(*service.waiting.reply, *BUSY.as_bytes());
    assert_eq!(uid, nix_uid("daemon"));
    assert!(service.user.as_ref().unwrap().groups.contains(&gid));
    assert_eq!(first.command, strings(["java", "-Dname=1", "-jar", "shop.jar"]));
    assert_eq!(first.output, Output::File(PathBuf::from("/var/log/shop-1.log")));
    assert_eq!(first.errors, Output::Inherit);
    assert_eq!(
        service.scale.map(|scale| (scale.min, scale.max, scale.up_at, scale.down_at)),
        Some((2, 8, 80, 40))
    );
    assert_eq!((first.weight, first.limit), (100, Some(200)));
    assert_eq!(first.cpus, Cpus::Spread(Portion::Cpus));
    assert_eq!(big.cpus, Cpus::List(vec![0]));
    let sources = vec![Source::Reported, Source::AcceptQueue];
    assert_eq!(service.load, Some(Rule { sources, strength: 3, floor: 10 }));
    assert_eq!(
        first.limits,
        [(Resource::Core, Some(0)), (Resource::Memlock, None), (Resource::Nofile, Some(65_536)),]
    );
    assert_eq!((big.name.as_str(), big.index), ("shop/big", 5));
    assert_eq!(big.command[2], "-Dname=big");
    assert_eq!((big.weight, big.limit), (200, Some(400)));
    assert_eq!([first.slow_start, big.slow_start], [Duration::from_secs(30); 2]);
    assert_eq!([first.backup, big.backup], [false, true]);
    let watchdogs = [first.watchdog, big.watchdog];
    assert_eq!(watchdogs, [10, 20].map(|seconds| Some(Duration::from_secs(seconds))));
    let stall = |after, kill| {
        Some(Stall {
            after: Duration::from_secs(after),
            move_queue: false,
            kill_after: Some(Duration::from_secs(kill)),
        })
    };
    assert_eq!([first.stall, big.stall], [stall(10, 30), stall(20, 60)]);
    let check = |path: &str, timeout| Check {
        kind: CheckKind::Http {
            path: path.to_owned(),
            host: "shop.example".to_owned(),
            statuses: vec![200..=299, 304..=304],
        },
        interval: Duration::from_secs(2),
        fast_interval: Duration::from_millis(500),
        timeout: Duration::from_secs(timeout),
        rise: 2,
        fall: 3,
        restart_after: Some(Duration::from_secs(300)),
    };
    assert_eq!(first.check, Some(check("/health", 1)));
    assert_eq!(big.check, Some(check("/health?deep", 3)));
    let lifetime = |hours, max_connections, gib: u64| Lifetime {
        max_age: Some(Duration::from_hours(hours)),
        max_connections: Some(max_connections),
        memory_limit: Some(gib << 30),
        jitter: 100,
    };
    assert_eq!([first.lifetime, big.lifetime], [lifetime(24, 1_000_000, 2), lifetime(48, 2_000_000, 9)]);
    assert_eq!(big.directory, Some(PathBuf::from("/srv")));
    assert_eq!(big.errors, Output::File(PathBuf::from("/var/log/shop-big.err")));
    for variable in
        [("DIST_CTL_SERVER", "shop/big"), ("JAVA_HOME", "/opt/jdk"), ("OFFSET", "5"), ("USER", "daemon")]
    {
        let variable = (variable.0.to_owned(), variable.1.to_owned());
        assert!(big.environment.contains(&variable), "{variable:?}");
    }
    let java = "/usr/lib/jvm/default-java";
    let written = facts([("JAVA_HOME", java), ("OFFSET", "5"), ("JAVA_HOME", "/opt/jdk")]);
    assert_eq!(big.own_environment, written);
}

#[test]
fn a_fraction_may_be_written_as_percents_or_as_a_number() {
    for (written, thousandths) in
        [("0.1", 100), ("\"10%\"", 100), ("\"2.5 %\"", 25), ("1", 1_000), ("0", 0), ("\"0.25\"", 250)]
    {
        let config = parse(&format!("{LEAST}jitter = {written}\n"));
        assert_eq!(config.services[0].servers[0].lifetime.jitter, thousandths, "{written}");
    }
}

#[test]
fn the_example_shows_every_field_there_is() {
    let written = |text: &str| {
        let problems = Problems::default();
        let written = written::read(text, &problems).unwrap();
        problems.unless_none(None).unwrap();
        written
    };
    // Debug prints a field that was left out as "field: Absent".
    let absent = |text: &str| -> Vec<String> {
        let shown = format!("{:#?}", written(text));
        let absent = shown.lines().filter(|line| line.contains("Absent"));
        absent.map(|line| line.trim().to_owned()).collect()
    };
    // A server's own check has the fields of its service's, of which the example shows some.
    let (_, check) = EXAMPLE.split_once("[service.shop.check]").unwrap();
    let (check, _) = check.split_once("\n[").unwrap();
    let (before, _) = EXAMPLE.split_once("[service.shop.servers.check]").unwrap();
    let example = format!("{before}[service.shop.servers.check]{check}");
    // These exclude others, so they stand in comments.
    let commented = ["reply_file: Absent,", "command: Absent,", "command: Absent,"];
    assert_eq!(absent(&example), commented);
    let all = example.replace("# reply_file = ", "reply_file = ").replace("# command = ", "command = ");
    assert_eq!(absent(&all), Vec::<String>::new());
    assert_eq!(written(EXAMPLE).services[0].servers.len(), 1);
}

/// Each `# Default: VALUE` of the example, written out, changes nothing.
#[test]
fn the_defaults_that_the_example_names_are_the_defaults() {
    let mut table = "";
    let mut default = None;
    let mut checked = 0;
    for line in EXAMPLE.lines() {
        if let Some(header) = line.strip_prefix('[') {
            table = header.split_once(']').unwrap().0;
        } else if let Some(value) = line.strip_prefix("# Default: ") {
            default = Some(value);
        } else if let Some((key, _)) = line.split_once(" = ")
            && !line.starts_with('#')
            && let Some(default) = default.take()
        {
            let Ok(value) = toml::from_str::<Table>(&format!("{key} = {default}")) else {
                // In words: what is true if nothing is written.
                assert!(default.starts_with(char::is_alphabetic), "{key}: {default}");
                continue;
            };
            // These tables have no defaults of their own.
            let base = match table {
                "service.shop.check" => &format!("{LEAST}[service.shop.check]\ntype = \"http\"\n"),
                "service.shop.load" => &format!("{LEAST}[service.shop.load]\nsources = [\"reported\"]\n"),
                "service.shop.scale" => &format!("{LEAST}limit = 9\n[service.shop.scale]\nmin = 1\nmax = 2"),
                _ => LEAST,
            };
            let mut text: Table = toml::from_str(base).unwrap();
            let place = table.split('.').fold(&mut text, |text, name| {
                let inner = text.entry(name).or_insert_with(|| Value::Table(Table::new()));
                inner.as_table_mut().unwrap()
            });
            place.extend(value);
            assert_eq!(parse(&text.to_string()), parse(base), "{table}.{key} = {default}");
            checked += 1;
        }
    }
    assert_eq!(checked, 48);
}

#[test]
fn without_a_count_there_is_one_server_or_the_named_ones_only() {
    let names = |text: &str| -> Vec<String> {
        let servers = parse(text).services.remove(0).servers;
        servers.into_iter().map(|server| server.name).collect()
    };
    assert_eq!(names(LEAST), ["shop/1"]);
    let named = format!("{LEAST}[[service.shop.servers]]\nname = \"big\"");
    assert_eq!(names(&named), ["shop/big"]);
    let both = named.replace("command", "count = 2\ncommand");
    assert_eq!(names(&both), ["shop/1", "shop/2", "shop/big"]);
}

#[test]
fn a_named_server_may_bring_the_only_command() {
    let config = parse(
        r#"
        [service.shop]
        listen = [":8080"]
        [[service.shop.servers]]
        name = "big"
        command = ["{service}-{name}-{index}", "{{}}"]
        "#,
    );
    assert_eq!(config.services[0].servers[0].command, strings(["shop-big-1", "{}"]));
}

#[test]
fn both_wildcards_share_a_port_without_sharing_clients() {
    let config = parse(&LEAST.replace("\":8080\"", "\"[::]:8080\", \"0.0.0.0:8080\""));
    let v6only: Vec<bool> = config.services[0].listen.iter().map(|address| address.v6only).collect();
    assert_eq!(v6only, [true, false]);
}

#[test]
fn errors_go_where_output_goes_unless_told_otherwise() {
    let config = parse(&format!("{LEAST}output = \"/log/{{name}}\""));
    let server = &config.services[0].servers[0];
    assert_eq!(server.errors, Output::File(PathBuf::from("/log/1")));
    assert_eq!(server.errors, server.output);
}

#[test]
fn readers_get_through_the_mode_by_default() {
    let config = parse(&format!("[control]\nreaders = 0\n{LEAST}"));
    assert_eq!(config.control, Control { owner: 0, mode: 0o660, readers: Some(0) });
}

#[test]
fn a_reply_is_the_same_from_the_file_and_from_a_file_of_its_own() {
    let path = std::env::temp_dir().join(format!("dist-ctl-test-reply-{}", std::process::id()));
    let waiting = |reply: &str| {
        let config = Config::parse_for(
            &format!("{LEAST}[service.shop.waiting]\n{reply}"),
            "",
            &Counts::new(),
            &machine(),
        );
        config.map(|mut config| config.services.remove(0).waiting.reply)
    };
    let from_file = |reply: &[u8]| {
        std::fs::write(&path, reply).unwrap();
        waiting(&format!("reply_file = {path:?}"))
    };
    let text = waiting(&format!("reply = {BUSY:?}"));
    let file = from_file(BUSY.as_bytes());
    // A page in another encoding than TOML's is sent as it is.
    let bytes = from_file(b"belegt f\xfcr heute\0");
    let longest = from_file(&[b'x'; 65_536]);
    std::fs::remove_file(&path).unwrap();

    assert_eq!(text, Ok(BUSY.as_bytes().into()));
    assert_eq!(file, text);
    assert_eq!(bytes, Ok(b"belegt f\xfcr heute\0"[..].into()));
    assert_eq!(longest.map(|reply| reply.len()), Ok(65_536));
}

#[test]
fn the_extremes_of_waiting_are_accepted() {
    for (text, capacity, timeout) in [
        ("capacity = 0", 0, Duration::from_secs(30)),
        ("capacity = 16384", 16_384, Duration::from_secs(30)),
        ("timeout = \"10ms\"", 1024, Duration::from_millis(10)),
        ("timeout = \"8760h\"", 1024, Duration::from_hours(8760)),
    ] {
        let config = parse(&format!("{LEAST}[service.shop.waiting]\n{text}"));
        let meant = Waiting { capacity, timeout, reply: [].into() };
        assert_eq!(config.services[0].waiting, meant, "{text}");
    }
}

#[test]
fn a_service_may_wait_for_an_address_that_is_in_use() {
    let listen = "listen = [\":8080\"]";
    for (text, meant) in [("\"refuse\"", Occupied::Refuse), ("\"wait\"", Occupied::Wait)] {
        let config = parse(&LEAST.replace(listen, &format!("{listen}\noccupied = {text}")));
        assert_eq!(config.services[0].occupied, meant, "{text}");
    }
}

#[test]
fn giving_up_after_0_is_never_giving_up() {
    let config = parse(&format!("{LEAST}restart.give_up_after = 0"));
    assert_eq!(config.services[0].servers[0].restart.give_up_after, None);
}

#[test]
fn the_command_form_means_the_same_as_a_file() {
    let form = CommandForm {
        name: "shop".to_owned(),
        listen: strings([":8080", "127.0.0.2:81"]),
        servers: 3,
        policy: Some("first".to_owned()),
        limit: Some(20),
        weight: Some(7),
        waiting: Some(0),
        socket: Some("systemd".to_owned()),
        user: Some("root".to_owned()),
        command: strings(["shop", "--name={name}"]),
    };
    let file = r#"
        [service.shop]
        listen = [":8080", "127.0.0.2:81"]
        policy = "first"
        [service.shop.waiting]
        capacity = 0
        [service.shop.server]
        command = ["shop", "--name={name}"]
        count = 3
        limit = 20
        weight = 7
        socket = "systemd"
        user = "root"
    "#;
    assert_eq!(Config::from_command_for(&form, &Counts::new(), &machine()), Ok(parse(file)));
}

#[test]
fn check_says_what_was_understood() {
    assert_eq!(
        parse(LEAST).to_string(),
        "shop: [::]:8080, 1 server (1), least-connections, socket own, limit none, weight 100, waiting 1024 for 30s\n"
    );
    assert_eq!(
        parse(EXAMPLE).to_string(),
        "shop: [::]:8080, 5 servers (1 to 4, big as backup), least-connections, socket own, user daemon, limit 200 (big: 400), weight 100 (big: 200), slow start 30s, scale 2 to 8, up at 80 % for 2s, down at 40 % for 5m, cpus spread (big: 0), check http every 2s, watchdog 10s (big: 20s), stall_after 10s (big: 20s), hang_kill 30s (big: 1m), max_age 24h (big: 48h), max_connections 1000000 (big: 2000000), memory_limit 2.0 GiB (big: 9.0 GiB), weights by reported and accept-queue, strength 3, floor 10 %, waiting 1024 for 30s with a reply, limits: service 10000 connections, 500 per second (burst 1000), then wait; source 100 connections, 20 per second (burst 40) by /32 and /64, 1 exempt\n"
    );
}

#[test]
fn check_says_who_may_wait() {
    for (text, said) in [
        ("", "waiting 1024 for 30s"),
        ("capacity = 7\ntimeout = \"90s\"", "waiting 7 for 1m30s"),
        ("timeout = \"1500ms\"\nreply = \"busy\"", "waiting 1024 for 1s500ms with a reply"),
        ("capacity = 0\ntimeout = \"5s\"\nreply = \"busy\"", "no waiting"),
    ] {
        let shown = parse(&format!("{LEAST}[service.shop.waiting]\n{text}")).to_string();
        assert_eq!(shown.trim_end().split_once(", weight 100, ").unwrap().1, said, "{text}");
    }
}

#[test]
fn check_says_what_the_service_and_its_sources_may_have() {
    for (text, said) in [
        ("connections = 1", "service 1 connection, then refuse"),
        ("rate = 30\nover = \"wait\"", "service 30 per second (burst 30), then wait"),
        (
            "[service.shop.limits.per_source]\nrate = 9\nburst = 2",
            "source 9 per second (burst 2) by /32 and /64",
        ),
        (
            "connections = 7\n[service.shop.limits.per_source]\nconnections = 2\nprefix_ipv6 = 56\nexempt = [\"::1\", \"127.0.0.0/8\"]",
            "service 7 connections, then refuse; source 2 connections by /32 and /56, 2 exempt",
        ),
    ] {
        let shown = parse(&format!("{LEAST}[service.shop.limits]\n{text}")).to_string();
        assert_eq!(shown.trim_end().split_once(", limits: ").unwrap().1, said, "{text}");
    }
}

fn nix_uid(name: &str) -> u32 {
    nix::unistd::User::from_name(name).unwrap().unwrap().uid.as_raw()
}

#[test]
fn what_is_not_said_of_a_check_is_as_everywhere() {
    let config =
        parse("[service.a]\nlisten = [\":1\"]\ncheck = { type = \"tcp\" }\nserver = { command = [\"x\"] }");
    let expected = Check {
        kind: CheckKind::Tcp,
        interval: Duration::from_secs(2),
        fast_interval: Duration::from_millis(500),
        timeout: Duration::from_secs(1),
        rise: 2,
        fall: 3,
        restart_after: None,
    };
    assert_eq!(config.services[0].servers[0].check, Some(expected));
    let kinds = |check: &str| {
        let config = parse(&format!(
            "[service.a]\nlisten = [\":1\"]\ncheck = {{ {check} }}\nserver = {{ command = [\"x\"] }}"
        ));
        config.services[0].servers[0].check.clone().unwrap()
    };
    let CheckKind::Http { path, host, statuses } = kinds("type = \"http\"").kind else { panic!() };
    assert_eq!((path.as_str(), host.as_str(), statuses), ("/", "localhost", vec![200..=399]));
    // Never slower than usual.
    assert_eq!(kinds("type = \"tcp\", interval = \"100ms\"").fast_interval, Duration::from_millis(100));
}

#[test]
fn a_server_with_a_check_of_another_type_has_only_the_times_of_its_service() {
    let config = parse(
        r#"
        [service.a]
        listen = [":1"]
        check = { type = "http", path = "/a", interval = "7s", fall = 9 }
        server = { command = ["x"], count = 1 }
        [[service.a.servers]]
        name = "own"
        check = { type = "command", command = ["/bin/well", "{name}"], rise = 4 }
        [[service.a.servers]]
        name = "same"
        "#,
    );
    let servers = &config.services[0].servers;
    let [first, own, same] = [0, 1, 2].map(|server| servers[server].check.clone().unwrap());
    assert_eq!(own.kind, CheckKind::Command { command: strings(["/bin/well", "own"]) });
    assert_eq!((own.interval, own.fall, own.rise), (Duration::from_secs(7), 9, 4));
    assert_eq!(first, same);
    let shown = config.to_string();
    assert!(shown.contains(", check http every 7s (own: command every 7s), "), "{shown}");
}
