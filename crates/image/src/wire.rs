//! Between the command and its worker: one JSON message a packet, descriptors beside it.

use crate::error::{Error, Refusal, os};
use crate::limits::MESSAGE_MAX_BYTES;
use crate::oci::Digest;
use crate::unpack::{Done, Job};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

/// Descriptors of one message.
const FDS_MAX: usize = 2;

/// What the command says to its unpacker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ToWorker {
    /// The work; with the spool and the image's file.
    Job(Job),
    /// What was asked for; with its file.
    Here,
    /// It is not there.
    Missing,
}

/// What the unpacker says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum FromWorker {
    /// It wants the layout's index.
    Index,
    /// It wants a blob.
    Blob(Digest),
    /// How far it is.
    Progress(String),
    /// The image's file is complete.
    Done(Done),
    /// The image is not taken.
    Refused(Refusal),
    /// The system failed it.
    Failed(String),
}

/// Sends a message with descriptors.
///
/// # Errors
/// The socket's.
pub(crate) fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    files: &[&File],
) -> Result<(), Error> {
    let bytes = serde_json::to_vec(message).map_err(os("encode a message"))?;
    if bytes.len() > MESSAGE_MAX_BYTES {
        let what = format!("a message of {} bytes to a worker", bytes.len());
        return Err(Error::Worker(what));
    }
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Error::Worker("too many descriptors for one message".into()));
    }
    let bytes = [IoSlice::new(&bytes)];
    sendmsg(socket, &bytes, &mut beside, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(os("write to a worker's socket"))
}

/// Receives a message with its descriptors; none if the other side is gone.
///
/// # Errors
/// The socket's, or a message that is none.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
) -> Result<Option<(T, Vec<File>)>, Error> {
    let mut bytes = vec![0; MESSAGE_MAX_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut beside,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(os("read from a worker's socket"))?;
    if got.bytes == 0 {
        return Ok(None);
    }
    let mut files = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds.map(|fd: OwnedFd| File::from(fd)));
        }
    }
    let message = serde_json::from_slice(&bytes[..got.bytes])
        .map_err(|e| Error::Worker(format!("a worker's message is malformed: {e}")))?;
    Ok(Some((message, files)))
}
