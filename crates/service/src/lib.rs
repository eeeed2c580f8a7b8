//! What each daemon does alike: config, logs, metrics, clock, peer auth, drain.
