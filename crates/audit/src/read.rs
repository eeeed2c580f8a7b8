//! The read process: gives entries to those who may see them, and logs that it does, first.
//!
//! Must never answer with an entry before the log holds who asked and why; never hold a key longer
//! than one answer; never write to a log's files.

use crate::integrate::log_dir;
use crate::integrate::tiles::Tiles;
use crate::limits::{LOG_OPEN_MAX, READ_BYTES_SOFT, READ_ENTRIES_MAX, REASON_MAX_BYTES};
use crate::{log_class, metrics};
use api::audit::{
    Class as ApiClass, Entry, LogHead, Phase, ReadEntries, ReadEntry, ReadOp, Stamped,
};
use api::kms::Op as KmsOp;
use api::rpc::Client;
use api::{Error, ErrorCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use seal::Zeroizing;
use seal::sign::VerifyingKey;
use service::audit::Log;
use service::config::Config;
use service::paths::Paths;
use service::rpc::{Peer, Uids, ok};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tlog::checkpoint::Checkpoint;
use tlog::class::Class;
use tlog::leaf::{Leaf, Opening};
use tlog::limits::{NOTE_BYTES_MAX, TILE_WIDTH};
use tlog::tile::{Kind, Tile, TileSource as _};
use tlog::verify::CHECKPOINT_PATH;
use tokio::sync::watch;

/// The process's name.
pub const PROCESS: &str = "audit-read";
/// Who may read.
const ALLOW: &[&str] = &["root"];

/// Serves until `stop` turns true.
///
/// # Errors
/// When the log's public key is missing, or the socket can't be made.
pub async fn run(
    paths: &Paths,
    config: &Config,
    uids: Uids,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut registry = metrics::registry();
    let figures = metrics::Read::register(&mut registry);
    let reader = Arc::new(Reader {
        paths: paths.clone(),
        installation: config.installation.name.clone(),
        key: service::trust::key(paths, service::trust::AUDIT)?,
        log: Log::new(paths),
        kms: Client::new(paths.socket("kms", "kms")),
        figures,
    });
    let listener = service::rpc::bind(&paths.socket(PROCESS, "read"))?;
    let _metrics = service::metrics::serve(&paths.socket(PROCESS, "metrics"), registry)?;
    let handler = move |peer: Peer, request_id: String, op: ReadOp| {
        let reader = Arc::clone(&reader);
        async move { reader.answer(&peer, &request_id, op).await }
    };
    tracing::info!("ready");
    service::rpc::serve(listener, Arc::new(uids), ALLOW, stop, handler).await;
    Ok(())
}

struct Reader {
    paths: Paths,
    installation: String,
    key: VerifyingKey,
    log: Log,
    kms: Client,
    figures: metrics::Read,
}

/// What a request for entries asks.
struct Wanted {
    class: ApiClass,
    from: u64,
    count: u32,
    reason: String,
}

impl Reader {
    async fn answer(
        &self,
        peer: &Peer,
        request_id: &str,
        op: ReadOp,
    ) -> api::Result<serde_json::Value> {
        match op {
            ReadOp::Head { class } => {
                let (checkpoint, opened) = self.checkpoint(log_class(class))?;
                ok(&LogHead {
                    size: opened.size,
                    checkpoint,
                })
            }
            ReadOp::Entries {
                class,
                from,
                count,
                reason,
            } => {
                let of = metrics::of(log_class(class));
                let wanted = Wanted {
                    class,
                    from,
                    count,
                    reason,
                };
                let result = self.entries(peer, request_id, &wanted).await;
                let figure = if result.is_ok() {
                    &self.figures.reads
                } else {
                    &self.figures.refusals
                };
                figure.get_or_create(&of).inc();
                ok(&result?)
            }
        }
    }

    /// The log's checkpoint, as text and verified.
    fn checkpoint(&self, class: Class) -> api::Result<(String, Checkpoint)> {
        let path = log_dir(&self.paths, class).join(CHECKPOINT_PATH);
        let bytes = service::files::read_bounded(&path, NOTE_BYTES_MAX as u64)
            .map_err(|e| Error::internal(format!("{}: {e}", path.display())))?;
        let origin = class.origin(&self.installation).map_err(Error::internal)?;
        let opened = Checkpoint::open(&bytes, &origin, &self.key, &[]).map_err(Error::internal)?;
        let text = String::from_utf8(bytes).map_err(Error::internal)?;
        Ok((text, opened.checkpoint))
    }

    async fn entries(
        &self,
        peer: &Peer,
        request_id: &str,
        wanted: &Wanted,
    ) -> api::Result<ReadEntries> {
        let invalid = |text: &str| Err(Error::new(ErrorCode::ValidationError, text));
        if wanted.count == 0 || wanted.count > READ_ENTRIES_MAX {
            return invalid("count: 1 to 256");
        }
        if wanted.reason.trim().is_empty() || wanted.reason.len() > REASON_MAX_BYTES {
            return invalid("reason: say why, in at most 256 bytes");
        }
        self.record(peer, request_id, wanted).await?;
        let class = log_class(wanted.class);
        let size = self.checkpoint(class)?.1.size;
        let leaves = self.leaves(class, wanted, size)?;
        let (keys, sealed) = self.batch_keys(wanted, &leaves).await;
        let entries = leaves
            .into_iter()
            .map(|(index, bytes, leaf)| entry(index, &bytes, &leaf, &keys))
            .collect();
        Ok(ReadEntries { entries, sealed })
    }

    /// Logs who reads what and why; nothing is read if this fails.
    async fn record(&self, peer: &Peer, request_id: &str, wanted: &Wanted) -> api::Result<()> {
        let data = [
            ("from".to_owned(), wanted.from.into()),
            ("count".to_owned(), wanted.count.into()),
            ("reason".to_owned(), wanted.reason.as_str().into()),
            ("uid".to_owned(), peer.uid.into()),
        ];
        let entry = Entry {
            event: "audit.read".into(),
            phase: Phase::Intent,
            request_id: request_id.to_owned(),
            account: None,
            actor: "operator".into(),
            subject: Some(wanted.class.name().into()),
            authority: None,
            lease: None,
            result: None,
            data: data.into_iter().collect(),
        };
        self.log.append(ApiClass::Security, entry).await?;
        Ok(())
    }

    /// The leaves asked for, as far as they fit one answer.
    fn leaves(
        &self,
        class: Class,
        wanted: &Wanted,
        size: u64,
    ) -> api::Result<Vec<(u64, Vec<u8>, Leaf)>> {
        let files = Tiles::new(log_dir(&self.paths, class));
        let end = size.min(wanted.from.saturating_add(u64::from(wanted.count)));
        let (mut out, mut bytes) = (Vec::new(), 0);
        for index in wanted.from..end {
            let bundle = Tile::at(Kind::Entries, index / u64::from(TILE_WIDTH), size)
                .ok_or_else(|| Error::internal("an entry below the size has a bundle"))?;
            let (bundle, stored) = [bundle, bundle.full()]
                .into_iter()
                .find_map(|t| files.tile(&t).transpose().map(|b| (t, b)))
                .ok_or_else(|| {
                    Error::new(
                        ErrorCode::NotFound,
                        format!("entry {index} is no longer kept"),
                    )
                })?;
            let stored = stored.map_err(Error::internal)?;
            let all = bundle.bundle_decode(&stored).map_err(Error::internal)?;
            let at = usize::try_from(index % u64::from(TILE_WIDTH)).map_err(Error::internal)?;
            let leaf = all
                .get(at)
                .ok_or_else(|| Error::internal("a short bundle"))?;
            bytes += leaf.len();
            out.push((
                index,
                leaf.to_vec(),
                Leaf::decode(leaf).map_err(Error::internal)?,
            ));
            if bytes >= READ_BYTES_SOFT {
                break;
            }
        }
        Ok(out)
    }

    /// The batch keys that the KMS opens, by their wraps, and why some are missing.
    async fn batch_keys(
        &self,
        wanted: &Wanted,
        leaves: &[(u64, Vec<u8>, Leaf)],
    ) -> (HashMap<Vec<u8>, Zeroizing<[u8; 32]>>, Option<String>) {
        let mut days: BTreeMap<u32, Vec<&Vec<u8>>> = BTreeMap::new();
        for (_, _, leaf) in leaves {
            let wraps = days.entry(leaf.day).or_default();
            if !wraps.contains(&&leaf.wrap_class) {
                wraps.push(&leaf.wrap_class);
            }
        }
        let (mut keys, mut sealed) = (HashMap::new(), None);
        for (day, wraps) in days {
            for wraps in wraps.chunks(LOG_OPEN_MAX) {
                let op = KmsOp::LogOpen {
                    class: wanted.class,
                    day,
                    wraps: wraps.iter().map(|w| STANDARD.encode(w)).collect(),
                    reason: wanted.reason.clone(),
                };
                let opened = self.kms.call::<_, Vec<String>>("audit-read", &op).await;
                match opened {
                    Ok(hexes) if hexes.len() == wraps.len() => {
                        for (wrap, text) in wraps.iter().zip(hexes) {
                            let text = Zeroizing::new(text);
                            let mut key = Zeroizing::new([0; 32]);
                            if hex::decode_to_slice(text.as_str(), key.as_mut_slice()).is_ok() {
                                keys.insert((*wrap).clone(), key);
                            }
                        }
                    }
                    Ok(_) => sealed = Some("the KMS answered with too few keys".to_owned()),
                    Err(e) => sealed = Some(e.to_string()),
                }
            }
        }
        (keys, sealed)
    }
}

/// The entry in clear if its key is there and it is what the leaf commits to.
fn entry(
    index: u64,
    bytes: &[u8],
    leaf: &Leaf,
    keys: &HashMap<Vec<u8>, Zeroizing<[u8; 32]>>,
) -> ReadEntry {
    let stamped = keys.get(&leaf.wrap_class).and_then(|key| open(leaf, key));
    ReadEntry {
        index,
        time_ms: leaf.time_ms,
        leaf: stamped.is_none().then(|| STANDARD.encode(bytes)),
        stamped,
    }
}

/// Opens a leaf under its batch key.
fn open(leaf: &Leaf, key: &[u8; 32]) -> Option<Stamped> {
    let plaintext = seal::aead::open(key, &[], &leaf.sealed).ok()?;
    let opening = Opening::from_plaintext(&plaintext).ok()?;
    opening.verify(leaf).ok()?;
    serde_json::from_slice(&opening.payload).ok()
}
