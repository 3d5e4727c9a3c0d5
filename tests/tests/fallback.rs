//! What happens to a connection when the server that was chosen cannot take it: the next best
//! does, else it waits, and no connection ever falls to the kernel's own choice.

#![forbid(unsafe_code)]

use std::{io::ErrorKind, net::TcpStream};

use tests::{
    app::App,
    client::{self, Client},
    host::{Host, V4, V6},
    network,
    process::{Process, Signal},
    wait::{seconds, wait_for, wait_until_eq},
};

#[test]
fn connections_wait_for_the_first_server_to_be_ready() {
    let host = Host::new();
    let go = host.path_text("go");
    let up = host.start(&App::with(&host, 2, &["--listen", "[::]:8080", "--listen-when", &go]));
    let waiting = client::stand(&[V4, V6], 20);
    let service = up.service();
    assert_eq!(service.states(), ["starting", "starting"]);
    assert_eq!(service.waiting.now, 20);
    // The first finds no server, and the others find the first.
    assert_eq!(
        service.outcomes(["wait_no_server", "wait_turn", "established_waiting", "selected", "handed_over"]),
        [1, 19, 20, 0, 0]
    );
    host.write("go", "");
    up.wait_ready();
    let served: Vec<Client> =
        waiting.into_iter().map(|stream| Client::greeted(stream).expect("served in the end")).collect();
    assert_eq!(served.len(), 20);
    wait_until_eq("waiting", seconds(5.0), 0, || up.service().waiting.now);
    let service = up.service();
    assert_eq!(service.outcomes(["handed_over", "moved", "move_failed", "closed_waiting"]), [20, 0, 0, 0]);
    assert_eq!(service.connections().iter().sum::<u64>(), 20);
    assert_eq!(service.waiting.max, 20);
    drop(served);
    up.wait_connections(&[0, 0]);
}

/// Each server that becomes ready gets whoever waits then. So here both are, and full, and have
/// places again when the distributor, which was stopped meanwhile, looks the next time.
#[test]
fn those_who_waited_are_shared_out_by_the_policy() {
    let host = Host::new();
    let go = host.write("go", "");
    let app = App::with(&host, 0, &["--listen", "[::]:8080", "--listen-when", &go]);
    let servers = [("a", "limit = 15"), ("b", "limit = 15"), ("dies", "limit = 20")];
    let up = host.up(&app.named(servers.map(|(name, lines)| (name, lines.to_owned()))));
    let dies = up.process("app/dies");
    dies.freeze(seconds(5.0));
    let all: Vec<TcpStream> = (0..50).map(|_| client::connect(V4).expect("a place")).collect();
    up.wait_connections(&[15, 15, 20]);
    wait_until_eq("greeted", seconds(5.0), 30, || all.iter().filter(|it| client::is_greeted(it)).count());
    // Its next instance never listens, and the others are full: its queue has to wait.
    std::fs::remove_file(&go).expect("remove the file");
    dies.kill(seconds(5.0));
    wait_until_eq("waiting", seconds(5.0), 20, || up.service().waiting.now);
    let service = up.service();
    assert_eq!(service.outcomes(["handed_over", "moved"]), [0, 0]);
    // Some of them more than once: who is parked behind others gets a room of his own later.
    assert!(service.outcome("parked") >= 20, "{:?}", service.outcomes);
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    let (served, waiting): (Vec<_>, Vec<_>) = all.into_iter().partition(client::is_greeted);
    drop(served);
    // Not by asking the distributor, which is stopped.
    wait_until_eq("connections of servers and rooms", seconds(5.0), 20, network::connections);
    distributor.signal(Signal::CONT);
    let served: Vec<Client> =
        waiting.into_iter().map(|stream| Client::greeted(stream).expect("served in the end")).collect();
    assert_eq!(client::by_name(&served), [("a".to_owned(), 10), ("b".to_owned(), 10)].into());
    let service = up.service();
    assert_eq!((service.connections(), service.waiting.now), (vec![10, 10, 0], 0));
    assert_eq!(service.outcomes(["handed_over", "moved", "move_failed", "parked_behind"]), [20, 0, 0, 0]);
    assert_eq!(service.waiting.max, 20);
    drop(served);
    up.wait_connections(&[0; 3]);
}

#[test]
fn the_queue_of_a_server_that_dies_goes_to_the_other() {
    let host = Host::new();
    let up = host.up(&App::of(&host, 2));
    for name in ["app/1", "app/2"] {
        up.process(name).freeze(seconds(5.0));
    }
    // In the queues of servers that hang.
    let queued: Vec<TcpStream> = (0..30).map(|_| client::connect(V4).expect("a place")).collect();
    up.wait_connections(&[15, 15]);
    up.process("app/1").kill(seconds(5.0));
    up.wait_connections(&[0, 30]);
    assert_eq!(up.service().outcomes(["moved", "move_failed", "parked"]), [15, 0, 0]);
    up.process("app/2").signal(Signal::CONT);
    let served: Vec<Client> =
        queued.into_iter().map(|stream| Client::greeted(stream).expect("served")).collect();
    assert!(served.iter().all(|client| client.server == "2"));
}

#[test]
fn clients_that_leave_while_they_wait_are_forgotten() {
    let host = Host::new();
    let up = host.start(&App::with(&host, 1, &["--never-listen"]));
    let mut waiting = client::stand(&[V4], 30);
    wait_until_eq("waiting", seconds(5.0), 30, || up.service().waiting.now);
    for stream in waiting.drain(..10) {
        client::reset(stream).expect("reset");
    }
    wait_until_eq("waiting", seconds(5.0), 20, || up.service().waiting.now);
    drop(waiting);
    let service = up.service();
    // Those that closed have said that they will send no more, and may still want an answer.
    assert!(service.waiting.now <= 20);
    assert_eq!(service.outcomes(["wait_no_server", "wait_turn", "handed_over"]), [1, 29, 0]);
}

#[test]
fn a_connection_that_was_reset_while_it_waited_is_not_handed_over() {
    let host = Host::new();
    let go = host.path_text("go");
    let up = host.start(&App::with(&host, 1, &["--listen", "[::]:8080", "--listen-when", &go]));
    let mut both = client::stand(&[V4], 2);
    let (alive, dead) = (both.remove(1), both.remove(0));
    client::reset(dead).expect("reset");
    host.write("go", "");
    up.wait_ready();
    Client::greeted(alive).expect("served");
    let service = up.service();
    let ways = ["wait_no_server", "wait_turn", "handed_over", "moved_dead", "closed_waiting"];
    assert_eq!(service.outcomes(ways), [1, 1, 1, 1, 1]);
    // And a bell, where the kernel needs one.
    let accepted = host.inside("1").accepted;
    assert!((1..=1 + service.outcome("bell")).contains(&accepted), "{accepted}: {:?}", service.outcomes);
    up.wait_connections(&[0]);
}

/// Between the moment a listener closes and the moment user space hears of it, the policy may
/// still choose it. Here that moment lasts as long as the distributor is stopped.
#[test]
fn the_next_best_server_takes_what_the_chosen_one_cannot() {
    let host = Host::new();
    let up = host.up(&App::with(&host, 3, &["--listen", "[::]:8080", "--closable"]));
    let first = up.process("app/1");
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    first.signal(Signal::USR1);
    wait_for_no_socket(first);
    let held = client::hold(V4, 30);
    assert!(held.iter().all(|client| client.server != "1"));
    distributor.signal(Signal::CONT);
    let service = up.service();
    let [selected, next_best, wait] = service.outcomes(["selected", "next_best", "wait_select_failed"]);
    assert!(next_best > 0, "the closed listener was never chosen: {:?}", service.outcomes);
    assert_eq!((selected + next_best, wait), (30, 0));
    assert_eq!(service.connections()[1..].iter().sum::<u64>(), 30);
}

#[test]
fn connections_wait_when_no_server_can_be_selected() {
    let host = Host::new();
    let mut app = App::with(&host, 2, &["--listen", "[::]:8080", "--closable"]);
    app.server = format!("start_timeout = \"{}s\"", seconds(1.0).as_secs());
    let up = host.up(&app);
    let servers = [up.process("app/1"), up.process("app/2")];
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    for server in servers {
        server.signal(Signal::USR1);
        wait_for_no_socket(server);
    }
    let waiting: Vec<TcpStream> =
        (0..10).map(|_| client::connect(V4).expect("a place in the room")).collect();
    distributor.signal(Signal::CONT);
    let service = up.service();
    // The others wait behind the first, unless it took so long that nobody attends to him.
    let [failed, turn, elsewhere] = service.outcomes(["wait_select_failed", "wait_turn", "next_best"]);
    assert!(failed >= 1 && failed + turn == 10 && elsewhere == 0, "{:?}", service.outcomes);
    assert_eq!(service.outcomes(["selected", "established_waiting"]), [0, 10]);
    // New instances take the place of servers that no longer listen, and serve who waited.
    for stream in waiting {
        Client::greeted(stream).expect("served by the next instance");
    }
    assert_eq!(up.service().outcome("move_failed"), 0);
}

/// Left to itself, the kernel would share them out among all listeners of the address, the full
/// server's too.
#[test]
fn a_full_server_is_left_alone_when_the_other_cannot_be_selected() {
    let host = Host::new();
    let app = App::with(&host, 0, &["--listen", "[::]:8080", "--closable"]);
    let up = host.up(&app.named([("full", "limit = 5".to_owned()), ("gone", "limit = 5".to_owned())]));
    let mut held = client::hold(V4, 10);
    held.retain(|client| client.server == "full");
    up.wait_connections(&[5, 0]);
    let gone = up.process("app/gone");
    let distributor = up.distributor();
    distributor.freeze(seconds(5.0));
    gone.signal(Signal::USR1);
    wait_for_no_socket(gone);
    let waiting: Vec<TcpStream> =
        (0..30).map(|_| client::connect(V4).expect("a place in the room")).collect();
    distributor.signal(Signal::CONT);
    let service = up.service();
    let [failed, turn] = service.outcomes(["wait_select_failed", "wait_turn"]);
    assert!(failed >= 1 && failed + turn == 30, "{:?}", service.outcomes);
    assert_eq!(service.outcomes(["established_waiting", "selected", "refused_limit"]), [30, 10, 0]);
    assert_eq!(service.server("app/full").connections_max, 5);
    assert_eq!(host.inside("full").most, 5);
    assert!(held.iter_mut().all(Client::is_served));
    drop((held, waiting));
}

/// Waits until a server has closed all its listeners and connections.
#[track_caller]
fn wait_for_no_socket(server: Process) {
    wait_for("the listener to be gone", seconds(5.0), || {
        let open = server.descriptors().into_values().any(|target| target.starts_with("socket:"));
        (!open).then_some(())
    });
}

#[test]
fn as_many_wait_as_may_and_the_next_is_refused_at_once() {
    let host = Host::new();
    let mut app = App::with(&host, 1, &["--never-listen"]);
    app.waiting = Some("capacity = 16".to_owned());
    let up = host.start(&app);
    let waiting = client::stand(&[V4], 16);
    wait_until_eq("waiting", seconds(5.0), 16, || up.service().waiting.now);
    let error = client::connect(V4).expect_err("the list is full");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "refused, and not left without an answer");
    let service = up.service();
    assert_eq!(service.outcomes(["refused_capacity", "refused_no_room"]), [1, 0]);
    assert_eq!((service.waiting.now, service.waiting.capacity, service.waiting.refused), (16, 16, 1));
    drop(waiting);
}

#[test]
fn no_new_connection_is_taken_while_the_servers_are_stopped() {
    let host = Host::new();
    let mut app = App::of(&host, 2);
    app.server = "drain_timeout = \"10s\"".to_owned();
    let up = host.up(&app);
    let mut held = client::hold(V4, 2);
    up.signal(Signal::TERM);
    wait_for("new connections to be refused", seconds(5.0), || {
        client::connect(V4).err().filter(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    assert_eq!(up.service().states(), ["draining", "draining"]);
    assert!(up.service().outcome("refused_closing") > 0);
    // What is there goes on until its client is done.
    assert!(held.iter_mut().all(Client::is_served));
    drop(held);
    assert!(up.has_stopped().success());
}
