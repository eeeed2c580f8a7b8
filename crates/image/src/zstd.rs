//! Zstandard streams: frames one after the other, skippable ones passed over (RFC 8878 §3.1).

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::io::{self, BufRead, Read};

/// Unpacked bytes that are made at once, beyond one block.
const STEP_BYTES: usize = 256 << 10;

/// Reads what the frames unpack to.
pub(crate) struct Frames<R> {
    inner: R,
    decoder: FrameDecoder,
    within: bool,
}

impl<R: BufRead> Frames<R> {
    pub(crate) fn new(inner: R) -> io::Result<Self> {
        let mut decoder = FrameDecoder::new();
        // The decoder bounds a frame's window (100 MiB) only from its second frame on, so the
        // first one is ours: a header with a window of 1 KiB.
        let first = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x00];
        let warmed = decoder.init(first.as_slice());
        warmed.map_err(|e| io::Error::other(e.to_string()))?;
        Ok(Self {
            inner,
            decoder,
            within: false,
        })
    }

    /// Begins with the next frame; false at the end.
    fn begin(&mut self) -> io::Result<bool> {
        while !self.inner.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.inner) {
                Ok(()) => {
                    self.within = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let mut skipped = (&mut self.inner).take(length.into());
                    if io::copy(&mut skipped, &mut io::sink())? != u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(io::Error::other(e.to_string())),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.within && !self.begin()? {
                return Ok(0);
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buf);
            }
            if self.decoder.is_finished() {
                self.within = false;
                // Its checksum is not looked at: the unpacked layer has a digest.
                continue;
            }
            let step = BlockDecodingStrategy::UptoBytes(STEP_BYTES);
            self.decoder
                .decode_blocks(&mut self.inner, step)
                .map_err(|e| io::Error::other(e.to_string()))?;
        }
    }
}
