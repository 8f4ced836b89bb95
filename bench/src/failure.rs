//! Why a benchmark could not go on: a sentence for people, from whatever failed below.

/// Anything that ends a command; `main` prints it.
pub(crate) type Failure = Box<dyn std::error::Error>;
