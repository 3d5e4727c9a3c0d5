//! The documents are complete, and true as far as a program can tell.
//!
//! What can be compared with the sources is compared with them; that needs no kernel. What a
//! document shows as a configuration is given to `dist-ctl check`.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tests::{command, host::program, wait::seconds};

/// What is written by people for machines, by its ending.
const SOURCES: [&str; 6] = ["rs", "sh", "java", "js", "py", "c"];

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace")
}

#[track_caller]
fn read(file: impl AsRef<Path>) -> String {
    let path = workspace().join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

/// What is read by people, from the workspace's directory.
fn documents() -> Vec<String> {
    let mut documents = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"].map(str::to_owned).to_vec();
    for entry in fs::read_dir(workspace().join("docs")).expect("list docs").flatten() {
        let name = entry.file_name().into_string().expect("our names are text");
        if name.ends_with(".md") {
            documents.push(format!("docs/{name}"));
        }
    }
    documents
}

/// Every source file, from the workspace's directory.
fn sources() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(workspace().join(&directory)).expect("list a directory").flatten() {
            let name = entry.file_name().into_string().expect("our names are text");
            let path = directory.join(&name);
            // What cargo and git make, and what `cargo xtask setup` does.
            if name.starts_with('.') || path == Path::new("target") {
                continue;
            }
            if entry.file_type().expect("a file has a type").is_dir() {
                directories.push(path);
            } else if SOURCES.iter().any(|ending| name.ends_with(&format!(".{ending}"))) {
                found.insert(path.to_str().expect("our paths are text").to_owned());
            }
        }
    }
    assert!(found.len() > 50, "these cannot be all: {found:?}");
    found
}

/// The part of a document below this heading.
fn section<'d>(document: &'d str, heading: &str) -> &'d str {
    let (_, below) =
        document.split_once(&format!("\n## {heading}\n")).expect("the document has this heading");
    below.split("\n## ").next().expect("there is always a first part")
}

/// Everything that stands between backticks on one line.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

#[test]
fn every_source_file_is_in_the_code_map() {
    let architecture = read("ARCHITECTURE.md");
    let map: Vec<String> = section(&architecture, "Where is what?")
        .lines()
        .filter_map(|line| Some(line.strip_prefix("- `")?.split_once("`: ")?.0.to_owned()))
        .collect();
    let named: BTreeSet<String> = map.iter().cloned().collect();
    assert_eq!(map.len(), named.len(), "a file is there twice");
    let there = sources();
    let missing: Vec<_> = there.difference(&named).collect();
    let gone: Vec<_> = named.difference(&there).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "not in the code map: {missing:?}; no longer there: {gone:?}"
    );
}

#[test]
fn every_file_with_unsafe_code_is_in_its_inventory() {
    let architecture = read("ARCHITECTURE.md");
    let inventory: BTreeSet<&str> = quoted(section(&architecture, "Where is `unsafe`, and why?"))
        .filter(|word| word.ends_with(".rs"))
        .collect();
    let is_code = |line: &str| !line.trim_start().starts_with("//");
    let there = sources();
    let unsafe_files: BTreeSet<&str> = there
        .iter()
        .filter(|file| file.ends_with(".rs"))
        .filter(|file| {
            let text = read(file);
            !text.contains("\n#![forbid(unsafe_code)]")
                && text.lines().filter(|line| is_code(line)).any(|line| {
                    ["unsafe {", "unsafe impl", "unsafe fn", "unsafe(", "asm!("]
                        .iter()
                        .any(|code| line.contains(code))
                })
        })
        .map(String::as_str)
        .collect();
    assert_eq!(inventory, unsafe_files);
}

#[test]
fn only_the_kernels_files_import_aya() {
    let importing: Vec<String> = sources()
        .into_iter()
        .filter(|file| file.starts_with("distributor-user/src/"))
        .filter(|file| read(file).lines().any(|line| line.trim_start().starts_with("use aya")))
        .collect();
    let (own, others): (Vec<_>, Vec<_>) =
        importing.into_iter().partition(|file| file.starts_with("distributor-user/src/kernel"));
    assert!(!own.is_empty() && others.is_empty(), "{others:?} import aya, and only {own:?} may");
}

/// What a monitor consists of: what its process runs that is ours.
const MONITOR: [&str; 4] = ["monitor.rs", "monitor/state.rs", "message.rs", "lock.rs"];

/// A file of `distributor-user` without its tests.
fn without_tests(file: &str) -> String {
    let text = read(Path::new("distributor-user/src").join(file));
    text.split("\n#[cfg(test)]\nmod tests {").next().expect("there is always a first part").to_owned()
}

/// The lines of code that say something: not the ends of blocks, not what is imported.
fn lines_that_say_something(code: &str) -> usize {
    let says = |line: &&str| line.contains(|c: char| c.is_alphanumeric()) && !line.starts_with('#');
    let without_uses = code.split("\nuse ").enumerate().map(|(number, part)| match number {
        0 => part,
        _ => part.split_once(';').expect("the end of a use").1,
    });
    without_uses
        .flat_map(str::lines)
        .map(str::trim)
        .filter(says)
        .filter(|line| !line.starts_with("//"))
        .count()
}

/// The first names of what stands behind each `crate::`, braces looked into.
fn own_modules(code: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for behind in code.split("crate::").skip(1) {
        let mut depth = 0;
        let mut begins = true;
        for (at, c) in behind.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => begins = true,
                c if begins && depth <= 1 && c.is_alphabetic() => {
                    begins = false;
                    found.extend(behind[at..].split(|c: char| c != '_' && !c.is_alphanumeric()).next());
                }
                _ => {}
            }
            if depth == 0 && (c == '}' || !begins) {
                break;
            }
        }
    }
    found
}

#[test]
fn the_monitor_depends_on_little() {
    let allowed = ["anyhow", "nix", "rustix", "signal_hook", "tracing"];
    let manifest = read("distributor-user/Cargo.toml");
    let (_, dependencies) = manifest.split_once("\n[dependencies]\n").expect("the dependencies");
    let dependencies = dependencies.split("\n\n").next().expect("there is always a first part");
    let others: BTreeSet<String> = dependencies
        .lines()
        .filter_map(|line| Some(line.split(['.', ' ']).next()?.replace('-', "_")))
        .filter(|name| !allowed.contains(&name.as_str()))
        .collect();
    assert!(["aya", "tokio", "serde", "serde_json", "toml"].iter().all(|name| others.contains(*name)));
    for file in MONITOR {
        let text = without_tests(file);
        let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let words = code.split(|c: char| c != '_' && c != ':' && !c.is_alphanumeric());
        let starts: BTreeSet<&str> = words.filter_map(|word| Some(word.split_once("::")?.0)).collect();
        let foreign: Vec<_> = starts.iter().filter(|start| others.contains(**start)).collect();
        // nix passes on the whole of libc; its types are all that is used of it.
        assert!(foreign.iter().all(|name| **name == "libc"), "{file} uses {foreign:?}");
        let modules = own_modules(&code);
        assert!(modules.iter().all(|module| ["lock", "message"].contains(module)), "{file} uses {modules:?}");
    }
    assert_eq!(own_modules(&without_tests("monitor.rs")), BTreeSet::from(["lock", "message"]));
}

/// What it does stands in two files: at a line in a second that is ten minutes. The other two are
/// how it is spoken to, and two locks, of which one is not its own.
#[test]
fn the_monitor_can_be_read_in_ten_minutes() {
    let lines = MONITOR.map(|file| lines_that_say_something(&without_tests(file)));
    assert!(lines.iter().all(|count| *count > 100), "these cannot be all: {lines:?}");
    let [monitor, state, ..] = lines;
    assert!(monitor + state <= 600, "the monitor has too many lines of code: {lines:?}");
    assert!(lines.iter().sum::<usize>() <= 950, "the monitor has too many lines of code: {lines:?}");
}

/// A test's name is a fact, and so has at least three underscores.
#[test]
fn every_test_that_a_document_names_is_there() {
    let code: String =
        sources().into_iter().filter(|file| file.ends_with(".rs")).map(read).collect::<Vec<_>>().join("\n");
    let is_name = |word: &str| {
        word.matches('_').count() >= 3
            && word.chars().all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    let mut named = 0;
    for document in documents() {
        for name in quoted(&read(&document)).filter(|word| is_name(word)) {
            named += 1;
            assert!(code.contains(&format!("fn {name}(")), "{document} names {name}, which is not there");
        }
    }
    assert!(named > 20, "only {named} names were found");
}

#[test]
fn every_link_leads_to_a_file() {
    let mut followed = 0;
    for document in documents() {
        let text = read(&document);
        let here = Path::new(&document).parent().expect("a file has a directory");
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") || target.starts_with('#') {
                continue;
            }
            followed += 1;
            assert!(workspace().join(here).join(target).exists(), "{document} links to {target}");
        }
    }
    assert!(followed > 10, "only {followed} links were found");
}

#[test]
fn every_outcome_is_explained() {
    let contract = read("distributor-ebpf/src/contract.rs");
    let (_, table) = contract.split_once("\noutcomes! {\n").expect("the table of outcomes");
    let outcomes: BTreeSet<&str> = table
        .split("\n}\n")
        .next()
        .expect("its end")
        .lines()
        .filter_map(|line| line.split_once(" = \"")?.1.strip_suffix("\","))
        .collect();
    assert!(outcomes.contains("selected") && outcomes.len() > 20, "{outcomes:?}");
    let status = read("docs/status.md");
    let explained: BTreeSet<&str> = section(&status, "Outcomes")
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| `")?.split_once("` |")?.0))
        .collect();
    assert_eq!(explained, outcomes);
}

#[test]
fn every_benchmark_shows_what_was_measured() {
    const START: &str = "<!-- bench ";
    let text = read("docs/benchmarks.md");
    let mut shown = 0;
    for block in text.split(START).skip(1) {
        let (name, below) = block.split_once(" -->").expect("the end of a block's first line");
        let (measured, _) = below
            .split_once(&format!("<!-- end {name} -->"))
            .unwrap_or_else(|| panic!("the block {name} has no end"));
        assert!(!measured.trim().is_empty(), "nothing is shown for {name}: run cargo xtask bench --write");
        shown += 1;
    }
    assert!(shown >= 6, "only {shown} blocks were found");
}

#[test]
fn every_command_is_in_the_readme() {
    let cli = read("distributor-user/src/cli.rs");
    let (_, verbs) = cli.split_once("\nenum Verb {\n").expect("the commands");
    let verbs: BTreeSet<String> = verbs
        .split("\n}\n")
        .next()
        .expect("its end")
        .split("\n\n")
        .filter(|verb| !verb.contains("hide = true"))
        .filter_map(|verb| {
            let name = verb
                .lines()
                .map(str::trim)
                .find(|line| line.starts_with(|c: char| c.is_ascii_uppercase()))?;
            Some(name.split(|c: char| !c.is_ascii_alphanumeric()).next()?.to_lowercase())
        })
        .collect();
    let readme = read("README.md");
    let listed: BTreeSet<String> = section(&readme, "Commands")
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| `")?.split([' ', '`']).next()?.to_owned()))
        .collect();
    assert_eq!(listed, verbs);
}

#[test]
fn every_configuration_that_a_document_shows_is_accepted() {
    let mut checked = 0;
    for document in documents() {
        let text = read(&document);
        for (number, example) in text.split("\n```toml\n").skip(1).enumerate() {
            let example = example.split("\n```\n").next().expect("there is always a first part");
            let name = document.replace('/', "-");
            let file =
                std::env::temp_dir().join(format!("dist-ctl-{}-{name}-{number}.toml", std::process::id()));
            fs::write(&file, example).expect("write the example");
            let ended = command::run(Command::new(program()).arg("check").arg(&file), seconds(20.0));
            fs::remove_file(&file).expect("remove the example");
            assert_eq!(ended.code, Some(0), "{document}: {ended}");
            checked += 1;
        }
    }
    assert!(checked >= 2, "only {checked} examples were found");
}
