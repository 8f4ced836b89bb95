//! `router`: the front door's command line.

fn main() {}
