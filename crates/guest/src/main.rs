//! `/init` of the guest's initramfs. As PID 1 it is the agent; as anything else only its own
//! rehearsal.
//!
//! Without `std`'s start-up code: that aborts where neither standard streams nor `/dev/null`
//! exist yet, which is how a kernel without a console starts its init.
#![no_main]
#![allow(unsafe_code)] // The entry point's name, and one signal's disposition.

use std::ffi::{c_char, c_int};

/// The C entry point.
// SAFETY: this is the one `main`; the C runtime calls it once, with the usual arguments.
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    // SAFETY: before any thread exists. `std` would do the same: a closed pipe is an error and
    // not the end of PID 1.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if std::process::id() == 1 {
        guest::init::run();
    }
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(guest::rehearse::ARGUMENT) {
        eprintln!("casemate-guest is the init of a Casemate guest; it does nothing elsewhere");
        return 2;
    }
    let extent = arguments.next().unwrap_or_default();
    match std::panic::catch_unwind(|| guest::rehearse::run(&extent)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            eprintln!("casemate-guest: {error}");
            1
        }
        Err(_) => 1,
    }
}
