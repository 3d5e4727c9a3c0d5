//! How a line of the log looks, and which lines there are.
//!
//! One event is one line on stderr, whole sentences and nothing that moves a cursor, because
//! servers' own words end up in them. The rest of the program only says `info!` and the like.
//! What comes through the `log` crate, the kernel programs' lines among it, lands here too.
#![forbid(unsafe_code)]

use std::{
    fmt,
    io::{self, IsTerminal as _, Write as _},
};

use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    filter::Targets,
    fmt::{
        FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::Writer,
        time::{FormatTime as _, SystemTime},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

/// How much the operator wants to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verbosity {
    /// `-q`: only what is wrong.
    Quiet,
    /// What one wants to know at 3 a.m.
    #[default]
    Normal,
    /// `-v`: what one wants to know at 3 p.m.
    Verbose,
}

/// Sends every log line of this process to stderr from now on. Call it once, in `main`.
pub fn set_up(verbosity: Verbosity) {
    let look = Look::for_stderr(std::env::var("JOURNAL_STREAM").ok().as_deref());
    subscriber(verbosity, look, io::stderr).init();
}

/// Writes one line to stderr as it is: a last word, or where there is no log. That nobody can read
/// it, because the disk is full or the reader gone, must stop nothing; `eprintln!` would panic.
pub fn say(line: impl fmt::Display) {
    // At once, or a line would be cut into its parts where several processes write.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// What the reader of stderr adds to a line, or wants from us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// journald: it has a time for every line, and reads the priority from its beginning.
    Journal,
    Terminal,
    /// A file, or a pipe.
    Plain,
}

impl Look {
    fn for_stderr(journal_stream: Option<&str>) -> Self {
        let stderr = io::stderr();
        // The variable is inherited by everything below a unit, so it proves nothing by itself:
        // <https://www.freedesktop.org/software/systemd/man/256/systemd.exec.html#%24JOURNAL_STREAM>
        let to_journal = journal_stream.is_some_and(|stream| {
            rustix::fs::fstat(&stderr).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
        });
        let has_colors = || std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        if to_journal {
            Self::Journal
        } else if stderr.is_terminal() && has_colors() {
            Self::Terminal
        } else {
            Self::Plain
        }
    }

    fn write_begin(self, line: &mut Writer<'_>, level: Level) -> fmt::Result {
        // journald's priorities are syslog's.
        let (priority, name, color) = match level {
            Level::ERROR => (3, "error: ", "\x1b[31m"),
            Level::WARN => (4, "warning: ", "\x1b[33m"),
            Level::INFO => (6, "", ""),
            Level::DEBUG => (7, "debug: ", "\x1b[2m"),
            Level::TRACE => (7, "trace: ", "\x1b[2m"),
        };
        if self == Self::Journal {
            return write!(line, "<{priority}>{name}");
        }
        SystemTime.format_time(line)?;
        match self {
            Self::Terminal if !color.is_empty() => write!(line, " {color}{name}\x1b[0m"),
            _ => write!(line, " {name}"),
        }
    }
}

impl<S, N> FormatEvent<S, N> for Look
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        self.write_begin(&mut line, *event.metadata().level())?;
        let mut text = String::new();
        context.field_format().format_fields(Writer::new(&mut text), event)?;
        write_on_one_line(&mut line, text.trim_end())?;
        line.write_char('\n')
    }
}

fn write_on_one_line(line: &mut Writer<'_>, text: &str) -> fmt::Result {
    for c in text.chars() {
        match c {
            '\n' | '\t' => line.write_char(' ')?,
            _ if c.is_control() => write!(line, "{}", c.escape_default())?,
            _ => line.write_char(c)?,
        }
    }
    Ok(())
}

fn subscriber<W>(verbosity: Verbosity, look: Look, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let level = match verbosity {
        Verbosity::Quiet => LevelFilter::WARN,
        Verbosity::Normal => LevelFilter::INFO,
        Verbosity::Verbose => LevelFilter::DEBUG,
    };
    let wanted = Targets::new()
        .with_default(level)
        // aya's own debug lines, hundreds per program loaded, are about aya.
        .with_target("aya", level.min(LevelFilter::INFO));
    let lines = tracing_subscriber::fmt::layer()
        .event_format(look)
        .with_writer(writer)
        // It would report that stderr is gone on stderr, and panic.
        .log_internal_errors(false);
    tracing_subscriber::registry().with(wanted).with(lines)
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Command, Stdio},
        sync::{Arc, Mutex},
    };

    use tracing::{debug, error, info, trace, warn};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(verbosity: Verbosity, look: Look, log: impl FnOnce()) -> String {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = subscriber(verbosity, look, move || writer.clone());
        tracing::subscriber::with_default(subscriber, log);
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn every_level() {
        error!("server api/1 is gone");
        warn!("server api/2 is slow");
        info!("server api/3 is ready");
        debug!("server api/4 has a listener");
        trace!("server api/5 has a socket");
    }

    #[test]
    fn verbosity_decides_which_levels_are_seen() {
        for (verbosity, expected) in [
            (Verbosity::Quiet, "<3>error: server api/1 is gone\n<4>warning: server api/2 is slow\n"),
            (
                Verbosity::Normal,
                "<3>error: server api/1 is gone\n<4>warning: server api/2 is slow\n\
                 <6>server api/3 is ready\n",
            ),
            (
                Verbosity::Verbose,
                "<3>error: server api/1 is gone\n<4>warning: server api/2 is slow\n\
                 <6>server api/3 is ready\n<7>debug: server api/4 has a listener\n",
            ),
        ] {
            assert_eq!(logged(verbosity, Look::Journal, every_level), expected);
        }
    }

    #[test]
    fn a_file_gets_the_time_and_no_colors() {
        let text = logged(Verbosity::Normal, Look::Plain, || warn!("server api/2 is slow"));
        let (time, line) = text.split_once(' ').unwrap();
        assert_eq!(line, "warning: server api/2 is slow\n");
        // 2026-01-02T03:04:05.678901Z
        assert_eq!(time.len(), 27, "{time}");
        assert!(format!("{}Z", &time[..19]).parse::<crate::status::Timestamp>().is_ok(), "{time}");
    }

    #[test]
    fn a_terminal_gets_the_time_and_colored_levels() {
        let text = logged(Verbosity::Normal, Look::Terminal, || {
            error!("server api/1 is gone");
            info!("server api/3 is ready");
        });
        let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["\x1b[31merror: \x1b[0mserver api/1 is gone", "server api/3 is ready"]);
    }

    #[test]
    fn an_event_stays_on_one_line_and_cannot_move_the_cursor() {
        let text = logged(Verbosity::Normal, Look::Journal, || {
            info!("server api/1 says: {}", "one\ntwo\u{1b}[2J\r\tthr\u{e9}e\n");
        });
        assert_eq!(text, "<6>server api/1 says: one two\\x1b[2J\\r thr\u{e9}e\n");
    }

    #[test]
    fn fields_follow_the_sentence() {
        let text = logged(Verbosity::Normal, Look::Journal, || info!(pid = 42, "server api/1 is ready"));
        assert_eq!(text, "<6>server api/1 is ready pid=42\n");
    }

    #[test]
    fn stderr_is_the_journal_only_if_the_variable_names_it() {
        let stat = rustix::fs::fstat(io::stderr()).unwrap();
        let this = format!("{}:{}", stat.st_dev, stat.st_ino);
        assert_eq!(Look::for_stderr(Some(&this)), Look::Journal);
        for inherited in [None, Some(""), Some("8:15")] {
            assert_ne!(Look::for_stderr(inherited), Look::Journal, "{inherited:?}");
        }
    }

    /// Runs `set_up_of_a_process` as a process of its own: the log is set up once per process.
    fn process(stderr: Stdio) -> String {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "logging::tests::set_up_of_a_process", "--ignored", "--nocapture"])
            .env_remove("JOURNAL_STREAM")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{:?}", output.status);
        String::from_utf8(output.stderr).unwrap()
    }

    #[test]
    #[ignore = "run by other tests as a process of its own"]
    fn set_up_of_a_process() {
        set_up(Verbosity::Verbose);
        log::debug!(target: "distributor_ebpf", "connection to slot 3");
        log::debug!(target: "aya::bpf", "[FEAT PROBE] BTF support: true");
        info!("server api/1 is ready");
    }

    #[test]
    fn what_comes_through_log_is_in_the_log_but_not_ayas_chatter() {
        let text = process(Stdio::piped());
        let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["debug: connection to slot 3", "server api/1 is ready"]);
    }

    #[test]
    fn a_stderr_that_nobody_reads_any_more_is_no_failure() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        assert_eq!(process(writer.into()), "");
    }
}
