//! The workers: what `casemate-image` does with the socket that is its standard input.

use crate::error::{Code, Error, Refusal};
use crate::import::CollectJob;
use crate::oci::Digest;
use crate::registry::{self, Fetch, FromFetcher};
use crate::unpack::{self, Blobs};
use crate::wire::{self, FromWorker, ToWorker};
use crate::{collect, sandbox};
use std::fs::File;
use std::io::Stdin;

type Result<T> = std::result::Result<T, Error>;

fn gone() -> Error {
    Error::Worker("the command is gone".into())
}

/// `unpack`: the index, the layers, the image's file.
///
/// # Errors
/// If nobody listens; all else is told to the command.
pub fn unpack(socket: &Stdin) -> Result<()> {
    // A panic is a bug, and the command's user must hear of it.
    std::panic::set_hook(Box::new(|info| {
        let text = format!("the unpacker panicked: {info}");
        let _ = wire::send(std::io::stdin(), &FromWorker::Failed(text), &[]);
    }));
    let (job, files) = wire::receive::<ToWorker>(socket)?.ok_or_else(gone)?;
    let (ToWorker::Job(job), Ok([spool, out])) = (job, <[File; 2]>::try_from(files)) else {
        return Err(Error::Worker("the first message is no job".into()));
    };
    let mut asked = Asked(socket);
    let result = sandbox::enter_unpacker(&job.limits)
        .and_then(|()| unpack::unpack(&job, &mut asked, &spool, &out));
    let last = match result {
        Ok(done) => FromWorker::Done(done),
        Err(Error::Refused(r)) => FromWorker::Refused(r),
        Err(e) => FromWorker::Failed(chain(&e)),
    };
    wire::send(socket, &last, &[])
}

/// `collect`: an archive into a layout.
///
/// # Errors
/// If nobody listens; all else is told to the command.
pub fn collect(socket: &Stdin) -> Result<()> {
    let ((scratch, limits), files) = wire::receive::<CollectJob>(socket)?.ok_or_else(gone)?;
    let archive = files.into_iter().next().ok_or_else(gone)?;
    let result = sandbox::enter_fetcher(&scratch, &limits, None)
        .and_then(|()| collect::collect(archive, &scratch, &limits));
    tell(socket, result.map(|()| Digest([0; 32])))
}

/// `fetch`: an image of a registry into a layout.
///
/// # Errors
/// If nobody listens; all else is told to the command.
pub fn fetch(socket: &Stdin) -> Result<()> {
    let (work, _) = wire::receive::<Fetch>(socket)?.ok_or_else(gone)?;
    let entered = sandbox::enter_fetcher(&work.scratch, &work.limits, work.ca.as_deref());
    let result = entered.and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(crate::error::os("start the runtime"))?;
        let say = |message: &FromFetcher| wire::send(socket, message, &[]);
        runtime.block_on(registry::fetch(&work, &say))
    });
    tell(socket, result)
}

fn tell(socket: &Stdin, result: Result<Digest>) -> Result<()> {
    let last = match result {
        Ok(digest) => FromFetcher::Done(digest),
        Err(Error::Refused(r)) => FromFetcher::Refused(r),
        Err(e) => FromFetcher::Failed(chain(&e)),
    };
    wire::send(socket, &last, &[])
}

fn chain(e: &Error) -> String {
    let mut text = e.to_string();
    text.truncate(text.floor_char_boundary(2_000));
    text
}

/// Blobs that the command opens.
struct Asked<'a>(&'a Stdin);

impl Asked<'_> {
    fn ask(&mut self, what: &FromWorker) -> Result<Option<File>> {
        wire::send(self.0, what, &[])?;
        match wire::receive::<ToWorker>(self.0)?.ok_or_else(gone)? {
            (ToWorker::Here, files) => Ok(files.into_iter().next()),
            (ToWorker::Missing, _) => Ok(None),
            (ToWorker::Job(_), _) => Err(Error::Worker("a second job".into())),
        }
    }
}

impl Blobs for Asked<'_> {
    fn index(&mut self) -> Result<File> {
        self.ask(&FromWorker::Index)?.ok_or_else(|| {
            let what = "there is no index.json: it is no OCI layout";
            Refusal::new(Code::ImageNotFound, what).into()
        })
    }

    fn blob(&mut self, digest: &Digest) -> Result<File> {
        self.ask(&FromWorker::Blob(*digest))?.ok_or_else(|| {
            let what = "the source does not have it";
            Refusal::new(Code::BlobMissing, what).of(digest).into()
        })
    }

    fn progress(&mut self, what: &str) -> Result<()> {
        wire::send(self.0, &FromWorker::Progress(what.into()), &[])
    }
}
