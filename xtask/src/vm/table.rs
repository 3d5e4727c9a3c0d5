//! What `dist-ctl doctor --json` said on each kernel: whether that can be, and all of it as a table in
//! Markdown.
//!
//! Pure. Takes the documents in the order of the columns, gives a table and below it what follows
//! where something does not work. How a machine is set up is left out: that says nothing of its kernel.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::kernels::Role;

/// What the doctor said on one kernel, as far as the table has it.
#[derive(Deserialize)]
struct Report {
    kernel: String,
    works: bool,
    checks: Vec<Check>,
}

#[derive(Deserialize)]
struct Check {
    name: String,
    what: String,
    about: String,
    needed: bool,
    result: String,
    then: Option<String>,
    to_do: Option<String>,
}

/// What is wrong with a document from a kernel of which we know this.
pub(crate) fn objection(document: &str, role: Role) -> Option<String> {
    let report: Report = match serde_json::from_str(document) {
        Ok(report) => report,
        Err(error) => return Some(format!("its doctor printed no report ({error}): {document}")),
    };
    let said = |works: bool| if works { "works" } else { "does not work" };
    if report.works != (role != Role::Refused) {
        return Some(format!("its doctor says that dist-ctl {} there", said(report.works)));
    }
    let wakes = report.checks.iter().find(|check| check.name == "wake").map(|check| check.result == "works");
    (report.works && wakes != Some(role == Role::Works))
        .then(|| format!("its doctor says that wake {}", wakes.map_or("is nothing it knows", said)))
}

/// The table of these documents.
///
/// # Errors
/// There is none, or one is not what `dist-ctl doctor --json` prints.
pub(crate) fn table(documents: &[impl AsRef<str>]) -> Result<String> {
    ensure!(!documents.is_empty(), "there is no kernel to make a table of");
    let reports = documents
        .iter()
        .zip(1..)
        .map(|(document, number)| {
            serde_json::from_str::<Report>(document.as_ref())
                .with_context(|| format!("document {number} is not from dist-ctl doctor --json"))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut text = String::from("| |");
    // Writing to a text cannot fail.
    for report in &reports {
        let _ = write!(text, " {} |", escaped(&report.kernel));
    }
    text += "\n|---|";
    text += &"---|".repeat(reports.len());
    text += "\n| **dist-ctl works** |";
    for report in &reports {
        let _ = write!(text, " **{}** |", if report.works { "yes" } else { "no" });
    }
    text.push('\n');
    let checks = checks(&reports);
    for check in &checks {
        let optional = if check.needed { "" } else { " (optional)" };
        let _ = write!(text, "| `{}`: {}{optional} |", check.name, escaped(&check.what));
        for report in &reports {
            let found = report.checks.iter().find(|other| other.name == check.name);
            let _ = write!(text, " {} |", found.map_or("", word));
        }
        text.push('\n');
    }
    // Those of which the same is to be said stand together.
    let mut without: Vec<(String, String, Vec<&str>)> = Vec::new();
    for check in checks {
        let failing = |report: &&Report| {
            report.checks.iter().any(|other| other.name == check.name && other.result == "fails")
        };
        let on: Vec<&str> = reports.iter().filter(failing).map(|report| report.kernel.as_str()).collect();
        let said = reports.iter().flat_map(|report| &report.checks).find_map(|other| {
            (other.name == check.name).then_some(other.then.as_ref().zip(other.to_do.as_ref())).flatten()
        });
        if let Some((then, to_do)) = said {
            let (on, said) = (on.join(", "), format!("{then}. What to do: {to_do}."));
            match without.iter_mut().find(|(other, words, _)| *other == on && *words == said) {
                Some((.., names)) => names.push(&check.name),
                None => without.push((on, said, vec![&check.name])),
            }
        }
    }
    for (on, said, names) in without {
        let _ = write!(text, "\nWithout `{}` ({on}): {said}\n", names.join("`, `"));
    }
    Ok(text)
}

/// What is asked of a kernel, in the order of the doctor. An older one may not have asked for all of it.
fn checks(reports: &[Report]) -> Vec<&Check> {
    let mut checks: Vec<&Check> = Vec::new();
    for check in reports.iter().flat_map(|report| &report.checks).filter(|check| check.about == "kernel") {
        if !checks.iter().any(|other| other.name == check.name) {
            checks.push(check);
        }
    }
    checks
}

fn word(check: &Check) -> &'static str {
    match check.result.as_str() {
        "works" => "yes",
        "fails" => "**no**",
        _ => "untried",
    }
}

/// What a cell of a table may hold.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, about: &str, result: &str) -> serde_json::Value {
        let said = (result == "fails").then_some(["it limps", "heal it"]);
        serde_json::json!({
            "name": name, "what": format!("{name} is there"), "about": about, "needed": name != "wake",
            "result": result, "found": null, "why": null, "because": null,
            "then": said.map(|said| said[0]), "to_do": said.map(|said| said[1]),
        })
    }

    fn document(kernel: &str, works: bool, checks: &[serde_json::Value]) -> String {
        let document = serde_json::json!({
            "version": "0.1.0", "kernel": kernel, "architecture": "x86_64", "works": works, "checks": checks,
        });
        document.to_string()
    }

    #[test]
    fn each_kernel_has_a_column_and_what_fails_is_explained_below() {
        let documents = [
            ("5.10.0", false, ["fails", "fails", "fails", "untried"]),
            ("6.1.174", true, ["works", "works", "works", "fails"]),
            ("6.1.176", true, ["works", "works", "works", "works"]),
        ]
        .map(|(kernel, works, [root, select, track, wake])| {
            let checks = [
                check("root", "machine", root),
                check("select", "kernel", select),
                check("track", "kernel", track),
                check("wake", "kernel", wake),
            ];
            document(kernel, works, &checks)
        });
        assert_eq!(
            table(&documents).unwrap(),
            "| | 5.10.0 | 6.1.174 | 6.1.176 |\n\
             |---|---|---|---|\n\
             | **dist-ctl works** | **no** | **yes** | **yes** |\n\
             | `select`: select is there | **no** | yes | yes |\n\
             | `track`: track is there | **no** | yes | yes |\n\
             | `wake`: wake is there (optional) | untried | **no** | yes |\n\
             \n\
             Without `select`, `track` (5.10.0): it limps. What to do: heal it.\n\
             \n\
             Without `wake` (6.1.174): it limps. What to do: heal it.\n"
        );
    }

    #[test]
    fn a_doctor_that_says_other_than_is_known_is_objected_to() {
        let wake = |result: &str| [check("wake", "kernel", result)];
        let [refused, wakes, silent] = [(false, "untried"), (true, "works"), (true, "fails")]
            .map(|(works, result)| document("6.1", works, &wake(result)));
        for (role, right, wrong) in [
            (Role::Refused, &refused, [&wakes, &silent]),
            (Role::Works, &wakes, [&refused, &silent]),
            (Role::NeverWakes, &silent, [&refused, &wakes]),
        ] {
            assert_eq!(objection(right, role), None);
            assert!(wrong.iter().all(|document| objection(document, role).is_some()), "{role:?}");
            assert!(objection("", role).unwrap().contains("no report"));
        }
        assert!(objection(&document("6.1", true, &[]), Role::Works).is_some());
    }

    #[test]
    fn a_check_that_one_doctor_did_not_know_has_an_empty_cell() {
        let before = document("6.1", true, &[check("select", "kernel", "works")]);
        let after =
            document("6.2|x", true, &[check("select", "kernel", "works"), check("more", "kernel", "works")]);
        let table = table(&[before, after]).unwrap();
        assert!(table.starts_with("| | 6.1 | 6.2\\|x |\n"), "{table}");
        assert!(table.ends_with("| `more`: more is there |  | yes |\n"), "{table}");
    }

    #[test]
    fn what_no_doctor_said_is_refused_by_its_number() {
        let good = document("6.1", true, &[]);
        let error = format!("{:#}", table(&[good.as_str(), "{}"]).unwrap_err());
        assert!(error.starts_with("document 2 is not from dist-ctl doctor --json"), "{error}");
        assert!(table(&[] as &[&str]).is_err());
    }
}
