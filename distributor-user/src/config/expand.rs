//! `{name}`, `{index}` and `{service}` in what is handed to a server.
//!
//! Two servers of one service often need two directories or two log files. `{{` and `}}`
//! stand for braces; everything else in braces is refused, so that a misspelt name does not
//! reach a command as it stands.
#![forbid(unsafe_code)]

/// What the names in braces stand for.
pub(super) struct Names<'a> {
    /// `shop`
    pub(super) service: &'a str,
    /// `1` or `big`
    pub(super) name: &'a str,
    /// From 1.
    pub(super) index: usize,
}

/// The text with every name replaced, or a sentence that begins with the text.
pub(super) fn expand(text: &str, names: &Names<'_>) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        expanded += &rest[..at];
        let brace = &rest[at..];
        if let Some(tail) = brace.strip_prefix("{{") {
            expanded.push('{');
            rest = tail;
        } else if let Some(tail) = brace.strip_prefix("}}") {
            expanded.push('}');
            rest = tail;
        } else {
            let Some((name, tail)) = brace.strip_prefix('{').and_then(|tail| tail.split_once('}')) else {
                return Err(format!("{text:?} has a single brace, write {{{{ for {{ and }}}} for }}"));
            };
            match name {
                "service" => expanded += names.service,
                "name" => expanded += names.name,
                "index" => expanded += &names.index.to_string(),
                _ => {
                    return Err(format!(
                        "{text:?} names {{{name}}}, write {{name}}, {{index}} or {{service}}, or {{{{{name}}}}} for the braces themselves"
                    ));
                }
            }
            rest = tail;
        }
    }
    Ok(expanded + rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: Names<'_> = Names { service: "shop", name: "big", index: 5 };

    #[test]
    fn names_in_braces_are_replaced() {
        for (text, expanded) in [
            ("", ""),
            ("plain", "plain"),
            ("/srv/{service}/{name}", "/srv/shop/big"),
            ("{index}{index}", "55"),
            ("{{name}}", "{name}"),
            ("{{{name}}}", "{big}"),
            ("ä{name}ö", "äbigö"),
        ] {
            assert_eq!(expand(text, &NAMES).as_deref(), Ok(expanded), "{text}");
        }
    }

    #[test]
    fn other_braces_are_refused() {
        for (text, sentence) in [
            (
                "{port}",
                r#""{port}" names {port}, write {name}, {index} or {service}, or {{port}} for the braces themselves"#,
            ),
            ("{name", r#""{name" has a single brace, write {{ for { and }} for }"#),
            ("name}", r#""name}" has a single brace, write {{ for { and }} for }"#),
        ] {
            assert_eq!(expand(text, &NAMES), Err(sentence.to_owned()));
        }
    }

    proptest! {
        #[test]
        fn doubled_braces_come_out_as_they_were_meant(text in "[a{}]*") {
            let doubled = text.replace('{', "{{").replace('}', "}}");
            prop_assert_eq!(expand(&doubled, &NAMES), Ok(text));
        }
    }
}
