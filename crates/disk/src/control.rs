//! The socketpair to warden: one JSON message a packet.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use api::disk::{FromDisk, ToDisk};
use api::limits::CHANNEL_MESSAGE_MAX_BYTES;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

use crate::DiskError;
use crate::limits::SENT_FDS_MAX;

/// The channel. `SOCK_SEQPACKET`.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
}

impl Control {
    /// Takes the socket over.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The next message; `None` when warden is gone.
    ///
    /// # Errors
    /// [`DiskError::Protocol`] for what is no message; the kernel's.
    pub fn receive(&self) -> Result<Option<ToDisk>, DiskError> {
        let Some((message, fds)) = self.receive_with_fds()? else {
            return Ok(None);
        };
        if !fds.is_empty() {
            return Err(wrong("descriptors came with it"));
        }
        Ok(Some(message))
    }

    /// The next message, with the descriptors that came with it.
    ///
    /// # Errors
    /// As [`Self::receive`]; more descriptors than [`SENT_FDS_MAX`].
    pub fn receive_with_fds(&self) -> Result<Option<(ToDisk, Vec<OwnedFd>)>, DiskError> {
        let mut buf = vec![0; CHANNEL_MESSAGE_MAX_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SENT_FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let flags = RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
            let room = &mut [IoSliceMut::new(&mut buf)];
            match recvmsg(&self.socket, room, &mut ancillary, flags) {
                Ok(got) => break got,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(DiskError::io("receiving from warden")(error)),
            }
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.bytes == 0 {
            return Ok(None);
        }
        if got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(wrong("more descriptors than 4"));
        }
        // With TRUNC, the packet's whole length.
        Ok(Some((decode(buf.get(..got.bytes))?, fds)))
    }

    /// Sends one message. That warden is gone shows at the next [`Control::receive`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn send(&self, message: &FromDisk) -> Result<(), DiskError> {
        let text = serde_json::to_vec(message).expect("strings and numbers are JSON");
        match send(&self.socket, &text, SendFlags::NOSIGNAL) {
            Ok(_) | Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Ok(()),
            Err(error) => Err(DiskError::io("sending to warden")(error)),
        }
    }
}

fn wrong(why: &'static str) -> DiskError {
    DiskError::Protocol {
        subject: "message from warden",
        why,
    }
}

/// `None`: longer than the bound.
fn decode(packet: Option<&[u8]>) -> Result<ToDisk, DiskError> {
    let packet = packet.ok_or(wrong("longer than 64 KiB"))?;
    serde_json::from_slice(packet).map_err(|_| wrong("not a message of this protocol"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Control, OwnedFd) {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        (Control::new(ours), theirs)
    }

    #[test]
    fn a_message_a_packet_then_the_end() {
        let (control, warden) = pair();
        send(&warden, b"{\"type\":\"close\"}", SendFlags::empty()).unwrap();
        send(
            &warden,
            &vec![b' '; CHANNEL_MESSAGE_MAX_BYTES + 1],
            SendFlags::empty(),
        )
        .unwrap();
        send(&warden, b"{\"type\":\"none\"}", SendFlags::empty()).unwrap();
        assert!(matches!(control.receive().unwrap(), Some(ToDisk::Close)));
        let too_long = control.receive().err().unwrap().to_string();
        assert!(too_long.contains("longer than 64 KiB"), "{too_long}");
        assert!(control.receive().is_err());
        drop(warden);
        assert!(control.receive().unwrap().is_none());
        control.send(&FromDisk::Copied).unwrap();
    }

    proptest! {
        #[test]
        fn survives_any_packet(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _any = decode(Some(&bytes));
        }
    }
}
