//! Which failures are the user's input, and so exit with 2 instead of 1.
//!
//! Everything else travels as a plain `anyhow::Error`. This is the one error that somebody
//! matches on: `main`, to choose the exit code.
#![forbid(unsafe_code)]

use std::fmt;

/// What the user wrote cannot be done: one or more sentences, each with what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserError(Vec<String>);

impl UserError {
    /// An error of one sentence.
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(vec![sentence.into()])
    }

    /// An error of several sentences, in the order in which they are shown.
    pub fn all(sentences: Vec<String>) -> Self {
        Self(sentences)
    }

    /// Its sentences.
    pub fn sentences(&self) -> &[String] {
        &self.0
    }
}

/// One line for each sentence.
impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.join("\n").fmt(f)
    }
}

impl std::error::Error for UserError {}

/// What the process exits with: 2 for the user's input, 1 for every other failure.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<UserError>() {
        Some(_) => 2,
        None => 1,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_users_input_exits_with_2_also_below_a_context() {
        let error = anyhow::Error::from(UserError::new("no")).context("read config");
        assert_eq!(exit_code(&error), 2);
    }

    #[test]
    fn any_other_failure_exits_with_1() {
        let error = std::fs::read("/does/not/exist").context("read config").unwrap_err();
        assert_eq!(exit_code(&error), 1);
    }
}
