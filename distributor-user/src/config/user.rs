//! Whom servers run as, looked up in the user database once.
//!
//! Names and numbers are resolved when the configuration is read: a user that is missing is
//! the user's input to correct, not a server that fails at its start.
#![forbid(unsafe_code)]

use std::{ffi::CString, path::PathBuf};

use nix::unistd::{Gid, Group, Uid, getgrouplist};

/// An account, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// Its primary group, or the one the configuration names instead.
    pub gid: u32,
    /// Its supplementary groups, the primary one included.
    pub groups: Vec<u32>,
    /// Its name; its number where the database has no entry.
    pub name: String,
    /// Its home directory.
    pub home: PathBuf,
    /// Its login shell.
    pub shell: PathBuf,
}

/// The user of this name or number. `gid` overrides its primary group.
pub(super) fn user(text: &str, gid: Option<u32>) -> Result<User, String> {
    let entry = match number(text) {
        Some(uid) => nix::unistd::User::from_uid(Uid::from_raw(uid)),
        None => nix::unistd::User::from_name(text),
    }
    .map_err(|errno| format!("user {text:?} could not be looked up: {errno}"))?;
    match (entry, number(text), gid) {
        (Some(entry), _, _) => {
            let gid = gid.unwrap_or(entry.gid.as_raw());
            Ok(User {
                uid: entry.uid.as_raw(),
                gid,
                groups: supplementary(&entry.name, gid)?,
                name: entry.name,
                home: entry.dir,
                shell: entry.shell,
            })
        }
        // Containers often have no entry for the number they run as.
        (None, Some(uid), Some(gid)) => Ok(User {
            uid,
            gid,
            groups: vec![gid],
            name: uid.to_string(),
            home: PathBuf::from("/"),
            shell: PathBuf::from("/bin/sh"),
        }),
        (None, Some(uid), None) => {
            Err(format!("{uid} has no entry in the user database, write its group as well"))
        }
        (None, None, _) => {
            Err(format!("{text:?} is no user of this machine, write one that `getent passwd` lists"))
        }
    }
}

/// The number of the user of this name or number.
pub(super) fn uid(text: &str) -> Result<u32, String> {
    match number(text) {
        Some(uid) => Ok(uid),
        None => user(text, None).map(|user| user.uid),
    }
}

/// The number of the group of this name or number.
pub(super) fn gid(text: &str) -> Result<u32, String> {
    if let Some(gid) = number(text) {
        return Ok(gid);
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(format!("{text:?} is no group of this machine, write one that `getent group` lists")),
        Err(errno) => Err(format!("group {text:?} could not be looked up: {errno}")),
    }
}

fn number(text: &str) -> Option<u32> {
    // The highest number means "no change" to chown and setuid, so it is nobody's.
    text.parse().ok().filter(|id| *id != u32::MAX)
}

fn supplementary(name: &str, gid: u32) -> Result<Vec<u32>, String> {
    let c_name = CString::new(name).expect("the user database gives C strings");
    let groups = getgrouplist(&c_name, Gid::from_raw(gid))
        .map_err(|errno| format!("groups of user {name:?} could not be looked up: {errno}"))?;
    let mut groups: Vec<u32> = groups.into_iter().map(Gid::as_raw).collect();
    groups.sort_unstable();
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_found_by_name_and_by_number() {
        let by_name = user("root", None).unwrap();
        assert_eq!((by_name.uid, by_name.gid), (0, 0));
        assert!(by_name.groups.contains(&0));
        assert_eq!(user("0", None), Ok(by_name));
    }

    #[test]
    fn the_named_group_replaces_the_primary_one() {
        let user = user("root", Some(4242)).unwrap();
        assert_eq!(user.gid, 4242);
        assert!(user.groups.contains(&4242));
    }

    #[test]
    fn a_number_without_an_entry_needs_a_group() {
        assert_eq!(
            user("4000000000", None),
            Err("4000000000 has no entry in the user database, write its group as well".to_owned())
        );
        let user = user("4000000000", Some(7)).unwrap();
        assert_eq!((user.uid, user.groups), (4_000_000_000, vec![7]));
    }
}
