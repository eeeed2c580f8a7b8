//! The agent in the guest.
