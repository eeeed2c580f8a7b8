//! Test doubles with names; dev only.
