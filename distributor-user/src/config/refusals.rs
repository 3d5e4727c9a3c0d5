//! Wrong configurations, and the sentences with which they are refused.
//!
//! Each row: what is wrong, how it is written, and every sentence the operator reads.
#![forbid(unsafe_code)]

mod limits;

use std::io;

use proptest::prelude::*;

use super::{CommandForm, Config, Counts, DEFAULT_FILE, Machine, unreadable};

/// Plain ASCII, so that any byte may be changed.
const EXAMPLE: &str = include_str!("../../../docs/dist-ctl.toml");

type Row = (&'static str, &'static str, &'static [&'static str]);

/// Goes before each row of `SERVERS`, whose first line is therefore line 5.
const SERVICE: &str = r#"[service.shop]
listen = [":8080"]
[service.shop.server]
command = ["shop"]
"#;

/// What may be wrong with servers.
const SERVERS: &[Row] = &[
    (
        "bounds_the_wrong_way_round",
        "limit = 5\n[service.shop.scale]\nmin = 4\nmax = 2",
        &["shop.toml:8: service.shop.scale.max: 2 is less than min, write 4 or more"],
    ),
    (
        "a_bound_that_is_missing",
        "limit = 5\n[service.shop.scale]\nmin = 1",
        &["shop.toml:6: service.shop.scale.max: is missing, write how many servers there are to be: max = 4"],
    ),
    (
        "more_servers_than_the_bounds_allow",
        "limit = 5\ncount = 9\n[service.shop.scale]\nmin = 2\nmax = 4",
        &[
            "shop.toml:6: service.shop.server.count: 9 is not between the service's scale.min and scale.max, write 2 to 4",
        ],
    ),
    (
        "scaling_without_a_limit",
        "[service.shop.scale]\nmin = 2\nmax = 4",
        &[
            "shop.toml:5: service.shop.scale: stands without a limit for its servers, by which places are counted, write limit in [service.shop.server]",
        ],
    ),
    (
        "fewer_servers_where_more_are_wanted",
        "limit = 5\n[service.shop.scale]\nmin = 2\nmax = 4\nup_at = 50\ndown_at = 50",
        &["shop.toml:10: service.shop.scale.down_at: 50 is not below up_at (50), write for example 25"],
    ),
    (
        "a_bound_in_the_wrong_table",
        "min = 2",
        &["shop.toml:5: service.shop.server.min: belongs in [service.shop.scale], write it there"],
    ),
    (
        "a_count_above_the_slots",
        "count = 257",
        &["shop.toml:5: service.shop.server.count: 257 is out of range, write a number from 0 to 256"],
    ),
    (
        "a_negative_count",
        "count = -1",
        &["shop.toml:5: service.shop.server.count: -1 is out of range, write a number from 0 to 256"],
    ),
    (
        "a_count_in_words",
        r#"count = "four""#,
        &[r#"shop.toml:5: service.shop.server.count: "four" is text, write a number: count = 4"#],
    ),
    (
        "a_count_with_a_fraction",
        "count = 2.5",
        &["shop.toml:5: service.shop.server.count: 2.5 is a fraction, write a number: count = 4"],
    ),
    (
        "a_count_no_integer_holds",
        "count = 99999999999999999999",
        &[
            "shop.toml:5: service.shop.server.count: 99999999999999999999 is out of range, write for example 4",
        ],
    ),
    (
        "no_server_at_all",
        "count = 0",
        &[
            "shop.toml:5: service.shop.server.count: 0 leaves no server to run, write 1 or more, or name some servers",
        ],
    ),
    (
        "named_servers_beyond_the_slots",
        r#"count = 256
[[service.shop.servers]]
name = "big""#,
        &[
            "shop.toml:5: service.shop.server.count: 256 numbered and 1 named servers are 257, write 256 at most in all",
        ],
    ),
    (
        "a_life_that_is_too_short",
        r#"max_age = "100ms""#,
        &[r#"shop.toml:5: service.shop.server.max_age: "100ms" is too short, write at least "1s""#],
    ),
    (
        "a_life_of_no_connection",
        "max_connections = 0",
        &[
            "shop.toml:5: service.shop.server.max_connections: 0 is out of range, write a number from 1 to 4294967295",
        ],
    ),
    (
        "memory_without_a_unit",
        "memory_limit = 512",
        &[r#"shop.toml:5: service.shop.server.memory_limit: "512" has no unit, write "512MiB""#],
    ),
    (
        "memory_that_is_nothing",
        r#"memory_limit = "lots""#,
        &[
            r#"shop.toml:5: service.shop.server.memory_limit: "lots" is no amount of memory, write for example "512MiB" or "2GiB""#,
        ],
    ),
    (
        "jitter_beyond_the_whole",
        r#"jitter = "110%""#,
        &[
            r#"shop.toml:5: service.shop.server.jitter: "110%" is no fraction, write for example "10%", at most "100%""#,
        ],
    ),
    (
        "jitter_in_words",
        r#"jitter = "some""#,
        &[
            r#"shop.toml:5: service.shop.server.jitter: "some" is no fraction, write for example "10%", at most "100%""#,
        ],
    ),
    (
        "a_roll_that_may_do_nothing",
        "[service.shop.roll]\nmax_surge = 0",
        &[
            "shop.toml:6: service.shop.roll.max_surge: 0 leaves nothing that may be restarted, because max_unavailable is 0 too, write 1 or more for one of them",
        ],
    ),
    (
        "a_surge_beyond_the_slots",
        "[service.shop.roll]\nmax_surge = 257",
        &["shop.toml:6: service.shop.roll.max_surge: 257 is out of range, write a number from 0 to 256"],
    ),
    (
        "a_socket_mode_that_is_mistyped",
        r#"socket = "sytemd""#,
        &[r#"shop.toml:5: service.shop.server.socket: "sytemd" is unknown, did you mean "systemd"?"#],
    ),
    (
        "a_socket_mode_that_is_invented",
        r#"socket = "tcp""#,
        &[
            r#"shop.toml:5: service.shop.server.socket: "tcp" is unknown, write one of "own", "systemd", "stdin""#,
        ],
    ),
    (
        "a_readiness_that_is_invented",
        r#"readiness = "soon""#,
        &[
            r#"shop.toml:5: service.shop.server.readiness: "soon" is unknown, write one of "listening", "notify", "check""#,
        ],
    ),
    (
        "a_limit_of_nothing",
        "limit = 0",
        &["shop.toml:5: service.shop.server.limit: 0 is out of range, write a number from 1 to 1000000"],
    ),
    (
        "a_limit_the_kernel_cannot_count",
        "limit = 1000001",
        &[
            "shop.toml:5: service.shop.server.limit: 1000001 is out of range, write a number from 1 to 1000000",
        ],
    ),
    (
        "a_weight_of_nothing",
        "weight = 0",
        &["shop.toml:5: service.shop.server.weight: 0 is out of range, write a number from 1 to 1000"],
    ),
    (
        "a_weight_too_heavy",
        "weight = 1001",
        &["shop.toml:5: service.shop.server.weight: 1001 is out of range, write a number from 1 to 1000"],
    ),
    (
        "a_weight_that_is_a_truth",
        "weight = true",
        &["shop.toml:5: service.shop.server.weight: true is a boolean, write a number: weight = 100"],
    ),
    (
        "a_backlog_of_nothing",
        "backlog = 0",
        &["shop.toml:5: service.shop.server.backlog: 0 is out of range, write a number from 1 to 65535"],
    ),
    (
        "cpus_that_are_not_here",
        r#"cpus = "2-5,9""#,
        &[
            r#"shop.toml:5: service.shop.server.cpus: "2-5,9" names CPU 4-5,9, which this machine does not have, write CPUs of "0-3""#,
        ],
    ),
    (
        "cpus_that_are_no_list",
        r#"cpus = "all""#,
        &[
            r#"shop.toml:5: service.shop.server.cpus: "all" is no list of CPUs, write for example "0-3" or "0-3,8", or "node0", "spread" or "spread:nodes""#,
        ],
    ),
    (
        "cpus_backwards",
        r#"cpus = "3-0""#,
        &[r#"shop.toml:5: service.shop.server.cpus: "3-0" counts backwards, write "0-3""#],
    ),
    (
        "nodes_that_are_not_here",
        r#"cpus = "node1-2""#,
        &[
            r#"shop.toml:5: service.shop.server.cpus: "node1-2" names NUMA node 2, which this machine does not have, write NUMA nodes of "0-1""#,
        ],
    ),
    (
        "nodes_that_are_no_list",
        r#"cpus = "nodes""#,
        &[
            r#"shop.toml:5: service.shop.server.cpus: "nodes" is no list of NUMA nodes, write for example "node0" or "node0-1""#,
        ],
    ),
    (
        "cpus_spread_over_something_else",
        r#"cpus = "spread:cores""#,
        &[
            r#"shop.toml:5: service.shop.server.cpus: "spread:cores" is no list of CPUs, write for example "0-3" or "0-3,8", or "node0", "spread" or "spread:nodes""#,
        ],
    ),
    (
        "cpus_as_a_list_of_numbers",
        "cpus = [0, 1]",
        &[r#"shop.toml:5: service.shop.server.cpus: [0, 1] is a list, write text: cpus = "0-3""#],
    ),
    (
        "a_user_nobody_knows",
        r#"user = "no-such-user""#,
        &[
            r#"shop.toml:5: service.shop.server.user: "no-such-user" is no user of this machine, write one that `getent passwd` lists"#,
        ],
    ),
    (
        "a_user_number_without_a_group",
        "user = 4000000000",
        &[
            "shop.toml:5: service.shop.server.user: 4000000000 has no entry in the user database, write its group as well",
        ],
    ),
    (
        "a_group_nobody_knows",
        r#"user = "root"
group = "no-such-group""#,
        &[
            r#"shop.toml:6: service.shop.server.group: "no-such-group" is no group of this machine, write one that `getent group` lists"#,
        ],
    ),
    (
        "a_group_without_a_user",
        r#"group = "root""#,
        &[r#"shop.toml:5: service.shop.server.group: "root" is set without a user, write user as well"#],
    ),
    (
        "a_duration_without_a_unit",
        r#"stop_timeout = "30""#,
        &[r#"shop.toml:5: service.shop.server.stop_timeout: "30" has no unit, write "30s""#],
    ),
    (
        "a_duration_that_is_a_number",
        "stop_timeout = 30",
        &[r#"shop.toml:5: service.shop.server.stop_timeout: 30 has no unit, write "30s""#],
    ),
    (
        "a_duration_with_a_fraction",
        r#"start_timeout = "1.5s""#,
        &[
            r#"shop.toml:5: service.shop.server.start_timeout: "1.5s" is no duration, write for example "500ms", "30s" or "1m30s""#,
        ],
    ),
    (
        "a_duration_beyond_a_year",
        r#"drain_timeout = "9000h""#,
        &[
            r#"shop.toml:5: service.shop.server.drain_timeout: "9000h" is longer than a year, write at most "8760h""#,
        ],
    ),
    (
        "a_start_that_gets_no_time",
        r#"start_timeout = "0s""#,
        &[r#"shop.toml:5: service.shop.server.start_timeout: "0s" is too short, write at least "1ms""#],
    ),
    (
        "a_backup_that_is_no_boolean",
        r#"backup = "yes""#,
        &[r#"shop.toml:5: service.shop.server.backup: "yes" is text, write true or false: backup = true"#],
    ),
    (
        "a_check_that_nobody_described",
        r#"readiness = "check""#,
        &[
            r#"shop.toml:5: service.shop.server.readiness: "check" needs to know how to check, write [service.shop.check] as well"#,
        ],
    ),
    (
        "a_check_without_a_type",
        "[service.shop.check]\ninterval = \"1s\"",
        &[r#"shop.toml:5: service.shop.check.type: is missing, write type = "tcp", "http" or "command""#],
    ),
    (
        "a_check_of_an_unknown_type",
        "[service.shop.check]\ntype = \"htp\"",
        &[r#"shop.toml:6: service.shop.check.type: "htp" is unknown, did you mean "http"?"#],
    ),
    (
        "a_path_for_a_check_that_has_none",
        "[service.shop.check]\ntype = \"tcp\"\npath = \"/health\"\ncommand = [\"well\"]",
        &[
            r#"shop.toml:7: service.shop.check.path: stands beside type "tcp", leave it out, or write type = "http""#,
            r#"shop.toml:8: service.shop.check.command: stands beside type "tcp", leave it out, or write type = "command""#,
        ],
    ),
    (
        "a_path_that_is_none",
        "[service.shop.check]\ntype = \"http\"\npath = \"health\"\nhost = \"a b\"",
        &[
            r#"shop.toml:7: service.shop.check.path: "health" is no path, write one that begins with / and has no spaces: "/health""#,
            r#"shop.toml:8: service.shop.check.host: "a b" is no host, write what clients name: "shop.example""#,
        ],
    ),
    (
        "statuses_that_are_none",
        "[service.shop.check]\ntype = \"http\"\nstatus = [\"399-200\", 99, \"2xx\"]",
        &[
            r#"shop.toml:7: service.shop.check.status: "399-200" is no status, write 100 to 599, or a range: "200-399""#,
            r#"shop.toml:7: service.shop.check.status: "99" is no status, write 100 to 599, or a range: "200-399""#,
            r#"shop.toml:7: service.shop.check.status: "2xx" is no status, write 100 to 599, or a range: "200-399""#,
        ],
    ),
    (
        "no_status_at_all",
        "[service.shop.check]\ntype = \"http\"\nstatus = []",
        &[
            r#"shop.toml:7: service.shop.check.status: [] lists no status, write those of a good answer: status = ["200-399"]"#,
        ],
    ),
    (
        "a_check_by_no_command",
        "[service.shop.check]\ntype = \"command\"",
        &[
            r#"shop.toml:5: service.shop.check.command: is missing, write the program and its arguments: command = ["/usr/bin/program", "argument"]"#,
        ],
    ),
    (
        "a_fast_interval_that_is_slower",
        "[service.shop.check]\ntype = \"tcp\"\ninterval = \"1s\"\nfast_interval = \"2s\"",
        &[
            r#"shop.toml:8: service.shop.check.fast_interval: "2s" is longer than interval (1s), write at most that"#,
        ],
    ),
    (
        "checks_without_a_pause",
        "[service.shop.check]\ntype = \"tcp\"\ninterval = \"1ms\"\ntimeout = \"1ms\"\nrise = 0\nfall = 0",
        &[
            r#"shop.toml:7: service.shop.check.interval: "1ms" is too short, write at least "50ms""#,
            r#"shop.toml:8: service.shop.check.timeout: "1ms" is too short, write at least "10ms""#,
            r#"shop.toml:9: service.shop.check.rise: 0 is out of range, write a number from 1 to 1000"#,
            r#"shop.toml:10: service.shop.check.fall: 0 is out of range, write a number from 1 to 1000"#,
        ],
    ),
    (
        "what_belongs_to_a_check_elsewhere",
        "fall = 3",
        &["shop.toml:5: service.shop.server.fall: belongs in [service.shop.check], write it there"],
    ),
    (
        "a_remedy_for_what_is_not_looked_for",
        "move_queue = true\nhang_kill = \"1s\"",
        &[
            "shop.toml:5: service.shop.server.move_queue: needs to know when it hangs, write stall_after as well",
            "shop.toml:6: service.shop.server.hang_kill: needs to know when it hangs, write stall_after as well",
        ],
    ),
    (
        "two_remedies_at_once",
        "stall_after = \"1ms\"\nmove_queue = true\nhang_kill = \"1s\"",
        &[
            r#"shop.toml:5: service.shop.server.stall_after: "1ms" is too short, write at least "100ms""#,
            r#"shop.toml:7: service.shop.server.hang_kill: "1s" stands beside move_queue, which has it started again at once, write only one of them"#,
        ],
    ),
    (
        "a_watchdog_that_leaves_no_time",
        r#"watchdog = "0s""#,
        &[r#"shop.toml:5: service.shop.server.watchdog: "0s" is too short, write at least "100ms""#],
    ),
    (
        "a_signal_that_is_mistyped",
        r#"stop_signal = "SIGTREM""#,
        &[r#"shop.toml:5: service.shop.server.stop_signal: "TREM" is unknown, did you mean "TERM"?"#],
    ),
    (
        "a_signal_as_a_number",
        "stop_signal = 15",
        &[
            r#"shop.toml:5: service.shop.server.stop_signal: 15 is a number, write text: stop_signal = "TERM""#,
        ],
    ),
    (
        "a_signal_by_its_number_as_text",
        r#"stop_signal = "15""#,
        &[
            r#"shop.toml:5: service.shop.server.stop_signal: "15" is unknown, write one of "TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "WINCH", "ABRT", "KILL""#,
        ],
    ),
    (
        "an_umask_that_is_not_octal",
        r#"umask = "0029""#,
        &[
            r#"shop.toml:5: service.shop.server.umask: "0029" is no file mode, write octal digits from "0000" to "0777""#,
        ],
    ),
    (
        "an_umask_as_a_number",
        "umask = 22",
        &[r#"shop.toml:5: service.shop.server.umask: 22 is a number, write text: umask = "0022""#],
    ),
    (
        "an_umask_with_leading_zeros_unquoted",
        "umask = 0022",
        &[r#"shop.toml:5: not TOML: a number begins with 0, write modes and masks as text: "0600""#],
    ),
    (
        "an_output_that_is_relative",
        r#"output = "shop.log""#,
        &[
            r#"shop.toml:5: service.shop.server.output: "shop.log" is not an absolute path, write "inherit" or one that begins with /"#,
        ],
    ),
    (
        "errors_that_are_relative",
        r#"errors = "log/{name}""#,
        &[
            r#"shop.toml:5: service.shop.server.errors: "log/{name}" is not an absolute path, write "inherit" or one that begins with /"#,
        ],
    ),
    (
        "a_directory_that_is_relative",
        r#"directory = "srv/{name}""#,
        &[
            r#"shop.toml:5: service.shop.server.directory: "srv/{name}" is not an absolute path, write one that begins with /"#,
        ],
    ),
    (
        "a_directory_with_an_unknown_name",
        r#"directory = "/srv/{port}""#,
        &[
            r#"shop.toml:5: service.shop.server.directory: "/srv/{port}" names {port}, write {name}, {index} or {service}, or {{port}} for the braces themselves"#,
        ],
    ),
    (
        "a_directory_with_half_a_brace",
        r#"directory = "/srv/{name""#,
        &[
            r#"shop.toml:5: service.shop.server.directory: "/srv/{name" has a single brace, write {{ for { and }} for }"#,
        ],
    ),
    (
        "a_directory_with_a_nul",
        r#"directory = "/srv/\u0000""#,
        &[
            r#"shop.toml:5: service.shop.server.directory: "/srv/\0" contains a NUL character, write it without"#,
        ],
    ),
    (
        "a_variable_that_is_ours",
        r#"environment = { DIST_CTL_SERVER = "me", LISTEN_FDS = "3" }"#,
        &[
            r#"shop.toml:5: service.shop.server.environment.DIST_CTL_SERVER: "DIST_CTL_SERVER" is set by dist-ctl itself, write another name"#,
            r#"shop.toml:5: service.shop.server.environment.LISTEN_FDS: "LISTEN_FDS" is set by dist-ctl itself, write another name"#,
        ],
    ),
    (
        "a_variable_without_a_name",
        r#"environment = { "A=B" = "c" }"#,
        &[
            r#"shop.toml:5: service.shop.server.environment."A=B": "A=B" is no name of a variable, write one without = and not empty"#,
        ],
    ),
    (
        "a_variable_that_is_a_number",
        "environment = { PORT = 8080 }",
        &[
            r#"shop.toml:5: service.shop.server.environment.PORT: 8080 is a number, write text: PORT = "8080""#,
        ],
    ),
    (
        "variables_as_a_list",
        r#"environment = ["PORT=8080"]"#,
        &[
            r#"shop.toml:5: service.shop.server.environment: ["PORT=8080"] is a list, write a table: environment = { NAME = "value" }"#,
        ],
    ),
    (
        "a_resource_that_is_mistyped",
        "limits = { nofiles = 1024 }",
        &[r#"shop.toml:5: service.shop.server.limits.nofiles: "nofiles" is unknown, did you mean "nofile"?"#],
    ),
    (
        "a_resource_limit_in_words",
        r#"limits = { nofile = "many" }"#,
        &[
            r#"shop.toml:5: service.shop.server.limits.nofile: "many" is no limit, write a number or "unlimited""#,
        ],
    ),
    (
        "a_resource_limit_below_nothing",
        "limits = { core = -1 }",
        &[r#"shop.toml:5: service.shop.server.limits.core: "-1" is no limit, write a number or "unlimited""#],
    ),
    (
        "a_restart_without_a_pause",
        r#"[service.shop.server.restart]
delay = "0s""#,
        &[r#"shop.toml:6: service.shop.server.restart.delay: "0s" is too short, write at least "10ms""#],
    ),
    (
        "a_restart_delay_above_its_maximum",
        r#"[service.shop.server.restart]
delay = "1m""#,
        &[
            r#"shop.toml:6: service.shop.server.restart.delay: "1m" makes delay (60s) longer than max_delay (30s), write a delay of at most max_delay"#,
        ],
    ),
    (
        "a_restart_maximum_below_the_delay",
        r#"[service.shop.server.restart]
delay = "2s"
max_delay = "1s""#,
        &[
            r#"shop.toml:7: service.shop.server.restart.max_delay: "1s" makes delay (2s) longer than max_delay (1s), write a delay of at most max_delay"#,
        ],
    ),
    (
        "a_restart_field_one_table_too_high",
        "give_up_after = 3",
        &[
            "shop.toml:5: service.shop.server.give_up_after: belongs in [service.shop.server.restart], write it there",
        ],
    ),
    (
        "restart_as_a_text",
        r#"restart = "always""#,
        &[
            r#"shop.toml:5: service.shop.server.restart: "always" is text, write [service.shop.server.restart]"#,
        ],
    ),
    (
        "a_field_that_is_mistyped",
        r#"stop-timeout = "3s""#,
        &[r#"shop.toml:5: service.shop.server.stop-timeout: unknown field, did you mean "stop_timeout"?"#],
    ),
    (
        "a_field_that_is_not_there_yet",
        r#"health = "/""#,
        &[
            "shop.toml:5: service.shop.server.health: unknown field, write one of restart, command, weight, limit, cpus, watchdog, stall_after, move_queue, hang_kill, max_age, max_connections, memory_limit, backup, environment, directory, output, errors, count, socket, readiness, user, group, umask, stop_signal, stop_timeout, start_timeout, drain_timeout, slow_start, jitter, limits, backlog",
        ],
    ),
    (
        "a_field_of_the_service",
        r#"policy = "first""#,
        &["shop.toml:5: service.shop.server.policy: belongs in [service.shop], write it there"],
    ),
    (
        "a_field_of_load",
        "floor = 10",
        &["shop.toml:5: service.shop.server.floor: belongs in [service.shop.load], write it there"],
    ),
    (
        "a_named_server_without_a_name",
        r"[[service.shop.servers]]
weight = 2",
        &[
            r#"shop.toml:5: service.shop.servers[1].name: is missing, write what this server is called: name = "big""#,
        ],
    ),
    (
        "a_named_server_with_a_number",
        r#"[[service.shop.servers]]
name = "7""#,
        &[
            r#"shop.toml:6: service.shop.servers[1].name: "7" is a number, as the servers without a name have, write for example "server-7""#,
        ],
    ),
    (
        "a_named_server_with_a_name_of_another_kind",
        r"[[service.shop.servers]]
name = 7",
        &[r#"shop.toml:6: service.shop.servers[1].name: 7 is a number, write text: name = "big""#],
    ),
    (
        "a_named_server_with_a_path_for_a_name",
        r#"[[service.shop.servers]]
name = "../etc""#,
        &[
            r#"shop.toml:6: service.shop.servers[1].name: "../etc" is no name, write 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or a digit"#,
        ],
    ),
    (
        "two_servers_of_one_name",
        r#"[[service.shop.servers]]
name = "big"
[[service.shop.servers]]
name = "big""#,
        &[r#"shop.toml:8: service.shop.servers[2].name: "big" is the name of two servers, write another"#],
    ),
    (
        "a_named_server_with_a_shared_field",
        r#"[[service.shop.servers]]
name = "big"
socket = "stdin""#,
        &["shop.toml:7: service.shop.servers.big.socket: belongs in [service.shop.server], write it there"],
    ),
    (
        "a_named_server_with_fields_of_the_service",
        r#"[[service.shop.servers]]
name = "big"
max = 3
max_surge = 2"#,
        &[
            "shop.toml:7: service.shop.servers.big.max: belongs in [service.shop.scale], write it there",
            "shop.toml:8: service.shop.servers.big.max_surge: belongs in [service.shop.roll], write it there",
        ],
    ),
    (
        "a_named_server_out_of_range",
        r#"[[service.shop.servers]]
name = "big"
weight = 2000"#,
        &[
            "shop.toml:7: service.shop.servers.big.weight: 2000 is out of range, write a number from 1 to 1000",
        ],
    ),
    (
        "a_named_server_in_single_brackets",
        r#"[service.shop.servers]
name = "big""#,
        &["shop.toml:5: service.shop.servers: is a table, write [[service.shop.servers]]"],
    ),
    (
        "one_shared_mistake_is_told_once",
        r#"count = 4
output = "/log/{server}""#,
        &[
            r#"shop.toml:6: service.shop.server.output: "/log/{server}" names {server}, write {name}, {index} or {service}, or {{server}} for the braces themselves"#,
        ],
    ),
    (
        "all_mistakes_are_told_in_order",
        r#"weight = 0
limit = "no"
user = "no-such-user"
colour = "red""#,
        &[
            "shop.toml:5: service.shop.server.weight: 0 is out of range, write a number from 1 to 1000",
            r#"shop.toml:6: service.shop.server.limit: "no" is text, write a number: limit = 200"#,
            r#"shop.toml:7: service.shop.server.user: "no-such-user" is no user of this machine, write one that `getent passwd` lists"#,
            "shop.toml:8: service.shop.server.colour: unknown field, write one of restart, command, weight, limit, cpus, watchdog, stall_after, move_queue, hang_kill, max_age, max_connections, memory_limit, backup, environment, directory, output, errors, count, socket, readiness, user, group, umask, stop_signal, stop_timeout, start_timeout, drain_timeout, slow_start, jitter, limits, backlog",
        ],
    ),
];

/// What may be wrong with waiting. Goes behind `SERVICE` and `[service.shop.waiting]`, so its
/// first line is line 6.
const WAITING: &[Row] = &[
    (
        "a_capacity_above_the_most",
        "capacity = 16385",
        &[
            "shop.toml:6: service.shop.waiting.capacity: 16385 is out of range, write a number from 0 to 16384",
        ],
    ),
    (
        "a_negative_capacity",
        "capacity = -1",
        &["shop.toml:6: service.shop.waiting.capacity: -1 is out of range, write a number from 0 to 16384"],
    ),
    (
        "a_capacity_in_words",
        r#"capacity = "none""#,
        &[r#"shop.toml:6: service.shop.waiting.capacity: "none" is text, write a number: capacity = 1024"#],
    ),
    (
        "a_wait_that_is_none",
        r#"timeout = "9ms""#,
        &[r#"shop.toml:6: service.shop.waiting.timeout: "9ms" is too short, write at least "10ms""#],
    ),
    (
        "a_wait_without_a_unit",
        "timeout = 30",
        &[r#"shop.toml:6: service.shop.waiting.timeout: 30 has no unit, write "30s""#],
    ),
    (
        "a_wait_that_is_no_duration",
        r#"timeout = "never""#,
        &[
            r#"shop.toml:6: service.shop.waiting.timeout: "never" is no duration, write for example "500ms", "30s" or "1m30s""#,
        ],
    ),
    (
        "an_empty_reply",
        r#"reply = """#,
        &[
            "shop.toml:6: service.shop.waiting.reply: is empty, write what a client is to be told, or leave it out to reset the connection",
        ],
    ),
    (
        "a_reply_that_is_a_number",
        "reply = 503",
        &[
            r#"shop.toml:6: service.shop.waiting.reply: 503 is a number, write text: reply = "HTTP/1.1 503 Service Unavailable\r\n\r\n""#,
        ],
    ),
    (
        "a_reply_in_a_file_that_is_not_there",
        r#"reply_file = "/no/such/reply""#,
        &[
            r#"shop.toml:6: service.shop.waiting.reply_file: "/no/such/reply" cannot be read: No such file or directory (os error 2); write the path of a file that holds the reply"#,
        ],
    ),
    (
        "a_reply_in_a_file_with_a_nul_in_its_name",
        r#"reply_file = "/reply\u0000""#,
        &[
            r#"shop.toml:6: service.shop.waiting.reply_file: "/reply\0" cannot be read: file name contained an unexpected NUL byte; write the path of a file that holds the reply"#,
        ],
    ),
    (
        "a_reply_from_a_device_that_never_ends",
        r#"reply_file = "/dev/zero""#,
        &[
            r#"shop.toml:6: service.shop.waiting.reply_file: "/dev/zero" is no regular file, write the path of one that holds the reply"#,
        ],
    ),
    (
        "a_reply_in_a_directory",
        r#"reply_file = "/""#,
        &[
            r#"shop.toml:6: service.shop.waiting.reply_file: "/" is no regular file, write the path of one that holds the reply"#,
        ],
    ),
    (
        "a_reply_in_a_file_with_a_relative_path",
        r#"reply_file = "busy.http""#,
        &[
            r#"shop.toml:6: service.shop.waiting.reply_file: "busy.http" is not an absolute path, write one that begins with /"#,
        ],
    ),
    (
        "two_replies",
        r#"reply = "busy"
reply_file = "/no/such/reply""#,
        &[
            r#"shop.toml:7: service.shop.waiting.reply_file: "/no/such/reply" stands beside reply, write only one of reply and reply_file"#,
        ],
    ),
    (
        "an_order_that_is_invented",
        r#"order = "random""#,
        &[r#"shop.toml:6: service.shop.waiting.order: "random" is unknown, write "first""#],
    ),
    (
        "an_order_that_is_mistyped",
        r#"order = "frist""#,
        &[r#"shop.toml:6: service.shop.waiting.order: "frist" is unknown, did you mean "first"?"#],
    ),
    (
        "a_field_of_waiting_that_is_mistyped",
        r#"time_out = "3s""#,
        &[r#"shop.toml:6: service.shop.waiting.time_out: unknown field, did you mean "timeout"?"#],
    ),
    (
        "a_field_of_waiting_that_is_invented",
        "priority = 3",
        &[
            "shop.toml:6: service.shop.waiting.priority: unknown field, write one of capacity, timeout, reply, reply_file, order",
        ],
    ),
    (
        "all_mistakes_of_waiting_are_told_in_order",
        r#"order = "last"
capacity = 20000
reply = ""
timeout = "0s""#,
        &[
            r#"shop.toml:6: service.shop.waiting.order: "last" is unknown, write "first""#,
            "shop.toml:7: service.shop.waiting.capacity: 20000 is out of range, write a number from 0 to 16384",
            "shop.toml:8: service.shop.waiting.reply: is empty, write what a client is to be told, or leave it out to reset the connection",
            r#"shop.toml:9: service.shop.waiting.timeout: "0s" is too short, write at least "10ms""#,
        ],
    ),
];

/// What may be wrong elsewhere; these are whole files.
const FILES: &[Row] = &[
    (
        "nothing_at_all",
        "",
        &[
            "shop.toml: service: there is none, write [service.NAME] with listen, and [service.NAME.server] with command",
        ],
    ),
    (
        "no_toml",
        r"[service.shop
listen = 3",
        &["shop.toml:1: not TOML: unclosed table, expected `]`"],
    ),
    (
        "one_field_twice",
        r#"[service.shop]
listen = [":1"]
listen = [":2"]"#,
        &["shop.toml:3: not TOML: duplicate key"],
    ),
    (
        "a_service_of_another_spelling",
        r#"[services.shop]
listen = [":8080"]"#,
        &[r#"shop.toml:1: services: unknown field, did you mean "service"?"#],
    ),
    (
        "a_service_that_is_a_text",
        r#"service = "shop""#,
        &[r#"shop.toml:1: service: "shop" is text, write [service.NAME]"#],
    ),
    (
        "a_service_that_is_a_number",
        r"[service]
shop = 3",
        &["shop.toml:2: service.shop: 3 is a number, write [service.shop]"],
    ),
    (
        "a_service_name_in_capitals",
        r#"[service.Shop]
listen = [":8080"]
[service.Shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:1: service.Shop: "Shop" is no name, write 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or a digit"#,
        ],
    ),
    (
        "a_service_name_with_a_dot",
        r#"[service."shop.v2"]
listen = [":8080"]
[service."shop.v2".server]
command = ["shop"]"#,
        &[
            r#"shop.toml:1: service."shop.v2": "shop.v2" is no name, write 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or a digit"#,
        ],
    ),
    (
        "no_listen_and_no_command",
        "[service.shop]",
        &[
            r#"shop.toml:1: service.shop.listen: is missing, write the addresses clients connect to: listen = ["[::]:8080"]"#,
            r#"shop.toml:1: service.shop.server.command: is missing, write the program and its arguments: command = ["/usr/bin/program", "argument"]"#,
        ],
    ),
    (
        "an_empty_command",
        r#"[service.shop]
listen = [":8080"]
[service.shop.server]
command = []"#,
        &[
            r#"shop.toml:4: service.shop.server.command: names no program, write for example ["/usr/bin/program", "argument"]"#,
        ],
    ),
    (
        "a_command_in_one_text",
        r#"[service.shop]
listen = [":8080"]
[service.shop.server]
command = "java -jar shop.jar""#,
        &[
            r#"shop.toml:4: service.shop.server.command: "java -jar shop.jar" is not a list, write command = ["java", "-jar", "shop.jar"]"#,
        ],
    ),
    (
        "a_command_with_a_number",
        r#"[service.shop]
listen = [":8080"]
[service.shop.server]
command = [
  "shop",
  8080,
]"#,
        &[r#"shop.toml:6: service.shop.server.command: 8080 is a number, write it as text: "8080""#],
    ),
    (
        "load_without_a_source",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
strength = 3
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:3: service.shop.load.sources: is missing, write what tells a server's load: sources = ["reported", "accept-queue"]"#,
        ],
    ),
    (
        "load_by_nothing",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
sources = []
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:4: service.shop.load.sources: [] names no source, write for example sources = ["reported", "accept-queue"]"#,
        ],
    ),
    (
        "load_by_a_source_that_is_mistyped",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
sources = ["accept_queue"]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:4: service.shop.load.sources: "accept_queue" is unknown, did you mean "accept-queue"?"#,
        ],
    ),
    (
        "load_by_a_source_that_is_invented",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
sources = ["memory"]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:4: service.shop.load.sources: "memory" is unknown, write one of "reported", "cpu-pressure", "accept-queue""#,
        ],
    ),
    (
        "load_by_one_source_twice",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
sources = ["reported", "reported"]
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:4: service.shop.load.sources: "reported" is listed twice, write it once"#],
    ),
    (
        "load_by_a_text",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
sources = "reported"
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:4: service.shop.load.sources: "reported" is not a list, write sources = ["reported"]"#,
        ],
    ),
    (
        "load_out_of_all_ranges",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
sources = ["reported"]
strength = 11
floor = 0
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:5: service.shop.load.strength: 11 is out of range, write a number from 1 to 10"#,
            r#"shop.toml:6: service.shop.load.floor: 0 is out of range, write a number from 1 to 100"#,
        ],
    ),
    (
        "load_without_weights",
        r#"[service.shop]
listen = [":8080"]
policy = "first"
[service.shop.load]
sources = ["reported"]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:4: service.shop.load: stands beside policy "first", which goes by the order and not by weights, leave it out"#,
        ],
    ),
    (
        "load_with_a_field_that_is_invented",
        r#"[service.shop]
listen = [":8080"]
[service.shop.load]
sources = ["reported"]
ceiling = 90
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:5: service.shop.load.ceiling: unknown field, write one of sources, strength, floor"#],
    ),
    (
        "a_slow_start_without_weights",
        r#"[service.shop]
listen = [":8080"]
policy = "first"
[service.shop.server]
command = ["shop"]
slow_start = "30s""#,
        &[
            r#"shop.toml:6: service.shop.server.slow_start: "30s" stands beside policy "first", which goes by the order and not by weights, leave it out"#,
        ],
    ),
    (
        "an_address_that_is_a_table",
        r#"[service.shop]
listen = [{ port = 8080 }]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:2: service.shop.listen: { port = 8080 } is a table, write texts only: listen = ["[::]:8080"]"#,
        ],
    ),
    (
        "a_command_with_an_unknown_name",
        r#"[service.shop]
listen = [":8080"]
[service.shop.server]
command = ["shop", "--port={port}"]"#,
        &[
            r#"shop.toml:4: service.shop.server.command: "--port={port}" names {port}, write {name}, {index} or {service}, or {{port}} for the braces themselves"#,
        ],
    ),
    (
        "a_command_beside_its_table",
        r#"[service.shop]
listen = [":8080"]
command = ["shop"]
[service.shop.server]
command = ["shop"]"#,
        &["shop.toml:3: service.shop.command: belongs in [service.shop.server], write it there"],
    ),
    (
        "a_listen_that_is_no_list",
        r#"[service.shop]
listen = ":8080"
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: service.shop.listen: ":8080" is not a list, write listen = [":8080"]"#],
    ),
    (
        "an_empty_listen",
        r#"[service.shop]
listen = []
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: service.shop.listen: [] lists no address, write one: listen = ["[::]:8080"]"#],
    ),
    (
        "too_many_addresses",
        r#"[service.shop]
listen = ["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"]
[service.shop.server]
command = ["shop"]"#,
        &["shop.toml:2: service.shop.listen: 17 addresses are too many, write 16 at most"],
    ),
    (
        "addresses_that_are_none",
        r#"[service.shop]
listen = [
  "localhost:80",
  "127.0.0.1",
  ":0",
  "[::]:70000",
]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:3: service.shop.listen: "localhost:80" is no numeric address with a port, write for example "127.0.0.1:8080", "[::1]:8080" or ":8080""#,
            r#"shop.toml:4: service.shop.listen: "127.0.0.1" has no port, write "127.0.0.1:8080""#,
            r#"shop.toml:5: service.shop.listen: ":0" has port 0, write a port from 1 to 65535"#,
            r#"shop.toml:6: service.shop.listen: "[::]:70000" has port 70000, write a port from 1 to 65535"#,
        ],
    ),
    (
        "one_address_twice",
        r#"[service.shop]
listen = [":80", ":80"]
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: service.shop.listen: ":80" is listed twice, write it once"#],
    ),
    (
        "one_address_in_two_spellings",
        r#"[service.shop]
listen = [":80", "[::]:80"]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:2: service.shop.listen: "[::]:80" has clients in common with ":80", write only one of them"#,
        ],
    ),
    (
        "an_address_covered_by_another",
        r#"[service.shop]
listen = ["0.0.0.0:80", "127.0.0.1:80"]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:2: service.shop.listen: "127.0.0.1:80" has clients in common with "0.0.0.0:80", write only one of them"#,
        ],
    ),
    (
        "two_services_on_one_port",
        r#"[service.cart]
listen = [":80"]
[service.cart.server]
command = ["cart"]
[service.shop]
listen = ["10.0.0.1:80"]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:6: service.shop.listen: "10.0.0.1:80" has clients in common with ":80" of service cart, write another address or port"#,
        ],
    ),
    (
        "several_addresses_for_stdin",
        r#"[service.shop]
listen = [":80", ":81"]
[service.shop.server]
command = ["shop"]
socket = "stdin""#,
        &[
            r#"shop.toml:5: service.shop.server.socket: "stdin" hands over one listener, but 2 addresses are listed, write "systemd" or list one"#,
        ],
    ),
    (
        "a_policy_that_is_mistyped",
        r#"[service.shop]
listen = [":80"]
policy = "least-conections"
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:3: service.shop.policy: "least-conections" is unknown, did you mean "least-connections"?"#,
        ],
    ),
    (
        "a_policy_that_is_invented",
        r#"[service.shop]
listen = [":80"]
policy = "fair"
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:3: service.shop.policy: "fair" is unknown, write one of "least-connections", "weighted-round-robin", "power-of-two", "source-hash", "first""#,
        ],
    ),
    (
        "a_table_that_is_not_there_yet",
        r#"[service.shop]
listen = [":80"]
[service.shop.metrics]
port = 10
[service.shop.server]
command = ["shop"]"#,
        &[
            "shop.toml:3: service.shop.metrics: unknown field, write one of listen, policy, occupied, waiting, scale, check, roll, limits, load, server, servers",
        ],
    ),
    (
        "waiting_as_a_number",
        r#"[service.shop]
listen = [":80"]
waiting = 100
[service.shop.server]
command = ["shop"]"#,
        &["shop.toml:3: service.shop.waiting: 100 is a number, write [service.shop.waiting]"],
    ),
    (
        "waiting_one_table_too_deep",
        r#"[service.shop]
listen = [":80"]
[service.shop.server]
command = ["shop"]
[service.shop.server.waiting]
capacity = 10"#,
        &["shop.toml:5: service.shop.server.waiting: belongs in [service.shop], write it there"],
    ),
    (
        "fields_of_waiting_everywhere_else",
        r#"[service.shop]
listen = [":80"]
capacity = 10
order = "first"
[service.shop.server]
command = ["shop"]
capacity = 10
timeout = "3s"
reply = "busy"
reply_file = "/busy"
[[service.shop.servers]]
name = "big"
capacity = 10
timeout = "3s""#,
        &[
            "shop.toml:3: service.shop.capacity: belongs in [service.shop.waiting], write it there",
            "shop.toml:4: service.shop.order: belongs in [service.shop.waiting], write it there",
            "shop.toml:7: service.shop.server.capacity: belongs in [service.shop.waiting], write it there",
            "shop.toml:8: service.shop.server.timeout: belongs in [service.shop.waiting], write it there",
            "shop.toml:9: service.shop.server.reply: belongs in [service.shop.waiting], write it there",
            "shop.toml:10: service.shop.server.reply_file: belongs in [service.shop.waiting], write it there",
            "shop.toml:13: service.shop.servers.big.capacity: belongs in [service.shop.waiting], write it there",
            "shop.toml:14: service.shop.servers.big.timeout: belongs in [service.shop.waiting], write it there",
        ],
    ),
    (
        "a_control_mode_that_is_a_number",
        r#"[control]
mode = 0o600
[service.shop]
listen = [":80"]
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: control.mode: 0o600 is a number, write text: mode = "0600""#],
    ),
    (
        "a_control_mode_that_keeps_the_owner_out",
        r#"[control]
mode = "0066"
[service.shop]
listen = [":80"]
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: control.mode: "0066" keeps its owner out, write "0600" or "0660""#],
    ),
    (
        "a_control_mode_that_keeps_the_readers_out",
        r#"[control]
mode = "0640"
readers = "root"
[service.shop]
listen = [":80"]
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: control.mode: "0640" keeps the readers' group out, write "0660""#],
    ),
    (
        "a_control_mode_with_special_bits",
        r#"[control]
mode = "4755"
[service.shop]
listen = [":80"]
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: control.mode: "4755" is no file mode, write octal digits from "0000" to "0777""#],
    ),
    (
        "an_owner_and_readers_nobody_knows",
        r#"[control]
owner = "no-such-user"
readers = "no-such-group"
[service.shop]
listen = [":80"]
[service.shop.server]
command = ["shop"]"#,
        &[
            r#"shop.toml:2: control.owner: "no-such-user" is no user of this machine, write one that `getent passwd` lists"#,
            r#"shop.toml:3: control.readers: "no-such-group" is no group of this machine, write one that `getent group` lists"#,
        ],
    ),
    (
        "a_control_field_that_is_mistyped",
        r#"[control]
reader = "root"
[service.shop]
listen = [":80"]
[service.shop.server]
command = ["shop"]"#,
        &[r#"shop.toml:2: control.reader: unknown field, did you mean "readers"?"#],
    ),
];

#[test]
fn wrong_servers_are_refused_with_these_sentences() {
    for (name, text, sentences) in SERVERS {
        assert_refused(name, &format!("{SERVICE}{text}"), sentences);
    }
}

#[test]
fn wrong_waiting_is_refused_with_these_sentences() {
    for (name, text, sentences) in WAITING {
        assert_refused(name, &format!("{SERVICE}[service.shop.waiting]\n{text}"), sentences);
    }
}

#[test]
fn a_reply_that_is_too_long_is_refused() {
    let text = format!("{SERVICE}[service.shop.waiting]\nreply = \"{}\"", "x".repeat(65_537));
    assert_refused(
        "65,537 bytes",
        &text,
        &["shop.toml:6: service.shop.waiting.reply: has 65537 bytes, which is too long, write 65536 at most"],
    );
}

#[test]
fn a_file_that_holds_no_reply_is_refused() {
    let path = std::env::temp_dir().join(format!("dist-ctl-test-no-reply-{}", std::process::id()));
    for (reply, sentence) in [
        ("", "is empty, fill it with what a client is to be told, or leave it out to reset the connection"),
        (&"x".repeat(65_537), "is too long, write the path of a file with 65536 bytes at most"),
    ] {
        std::fs::write(&path, reply).unwrap();
        let text = format!("{SERVICE}[service.shop.waiting]\nreply_file = {path:?}");
        let refused = Config::parse_for(&text, "shop.toml", &Counts::new(), &machine());
        std::fs::remove_file(&path).unwrap();
        let sentence = format!("shop.toml:6: service.shop.waiting.reply_file: {path:?} {sentence}");
        assert_eq!(refused.unwrap_err().sentences(), [sentence]);
    }
}

#[test]
fn wrong_files_are_refused_with_these_sentences() {
    for (name, text, sentences) in FILES {
        assert_refused(name, text, sentences);
    }
}

#[test]
fn more_named_servers_than_there_are_slots_are_refused() {
    let named: String =
        (0..257).map(|number| format!("[[service.shop.servers]]\nname = \"s{number}\"\n")).collect();
    assert_refused(
        "257 named servers",
        &format!("{SERVICE}{named}"),
        &["shop.toml:1: service.shop.servers: 257 named servers are too many, write 256 at most"],
    );
}

#[test]
fn a_file_that_cannot_be_read_is_refused_with_what_to_do() {
    let missing = Config::read("/no/such/file.toml".as_ref()).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "read configuration: /no/such/file.toml: No such file or directory (os error 2)"
    );
    let first_time = unreadable(DEFAULT_FILE.as_ref(), &io::ErrorKind::NotFound.into());
    assert_eq!(
        first_time.to_string(),
        "/etc/dist-ctl/dist-ctl.toml does not exist: write one (dist-ctl up --help shows how), name another with -f FILE, or say what to run: dist-ctl up --listen :8080 --servers 4 -- COMMAND"
    );
}

proptest! {
    // A case takes 20 ms in a debug build.
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A right configuration with some bytes changed is understood, or refused in sentences
    /// that say where.
    #[test]
    fn whatever_is_written_gets_an_answer(
        changes in prop::collection::vec((0..EXAMPLE.len(), "[ -~\n]{0,3}"), 1..4),
    ) {
        let mut text = EXAMPLE.to_owned();
        for (at, with) in changes {
            let at = at.min(text.len() - 1);
            text.replace_range(at..=at, &with);
        }
        if let Err(error) = Config::parse_for(&text, "shop.toml", &Counts::new(), &machine()) {
            prop_assert!(!error.sentences().is_empty());
            for sentence in error.sentences() {
                prop_assert!(sentence.starts_with("shop.toml:"), "{}", sentence);
                prop_assert!(!sentence.contains('\n'), "{}", sentence);
            }
        }
    }
}

#[test]
fn wrong_command_forms_are_refused_by_the_names_of_their_options() {
    let form = CommandForm {
        name: "App".to_owned(),
        listen: vec!["localhost:80".to_owned()],
        servers: 0,
        policy: Some("fast".to_owned()),
        limit: Some(0),
        weight: Some(0),
        waiting: Some(-1),
        socket: Some("fd".to_owned()),
        user: Some("no-such-user".to_owned()),
        command: vec!["{port}".to_owned()],
    };
    let refused = Config::from_command_for(&form, &Counts::new(), &machine()).unwrap_err();
    assert_eq!(
        refused.sentences(),
        [
            r#"--name: "App" is no name, write 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or a digit"#,
            r#"--listen: "localhost:80" is no numeric address with a port, write for example "127.0.0.1:8080", "[::1]:8080" or ":8080""#,
            r#"--socket: "fd" is unknown, write one of "own", "systemd", "stdin""#,
            r#"--user: "no-such-user" is no user of this machine, write one that `getent passwd` lists"#,
            r#"--policy: "fast" is unknown, write one of "least-connections", "weighted-round-robin", "power-of-two", "source-hash", "first""#,
            "--waiting: -1 is out of range, write a number from 0 to 16384",
            "--servers: 0 leaves no server to run, write 1 or more, or name some servers",
            r#"COMMAND: "{port}" names {port}, write {name}, {index} or {service}, or {{port}} for the braces themselves"#,
            "--weight: 0 is out of range, write a number from 1 to 1000",
            "--limit: 0 is out of range, write a number from 1 to 1000000",
        ]
    );
}

fn assert_refused(name: &str, text: &str, sentences: &[&str]) {
    match Config::parse_for(text, "shop.toml", &Counts::new(), &machine()) {
        Ok(config) => panic!("{name} was accepted as {config}"),
        Err(error) => assert_eq!(error.sentences(), sentences, "{name}"),
    }
}

fn machine() -> Machine {
    Machine { environment: Vec::new(), cpus_possible: Some(vec![0, 1, 2, 3]), nodes_possible: vec![0, 1] }
}
