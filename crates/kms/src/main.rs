//! `casemate-kms`: serves `kms/kms.sock`.

use anyhow::{Context as _, bail};
use kms::check::Trust;
use kms::fault::Faults;
use kms::{Kms, Setup};
use service::paths::Paths;
use service::{Boot, Command, audit, metrics, rpc, trust};
use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

const PEERS: &[&str] = &["control", "host", "audit-read", "root"];

fn main() -> anyhow::Result<()> {
    seal::secret::harden_process()?;
    seal::secret::install_secret_heap(kms::limits::SECRET_HEAP_BYTES)?;
    let boot = service::boot("kms")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match boot.command {
            Command::Init => init(&boot).await,
            Command::Run => run(boot).await,
        }
    })
}

async fn init(boot: &Boot) -> anyhow::Result<()> {
    let kind = match boot.rest.as_slice() {
        [] => boot.config.kms.unseal,
        [flag, kind] if flag == "--unseal" => match kind.as_str() {
            "file" => api::kms::Unseal::File,
            "passphrase" => api::kms::Unseal::Passphrase,
            _ => bail!("--unseal takes `file` or `passphrase`"),
        },
        _ => bail!("init takes only --unseal file|passphrase"),
    };
    let dir = boot.paths.state("kms");
    let is_new = !dir.join("unseal.json").exists();
    let passphrase = match kind {
        api::kms::Unseal::Passphrase if is_new => Some(passphrase_read()?),
        _ => None,
    };
    let text = passphrase.as_ref().map(|p| p.as_bytes());
    let public = kms::init::init(&dir, text, boot.clock.now_ms()).await?;
    service::print_trust(&BTreeMap::from([(trust::KMS, public.into())]));
    Ok(())
}

/// One line of standard input: never argv, never the environment.
fn passphrase_read() -> anyhow::Result<seal::Zeroizing<String>> {
    let mut text = seal::Zeroizing::new(String::with_capacity(2_048));
    std::io::stdin()
        .take(2_048)
        .read_to_string(&mut text)
        .context("read the passphrase from standard input")?;
    let line = text.trim_end_matches(['\r', '\n']);
    if line.contains('\n') {
        bail!("the passphrase is one line of standard input");
    }
    Ok(seal::Zeroizing::new(line.to_owned()))
}

async fn run(boot: Boot) -> anyhow::Result<()> {
    let paths = &boot.paths;
    let dir = paths.state("kms");
    let lock = std::fs::File::create(dir.join("lock")).context("run `casemate-kms init` first")?;
    if lock.try_lock().is_err() {
        bail!(
            "another casemate-kms runs on {}; stop it first",
            dir.display()
        );
    }
    let kms = Kms::open(Setup {
        dir,
        trust: trust_load(paths, &boot.config.installation.name)?,
        log: audit::Log::new(paths),
        clock: boot.clock.clone(),
        faults: Faults::default(),
    })
    .await?;
    let mut registry = prometheus_client::registry::Registry::default();
    kms.metrics().register(&mut registry);
    let _metrics = metrics::serve(&paths.socket("kms", "metrics"), registry)?;
    let listener = rpc::bind(&paths.socket("kms", "kms"))?;
    let uids = Arc::new(rpc::Uids::load(paths)?);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    if kms.means() == api::kms::Unseal::File {
        tokio::spawn(kms::duties::unseal_until_done(Arc::new(kms.clone())));
    }
    let duties = tokio::spawn(kms.clone().duties());
    let handler = {
        let kms = kms.clone();
        move |peer, request_id, op| {
            let kms = kms.clone();
            async move { kms.handle(peer, request_id, op).await }
        }
    };
    let server = tokio::spawn(rpc::serve(listener, uids, PEERS, stopped, handler));
    service::stop_requested().await;
    let _ = stop.send(true);
    let _ = server.await;
    duties.abort();
    kms.close().await;
    drop(lock);
    Ok(())
}

fn trust_load(paths: &Paths, installation: &str) -> anyhow::Result<Trust> {
    let measurements = trust::measurements(paths)?
        .remove("disk")
        .unwrap_or_default();
    if measurements.is_empty() {
        tracing::warn!("measurements.json names no `disk`: no key will be released");
    }
    Ok(Trust {
        audit: trust::key(paths, trust::AUDIT)?,
        origin: tlog::class::Class::Host.origin(installation)?,
        mint: trust::key(paths, trust::MINT)?,
        gateway: trust::key(paths, trust::GATEWAY)?,
        edge: trust::key(paths, trust::EDGE)?,
        hosts: trust::hosts(paths)?,
        disk_measurements: measurements,
    })
}
