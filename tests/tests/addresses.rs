//! Services on every kind of address, and servers that bind another one than they should.

#![forbid(unsafe_code)]

use std::{io::ErrorKind, net::SocketAddr};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, V4, V6},
    network::Clients,
    real,
    wait::{lasting, seconds, wait_for, wait_until_eq},
};

/// Two servers on these addresses, each bound by the servers themselves.
fn app(host: &Host, listen: &[&str]) -> App {
    let words: Vec<&str> = listen.iter().flat_map(|address| ["--listen", address]).collect();
    App { listen: listen.iter().map(|address| (*address).to_owned()).collect(), ..App::with(host, 2, &words) }
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A service's addresses, and where a client reaches it.
struct Kind {
    name: &'static str,
    listen: &'static [&'static str],
    answers: &'static [&'static str],
    silent: &'static [&'static str],
}

const KINDS: [Kind; 6] = [
    Kind {
        name: "IPv4",
        listen: &["0.0.0.0:8080"],
        answers: &["127.0.0.1:8080", "127.0.0.2:8080"],
        silent: &["[::1]:8080"],
    },
    Kind {
        name: "both families",
        listen: &["[::]:8080"],
        answers: &["127.0.0.1:8080", "[::1]:8080"],
        silent: &["[::1]:8081"],
    },
    Kind {
        name: "one IPv4 address",
        listen: &["127.0.0.1:8080"],
        answers: &["127.0.0.1:8080"],
        silent: &["127.0.0.2:8080", "[::1]:8080"],
    },
    Kind {
        name: "one IPv6 address",
        listen: &["[::1]:8080"],
        answers: &["[::1]:8080"],
        silent: &["127.0.0.1:8080"],
    },
    Kind {
        name: "several addresses and ports",
        listen: &["127.0.0.1:8080", "127.0.0.2:8080", "[::1]:9090"],
        answers: &["127.0.0.1:8080", "127.0.0.2:8080", "[::1]:9090"],
        silent: &["127.0.0.3:8080", "[::1]:8080"],
    },
    Kind {
        name: "two ports",
        listen: &["[::]:8080", "[::]:9090"],
        answers: &["127.0.0.1:8080", "[::1]:9090"],
        silent: &["[::1]:8081"],
    },
];

#[test]
fn a_service_answers_on_its_addresses_and_on_no_other() {
    for Kind { name, listen, answers, silent } in KINDS {
        let host = Host::new();
        let up = host.up(&app(&host, listen));
        let mut held = Vec::new();
        for _ in 0..10 {
            for target in answers {
                let client = Client::open(address(target));
                held.push(client.unwrap_or_else(|error| panic!("{name}: {target}: {error}")));
            }
        }
        for target in silent {
            let error = client::connect(address(target)).expect_err("nothing listens there");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{name}: {target}");
        }
        // One count for a server, over all of its addresses.
        let each = 10 * answers.len() as u64 / 2;
        assert_eq!(up.connections(), [each, each], "{name}");
        let service = up.service();
        let all = 2 * each;
        assert_eq!(service.outcomes(["selected", "established", "next_best"]), [all, all, 0], "{name}");
        assert_eq!(service.listen, listen, "{name}");
        drop(held);
        up.wait_connections(&[0, 0]);
    }
}

#[test]
fn ipv6_only_leaves_ipv4_alone() {
    let host = Host::new();
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--v6-only"]);
    app.listen = vec!["[::]:8080 v6only".to_owned()];
    let up = host.up(&app);
    let held = client::hold(V6, 10);
    assert_eq!(up.connections(), [5, 5]);
    client::connect(V4).expect_err("nothing listens on IPv4");
    drop(held);
}

#[test]
fn both_wildcards_of_one_port_are_two_groups_with_one_count() {
    let host = Host::new();
    let words = ["--listen", "0.0.0.0:8080", "--listen", "[::]:8080", "--v6-only"];
    let mut app = App::with(&host, 3, &words);
    app.listen = vec!["0.0.0.0:8080".to_owned(), "[::]:8080".to_owned()];
    let up = host.up(&app);
    let mut held = client::hold(V4, 15);
    held.extend(client::hold(V6, 15));
    assert_eq!(up.connections(), [10, 10, 10]);
    drop(held);
}

#[test]
fn a_limit_counts_over_all_addresses() {
    let host = Host::new();
    let mut app = app(&host, &["[::]:8080", "127.0.0.1:9090"]).refusing();
    app.limit = Some(4);
    let up = host.up(&app);
    let held: Vec<Client> = [V4, V6, address("127.0.0.1:9090"), V4, V6, address("127.0.0.1:9090"), V4, V6]
        .map(|target| Client::open(target).expect("a place"))
        .into();
    assert_eq!(up.connections(), [4, 4]);
    for target in [V4, V6, address("127.0.0.1:9090")] {
        client::connect(target).expect_err("all places are taken");
    }
    assert_eq!(up.service().outcome("refused_limit"), 3);
    drop(held);
}

#[test]
fn two_services_do_not_mix() {
    let host = Host::new();
    let server = host.test_server();
    let up = host.start_toml(&format!(
        "[service.a]\nlisten = [\":8080\"]\n[service.a.server]\ncount = 2\n\
         command = [\"{server}\", \"--listen\", \"[::]:8080\", \"--name\", \"{{service}}\"]\n\
         [service.b]\nlisten = [\":9090\"]\n[service.b.server]\ncount = 3\n\
         command = [\"{server}\", \"--listen\", \"[::]:9090\", \"--name\", \"{{service}}\"]\n"
    ));
    up.wait_ready();
    let a = client::hold(V4, 6);
    let b = client::hold(address("127.0.0.1:9090"), 6);
    assert!(a.iter().all(|client| client.server == "a") && b.iter().all(|client| client.server == "b"));
    let status = up.status();
    assert_eq!(status.service("a").connections(), [3, 3]);
    assert_eq!(status.service("b").connections(), [2, 2, 2]);
    assert_eq!(status.service("a").outcome("selected"), 6);
}

#[test]
fn clients_from_other_machines_are_served_and_seen_as_who_they_are() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let up = host.up(&App::of(&host, 2));
    for (source, target) in [(clients.v4(3), clients.server_v4()), (clients.v6(3), clients.server_v6())] {
        let client = clients.network.run(|| Client::open_from(source, (target, 8080).into()));
        assert_eq!(client.expect("connect").seen_as.ip(), source);
    }
    up.wait_connections(&[0, 0]);
    assert_eq!(up.service().outcome("established"), 2);
}

#[test]
fn a_port_below_1024_needs_no_privilege_of_the_server() {
    let host = Host::new();
    let server = host.test_server_for_all();
    let mut app = App::running(2, [&server, "--listen", "[::]:80"].map(str::to_owned).to_vec());
    app.listen = vec!["[::]:80".to_owned()];
    app.server = "user = \"nobody\"".to_owned();
    let up = host.up(&app);
    assert_eq!(client::by_process(&client::hold(address("127.0.0.1:80"), 4)).len(), 2);
    assert!(up.process("app/1").fact("Uid").starts_with("65534"));
}

/// Python binds 0.0.0.0 when it is told nothing, which would take all IPv4 clients of [::].
#[test]
fn a_server_that_binds_another_family_is_stopped_with_a_reason() {
    let host = Host::new();
    let up = host.start(&App::running(2, real::python(&host, 2)));
    for name in ["app/1", "app/2"] {
        let server = up.wait_state(name, "failed");
        let reason = server.reason.expect("a reason");
        assert!(reason.contains("0.0.0.0:8080") && reason.contains("[::]:8080"), "{reason}");
        wait_until_eq("its process", seconds(5.0), None, || up.service().server(name).pid);
    }
    assert!(up.service().outcome("bind_refused") >= 2);
}

#[test]
fn a_server_that_binds_a_more_specific_address_is_stopped_with_a_reason() {
    let host = Host::new();
    let up = host.start(&App::with(&host, 1, &["--listen", "127.0.0.1:8080"]));
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(reason.contains("127.0.0.1:8080") && reason.contains("[::]:8080"), "{reason}");
}

#[test]
fn a_server_that_leaves_ipv4_out_is_stopped_with_a_reason() {
    let host = Host::new();
    let up = host.start(&App::with(&host, 1, &["--listen", "[::]:8080", "--v6-only"]));
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(reason.contains("IPv6 only") && reason.contains("[::]:8080"), "{reason}");
}

#[test]
fn a_server_that_uses_multipath_tcp_is_stopped_with_a_reason() {
    let enabled = std::fs::read_to_string("/proc/sys/net/mptcp/enabled").unwrap_or_default();
    if enabled.trim() != "1" {
        println!("skipped: this kernel has no MPTCP");
        return;
    }
    let host = Host::new();
    let up = host.start(&App::with(&host, 1, &["--listen", "[::]:8080", "--multipath"]));
    let reason = up.wait_state("app/1", "failed").reason.expect("a reason");
    assert!(reason.contains("MPTCP"), "{reason}");
}

#[test]
fn a_server_that_listens_on_another_port_never_becomes_ready_and_says_where_it_listens() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--listen", "[::]:9090"]);
    app.server = format!("start_timeout = \"{}\"", lasting(2.0));
    let up = host.start(&app);
    let server = wait_for("a reason that names the address", seconds(5.0), || {
        let server = up.service().server("app/1").clone();
        server.reason.as_ref()?.contains("9090").then_some(server)
    });
    assert_eq!(server.state, "starting");
    // It is nobody's business who else connects there.
    Client::open(address("127.0.0.1:9090")).expect("the server does listen");
    let reason = up.wait_state("app/1", "backoff").reason.expect("a reason");
    assert!(reason.contains("listens on [::]:9090, not on [::]:8080"), "{reason}");
}
