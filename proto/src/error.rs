//! The one error that crosses a process boundary: a code a program can act on, and a sentence a person can act on.
//!
//! Invariant: `fix` is never empty. A miss is not an error anywhere.

use crate::wire;
use prost::Message as _;

pub use crate::wire::Code;

/// What happened, to which field, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}; {fix}", if field.is_empty() { String::new() } else { format!("{field}: ") })]
pub struct Error {
    /// What a program acts on.
    pub code: Code,
    /// The request's or config's field, or empty.
    pub field: String,
    /// What happened, with the value.
    pub message: String,
    /// What to do.
    pub fix: String,
}

impl Error {
    /// An error about `field`; all three texts are for people.
    pub fn new(
        code: Code,
        field: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let error = Self { code, field: field.into(), message: message.into(), fix: fix.into() };
        assert!(!error.fix.is_empty(), "an error says what to do");
        error
    }

    /// A field's value that can never be right.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Code::Invalid, field, message, fix)
    }

    /// A stated limit was reached.
    pub fn limit(field: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Code::Limit, field, message, fix)
    }
}

impl From<Error> for wire::Error {
    fn from(error: Error) -> Self {
        Self { code: error.code.into(), field: error.field, message: error.message, fix: error.fix }
    }
}

impl From<wire::Error> for Error {
    fn from(error: wire::Error) -> Self {
        let fix = if error.fix.is_empty() { "see the node's log".to_owned() } else { error.fix.clone() };
        Self { code: error.code(), field: error.field, message: error.message, fix }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let code = match error.code {
            Code::Unspecified | Code::Internal => tonic::Code::Internal,
            Code::Invalid | Code::ChainOrder | Code::Frame => tonic::Code::InvalidArgument,
            Code::UnsupportedVersion => tonic::Code::Unimplemented,
            Code::UnknownSession
            | Code::UnknownSpace
            | Code::UnknownLease
            | Code::UnknownWorker
            | Code::UnknownMemory => tonic::Code::NotFound,
            Code::LeaseEnded | Code::AlreadyCommitted | Code::PartFilledTwice => {
                tonic::Code::FailedPrecondition
            }
            Code::Limit => tonic::Code::ResourceExhausted,
            Code::Unavailable => tonic::Code::Unavailable,
        };
        let text = error.to_string();
        tonic::Status::with_details(code, text, wire::Error::from(error).encode_to_vec().into())
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        match wire::Error::decode(status.details()) {
            Ok(error) if !error.message.is_empty() => error.into(),
            _ => Self::new(
                if status.code() == tonic::Code::Unavailable { Code::Unavailable } else { Code::Internal },
                "",
                status.message(),
                "check that the node is running (`kvctl status`) and look at its log",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_both_wires_and_reads_as_a_sentence() {
        let error = Error::invalid("chain", "17 bytes are not whole ids", "send 16 bytes a block");
        assert_eq!(error.to_string(), "chain: 17 bytes are not whole ids; send 16 bytes a block");
        assert_eq!(Error::from(wire::Error::from(error.clone())), error);
        assert_eq!(Error::from(tonic::Status::from(error.clone())), error);
    }
}
