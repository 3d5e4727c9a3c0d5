//! Each policy chooses as it promises, shown by who serves and by the kernel's own counters.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, Up, V4, V6},
    network::Clients,
    wait::{seconds, wait_for},
};

/// The named servers of these lines.
fn app(host: &Host, policy: &'static str, servers: &[(&'static str, &str)]) -> App {
    let servers: Vec<_> = servers.iter().map(|(name, lines)| (*name, (*lines).to_owned())).collect();
    App { policy: Some(policy), ..App::of(host, 0).named(servers) }
}

/// Opens and closes so many connections one by one, and says who served each.
fn one_by_one(up: &Up<'_>, count: usize) -> Vec<String> {
    let servers = up.service().servers.len();
    (0..count)
        .map(|_| {
            let client = Client::open(V4).expect("connect");
            let server = client.server.clone();
            drop(client);
            up.wait_connections(&vec![0; servers]);
            server
        })
        .collect()
}

#[test]
fn least_connections_is_the_default_and_goes_to_the_emptiest() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    assert_eq!(up.service().policy, "least-connections");
    let held = client::hold(V4, 30);
    let mut to_keep: BTreeMap<&str, u64> = [("1", 10), ("2", 4), ("3", 7)].into();
    let kept: Vec<Client> = held
        .into_iter()
        .filter(|client| {
            let left = to_keep.get_mut(client.server.as_str()).expect("one of three");
            let keeps = *left > 0;
            *left -= u64::from(keeps);
            keeps
        })
        .collect();
    up.wait_connections(&[10, 4, 7]);
    let more = client::hold(V4, 9);
    assert_eq!(up.connections(), [10, 10, 10]);
    assert_eq!(up.service().outcomes(["selected", "widened", "next_best"]), [39, 0, 0]);
    drop((kept, more));
}

#[test]
fn equal_idle_servers_take_turns() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 3));
    let served = one_by_one(&up, 12);
    for turn in served.chunks(3) {
        let mut turn = turn.to_vec();
        turn.sort_unstable();
        assert_eq!(turn, ["1", "2", "3"], "{served:?}");
    }
}

#[test]
fn weighted_round_robin_goes_by_weight_and_not_by_load() {
    let host = Host::new();
    let servers = [("a", "weight = 1"), ("b", "weight = 2"), ("c", "weight = 3")];
    let up = host.up(&app(&host, "weighted-round-robin", &servers));
    let first = client::hold(V4, 60);
    assert_eq!(up.connections(), [10, 20, 30]);
    // Emptying c does not make it the favourite.
    let kept: Vec<Client> = first.into_iter().filter(|client| client.server != "c").collect();
    up.wait_connections(&[10, 20, 0]);
    let more = client::hold(V4, 60);
    assert_eq!(up.connections(), [20, 40, 30]);
    // Smooth: in every six in a row each has its part.
    let more: Vec<&str> = more.iter().map(|client| client.server.as_str()).collect();
    for round in more.chunks(6) {
        let count = |name| round.iter().filter(|server| **server == name).count();
        assert_eq!([count("a"), count("b"), count("c")], [1, 2, 3], "{round:?}");
    }
    drop(kept);
}

#[test]
fn power_of_two_never_takes_the_fullest_and_not_always_the_emptiest() {
    let host = Host::new();
    let mut app = App::of(&host, 4);
    app.policy = Some("power-of-two");
    let up = host.up(&app);
    let mut counts: BTreeMap<String, usize> = (1..=4).map(|name| (name.to_string(), 0)).collect();
    let mut held = Vec::new();
    let mut not_emptiest = 0;
    for _ in 0..400 {
        let client = Client::open(V4).expect("connect");
        let fewest = *counts.values().min().expect("four");
        let most = *counts.values().max().expect("four");
        let fullest = counts.values().filter(|count| **count == most).count();
        let before = counts[&client.server];
        assert!(
            before < most || fullest > 1,
            "{} was alone the fullest of {counts:?}: one of two candidates is always better",
            client.server
        );
        not_emptiest += usize::from(before > fewest);
        *counts.get_mut(&client.server).expect("one of four") += 1;
        held.push(client);
    }
    let spread = counts.values().max().expect("four") - counts.values().min().expect("four");
    assert!(spread <= 12, "{counts:?}");
    // The fewest are drawn with a chance of one half at most when they are alone.
    assert!(not_emptiest > 20, "only {not_emptiest} of 400 did not go to the emptiest");
    assert_eq!(up.service().outcomes(["selected", "widened"]), [400, 0]);
}

#[test]
fn power_of_two_asks_all_when_both_candidates_are_full() {
    let host = Host::new();
    let mut app = App::of(&host, 4);
    app.policy = Some("power-of-two");
    app.limit = Some(10);
    let up = host.up(&app);
    let mut held = client::hold(V4, 40);
    assert_eq!(up.connections(), [10, 10, 10, 10]);
    // With one place left, every second draw is of two full servers.
    for _ in 0..30 {
        held.pop();
        wait_for("a free place", seconds(5.0), || (up.connections().iter().sum::<u64>() == 39).then_some(()));
        held.push(Client::open(V4).expect("the place that is left"));
    }
    assert_eq!(up.connections(), [10, 10, 10, 10]);
    let service = up.service();
    assert_eq!(service.outcomes(["selected", "refused_limit"]), [70, 0]);
    assert!(service.outcome("widened") > 0, "the last place was found by luck, 30 times in a row");
}

#[test]
fn first_fills_up_in_the_order_of_the_configuration() {
    let host = Host::new();
    let servers = [("b", "limit = 3"), ("a", "limit = 5"), ("c", "limit = 2")];
    let up = host.up(&app(&host, "first", &servers));
    let held = client::hold(V4, 10);
    let order: Vec<&str> = held.iter().map(|client| client.server.as_str()).collect();
    assert_eq!(order, ["b", "b", "b", "a", "a", "a", "a", "a", "c", "c"]);
    // A place that is given back is the next to be taken.
    let kept: Vec<Client> = held.into_iter().skip(1).collect();
    up.wait_connections(&[2, 5, 2]);
    assert_eq!(Client::open(V4).expect("a place").server, "b");
    drop(kept);
}

/// Many clients of one machine: every address of 127.0.0.0/8 is ours.
fn loopback_clients(count: u32) -> impl Iterator<Item = IpAddr> {
    (0..count).map(|number| Ipv4Addr::from(0x7f01_0001 + number).into())
}

/// Who serves each of these clients.
fn served(clients: impl Iterator<Item = IpAddr>) -> BTreeMap<IpAddr, String> {
    clients.map(|client| (client, Client::open_from(client, V4).expect("connect").server)).collect()
}

#[test]
fn source_hash_keeps_a_client_at_its_server() {
    let host = Host::new();
    let mut app = App::of(&host, 5);
    app.policy = Some("source-hash");
    let up = host.up(&app);
    let first = served(loopback_clients(500));
    for _ in 0..3 {
        assert_eq!(served(loopback_clients(500)), first);
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for server in first.values() {
        *counts.entry(server).or_default() += 1;
    }
    // 100 each on average; far outside of what chance does (a deviation of 9) is a defect.
    assert!(counts.len() == 5 && counts.values().all(|count| (50..=150).contains(count)), "{counts:?}");
    assert_eq!(up.service().outcomes(["selected", "widened"]), [2000, 0]);
}

/// Connections that arrive at once change a server's word under each other. That must never look
/// like a server that has no place.
#[test]
fn source_hash_keeps_one_client_on_one_server_under_concurrency() {
    let host = Host::new();
    let mut app = App::of(&host, 4);
    app.policy = Some("source-hash");
    let up = host.up(&app);
    client::in_threads(12, 0..3_000, |_| Client::open(V4).map(drop)).expect("every connection is served");
    let service = up.service();
    let mut totals = service.totals();
    totals.sort_unstable();
    assert_eq!(totals, [0, 0, 0, 3_000], "{:?}", service.outcomes);
    assert_eq!(
        service.outcomes(["selected", "next_best", "established", "widened"]),
        [3_000, 0, 3_000, 0],
        "{:?}",
        service.outcomes
    );
}

#[test]
fn source_hash_keeps_ipv6_clients_too() {
    let host = Host::new();
    let clients = Clients::join(1).expect("join a network of clients");
    let mut app = App::of(&host, 4);
    app.policy = Some("source-hash");
    let _up = host.up(&app);
    let target = (clients.server_v6(), 8080).into();
    let serve = || -> Vec<String> {
        clients.network.run(|| {
            (0..Clients::ADDRESSES)
                .map(|client| Client::open_from(clients.v6(client), target).expect("connect").server)
                .collect()
        })
    };
    let first = serve();
    assert_eq!(serve(), first);
    let different: std::collections::BTreeSet<&String> = first.iter().collect();
    assert_eq!(different.len(), 4, "64 clients came to {different:?} only");
}

#[test]
fn source_hash_moves_only_the_clients_of_the_server_that_goes() {
    let host = Host::new();
    let mut app = App::of(&host, 5);
    app.policy = Some("source-hash");
    // The first start after a failure is at once, and the second not within this test.
    app.server = "restart = { delay = \"60s\", max_delay = \"60s\", healthy_after = \"60s\" }".to_owned();
    let up = host.up(&app);
    let before = served(loopback_clients(500));
    let first = up.process("app/3");
    first.kill(seconds(5.0));
    let second = wait_for("its next instance", seconds(20.0), || {
        up.process_if_any("app/3").filter(|process| *process != first)
    });
    up.wait_ready();
    second.kill(seconds(5.0));
    up.wait_state("app/3", "backoff");
    let after = served(loopback_clients(500));
    let mut heirs: BTreeMap<&str, usize> = BTreeMap::new();
    for (client, server) in &before {
        if server == "3" {
            *heirs.entry(&after[client]).or_default() += 1;
        } else {
            assert_eq!(&after[client], server, "{client} was not a client of the server that went");
        }
    }
    // They do not all fall upon one other server.
    assert_eq!(heirs.len(), 4, "{heirs:?}");
    // Back again, it has the same clients as before.
    up.run(&["resume", "app/3"]).expect_done();
    up.wait_ready();
    assert_eq!(served(loopback_clients(500)), before);
}

#[test]
fn source_hash_sends_a_client_elsewhere_while_its_server_is_full() {
    let host = Host::new();
    let mut app = App::of(&host, 3);
    app.policy = Some("source-hash");
    app.limit = Some(5);
    let up = host.up(&app);
    let held: Vec<Client> = (0..15).map(|_| Client::open(V4).expect("a place")).collect();
    assert_eq!(up.connections(), [5, 5, 5]);
    let favourite = held[0].server.clone();
    assert!(held[..5].iter().all(|client| client.server == favourite));
    assert!(up.service().outcome("widened") <= 10);
    drop(held);
    up.wait_connections(&[0; 3]);
    assert_eq!(Client::open(V4).expect("a place").server, favourite);
}

#[test]
fn every_policy_serves_ipv4_and_ipv6_and_shows_its_name() {
    for policy in ["least-connections", "weighted-round-robin", "power-of-two", "source-hash", "first"] {
        let host = Host::new();
        let mut app = App::of(&host, 2);
        app.policy = Some(policy);
        let up = host.up(&app);
        let mut held = client::hold(V4, 10);
        held.extend(client::hold(V6, 10));
        assert!(held.iter_mut().all(Client::is_served), "{policy}");
        let service = up.service();
        assert_eq!(service.policy, policy);
        assert_eq!(
            service.outcomes(["selected", "established", "next_best", "wait_no_server"]),
            [20, 20, 0, 0]
        );
    }
}
