//! The process: answers warden until it is gone.

use crate::store::Store;
use crate::wire::{Ask, MESSAGE_MAX_BYTES, Said};
use jail::channel;
use jail::fault::{At, Result};
use rustix::fd::{AsFd as _, BorrowedFd, OwnedFd};

/// Serves the directory that its jail has, to the warden at descriptor 0. The exit status.
#[must_use]
pub fn main() -> i32 {
    let store = Store::new(jail::plan::VOLUMES_AT.into());
    match serve(&store, rustix::stdio::stdin()) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!(
                "casemate-volumes: {e}: {}",
                e.detail.as_deref().unwrap_or("")
            );
            1
        }
    }
}

fn serve(store: &Store, channel: BorrowedFd<'_>) -> Result {
    loop {
        let (bytes, _) = channel::recv(channel, MESSAGE_MAX_BYTES).at("hear", "warden")?;
        if bytes.is_empty() {
            return Ok(());
        }
        let asked = serde_json::from_slice(&bytes).at("understand", "warden");
        let (said, files) = match asked.and_then(|ask| answer(store, ask)) {
            Ok(answer) => answer,
            Err(e) => (Said::Failed(e), vec![]),
        };
        let with: Vec<BorrowedFd<'_>> = files.iter().map(|f| f.as_fd()).collect();
        channel::send(channel, &said, &with).at("answer", "warden")?;
    }
}

fn answer(store: &Store, ask: Ask) -> Result<(Said, Vec<OwnedFd>)> {
    let said = match ask {
        Ask::Open { of, how } => {
            let (files, fresh) = store.open(&of, how)?;
            return Ok((Said::Opened { fresh }, files.into()));
        }
        Ask::Keep { of, inode } => store.keep(&of, inode).map(|()| Said::Done)?,
        Ask::ForgetNew { of } => store.forget_new(&of).map(|()| Said::Done)?,
        Ask::Spend { of } => store.spend(&of).map(|()| Said::Done)?,
        Ask::SweepNew => store.sweep_new().map(|()| Said::Done)?,
        Ask::Erase { workspace, of } => {
            store.erase(&workspace, of.as_ref()).map(|()| Said::Done)?
        }
        Ask::Bytes { of } => Said::Bytes(store.bytes(&of)),
        Ask::List { workspace } => Said::Objects(store.list(&workspace)?),
    };
    Ok((said, vec![]))
}
