//! Domain types, ids and sans-IO state machines. Must never do IO.
