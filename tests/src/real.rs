//! Real servers, as their own documentation starts them.
//!
//! Each answers `GET /` on port 8080 with the index that dist-ctl gave it and a line end, so
//! that a client knows which one served it. Their programs come from the packages in
//! `fixtures/packages.txt`; one that is missing fails the test and says what to install.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use crate::{command, host::Host, wait::seconds};

/// What has to be installed, one Debian package per line.
pub const PACKAGES: &str = include_str!("../fixtures/packages.txt");

/// Who opens nginx's listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nginx {
    /// The master opens one, its workers share it.
    Shared,
    /// One for each worker, by `reuseport`.
    PerWorker,
}

/// Whether a server stays in the foreground.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    On,
    Off,
}

/// `python3 -m http.server`
#[track_caller]
pub fn python(host: &Host, instances: usize) -> Vec<String> {
    for index in 1..=instances {
        host.write(&format!("www/{index}/index.html"), &format!("{index}\n"));
    }
    let python = program("/usr/bin/python3", "python3");
    let directory = host.path_text("www/{index}");
    words([&python, "-m", "http.server", "8080", "--directory", &directory])
}

/// nginx with two workers.
#[track_caller]
pub fn nginx(host: &Host, instances: usize, listeners: Nginx, daemon: Daemon) -> Vec<String> {
    let listen = match listeners {
        Nginx::Shared => "[::]:8080 ipv6only=off",
        Nginx::PerWorker => "[::]:8080 ipv6only=off reuseport",
    };
    for index in 1..=instances {
        // Also for a server that does not run as root.
        let directory = host.open_directory(&format!("nginx/{index}"));
        let text = include_str!("../fixtures/nginx.conf")
            .replace("{DAEMON}", if daemon == Daemon::On { "on" } else { "off" })
            .replace("{DIRECTORY}", &directory)
            .replace("{LISTEN}", listen)
            .replace("{INDEX}", &index.to_string());
        host.write(&format!("nginx/{index}/nginx.conf"), &text);
    }
    let nginx = program("/usr/sbin/nginx", "nginx-light");
    let directory = host.path_text("nginx/{index}");
    words([&nginx, "-p", &directory, "-e", "stderr", "-c", &format!("{directory}/nginx.conf")])
}

/// Node's http module.
#[track_caller]
pub fn node(host: &Host) -> Vec<String> {
    let script = host.write("http.js", include_str!("../fixtures/http.js"));
    words([&program("/usr/bin/node", "nodejs"), &script, "8080"])
}

/// Java with a thread for each connection.
#[track_caller]
pub fn java_threads() -> Vec<String> {
    java("Threads", "8080")
}

/// Java with so many threads, each of which has one connection at a time.
#[track_caller]
pub fn java_pool(threads: usize) -> Vec<String> {
    let mut command = java_threads();
    command.push(threads.to_string());
    command
}

/// Java with a selector.
#[track_caller]
pub fn java_channels() -> Vec<String> {
    java("Channels", "8080")
}

/// Java that takes its listener from `System.inheritedChannel()`.
#[track_caller]
pub fn java_inherited() -> Vec<String> {
    java("Channels", "inherited")
}

/// gunicorn with two workers; it binds by itself, or takes what LISTEN_FDS announces.
#[track_caller]
pub fn gunicorn(host: &Host) -> Vec<String> {
    host.write("gunicorn/app.py", include_str!("../fixtures/app.py"));
    let gunicorn = program("/usr/bin/gunicorn", "gunicorn");
    let directory = host.path_text("gunicorn");
    words([
        &gunicorn,
        "--workers=2",
        "--worker-tmp-dir=/dev/shm",
        "--bind=[::]:8080",
        "--chdir",
        &directory,
        "app:app",
    ])
}

/// Python with the listener that LISTEN_FDS announces.
#[track_caller]
pub fn python_inherited(host: &Host) -> Vec<String> {
    let script = host.write("inherited.py", include_str!("../fixtures/inherited.py"));
    words([&program("/usr/bin/python3", "python3"), &script])
}

/// Debian's Tomcat, by its own script. Its base directory is in the environment.
pub struct Tomcat {
    pub command: Vec<String>,
    /// A line for `[service.app.server]`.
    pub environment: String,
}

/// Tomcats, each with a base directory of its own.
#[track_caller]
pub fn tomcat(host: &Host, instances: usize) -> Tomcat {
    for index in 1..=instances {
        let base = format!("tomcat/{index}");
        for empty in ["logs", "temp", "work"] {
            host.open_directory(&format!("{base}/{empty}"));
        }
        host.write(&format!("{base}/conf/server.xml"), include_str!("../fixtures/server.xml"));
        host.write(&format!("{base}/conf/web.xml"), include_str!("../fixtures/web.xml"));
        host.write(&format!("{base}/webapps/ROOT/index.html"), &format!("{index}\n"));
    }
    let script = program("/usr/share/tomcat10/bin/catalina.sh", "tomcat10-common");
    let base = crate::app::quoted(&host.path_text("tomcat/{index}"));
    let options = "-Xmx128m -XX:+UseSerialGC -XX:TieredStopAtLevel=1";
    Tomcat {
        command: words([&script, "run"]),
        environment: format!("environment = {{ CATALINA_BASE = {base}, JAVA_OPTS = \"{options}\" }}"),
    }
}

/// The environment that Tomcat and nothing else needs: where java is.
fn java(class: &str, argument: &str) -> Vec<String> {
    let classes = classes();
    let classes = classes.to_str().expect("our paths are text");
    words([
        &program("/usr/bin/java", "default-jdk-headless"),
        // What a small program needs on a small machine; how it listens does not depend on it.
        "-Xmx64m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        classes,
        class,
        argument,
    ])
}

/// The directory of the compiled Java programs, which every user may read.
#[track_caller]
fn classes() -> PathBuf {
    static COMPILING: Mutex<()> = Mutex::new(());
    const SOURCES: [(&str, &str); 2] = [
        ("Threads.java", include_str!("../fixtures/Threads.java")),
        ("Channels.java", include_str!("../fixtures/Channels.java")),
    ];
    let _alone = COMPILING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let own = std::env::current_exe().expect("a process knows its program");
    let target = own.ancestors().nth(3).expect("a test's program is in target/PROFILE/deps");
    let classes = target.join("test-classes");
    let is_current = |(name, source): &(&str, &str)| {
        let there = fs::read_to_string(classes.join(name)).is_ok_and(|there| there == *source);
        there && classes.join(name).with_extension("class").exists()
    };
    if SOURCES.iter().all(is_current) {
        return classes;
    }
    // Aside, then renamed: another test process may be doing the same.
    let aside = target.join(format!("test-classes.{}", std::process::id()));
    fs::create_dir_all(&aside).expect("make a directory for classes");
    let mut compile = Command::new(program("/usr/bin/javac", "default-jdk-headless"));
    compile.arg("-d").arg(&aside);
    for (name, source) in SOURCES {
        let path = aside.join(name);
        fs::write(&path, source).expect("write a Java source");
        compile.arg(path);
    }
    command::run(&mut compile, seconds(60.0)).expect_done();
    if fs::rename(&aside, &classes).is_err() {
        // It was there already, older or just made by the other process: equally good or stale.
        let _ = fs::remove_dir_all(&classes);
        fs::rename(&aside, &classes).expect("put the classes in place");
    }
    classes
}

#[track_caller]
fn program(path: &str, package: &str) -> String {
    assert!(
        Path::new(path).exists(),
        "{path} is not here: apt-get install {package}, or run cargo xtask test, which does that"
    );
    path.to_owned()
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}
