//! What the doctor found: as JSON for programs, as lines for people, and whether dist-ctl works.
//!
//! Pure. The fields and the checks' names are only ever added to: the table in docs/kernels.md is
//! made of them.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use serde::Serialize;

use super::{
    Answer,
    checks::{About, Check},
};

/// Everything that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of dist-ctl.
    version: &'static str,
    /// The kernel's release, as `uname -r` has it.
    kernel: String,
    /// Which build of it, as `uname -v` has it: Debian's says what its release does not.
    kernel_build: String,
    /// The machine's, as `uname -m` has it.
    architecture: String,
    /// dist-ctl works here: all that it needs does.
    works: bool,
    /// In their order.
    checks: Vec<Checked>,
}

/// One check and what it came to.
#[derive(Clone, Debug, Serialize)]
struct Checked {
    name: &'static str,
    what: &'static str,
    about: About,
    needed: bool,
    result: Outcome,
    /// What was found, if that says more than that it works.
    found: Option<String>,
    /// Why it does not work.
    why: Option<String>,
    /// The check without which it could not be tried.
    because: Option<&'static str>,
    /// What dist-ctl does now that it does not work.
    then: Option<&'static str>,
    /// What to do about that.
    to_do: Option<&'static str>,
}

/// Which checks are in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    All,
    Wrong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Works,
    Fails,
    Untried,
}

impl Outcome {
    /// In the first column.
    const fn word(self, needed: bool) -> &'static str {
        match self {
            Self::Works => "works",
            Self::Fails if needed => "FAILS",
            Self::Fails => "lacks",
            Self::Untried => "untried",
        }
    }
}

impl Report {
    /// One of this kernel, in which nothing was tried yet.
    pub(super) fn begin() -> Self {
        let system = rustix::system::uname();
        Self::of(
            [system.release(), system.version(), system.machine()].map(|name| name.to_string_lossy().into()),
        )
    }

    fn of([kernel, kernel_build, architecture]: [String; 3]) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        Self { version, kernel, kernel_build, architecture, works: true, checks: Vec::new() }
    }

    /// Whether dist-ctl works here.
    pub fn works(&self) -> bool {
        self.works
    }

    /// The first cause why a check cannot be made.
    pub(super) fn obstacle(&self, check: &Check) -> Option<&'static str> {
        let before = |name: &&str| self.checks.iter().find(|checked| checked.name == *name);
        let obstacles =
            check.after.iter().filter_map(before).filter(|checked| checked.result != Outcome::Works);
        obstacles.map(|checked| checked.because.unwrap_or(checked.name)).next()
    }

    /// A check was made.
    pub(super) fn note(&mut self, check: &Check, answer: Answer) {
        match answer {
            Ok(found) => {
                self.add(check, Outcome::Works).found = Some(found).filter(|found| !found.is_empty())
            }
            Err(why) => {
                let checked = self.add(check, Outcome::Fails);
                (checked.why, checked.then, checked.to_do) = (Some(why), Some(check.then), Some(check.to_do));
            }
        }
    }

    /// A check could not be made, because of another one.
    pub(super) fn skip(&mut self, check: &Check, obstacle: &'static str) {
        self.add(check, Outcome::Untried).because = Some(obstacle);
    }

    fn add(&mut self, check: &Check, result: Outcome) -> &mut Checked {
        let Check { name, about, needed, what, .. } = *check;
        self.works &= !needed || result == Outcome::Works;
        let nothing = (None, None, None, None, None);
        let (found, why, because, then, to_do) = nothing;
        let checked = Checked { name, what, about, needed, result, found, why, because, then, to_do };
        self.checks.push(checked);
        let last = self.checks.len() - 1;
        &mut self.checks[last]
    }

    /// For people: a line for each check, or only for those that do not work, and one more for what
    /// follows; the verdict last.
    pub fn table(&self, shown: Shown) -> String {
        let mut text = format!(
            "dist-ctl {} on Linux {} ({}), {}\n",
            self.version, self.kernel, self.architecture, self.kernel_build
        );
        let width = self.checks.iter().map(|checked| checked.name.len()).max().unwrap_or(0);
        let is_shown = |checked: &&Checked| shown == Shown::All || checked.result != Outcome::Works;
        if self.checks.iter().any(|checked| is_shown(&checked)) {
            text.push('\n');
        }
        for checked in self.checks.iter().filter(is_shown) {
            let detail = match (&checked.found, &checked.why, checked.because) {
                (Some(found), ..) => format!(": {found}"),
                (_, Some(why), _) => format!(": {why}"),
                (.., Some(because)) => format!(": not without {because}"),
                (None, None, None) => String::new(),
            };
            let (result, name, what) = (checked.result.word(checked.needed), checked.name, checked.what);
            // Writing to a text cannot fail.
            let _ = writeln!(text, "{result:7}  {name:width$}  {what}{detail}");
            if let (Some(then), Some(to_do)) = (checked.then, checked.to_do) {
                let _ = writeln!(text, "{:9}then: {then}; what to do: {to_do}", "");
            }
        }
        text + "\n" + &self.verdict() + "\n"
    }

    fn verdict(&self) -> String {
        let mut lacking: Vec<&str> = Vec::new();
        // Of what could not be tried, that because of which it could not.
        let works = |checked: &&Checked| checked.result == Outcome::Works;
        for checked in self.checks.iter().filter(|checked| checked.needed != self.works && !works(checked)) {
            let cause = checked.because.unwrap_or(checked.name);
            if !lacking.contains(&cause) {
                lacking.push(cause);
            }
        }
        match (self.works, lacking.join(", ")) {
            (false, lacking) => format!("dist-ctl does not work here, for want of: {lacking}"),
            (true, lacking) if lacking.is_empty() => "dist-ctl works here".to_owned(),
            (true, lacking) => format!("dist-ctl works here, as said above without: {lacking}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::checks::How, *};

    const fn check(name: &'static str, needed: bool, after: &'static [&'static str]) -> Check {
        Check {
            name,
            about: About::Kernel,
            needed,
            what: "it does",
            how: How::Here(|_| Ok(String::new())),
            after,
            then: "it limps",
            to_do: "heal it",
        }
    }

    const FIRST: Check = check("first", true, &[]);
    const SECOND: Check = check("second-one", true, &["first"]);
    const THIRD: Check = check("third", true, &["second-one"]);
    const LUXURY: Check = check("luxury", false, &[]);

    fn report() -> Report {
        Report { version: "1.2.3", ..Report::of(["6.1.0", "#1 SMP", "x86_64"].map(str::to_owned)) }
    }

    #[test]
    fn where_all_works_there_is_a_line_for_each_check_and_the_verdict() {
        let mut report = report();
        report.note(&FIRST, Ok("/sys/fs/bpf".into()));
        report.note(&SECOND, Ok(String::new()));
        assert!(report.works());
        assert_eq!(
            report.table(Shown::All),
            "dist-ctl 1.2.3 on Linux 6.1.0 (x86_64), #1 SMP\n\
             \n\
             works    first       it does: /sys/fs/bpf\n\
             works    second-one  it does\n\
             \n\
             dist-ctl works here\n"
        );
    }

    #[test]
    fn what_can_be_done_without_is_said_with_what_follows() {
        let mut report = report();
        report.note(&FIRST, Ok(String::new()));
        report.note(&LUXURY, Err("the kernel said no".into()));
        assert!(report.works());
        assert_eq!(
            report.table(Shown::All),
            "dist-ctl 1.2.3 on Linux 6.1.0 (x86_64), #1 SMP\n\
             \n\
             works    first   it does\n\
             lacks    luxury  it does: the kernel said no\n\
             \x20        then: it limps; what to do: heal it\n\
             \n\
             dist-ctl works here, as said above without: luxury\n"
        );
    }

    #[test]
    fn only_what_does_not_work_is_shown_if_that_is_asked_for() {
        let mut report = report();
        report.note(&FIRST, Ok(String::new()));
        report.note(&LUXURY, Err("the kernel said no".into()));
        let table = report.table(Shown::Wrong);
        assert!(!table.contains("first") && table.contains("lacks    luxury"), "{table}");
    }

    #[test]
    fn what_depends_on_a_failure_is_untried_because_of_the_first_one() {
        let mut report = report();
        report.note(&FIRST, Err("no".into()));
        let obstacle = report.obstacle(&SECOND).unwrap();
        report.skip(&SECOND, obstacle);
        assert_eq!(report.obstacle(&THIRD), Some("first"));
        assert_eq!(report.obstacle(&LUXURY), None);
        assert!(!report.works());
        let table = report.table(Shown::All);
        assert!(table.contains("untried  second-one  it does: not without first\n"), "{table}");
        assert!(table.ends_with("\ndist-ctl does not work here, for want of: first\n"), "{table}");
    }

    /// A process that dies over a check that is not needed takes those with it that are.
    #[test]
    fn the_verdict_names_the_cause_of_what_is_needed_and_untried() {
        let mut report = report();
        report.note(&LUXURY, Err("the process that tried it ended: signal: 9".into()));
        report.skip(&FIRST, "luxury");
        report.skip(&SECOND, "luxury");
        let table = report.table(Shown::All);
        assert!(table.ends_with("\ndist-ctl does not work here, for want of: luxury\n"), "{table}");
    }

    #[test]
    fn the_json_has_every_field_of_every_check() {
        let mut report = report();
        report.note(&FIRST, Err("no".into()));
        report.skip(&SECOND, "first");
        assert_eq!(
            serde_json::to_value(&report).unwrap(),
            serde_json::json!({
                "version": "1.2.3", "kernel": "6.1.0", "kernel_build": "#1 SMP", "architecture": "x86_64", "works": false,
                "checks": [
                    { "name": "first", "what": "it does", "about": "kernel", "needed": true,
                      "result": "fails", "found": null, "why": "no", "because": null,
                      "then": "it limps", "to_do": "heal it" },
                    { "name": "second-one", "what": "it does", "about": "kernel", "needed": true,
                      "result": "untried", "found": null, "why": null, "because": "first",
                      "then": null, "to_do": null },
                ],
            })
        );
    }
}
