//! Five append-only logs.
