//! `dist-ctl restart`, from the side of whoever asked: says how it goes on, and how it ended.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;

use crate::{
    control::{self, ASK_TIMEOUT, Command},
    status::{ItemStatus, RollState, RollStatus, Status},
};

/// How often it is looked how it stands.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What is said of a server that is done.
const RESTARTED: &str = "restarted";

/// So long nobody may answer. Nothing depends on who waits.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for the end of the restart that was asked for last, of this service, or of that with this server,
/// or of all. Says one line for each step of a server. If this is interrupted, the restart goes on.
///
/// # Errors
/// It has failed, and why.
pub fn follow(
    runtime_dir: &Path,
    target: Option<&str>,
    mut say: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut said = HashMap::new();
    let mut number = None;
    loop {
        let status = ask(runtime_dir)?;
        let number = *number.get_or_insert_with(|| last(&status, target));
        let rolls: Vec<&RollStatus> =
            rolls(&status, None).filter(|roll| Some(roll.number) == number).collect();
        if rolls.is_empty() {
            bail!("restart: nothing is known of it any more: dist-ctl status shows what runs");
        }
        for roll in &rolls {
            for server in &roll.servers {
                if let Some(line) = news(&mut said, server, roll) {
                    say(&line)?;
                }
            }
        }
        let name = |roll: &RollStatus| {
            let of = |service: &&crate::status::ServiceStatus| service.roll.as_ref() == Some(roll);
            status.services.iter().find(of).map_or(String::new(), |service| service.name.clone())
        };
        if let Some(failed) = rolls.iter().find(|roll| roll.state == RollState::Failed) {
            let (done, of) = failed.progress();
            let reason = failed.reason.as_deref().unwrap_or("nobody knows why");
            bail!("restart {}: {reason}; {done} of {of} were restarted", name(failed));
        }
        if rolls.iter().all(|roll| roll.state == RollState::Done) {
            return Ok(());
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// How it stands. A distributor that dies over it is followed by one that knows as much.
fn ask(runtime_dir: &Path) -> anyhow::Result<Status> {
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = control::ask(runtime_dir, &Command::Status, ASK_TIMEOUT);
        match answer.and_then(control::Response::into_result) {
            Ok(Some(status)) => return Ok(status),
            Err(error) if Instant::now() >= until || !control::is_up(runtime_dir) => {
                return Err(error.context("restart: how it goes on is not known"));
            }
            Ok(None) | Err(_) => thread::sleep(LOOK_AGAIN),
        }
    }
}

/// The number of the last restart that somebody has asked for.
fn last(status: &Status, target: Option<&str>) -> Option<u64> {
    rolls(status, target).filter(|roll| roll.asked).map(|roll| roll.number).max()
}

fn rolls<'a>(status: &'a Status, target: Option<&'a str>) -> impl Iterator<Item = &'a RollStatus> {
    let service = target.map(|target| target.split('/').next().unwrap_or(target));
    let services = status.services.iter().filter(move |it| service.is_none_or(|name| name == it.name));
    services.filter_map(|service| service.roll.as_ref())
}

/// What is to be said of a server that was not said yet.
fn news(said: &mut HashMap<String, String>, server: &ItemStatus, roll: &RollStatus) -> Option<String> {
    let (_, of) = roll.progress();
    let reason = server.reason.as_deref();
    let words = match server.state {
        RollState::Waiting => return None,
        RollState::UnderWay => reason?.to_owned(),
        RollState::Done => RESTARTED.to_owned(),
        RollState::Failed => format!("failed: {}", reason?),
        RollState::LeftAlone => format!("left alone: {}", reason?),
    };
    if said.get(&server.name) == Some(&words) {
        return None;
    }
    let done = said.values().filter(|words| *words == RESTARTED).count() + 1;
    let line = match server.state {
        RollState::Done => format!("{}: {words} ({done} of {of})\n", server.name),
        _ => format!("{}: {words}\n", server.name),
    };
    said.insert(server.name.clone(), words);
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_said_once() {
        let item = |state, reason: Option<&str>| ItemStatus {
            name: "app/1".to_owned(),
            state,
            reason: reason.map(str::to_owned),
        };
        let now = std::time::SystemTime::UNIX_EPOCH.into();
        let mut said = HashMap::new();
        for (server, expected) in [
            (item(RollState::Waiting, None), None),
            (item(RollState::UnderWay, Some("is on its way")), Some("app/1: is on its way\n")),
            (item(RollState::UnderWay, Some("is on its way")), None),
            (item(RollState::UnderWay, Some("serves")), Some("app/1: serves\n")),
            (item(RollState::Done, None), Some("app/1: restarted (1 of 1)\n")),
            (item(RollState::Done, None), None),
            (item(RollState::Failed, Some("no")), Some("app/1: failed: no\n")),
            (item(RollState::LeftAlone, Some("so")), Some("app/1: left alone: so\n")),
        ] {
            let roll = RollStatus {
                number: 1,
                state: RollState::UnderWay,
                asked: true,
                since: now,
                ended: None,
                reason: None,
                max_surge: 1,
                max_unavailable: 0,
                servers: vec![server.clone()],
            };
            assert_eq!(news(&mut said, &server, &roll).as_deref(), expected);
        }
    }
}
