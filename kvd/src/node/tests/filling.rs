//! filling
