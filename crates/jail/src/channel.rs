//! Messages with descriptors, over a unix socket.

use crate::limits::FDS_MAX;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::Serialize;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

/// Both ends of a channel that keeps messages apart, closed on exec.
///
/// # Errors
/// When descriptors run out.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(rustix::net::socketpair(
        family,
        kind,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one message with descriptors.
///
/// # Errors
/// The socket's.
pub fn send(sock: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_bytes(sock.as_fd(), &serde_json::to_vec(message)?, fds)
}

/// Sends these bytes with descriptors, whole.
///
/// # Errors
/// The socket's.
pub fn send_bytes(sock: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let sent = rustix::net::sendmsg(
        sock,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Receives one message with descriptors; empty at the end of the stream. What the other side said
/// before it ended is heard, also if it left a message of ours unread: of that the kernel tells
/// first, and once.
///
/// # Errors
/// The socket's; a message that does not fit.
pub fn recv(sock: BorrowedFd<'_>, max_bytes: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    match recv_once(sock, max_bytes) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => recv_once(sock, max_bytes),
        received => received,
    }
}

fn recv_once(sock: BorrowedFd<'_>, max_bytes: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0u8; max_bytes];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        sock,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "message above its bound",
        ));
    }
    bytes.truncate(got.bytes);
    Ok((bytes, fds))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_last_word_is_heard_of_one_that_left_ours_unread() {
        let (ours, theirs) = pair().unwrap();
        send(&theirs, &"last", &[]).unwrap();
        send(&ours, &"close", &[]).unwrap();
        drop(theirs);
        assert_eq!(recv(ours.as_fd(), 100).unwrap().0, b"\"last\"");
        assert_eq!(recv(ours.as_fd(), 100).unwrap().0, b"");
    }
}
