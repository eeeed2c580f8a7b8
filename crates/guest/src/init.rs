//! PID 1: boot, then whatever vmctl says, until the machine is off.
//!
//! ```text
//! boot ──booted──▶ blank ──attach──▶ up ──shutdown──▶ down
//!                  ▲   │ rehearse, clock      │ clock, wake
//!                  └───┘                      └─ attach, rehearse: refused
//! ```
//!
//! While blank everything runs in one thread, and no random byte is drawn in this process: what
//! is saved in a template has no state that twins would share.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::IntoRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::agent::{FromGuest, StepTime, ToGuest, Up, Wake};
use rustix::mount::MountFlags;
use seal::tls::rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use crate::archive::{Archives, Wanted};
use crate::attach::{self, AttachError, Device, Laps, TOKEN_STATE, Workspace, memory_bytes};
use crate::auth::StateError;
use crate::boot::{self, BootError, step};
use crate::channel::{self, Received, Receiver, Sender, VIRTIO_DEVICES};
use crate::exec::Tasks;
use crate::http::{Service, serve_direct, serve_edge};
use crate::launch::Launcher;
use crate::limits::DOWN_WAIT;
use crate::rehearse::{self, Extent};
use crate::{power, reap};

/// The agent's port for the edge: mutual TLS.
pub const EDGE_PORT: u16 = 9991;
/// The agent's port for direct callers: the raw connection token.
pub const DIRECT_PORT: u16 = 9990;

/// Runs as PID 1; does not return.
pub fn run() -> ! {
    stdio_open();
    std::panic::set_hook(Box::new(|info| {
        // The place only: a message could quote what it stumbled over.
        eprintln!("casemate-guest: panicked at {:?}", info.location());
    }));
    // A failure before the channel is open can be told to the console only.
    let opened = catch_unwind(|| boot::prepare().and_then(|()| boot::channel_open()));
    let (sender, receiver) = match opened {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => stay(&format!("casemate-guest: {error}")),
        Err(_) => stay("casemate-guest: panicked while booting"),
    };
    let lived = catch_unwind(AssertUnwindSafe(|| blank(&sender, receiver)));
    if lived.is_err() {
        sender.send_failed("agent_panicked", "the agent panicked; end this machine");
    }
    stay("casemate-guest: nothing left to do")
}

/// Descriptors 0 to 2, where a kernel without a console gives none: else the first files that
/// are opened would become a child's standard streams.
pub fn stdio_open() {
    loop {
        match File::options().read(true).write(true).open("/dev/null") {
            Ok(null) => {
                if null.into_raw_fd() > 2 {
                    return; // This one stays open, which costs nothing.
                }
            }
            Err(_) => {
                let flags = MountFlags::empty();
                let dev = std::path::Path::new("/dev");
                if boot::mount("devtmpfs", "devtmpfs", dev, flags, None).is_err() {
                    return;
                }
            }
        }
    }
}

fn blank(sender: &Sender, mut receiver: Receiver) {
    match boot::base_mount() {
        Ok(()) => tell(
            sender,
            &FromGuest::Booted {
                version: env!("CARGO_PKG_VERSION").into(),
            },
        ),
        Err(error) => sender.send_failed("boot_failed", &error.to_string()),
    }
    // The first is the template's: a restored machine remembers it.
    let mut extent = Extent::Caches;
    loop {
        let message = match receiver.receive() {
            Ok(Received::Message(message)) => *message,
            Ok(Received::Malformed) => {
                sender.send_failed("message_malformed", "not a message to the guest");
                continue;
            }
            Err(_) => return,
        };
        match message {
            ToGuest::Rehearse => match rehearse::rehearse(extent) {
                Ok(()) => {
                    extent = Extent::Code;
                    tell(sender, &FromGuest::Rehearsed);
                }
                Err(error) => sender.send_failed("rehearse_failed", &error.to_string()),
            },
            ToGuest::Clock { time_unix_ns } => clock_set(sender, time_unix_ns),
            ToGuest::Attach(message) => match attach::attach(&message, &Device::workspace()) {
                Ok(workspace) => {
                    if let Err(error) = up(workspace, sender, receiver) {
                        sender.send_failed("service_failed", &error.to_string());
                        return;
                    }
                    down(sender);
                }
                Err(error) => sender.send_failed(error.code(), &error.to_string()),
            },
            ToGuest::Wake(_) => {
                sender.send_failed("not_attached", "nothing sleeps in this machine")
            }
            ToGuest::Archive { .. }
            | ToGuest::Unarchive { .. }
            | ToGuest::ArchiveData { .. }
            | ToGuest::ArchiveStop => {
                sender.send_failed("not_attached", "there is no workspace in this machine");
            }
            ToGuest::Shutdown => down(sender),
        }
    }
}

/// Serves the workspace until vmctl says shutdown.
fn up(workspace: Workspace, sender: &Sender, receiver: Receiver) -> Result<(), BootError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(step("starting the runtime"))?;
    let Workspace {
        auth,
        unkept,
        files,
        launcher,
        tls,
        cmd,
        mut laps,
    } = workspace;
    let served = runtime.block_on(async {
        let any = Ipv4Addr::UNSPECIFIED;
        let edge = TcpListener::bind((any, EDGE_PORT))
            .await
            .map_err(step("listening on 9991"))?;
        let direct = TcpListener::bind((any, DIRECT_PORT))
            .await
            .map_err(step("listening on 9990"))?;
        let mut messages = messages(receiver);
        run_once(&launcher, &cmd);
        let tasks = Tasks::new(launcher);
        let state = Some(TOKEN_STATE.into());
        let archives = Archives::default();
        let service = Service::new(auth, tasks, Arc::clone(&files), memory_bytes(), state);
        // A wake makes another key.
        let (tls, tls_now) = watch::channel(tls);
        tokio::spawn(serve_edge(edge, tls_now, Arc::clone(&service)));
        tokio::spawn(serve_direct(direct, Arc::clone(&service)));
        laps.lap("listen");
        tell(sender, &up_now(laps.steps()));
        if let Some(signed) = unkept {
            let seq = service.auth().state().seq;
            service.state_keep(signed, seq);
        }
        while let Some(received) = messages.recv().await {
            match received {
                Received::Message(message) => match *message {
                    ToGuest::Clock { time_unix_ns } => clock_set(sender, time_unix_ns),
                    ToGuest::Wake(message) => match woken(&message, &service, &tls) {
                        Ok(laps) => tell(sender, &up_now(laps.steps())),
                        Err(error) => sender.send_failed(error.code(), &error.to_string()),
                    },
                    ToGuest::Archive {
                        number,
                        paths,
                        exclude,
                    } => {
                        let wanted = Wanted {
                            number,
                            paths,
                            exclude,
                        };
                        archives.begin(wanted, Arc::clone(&files), sender.clone());
                    }
                    ToGuest::Unarchive { number } => {
                        archives.put_back(number, Arc::clone(&files), sender.clone());
                    }
                    ToGuest::ArchiveData { number, data } => archives.piece(number, &data),
                    ToGuest::ArchiveStop => archives.stop(),
                    ToGuest::Shutdown => break,
                    ToGuest::Attach(_) | ToGuest::Rehearse => {
                        sender.send_failed("already_attached", "a machine is one workspace, once");
                    }
                },
                Received::Malformed => {
                    sender.send_failed("message_malformed", "not a message to the guest");
                }
            }
        }
        archives.stop();
        Ok(())
    });
    if served.is_ok() {
        power::processes_end();
    }
    runtime.shutdown_timeout(Duration::from_millis(500));
    served
}

/// After a sleep: the token state is the newer of the one that it fell asleep with and the host's.
fn woken(
    message: &Wake,
    service: &Arc<Service>,
    tls: &watch::Sender<Arc<ServerConfig>>,
) -> Result<Laps, AttachError> {
    let mut laps = Laps::begin();
    let auth = service.auth();
    match auth.state_raise(&message.token_state) {
        Ok(state) => service.state_keep(message.token_state.clone(), state.seq),
        Err(StateError::Stale) => {}
        Err(StateError::Invalid) => return Err(AttachError::TokenState),
    }
    laps.lap("token_state");
    tls.send_replace(attach::wake(
        message,
        &Device::workspace(),
        auth.workspace(),
        &mut laps,
    )?);
    Ok(laps)
}

fn up_now(steps: Vec<StepTime>) -> FromGuest {
    let kernel = rustix::system::uname();
    let kernel = kernel.release().to_string_lossy().into_owned();
    FromGuest::Up(Up { kernel, steps })
}

/// The workspace's own command. What it prints goes nowhere (SEE-1); how it ends is its affair.
fn run_once(launcher: &Launcher, cmd: &[String]) {
    reap::reaper();
    if !cmd.is_empty() {
        let _ = launcher.spawn_detached(cmd);
    }
}

/// The channel's messages, read by a thread: a port does not poll well when nobody is there.
fn messages(mut receiver: Receiver) -> mpsc::Receiver<Received> {
    let (sender, messages) = mpsc::channel(16);
    std::thread::spawn(move || {
        while let Ok(received) = receiver.receive() {
            if sender.blocking_send(received).is_err() {
                return;
            }
        }
    });
    messages
}

fn clock_set(sender: &Sender, time_unix_ns: u64) {
    if let Err(error) = attach::clock_set(time_unix_ns) {
        sender.send_failed("clock_failed", &error.to_string());
    }
}

fn down(sender: &Sender) -> ! {
    power::disk_release();
    tell(sender, &FromGuest::Down);
    // Over a vsock what was written leaves by a thread of the kernel's, and a reset would overtake
    // it. vmctl, once it has heard, ends the machine sooner than this.
    if channel::vsock(Path::new(VIRTIO_DEVICES)) {
        std::thread::sleep(DOWN_WAIT);
    }
    power::off()
}

/// Sends; when the port is gone there is nobody to tell.
fn tell(sender: &Sender, message: &FromGuest) {
    let _ = sender.send(message);
}

/// PID 1 must not end: the kernel would panic, and vmctl could not tell why.
fn stay(last_words: &str) -> ! {
    eprintln!("{last_words}");
    loop {
        std::thread::park();
    }
}
