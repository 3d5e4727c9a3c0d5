//! Wrong limits of a service and of its sources, and the sentences with which they are refused.

use super::{Row, SERVICE, assert_refused};

/// Goes behind `SERVICE` and `[service.shop.limits]`, so its first line is line 6.
const OF_SERVICE: &[Row] = &[
    (
        "no_connections_at_all",
        "connections = 0",
        &[
            "shop.toml:6: service.shop.limits.connections: 0 is out of range, write a number from 1 to 1000000",
        ],
    ),
    (
        "connections_in_words",
        r#"connections = "many""#,
        &[
            r#"shop.toml:6: service.shop.limits.connections: "many" is text, write a number: connections = 1000"#,
        ],
    ),
    (
        "a_rate_above_the_most",
        "rate = 1000001",
        &["shop.toml:6: service.shop.limits.rate: 1000001 is out of range, write a number from 1 to 1000000"],
    ),
    (
        "a_burst_without_a_rate",
        "connections = 5\nburst = 10",
        &["shop.toml:7: service.shop.limits.burst: 10 is set without a rate, write rate as well"],
    ),
    (
        "a_burst_of_nobody",
        "rate = 5\nburst = 0",
        &["shop.toml:7: service.shop.limits.burst: 0 is out of range, write a number from 1 to 1000000"],
    ),
    (
        "waiting_above_no_limit",
        r#"over = "wait""#,
        &[
            r#"shop.toml:6: service.shop.limits.over: "wait" is for who comes above a limit, and there is none: write connections or rate"#,
        ],
    ),
    (
        "waiting_where_nobody_may",
        "connections = 5\nover = \"wait\"\n[service.shop.waiting]\ncapacity = 0",
        &[
            r#"shop.toml:7: service.shop.limits.over: "wait" needs a waiting list, and its capacity is 0: write 1 to 16384 there, or "refuse" here"#,
        ],
    ),
    (
        "a_third_way",
        "connections = 5\nover = \"queue\"",
        &[r#"shop.toml:7: service.shop.limits.over: "queue" is unknown, write one of "refuse", "wait""#],
    ),
    (
        "a_field_of_sources_in_the_wrong_table",
        "rate = 5\nprefix_ipv4 = 24",
        &[
            "shop.toml:7: service.shop.limits.prefix_ipv4: belongs in [service.shop.limits.per_source], write it there",
        ],
    ),
    (
        "a_field_that_is_mistyped",
        "connection = 5",
        &[r#"shop.toml:6: service.shop.limits.connection: unknown field, did you mean "connections"?"#],
    ),
];

/// The same behind `[service.shop.limits.per_source]`.
const OF_SOURCES: &[Row] = &[
    (
        "a_prefix_of_nothing",
        "connections = 5\nprefix_ipv4 = 0",
        &[
            "shop.toml:7: service.shop.limits.per_source.prefix_ipv4: 0 is out of range, write a number from 1 to 32",
        ],
    ),
    (
        "a_prefix_longer_than_an_address",
        "connections = 5\nprefix_ipv6 = 129",
        &[
            "shop.toml:7: service.shop.limits.per_source.prefix_ipv6: 129 is out of range, write a number from 1 to 128",
        ],
    ),
    (
        "a_prefix_without_a_limit",
        "prefix_ipv4 = 24",
        &[
            "shop.toml:6: service.shop.limits.per_source.prefix_ipv4: 24 says nothing without a limit, write connections or rate as well",
        ],
    ),
    (
        "exempt_from_no_limit",
        r#"exempt = ["10.0.0.0/8"]"#,
        &[
            r#"shop.toml:6: service.shop.limits.per_source.exempt: ["10.0.0.0/8"] says nothing without a limit, write connections or rate as well"#,
        ],
    ),
    (
        "a_burst_of_sources_without_a_rate",
        "connections = 5\nburst = 10",
        &["shop.toml:7: service.shop.limits.per_source.burst: 10 is set without a rate, write rate as well"],
    ),
    (
        "a_prefix_with_more_bits_than_it_says",
        "rate = 5\nexempt = [\"10.1.2.3/8\", \"host\"]",
        &[
            r#"shop.toml:7: service.shop.limits.per_source.exempt: "10.1.2.3/8" has bits behind its prefix, write "10.0.0.0/8""#,
            r#"shop.toml:7: service.shop.limits.per_source.exempt: "host" is no prefix, write for example "10.0.0.0/8" or "2001:db8::/32""#,
        ],
    ),
    (
        "sources_that_wait",
        "rate = 5\nover = \"wait\"",
        &[
            "shop.toml:7: service.shop.limits.per_source.over: belongs in [service.shop.limits], write it there",
        ],
    ),
];

#[test]
fn wrong_limits_of_a_service_are_refused_with_these_sentences() {
    for (name, text, sentences) in OF_SERVICE {
        assert_refused(name, &format!("{SERVICE}[service.shop.limits]\n{text}"), sentences);
    }
}

#[test]
fn wrong_limits_of_sources_are_refused_with_these_sentences() {
    for (name, text, sentences) in OF_SOURCES {
        assert_refused(name, &format!("{SERVICE}[service.shop.limits.per_source]\n{text}"), sentences);
    }
}

#[test]
fn more_prefixes_than_the_kernel_looks_at_are_refused() {
    let prefixes: Vec<String> = (0..17).map(|number| format!("10.0.{number}.0/24")).collect();
    let text = format!("{SERVICE}[service.shop.limits.per_source]\nrate = 5\nexempt = {prefixes:?}");
    let sentence =
        "shop.toml:7: service.shop.limits.per_source.exempt: 17 prefixes are too many, write 16 at most";
    assert_refused("17 prefixes", &text, &[sentence]);
}
