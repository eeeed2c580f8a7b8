//! The listeners, from the supervisor: they were bound outside this network namespace, and arrive
//! as one message on standard input, a unix socket.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context as _, bail};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::limits::{LISTENERS_MAX, LISTENERS_MAX_WAIT};

/// Takes the listeners from `socket`.
///
/// # Errors
/// If it is no socket, or what arrives is not the supervisor's message.
pub fn listeners(socket: impl AsFd) -> anyhow::Result<Vec<TcpListener>> {
    set_socket_timeout(&socket, Timeout::Recv, Some(LISTENERS_MAX_WAIT))
        .context("standard input is no socket: the edge is started by `casemate up`")?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LISTENERS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [0u8; 16];
    let got = recvmsg(
        &socket,
        &mut [IoSliceMut::new(&mut data)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .context("receive the listeners from the supervisor")?;
    if data.get(..got.bytes) != Some(b"listeners") || got.flags.contains(ReturnFlags::CTRUNC) {
        bail!("the supervisor's message is not the listeners");
    }
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if fds.is_empty() {
        bail!("the supervisor handed over no listener; edge.listen names at least one");
    }
    fds.into_iter()
        .map(|fd| {
            let listener = TcpListener::from(fd);
            listener
                .local_addr()
                .context("a handed-over descriptor is no TCP listener")?;
            listener
                .set_nonblocking(true)
                .context("set a listener non-blocking")?;
            Ok(listener)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    fn send(socket: &UnixStream, word: &[u8], listeners: &[TcpListener]) {
        let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut buffer = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(buffer.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(
            socket,
            &[IoSlice::new(word)],
            &mut buffer,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }

    #[test]
    fn listeners_arrive() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let made: Vec<_> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        send(&ours, b"listeners", &made);
        let got = listeners(&theirs).unwrap();
        let addresses = |l: &[TcpListener]| {
            l.iter()
                .map(|l| l.local_addr().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(addresses(&got), addresses(&made));
    }

    #[test]
    fn anything_else_is_refused() {
        for (word, count) in [(&b"listeners"[..], 0), (b"listener", 1), (b"listeners!", 1)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let made: Vec<_> = (0..count)
                .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
                .collect();
            send(&ours, word, &made);
            assert!(listeners(&theirs).is_err(), "{word:?}");
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(listeners(&theirs).is_err());
        assert!(listeners(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
