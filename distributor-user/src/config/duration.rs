//! Durations as people write them: `500ms`, `2s`, `1m30s`, `1h`.
//!
//! Every number has a unit, because "30" means seconds to one program and milliseconds to
//! the next.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Nothing here takes longer than a year; more is a typing error.
const LONGEST: Duration = Duration::from_hours(8760);

/// Milliseconds of each unit, in the order in which they may follow each other.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// The duration, or a sentence that begins with the refused text.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let unclear = || format!("{text:?} is no duration, write for example \"500ms\", \"30s\" or \"1m30s\"");
    if text.parse::<u64>().is_ok() {
        return Err(format!("{text:?} has no unit, write \"{text}s\""));
    }
    let mut total: u64 = 0;
    let mut units = UNITS.iter();
    let mut rest = text;
    while !rest.is_empty() || text.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let number: u64 = number.parse().map_err(|_| unclear())?;
        // The iterator goes on behind the last unit found, so none comes twice or too late.
        let (_, millis) = units.find(|(name, _)| *name == unit).ok_or_else(unclear)?;
        total = number.checked_mul(*millis).and_then(|part| total.checked_add(part)).ok_or_else(unclear)?;
        rest = tail;
    }
    let duration = Duration::from_millis(total);
    match duration > LONGEST {
        true => Err(format!("{text:?} is longer than a year, write at most \"8760h\"")),
        false => Ok(duration),
    }
}

/// The duration as a person would write it, for `parse` to read: `1m30s`.
pub(crate) fn write(duration: Duration) -> String {
    let mut millis = duration.as_millis();
    let mut text = String::new();
    for (name, size) in UNITS {
        let size = u128::from(size);
        if millis >= size {
            text += &format!("{}{name}", millis / size);
            millis %= size;
        }
    }
    match text.is_empty() {
        true => "0s".to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read() {
        for (text, millis) in [
            ("0s", 0),
            ("500ms", 500),
            ("2s", 2_000),
            ("1m30s", 90_000),
            ("90s", 90_000),
            ("1h1ms", 3_600_001),
            ("8760h", 31_536_000_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_duration_is_refused() {
        let unclear =
            |text| format!("{text:?} is no duration, write for example \"500ms\", \"30s\" or \"1m30s\"");
        for (text, sentence) in [
            ("30", "\"30\" has no unit, write \"30s\"".to_owned()),
            ("8761h", "\"8761h\" is longer than a year, write at most \"8760h\"".to_owned()),
            ("", unclear("")),
            ("s", unclear("s")),
            ("1.5s", unclear("1.5s")),
            ("-1s", unclear("-1s")),
            ("1s1m", unclear("1s1m")),
            ("1s1s", unclear("1s1s")),
            ("1m30", unclear("1m30")),
            ("1 s", unclear("1 s")),
            ("2d", unclear("2d")),
            ("99999999999999999999s", unclear("99999999999999999999s")),
            ("9999999999999999999h", unclear("9999999999999999999h")),
        ] {
            assert_eq!(parse(text), Err(sentence), "{text}");
        }
    }

    #[test]
    fn durations_are_written_as_people_write_them() {
        for (millis, text) in [
            (0, "0s"),
            (10, "10ms"),
            (1_500, "1s500ms"),
            (30_000, "30s"),
            (90_000, "1m30s"),
            (3_600_000, "1h"),
        ] {
            assert_eq!(write(Duration::from_millis(millis)), text);
        }
    }

    proptest! {
        #[test]
        fn a_written_duration_reads_back(millis in 0_u64..=604_800_000) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse(&write(duration)), Ok(duration));
        }

        #[test]
        fn any_text_gets_an_answer(text in "\\PC*") {
            if let Err(sentence) = parse(&text) {
                let start = format!("{text:?} ");
                prop_assert!(sentence.starts_with(&start));
            }
        }
    }
}
