//! The bare wake: what the guest does in a wake, by QEMU alone.
//!
//! A workspace that only this measurement knows comes up in a bare VM and is saved to a plain file:
//! the artifacts, the template and the messages to the agent are the platform's. A wake is a new QEMU
//! on that memory and on a plain disk, and the agent's [`Wake`]: it verifies a token state, reads its
//! identity, reseeds, makes a TLS key and takes its address. Then come TCP, mutual TLS and the first
//! request, as the edge makes it. Around it are no jail, CPU quota, encryption, FUSE, keys, firewall,
//! edge and log: what the platform's wake takes longer is theirs.
//!
//! Unlike the platform's it wakes one memory again and again, with one seed.

use super::bare::{Bare, tap_name};
use super::disk::{ext4, quietly};
use super::platform::Platform;
use super::{median, ms};
use anyhow::{Context as _, Result, anyhow, ensure};
use api::agent::{
    Attach, GuestConfig, IDENTITY_MAGIC, IdentityBlock, ToGuest, VOLUME_OFFSET_BYTES, Wake,
};
use api::mint::{GatewayClaims, TokenState};
use model::{AccountId, StartId, WorkspaceId};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use seal::sign::{Signed, SigningKey, VerifyingKey};
use seal::tls::Identity;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, UNIX_EPOCH};
use tokio::runtime::Runtime;

/// Both ends of the tap: TEST-NET-1 (RFC 5737).
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PREFIX: u8 = 24;
/// The hardware address that the agent makes of [`GUEST`].
const GUEST_MAC: &str = "02:00:c0:00:02:02";
/// A token's life, s.
const TOKEN_S: i64 = 600;

/// A workspace that sleeps in a plain file.
pub(super) struct BareWake {
    bare: Bare,
    memory_mib: u32,
    play: Play,
    /// Of each so far, ms: QEMU with the memory, the agent until it is up, the request.
    wakes: Vec<[f64; 3]>,
    dir: Dir,
    network: Network,
}

impl BareWake {
    /// Becomes a workspace, answers its first request, and falls asleep.
    pub(super) fn asleep(platform: &Platform, runtime: &Runtime) -> Result<Self> {
        let dir = Dir::new(platform.paths.state_dir().join("baseline-wake"))?;
        let network = Network::new()?;
        let (mut bare, play) = (Bare::of(platform)?, Play::new());
        let memory_mib = platform.config.host.pool_memory_mb;
        let (memory, disk) = (dir.memory(), dir.disk());
        ext4(&disk, VOLUME_OFFSET_BYTES)?;
        let file = File::options().write(true).open(&disk)?;
        file.write_all_at(&play.area, 0)?;
        network.inside(|| {
            let mut vm = bare.restored(memory_mib)?;
            // As from the pool: only a VM that has run takes another disk.
            vm.first_answer()?;
            vm.stop()?;
            vm.up(&disk, &ToGuest::Attach(play.attach()?))?;
            play.ask(runtime)?;
            vm.save(&memory)
        })?;
        Ok(Self {
            bare,
            memory_mib,
            play,
            wakes: Vec::new(),
            dir,
            network,
        })
    }

    /// From nothing to the answer.
    pub(super) fn wake(&mut self, runtime: &Runtime) -> Result<Duration> {
        let (memory, disk) = (self.dir.memory(), self.dir.disk());
        let (bare, play) = (&mut self.bare, &self.play);
        let [there, up, answered] = self.network.inside(|| {
            let told = ToGuest::Wake(play.wake()?);
            let began = Instant::now();
            let mut vm = bare.woken(self.memory_mib, &memory)?;
            let there = began.elapsed();
            vm.up(&disk, &told)?;
            let up = began.elapsed();
            play.ask(runtime)?;
            Ok([there, up, began.elapsed()])
        })?;
        self.wakes.push([there, up - there, answered - up].map(ms));
        Ok(answered)
    }

    /// What it is, for people.
    pub(super) fn explain(&self) {
        let part = |n: usize| median(self.wakes.iter().map(|w| w[n]).collect());
        println!("# baseline of the bare wake: {}", self.bare.line);
        println!(
            "# it is the guest's work in a wake, by QEMU alone: VM {:.1} ms, agent {:.1} ms, \
             TLS and first request {:.1} ms",
            part(0),
            part(1),
            part(2)
        );
    }
}

/// A workspace with keys of its own, and who calls it.
struct Play {
    workspace: WorkspaceId,
    account: AccountId,
    /// The text of its [`GuestConfig`].
    config: String,
    /// Signed.
    token_state: String,
    /// What lies at the front of its disk.
    area: Vec<u8>,
    /// Signs gateway tokens.
    gateway: SigningKey,
    guest: VerifyingKey,
    edge: Identity,
}

impl Play {
    fn new() -> Self {
        let (mint, gateway) = (SigningKey::generate(), SigningKey::generate());
        let (guest, edge) = (SigningKey::generate(), SigningKey::generate());
        let workspace = WorkspaceId::from_bytes(seal::random::bytes());
        let account = AccountId::from_bytes(seal::random::bytes());
        let config = serde_json::json!(GuestConfig {
            workspace: workspace.clone(),
            hostname: "bench".into(),
            env: Vec::new(),
            cmd: Vec::new(),
        })
        .to_string();
        let state = TokenState {
            workspace: workspace.clone(),
            account: account.clone(),
            epoch: 1,
            raw_hash: String::new(),
            enabled: true,
            gone: false,
            identity_pub: guest.public().to_hex(),
            seq: 1,
        };
        let block = serde_json::json!(IdentityBlock {
            workspace: workspace.clone(),
            start_id: StartId::from_bytes(seal::random::bytes()),
            seed: hex::encode(seal::random::bytes::<64>()),
            identity_seed: hex::encode(*guest.seed()),
            config_digest: hex::encode(seal::hash::sha256(config.as_bytes())),
            mint_key: mint.public().to_hex(),
            gateway_key: gateway.public().to_hex(),
            edge_key: edge.public().to_hex(),
        })
        .to_string();
        let length = u32::try_from(block.len()).unwrap_or(u32::MAX).to_be_bytes();
        Self {
            token_state: Signed::new(&mint, api::context::TOKEN_STATE, &state).to_string(),
            area: [IDENTITY_MAGIC, &length[..], block.as_bytes()].concat(),
            guest: guest.public(),
            edge: Identity::new(edge),
            workspace,
            account,
            config,
            gateway,
        }
    }

    fn attach(&self) -> Result<Attach> {
        Ok(Attach {
            time_unix_ns: now_ns()?,
            config: self.config.clone(),
            token_state: self.token_state.clone(),
            ip: GUEST.to_string(),
            prefix: PREFIX,
            gateway: GATEWAY.to_string(),
        })
    }

    fn wake(&self) -> Result<Wake> {
        Ok(Wake {
            time_unix_ns: now_ns()?,
            token_state: self.token_state.clone(),
            ip: GUEST.to_string(),
            prefix: PREFIX,
            gateway: GATEWAY.to_string(),
        })
    }

    /// `GET /health`, as the edge asks.
    fn ask(&self, runtime: &Runtime) -> Result<()> {
        let now_s = i64::try_from(UNIX_EPOCH.elapsed()?.as_secs())?;
        let claims = GatewayClaims {
            iss: "casemate".into(),
            sub: self.account.to_string(),
            aud: self.workspace.to_string(),
            iat: now_s,
            exp: now_s + TOKEN_S,
            jti: "bench".into(),
            epoch: 1,
        };
        let token = seal::jwt::sign(&self.gateway, &claims);
        let ends = (&self.guest, &self.edge);
        let asked = cli::agent::over_mtls_unlisted(ends, &self.workspace, GUEST, "/health", &token);
        let status = runtime.block_on(asked).context("the bare workspace")?;
        ensure!(status == "200", "the bare workspace answered {status}");
        Ok(())
    }
}

fn now_ns() -> Result<u64> {
    Ok(u64::try_from(UNIX_EPOCH.elapsed()?.as_nanos())?)
}

/// The files of what sleeps. A directory that goes with its owner.
struct Dir(PathBuf);

impl Dir {
    fn new(path: PathBuf) -> Result<Self> {
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn memory(&self) -> PathBuf {
        self.0.join("memory")
    }

    fn disk(&self) -> PathBuf {
        self.0.join("disk")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            eprintln!("bench: remove {}: {e}", self.0.display());
        }
    }
}

/// A network of its own with one tap for one guest, so that the machine's stays as it is, whatever
/// addresses it has. It goes with its owner.
struct Network(String);

impl Network {
    fn new() -> Result<Self> {
        let name = format!("casemate-bench-{}", std::process::id());
        ip(&["netns", "add", &name])?;
        let me = Self(name);
        // As the platform's: no IPv6 (if the kernel has any), and the neighbour is known.
        me.inside(|| {
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
            Ok(())
        })?;
        let (tap, guest) = (tap_name(), GUEST.to_string());
        let address = format!("{GATEWAY}/{PREFIX}");
        for words in [
            &["tuntap", "add", "mode", "tap", "dev", &tap][..],
            &["address", "add", &address, "dev", &tap],
            &["link", "set", "up", "dev", &tap],
            &["neighbour", "add", &guest, "lladdr", GUEST_MAC, "dev", &tap],
        ] {
            ip(&[&["-netns", &me.0], words].concat())?;
        }
        Ok(me)
    }

    /// Does it with this network: on a thread, which alone moves.
    fn inside<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let network = File::open(Path::new("/run/netns").join(&self.0))?;
        let moved = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(network.as_fd(), kind)?;
            act()
        };
        std::thread::scope(|scope| scope.spawn(moved).join())
            .map_err(|_| anyhow!("it panicked; see above"))?
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(e) = ip(&["netns", "delete", &self.0]) {
            eprintln!("bench: {e:#}");
        }
    }
}

fn ip(words: &[&str]) -> Result<()> {
    quietly(Command::new("ip").args(words))
}
