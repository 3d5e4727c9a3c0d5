//! The configuration of a test: one service, most of it the same everywhere.
//!
//! A test names what it is about and leaves the rest. What it cannot name, it writes as TOML
//! itself, here into `service`, `server` and `named`, or as a whole file for `Host::start`.

#![forbid(unsafe_code)]

use std::{fmt::Write as _, fs};

use crate::{host::Host, wait::seconds};

/// For [`App::waiting`]: no waiting list.
pub const NOBODY_WAITS: &str = "capacity = 0";

/// Servers behind the addresses of the service `app`.
#[derive(Clone, Debug)]
pub struct App {
    pub listen: Vec<String>,
    pub count: usize,
    pub policy: Option<&'static str>,
    pub limit: Option<u32>,
    pub weight: Option<u32>,
    pub socket: Option<&'static str>,
    pub command: Vec<String>,
    /// Lines for `[service.app.waiting]`. Whoever finds all places taken waits by default, and
    /// with [`NOBODY_WAITS`] is refused at once.
    pub waiting: Option<String>,
    /// More lines for `[service.app]`.
    pub service: String,
    /// More lines for `[service.app.server]`.
    pub server: String,
    /// Tables that follow, such as `[[service.app.servers]]`.
    pub tables: String,
}

impl App {
    /// So many test servers on `[::]:8080`, which need no more words than these.
    pub fn of(host: &Host, count: usize) -> Self {
        Self::with(host, count, &["--listen", "[::]:8080"])
    }

    /// The same with other words for the test servers; see `bin/server.rs`.
    pub fn with(host: &Host, count: usize, words: &[&str]) -> Self {
        let inside = host.inside_file("{name}");
        let mut command = vec![host.test_server()];
        command.extend(["--name", "{name}", "--inside", &inside].map(str::to_owned));
        command.extend(words.iter().map(|word| (*word).to_owned()));
        Self::running(count, command)
    }

    /// So many of another program.
    pub fn running(count: usize, command: Vec<String>) -> Self {
        Self {
            listen: vec!["[::]:8080".to_owned()],
            count,
            policy: None,
            limit: None,
            weight: None,
            socket: None,
            command,
            waiting: None,
            service: String::new(),
            server: String::new(),
            tables: String::new(),
        }
    }

    /// Named servers instead of numbered ones: each with its lines.
    pub fn named<'a>(mut self, servers: impl IntoIterator<Item = (&'a str, String)>) -> Self {
        self.count = 0;
        for (name, lines) in servers {
            let name = quoted(name);
            let _ = write!(self.tables, "\n[[service.app.servers]]\nname = {name}\n{lines}\n");
        }
        self
    }

    /// The same without a waiting list.
    pub fn refusing(self) -> Self {
        Self { waiting: Some(NOBODY_WAITS.to_owned()), ..self }
    }

    /// The file.
    pub fn toml(&self) -> String {
        let mut text = String::from("[service.app]\n");
        let mut line = |line: String| {
            text.push_str(&line);
            text.push('\n');
        };
        line(format!("listen = {}", list(&self.listen)));
        if let Some(policy) = self.policy {
            line(format!("policy = {}", quoted(policy)));
        }
        line(self.service.clone());
        if let Some(waiting) = &self.waiting {
            line(format!("[service.app.waiting]\n{waiting}"));
        }
        line("[service.app.server]".to_owned());
        line(format!("command = {}", list(&self.command)));
        line(format!("count = {}", self.count));
        if let Some(limit) = self.limit {
            line(format!("limit = {limit}"));
        }
        if let Some(weight) = self.weight {
            line(format!("weight = {weight}"));
        }
        if let Some(socket) = self.socket {
            line(format!("socket = {}", quoted(socket)));
        }
        // The default, but where servers start slowly. A test that stops servers on purpose says so; the
        // others should not wait for them.
        for (name, time) in [("start_timeout", 60.0), ("stop_timeout", 3.0), ("drain_timeout", 3.0)] {
            if !self.server.contains(name) {
                line(format!("{name} = \"{}s\"", seconds(time).as_secs()));
            }
        }
        line(self.server.clone());
        line(self.tables.clone());
        text
    }
}

/// A list of texts in TOML.
pub fn list(texts: &[String]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
    format!("[{}]", texts.join(", "))
}

/// A text in TOML. JSON's escapes are a part of TOML's.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Servers that can be made to fail at their next start, or to take their time: by a file.
pub struct Chosen {
    pub app: App,
    broken: String,
    held: String,
}

impl Chosen {
    pub fn of(host: &Host, count: usize) -> Self {
        let (broken, held) = (host.path_text("broken"), host.path_text("held"));
        let server = host.test_server();
        let script = format!(
            "[ ! -e {broken} ] || exit 3; while [ -e {held} ]; do sleep 0.05; done; \
             exec {server} --name {{name}} --listen '[::]:8080'"
        );
        let app = App::running(count, ["/bin/sh", "-c", &script].map(str::to_owned).to_vec());
        Self { app, broken, held }
    }

    /// From their next start on they exit with 3 at once, or not.
    pub fn set_broken(&self, is: bool) {
        set(&self.broken, is);
    }

    /// From their next start on they do not begin to listen until this is taken back.
    pub fn set_held(&self, is: bool) {
        set(&self.held, is);
    }
}

fn set(file: &str, is: bool) {
    match is {
        true => fs::write(file, "").expect("make a file"),
        false => fs::remove_file(file).expect("remove a file"),
    }
}
