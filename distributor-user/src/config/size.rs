//! Amounts of memory as people write them: `512MiB`, `2GiB`, `1.5GB`.
//!
//! The crate bytesize reads and writes them. It takes a number alone for bytes; here every number has a
//! unit, as durations have.
#![forbid(unsafe_code)]

use bytesize::ByteSize;

/// Less is a typing error: no server fits into it.
const LEAST: u64 = 1 << 20;

/// Bytes, or a sentence that begins with the refused text.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    if text.trim().parse::<f64>().is_ok() {
        return Err(format!("{text:?} has no unit, write \"{}MiB\"", text.trim()));
    }
    match text.parse::<ByteSize>() {
        Ok(ByteSize(bytes)) if bytes >= LEAST => Ok(bytes),
        Ok(_) => Err(format!("{text:?} is too little, write at least \"1MiB\"")),
        Err(_) => Err(format!("{text:?} is no amount of memory, write for example \"512MiB\" or \"2GiB\"")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_read() {
        for (text, bytes) in [
            ("1MiB", 1 << 20),
            ("512MiB", 512 << 20),
            ("2GiB", 2 << 30),
            ("2 GiB", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("2GB", 2_000_000_000),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        let unclear =
            |text| format!("{text:?} is no amount of memory, write for example \"512MiB\" or \"2GiB\"");
        for (text, sentence) in [
            ("512", "\"512\" has no unit, write \"512MiB\"".to_owned()),
            ("", unclear("")),
            ("much", unclear("much")),
            ("2GiBs", unclear("2GiBs")),
            ("-2GiB", unclear("-2GiB")),
            ("4KiB", "\"4KiB\" is too little, write at least \"1MiB\"".to_owned()),
        ] {
            assert_eq!(parse(text), Err(sentence), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_gets_an_answer(text in "\\PC*") {
            if let Err(sentence) = parse(&text) {
                let start = format!("{text:?} ");
                prop_assert!(sentence.starts_with(&start));
            }
        }
    }
}
