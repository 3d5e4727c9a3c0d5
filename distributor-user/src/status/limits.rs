//! What an operator sees of the limits of a service and of its sources.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The limits of a service as a whole, and of each source of its clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitsStatus {
    /// The connections that count for the limit: those of servers. `null` without a limit.
    pub connections: Option<u64>,
    /// Those of them that were there before the limit was, or before their server was adopted.
    pub earlier: u32,
    /// What becomes of who comes above the service's: `refuse` or `wait`.
    pub over: String,
    pub service: CeilingStatus,
    /// `null` if sources may have anything.
    pub sources: Option<SourcesStatus>,
}

/// What the service or a source may have, and who came above it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CeilingStatus {
    /// Connections at a time.
    pub limit: Option<u32>,
    pub rate: Option<RateStatus>,
    /// How often one was refused: because of the limit, and because of the rate.
    pub refused_limit: u64,
    pub refused_rate: u64,
    /// When one was last refused, or made to wait; `null`: never.
    pub limit_seconds_ago: Option<f64>,
    pub rate_seconds_ago: Option<f64>,
}

/// New connections.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RateStatus {
    pub per_second: u32,
    pub burst: u32,
}

/// The sources of a service's clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourcesStatus {
    /// Sources that have connections.
    pub now: u64,
    /// The one that has most.
    pub most: Option<SourceStatus>,
    /// How often one could not be counted for its source, because the table was full.
    pub unknown: u64,
    /// What each may have.
    pub each: CeilingStatus,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// `192.0.2.1/32`
    pub source: String,
    pub connections: u64,
}

/// `limit 9871 of 10000, 500/s, refused 12; sources limit 100, 20/s, refused 7 (192.0.2.1/32 has 12)`
impl fmt::Display for LimitsStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_service = self.service.limit.is_some() || self.service.rate.is_some();
        if has_service {
            self.service.write(f, self.connections)?;
        }
        let Some(sources) = &self.sources else { return Ok(()) };
        f.write_str(if has_service { "; sources " } else { "sources " })?;
        sources.each.write(f, None)?;
        match &sources.most {
            Some(most) => write!(f, " ({} has {})", most.source, most.connections),
            None => Ok(()),
        }
    }
}

impl CeilingStatus {
    fn write(&self, f: &mut fmt::Formatter<'_>, now: Option<u64>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(limit) = self.limit {
            parts.push(match now {
                Some(now) => format!("limit {now} of {limit}"),
                None => format!("limit {limit}"),
            });
        }
        if let Some(rate) = self.rate {
            parts.push(format!("{}/s", rate.per_second));
        }
        if self.refused_limit + self.refused_rate > 0 {
            parts.push(format!("refused {}", self.refused_limit + self.refused_rate));
        }
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ceiling(limit: Option<u32>, per_second: Option<u32>, refused: u64) -> CeilingStatus {
        CeilingStatus {
            limit,
            rate: per_second.map(|per_second| RateStatus { per_second, burst: 9 }),
            refused_limit: refused,
            ..CeilingStatus::default()
        }
    }

    #[test]
    fn json_has_every_field_and_null_for_what_has_no_value() {
        let limits = LimitsStatus {
            connections: None,
            earlier: 3,
            over: "wait".to_owned(),
            service: CeilingStatus { rate_seconds_ago: Some(1.5), ..ceiling(None, Some(5), 0) },
            sources: Some(SourcesStatus {
                now: 4,
                most: Some(SourceStatus { source: "::1/64".to_owned(), connections: 2 }),
                unknown: 1,
                each: ceiling(Some(2), None, 8),
            }),
        };
        let expected = serde_json::json!({
            "connections": null, "earlier": 3, "over": "wait",
            "service": {
                "limit": null, "rate": {"per_second": 5, "burst": 9}, "refused_limit": 0, "refused_rate": 0,
                "limit_seconds_ago": null, "rate_seconds_ago": 1.5
            },
            "sources": {
                "now": 4, "most": {"source": "::1/64", "connections": 2}, "unknown": 1,
                "each": {
                    "limit": 2, "rate": null, "refused_limit": 8, "refused_rate": 0,
                    "limit_seconds_ago": null, "rate_seconds_ago": null
                }
            }
        });
        assert_eq!(serde_json::to_value(limits).unwrap(), expected);
    }

    #[test]
    fn the_line_says_what_there_is_to_say() {
        let sources = |each: CeilingStatus, most: Option<(&str, u64)>| SourcesStatus {
            now: 1,
            most: most.map(|(source, connections)| SourceStatus { source: source.to_owned(), connections }),
            unknown: 0,
            each,
        };
        for (service, of_sources, said) in [
            (ceiling(Some(10), None, 0), None, "limit 7 of 10"),
            (ceiling(Some(10), Some(5), 3), None, "limit 7 of 10, 5/s, refused 3"),
            (ceiling(None, Some(5), 0), None, "5/s"),
            (
                ceiling(None, None, 0),
                Some(sources(ceiling(Some(2), None, 4), None)),
                "sources limit 2, refused 4",
            ),
            (
                ceiling(Some(10), None, 0),
                Some(sources(ceiling(None, Some(8), 0), Some(("192.0.2.1/32", 6)))),
                "limit 7 of 10; sources 8/s (192.0.2.1/32 has 6)",
            ),
        ] {
            let limits = LimitsStatus {
                connections: service.limit.map(|_| 7),
                earlier: 0,
                over: "refuse".to_owned(),
                service,
                sources: of_sources,
            };
            assert_eq!(limits.to_string(), said);
        }
    }
}
