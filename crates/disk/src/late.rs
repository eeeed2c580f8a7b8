//! The file before and after its volume is open.
//!
//! It is served from the process's start, so that the VMM's side is ready before there is a
//! workspace: until then it is empty, and whoever reads or writes it gets `EIO`.

use std::cell::OnceCell;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::fuse::Content;

/// One thread's way to a content that comes later. Clone it for another thread.
pub struct Late<C> {
    shared: Arc<Mutex<Option<C>>>,
    /// This thread's own, once it has seen that there is one: no lock from then on.
    own: OnceCell<C>,
}

impl<C> Clone for Late<C> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            own: OnceCell::new(),
        }
    }
}

impl<C> Default for Late<C> {
    fn default() -> Self {
        Self {
            shared: Arc::default(),
            own: OnceCell::new(),
        }
    }
}

impl<C: Clone> Late<C> {
    /// From here on the file is `content`, for every thread.
    pub fn begin(&self, content: C) {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(content);
    }

    /// The content, once there is one.
    pub fn get(&self) -> Option<&C> {
        if let Some(own) = self.own.get() {
            return Some(own);
        }
        let content = self
            .shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()?;
        Some(self.own.get_or_init(|| content))
    }

    fn there(&self) -> io::Result<&C> {
        self.get()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
    }
}

impl<C: Content + Clone> Content for Late<C> {
    fn size_bytes(&self) -> u64 {
        self.get().map_or(0, Content::size_bytes)
    }

    fn opens_max(&self) -> u32 {
        self.get().map_or(1, Content::opens_max)
    }

    fn may_resize(&self, to_bytes: u64) -> bool {
        self.get()
            .is_some_and(|content| content.may_resize(to_bytes))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.there()?.read(offset, buf)
    }

    fn write(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.there()?.write(offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.there()?.zero(offset, len)
    }

    /// Without a volume nothing was written.
    fn sync(&self) -> io::Result<()> {
        self.get().map_or(Ok(()), Content::sync)
    }
}
