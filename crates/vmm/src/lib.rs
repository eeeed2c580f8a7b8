//! VMM drivers and vmctl.
