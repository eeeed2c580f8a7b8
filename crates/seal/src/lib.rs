//! The only door to cryptography.
